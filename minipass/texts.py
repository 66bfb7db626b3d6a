"""The host's side of decoding: the texts, how many tokens each may still get, and a record of every turn.

Nothing here computes on the device: the results of a turn come as lists of numbers. A text that outgrows the context
window continues from its last half window, with plain decoding as with every other method.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minipass.errors import InputError, whole
from minipass.model import GPTConfig
from minipass.trees import Shape

SAMPLED, ACCEPTED, CORRECTED, BONUS = "sampled", "accepted", "corrected", "bonus"
NOT_FINITE = -1  # instead of a token
Prompts = Sequence[int] | Sequence[Sequence[int]]
StopTokens = int | Collection[int] | None
Seeds = int | Sequence[int]


@dataclass(frozen=True)
class Turn:
    """What one turn did, for each of the B texts.

    tokens: the emitted tokens. origins: for each of them ACCEPTED (a draft), CORRECTED (drawn after a draft was
    rejected), BONUS (drawn after all drafts on the path were accepted) or SAMPLED (drawn when no draft was tested).
    n_tested, n_accepted: how many drafts in a row could have been emitted, and how many were, up to the text's end.
    active: whether the text had not ended when the turn began. shape: what the pass verified and drafted.
    draft_passes: of a draft model, before the one pass of the target model.
    last: the last accepted node of the draft tree; 0 is the root.
    result: decode.Result, the turn's tensors (drafts, p, q, ...). rows: each text's row in these tensors, None for a
    text that has left the batch.
    """

    tokens: list[list[int]]
    origins: list[list[str]]
    n_tested: list[int]
    n_accepted: list[int]
    active: list[bool]
    shape: Shape
    draft_passes: int
    last: list[int]
    result: Any = None
    rows: list[int | None] = field(default_factory=list)


@dataclass
class Generation:
    """The sum of all turns of one call. tokens: each prompt's new tokens, with the stop token if one ended the text."""

    tokens: list[list[int]] = field(default_factory=list)
    passes: int = 0
    draft_passes: int = 0
    prompt_passes: int = 0  # passes summed over the prompts that they continued
    tested: list[int] = field(default_factory=list)  # by draft position
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_per_pass(self) -> float:
        """Emitted tokens per pass of the target model: 1.0 for plain decoding. Prefill does not count as a pass."""
        return sum(map(len, self.tokens)) / max(self.prompt_passes, 1)

    @property
    def acceptance(self) -> list[float]:
        """By draft position, how often all drafts up to it were accepted: its share of the turns that had a draft there
        and room for it in the text. (`acceptance[i] / acceptance[i - 1]` is the share where all before it were.)"""
        return [accepted / tested for accepted, tested in zip(self.accepted, self.tested, strict=True)]

    def add(self, turn: Turn) -> None:
        """Adds one more turn."""
        self.tokens = self.tokens or [[] for _ in turn.tokens]
        for tokens, new in zip(self.tokens, turn.tokens, strict=True):
            tokens += new
        self.passes += 1
        self.draft_passes += turn.draft_passes
        self.prompt_passes += sum(turn.active)
        longest = max([len(self.tested), *turn.n_tested])
        for counts, numbers in ((self.tested, turn.n_tested), (self.accepted, turn.n_accepted)):
            counts += [0] * (longest - len(counts))
            counts[:] = [count + sum(number > i for number in numbers) for i, count in enumerate(counts)]


def not_finite() -> InputError:
    """A model that computes such numbers writes no text."""
    return InputError("the model computes numbers that are not finite: take another dtype, as float32 or bfloat16")


