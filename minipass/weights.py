"""Reads and writes models: this package's checkpoints, and adapters, which hold all that was trained to draft.

A checkpoint is one file: weights, sizes, tokenizer and training record. pretrained.py reads models of others. Adapters
are a file of their own: a look-ahead table (L, n_embd), with a draft head and gated adapters if these were trained. It
names its base by a fingerprint and fits any copy of it; a model's folder holds its own as `lookahead.safetensors`.

Reading executes no code: safetensors are plain tensors, `torch.load(weights_only=True)` builds only plain values.
Every file is written under another name and then renamed, so an interrupt or a full disk harms no older file.
"""

import hashlib
import json
import os
import pickle
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tiktoken
import torch

from minipass.errors import InputError
from minipass.files import atomic_write, explained, read
from minipass.model import GPT, GPTConfig, is_drafting
from minipass.pretrained import (
    CONFIG,
    SHIPPED,
    SMOLLM2,
    checked,
    is_pretrained,
    is_shipped,
    load_pretrained,
    read_metadata,
    read_tensors,
    without_numbers,
    write_folder,
    write_tensors,
)
from minipass.tokenizer import END_OF_TEXT, PATTERN, encoding_of, gpt2_encoding

FORMAT, VERSION = "minipass checkpoint", 1
MODEL, ADAPTERS = "model.pt", "adapters.safetensors"  # a finished run's folder holds one of them
TABLE = "lookahead.safetensors"
NONE = "none"  # as adapters: the look-ahead table alone, as in the paper
UNSTORABLE = AttributeError, TypeError, pickle.PicklingError  # what torch raises for values that are not plain
FINGERPRINTED = 1024  # values of each weight that go into a fingerprint


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that belongs to it. record: how it was trained (plain values). training: what `--resume` needs,
    or None. chat_template: the form of a conversation, in Jinja, or None if the model was not trained for any."""

    model: GPT
    encoding: tiktoken.Encoding
    record: dict[str, Any]
    training: dict[str, Any] | None = None
    chat_template: str | None = None


def load(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    adapters: Path | str | None = None,
) -> Checkpoint:
    """Reads a checkpoint or a model of others; the model comes in `dtype` on `device`, in evaluation mode.

    path: the bare name of a checkpoint that comes with the package ("joint"), a file, the folder of a finished run, or
    what pretrained.py reads: "smollm2", a GGUF file, a folder of a GPT-2 or Llama, a name on the hub. A bare name means
    the package's; write "./joint" for a file or folder of that name. adapters: a file of them, or the folder of a run.
    Without it a model of others takes the adapters in its folder, or the best that come with the package for it; with
    NONE it takes the look-ahead table alone. Raises InputError for a file that is missing, damaged, of another kind or
    version, that holds numbers that are not finite, or that would run code.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype must be one of torch's for real numbers, as torch.float32, not {dtype!r:.60}")
    loaded = load_base(path)
    alone = str(adapters) == NONE
    if adapters is None or alone:
        adapters = _adapters_for(path, loaded.model, alone=alone)
    record = {} if adapters is None else load_adapters(loaded.model, adapters)
    if alone:
        if loaded.model.draft_head or loaded.model.config.lora_rank:
            record = {"rank_accuracy": []}  # it was measured with what goes now
        loaded.model.new_draft_head(0)
        loaded.model.new_adapters(0)
    loaded.model.to(device=device, dtype=dtype).eval()
    if dtype != torch.float32:  # float16 cannot hold all numbers that were checked in float32
        checked(loaded.model.state_dict(), f"{path}, made {dtype},")
    return replace(loaded, record=loaded.record | record)


