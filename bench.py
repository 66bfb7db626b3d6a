"""Measures what PaSS gives: tokens/pass, acceptance by position and wall clock against plain decoding.

Prompts come from held-out files only. For each prompt the methods take turns, so that a slow moment of the machine
meets all of them; the figures are medians over prompts, with quartiles. Prefill is not timed, and each method first
runs once untimed. The table on standard output is Markdown.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minipass import checkpoint, losses
from minipass.cli import choose_device, choose_dtype, run_script
from minipass.data import encode_documents, even_windows, read_documents, split_documents
from minipass.errors import InputError
from minipass.generate import METHODS, Generation, Round, stream
from minipass.model import GPT

NGRAM = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="joint", help="a file, or the name of one in the package (default: %(default)s)")
    add("--data", default="python", help="corpus whose held-out files give the prompts (default: %(default)s)")
    add("--methods", nargs="+", default=["pass-two-pass", "pass"], choices=[m for m in METHODS if m != "speculative"],
        help="measured against autoregressive (default: pass-two-pass pass)")  # fmt: skip
    add("--lookahead", nargs="+", type=int, default=[1, 2, 3, 4, 8], help="draft lengths L (default: 1 2 3 4 8)")
    add("--prompts", type=int, default=48, help="number of prompts (default: %(default)s)")
    add("--prompt-tokens", type=int, default=100, help="tokens of each prompt (default: %(default)s)")
    add("--new-tokens", type=int, default=120, help="tokens generated for each (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, help="draw from the k most likely tokens (default: all)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64 (default: auto)")
    add("--json", type=Path, metavar="PATH", help="also write all figures there")
    args = parser.parse_args()
    for name in ("prompts", "prompt_tokens", "new_tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    return args


def timed_generation(rounds: Iterator[Round], device: torch.device) -> tuple[Generation, float]:
    """Runs one prompt to its end; returns it and its tokens per second after the first round, which holds prefill."""
    result, first_tokens, began = Generation(), 0, 0.0
    for record in rounds:
        result.add(record)
        if result.rounds == 1:
            first_tokens, began = len(result.tokens[0]), _now(device)
    seconds = _now(device) - began
    return result, (len(result.tokens[0]) - first_tokens) / seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def repeated_share(tokens: list[int]) -> float:
    """Share of the 8-grams of a text that stood in it before: small models loop, and loops flatter acceptance."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def measure(
    model: GPT,
    prompts: list[list[int]],
    contenders: list[tuple[str, int]],
    args: argparse.Namespace,
    device: torch.device,
) -> list[dict]:
    """Figures of each contender (method, L); the first is the baseline of the ratios."""
    generations: dict = {contender: [] for contender in contenders}
    rates: dict = {contender: [] for contender in contenders}
    for index, prompt in enumerate(tqdm([prompts[0], *prompts], desc="prompts", dynamic_ncols=True)):
        for contender in contenders:
            rounds = stream(
                model,
                prompt,
                args.new_tokens,
                method=contender[0],
                lookahead=contender[1],
                temperature=args.temperature,
                top_k=args.top_k,
                generator=torch.Generator(device).manual_seed(args.seed + index),
            )
            result, rate = timed_generation(rounds, device)
            if index:  # the first time around is the warm-up
                generations[contender].append(result)
                rates[contender].append(rate)
    baseline = contenders[0]
    figures = []
    for contender in contenders:
        results = generations[contender]
        ratios = np.array(rates[contender]) / np.array(rates[baseline])
        length = max(len(result.tested) for result in results)
        tested, accepted = np.zeros(length), np.zeros(length)
        for result in results:
            tested[: len(result.tested)] += result.tested
            accepted[: len(result.accepted)] += result.accepted
        same = [a.tokens == b.tokens for a, b in zip(results, generations[baseline], strict=True)]
        figures.append(
            {
                "method": contender[0],
                "lookahead": contender[1] if contender != baseline else 0,
                "tokens_per_pass": sum(len(r.tokens[0]) for r in results) / sum(r.passes for r in results),
                "kept_by_position": (accepted / np.maximum(tested, 1)).tolist(),
                "speedup_quartiles": np.percentile(ratios, [25, 50, 75]).tolist(),
                "tokens_per_second": float(np.median(rates[contender])),
                "repeated_8grams": float(np.mean([repeated_share(r.tokens[0]) for r in results])),
                "same_text_as_plain": sum(same) / len(same),
            }
        )
    return figures


def machine(device: torch.device) -> str:
    """Processor (or GPU) and software, in words."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}"


def commit() -> str:
    """Short name of the commit that is checked out, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    args = parse_arguments()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    loaded = checkpoint.load(args.checkpoint, device=device, dtype=dtype)
    _, heldout = split_documents(read_documents(args.data))
    tokens = encode_documents(heldout, loaded.encoding)
    prompts = even_windows(tokens, args.prompts, args.prompt_tokens).tolist()
    contenders = [("autoregressive", 1), *((method, L) for method in args.methods for L in args.lookahead)]
    figures = measure(loaded.model, prompts, contenders, args, device)
    forced = losses.evaluate(loaded.model, even_windows(tokens, 128, loaded.model.config.block_size + 1))

    decoding = "greedy" if args.temperature == 0 else f"temperature {args.temperature}, top-k {args.top_k or 'all'}"
    setting = (
        f"{args.checkpoint}, {decoding}, {len(prompts)} held-out prompts of {args.prompt_tokens} tokens ({args.data}), "
        f"{args.new_tokens} new tokens, {str(dtype).removeprefix('torch.')}, seed {args.seed}, commit {commit()}; "
        f"{machine(device)}"
    )
    print(setting + "\n")
    heads = ["method", "L", "tokens/pass", "kept by position", "speed-up (quartiles)", "tokens/s"]
    print("| " + " | ".join([*heads, "repeated 8-grams", "as plain"]) + " |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in figures:
        kept = " ".join(f"{share:.2f}" for share in row["kept_by_position"]) or "-"
        low, middle, high = row["speedup_quartiles"]
        print(
            f"| {row['method']} | {row['lookahead'] or '-'} | {row['tokens_per_pass']:.2f} | {kept} | {middle:.2f} "
            f"({low:.2f} to {high:.2f}) | {row['tokens_per_second']:.0f} | {row['repeated_8grams']:.0%} | "
            f"{row['same_text_as_plain']:.0%} |"
        )
    by_position = {name: " ".join(f"{share:.2f}" for share in forced[name]) for name in ("acceptance", "match")}
    print(
        f"\nTeacher-forced on held-out text: base loss {forced['loss']:.3f} nats/token; expected acceptance by "
        f"position {by_position['acceptance']}; greedy match {by_position['match']}"
    )
    if args.json:
        content = json.dumps({"setting": setting, "figures": figures, "teacher_forced": forced}, indent=1) + "\n"
        checkpoint.atomic_write(args.json, lambda path: path.write_text(content))


if __name__ == "__main__":
    run_script(main)
