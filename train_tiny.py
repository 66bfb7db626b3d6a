"""Trains a small GPT and its look-ahead tokens. `python train_tiny.py` takes ten minutes and gives a first impression.

Stages: `base` trains a plain language model. `lookahead` freezes a base and trains the look-ahead table and a draft
head, with --lora-rank also gated adapters (with --head none the table alone, as in the paper, section 3.2). `joint`
trains all of it together. A run lives in a folder: last.pt (--resume goes on from it), the encoded corpus, log.jsonl
and loss.png. A finished run adds model.pt or, where the base is a frozen model of others, adapters.safetensors, which
holds only what was trained. With --steps a run is reproducible: step s draws its batch from the seed and s alone.
So `torchrun --nproc_per_node N train_tiny.py ...` takes the same steps, and each process computes its share of a batch.
"""

import argparse
import ctypes
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain as joined
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from minipass import losses, weights
from minipass.cli import choose_device, choose_dtype, run_script
from minipass.data import (
    BUILT_IN,
    HELDOUT_FRACTION,
    check_length,
    digest_of,
    encode_to_file,
    even_windows,
    find_documents,
    open_tokens,
    sample_windows,
    save_tokens,
    split_documents,
)
from minipass.errors import InputError
from minipass.files import atomic_write, explained, heedless
from minipass.model import GPT, GPTConfig, is_drafting
from minipass.muon import Muon
from minipass.own_text import own_text
from minipass.pretrained import SMOLLM2, is_pretrained, is_shipped
from minipass.tokenizer import build_encoding, gpt2_encoding, train_bpe

# What may differ when a run continues, as may the number of processes.
MAY_DIFFER = ("out", "resume", "device", "dtype", "minutes", "save_every", "accumulate", "checkpoint_activations")

