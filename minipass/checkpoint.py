"""Saving and loading a model with its tokenizer, sizes and training record in one file, safely.

A file is written beside its place and then renamed, so an interrupt or a full disk never harms what was there. Loading
executes no code: `torch.load(weights_only=True)` builds tensors and plain containers only.
"""

import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tiktoken
import torch

from minipass import hf  # which uses this module, too; both wait with that until they are called
from minipass.errors import InputError
from minipass.model import GPT, GPTConfig
from minipass.tokenizer import encoding_of, gpt2_encoding

FORMAT, VERSION = "minipass checkpoint", 1
SHIPPED = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. record: how it was trained (plain values); training: what `--resume` needs, or None."""

    model: GPT
    encoding: tiktoken.Encoding
    record: dict[str, Any]
    training: dict[str, Any] | None


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls write(temporary path) and renames the result to `path`; on any failure `path` stays as it was.

    Raises InputError when the folder or the disk does not take the file.
    """
    if not path.name:
        raise InputError(f"cannot write {path}: it is a folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise InputError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        if os.path.isfile(temporary):  # False, not an error, where the folder itself is none
            temporary.unlink()


def save(
    path: Path | str,
    model: GPT,
    encoding: tiktoken.Encoding,
    record: dict[str, Any],
    *,
    training: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    base: str | None = None,
) -> None:
    """Writes a checkpoint atomically, its weights cast to `dtype` (None: as they are). Raises InputError.

    base: the GPT-2, as hf.load_folder takes it, that all weights but the look-ahead table are those of: then only the
    table is stored.
    """
    weights = {name: value.detach().to("cpu", dtype or value.dtype) for name, value in model.state_dict().items()}
    if base is not None:
        weights = {"lookahead": weights["lookahead"]}
    tokenizer: dict[str, Any] = {"name": encoding.name}
    if encoding.name != "gpt2":  # tiktoken keeps that one itself
        tokenizer["tokens"] = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)]
    content = {"format": FORMAT, "version": VERSION, "config": asdict(model.config), "weights": weights}
    content |= {"tokenizer": tokenizer, "record": record, "training": training, "base": base}
    atomic_write(Path(path), lambda temporary: torch.save(content, temporary))


def load(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Reads a checkpoint; the model comes in `dtype` on `device`, in evaluation mode.

    `path` is a file, the bare name of a checkpoint that comes with the package ("joint"), or a GPT-2: a folder with
    Hugging Face's files, or one of hf.HUB_NAMES.
    Raises InputError for a file that is missing, damaged, of another kind or version, or that would run code.
    """
    path = Path(path)
    if hf.is_gpt2(path):
        read = Checkpoint(hf.load_folder(path), gpt2_encoding(), {}, None)
    else:
        read = _read(path)
    if read.encoding.n_vocab != read.model.config.vocab_size:
        raise InputError(
            f"{path} has a vocabulary of {read.encoding.n_vocab} tokens, but a model of {read.model.config.vocab_size}"
        )
    read.model.to(device=device, dtype=dtype).eval()
    return read


def _read(path: Path) -> Checkpoint:
    """What is in a file of this package."""
    if not os.path.exists(path) and path.parent == Path(".") and not path.suffix:
        path = SHIPPED / f"{path.name}.pt"
    if not os.path.isfile(path):  # False where Path.is_file raises: a name that is too long
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.pt"))) or "none"
        raise InputError(f"there is no checkpoint {path} (shipped with the package: {names})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused just below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is not a minipass checkpoint, or would run code when read; not loaded") from error
    except Exception as error:  # bytes that are no checkpoint can break the reader in any way
        raise InputError(f"{path} is damaged or not a checkpoint: {first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a minipass checkpoint")
    if content.get("version") != VERSION:
        raise InputError(f"{path} has checkpoint version {content.get('version')!r}; this package reads {VERSION}")
    base = content.get("base")
    model = hf.load_folder(base) if isinstance(base, str) else None
    try:
        if model is None:
            model = GPT(GPTConfig(**content["config"]))
            model.load_state_dict(content["weights"])
        else:
            model.set_lookahead(content["weights"]["lookahead"])
            if model.config != GPTConfig(**content["config"]):
                raise TypeError(f"the sizes of {base} are others now")
        tokenizer = content["tokenizer"]
        encoding = gpt2_encoding() if tokenizer["name"] == "gpt2" else encoding_of(tokenizer["tokens"])
        record, training = content.get("record") or {}, content.get("training")
        if not isinstance(record, dict) or not isinstance(training, dict | None):
            raise TypeError("its training record is not a dictionary")
    except Exception as error:  # tiktoken asserts, others raise what they like
        raise InputError(f"{path} does not hold what its config says: {first_line(error)}") from error
    return Checkpoint(model, encoding, record, training)


def first_line(error: BaseException) -> str:
    """What an error says in one line, or its class where it says nothing."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first