def load_base(path: Path | str) -> Checkpoint:
    """A checkpoint, or a model of others without any adapters; float32 on the CPU. Raises InputError as `load`."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"a checkpoint is a path or a name, not {path!r}")
    if is_pretrained(path):
        theirs = load_pretrained(path)
        loaded = Checkpoint(theirs.model, theirs.encoding, {}, None, theirs.chat_template)
    else:
        loaded = _read_checkpoint(path)
    n_tokens, vocab_size = loaded.encoding.n_vocab, loaded.model.config.vocab_size
    if n_tokens != vocab_size:
        raise InputError(f"{path} has a vocabulary of {n_tokens} tokens, but a model of {vocab_size}")
    return loaded


def _adapters_for(path: Path | str, model: GPT, *, alone: bool) -> Path | None:
    """The adapters in a model's folder, or else those in the package; None if there are none, or it has its own."""
    if model.config.n_lookahead or not is_pretrained(path):
        return None
    if str(path) != SMOLLM2 and os.path.isfile(Path(path) / TABLE):  # the bare name means the package's
        return Path(path) / TABLE
    ours = fingerprint(model)
    for file in sorted(SHIPPED.glob("*.safetensors")):
        if file.stem.endswith("-table") == alone and read_metadata(file).get("base") == ours:
            return file
    return None


def fingerprint(model: GPT) -> str:
    """Names a model, without what only drafting reads: equal for all its copies, in any file, in bfloat16 or wider.

    It hashes FINGERPRINTED values of each weight or a few more, as bfloat16.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not is_drafting(name):
            flat = value.detach().flatten()
            flat = flat[:: max(1, len(flat) // FINGERPRINTED)].to("cpu", torch.bfloat16).contiguous()
            digest.update(f"{name} {tuple(value.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


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
    """Writes a checkpoint, its weights cast to `dtype` (None: as they are). Raises InputError.

    base: a frozen model of others, by name or path: only what was trained to draft for it is stored then.
    """
    weights = {name: value.detach().to("cpu", dtype or value.dtype) for name, value in model.state_dict().items()}
    if base is not None:
        weights = _drafting(weights)
    tokenizer: dict[str, Any] = {"name": encoding.name}
    if base is None and encoding.name != "gpt2":  # tiktoken has that one itself
        check_storable(encoding)
        tokenizer["tokens"] = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)]
    content = {"format": FORMAT, "version": VERSION, "config": asdict(model.config), "weights": weights}
    content |= {"tokenizer": tokenizer, "record": record, "training": training, "base": base}
    content["fingerprint"] = None if base is None else fingerprint(model)

    def write(temporary: Path) -> None:
        with explained(f"cannot write {path}, as its record could not be read again", UNSTORABLE):
            torch.save(record, temporary)  # alone: weights are large, and always plain
            _unpickled(temporary)
        torch.save(content, temporary)

    atomic_write(Path(path), write)


def check_storable(encoding: tiktoken.Encoding) -> None:
    """Raises InputError when a checkpoint cannot hold this tokenizer."""
    ours = encoding._pat_str == PATTERN and encoding.special_tokens_set == {END_OF_TEXT}  # others cut text otherwise
    if not ours and encoding.name != "gpt2":
        raise InputError(
            "a checkpoint cannot hold a tokenizer of others: train for the frozen model with --stage lookahead, or "
            "save the model as a folder"
        )


def save_pretrained(model: GPT, folder: str | Path, record: dict[str, Any] | None = None) -> None:
    """Writes a folder that Transformers opens, in the model's dtype, with the adapters in it, and with them the record
    of their training. Raises InputError.

    The tokenizer's files are not written: those of the original model fit.
    """
    write_folder(model, folder)
    if model.config.n_lookahead:
        save_adapters(model, Path(folder) / TABLE, record)
    else:
        (Path(folder) / TABLE).unlink(missing_ok=True)  # of another model that was here


def load_adapters(model: GPT, file: str | Path) -> dict[str, Any]:
    """Gives `model` the look-ahead table in `file`, of any length L, the draft head and the gated adapters there.

    A folder stands for the ADAPTERS of the run in it. Returns the record of their training. Raises InputError when the
    file is missing, damaged, of another kind, not finite, or made for another width or another base.
    """
    if not isinstance(file, str | os.PathLike) or not str(file):
        raise InputError(f"a file of adapters is a path, not {file!r:.60}")
    if os.path.isdir(file):
        file = Path(file) / ADAPTERS
    tensors, metadata = read_tensors(Path(file)), read_metadata(Path(file))
    if "lookahead" not in tensors or len(_drafting(tensors)) < len(tensors):
        raise InputError(f"{file} holds no adapters: it should have `lookahead`, and what else was trained to draft")
    base = metadata.get("base")  # older files do not say
    if base is not None and base != fingerprint(model):
        raise InputError(f"{file} was trained for another model")
    _set_drafting(model, checked(tensors, file), file)
    return _record(read(Path(file), lambda _: json.loads(metadata.get("record", "{}"))), file)


def save_adapters(
    model: GPT, file: str | Path, record: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Writes what only drafting reads, in `dtype` (None: the model's), and the base's fingerprint.

    Raises InputError.
    """
    tensors = {name: value.to(dtype or value.dtype) for name, value in _drafting(model.state_dict()).items()}
    write_tensors(Path(file), tensors, {"base": fingerprint(model), "record": json.dumps(record or {})})


