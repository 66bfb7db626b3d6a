"""Continues a prompt, with PaSS (`--pass`) or without, or answers a question (`--chat`).

The text appears as it is written; a terminal shows it coloured by where each token came from. One line of statistics
follows on standard error.
"""

import argparse
import codecs
import copy
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import torch

from minipass import weights
from minipass.api import DEFAULT_LOOKAHEAD, DEFAULT_LOOKUP, DEFAULT_TREE, make_method
from minipass.auto import MOST_AUTO_LOOKAHEAD, AdaptiveTree, Auto, best_tree, likeliest_tree, turn_seconds
from minipass.chat import encode_chat
from minipass.cli import choose_device, choose_dtype, dtype_name, run_script
from minipass.decode import Plain
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.extras.trace import Trace
from minipass.extras.trace_page import TITLE
from minipass.files import check_replaceable
from minipass.sampling import COUPLED, REJECTION, RULES, Sampling
from minipass.texts import ACCEPTED, BONUS, CORRECTED, Generation, Turn
from minipass.tokenizer import encode_bytes, stop_tokens
from minipass.trees import MOST_DRAFTS

DEFAULT_PROMPT = '''class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self, items=None):
        self._items = list(items or [])

    def __len__(self):
        return len(self._items)

    def push(self, item):'''  # no line end: the tokens of this text hold it together with the indentation after it
