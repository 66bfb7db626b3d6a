"""Trains a small GPT and its look-ahead tokens: `python train_tiny.py` does something sensible in ten minutes.

Stages: `base` trains a plain language model; `lookahead` freezes a base and trains only the look-ahead table (the
paper, section 3.2); `joint` trains both together. A run lives in a folder: last.pt (go on with --resume), model.pt
(the finished model), log.jsonl and loss.png. With --steps a run is reproducible: step s draws its batch from the seed
and s alone.
"""

import argparse
import json
import math
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minipass import checkpoint, losses
from minipass.cli import choose_device, choose_dtype, run_script
from minipass.data import encode_documents, even_windows, read_documents, sample_windows, split_documents
from minipass.errors import InputError
from minipass.model import GPT, GPTConfig
from minipass.tokenizer import build_encoding, gpt2_encoding, train_bpe

NOT_PART_OF_A_RUN = ("resume", "device", "dtype", "minutes", "save_every")  # may differ when a run goes on


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--stage",
        choices=("base", "lookahead", "joint"),
        default="joint",
        help="what to train (default: joint)",
    )
    add("--out", type=Path, default=Path("runs/tiny"), help="folder of the run (default: %(default)s)")
    add("--init", metavar="CHECKPOINT", help="start from these weights and this tokenizer, not from scratch")
    add("--resume", action="store_true", help="go on with the run in --out")
    add(
        "--data",
        default="python",
        help="python, installed, docstrings, or a UTF-8 file or folder (default: python)",
    )
    add("--tokenizer", default="bpe", choices=("bpe", "gpt2"), help="bpe trains one on the data (default)")
    add("--steps", type=int, help="optimiser steps")
    add("--minutes", type=float, help="stop after this time (default, without --steps: 10)")
    add("--batch-size", type=int, default=16, help="windows in a step (default: %(default)s)")
    add("--lr", type=float, help="peak learning rate (default: 0.004; lookahead stage: 0.02)")
    add(
        "--decay",
        type=float,
        default=0.4,
        help="share of the run over which it falls to 0 (default: %(default)s)",
    )
    add("--loss", default="kl-tv", choices=(*losses.LOOKAHEAD_LOSSES, "kl-tv"), help="look-ahead loss; kl-tv "
        "changes from kl to tv for the last quarter (default: %(default)s)")  # fmt: skip
    add(
        "--lookahead-weight",
        type=float,
        default=0.5,
        help="joint: weight of that loss (default: %(default)s)",
    )
    add(
        "--position-decay",
        type=float,
        default=0.6,
        help="weight of a look-ahead position's loss over that of the one before it (default: %(default)s)",
    )
    add("--groups", type=int, default=16, help="look-ahead groups in each window; of the shorter ones as many as have "
        "the same number of rows (default: %(default)s)")  # fmt: skip
    for name, text in {
        "vocab-size": "tokens of a new tokenizer",
        "block-size": "context window",
        "n-layer": "layers",
        "n-head": "attention heads",
        "n-embd": "width",
        "n-lookahead": "look-ahead tokens",
    }.items():
        default = getattr(GPTConfig, name.replace("-", "_"))
        add(f"--{name}", type=int, help=f"{text} (default: {default}, or as in --init)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="autocast to float32, bfloat16 or float16; auto measures nothing and takes "
        "bfloat16 where the hardware has it (default)")  # fmt: skip
    add("--eval-every", type=int, default=250, help="steps between validations (default: %(default)s)")
    add("--save-every", type=int, default=250, help="steps between checkpoints (default: %(default)s)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in (
        "steps",
        "minutes",
        "batch_size",
        "lr",
        "eval_every",
        "save_every",
        "lookahead_weight",
        "position_decay",
    ):
        value = getattr(args, name)
        if value is not None and not (0 < value < math.inf):
            raise InputError(f"--{name.replace('_', '-')} must be greater than 0, not {value}")
    if not 0 <= args.decay <= 1:
        raise InputError(f"--decay must lie in [0, 1], not {args.decay}")
    if args.groups < 1:
        raise InputError(f"--groups must be at least 1, not {args.groups}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must lie in 0..2**63 - 1, not {args.seed}")
    if args.steps is None and args.minutes is None:
        args.minutes = 10.0
    if args.lr is None:
        args.lr = 0.02 if args.stage == "lookahead" else 0.004
    return args


