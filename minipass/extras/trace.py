"""A generation as a web page: the text coloured by where each token came from, and every round to open and look into.

The page is one file that needs nothing else: it opens from disk, and its policy line forbids the browser to fetch
anything. A Trace takes rounds as they come and keeps only the numbers that the page shows, not the distributions.
"""

from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import tiktoken

from minipass.files import atomic_write
from minipass.generate import ACCEPTED, BONUS, CORRECTED, FREE, Generation, Round

N_RESIDUAL = 5  # tokens of a residual that are shown, besides the one drawn
N_POINTS = 240  # of the curve, at most: more than a screen shows
VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
MEANING = {
    FREE: "drawn from the target itself, no draft tested",
    ACCEPTED: "a draft that was kept",
    CORRECTED: "drawn from the residual after a rejection",
    BONUS: "all drafts kept: one more from the last target",
}


@dataclass(frozen=True)
class SeenDraft:
    """One draft as it was tested: its token and what the draft distribution p and the target q gave it.

    place: which draft in a row it is, and in a tree its rank among those for that place.
    """

    place: str
    token: int
    p: float
    q: float

    @property
    def accept(self) -> float:
        """The probability that it is kept, min(1, q / p)."""
        return min(1.0, self.q / self.p) if self.p > 0 else float(self.q > 0)


@dataclass(frozen=True)
class SeenRound:
    """What the page needs of one round.

    residual: after a rejection the likeliest tokens of max(0, q - p), with the one drawn: (token, q, p, normalised).
    rejection: the sum of max(0, q - p), which is the chance that a draft at that place is rejected.
    """

    tokens: list[int]
    origins: list[str]
    drafts: list[SeenDraft]
    n_accepted: int
    n_tested: int
    residual: list[tuple[int, float, float, float]]
    rejection: float
    total_tokens: int
    total_passes: int
    path: list[str] | None = None  # of a tree: the places that were kept

    @property
    def tokens_per_pass(self) -> float:
        return self.total_tokens / max(self.total_passes, 1)