DEFAULT_TREE_SIZE = 8
REPEATS = 5  # of --compare
AUTO = "auto"
CONVERSATION = object()  # --chat without a text
CHAT_TEMPERATURE = 0.0  # small models are right more often when they are greedy
EXAMPLES = """Five examples

  python sample.py --pass                               the default prompt
  python sample.py "def main(argv):" --pass tree        your own prompt, with a tree of drafts
  python sample.py --pass --compare --dtype float64     the speed-up, and a check that the text stays the same
  python sample.py --pass --trace trace.html            a web page that shows every turn
  python sample.py --checkpoint smollm2 --chat --pass   a conversation with a pretrained model
"""
COLOURS = {ACCEPTED: "32", BONUS: "36", CORRECTED: "33"}  # green, cyan, yellow; a sampled token stays as it is
OnTurn = Callable[[Turn], None]
METHOD_OF = {None: "plain", "fused": "pass", "two-pass": "two-pass", "tree": "tree"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [PROMPT] [options]", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument_group("what to write").add_argument
    add("text", nargs="?", metavar="PROMPT", help="text to continue, or - to read it from standard input; write it "
        "before --pass and --prompt-lookup (default: the beginning of a Python class)")  # fmt: skip
    add("--prompt", metavar="PROMPT", help="another way to give the prompt")
    add("--keep-newline", action="store_true", help="keep the last line end of standard input")
    add("--chat", nargs="?", const=CONVERSATION, metavar="TEXT", help="answer TEXT, with a model trained for "
        "conversations; without TEXT, hold a conversation, which an empty line ends")  # fmt: skip
    add("--system", default="", metavar="TEXT", help="instructions to the model of --chat (default: "
        "none, not even those of its chat template)")  # fmt: skip
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="stop after N tokens (default: 128; for an answer in --chat 512)",
    )
    add = parser.add_argument_group("how to draft").add_argument
    add("--pass", dest="variant", nargs="?", const="fused", choices=("fused", "two-pass", "tree"), help="use parallel "
        "speculative sampling; fused (the default): each pass verifies drafts and makes the next ones; two-pass: the "
        "paper's way, one pass drafts, one verifies; tree: fused, with several drafts for each position")  # fmt: skip
    add("--lookahead", type=length, metavar="L", help="draft L tokens ahead; auto: choose the fastest tree of drafts, "
        "or none, by a short measurement of this machine and by what is accepted as the text grows (default: "
        f"{DEFAULT_LOOKAHEAD}, in a tree as many as the model has look-ahead tokens)")  # fmt: skip
    add("--tree-size", type=int, metavar="N", help="draft N tokens a pass, in --pass tree (default: "
        f"{DEFAULT_TREE_SIZE})")  # fmt: skip
    add("--prompt-lookup", type=int, nargs="?", const=DEFAULT_LOOKUP, metavar="N", help="if the text's last "
        "tokens stood in it before, copy the N tokens that followed as drafts (N is %(const)s if left out); works "
        "without --pass, too")  # fmt: skip
    add("--rule", choices=RULES, help="coupled: accept a draft if the target draws the same token from the same noise, "
        "so that the text is plain decoding's; rejection: the paper's rule (default: coupled, but rejection for "
        "two-pass)")  # fmt: skip
    add = parser.add_argument_group("how to sample").add_argument
    add(
        "--temperature",
        type=float,
        metavar="T",
        help=f"0 always takes the likeliest token (default: 0.8, in --chat {CHAT_TEMPERATURE:g})",
    )
    add("--top-k", type=int, default=10, metavar="K", help="draw from the K likeliest tokens (default: %(default)s)")
    add("--top-p", type=float, metavar="P", help="of these, draw from the fewest that together have probability P "
        "(default: all)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text (default: %(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", default="joint", metavar="MODEL", help="a model of this package (joint, frozen, draft), a file "
        "or folder that train_tiny.py made, smollm2, a GGUF file, a folder of a GPT-2 or Llama, or its name on the "
        "Hugging Face hub (default: %(default)s)")  # fmt: skip
    add("--adapters", metavar="FILE", help="file of look-ahead tokens and what else was trained to draft for this "
        "model, or the folder of the run that made it; none: the look-ahead tokens alone, as in the paper (default: "
        "the best in the package)")  # fmt: skip
    add("--lookahead-table", dest="adapters", help=argparse.SUPPRESS)  # its old name
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto, CUDA where there is one)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64 (default: auto, bfloat16 where "
        "the hardware computes in it, else float32)")  # fmt: skip
    add("--cuda-graphs", action="store_true", help="record each turn as a CUDA graph and replay it")
    add("--compile", dest="cuda_graphs", action="store_true", help=argparse.SUPPRESS)  # its old name
    add = parser.add_argument_group("output").add_argument
    add("--compare", action="store_true", help="write no text, but time this prompt with and without PaSS")
    add("--json", action="store_true", help="print the text, its tokens and the statistics as one JSON object")
    add("--trace", type=Path, metavar="FILE", help="also write a web page that shows every turn")
    args = parser.parse_args()
    if args.text is not None:
        if args.prompt is not None:
            raise InputError("two prompts were given: put a prompt of several words in quotes")
        args.prompt = args.text
    if args.chat is not None:
        if args.prompt is not None:
            raise InputError("--chat and a prompt exclude each other")
        if args.chat == "":
            raise InputError("the message of --chat is empty; give at least one character")
        if args.chat is CONVERSATION and (args.compare or args.json or args.trace):
            raise InputError("a conversation goes with none of --compare, --json and --trace: give --chat a text")
    if args.max_new_tokens is None:
        args.max_new_tokens = 128 if args.chat is None else 512
    if args.temperature is None:
        args.temperature = 0.8 if args.chat is None else CHAT_TEMPERATURE
    if args.compare and (args.json or args.trace):
        raise InputError(f"--compare and {'--json' if args.json else '--trace'} exclude each other")
    for name, least in (("lookahead", 1), ("tree_size", 1), ("prompt_lookup", 0)):
        value = getattr(args, name)
        if isinstance(value, int) and not least <= value <= MOST_DRAFTS:
            raise InputError(f"--{name.replace('_', '-')} must lie in {least}..{MOST_DRAFTS}, not {value}")
    args.prompt_lookup = args.prompt_lookup or None
    if args.compare and args.variant is None and not args.prompt_lookup:
        args.variant = "fused"
    for name, used, needed in (
        ("lookahead", args.variant, "--pass"),
        ("tree_size", args.variant == "tree" and args.lookahead != AUTO, "--pass tree, and no --lookahead auto"),
        ("rule", args.variant or args.prompt_lookup, "--pass or --prompt-lookup"),
        ("prompt_lookup", args.variant != "two-pass", "--pass fused or --pass tree, or no --pass"),
        ("keep_newline", args.prompt == "-", "a prompt from standard input, named -"),
        ("system", args.chat is not None, "--chat"),
    ):
        if getattr(args, name) and not used:
            raise InputError(f"--{name.replace('_', '-')} needs {needed}")
    if args.lookahead == AUTO and args.variant == "two-pass":
        raise InputError("--lookahead auto needs --pass fused or --pass tree")
    if args.trace and not args.trace.name:
        raise InputError(f"--trace must name a file, not {args.trace}")
    if args.trace:
        check_replaceable(args.trace, TITLE)
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must lie in 0..2**63 - 1, not {args.seed}")
    args.method = AUTO if args.lookahead == AUTO else METHOD_OF[args.variant]
    if args.variant is None and args.prompt_lookup:
        args.method = "prompt-lookup"
    return args