def start(args: argparse.Namespace, train_documents) -> tuple[GPT, object, dict]:
    """Model (on the CPU, float32), encoding and the record of earlier training: new, or from --init."""
    sizes = {name: getattr(args, name) for name in GPTConfig.__dataclass_fields__ if getattr(args, name) is not None}
    torch.manual_seed(args.seed)
    if args.init:
        loaded = checkpoint.load(args.init)
        model, wanted = loaded.model, GPTConfig(**(vars(loaded.model.config) | sizes))
        if wanted.n_lookahead != model.config.n_lookahead:  # the table alone may be made anew, of any length
            weights = model.state_dict() | {"lookahead": torch.randn(wanted.n_lookahead, wanted.n_embd) * 0.02}
            changed = GPTConfig(**(vars(model.config) | {"n_lookahead": wanted.n_lookahead}))
            model = GPT(changed)
            model.load_state_dict(weights)
        if wanted != model.config:
            raise InputError(f"--init has the sizes {model.config}, which cannot be changed to {wanted}")
        return model, loaded.encoding, loaded.record
    if args.stage == "lookahead":
        raise InputError("--stage lookahead trains the table of a finished base: name it with --init")
    if args.tokenizer == "gpt2":
        encoding = gpt2_encoding()
    else:
        vocab_size = sizes.get("vocab_size", GPTConfig.vocab_size)
        encoding = build_encoding(train_bpe([document.text for document in train_documents], vocab_size))
    return GPT(GPTConfig(**(sizes | {"vocab_size": encoding.n_vocab}))), encoding, {}


