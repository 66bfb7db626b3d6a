"""The one exception for mistakes of the user: scripts turn it into one sentence and exit status 2."""

import math
import operator
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence that says what and what is allowed."""


def whole(value: Any, name: str, least: int, most: float = math.inf) -> int:
    """`value` as an int: Python's, numpy's, or a tensor of one. Raises InputError for all else, or out of bounds."""
    bounds = f"of at least {least}" if most == math.inf else f"in {least}..{most}"
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number {bounds}, not {value!r:.60}") from None
    if not least <= number <= most:
        raise InputError(f"{name} must be a whole number {bounds}, not {number}")
    return number