def length(argument: str) -> int | str:
    """A number of look-ahead tokens, or AUTO."""
    if argument == AUTO:
        return AUTO
    try:
        return int(argument)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or {AUTO}, not {argument}") from None


def choose_method(loaded: weights.Checkpoint, args: argparse.Namespace, sampling: Sampling) -> Any:
    """The method that the options under "how to draft" ask for.

    Trees follow the accuracy of drafts that was measured at the end of the checkpoint's training. Raises InputError for
    what the checkpoint cannot do.
    """
    n_lookahead = loaded.model.config.n_lookahead
    if args.variant and n_lookahead == 0:
        raise InputError(f"{args.checkpoint} has no look-ahead tokens: name a file of them with --adapters")
    if args.lookahead not in (None, AUTO) and args.lookahead > n_lookahead:
        raise InputError(f"--lookahead must lie in 1..{n_lookahead} for {args.checkpoint}, not {args.lookahead}")
    accuracy = loaded.record.get("rank_accuracy", [])[:n_lookahead]
    if not accuracy and (args.method == AUTO or args.tree_size):
        option = "--lookahead auto" if args.method == AUTO else "--tree-size"
        raise InputError(f"{args.checkpoint} has no record of how often its drafts are right, which {option} needs")
    if args.method == AUTO:
        accuracy, rule = accuracy[:MOST_AUTO_LOOKAHEAD], args.rule or COUPLED
        seconds = turn_seconds(loaded.model, accuracy, sampling, rule=rule, use_graphs=args.cuda_graphs)
        return Auto(AdaptiveTree(accuracy, seconds), rule, args.prompt_lookup or 0)
    settings: dict[str, Any] = {"rule": args.rule, "lookup": args.prompt_lookup}
    if args.method == "tree":
        size = args.tree_size or DEFAULT_TREE_SIZE
        deepest = args.lookahead or n_lookahead
        grown = best_tree if args.rule == REJECTION else likeliest_tree
        settings["tree"] = grown(accuracy[:deepest], size) if accuracy else DEFAULT_TREE.cut(deepest)
    else:
        settings["lookahead"] = args.lookahead
    return make_method(args.method, **settings)


def read_prompt(argument: str | None, keep_newline: bool) -> bytes:
    """The prompt's bytes, which need not be UTF-8; of standard input without its last line end, which `echo` adds."""
    if argument is None:
        return DEFAULT_PROMPT.encode()
    prompt = sys.stdin.buffer.read() if argument == "-" else os.fsencode(argument)
    if argument == "-" and not keep_newline:
        prompt = re.sub(rb"\r?\n\Z", b"", prompt)
    if not prompt:
        raise InputError("the prompt is empty; give at least one character")
    return prompt


class TextPrinter:
    """Writes tokens as they are made; a character that is spread over several tokens appears with the last of them."""

    def __init__(self, encoding, coloured: bool):
        self.encoding, self.coloured, self.hidden = encoding, coloured, stop_tokens(encoding)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, tokens: list[int], origins: list[str]) -> None:
        for token, origin in zip(tokens, origins, strict=True):
            if token not in self.hidden:
                self.write_bytes(self.encoding.decode_single_token_bytes(token), COLOURS.get(origin))
        sys.stdout.flush()

    def write_bytes(self, data: bytes, colour: str | None = None, final: bool = False) -> None:
        text = self.decoder.decode(data, final)
        sys.stdout.write(f"\033[{colour}m{text}\033[0m" if self.coloured and colour and text else text)


def run(turns: Iterator[Turn], on_turn: OnTurn = lambda turn: None) -> tuple[Generation, float]:
    """Goes through the turns of one prompt; returns the generation and its seconds, prefill included."""
    result, began = Generation(), time.perf_counter()
    for turn in turns:
        result.add(turn)
        on_turn(turn)
    return result, time.perf_counter() - began


