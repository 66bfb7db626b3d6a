"""Models in files and out: this package's checkpoints, GPT-2 as Hugging Face's libraries keep it, look-ahead tables.

A checkpoint is one file: weights, sizes, tokenizer and training record. A GPT-2 is a folder with config.json and
model.safetensors or its shards. A look-ahead table (L, n_embd) is a file of its own, which fits any copy of its base;
`lookahead.safetensors` in a GPT-2's folder is one. minipass/extras/export.py writes such a folder.

Reading executes no code: safetensors are plain tensors, `torch.load(weights_only=True)` builds plain values only.
Every file is written under another name and then renamed: an interrupt or a full disk does not harm what was there.
"""

import importlib
import json
import os
import pickle
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import tiktoken
import torch

from minipass.errors import InputError
from minipass.files import atomic_write, explained, read
from minipass.model import DRAFTING, GPT, GPTConfig
from minipass.tokenizer import encoding_of, gpt2_encoding

FORMAT, VERSION = "minipass checkpoint", 1
SHIPPED = Path(__file__).parent / "checkpoints"
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TABLE = "lookahead.safetensors"
SIZES = {  # GPTConfig's names and Transformers'
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
COMPUTED = {  # what our forward pass does; a config that asks for something else is refused
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")  # stored there as (in, out), not (out, in)
BUFFERS = (".attn.bias", ".attn.masked_bias")  # older files carry the causal mask


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. record: how it was trained (plain values); training: what `--resume` needs, or None."""

    model: GPT
    encoding: tiktoken.Encoding
    record: dict[str, Any]
    training: dict[str, Any] | None


def load(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Reads a checkpoint or a GPT-2; the model comes in `dtype` on `device`, in evaluation mode.

    `path` is a file, the bare name of a checkpoint that comes with the package ("joint"), a GPT-2's folder, or one of
    HUB_NAMES. Raises InputError for a file that is missing, damaged, of another kind or version, or would run code.
    """
    path = Path(path)
    loaded = Checkpoint(load_folder(path), gpt2_encoding(), {}, None) if is_gpt2(path) else _read_checkpoint(path)
    n_tokens, vocab_size = loaded.encoding.n_vocab, loaded.model.config.vocab_size
    if n_tokens != vocab_size:
        raise InputError(f"{path} has a vocabulary of {n_tokens} tokens, but a model of {vocab_size}")
    loaded.model.to(device=device, dtype=dtype).eval()
    return loaded


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

    base: the GPT-2, as load_folder takes it, that all weights are those of but for the look-ahead table and the draft
    head: then only these are stored.
    """
    weights = {name: value.detach().to("cpu", dtype or value.dtype) for name, value in model.state_dict().items()}
    if base is not None:
        weights = _drafting(weights)
    tokenizer: dict[str, Any] = {"name": encoding.name}
    if encoding.name != "gpt2":  # tiktoken keeps that one itself
        tokenizer["tokens"] = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)]
    content = {"format": FORMAT, "version": VERSION, "config": asdict(model.config), "weights": weights}
    content |= {"tokenizer": tokenizer, "record": record, "training": training, "base": base}
    atomic_write(Path(path), lambda temporary: torch.save(content, temporary))


def is_gpt2(name: str | Path) -> bool:
    """Whether `name` is a folder, or a name on the hub that no file has here."""
    return os.path.isdir(name) or (str(name) in HUB_NAMES and not os.path.exists(name))


def from_pretrained(name_or_folder: str | Path, n_lookahead: int = 0) -> GPT:
    """A GPT-2 from a local folder or, by one of HUB_NAMES, from the hub or its cache; float32, CPU, evaluation mode.

    Its look-ahead table is new: n_lookahead rows drawn from N(0, 0.02), as GPT-2's embeddings were; see load_table.
    Raises InputError when something is missing, damaged, or not what this package's GPT computes, when there is neither
    network nor cached file, and when the extra `hf` is not installed.
    """
    folder = _folder_of(name_or_folder)
    config = _read_config(folder / CONFIG)
    stored = {name.removeprefix("transformer."): value for name, value in _read_weights(folder).items()}
    stored = {name: value for name, value in stored.items() if not name.endswith(BUFFERS)}
    head = stored.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, stored.get("wte.weight", head)):
        raise InputError(f"{folder} has an output head of its own, but here the head is the token embedding")
    weights = {"lookahead": torch.empty(0, config.n_embd)}
    with torch.device("meta"):  # sizes only: no random weights that are replaced at once
        model = GPT(config)
    expected = model.state_dict().keys() - weights.keys()
    for complaint, names in (("lacks", expected - stored.keys()), ("has, unexpectedly,", stored.keys() - expected)):
        if names:
            raise InputError(f"{folder} {complaint} {len(names)} weights, such as {min(names)}")
    with explained(f"{folder} does not hold what its {CONFIG} says", RuntimeError):
        for name, value in stored.items():
            weights[name] = (value.t() if name.endswith(TRANSPOSED) else value).float().contiguous()
        model.load_state_dict(weights, assign=True)
    model.new_lookahead(n_lookahead)
    return model.eval()


def load_folder(name_or_folder: str | Path) -> GPT:
    """from_pretrained, with the look-ahead table in the folder, if there is one. Raises InputError as that does."""
    model, table = from_pretrained(name_or_folder), Path(name_or_folder) / TABLE
    if os.path.isfile(table):
        load_table(model, table)
    return model


def save_pretrained(model: GPT, folder: str | Path) -> None:
    """Writes a folder that Transformers opens as GPT2LMHeadModel, in the model's dtype, and the table with it.

    Raises InputError when the folder or the disk does not take a file.
    """
    folder = Path(folder)
    config = COMPUTED | their_sizes(model)
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)  # we train without dropout
    config |= dict.fromkeys(("bos_token_id", "eos_token_id"), model.config.vocab_size - 1)  # end of text is the last
    config["architectures"] = ["GPT2LMHeadModel"]
    _write_tensors(folder / WEIGHTS, their_weights(model))
    if model.config.n_lookahead:
        save_table(model, folder / TABLE)
    else:
        (folder / TABLE).unlink(missing_ok=True)  # of another model that was here
    atomic_write(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def their_weights(model: GPT) -> dict[str, torch.Tensor]:
    """All weights but what only drafting reads, under GPT2LMHeadModel's names and in its shapes; the head is tied."""
    stored = {name: value for name, value in model.state_dict().items() if not name.startswith(DRAFTING)}
    return {f"transformer.{name}": v.t() if name.endswith(TRANSPOSED) else v for name, v in stored.items()}


def their_sizes(model: GPT) -> dict[str, int]:
    """The sizes, as GPT2Config calls them."""
    return {theirs: getattr(model.config, ours) for ours, theirs in SIZES.items()}


def load_table(model: GPT, file: str | Path) -> None:
    """Gives `model` the look-ahead table in `file`, of any length L, and the draft head, if one is there.

    Raises InputError when the file is missing, damaged, no table, or made for another n_embd.
    """
    tensors = _read_tensors(Path(file))
    if "lookahead" not in tensors or len(_drafting(tensors)) < len(tensors):
        raise InputError(f"{file} is not a look-ahead table: it should hold `lookahead`, and a draft head at most")
    _set_drafting(model, tensors)


def save_table(model: GPT, file: str | Path) -> None:
    """Writes the look-ahead table (L, n_embd), and the draft head with it, in the model's dtype. Raises InputError."""
    _write_tensors(Path(file), _drafting(model.state_dict()))


def _drafting(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(DRAFTING)}


def _set_drafting(model: GPT, tensors: dict[str, torch.Tensor]) -> None:
    model.set_lookahead(tensors["lookahead"])
    head = {name.removeprefix("draft_head."): value for name, value in tensors.items() if name != "lookahead"}
    model.new_draft_head(len(head.get("c_fc.bias", ())))
    if head:
        with explained("the draft head does not fit the model", (RuntimeError, AttributeError)):
            model.draft_head.load_state_dict(head)


def _read_checkpoint(path: Path) -> Checkpoint:
    if not os.path.exists(path) and path.parent == Path(".") and not path.suffix:
        path = SHIPPED / f"{path.name}.pt"
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.pt"))) or "none"
    content = read(path, _unpickled, f"there is no checkpoint {path} (shipped with the package: {names})")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a minipass checkpoint")
    if content.get("version") != VERSION:
        raise InputError(f"{path} has checkpoint version {content.get('version')!r}; this package reads {VERSION}")
    base = content.get("base")
    model = load_folder(base) if isinstance(base, str) else None
    with explained(f"{path} does not hold what its config says"):  # tiktoken asserts, others raise what they like
        config, tokenizer = GPTConfig(**content["config"]), content["tokenizer"]
        if model is None:
            model = GPT(config)
            model.load_state_dict(content["weights"])
        else:
            _set_drafting(model, content["weights"])
            if model.config != config:
                raise TypeError(f"the sizes of {base} are others now")
        encoding = gpt2_encoding() if tokenizer["name"] == "gpt2" else encoding_of(tokenizer["tokens"])
        record, training = content.get("record") or {}, content.get("training")
        if not isinstance(record, dict) or not isinstance(training, dict | None):
            raise TypeError("its training record is not a dictionary")
        if "hits" in record:  # its name in older files
            record["rank_accuracy"] = record.pop("hits")
    return Checkpoint(model, encoding, record, training)


def _unpickled(file: Path) -> Any:
    """What torch.save has put into a file, plain values and tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused just below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # says much about how to run the code all the same
        raise TypeError("it is not a minipass checkpoint, or would run code when read; not loaded") from error


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InputError(f"this needs the package {package}: pip install -e '.[hf]'") from error


def _folder_of(name_or_folder: str | Path) -> Path:
    if os.path.isdir(name_or_folder):
        return Path(name_or_folder)
    if str(name_or_folder) not in HUB_NAMES:
        raise InputError(f"there is no folder {name_or_folder}; names on the hub are {', '.join(HUB_NAMES)}")
    hub, repository = _library("huggingface_hub"), f"openai-community/{name_or_folder}"
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=[CONFIG, "model*.safetensors*"]))
    except Exception as error:  # of the network, the hub or the disk: each library below has its own
        raise InputError(
            f"{repository} is neither in the cache folder {hub.constants.HF_HUB_CACHE} nor to be fetched "
            f"({type(error).__name__}): it needs the network once, or fill that folder (HF_HOME moves it) on a machine "
            f"that has one, or name a folder with {CONFIG} and {WEIGHTS}"
        ) from error


def _json(file: Path) -> dict:
    content = json.loads(file.read_bytes())
    if not isinstance(content, dict):
        raise TypeError("it should be a JSON object")
    return content


def _shards(index: Path) -> list[str]:
    """The names of the files that hold the tensors."""
    shard_of = _json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise TypeError("its weight_map should name a file for each tensor")
    return sorted(set(shard_of.values()))


def _read_config(file: Path) -> GPTConfig:
    """The sizes in a config.json; no look-ahead tokens yet."""
    given = read(file, _json, f"there is no checkpoint in the folder {file.parent}: {file.name} is missing")
    for name, value in COMPUTED.items():
        if given.get(name, None if name == "model_type" else value) != value:
            raise InputError(f"{file} has {name} {given.get(name)!r}, but only {value!r} can be computed here")
    with explained(f"{file} is not a GPT-2's"):
        return GPTConfig(**{ours: given.get(theirs) for ours, theirs in SIZES.items()}, n_lookahead=0)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file or of all shards, under the names that they have there."""
    sharded = not os.path.isfile(folder / WEIGHTS) and os.path.isfile(folder / INDEX)
    weights = {}
    for name in read(folder / INDEX, _shards) if sharded else [WEIGHTS]:
        weights |= _read_tensors(folder / name)
    return weights


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    return read(file, _library("safetensors.torch").load_file)


def _write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # Not save_file: that one gives nobody else the right to read what it writes.
    data = _library("safetensors.torch").save(tensors, metadata={"format": "pt"})  # Transformers asks for the format
    atomic_write(file, lambda path: path.write_bytes(data))
