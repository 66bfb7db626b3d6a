"""Plain decoding and PaSS write the same text side by side: `python -m minipass.extras.animation FILE.svg`.

FILE-narrow.svg, for phones, shows the same runs one below the other.

Both really run, in turns, several times; the picture shows each method's run with the median time. A token appears when
it was written, counted from the first one: prefill, the same for both, is left out. The picture states by which factor
it is slowed down. The file is an SVG without scripts and fonts of its own, so it moves in an <img>, too.
For readers who asked their system for less motion it stands still and shows the whole text.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from minipass import weights
from minipass.api import DEFAULT_LOOKAHEAD
from minipass.cli import choose_device, choose_dtype, run_script
from minipass.decode import Fused, Plain
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.extras.trace import characters, plain
from minipass.files import atomic_write, check_replaceable
from minipass.sampling import Sampling
from minipass.texts import ACCEPTED, BONUS, CORRECTED, SAMPLED, Generation, Turn
from minipass.tokenizer import encode_bytes, stop_tokens

PROMPT = '''class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self):
        self._items = []

    def push(self, item):'''
REPEATS = 5
SHOWN_SECONDS, HOLD_SECONDS = 8, 3  # plain decoding is slowed down to take this long; then the end stays
PROMPT_LINES = 3  # of the prompt that are shown, its last
COLUMNS, CELL, LINE = 36, 8, 17  # characters in a line; width and height of one, in the picture's units
MARGIN, PANEL, GAP, HEAD = 12, 304, 8, 66
LEGEND = {
    ACCEPTED: "a draft, accepted",
    CORRECTED: "drawn after a rejected draft",
    BONUS: "drawn after all drafts were accepted",
    SAMPLED: "drawn, no draft tested",
}
Segment = tuple[int, int, str]  # row, column, characters
STYLE = """
text { font: 13.3px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre;
  fill: #d7dce2 }
.words text, text.words { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
.title { font-size: 16px; font-weight: 600 } .number { font-size: 21px; font-weight: 700; fill: #fff; text-anchor: end }
.soft text, text.soft { fill: #98a2ae }
.accepted rect { fill: #12604a } .accepted text { fill: #d9fff0 }
.corrected rect { fill: #6b3c08 } .corrected text { fill: #ffd9a8 }
.bonus rect { fill: #134f80 } .bonus text { fill: #cfe8ff }
.sampled rect { fill: #2c333b } .given rect { fill: none }
.over { opacity: 0 }
@media (prefers-reduced-motion: no-preference) { .moves { animation: LOOP steps(1, end) infinite } }
"""


@dataclass(frozen=True)
class Run:
    """One run: the turns, and for each turn the seconds from the end of the first turn to its own end."""

    name: str
    turns: list[Turn]
    seconds: list[float]

    @property
    def tokens(self) -> list[int]:
        return [token for turn in self.turns for token in turn.tokens[0]]


def timed(name: str, engine: Engine, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int], seed: int) -> Run:
    """Continues one prompt and reads the clock after each turn, when its tokens have reached the host."""
    turns, ends = [], []
    for turn in engine.stream(prompt, max_new_tokens, stop_token=stop, seed=seed):
        ends.append(time.perf_counter())
        turns.append(turn)
    return Run(name, turns, [end - ends[0] for end in ends])


def measure(
    engines: dict[str, Engine], prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int] = (), seed: int = 0
) -> list[Run]:
    """For each engine the run with the median time of REPEATS, after one warm-up; the engines take turns.

    Raises InputError if their texts differ, or end in the first turn.
    """
    runs: list[list[Run]] = [[] for _ in engines]
    for _ in range(1 + REPEATS):
        for own, (name, engine) in zip(runs, engines.items(), strict=True):
            own.append(timed(name, engine, prompt, max_new_tokens, stop, seed))
    chosen = [sorted(own[1:], key=lambda run: run.seconds[-1])[REPEATS // 2] for own in runs]
    first, *others = (run.tokens for run in chosen)
    if any(tokens != first for tokens in others):
        raise InputError("the two texts differ by rounding, as they may in all but float64: choose another seed, or "
            "--dtype float64")  # fmt: skip
    if any(len(run.turns) == 1 for run in chosen):
        raise InputError("the text ends in its first turn: choose another seed or prompt, or more new tokens")
    return chosen


def cells(pieces: list[str]) -> tuple[list[list[Segment]], int]:
    """The place of each piece of a text, as a segment for each row that it is on, and the number of rows.

    Long lines go on in the next row. A segment includes its line end, unless the row is full.
    """
    placed, row, column = [], 0, 0
    for piece in pieces:
        parts: list[Segment] = []
        for char in piece.replace("\t", "    "):
            if column == COLUMNS and char != "\n":
                row, column = row + 1, 0
            if parts and parts[-1][0] == row:
                parts[-1] = (*parts[-1][:2], parts[-1][2] + char)
            elif column < COLUMNS:
                parts.append((row, column, char))
            row, column = (row + 1, 0) if char == "\n" else (row, column + 1)
        placed.append(parts)
    return placed, row + 1


def svg(runs: Sequence[Run], encoding: tiktoken.Encoding, prompt: Sequence[int], note: str, columns: int = 2) -> str:
    """The picture: a panel for each run, `columns` of them side by side. note: what ran, for the last lines."""
    pieces = [encoding.decode_single_token_bytes(token) for token in (*prompt, *runs[0].tokens)]
    given = b"\n".join(b"".join(pieces[: len(prompt)]).split(b"\n")[-PROMPT_LINES:])
    new = [b"" if token in stop_tokens(encoding) else piece for token, piece in zip(
        runs[0].tokens, pieces[len(prompt) :], strict=True)]  # fmt: skip
    places, n_rows = cells(characters([given, *new]))
    slower = max(1, round(SHOWN_SECONDS / runs[0].seconds[-1]))
    loop = slower * max(run.seconds[-1] for run in runs) + HOLD_SECONDS
    keyframes, body = [], []
    panel_height, width = HEAD + n_rows * LINE, 2 * MARGIN + columns * (PANEL + GAP) - GAP
    for index, run in enumerate(runs):
        x, y = MARGIN + index % columns * (PANEL + GAP), MARGIN + index // columns * (panel_height + GAP)
        body.append(f'<rect x="{x}" y="{y}" width="{PANEL}" height="{panel_height}" rx="6" fill="#1b2026"/>')
        body.append(f'<g class="panel" transform="translate({x + 8} {y + HEAD - 6})">')
        body.append(label(0, -40, run.name, "title words") + f'<g class="soft given">{segments(places[0])}</g>')
        body.append(panel(run, f"{index}-", places[1:], [slower * each / loop for each in run.seconds], keyframes))
        body.append("</g>")
    top = MARGIN + -(-len(runs) // columns) * (panel_height + GAP) + 14
    for i, (origin, words) in enumerate(LEGEND.items()):
        x, y = MARGIN + 8 + i % columns * (PANEL + GAP), top + i // columns * 20
        body.append(f'<g class="{origin}"><rect x="{x}" y="{y - 11}" width="14" height="14" rx="3"/></g>')
        body.append(label(x + 21, y, words, "words"))
    speed = f"shown {slower} times slower than it ran" if slower > 1 else "shown as fast as it ran"
    lines = "Same seed, same text.", f"{note};", speed
    facts = " ".join(lines)
    height = top + -(-len(LEGEND) // columns) * 20
    for line in (facts,) if columns > 1 else lines:
        body.append(label(MARGIN + 8, height + 2, line, "words soft"))
        height += 18
    title = f"{' and '.join(run.name for run in runs)} write a text at the same time. {facts}."
    style = STYLE.replace("LOOP", f"{loop:.3f}s") + "\n".join(keyframes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{plain(title)}</title><style>{style}</style>'
        f'<rect width="{width}" height="{height}" rx="8" fill="#0f1317"/>{"".join(body)}</svg>\n'
    )


def panel(run: Run, key: str, places: Sequence[list[Segment]], moments: Sequence[float], keyframes: list[str]) -> str:
    """A run's tokens and figures. Their animations, named by key and turn, are added to `keyframes`.

    moments: the end of each turn, as a share of the loop.
    """
    made, place, counts, n_first = [], iter(places), Generation(), len(run.turns[0].tokens[0])
    for k, turn in enumerate(run.turns):
        counts.add(turn)
        last = k == len(run.turns) - 1
        come = f"{'0%{opacity:0}' if k else ''}{moments[k]:.3%}{{opacity:1}}"
        go = "" if last else f"{moments[k + 1]:.3%}{{opacity:0}}"
        keyframes += [f"@keyframes token{key}{k}{{{come}}}", f"@keyframes count{key}{k}{{{come}{go}}}"]
        made += [
            f'<g class="moves {origin}" style="animation-name:token{key}{k}">{segments(next(place))}</g>'
            for origin in turn.origins[0]
        ]
        rate = f"{(len(counts.tokens[0]) - n_first) / run.seconds[k]:.0f}" if k else ""
        figures = ((52, rate, "number"), (57, "tokens/s", "soft"), (192, f"{counts.tokens_per_pass:.2f}", "number"),
                   (197, "tokens/pass", "soft"))  # fmt: skip
        made.append(f'<g class="moves words{"" if last else " over"}" style="animation-name:count{key}{k}">')
        made += [*(label(x, -14, text, classes) for x, text, classes in figures), "</g>"]
    return "".join(made)


def segments(parts: list[Segment]) -> str:
    """A token's background and its characters on each row; textLength makes every font as wide as the cells."""
    made = []
    for row, column, chars in parts:
        x, y, text = column * CELL, row * LINE, chars.removesuffix("\n")
        width = len(text) * CELL + (3 if chars.endswith("\n") else 0)
        made.append(f'<rect x="{x}" y="{y}" width="{width}" height="{LINE - 1}" rx="2"/>')
        inked = text.strip()
        if inked:
            x += (len(text) - len(text.lstrip())) * CELL
            made.append(
                f'<text x="{x}" y="{y + 12.5}" textLength="{len(inked) * CELL}" lengthAdjust="spacingAndGlyphs">'
                f"{plain(inked)}</text>"
            )
    return "".join(made)


def label(x: float, y: float, text: str, classes: str) -> str:
    return f'<text x="{x}" y="{y}" class="{classes}">{plain(text)}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.svg", help="where the picture goes")
    parser.add_argument("--checkpoint", default="joint", help="the model, as in sample.py (default: %(default)s)")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue (default: the beginning of a Python class)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--lookahead", type=int, default=DEFAULT_LOOKAHEAD, help="drafts a turn (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="as in sample.py (default: %(default)s)")
    args = parser.parse_args()
    if not args.file.name:
        raise InputError(f"FILE must name a file, not {args.file}")
    files = args.file, args.file.with_stem(f"{args.file.stem}-narrow")
    for file in files:
        check_replaceable(file, "<svg")
    device = choose_device("auto")
    loaded = weights.load(args.checkpoint, device=device, dtype=choose_dtype(args.dtype, device))
    sampling = Sampling(args.temperature, top_k=10)
    methods = {"Plain decoding": Plain(), f"PaSS, drafts a pass: {args.lookahead}": Fused(args.lookahead)}
    engines = {name: Engine(loaded.model, method, sampling) for name, method in methods.items()}
    prompt = encode_bytes(loaded.encoding, os.fsencode(args.prompt))
    runs = measure(engines, prompt, args.max_new_tokens, stop_tokens(loaded.encoding), args.seed)
    n_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    note = f"Model {Path(args.checkpoint).name}, {n_parameters / 1e6:.0f}M weights, {args.dtype}"
    for columns, file in zip((2, 1), files, strict=True):
        picture = svg(runs, loaded.encoding, prompt, note, columns)
        atomic_write(file, lambda place, picture=picture: place.write_text(picture, encoding="utf-8"))
    for run in runs:
        n_new, passes = len(run.tokens) - len(run.turns[0].tokens[0]), len(run.turns) - 1
        print(f"{run.name}: {n_new} tokens in {run.seconds[-1]:.3f} s and {passes} passes after the first turn")


if __name__ == "__main__":
    run_script(main)
