"""Continues a prompt, with or without PaSS: `python sample.py --pass` shows which tokens were drafted in parallel.

The text goes to standard output as it comes, coloured by origin on a terminal; one line of statistics follows on
standard error. `--compare` times the same prompt with and without PaSS, `--json` prints one object instead of text,
`--trace` writes a page that shows what each round drafted and kept.
"""

import argparse
import codecs
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minipass import weights
from minipass.cli import choose_device, choose_dtype, run_script
from minipass.errors import InputError
from minipass.extras.trace import Trace
from minipass.generate import (
    ACCEPTED,
    BONUS,
    CORRECTED,
    DEFAULT_LOOKAHEAD,
    DEFAULT_PROMPT_LOOKUP,
    Generation,
    Round,
    stream,
)
from minipass.shapes import MOST_AUTO_LOOKAHEAD, AdaptiveTree, best_tree, round_seconds
from minipass.tokenizer import encode_bytes

DEFAULT_PROMPT = '''class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self, items=None):
        self._items = list(items or [])

    def __len__(self):
        return len(self._items)

    def push(self, item):'''  # no line end: the tokens of this text hold it together with the indentation behind it
MOST_TREE_SIZE = 256  # drafts; a pass has as many times 1 + L rows
AUTO = "auto"
COLOURS = {ACCEPTED: "32", BONUS: "36", CORRECTED: "33"}  # green, cyan, yellow; a free token stays as it is
METHOD_OF = {None: "autoregressive", "fused": "pass", "two-pass": "pass-two-pass", "tree": "pass-tree"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--pass",
        dest="variant",
        nargs="?",
        const="fused",
        choices=("fused", "two-pass", "tree"),
        help="parallel speculative sampling: fused, one pass a round (default), the paper's two-pass form, or a tree "
        "of drafts, fused",
    )
    add("--prompt", help="text to continue, or - for standard input (default: the beginning of a Python class)")
    add("--max-new-tokens", type=int, default=128, help="at most so many (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=10, help="draw from the k most likely tokens (default: %(default)s)")
    add("--top-p", type=float, help="draw from the fewest tokens with this probability (default: all)")
    add("--lookahead", type=length, metavar="L", help="drafts in a row in each round, or auto: a tree of drafts that "
        "fits this machine, by a short measurement, and then the text; what a seed draws depends on it (default: "
        f"{DEFAULT_LOOKAHEAD}; as many as the tree is deep)")  # fmt: skip
    add("--tree-size", type=int, default=8, metavar="N", help="drafts in a round of --pass tree (default: %(default)s)")
    add("--prompt-lookup", type=int, nargs="?", const=DEFAULT_PROMPT_LOOKUP, default=0, metavar="N", help="copy "
        "N drafts from the text where its last tokens stood before: with --pass fused or tree, or alone (default: 0, "
        "without a number: %(const)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64 (default: auto, bfloat16 where "
        "the hardware has it)")  # fmt: skip
    add("--compile", action="store_true", help="on CUDA: record what a round computes as a graph, and replay it")
    add("--checkpoint", default="joint", help="a file, the name of one in the package, or a GPT-2: gpt2 .. gpt2-xl or "
        "a folder with its files (default: %(default)s)")  # fmt: skip
    add("--lookahead-table", metavar="FILE", help="take the look-ahead tokens from this file")
    add("--compare", action="store_true", help="time the prompt with and without PaSS, side by side")
    add("--json", action="store_true", help="print one JSON object")
    add("--trace", type=Path, metavar="PATH", help="also write a web page that shows every round")
    args = parser.parse_args()
    if args.compare and (args.json or args.trace):
        raise InputError(f"--compare and {'--json' if args.json else '--trace'} exclude each other")
    if args.compare and args.variant is None and not args.prompt_lookup:
        args.variant = "fused"
    if args.prompt_lookup and args.variant == "two-pass":
        raise InputError("--prompt-lookup needs --pass fused or --pass tree, or no --pass")
    if not 0 <= args.prompt_lookup <= MOST_TREE_SIZE:
        raise InputError(f"--prompt-lookup must lie in 0..{MOST_TREE_SIZE}, not {args.prompt_lookup}")
    if args.trace and not args.trace.name:
        raise InputError(f"--trace must name a file, not {args.trace}")
    if not 1 <= args.tree_size <= MOST_TREE_SIZE:
        raise InputError(f"--tree-size must lie in 1..{MOST_TREE_SIZE}, not {args.tree_size}")
    if args.lookahead == AUTO and args.variant in (None, "two-pass"):
        raise InputError("--lookahead auto needs --pass fused or --pass tree")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must lie in 0..2**63 - 1, not {args.seed}")
    return args


def length(argument: str) -> int | str:
    """A number of look-ahead tokens, or AUTO."""
    if argument == AUTO:
        return AUTO
    try:
        return int(argument)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or {AUTO}, not {argument}") from None


def drafting(loaded: weights.Checkpoint, args: argparse.Namespace, captures: dict | None) -> dict:
    """What --pass, --lookahead, --tree-size and --prompt-lookup say, as stream's settings.

    Trees are chosen by the hits that were measured at the end of the checkpoint's training.
    """
    method, hits = METHOD_OF[args.variant], loaded.record.get("hits", [])
    if args.variant is None and args.prompt_lookup:
        method = "prompt-lookup"
    if args.lookahead == AUTO:
        if not hits:
            raise InputError(f"{args.checkpoint} has no record of how often its drafts are right; give --lookahead")
        sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        hits = hits[:MOST_AUTO_LOOKAHEAD]
        seconds = round_seconds(loaded.model, hits, captures=captures, **sampling)
        return {"method": "pass-tree", "tree": AdaptiveTree(hits, seconds), "prompt_lookup": args.prompt_lookup}
    tree = best_tree(hits[: args.lookahead], args.tree_size) if hits and method == "pass-tree" else None
    return {"method": method, "lookahead": args.lookahead, "tree": tree, "prompt_lookup": args.prompt_lookup}


def read_prompt(argument: str | None) -> bytes:
    """The prompt's bytes, which need not be UTF-8."""
    if argument is None:
        return DEFAULT_PROMPT.encode()
    prompt = sys.stdin.buffer.read() if argument == "-" else os.fsencode(argument)
    if not prompt:
        raise InputError("the prompt is empty; give at least one character")
    return prompt


class TextPrinter:
    """Writes tokens as they come; a character whose bytes are spread over tokens appears with the last of them."""

    def __init__(self, encoding, coloured: bool):
        self.encoding, self.coloured = encoding, coloured
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, tokens: list[int], origins: list[str]) -> None:
        for token, origin in zip(tokens, origins, strict=True):
            if token != self.encoding.eot_token:
                self.write_bytes(self.encoding.decode_single_token_bytes(token), COLOURS.get(origin))
        sys.stdout.flush()

    def write_bytes(self, data: bytes, colour: str | None = None, final: bool = False) -> None:
        text = self.decoder.decode(data, final)
        sys.stdout.write(f"\033[{colour}m{text}\033[0m" if self.coloured and colour and text else text)