SELF = "self"  # as a corpus: text that the model writes itself
SIZES = {  # of GPTConfig, which options set
    "vocab_size": "tokens of a new tokenizer",
    "block_size": "context window",
    "n_layer": "layers",
    "n_head": "attention heads",
    "n_embd": "width",
    "n_lookahead": "look-ahead tokens",
}
POSITIVE = "steps minutes batch_size accumulate lr lookahead_weight position_decay window groups own_tokens".split()
POSITIVE += "eval_every eval_windows save_every".split()
LARGEST = 1e30  # of these options: a float32 holds little more
MINUTES = 10.0  # of a run without --steps and --minutes
VALIDATIONS = 6  # in a run at least
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
LONGEST_WINDOW = 1024  # of a text in training, unless --window says so
MATRICES = ("h.", "draft_head.")  # where the parameters for Muon are
HEAD_LR, LORA_LR = 0.2, 0.5  # of the table's, in the lookahead stage


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--stage", choices=("base", "lookahead", "joint"), default="joint", help="what to train (default: joint)")
    add("--out", type=Path, default=Path("runs/tiny"), help="folder of the run (default: %(default)s)")
    add("--init", metavar="CHECKPOINT", help="start from these weights and their tokenizer: a file, the folder of a "
        "run, a name in the package, or a model of others: smollm2, a GGUF file, a folder of a GPT-2 or Llama, or its "
        "name on the hub")
    add("--adapters", metavar="FILE", help="start from these adapters for --init: a file, or the folder of its run")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--data", nargs="+", default=["python"], metavar="SOURCE", help="python, installed, docstrings, a UTF-8 file "
        "or folder, or self: text that the model of --init writes, from beginnings in the other sources. Several "
        "sources get equal shares of the windows (default: python)")
    add("--own-tokens", type=int, default=200_000, help="tokens that the model writes for self (default: %(default)s)")
    add("--tokenizer", default="bpe", choices=("bpe", "gpt2"), help="bpe (the default) trains one on the data")
    add("--steps", type=int, help="optimiser steps")
    add("--minutes", type=float, help="stop after this time (default: with --resume as before; without --steps "
        f"{MINUTES:.0f})")
    add("--batch-size", type=int, default=16, help="windows in a step, over all processes (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="compute a process's windows in so many parts, to save memory")
    add("--checkpoint-activations", action="store_true", help="compute each block twice, to save memory")
    add("--lr", type=float, help="peak learning rate (default: 0.004; lookahead stage: 0.02)")
    add("--decay", type=float, default=0.4, help="share of the run, at its end, in which the learning "
        "rate falls to 0 (default: %(default)s)")
    add("--loss", default="kl-tv", choices=(*losses.LOOKAHEAD_LOSSES, "kl-tv"), help="look-ahead loss; kl-tv "
        "changes from kl to tv for the last quarter of the run (default: %(default)s)")
    add("--lookahead-weight", type=float, default=0.5, help="joint: weight of the look-ahead loss "
        "(default: %(default)s)")
    add("--position-decay", type=float, default=0.6, help="weight of a look-ahead position's loss, relative to the "
        "position before it (default: %(default)s)")
    add("--head", default="mlp", choices=("mlp", "none"), help="mlp: a draft head, which knows the token before each "
        "draft; none: no draft head, as in the paper (default: %(default)s)")
    add("--lora-rank", type=int, help="lookahead: rank of the gated adapters of the base's attention and MLPs, "
        "which act on look-ahead rows alone (default: as in --adapters, else 0, none)")
    add("--window", type=int, help=f"tokens of text in a window (default: context window, at most {LONGEST_WINDOW})")
    add("--groups", type=int, default=16, help="look-ahead groups in each window; of shorter groups more, so that "
        "there are as many rows (default: %(default)s)")
    for name, text in SIZES.items():
        default = getattr(GPTConfig, name)
        add(f"--{name.replace('_', '-')}", type=int, help=f"{text} (default: as in --init, else {default})")
    add("--llama", action=argparse.BooleanOptionalAction, help="Llama's layout (rotary positions, SwiGLU), not GPT-2's "
        "(default: as in --init, else GPT-2's)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="compute in float32, bfloat16 or float16 (autocast); auto (the default) takes "
        "bfloat16 where the hardware computes in it, else float32")
    add("--eval-every", type=int, default=250, help="steps between validations, of which there are at least "
        f"{VALIDATIONS} (default: %(default)s)")
    add("--eval-windows", type=int, default=64, help="held-out windows in a validation (default: %(default)s)")
    add("--save-every", type=int, default=250, help="steps between checkpoints (default: %(default)s)")
    add("--seed", type=int, default=0, help="of initial weights, batches and the text of self (default: %(default)s)")
    # fmt: on
    args = parser.parse_args()
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not (0 < value < LARGEST):
            bound = "greater than 0" if value < LARGEST or math.isnan(value) else f"less than {LARGEST:g}"
            raise InputError(f"--{name.replace('_', '-')} must be {bound}, not {value}")
    if not 0 <= args.decay <= 1:
        raise InputError(f"--decay must lie in [0, 1], not {args.decay}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must lie in 0..2**63 - 1, not {args.seed}")
    for name in ("init", "adapters"):
        if getattr(args, name) == "":
            raise InputError(f"--{name} is empty")
    if args.adapters and not args.init:
        raise InputError("--adapters needs the model that they were trained for: name it with --init")
    if args.lr is None:
        args.lr = 0.02 if args.stage == "lookahead" else 0.004
    return args


def start(args: argparse.Namespace, train_documents) -> weights.Checkpoint:
    """Model (on the CPU, float32), encoding and the record of earlier training: new ones, or those of --init.

    Raises InputError where the options do not fit --init, or the stage needs one.
    """
    sizes = {name: getattr(args, name) for name in (*SIZES, "lora_rank", "llama") if getattr(args, name) is not None}
    torch.manual_seed(args.seed)
    if args.init:
        loaded = weights.load_base(args.init)
        model = loaded.model
        record = weights.load_adapters(model, args.adapters) if args.adapters else loaded.record
        if args.stage != "base" and model.config.n_lookahead == 0:  # such as a GPT-2
            sizes.setdefault("n_lookahead", GPTConfig.n_lookahead)
        if args.stage != "base":
            sizes["n_draft"] = 0 if args.head == "none" else model.config.n_draft or 2 * model.config.n_embd
        wanted = GPTConfig(**(vars(model.config) | sizes))
        if wanted.n_lookahead != model.config.n_lookahead:  # what only drafting reads may be made anew, of any size
            model.new_lookahead(wanted.n_lookahead)
        if wanted.n_draft != model.config.n_draft:
            model.new_draft_head(wanted.n_draft)
        if wanted.lora_rank != model.config.lora_rank:
            model.new_adapters(wanted.lora_rank)
        for name, value in vars(wanted).items():
            if value != getattr(model.config, name):
                raise InputError(f"--init has {name} {getattr(model.config, name)}, which cannot be changed to {value}")
        return replace(loaded, record=record)
    if args.stage == "lookahead":
        raise InputError("--stage lookahead trains the table of a finished base: name it with --init")
    if args.tokenizer == "gpt2":
        encoding = gpt2_encoding()
    else:
        vocab_size = sizes.get("vocab_size", GPTConfig.vocab_size)
        encoding = build_encoding(train_bpe((document.text for document in train_documents), vocab_size))
    model = GPT(GPTConfig(**(sizes | {"vocab_size": encoding.n_vocab})))
    if args.stage == "joint" and args.head != "none":
        model.new_draft_head(2 * model.config.n_embd)
    return weights.Checkpoint(model, encoding, {})


def make_optimizers(model: GPT, stage: str, lr: float) -> list[torch.optim.Optimizer]:
    """For what the stage trains: Muon for the matrices of blocks and draft head, AdamW for the rest.

    Muon, with updates scaled to the size of AdamW's, reaches the same loss in clearly fewer steps. In the lookahead
    stage the matrices of draft head and adapters have lower learning rates than the table.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_drafting(name) == (stage == "lookahead") or stage == "joint")
    groups: dict[tuple[bool, float], list] = defaultdict(list)  # by whether they are Muon's, and scale of learning rate
    for name, parameter in model.named_parameters():
        matrix, scale = name.startswith(MATRICES) and parameter.dim() == 2, 1.0
        if matrix and stage == "lookahead":
            scale = LORA_LR if name.endswith((".down", ".up")) else HEAD_LR
        if parameter.requires_grad:
            groups[matrix, scale].append(parameter)
    muon, adam = (
        [{"params": group, "scale": scale} for (of_muon, scale), group in groups.items() if of_muon == which]
        for which in (True, False)
    )
    found = [Muon(muon, lr=lr)] if muon else []
    return [*found, torch.optim.AdamW(adam, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def learning_rate(peak: float, step: int, progress: float, decay: float) -> float:
    """Warm-up over 100 steps, then constant, then a straight fall to 0 over the last `decay` of the run."""
    return peak * min(1.0, (step + 1) / 100, (1 - progress) / decay if decay else 1.0)


def draw_curves(folder: Path, history: list[dict]) -> None:
    """loss.png: training and held-out loss, and acceptance by look-ahead position, against steps.

    It also shows where the look-ahead loss changed, and the acceptance of drafts that know nothing of the context.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    validated = [entry for entry in history if "heldout_loss" in entry]
    left.plot([e["step"] for e in history], [e["loss"] for e in history], color="0.7", label="training, whole loss")
    steps = [entry["step"] for entry in validated]
    left.plot(steps, [e["heldout_loss"] for e in validated], "o-", label="held out, next token")
    for before, entry in pairwise(history):
        if entry.get("kind") != before.get("kind"):  # older logs do not say
            left.axvline(entry["step"], color="0.5", linestyle=":", label=f"look-ahead loss is {entry['kind']}")
    left.set(xlabel="step", ylabel="nats per token")
    left.legend()
    for position in range(len(validated[-1]["acceptance"]) if validated else 0):
        right.plot(steps, [e["acceptance"][position] for e in validated], "o-", label=f"[LA]_{position + 1}")
    right.set(xlabel="step", ylabel="expected acceptance, held out", ylim=(0, 1))
    if right.lines:
        constant = [e.get("constant_acceptance", math.nan) for e in validated]
        right.plot(steps, constant, ":", color="0.5", label="knowing nothing")
        right.legend(ncol=2, fontsize="small")
    figure.tight_layout()
    atomic_write(folder / "loss.png", lambda path: figure.savefig(path, format="png", dpi=110))
    plt.close(figure)


def described(entry: dict) -> str:
    """A validation in one line."""
    line = f"step {entry['step']}: held-out loss {entry['heldout_loss']:.3f}"
    if not entry["acceptance"]:
        return line
    accepted = " ".join(f"{value:.2f}" for value in entry["acceptance"])
    return f"{line}, acceptance {accepted} ({entry['constant_acceptance']:.2f} by knowing nothing)"


def keep_freed_memory() -> None:
    """Tells glibc to use again what a step has freed, and not to give it back to the system.

    With a large vocabulary the logits of a step take hundreds of megabytes. To map these anew, page by page, took half
    of a step's time on a CPU.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def join_processes(device_name: str) -> tuple[torch.device, int, int]:
    """This process's device and rank and the number of processes: one, or as many as torchrun started."""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = choose_device(device_name)
    if world > 1:
        if device.type == "cuda":
            device = choose_device(f"cuda:{local}")
        # The others wait while the first encodes the corpus, however large; torchrun ends them if one fails.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return device, rank, max(world, 1)


def located(settings: dict) -> dict:
    """Settings in the form in which runs compare them: existing paths become absolute."""

    def place(given: str | None) -> str | None:
        is_name = given in (None, *BUILT_IN, SELF, SMOLLM2) or is_shipped(given)
        return given if is_name or not os.path.exists(given) else os.path.realpath(given)

    places = {name: place(settings.get(name)) for name in ("init", "adapters")}
    return settings | places | {"data": [place(source) for source in settings["data"]]}


def damaged(last: Path) -> AbstractContextManager[None]:
    """Errors inside become an InputError that blames the training state in that file."""
    return explained(f"{last} holds a damaged training state, or that of another version")


def unfinished_run(last: Path, args: argparse.Namespace) -> weights.Checkpoint:
    """The checkpoint to go on from, with its --steps and --minutes where args have none.

    Raises InputError when there is none, or when its run had other settings.
    """
    if not os.path.exists(last):
        raise InputError(f"there is no run in {last.parent} to go on with")
    loaded = weights.load(last)
    if loaded.training is None:
        raise InputError(f"{last} holds no training state to go on with")
    with damaged(last):
        settings = located(loaded.training["settings"])
    if args.steps is None:
        args.steps = settings.get("steps")
    if args.minutes is None:
        args.minutes = loaded.training.get("minutes")
    for name, value in located(vars(args)).items():
        was = settings.get(name)
        if name not in MAY_DIFFER and was != value:
            raise InputError(f"the run in {last.parent} has {name} {was!r}, not {value!r}, and cannot change it")
    return loaded


def draw_batch(
    tokens: list[np.ndarray], config: GPTConfig, args: argparse.Namespace, step: int
) -> tuple[torch.Tensor, np.ndarray, int]:
    """What step `step` trains on, from the seed and the step alone: windows (batch_size, window + 1) int64, the cuts
    where their look-ahead groups hang (batch_size, G) int64, and L, the look-ahead tokens in a group. The sources in
    `tokens`, each (N,), take turns, from batch to batch too, and so get equal shares of the windows.

    From step to step L is all of the table, half or a quarter of it. Shorter groups leave rows for more groups, which
    train the near positions, and these count most.
    """
    rng = np.random.default_rng([args.seed, step])
    length, each = window(config, args), (np.arange(args.batch_size) + step * args.batch_size) % len(tokens)
    windows = torch.cat(
        [sample_windows(source, n, length + 1, rng) for source, n in zip(tokens, np.bincount(each), strict=False)]
    )
    n_lookahead = max(1, config.n_lookahead >> step % 3)
    n_groups = min(args.groups * config.n_lookahead // n_lookahead, length - n_lookahead)
    n_groups = 0 if args.stage == "base" else n_groups
    return windows, losses.random_cuts(len(windows), length, n_groups, n_lookahead, rng), n_lookahead


def window(config: GPTConfig, args: argparse.Namespace) -> int:
    """Tokens of text in a window of training."""
    return min(args.window or LONGEST_WINDOW, config.block_size)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that gets an entry when Ctrl-C is pressed, a scheduler ends the run or the terminal closes.

    A second Ctrl-C is a KeyboardInterrupt.
    """
    requests: list[int] = []

    def on_signal(number: int, _) -> None:
        if requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        requests.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else nohup was asked for
        numbers.append(signal.SIGHUP)
    handlers = [signal.signal(number, on_signal) for number in numbers]
    try:
        yield requests
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def whole_loss(
    model: GPT, windows: torch.Tensor, cuts: np.ndarray, n_lookahead: int, kind: str, args: argparse.Namespace
) -> torch.Tensor:
    """The stage's loss: the next token's, the look-ahead rows', or the sum with --lookahead-weight."""
    text, targets = windows[:, :-1], windows[:, 1:]
    text_logits, draft_logits = losses.training_pass(model, text, cuts, n_lookahead, frozen=args.stage == "lookahead")
    if args.stage == "base":
        return losses.next_token_loss(text_logits, targets)
    by_position = losses.lookahead_loss(kind, draft_logits, text_logits, targets, cuts)  # (n_lookahead,)
    factors = args.position_decay ** torch.arange(n_lookahead, device=by_position.device)
    drafting = (by_position * factors).sum() / factors.sum()
    if args.stage == "lookahead":
        return drafting
    return losses.next_token_loss(text_logits, targets) + args.lookahead_weight * drafting


class Trainer:
    """A run: model, corpus, optimizers and progress. Every process has one."""

    def __init__(self, args: argparse.Namespace, device: torch.device, rank: int, world: int) -> None:
        """Begins a run, or goes on with the one in --out. Raises InputError when that is not possible."""
        self.args, self.device, self.rank, self.world = args, device, rank, world
        dtype = choose_dtype(args.dtype, device)
        torch.backends.cuda.matmul.allow_tf32 = True  # float32 on tensor cores, with 10 bits of precision
        if dtype == torch.float64:
            raise InputError("--dtype must be auto, float32, bfloat16 or float16 in training, not float64")
        self.autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.share, rest = divmod(args.batch_size, world * args.accumulate)  # windows in one forward pass
        if rest:
            parts = f"{world} x {args.accumulate} equal parts"
            raise InputError(f"--batch-size {args.batch_size} cannot be split into {parts}")
        # A model of others that stays as it is need not be stored again with each checkpoint.
        pretrained = args.stage == "lookahead" and args.init and is_pretrained(args.init)
        self.base = located(vars(args))["init"] if pretrained else None
        self.last = args.out / "last.pt"
        made = self.last, *(args.out / name for name in (weights.MODEL, weights.ADAPTERS, "log.jsonl", "loss.png"))
        # os.path.exists is False where Path.exists raises: for a name that is too long.
        if any(map(os.path.exists, made)) and not args.resume:
            go_on = "go on with --resume, or " if os.path.exists(self.last) else ""
            raise InputError(f"{args.out} already holds a run: {go_on}name another folder with --out")
        loaded = unfinished_run(self.last, args) if args.resume else None
        if args.steps is None and args.minutes is None:
            args.minutes = MINUTES
        self.settings = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
        self._prepare(loaded)
        self.optimizers = make_optimizers(self.model, args.stage, args.lr)
        self.step, self.seconds, self.history = 0, 0.0, []
        if loaded:
            state = loaded.training
            with damaged(self.last):
                self.step, self.seconds = int(state["step"]), float(state["seconds"])
                self.history = [dict(entry) for entry in state["history"]]
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
                if state.get("scaler"):  # that of another number type is empty
                    self.scaler.load_state_dict(state["scaler"])
        else:
            self.save()  # now: a folder that cannot be written is known before hours are spent

    def _prepare(self, loaded: weights.Checkpoint | None) -> None:
        """Model and encoded corpus: those of the run that goes on, or new ones."""
        args = self.args
        # SELF comes last: it has files but no documents, and begins with passages of the sources before it.
        sources = sorted(args.data, key=lambda source: source == SELF)
        if SELF in sources and (not args.init or SELF in sources[:-1] or len(sources) == 1):
            raise InputError("--data self, given once, needs --init to write it and another source for its beginnings")
        files = [[args.out / f"{part}-{i}.tokens" for part in ("train", "heldout")] for i in range(len(sources))]
        found = digest_of(joined(*files))
        was = loaded.training.get("corpus", found) if loaded else None  # older runs do not say
        encoded = loaded and found is not None and found == was
        parts = [] if encoded else [split_documents(find_documents(each)) for each in sources if each != SELF]
        if loaded:
            self.parents = loaded.training.get("parents", [])
        else:
            loaded = start(args, [*joined(*(train for train, _ in parts))])
            own = {key: value for key, value in loaded.record.items() if key != "parents"}
            self.parents = [*loaded.record.get("parents", []), own] if own else []
        self.model, self.encoding, config = loaded.model, loaded.encoding, loaded.model.config
        if args.stage != "base" and config.n_lookahead == 0:
            raise InputError(f"--stage {args.stage} needs look-ahead tokens, but n_lookahead is 0")
        length = window(config, args)
        if args.stage != "base" and length - config.n_lookahead < args.groups:
            raise InputError(
                f"--groups {args.groups}, with {config.n_lookahead} look-ahead tokens, does not fit into a window of "
                f"{length}"
            )
        if self.base is None:
            weights.check_storable(self.encoding)
        written = files  # of a run that goes on, nothing is replaced before its text is known to be the same
        if was is not None and not encoded:
            written = [[file.with_suffix(".new") for file in pair] for pair in files]
        for pair in zip(parts, written, strict=False):
            for documents, file in zip(*pair, strict=True):
                encode_to_file(documents, self.encoding, file)
        self.model.to(self.device).train()
        if SELF in sources and not encoded:
            corpus = np.concatenate([open_tokens(train, self.encoding) for train, _ in written[:-1]])
            own = own_text(self.model, self.encoding, loaded.chat_template, corpus, args.own_tokens, args.seed)
            cut = round(len(own) * (1 - HELDOUT_FRACTION))
            for tokens, file in zip((own[:cut], own[cut:]), written[-1], strict=True):
                save_tokens(tokens, self.encoding, file)
        self.corpus = found if encoded else digest_of(joined(*written))
        if was not in (None, self.corpus):  # so what was written has the new names
            for file in joined(*written):
                file.unlink(missing_ok=True)
            raise InputError(f"the text of --data has changed since the run in {args.out} began: it cannot go on")
        for new, file in zip(joined(*written), joined(*files), strict=True):
            os.replace(new, file)
        self.train_tokens, heldout = (
            [open_tokens(file, self.encoding) for file in part] for part in zip(*files, strict=True)
        )
        n_windows = max(1, args.eval_windows // len(sources))
        for part, several in {"training": self.train_tokens, "held-out": heldout}.items():
            for source, tokens in zip(sources, several, strict=True):
                check_length(tokens, length + 1, f"the {part} part of {source}")
        self.windows = torch.cat([even_windows(tokens, n_windows, length + 1) for tokens in heldout])

    def record(self) -> dict:
        """What a checkpoint says about its training."""
        last = self.history[-1] if self.history else {}
        figures = {key: value for key, value in last.items() if key not in ("loss", "kind")}
        so_far = {"step": self.step, "seconds": round(self.seconds), "parents": self.parents}
        return self.settings | so_far | {"threads": torch.get_num_threads()} | figures

    def save(self) -> None:
        """Writes last.pt, log.jsonl and loss.png; only the first process does. Raises InputError as `fail` does."""
        if not all(value.isfinite().all() for value in self.model.parameters()):
            self.fail()
        if self.rank:
            return
        names = ("step", "seconds", "history", "parents", "corpus")
        training = {name: getattr(self, name) for name in names} | {"minutes": self.args.minutes}
        training["settings"] = located(self.settings)  # so that it goes on from any folder
        training["scaler"] = self.scaler.state_dict()
        training["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        weights.save(self.last, self.model, self.encoding, self.record(), training=training, base=self.base)
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        atomic_write(self.args.out / "log.jsonl", lambda path: path.write_text(lines))
        draw_curves(self.args.out, self.history)

    def fail(self) -> None:
        """Raises InputError in the first process, which speaks for all; the others exit. What was saved stays."""
        if self.rank:
            sys.exit(2)
        raise InputError(
            f"loss or weights are not finite any more after step {self.step}: begin anew with a lower --lr; "
            f"{self.last} is still as it was saved before"
        )

    def progress(self) -> float:
        """The share of the run that is done: of its steps or of its minutes, whichever is larger."""
        args = self.args
        by_steps = self.step / args.steps if args.steps else 0.0
        return min(1.0, max(by_steps, self.seconds / (60 * args.minutes) if args.minutes else 0.0))

    def mean(self, *values: float) -> list[float]:
        """The means over all processes of each process's own values."""
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(shared)
        return (shared / self.world).tolist()

    def train(self, requests: list[int]) -> None:
        """Takes steps until the run is done or there is a request to stop, and saves.

        Raises InputError when loss or weights are no longer finite.
        """
        args = self.args
        if args.checkpoint_activations:
            for block in self.model.h:
                block.forward = partial(recompute, block.forward, use_reentrant=False)
        bar = tqdm(
            total=args.steps,
            initial=self.step,
            unit="step",
            desc=args.stage,
            dynamic_ncols=True,
            disable=self.rank > 0,
            delay=1e-9,  # nothing is shown before the first step: see heedless
        )
        began = time.monotonic()
        try:
            while True:
                (stop,) = self.mean(bool(requests))  # the processes must agree on when to stop
                before = self.progress()
                if before >= 1 or stop:  # between steps, never within one
                    break
                kind = args.loss if args.loss != "kl-tv" else ("kl" if before < 0.75 else "tv")
                loss, now = self.take_step(kind), time.monotonic()
                loss, self.seconds = self.mean(loss, self.seconds + now - began)
                began = now
                entry = {"step": self.step, "loss": loss, "kind": kind}
                due = self.step % args.eval_every == 0 or int(VALIDATIONS * before) < int(VALIDATIONS * self.progress())
                if due and math.isfinite(loss) and self.rank == 0:  # one process validates, writes and prints
                    entry |= self.validate()
                if not all(map(math.isfinite, (loss, entry.get("heldout_loss", 0.0), *entry.get("acceptance", ())))):
                    self.fail()
                self.history.append(entry)
                if self.step % args.save_every == 0:
                    self.save()
                with heedless():
                    if "heldout_loss" in entry:
                        bar.write(described(entry))
                    rate = args.batch_size * window(self.model.config, args) * (bar.format_dict["rate"] or 0.0)
                    left = "" if args.steps else f", {max(0.0, args.minutes - self.seconds / 60):.1f} minutes left"
                    bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s{left}", refresh=False)
                    bar.update()
            self.save()
        finally:
            with heedless():
                bar.close()

    def take_step(self, kind: str) -> float:
        """One optimiser step on this process's share of the batch; returns the loss of that share."""
        args, optimizers = self.args, self.optimizers
        batch, cuts, n_lookahead = draw_batch(self.train_tokens, self.model.config, args, self.step)
        step_loss = torch.zeros((), device=self.device)
        for part in range(args.accumulate):
            first = (self.rank * args.accumulate + part) * self.share
            mine = slice(first, first + self.share)
            with self.autocast:
                loss = whole_loss(self.model, batch[mine].to(self.device), cuts[mine], n_lookahead, kind, args)
            loss = loss / args.accumulate
            self.scaler.scale(loss).backward()
            step_loss += loss.detach()
        if self.world > 1:
            self.average_gradients()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.get("scale", 1.0) * learning_rate(args.lr, self.step, self.progress(), args.decay)
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        self.step += 1
        return step_loss.item()

    def average_gradients(self) -> None:
        """Gives all processes the mean of their gradients, in one exchange.

        DistributedDataParallel does so while it computes, but its threads can outlive the process group and then end a
        finished process by an abort.
        """
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        shared = torch.cat([each.flatten() for each in gradients])
        dist.all_reduce(shared)
        for own, mean in zip(gradients, (shared / self.world).split([each.numel() for each in gradients]), strict=True):
            own.copy_(mean.view_as(own))

    def validate(self) -> dict:
        """The figures of losses.evaluate on held-out text, with the loss under the name `heldout_loss`."""
        n_groups = 0 if self.args.stage == "base" else 8
        with self.autocast:
            figures = losses.evaluate(
                self.model.eval(), self.windows, n_groups=n_groups, batch_size=min(16, self.share)
            )
        self.model.train()
        return {"heldout_loss" if name == "loss" else name: value for name, value in figures.items()}


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    device, rank, world = join_processes(args.device)
    if rank:  # the first process makes model and corpus ready and saves them; the others go on from there
        try:
            dist.barrier()
        except RuntimeError:
            sys.exit(2)  # the first process could not, and has said why
        args.resume = True
    trainer = Trainer(args, device, rank, world)
    if world > 1 and rank == 0:
        dist.barrier()
    finished = trainer.progress() >= 1  # it was finished already, when it was asked to go on
    if not finished:
        with stop_requests() as requests:
            trainer.train(requests)
    if world > 1:
        dist.destroy_process_group()
    if rank:
        return
    if trainer.progress() < 1:
        print(f"stopped after step {trainer.step}; the same command with --resume continues")
        return
    result = args.out / (weights.ADAPTERS if trainer.base else weights.MODEL)
    model = f"{trainer.base} --adapters {result}" if trainer.base else result
    if finished and os.path.isfile(result) and os.path.getmtime(result) >= os.path.getmtime(trainer.last):
        longer = f"{'more --minutes, or ' if args.minutes else ''}--init {model} and another --out"
        print(f"the run in {args.out} is finished, after step {trainer.step}; to train longer: {longer}")
        return
    if trainer.base:
        weights.save_adapters(trainer.model, result, trainer.record(), dtype=torch.bfloat16)
    else:
        weights.save(result, trainer.model, trainer.encoding, trainer.record(), dtype=torch.bfloat16)
    drafting = " --pass" if trainer.model.config.n_lookahead else ""
    print(f"wrote {result}, log.jsonl and loss.png; try: python sample.py --checkpoint {model}{drafting}")


if __name__ == "__main__":
    run_script(main)