def ask(loaded: weights.Checkpoint, system: str, question: str, before: Sequence[dict[str, str]] = ()) -> list[int]:
    """The tokens of the instructions, the earlier messages and a question, up to where the answer begins."""
    messages = [{"role": "system", "content": system}, *before, {"role": "user", "content": question}]
    return encode_chat(loaded.encoding, loaded.chat_template, messages)


def too_long(prompt: list[int], block_size: int) -> str:
    return f"the message is too long: with the form of a conversation {len(prompt)} tokens, in a window of {block_size}"


def converse(loaded: weights.Checkpoint, engine: Engine, args: argparse.Namespace) -> None:
    """Questions from standard input, answers to standard output, until an empty line or the end of the input.

    The engine keeps its cache, so only the new part of each prompt is computed.
    """
    messages: list[dict[str, str]] = []
    stop, block_size = stop_tokens(loaded.encoding), loaded.model.config.block_size

    def answer_to(prompt: list[int]) -> Iterator[Turn]:
        return engine.stream(prompt, args.max_new_tokens, stop_token=stop, seed=args.seed)

    answer_to(ask(loaded, args.system, "?"))  # finds a bad setting before anything is read
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError("a message must be UTF-8 text") from error
        if not question:
            return
        prompt = ask(loaded, args.system, question, messages)
        while len(prompt) + args.max_new_tokens > block_size and messages:  # forgets the oldest question and answer
            del messages[:2]
            prompt = ask(loaded, args.system, question, messages)
        if len(prompt) > block_size:
            print(f"sample.py: {too_long(prompt, block_size)}", file=sys.stderr)
            continue
        result = print_text(loaded.encoding, answer_to(prompt))
        answer = loaded.encoding.decode([token for token in result.tokens[0] if token not in stop])
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def statistics_line(result: Generation, seconds: float, coloured: bool) -> str:
    n_tokens = len(result.tokens[0])
    line = f"{n_tokens} tokens in {result.passes} passes: {result.tokens_per_pass:.2f} tokens/pass"
    if result.tested:
        line += "; accepted by position " + " ".join(f"{share:.2f}" for share in result.acceptance)
    line += f"; {n_tokens / seconds:.0f} tokens/s"
    if coloured and result.tested:
        line += "  (" + " ".join(f"\033[{colour}m{name}\033[0m" for name, colour in COLOURS.items()) + ")"
    return line


def compare(engines: dict[str, Engine], turns_of: Callable[[Engine], Iterator[Turn]], may_differ: str) -> None:
    """Prints medians over REPEATS alternating runs of two engines, after a warm-up of each.

    may_differ: why their texts may differ. If it is empty and they differ, exits with a sentence and status 1.
    """
    rates: dict[str, list[float]] = {name: [] for name in engines}
    results, methods = {}, {name: engine.method for name, engine in engines.items()}
    for repeat in range(REPEATS + 1):
        for name, engine in engines.items():
            engine.method = copy.deepcopy(methods[name])  # auto learns from a text: each run begins like the first
            results[name], seconds = run(turns_of(engine))
            if repeat:
                rates[name].append(len(results[name].tokens[0]) / seconds)
    print(f"{'':16}{'tokens/s':>10}{'tokens/pass':>13}{'tokens':>8}{'passes':>8}")
    for name in engines:
        result, rate = results[name], statistics.median(rates[name])
        print(f"{name:16}{rate:10.0f}{result.tokens_per_pass:13.2f}{len(result.tokens[0]):8}{result.passes:8}")
    ratios = [new / old for old, new in zip(*rates.values(), strict=True)]
    print(
        f"speed-up {statistics.median(ratios):.2f} (median of {REPEATS} pairs, {min(ratios):.2f} to {max(ratios):.2f}; "
        "prefill included)"
    )
    (one,), (other,) = (result.tokens for result in results.values())
    if one != other and not may_differ:
        same = next((i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), len(one))
        sys.exit(f"sample.py: the texts differ after {same} tokens but must be equal: this is a mistake in minipass")
    print("same text" if one == other else f"another text: {may_differ}")