def run(rounds, on_round: Callable[[Round], None] = lambda record: None) -> tuple[Generation, float]:
    """Goes through the rounds of one prompt; returns the generation and its seconds, prefill included."""
    result, began = Generation(), time.perf_counter()
    for record in rounds:
        result.add(record)
        on_round(record)
    return result, time.perf_counter() - began


def statistics_line(result: Generation, seconds: float, coloured: bool) -> str:
    n_tokens = len(result.tokens[0])
    line = f"{n_tokens} tokens in {result.passes} passes: {result.tokens_per_pass:.2f} tokens/pass"
    if result.tested:
        line += "; kept by position " + " ".join(f"{share:.2f}" for share in result.acceptance)
    line += f"; {n_tokens / seconds:.0f} tokens/s"
    if coloured and result.tested:
        line += "  (" + " ".join(f"\033[{colour}m{name}\033[0m" for name, colour in COLOURS.items()) + ")"
    return line


def compare(rounds_of: Callable, drafts: dict, repeats: int = 5) -> None:
    """Prints medians over `repeats` alternating runs without and with drafts, after a warm-up of each."""
    methods = {"autoregressive": {"method": "autoregressive"}, drafts["method"]: drafts}
    rates: dict[str, list[float]] = {name: [] for name in methods}
    results = {}
    for repeat in range(repeats + 1):
        for name in methods:
            results[name], seconds = run(rounds_of(methods[name]))
            if repeat:
                rates[name].append(len(results[name].tokens[0]) / seconds)
    print(f"{'':16}{'tokens/s':>10}{'tokens/pass':>13}{'tokens':>8}{'passes':>8}")
    for name in methods:
        result, rate = results[name], statistics.median(rates[name])
        print(f"{name:16}{rate:10.0f}{result.tokens_per_pass:13.2f}{len(result.tokens[0]):8}{result.passes:8}")
    ratios = [new / old for old, new in zip(*rates.values(), strict=True)]
    print(
        f"speed-up {statistics.median(ratios):.2f} (median of {repeats} pairs, {min(ratios):.2f} to {max(ratios):.2f}; "
        "prefill included)"
    )
    one, other = (result.tokens for result in results.values())
    same = one == other
    print("same text" if same else "another text: at temperature > 0 another draw, in bfloat16 also another rounding")