class Trace:
    """Collects the rounds of one prompt of a generation, then writes them as a page."""

    def __init__(self, encoding: tiktoken.Encoding, prompt: bytes, settings: dict[str, object], index: int = 0):
        """prompt: its bytes, which need not be UTF-8; settings: named facts to show; index: which prompt of a batch."""
        self.encoding, self.prompt, self.settings, self.index = encoding, prompt, settings, index
        self.result = Generation()
        self.rounds: list[SeenRound] = []

    def add(self, record: Round) -> None:
        """Takes one round; its tensors are not kept."""
        b = self.index
        if not record.active[b]:
            return
        names = ("tokens", "origins", "n_tested", "n_accepted", "active")
        self.result.add(replace(record, **{name: [getattr(record, name)[b]] for name in names}))
        tokens, n_accepted = record.tokens[b], record.n_accepted[b]
        drafts, residual, rejection = [], [], 0.0
        path = None
        if record.kept is not None:
            drafts, path = seen_tree(record, b)
        elif record.drafts is not None:
            ids = record.drafts[b]
            p = record.draft_probs[b].gather(1, ids[:, None]).squeeze(1)
            q = record.target_probs[b, : len(ids)].gather(1, ids[:, None]).squeeze(1)
            places = [str(i) for i in range(1, 1 + len(ids))]
            drafts = list(map(SeenDraft, places, ids.tolist(), p.tolist(), q.tolist()))
            if record.origins[b][-1:] == [CORRECTED]:
                q, p = record.target_probs[b, n_accepted], record.draft_probs[b, n_accepted]
                rest = (q - p).clamp(min=0)
                rejection = rest.sum().item()
                rest = rest / rejection if rejection > 0 else q  # as in speculative_accept: p == q but for rounding
                likeliest = [token for token in rest.topk(min(N_RESIDUAL, len(rest))).indices.tolist() if rest[token]]
                shown = likeliest if tokens[-1] in likeliest else [*likeliest, tokens[-1]]
                residual = list(zip(shown, q[shown].tolist(), p[shown].tolist(), rest[shown].tolist(), strict=True))
        self.rounds.append(
            SeenRound(
                tokens=tokens,
                origins=record.origins[b],
                drafts=drafts,
                n_accepted=n_accepted,
                n_tested=record.n_tested[b],
                residual=residual,
                rejection=rejection,
                total_tokens=len(self.result.tokens[0]),
                total_passes=self.result.passes,
                path=path,
            )
        )

    def write(self, path: Path | str) -> None:
        """Writes the page, or leaves what was there. Raises InputError when the folder or disk does not take it."""
        atomic_write(Path(path), lambda temporary: temporary.write_text(self.html(), encoding="utf-8"))

    def html(self) -> str:
        """The whole page."""
        rounds = "\n".join(self._round(number, seen) for number, seen in enumerate(self.rounds, 1))
        legend = "".join(
            f'<li><span class="{name}">{name}</span> {meaning}</li>'
            for name, meaning in {"prompt": "what was given", **MEANING}.items()
        )
        body = [
            "<h1>PaSS, round by round</h1>",
            f'<p class="lead">{self._headline()}</p>',
            f'<h2>Text</h2><ul class="legend">{legend}</ul>',
            f'<pre class="text" dir="auto">{self._text()}</pre>',
            f"<h2>Tokens per pass</h2>{curve(self.rounds)}",
            f"<h2>Figures</h2>{self._figures()}",
            f'<h2>Rounds</h2>{EXPLANATION}<div id="rounds">{rounds}</div>',
        ]
        return f"{HEAD}<body><main>\n{chr(10).join(body)}\n</main>{SCRIPT}</body></html>\n"

    def _headline(self) -> str:
        n_tokens, passes = len(self.result.tokens[0]) if self.rounds else 0, self.result.passes
        return f"{n_tokens} tokens in {passes} passes: <b>{self.result.tokens_per_pass:.2f} tokens/pass</b>"

    def _text(self) -> str:
        """Prompt and new text, each character in the colour of the token that completes it."""
        emitted = [(number, *pair) for number, seen in enumerate(self.rounds, 1) for pair in zip(
            seen.tokens, seen.origins, strict=True)]  # fmt: skip
        pieces = [self.prompt, *(self.encoding.decode_single_token_bytes(token) for _, token, _ in emitted)]
        owner = [index for index, piece in enumerate(pieces) for _ in piece]  # of each byte
        shown, end = [""] * len(pieces), 0
        for char in b"".join(pieces).decode("utf-8", "surrogateescape"):
            end += len(char.encode("utf-8", "surrogateescape"))
            shown[owner[end - 1]] += char
        html, current = [f'<span class="prompt">{plain(shown[0])}</span>'], 0
        for (number, _, origin), chars in zip(emitted, shown[1:], strict=True):
            if number != current:
                html.append(("</span>" if current else "") + f'<span data-r="{number}">')
                current = number
            if chars:
                html.append(f'<span class="{origin}">{plain(chars)}</span>')
        return "".join(html) + ("</span>" if current else "")

    def _token(self, token: int) -> str:
        """A token by itself, for the tables: white space visible, bytes that are no character as escapes."""
        data = self.encoding.decode_single_token_bytes(token)
        return plain(data.decode("utf-8", "surrogateescape").translate(VISIBLE))

    def _code(self, token: int) -> str:
        return f"<code>{self._token(token)}</code>"

    def _figures(self) -> str:
        origins = [origin for seen in self.rounds for origin in seen.origins]
        facts: dict[str, object] = {**self.settings, "rounds": len(self.rounds), "passes": self.result.passes}
        if self.result.draft_passes:
            facts["passes of the draft model"] = self.result.draft_passes
        facts |= {f"{name} tokens": origins.count(name) for name in MEANING if name in origins}
        for position, (kept, made) in enumerate(zip(self.result.accepted, self.result.tested, strict=True), 1):
            facts[f"kept at draft {position}"] = f"{kept} of {made} ({kept / made:.2f})"
        rows = (f"<div><dt>{plain(name)}</dt><dd>{plain(str(fact))}</dd></div>" for name, fact in facts.items())
        return f"<dl>{''.join(rows)}</dl>"

    def _round(self, number: int, seen: SeenRound) -> str:
        emitted = list(zip(seen.tokens, seen.origins, strict=True))
        chips = "".join(f'<span class="chip {origin}">{self._token(token)}</span>' for token, origin in emitted)
        tested = "" if seen.path is not None else f" of {len(seen.drafts)}"
        note = f"{seen.n_accepted}{tested} kept" if seen.drafts else "no drafts"
        words = ", ".join(f"{self._code(token)} {origin}" for token, origin in emitted)
        body = f"<p>Emitted: {words}. So far {seen.tokens_per_pass:.2f} tokens/pass.</p>"
        if seen.path is not None:
            rows = [
                (
                    draft.place,
                    self._code(draft.token),
                    *map(number_of, (draft.p, draft.q)),
                    "kept" if draft.place in seen.path else "left",
                )
                for draft in seen.drafts
            ]
            body += table("Drafts on the way", ("#", "token", "p", "q", "outcome"), rows, len(rows))
        elif seen.drafts:
            rows = [
                (
                    draft.place,
                    self._code(draft.token),
                    *map(number_of, (draft.p, draft.q, draft.accept)),
                    outcome(i, seen),
                )
                for i, draft in enumerate(seen.drafts)
            ]
            n_used = min(seen.n_tested, seen.n_accepted + 1)
            body += table("Drafts", ("#", "token", "p", "q", "min(1, q/p)", "outcome"), rows, n_used)
        if seen.residual:
            rows = [
                (self._code(token), *map(number_of, numbers), "drawn" if token == seen.tokens[-1] else "")
                for token, *numbers in seen.residual
            ]
            caption = (
                f"Residual at draft {seen.n_accepted + 1}; the chance of a rejection here was {seen.rejection:.3f}"
            )
            body += table(caption, ("token", "q", "p", "residual", "outcome"), rows, len(rows))
        return (
            f'<details id="r{number}"><summary><b>{number}</b> {chips} <small>{note}</small></summary>{body}</details>'
        )


