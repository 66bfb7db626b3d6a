"""A generation as a web page: the text coloured by where each token came from, and every turn to open.

The page (its frame is in trace_page.py) is one file that needs nothing else: it opens from disk, and its policy line
forbids the browser to fetch anything. A Trace takes one turn after the other, and keeps only the numbers that the page
shows, not the distributions.
"""

from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import tiktoken
import torch

from minipass.extras.trace_page import (
    COUPLED_EXPLANATION,
    COUPLED_TEST,
    EXPLANATION,
    PAGE,
    REJECTION_EXPLANATION,
    REJECTION_TEST,
    TREE_EXPLANATION,
    TREE_REJECTION_EXPLANATION,
    TREE_REJECTION_TEST,
)
from minipass.files import atomic_write
from minipass.sampling import Distribution, reject
from minipass.texts import ACCEPTED, BONUS, CORRECTED, SAMPLED, Generation, Turn
from minipass.trees import Shape

N_LIKELIEST = 5  # tokens of a distribution that are shown, besides the one drawn
N_POINTS = 240  # of the curve, at most: more than a screen shows
VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
MEANING = {
    SAMPLED: "drawn from the target, no draft tested",
    ACCEPTED: "a draft that was accepted",
    CORRECTED: "drawn after a draft was rejected",
    BONUS: "drawn from the target after all drafts were accepted",
}
REJECTED = "rejected"
NOT_REACHED, TEXT_ENDED = UNTESTED = "not reached", "text ended"
WORDS = ("token", "target drew", "outcome")  # columns of a table


@dataclass(frozen=True)
class SeenDraft:
    """One draft and its test: its token, its probability q under the target distribution, and the outcome.

    place: its number in the chain; in a tree its depth and its rank among the siblings.
    p: under the rejection rule, its probability in the draft distribution; in a tree p and q are what the tests of its
    siblings left of them. drawn: under the coupled rule, the token that the target drew there; None where the text did
    not get that far.
    """

    place: str
    token: int
    q: float
    outcome: str
    p: float | None = None
    drawn: int | None = None

    @property
    def accept(self) -> float:
        """Under the rejection rule, the probability that it is accepted, min(1, q / p); 0 where p is 0."""
        return min(1.0, self.q / self.p) if self.p else 0.0


@dataclass(frozen=True)
class SeenTurn:
    """What the page needs of one turn.

    source: the likeliest tokens of the distribution that the last token was drawn from, and that token: (token, q), or
    for a residual (token, q, p, residual). rejection: for a residual the sum of max(0, q - p), the probability that a
    draft drawn from p is rejected.
    """

    tokens: list[int]
    origins: list[str]
    shape: Shape
    n_draft_passes: int
    drafts: list[SeenDraft]
    n_accepted: int
    source: list[tuple]
    rejection: float | None
    total_tokens: int
    total_passes: int

    @property
    def by_rejection(self) -> bool:
        """Whether drafts were tested by the rejection rule."""
        return any(draft.p is not None for draft in self.drafts)

    @property
    def tokens_per_pass(self) -> float:
        return self.total_tokens / max(self.total_passes, 1)