def _drafting(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if is_drafting(name)}


def _set_drafting(model: GPT, tensors: dict[str, torch.Tensor], file: str | Path) -> None:
    """Replaces all that only drafting reads. Raises InputError, before anything changes, if it does not fit."""
    n_draft = tensors["draft_head.c_fc.bias"].numel() if "draft_head.c_fc.bias" in tensors else 0
    lora_rank = next((value.shape[0] for name, value in tensors.items() if name.endswith(".down") and value.dim()), 0)
    table = tensors["lookahead"]
    if table.dim() == 2 and table.shape[1] == model.config.n_embd:  # else set_lookahead has a sentence
        config = replace(model.config, n_lookahead=len(table), n_draft=n_draft, lora_rank=lora_rank)
        fits = {name: value.shape for name, value in _drafting(without_numbers(config).state_dict()).items()}
        if fits != {name: value.shape for name, value in tensors.items()}:
            raise InputError(f"the adapters in {file} do not fit the model, or are only half there")
    model.set_lookahead(table)
    model.new_draft_head(n_draft)
    model.new_adapters(lora_rank)
    model.load_state_dict(tensors, strict=False)  # none is missing or unknown: that was checked


def _read_checkpoint(path: Path | str) -> Checkpoint:
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.pt"))) or "none"
    missing = f"there is no checkpoint {path} (shipped with the package: {names})"
    if is_shipped(path):
        path = SHIPPED / f"{path}.pt"
    elif os.path.isdir(path):
        missing = f"there is no checkpoint in the folder {path}: neither {MODEL}, of a run, nor {CONFIG}"
        path = Path(path) / MODEL
    content = read(Path(path), _unpickled, missing)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a minipass checkpoint")
    if content.get("version") != VERSION:
        raise InputError(f"{path} has checkpoint version {content.get('version')!r}; this package reads {VERSION}")
    base = content.get("base")
    theirs = load_pretrained(base) if isinstance(base, str) else None
    with explained(f"{path} does not hold what its config says"):  # tiktoken asserts, others raise what they like
        config, tokenizer = GPTConfig(**content["config"]), content["tokenizer"]
        if theirs is None:
            model = GPT(config)
            model.load_state_dict(checked(content["weights"], path))
            encoding = gpt2_encoding() if tokenizer["name"] == "gpt2" else encoding_of(tokenizer["tokens"])
        else:
            model, encoding = theirs.model, theirs.encoding
            _set_drafting(model, checked(content["weights"], path), path)
            if model.config != config or content.get("fingerprint") not in (None, fingerprint(model)):
                raise TypeError(f"{base} is another model now")
        record, training = _record(content.get("record") or {}, path), content.get("training")
        if not isinstance(training, dict | None):
            raise TypeError("what --resume needs is not a dictionary")
    return Checkpoint(model, encoding, record, training, theirs.chat_template if theirs else None)


def _record(record: Any, file: str | Path) -> dict[str, Any]:
    """The record of a training, as a file gives it. Raises InputError when it is of another kind."""
    if isinstance(record, dict) and "hits" in record:  # its name in older files
        record["rank_accuracy"] = record.pop("hits")
    if not isinstance(record, dict) or not isinstance(record.get("rank_accuracy", []), list):
        raise InputError(f"{file} has a training record of another kind")
    return record


def _unpickled(file: Path) -> Any:
    """What torch.save wrote: plain values and tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused just below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its own message explains how to run the code anyway
        raise TypeError("it is not a minipass checkpoint, or would run code when read; not loaded") from error