def seen_tree(record: Round, b: int) -> tuple[list[SeenDraft], list[str]]:
    """The drafts of a tree that were tested, those at the nodes of the kept path, and the places of those kept."""
    tree, tokens = record.tree, record.drafts[b].tolist()
    kept = record.kept[b].tolist()
    drafts, path = [], []
    for node in range(1, len(kept)):
        parent, depth = tree.parents[node - 1], tree.depth[node]
        if kept[parent]:
            token, place = tokens[node - 1], f"{depth}.{tree.rank[node - 1] + 1}"
            p = record.draft_probs[b, depth - 1, token].item()
            drafts.append(SeenDraft(place, token, p, record.target_probs[b, parent, token].item()))
            path += [place] * kept[node]
    return drafts, path


def plain(text: str) -> str:
    """Text as it may stand in the page: markup escaped; what cannot be seen or is no character as \\x1b or \\u202e."""
    return "".join(escape(char) if char.isprintable() or char in "\n\t\u200d" else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)  # surrogateescape puts a byte that is no UTF-8 at 0xDC00 + byte
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else char.encode("unicode_escape").decode()


def number_of(value: float) -> str:
    """A probability in few characters."""
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}" if value else "0"


def outcome(i: int, seen: SeenRound) -> str:
    """What became of draft i of a round, counted from 0."""
    if i < seen.n_accepted:
        return "kept"
    if i >= seen.n_tested:
        return "text ended"
    return "rejected" if i == seen.n_accepted else "not reached"


def table(caption: str, heads: tuple[str, ...], rows: list[tuple[str, ...]], n_used: int) -> str:
    """Rows of cells, those behind the first n_used greyed; columns of words stand left, numbers right."""
    head = "".join(
        f'<th scope="col"{" class=words" if name in ("token", "outcome") else ""}>{name}</th>' for name in heads
    )
    body = "".join(
        f"<tr{' class=unused' if i >= n_used else ''}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for i, cells in enumerate(rows)
    )
    return f"<table><caption>{caption}</caption><tr>{head}</tr>{body}</table>"