class Trace:
    """Collects the turns of one prompt of a generation, then writes them as a page."""

    def __init__(self, encoding: tiktoken.Encoding, prompt: bytes, settings: dict[str, object], index: int = 0):
        """prompt: bytes, which need not be UTF-8; settings: named facts to show; index: which prompt of a batch."""
        self.encoding, self.prompt, self.settings, self.index = encoding, prompt, settings, index
        self.result = Generation()
        self.turns: list[SeenTurn] = []

    def add(self, turn: Turn) -> None:
        """Adds one turn; its tensors are not kept."""
        b = self.index
        if not turn.active[b]:
            return
        names = ("tokens", "origins", "n_tested", "n_accepted", "active")
        self.result.add(replace(turn, **{name: [getattr(turn, name)[b]] for name in names}))
        drafts, source, rejection = look_into(turn, b)
        self.turns.append(
            SeenTurn(
                tokens=turn.tokens[b],
                origins=turn.origins[b],
                shape=turn.shape,
                n_draft_passes=turn.draft_passes,
                drafts=drafts,
                n_accepted=turn.n_accepted[b],
                source=source,
                rejection=rejection,
                total_tokens=len(self.result.tokens[0]),
                total_passes=self.result.passes,
            )
        )

    def write(self, path: Path | str) -> None:
        """Writes the page. Raises InputError when it cannot be written; an older file then stays as it was."""
        atomic_write(Path(path), lambda temporary: temporary.write_text(self.html(), encoding="utf-8"))

    def html(self) -> str:
        """The whole page."""
        turns = "\n".join(self._turn(number, seen) for number, seen in enumerate(self.turns, 1))
        legend = "".join(
            f'<li><span class="{name}">{name}</span> {meaning}</li>'
            for name, meaning in {"prompt": "what was given", **MEANING}.items()
        )
        return PAGE.substitute(
            headline=self._headline(),
            legend=legend,
            text=self._text(),
            curve=curve(self.turns),
            figures=self._figures(),
            explanation=self._explanation(),
            turns=turns,
        )

    def _headline(self) -> str:
        n_tokens, passes = len(self.result.tokens[0]) if self.turns else 0, self.result.passes
        return f"{n_tokens} tokens in {passes} passes: <b>{self.result.tokens_per_pass:.2f} tokens/pass</b>"

    def _text(self) -> str:
        """Prompt and new text, coloured."""
        emitted = [(number, *pair) for number, seen in enumerate(self.turns, 1) for pair in zip(
            seen.tokens, seen.origins, strict=True)]  # fmt: skip
        shown = characters([self.prompt, *(self.encoding.decode_single_token_bytes(token) for _, token, _ in emitted)])
        html, current = [f'<span class="prompt">{plain(shown[0])}</span>'], 0
        for (number, _, origin), chars in zip(emitted, shown[1:], strict=True):
            if number != current:
                html.append(("</span>" if current else "") + f'<span data-t="{number}">')
                current = number
            if chars:
                html.append(f'<span class="{origin}">{plain(chars)}</span>')
        return "".join(html) + ("</span>" if current else "")

    def _token(self, token: int) -> str:
        """A token for the tables: white space made visible, bytes that are no character as escapes."""
        data = self.encoding.decode_single_token_bytes(token)
        return plain(data.decode("utf-8", "surrogateescape").translate(VISIBLE))

    def _code(self, token: int) -> str:
        return f"<code>{self._token(token)}</code>"

    def _figures(self) -> str:
        origins = [origin for seen in self.turns for origin in seen.origins]
        facts: dict[str, object] = {**self.settings, "passes": self.result.passes}
        if self.result.draft_passes:
            facts["passes of the draft model"] = self.result.draft_passes
        facts |= {f"{name} tokens": origins.count(name) for name in MEANING if name in origins}
        for position, (accepted, made) in enumerate(zip(self.result.accepted, self.result.tested, strict=True), 1):
            facts[f"accepted at draft {position}"] = f"{accepted} of {made} ({accepted / made:.2f})"
        rows = (f"<div><dt>{plain(name)}</dt><dd>{plain(str(fact))}</dd></div>" for name, fact in facts.items())
        return "".join(rows)

    def _explanation(self) -> str:
        """How to read the turns: the rules and trees that were used."""
        drafted = [seen for seen in self.turns if seen.drafts]
        in_tree = [seen for seen in drafted if seen.shape.tree.width > 1]
        parts = {
            EXPLANATION: True,
            COUPLED_EXPLANATION: any(not seen.by_rejection for seen in drafted),
            REJECTION_EXPLANATION: any(seen.by_rejection for seen in drafted),
            TREE_EXPLANATION: in_tree,
            TREE_REJECTION_EXPLANATION: any(seen.by_rejection for seen in in_tree),
            "Select a turn to open it.": True,
        }
        return "".join(f"<p>{part}</p>" for part, used in parts.items() if used)

    def _turn(self, number: int, seen: SeenTurn) -> str:
        emitted = list(zip(seen.tokens, seen.origins, strict=True))
        chips = "".join(f'<span class="chip {origin}">{self._token(token)}</span>' for token, origin in emitted)
        tree, (kind, rows) = seen.shape.tree, pass_words(seen)
        note = f"{seen.n_accepted} of {tree.depth[-1]} accepted" if seen.drafts else kind
        words = ", ".join(f"{self._code(token)} {origin}" for token, origin in emitted)
        body = f"<p>{rows} Emitted: {words}. So far {seen.tokens_per_pass:.2f} tokens/pass.</p>"
        if seen.drafts:
            heads = ("p", "q", "min(1, q/p)") if seen.by_rejection else ("q", "target drew")
            cells = [(draft.place, self._code(draft.token), *self._test(draft), draft.outcome) for draft in seen.drafts]
            which = "Drafts on the way" if tree.width > 1 else "Drafts"
            rejection = TREE_REJECTION_TEST if tree.width > 1 else REJECTION_TEST
            which += f", each accepted {rejection if seen.by_rejection else COUPLED_TEST}"
            body += table(which, ("#", "token", *heads, "outcome"), cells)
        if seen.source:
            caption, heads = f"The target after {f'draft {seen.n_accepted}' if seen.n_accepted else 'the root'}", ("q",)
            if seen.rejection is not None:
                caption, heads = caption.replace("The target", "Residual"), ("q", "p", "residual")
                which = "the last draft" if tree.width > 1 else "a draft"
                caption += f"; {which} here is rejected with probability {seen.rejection:.3f}"
            became = {draft.token: "draft" for draft in seen.drafts if draft.outcome == REJECTED}
            became[seen.tokens[-1]] = "drawn"
            cells = [
                (self._code(token), *map(number_of, numbers), became.get(token, "")) for token, *numbers in seen.source
            ]
            body += table(caption, ("token", *heads, "outcome"), cells)
        return (
            f'<details id="t{number}"><summary><b>{number}</b> {chips} <small>{note}</small></summary>{body}</details>'
        )

    def _test(self, draft: SeenDraft) -> tuple[str, ...]:
        """The cells that say how a draft was tested."""
        if draft.p is not None:
            return tuple(map(number_of, (draft.p, draft.q, draft.accept)))
        return number_of(draft.q), "" if draft.drawn is None else self._code(draft.drawn)


