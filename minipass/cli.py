"""What the three scripts share: choosing device and dtype, and one clear sentence instead of a traceback."""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

from minipass import kernels
from minipass.errors import InputError

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
SHORTAGE = re.compile("out of memory|allocate memory|size calculation overflowed")  # how torch's RuntimeErrors say it


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises InputError for an unknown or absent device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32. Raises InputError if unknown."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = kernels.bfloat16_pays()
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}; use auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """As --dtype takes it."""
    return str(dtype).removeprefix("torch.")


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main; a user's mistake becomes one sentence on standard error and exit status 2.

    A closed standard stream counts as empty. Characters that the output cannot show are printed as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the end
    sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does already
    try:
        try:
            main()
        finally:  # also after --help, which ends with SystemExit
            print(end="", flush=True)
    except InputError as error:
        _say(str(error))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not SHORTAGE.search(str(error)):
            raise
        _say("there is not enough memory: take a smaller model, batch or window")
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader went away (`| head`): that is no error
        _discard_output()
        sys.exit(0)
    except OSError as error:  # a standard stream, as on a full disk, or a file
        _say(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        _discard_output()
        sys.exit(2)


def _say(sentence: str) -> None:
    with suppress(OSError):  # of a full disk: the exit status still tells
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(sentence.split())}", file=sys.stderr)


def _discard_output() -> None:
    """Discards what standard output still holds; otherwise Python tries to write it at exit and complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
