"""Reading and writing files: what goes wrong with one is an InputError, a sentence that names it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minipass.errors import InputError


@contextmanager
def explained(complaint: str, kinds: type | tuple[type, ...] = Exception) -> Iterator[None]:
    """Turns errors of these kinds into an InputError: the complaint, and what the error says in one line."""
    try:
        yield
    except InputError:  # says it already
        raise
    except kinds as error:
        first, *others = str(error).strip().splitlines() or [type(error).__name__]
        says = f"{first} {others[0].strip()}" if first.endswith(":") and others else first
        raise InputError(f"{complaint}: {says}") from error


def read(file: Path, reader: Callable[[Path], Any], missing: str = "") -> Any:
    """What reader(file) returns. Raises InputError when there is no such file (`missing` may say more) or it fails."""
    if not os.path.isfile(file):  # False where Path.is_file raises: a name that is too long
        raise InputError(missing or f"{file} is missing")
    with explained(f"{file} is damaged or only half there, or of another kind"):
        return reader(file)


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls write(temporary path) and renames the result to `path`; on any failure `path` is as it was.

    Raises InputError when the folder or the disk does not take the file.
    """
    if not path.name:
        raise InputError(f"cannot write {path}: it is a folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained(f"cannot write {path}", (OSError, RuntimeError)):  # torch reports a full disk as a RuntimeError
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
    finally:
        if os.path.isfile(temporary):  # False, not an error, where the folder itself is none
            temporary.unlink()