def look_into(turn: Turn, b: int) -> tuple[list[SeenDraft], list[tuple], float | None]:
    """A turn's drafts for text b, and where its last token came from: SeenTurn's drafts, source and rejection.

    Of a chain it gives all drafts, of a tree those that were tested.
    """
    tree, row, result, way = turn.shape.tree, turn.rows[b], turn.result, [turn.last[b]]
    while way[0]:
        way.insert(0, tree.parents[way[0] - 1])
    place = {node: i for i, node in enumerate(result.kept[row if tree.keep else 0].tolist())}  # in these tensors
    tokens, next_token = result.drafts.tokens[row].tolist(), result.handed.root[row].item()
    followed_by = [*(tokens[place[node] - 1] for node in way[1:]), next_token]  # of each accepted node
    drafts, source, rejection = [], [], None
    for node in way if tree.width > 1 else range(len(tree.depth)):
        depth, q = tree.depth[node], Distribution(*(each[row, place[node]].cpu() for each in result.q))
        p = None if result.drafts.p is None else result.drafts.p[row, node].cpu()
        q_left, p_left, chance = q.probs, p, None
        for child in (i for i, parent in enumerate(tree.parents, 1) if parent == node and i in place):
            token = tokens[place[child] - 1]
            outcome = ACCEPTED if child in way else REJECTED if node in way else NOT_REACHED
            draft = SeenDraft(
                place=f"{depth + 1}.{tree.rank[child - 1] + 1}" if tree.width > 1 else str(depth + 1),
                token=token,
                q=q_left[q.tokens == token].sum().item(),
                outcome=outcome if depth < turn.n_tested[b] else TEXT_ENDED,
            )
            if p is None:
                drafts.append(replace(draft, drawn=followed_by[depth] if node in way else None))
                continue
            p_left = p_left / p_left.sum().clamp(min=1e-300)
            drafts.append(replace(draft, p=p_left[token].item()))
            if child in way or node not in way:
                break  # no test after this one
            if p_left[token] > 0:
                chance = (q_left - p_left[q.tokens]).clamp(min=0).sum().item()
            q_left, p_left = rejected(token, Distribution(q.tokens, q_left), p_left)
        if node == turn.last[b] and turn.origins[b][-1] != ACCEPTED:
            rejection = chance
            shown = [i for i in q_left.topk(min(N_LIKELIEST, len(q_left))).indices.tolist() if q_left[i] > 0]
            drawn = q.tokens.tolist().index(next_token)
            for i in shown if drawn in shown else [*shown, drawn]:
                residual = () if chance is None else (p[q.tokens[i]].item(), q_left[i].item())
                source.append((q.tokens[i].item(), q.probs[i].item(), *residual))
    return drafts, source, rejection