def make_optimizers(model: GPT, stage: str, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; only the look-ahead table in its own stage.

    Muon (torch's own, updates scaled to the size of AdamW's) reaches the same loss in clearly fewer steps.
    """
    if stage == "lookahead":
        model.requires_grad_(False)
        model.lookahead.requires_grad_(True)
        return [torch.optim.AdamW([model.lookahead], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]
    model.requires_grad_(True)
    matrices = [parameter for parameter in model.h.parameters() if parameter.dim() == 2]
    others = [parameter for name, parameter in model.named_parameters() if name[:2] != "h." or parameter.dim() < 2]
    if stage == "base":
        model.lookahead.requires_grad_(False)
        others = [parameter for parameter in others if parameter is not model.lookahead]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate(peak: float, step: int, progress: float, decay: float) -> float:
    """Warm-up over 100 steps, then constant, then a straight fall to 0 over the last `decay` of the run."""
    return peak * min(1.0, (step + 1) / 100, (1 - progress) / decay if decay else 1.0)


def draw_curves(folder: Path, history: list[dict]) -> None:
    """loss.png: training and held-out loss, and acceptance by look-ahead position, against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    validated = [entry for entry in history if "heldout_loss" in entry]
    left.plot([e["step"] for e in history], [e["loss"] for e in history], color="0.7", label="training, whole loss")
    steps = [entry["step"] for entry in validated]
    left.plot(steps, [e["heldout_loss"] for e in validated], "o-", label="held out, next token")
    left.set(xlabel="step", ylabel="nats per token")
    left.legend()
    for position in range(len(validated[-1]["acceptance"]) if validated else 0):
        right.plot(steps, [e["acceptance"][position] for e in validated], "o-", label=f"[LA]_{position + 1}")
    right.set(xlabel="step", ylabel="expected acceptance, held out", ylim=(0, 1))
    if right.lines:
        right.legend(ncol=2, fontsize="small")
    figure.tight_layout()
    checkpoint.atomic_write(folder / "loss.png", lambda path: figure.savefig(path, format="png", dpi=110))
    plt.close(figure)


def main() -> None:
    args = parse_arguments()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in NOT_PART_OF_A_RUN
    }
    last = args.out / "last.pt"
    if os.path.exists(last) and not args.resume:  # False where Path.exists raises: a name that is too long
        raise InputError(f"{args.out} already holds a run: go on with --resume, or name another folder with --out")
    state = None
    if args.resume:
        loaded = checkpoint.load(last)
        state = loaded.training
        if state is None:
            raise InputError(f"{last} holds no training state to go on with")
        for name, value in settings.items():
            if state["settings"].get(name) != value:
                was = state["settings"].get(name)
                raise InputError(f"the run in {args.out} has {name} {was!r}, not {value!r}: it cannot go on so")

    train_documents, heldout_documents = split_documents(read_documents(args.data))
    if state:
        model, encoding, parents = loaded.model, loaded.encoding, state["parents"]
    else:
        model, encoding, record = start(args, train_documents)
        parents = [*record.get("parents", []), {k: v for k, v in record.items() if k != "parents"}] if record else []
    config = model.config
    if args.stage != "base" and config.n_lookahead == 0:
        raise InputError(f"--stage {args.stage} needs look-ahead tokens, but n_lookahead is 0")
    if config.block_size - config.n_lookahead < args.groups:
        raise InputError(f"--groups {args.groups} does not fit into a window of {config.block_size}")
    train_tokens = encode_documents(train_documents, encoding)
    windows = even_windows(encode_documents(heldout_documents, encoding), 128, config.block_size + 1)
    sample_windows(train_tokens, 1, config.block_size + 1, np.random.default_rng(0))  # long enough?
    model.to(device).train()
    optimizers = make_optimizers(model, args.stage, args.lr)
    step, seconds, history = 0, 0.0, []
    if state:
        step, seconds, history = state["step"], state["seconds"], state["history"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    n_groups = 0 if args.stage == "base" else args.groups

    def record() -> dict:
        figures = {key: value for key, value in history[-1].items() if key != "loss"} if history else {}
        return settings | {"step": step, "seconds": round(seconds), "parents": parents, "threads": torch.get_num_threads()} | figures  # fmt: skip # noqa: E501

    def save() -> None:
        training = {
            "settings": settings,
            "step": step,
            "seconds": seconds,
            "history": history,
            "parents": parents,
        }
        training["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        checkpoint.save(last, model, encoding, record(), training=training)
        lines = "".join(json.dumps(entry) + "\n" for entry in history)
        checkpoint.atomic_write(args.out / "log.jsonl", lambda path: path.write_text(lines))
        draw_curves(args.out, history)

    def progress() -> float:
        """Share of the run that is done: of its steps or of its minutes, whichever is further."""
        by_steps = step / args.steps if args.steps else 0.0
        return max(by_steps, seconds / (60 * args.minutes) if args.minutes else 0.0)

    interrupted = False

    def on_interrupt(*_):
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True  # the step in hand is finished first, so that what is saved is a whole step

    signal.signal(signal.SIGINT, on_interrupt)
    if not state:
        save()  # now, so that a folder that cannot be written is known before hours are spent
    bar = tqdm(total=args.steps, initial=step, unit="step", desc=args.stage, dynamic_ncols=True)
    tokens_per_step, began = args.batch_size * config.block_size, time.monotonic()
    while progress() < 1 and not interrupted:
        rng = np.random.default_rng([args.seed, step])
        batch = sample_windows(train_tokens, args.batch_size, config.block_size + 1, rng).to(device)
        text, targets = batch[:, :-1], batch[:, 1:]
        # L, L/2 and L/4 look-ahead tokens by turns: the near positions count most, and so are trained most.
        n_lookahead = max(1, config.n_lookahead >> step % 3)
        n_cuts = min(n_groups * config.n_lookahead // n_lookahead, config.block_size - n_lookahead)
        cuts = losses.random_cuts(len(text), config.block_size, n_cuts, n_lookahead, rng)
        kind = args.loss if args.loss != "kl-tv" else ("kl" if progress() < 0.75 else "tv")
        with autocast:
            text_logits, draft_logits = losses.training_pass(model, text, cuts, n_lookahead)
        loss = losses.next_token_loss(text_logits, targets) if args.stage != "lookahead" else 0.0
        if n_groups:
            by_position = losses.lookahead_loss(kind, draft_logits, text_logits, targets, cuts)  # (n_lookahead,)
            weights = args.position_decay ** torch.arange(n_lookahead, device=device)
            drafting = (by_position * weights).sum() / weights.sum()
            loss = loss + (args.lookahead_weight if args.stage == "joint" else 1.0) * drafting
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args.lr, step, progress(), args.decay)
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        step += 1
        seconds += time.monotonic() - began
        began = time.monotonic()
        entry = {"step": step, "loss": loss.item()}
        if step % args.eval_every == 0 or progress() >= 1:
            with autocast:
                figures = losses.evaluate(model.eval(), windows, n_groups=n_groups)
            model.train()
            entry |= {
                "heldout_loss": figures["loss"],
                "acceptance": figures["acceptance"],
                "match": figures["match"],
                "hits": figures["hits"],
            }
            accepted = " ".join(f"{value:.2f}" for value in figures["acceptance"])
            bar.write(f"step {step}: held-out loss {figures['loss']:.3f}, acceptance {accepted}")
        history.append(entry)
        if step % args.save_every == 0:
            save()
        left = "" if args.steps else f", {max(0.0, args.minutes - seconds / 60):.1f} minutes left"
        rate = tokens_per_step * bar.format_dict["rate"] if bar.format_dict["rate"] else 0.0
        bar.set_postfix_str(f"loss {entry['loss']:.3f}, {rate:,.0f} tokens/s{left}", refresh=False)
        bar.update()
    bar.close()
    save()
    if interrupted:
        print(f"stopped after step {step}; the same command with --resume goes on")
        return
    checkpoint.save(args.out / "model.pt", model, encoding, record(), dtype=torch.bfloat16)
    print(f"wrote {args.out / 'model.pt'}, log.jsonl and loss.png; try: python sample.py --checkpoint "
          f"{args.out / 'model.pt'} --pass")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