def why_texts_may_differ(method: Any, sampling: Sampling, dtype: torch.dtype) -> str:
    """Why a method's text may differ from plain decoding's for the same seed; empty where they must be equal."""
    if sampling.temperature > 0 and method.rule != COUPLED:
        return f"by the rule {method.rule} it is another draw"
    return "" if dtype == torch.float64 else f"{dtype_name(dtype)} rounds differently with another number of rows"


def print_json(method: str, encoding: tiktoken.Encoding, turns: Iterator[Turn], on_turn: OnTurn) -> None:
    """Prints the new text and its statistics as one JSON object."""
    result, seconds = run(turns, on_turn)
    tokens, stop = result.tokens[0], stop_tokens(encoding)
    text = encoding.decode_bytes([token for token in tokens if token not in stop])
    figures = {
        "text": text.decode("utf-8", "replace"),
        "tokens": tokens,
        "passes": result.passes,
        "tokens_per_pass": result.tokens_per_pass,
        "acceptance": result.acceptance,
        "tokens_per_second": len(tokens) / seconds,
        "method": method,
    }
    print(json.dumps(figures), flush=True)


def print_text(
    encoding: tiktoken.Encoding, turns: Iterator[Turn], prompt: bytes = b"", on_turn: OnTurn = lambda turn: None
) -> Generation:
    """Prints the text as it is written, then a line of statistics on standard error."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    printer = TextPrinter(encoding, coloured)
    printer.write_bytes(prompt)
    sys.stdout.flush()

    def show(turn: Turn) -> None:
        on_turn(turn)
        printer.write(turn.tokens[0], turn.origins[0])

    result, seconds = run(turns, show)
    printer.write_bytes(b"", final=True)
    print(flush=True)
    print(statistics_line(result, seconds, coloured and sys.stderr.isatty()), file=sys.stderr)
    return result


def main() -> None:
    args = parse_arguments()
    prompt = read_prompt(args.prompt, args.keep_newline) if args.chat is None else b""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    loaded = weights.load(args.checkpoint, device=device, dtype=dtype, adapters=args.adapters)
    encoding, stop = loaded.encoding, stop_tokens(loaded.encoding)
    method = choose_method(loaded, args, sampling)
    if args.chat is CONVERSATION:
        converse(loaded, Engine(loaded.model, method, sampling, use_graphs=args.cuda_graphs, keep_cache=True), args)
        return
    engine = Engine(loaded.model, method, sampling, use_graphs=args.cuda_graphs)
    prompt_ids = encode_bytes(encoding, prompt) if args.chat is None else ask(loaded, args.system, args.chat)
    n_given, block_size = len(prompt_ids), loaded.model.config.block_size
    if args.chat is not None and n_given > block_size:
        raise InputError(too_long(prompt_ids, block_size))
    if n_given > block_size:
        prompt_ids = prompt_ids[-max(1, block_size // 2) :]  # as of a text that outgrows the window

    def turns_of(engine: Engine) -> Iterator[Turn]:
        return engine.stream(prompt_ids, args.max_new_tokens, stop_token=stop, seed=args.seed)

    turns_of(engine)  # finds a bad setting before anything is written
    if len(prompt_ids) < n_given:
        note = f"the prompt has {n_given} tokens, the window {block_size}: the model reads the last {len(prompt_ids)}"
        print(f"sample.py: {note}", file=sys.stderr)
    if args.compare:
        plain = Engine(loaded.model, Plain(), sampling, use_graphs=args.cuda_graphs)
        compare({"plain": plain, args.method: engine}, turns_of, why_texts_may_differ(method, sampling, dtype))
        return
    names = "checkpoint adapters temperature top_k top_p lookahead prompt_lookup seed".split()
    given = {name.replace("_", "-"): getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.method == "tree":
        given["tree-size"] = method.tree.n_verified
    if args.method != "plain":
        given["rule"] = method.rule
    trace = Trace(encoding, prompt, {"method": args.method, **given, "dtype": dtype_name(dtype)})

    on_turn = trace.add if args.trace else lambda turn: None
    try:
        if args.json:
            print_json(args.method, encoding, turns_of(engine), on_turn)
        else:
            print_text(encoding, turns_of(engine), prompt, on_turn)
    finally:  # also after an interrupt, or when nobody reads the output any more
        if args.trace and trace.turns:
            trace.write(args.trace)


if __name__ == "__main__":
    run_script(main)
