"""The one exception for the user's mistakes. Scripts print its sentence and exit with status 2."""

import math
import operator
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence that says what and what is allowed."""


def whole(value: Any, name: str, least: int, most: float = math.inf) -> int:
    """`value` as an int: Python's, numpy's, or a tensor of one. Raises InputError for all else, or out of bounds."""
    bounds = f"of at least {least}" if most == math.inf else f"in {least}..{most}"
    try:
        number = math.nan if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = math.nan
    if not least <= number <= most:
        try:
            shown = repr(value)[:60]
        except ValueError:  # Python prints no whole number of more than 4300 digits
            shown = "one of thousands of digits"
        raise InputError(f"{name} must be a whole number {bounds}, not {shown}")
    return number