def rejected(token: int, q: Distribution, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the rejection of a draft leaves of q's probabilities (K,) and of p (V,)."""
    q = Distribution(*(each[None, None] for each in q))
    _, residual, p = reject(torch.tensor([[token]]), p[None, None], q, torch.ones(1, 1))
    return residual[0, 0], p[0, 0]


def pass_words(seen: SeenTurn) -> tuple[str, str]:
    """The kind of a turn's pass, and a sentence about its rows."""
    n_drafts = seen.shape.tree.n_verified
    n_lookahead = seen.shape.n_rows - 1 - n_drafts
    kind = "fused" if n_drafts and n_lookahead else "verify" if n_drafts else "draft" if n_lookahead else "plain"
    others = [plural(n, name) for n, name in ((n_drafts, "draft"), (n_lookahead, "look-ahead row")) if n]
    first = f", after {plural(seen.n_draft_passes, 'pass', 'es')} of the draft model" if seen.n_draft_passes else ""
    return f"{kind} pass", f"A {kind} pass over {' + '.join(['the root', *others])}{first}."


def plural(n: int, name: str, ending: str = "s") -> str:
    return f"{n} {name}{ending if n != 1 else ''}"


def characters(pieces: list[bytes]) -> list[str]:
    """The text of each piece of a byte string; a character that is spread over several pieces belongs to the last."""
    owner = [index for index, piece in enumerate(pieces) for _ in piece]  # of each byte
    texts, end = [""] * len(pieces), 0
    for char in b"".join(pieces).decode("utf-8", "surrogateescape"):
        end += len(char.encode("utf-8", "surrogateescape"))
        texts[owner[end - 1]] += char
    return texts


def plain(text: str) -> str:
    """Text that is safe in the page: markup escaped, and what is invisible or no character as \\x1b or \\u202e."""
    return "".join(escape(char) if char.isprintable() or char in "\n\t\u200d" else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)  # surrogateescape puts a byte that is no UTF-8 at 0xDC00 + byte
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else char.encode("unicode_escape").decode()


def number_of(value: float) -> str:
    """A probability in few characters."""
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}" if value else "0"


def table(caption: str, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of rows of cells, grey where the last cell, the outcome, says "no test"; words left, numbers right."""
    head = "".join(f'<th scope="col"{" class=words" if name in WORDS else ""}>{name}</th>' for name in heads)
    body = "".join(
        f"<tr{' class=unused' if cells[-1] in UNTESTED else ''}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for cells in rows
    )
    return f"<table><caption>{caption}</caption><tr>{head}</tr>{body}</table>"


def curve(turns: list[SeenTurn]) -> str:
    """Tokens/pass over the whole text after each turn, as an inline picture with a description in words."""
    if not turns:
        return "<p>No turns.</p>"
    step = -(-len(turns) // N_POINTS)
    points = [(seen.total_passes, seen.tokens_per_pass) for seen in [*turns[:-1:step], turns[-1]]]
    left, right, top, bottom = 24, 284, 8, 94  # of the plot, in a box of 320 x 112
    most = max(1.2, *(y for _, y in points))
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