def main() -> None:
    args = parse_arguments()
    prompt = read_prompt(args.prompt)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    loaded = weights.load(args.checkpoint, device=device, dtype=dtype)
    if args.lookahead_table:
        weights.load_table(loaded.model, args.lookahead_table)
    if args.variant and loaded.model.config.n_lookahead == 0:
        raise InputError(f"{args.checkpoint} has no look-ahead tokens: name a file of them with --lookahead-table")
    encoding, prompt_ids = loaded.encoding, encode_bytes(loaded.encoding, prompt)

    def rounds_of(drafts: dict):
        return stream(
            loaded.model,
            prompt_ids,
            args.max_new_tokens,
            **drafts,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            stop_token=encoding.eot_token,
            generator=torch.Generator(device).manual_seed(args.seed),
            captures=captures,
        )

    captures = {} if args.compile else None
    drafts = drafting(loaded, args, captures)
    if args.compare:
        compare(rounds_of, drafts)
        return
    method = drafts["method"]
    names = ["checkpoint", "lookahead_table", "temperature", "top_k", "top_p", "lookahead", "seed"]
    if args.variant == "tree" and args.lookahead != AUTO:
        names.append("tree_size")
    if args.prompt_lookup:
        names.append("prompt_lookup")
    given = {name.replace("_", "-"): getattr(args, name) for name in names if getattr(args, name) is not None}
    trace = Trace(encoding, prompt, {"method": method, **given, "dtype": str(dtype).removeprefix("torch.")})

    def keep(record: Round) -> None:
        if args.trace:
            trace.add(record)

    if args.json:
        result, seconds = run(rounds_of(drafts), keep)
        tokens = result.tokens[0]
        text = encoding.decode_bytes([token for token in tokens if token != encoding.eot_token])
        figures = {
            "text": text.decode("utf-8", "replace"),
            "tokens": tokens,
            "passes": result.passes,
            "tokens_per_pass": result.tokens_per_pass,
            "acceptance": result.acceptance,
            "tokens_per_second": len(tokens) / seconds,
            "method": method,
        }
        print(json.dumps(figures))
        if args.trace:
            trace.write(args.trace)
        return
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show every character
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    printer = TextPrinter(encoding, coloured)
    unwritten = [prompt]

    def show(record: Round) -> None:
        if unwritten:  # with the first round, so that a bad setting is found before anything is written
            printer.write_bytes(unwritten.pop())
        printer.write(record.tokens[0], record.origins[0])
        keep(record)

    result, seconds = run(rounds_of(drafts), show)
    printer.write_bytes(b"", final=True)
    print(flush=True)
    print(statistics_line(result, seconds, coloured and sys.stderr.isatty()), file=sys.stderr)
    if args.trace:
        trace.write(args.trace)


if __name__ == "__main__":
    run_script(main)