def curve(rounds: list[SeenRound]) -> str:
    """Tokens/pass after each round over the passes so far, as an inline picture with its meaning in words."""
    if not rounds:
        return "<p>No rounds.</p>"
    step = -(-len(rounds) // N_POINTS)
    points = [(seen.total_passes, seen.tokens_per_pass) for seen in [*rounds[:-1:step], rounds[-1]]]
    left, right, top, bottom = 24, 284, 8, 94  # of the plot, in a box of 320 x 112
    most = max(1.2, *(y for _, y in points), 0.0)
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * (x - first) / (last - first), bottom - (bottom - top) * y / most

    line = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
    end_x, end_y = at(*points[-1])
    grid = "".join(
        f'<line class="{"plain" if y == 1 else "grid"}" x1="{left}" x2="{right}" y1="{at(0, y)[1]:.1f}" '
        f'y2="{at(0, y)[1]:.1f}"/><text x="{left - 5}" y="{at(0, y)[1] + 3:.1f}" text-anchor="end">{y}</text>'
        for y in range(int(most) + 1)
    )
    words = (
        f"Tokens per pass over the whole text so far: {points[0][1]:.2f} after pass {points[0][0]}, "
        f"{points[-1][1]:.2f} after pass {points[-1][0]}; the highest {max(y for _, y in points):.2f}. "
        "Plain decoding has 1."
    )
    return (
        f'<figure><svg viewBox="0 0 320 112" role="img" aria-label="{words}">{grid}'
        f'<polyline points="{line}"/><circle cx="{end_x:.1f}" cy="{end_y:.1f}" r="2.5"/>'
        f'<text x="{end_x + 6:.1f}" y="{end_y + 3:.1f}">{points[-1][1]:.2f}</text>'
        f'<text x="{left}" y="108">pass {points[0][0]}</text>'
        f'<text x="{right}" y="108" text-anchor="end">pass {points[-1][0]}</text></svg>'
        f"<figcaption>{words}</figcaption></figure>"
    )


HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>PaSS, round by round</title>
<style>
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --soft: #5c5c5c; --line: #d4d4d4; --box: #f6f6f6;
  --accepted: #00654a; --bonus: #00558a; --corrected: #9c3d00; --tint: 12%; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e8e8e8; --soft: #a6a6a6; --line: #3c4046;
  --box: #1e2125; --accepted: #4fd0a5; --bonus: #7cc4f0; --corrected: #f0a35c; --tint: 16%; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 1.8rem 0 .5rem; } .lead { margin: .2rem 0 0; }
pre, code, .chip, .legend span { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre, code, .chip, dd { overflow-wrap: anywhere; white-space: break-spaces; unicode-bidi: isolate; }
.text { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: 0;
  font-size: .875rem; line-height: 1.9; tab-size: 4; }
.free, .accepted, .corrected, .bonus { text-decoration: underline 2px; text-underline-offset: .4em;
  text-decoration-skip-ink: none; border-radius: 2px; }
.prompt { color: var(--soft); }
.free { text-decoration: underline 2px dotted var(--soft); }
.accepted { color: var(--accepted); text-decoration-style: solid;
  background: color-mix(in srgb, var(--accepted) var(--tint), transparent); }
.bonus { color: var(--bonus); text-decoration-style: double; text-decoration-thickness: 1px;
  background: color-mix(in srgb, var(--bonus) var(--tint), transparent); }
.corrected { color: var(--corrected); text-decoration-style: wavy; text-decoration-thickness: 1px;
  background: color-mix(in srgb, var(--corrected) var(--tint), transparent); }
.legend { list-style: none; padding: 0; margin: 0 0 .6rem; font-size: .875rem; color: var(--soft);
  display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; }
figure { margin: 0; max-width: 30rem; } figcaption, small, caption { color: var(--soft); font-size: .875rem; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 9px; fill: var(--soft); }
polyline { fill: none; stroke: var(--bonus); stroke-width: 1.5; } circle { fill: var(--bonus); }
.grid { stroke: var(--line); stroke-width: .7; } .plain { stroke: var(--soft); stroke-dasharray: 4 3; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem 1rem; margin: 0; }
dt { color: var(--soft); font-size: .8125rem; } dd { margin: 0; font-variant-numeric: tabular-nums; }
details { border-top: 1px solid var(--line); } details:last-child { border-bottom: 1px solid var(--line); }
summary { padding: .3rem .2rem; cursor: pointer; line-height: 1.9; }
summary b { min-width: 2.4em; padding-right: .4em; }
summary:focus-visible { outline: 2px solid var(--bonus); outline-offset: -2px; } summary small { white-space: nowrap; }
.chip { font-size: .8125rem; padding: .05rem .2rem; margin-right: .3rem; }
details p { margin: .2rem 0 .5rem; } details > :not(summary) { margin-left: 1.1rem; font-size: .875rem; }
table { border-collapse: collapse; margin-bottom: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .2rem; } th { font-weight: 600; }
th, td { text-align: right; padding: .15rem .45rem; border-top: 1px solid var(--line); }
.words, td:has(code), td:last-child { text-align: left; }

.unused { color: var(--soft); }
button { font: inherit; font-size: .875rem; margin: 0 0 .6rem; }
@media (max-width: 30rem) { th, td { padding: .15rem .2rem; font-size: .8125rem; }
  details > :not(summary) { margin-left: 0; } }
</style></head>
"""

EXPLANATION = """<p>A round tests drafts: p is the probability with which a token was drafted, q what the target gives
it at that place, behind the drafts before it. A draft is kept with probability min(1, q/p). The first that is not kept
is replaced by a draw from the residual, max(0, q - p) made to sum to 1, and those behind it are dropped: their q says
what would follow the rejected draft. If all are kept, the last target gives a bonus token. In a tree several
drafts stand for one place, 1.1 and 1.2 and so on: if a draw from the target is one of them it is kept, and the drafts
behind it are tested (or they are tested one after the other, with what the ones before left of the target). Select a
round to open it.</p>"""

# The page says everything without it: a click on the text opens that round, a button opens or closes all.
SCRIPT = """<script>
const all = document.querySelectorAll("details"), button = document.createElement("button");
button.textContent = "Open or close all";
button.onclick = () => { const open = !all[0].open; all.forEach(d => { d.open = open; }); };
document.getElementById("rounds").before(button);
document.querySelector(".text").onclick = event => {
  const part = event.target.closest("[data-r]"), round = part && document.getElementById("r" + part.dataset.r);
  if (round && getSelection().isCollapsed) { round.open = true; round.firstElementChild.focus(); }
};
</script>"""