class Texts:
    """The texts of one call: their tokens, their contexts in the window, and how many tokens each may still get."""

    def __init__(
        self, prompts: Prompts, max_new_tokens: int, stop_token: StopTokens, seed: Seeds, config: GPTConfig
    ) -> None:
        """The arguments are those of Engine.stream. Raises InputError for what is out of bounds."""
        given = prompts.tolist() if hasattr(prompts, "tolist") else prompts  # of a tensor or an array
        if isinstance(given, str | bytes) or not isinstance(given, Iterable):
            raise InputError(f"a prompt must be a sequence of token ids, not {given!r}")
        given = list(given)
        several = [list(prompt) for prompt in given if isinstance(prompt, Iterable) and getattr(prompt, "ndim", 1)]
        prompts = several if len(several) == len(given) > 0 else [given]
        self.texts = [[whole(token, "a token", 0, config.vocab_size - 1) for token in prompt] for prompt in prompts]
        for prompt in prompts:
            whole(len(prompt), "the number of a prompt's tokens", 1, config.block_size)
        whole(max_new_tokens, "max_new_tokens", 1)
        is_collection = isinstance(stop_token, Collection) and getattr(stop_token, "ndim", 1)
        stop_tokens = [] if stop_token is None else stop_token if is_collection else [stop_token]
        self.stop_tokens = frozenset(whole(token, "a stop token", 0, config.vocab_size - 1) for token in stop_tokens)
        first = None if isinstance(seed, Sequence) else whole(seed, "a seed", 0, 2**63 - 1)
        seeds = seed if first is None else [first + b for b in range(len(prompts))]
        self.seeds, self.block_size = [whole(each, "a seed", 0, 2**63 - 1) for each in seeds], config.block_size
        if len(self.seeds) != len(prompts):
            raise InputError(f"{len(self.seeds)} seeds were given for {len(prompts)} prompts")
        self.wanted = [max_new_tokens] * len(prompts)
        self.start = [0] * len(prompts)  # where in the text its context begins
        self.rows: list[int] = []  # the text of each row of the batch on the device
        self.turn: Turn | None = None  # the last one

    def begin_window(self, with_ended: bool) -> tuple[list[list[int]], list[int], list[int]]:
        """Shortens contexts that have outgrown the window. Returns, for the texts that continue (with_ended: for all),
        the contexts, the places in the text where they begin, and the seeds."""
        for b, text in enumerate(self.texts):
            if len(text) - self.start[b] > self.block_size:
                self.start[b] = len(text) - max(1, self.block_size // 2)
        self.rows = [b for b, wanted in enumerate(self.wanted) if wanted or with_ended]
        contexts = [self.texts[b][self.start[b] :] for b in self.rows]
        return contexts, [self.start[b] for b in self.rows], [self.seeds[b] for b in self.rows]

    def left(self, b: int) -> int:
        """Tokens that text b may still get in this window: its last position predicts one more."""
        return min(self.wanted[b], self.block_size + 1 - (len(self.texts[b]) - self.start[b]))

    @property
    def room(self) -> int:
        """The most that any text of the batch may still get in this window; 0 when the window is done."""
        return max(map(self.left, self.rows))

    def active_rows(self) -> list[int]:
        """The rows of the batch whose texts continue in this window."""
        return [row for row, b in enumerate(self.rows) if self.left(b) > 0]

    def emit(self, shape: Shape, made: list[list[int]], result: Any = None, n_models: int = 1) -> Turn:
        """Ends a turn: appends its tokens to the texts, cut at stop tokens and limits, and returns its record.

        made: for each row of the batch [drafts accepted, last accepted node, next token, accepted drafts, ...].
        Raises InputError where the next token is NOT_FINITE.
        """
        n_texts, tree = len(self.texts), shape.tree
        turn = Turn(
            tokens=[[] for _ in range(n_texts)], origins=[[] for _ in range(n_texts)], active=[False] * n_texts,
            n_tested=[0] * n_texts, n_accepted=[0] * n_texts, last=[0] * n_texts, rows=[None] * n_texts,
            shape=shape, draft_passes=tree.depth[-1] * (n_models - 1), result=result,
        )  # fmt: skip
        kept = result.kept.tolist() if tree.keep else ()
        for row, (b, (n_accepted, last, next_token, *drafts)) in enumerate(zip(self.rows, made, strict=True)):
            left = self.left(b)
            if left > 0 and next_token == NOT_FINITE:
                raise not_finite()
            tokens = [*drafts[:n_accepted], next_token][:left]
            end = next((i for i, token in enumerate(tokens, 1) if token in self.stop_tokens), len(tokens))
            verified = kept[row] if tree.keep else range(len(tree.depth))
            n_drafts, tested = tree.depth[verified[-1]], [tree.parents[node - 1] for node in verified[1:]]
            drawn = SAMPLED if n_drafts == 0 else CORRECTED if last in tested else BONUS
            turn.tokens[b], turn.origins[b] = tokens[:end], ([ACCEPTED] * n_accepted + [drawn])[:end]
            turn.n_accepted[b] = min(n_accepted, end)
            turn.n_tested[b] = min(n_drafts, left) if end > n_accepted else turn.n_accepted[b]
            turn.active[b], turn.last[b], turn.rows[b] = left > 0, last, row
            self.texts[b] += tokens[:end]
            self.wanted[b] = 0 if end and tokens[end - 1] in self.stop_tokens else self.wanted[b] - end
        self.turn = turn
        return turn
