"""GPT-2 weights in and out, in the files of Hugging Face's libraries, and the look-ahead table as a file of its own.

A folder holds config.json and the weights, model.safetensors or its shards; `lookahead.safetensors` (L x d) lies beside
them and fits any copy of the same base. `python -m minipass.hf CHECKPOINT FOLDER` writes such a folder. Safetensors are
plain tensors: reading one executes no code.
"""

import argparse
import importlib
import json
import os
from pathlib import Path
from types import ModuleType

import torch

from minipass import checkpoint
from minipass.cli import run_script
from minipass.errors import InputError
from minipass.model import GPT, GPTConfig

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TABLE = "lookahead.safetensors"
SIZES = {  # what a size is called here and there
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
COMPUTED = {  # what our forward pass does; a config may ask for something else, which must not pass for a GPT-2 of ours
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
    try:
        for name, value in stored.items():
            weights[name] = (value.t() if name.endswith(TRANSPOSED) else value).float().contiguous()
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InputError(f"{folder} does not hold what its {CONFIG} says: {checkpoint.first_line(error)}") from error
    model.new_lookahead(n_lookahead)
    return model.eval()


def load_folder(name_or_folder: str | Path) -> GPT:
    """from_pretrained, with the look-ahead table that lies in the folder, if one does. Raises InputError as that."""
    model, table = from_pretrained(name_or_folder), Path(name_or_folder) / TABLE
    if os.path.isfile(table):
        load_table(model, table)
    return model


def save_pretrained(model: GPT, folder: str | Path) -> None:
    """Writes a folder that Transformers opens as GPT2LMHeadModel, in the model's dtype, and the table beside it.

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
    checkpoint.atomic_write(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def their_weights(model: GPT) -> dict[str, torch.Tensor]:
    """The weights but for the look-ahead table, under GPT2LMHeadModel's names and in its shapes; the head is tied."""
    return {
        f"transformer.{name}": value.t() if name.endswith(TRANSPOSED) else value
        for name, value in model.state_dict().items()
        if name != "lookahead"
    }


def their_sizes(model: GPT) -> dict[str, int]:
    """The sizes, as GPT2Config calls them."""
    return {theirs: getattr(model.config, ours) for ours, theirs in SIZES.items()}


def save_table(model: GPT, file: str | Path) -> None:
    """Writes the look-ahead table (L, n_embd), alone, in the model's dtype. Raises InputError."""
    _write_tensors(Path(file), {"lookahead": model.lookahead})


def load_table(model: GPT, file: str | Path) -> None:
    """Gives `model` the look-ahead table in `file`, of any length L, in the model's dtype and on its device.

    Raises InputError when the file is missing, damaged, no table, or made for another n_embd.
    """
    tensors = _read_tensors(Path(file))
    if list(tensors) != ["lookahead"]:
        raise InputError(f"{file} is not a look-ahead table: it should hold one tensor, `lookahead`")
    model.set_lookahead(tensors["lookahead"])


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


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged or cannot be read: {checkpoint.first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged: it should be a JSON object")
    return content


def _read_config(file: Path) -> GPTConfig:
    """The sizes in a config.json; no look-ahead tokens yet."""
    if not os.path.isfile(file):
        raise InputError(f"there is no checkpoint in the folder {file.parent}: {file.name} is missing")
    given = _read_json(file)
    sizes = {ours: given.get(theirs) for ours, theirs in SIZES.items()}
    for name, value in COMPUTED.items():
        if given.get(name, None if name == "model_type" else value) != value:
            raise InputError(f"{file} has {name} {given.get(name)!r}, but only {value!r} can be computed here")
    try:
        return GPTConfig(**sizes, n_lookahead=0)
    except InputError as error:
        raise InputError(f"{file} is not a GPT-2's: {error}") from error


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file or of all shards, under the names that they have there."""
    files = [WEIGHTS]
    if not os.path.isfile(folder / WEIGHTS) and os.path.isfile(folder / INDEX):
        shard_of = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
            raise InputError(f"{folder / INDEX} is damaged: its weight_map should name a file for each tensor")
        files = sorted(set(shard_of.values()))
    weights = {}
    for name in files:
        weights |= _read_tensors(folder / name)
    return weights


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    safetensors = _library("safetensors.torch")
    if not os.path.isfile(file):
        raise InputError(f"{file} is missing")
    try:
        return safetensors.load_file(file)
    except Exception as error:  # its own class, which says what is wrong with the bytes
        raise InputError(f"{file} is damaged or only half there: {checkpoint.first_line(error)}") from error


def _write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # Not save_file: that one gives nobody else the right to read what it writes.
    data = _library("safetensors.torch").save(tensors, metadata={"format": "pt"})  # Transformers asks for the format
    checkpoint.atomic_write(file, lambda path: path.write_bytes(data))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minipass.hf", description="Writes a checkpoint as a folder that Transformers opens."
    )
    parser.add_argument("checkpoint", help="a checkpoint's file, or the name of one in the package")
    parser.add_argument("folder", type=Path, help="the folder to write")
    args = parser.parse_args()
    model = checkpoint.load(args.checkpoint).model
    save_pretrained(model, args.folder)
    table = f" and {TABLE} ({model.config.n_lookahead} x {model.config.n_embd})" if model.config.n_lookahead else ""
    print(f"wrote {args.folder}: {CONFIG}, {WEIGHTS}{table}")


if __name__ == "__main__":
    run_script(main)
