"""Reading and writing files. Whatever goes wrong is an InputError, a sentence that names the file."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minipass.errors import InputError


@contextmanager
def explained(complaint: str, kinds: type | tuple[type, ...] = Exception) -> Iterator[None]:
    """Turns errors of these kinds into an InputError: the complaint, and the error's message in one line."""
    try:
        yield
    except InputError:  # says it already
        raise
    except kinds as error:
        first, *others = str(error).strip().splitlines() or [type(error).__name__]
        says = f"{first} {others[0].strip()}" if first.endswith(":") and others else first
        raise InputError(f"{complaint}: {says}") from error


def read(file: Path, reader: Callable[[Path], Any], missing: str = "") -> Any:
    """What reader(file) returns. Raises InputError when it fails, or when there is no file; `missing` may say that."""
    if not os.path.isfile(file):  # False where Path.is_file raises: a name that is too long
        raise InputError(missing or f"{file} is {_no_file(file) or 'missing'}")
    with explained(f"{file} is damaged or only half there, or of another kind"):
        return reader(file)


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls write(temporary path) and renames the result to `path`; on any failure `path` is as it was.

    Where `path` is a link, the file that it leads to is written. Raises InputError when `path` is a folder, device or
    pipe, and when the folder or the disk does not take the file.
    """
    if _no_file(path):
        raise InputError(f"cannot write {path}: it is {_no_file(path)}")
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with explained(f"cannot write {path}", (OSError, RuntimeError)):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                write(temporary)
            except RuntimeError:  # torch's words for a full disk, perhaps: another write raises an OSError then
                with open(temporary, "ab") as file:
                    file.write(bytes(2**20))
                raise
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())  # before the name is given away: power may fail
            os.replace(temporary, target)
    finally:
        if os.path.isfile(temporary):  # False, not an error, where the folder itself is none
            temporary.unlink()


def check_replaceable(path: Path, mark: str) -> None:
    """Before long work: raises InputError when `path` holds something else than an earlier file of ours, which has
    `mark` near its beginning."""
    if _no_file(path):
        raise InputError(f"cannot write {path}: it is {_no_file(path)}")
    if os.path.exists(path):
        with explained(f"cannot write {path}", OSError), open(path, "rb") as file:
            if mark.encode() not in file.read(4096):
                raise InputError(f"{path} exists already and is another file: name another one")


def _no_file(path: Path) -> str:
    """What is there that is no file; empty where there is one, or nothing."""
    if not os.path.exists(path) or os.path.isfile(path):  # both False, not an error, for a name that is too long
        return ""
    return "a folder" if os.path.isdir(path) else "a device or pipe"


@contextmanager
def heedless() -> Iterator[None]:
    """For output within long work, which goes on silently when nobody reads it any more, as after a `tee` has died."""
    try:
        yield
        sys.stdout.flush()
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
