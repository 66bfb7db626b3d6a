"""The host's side of decoding: the texts, how much each may still have, and a record of every turn.

Nothing here knows the device: a turn's results come as lists of numbers. A text whose context has outgrown the window
continues from the context's last half window; that is part of what plain decoding computes, for all methods alike.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain as joined
from typing import Any

from minipass.errors import InputError
from minipass.model import GPTConfig
from minipass.trees import Shape

SAMPLED, ACCEPTED, CORRECTED, BONUS = "sampled", "accepted", "corrected", "bonus"
TARGET_MODEL, DRAFTER = 0, 1  # the models of a pass
Prompts = Sequence[int] | Sequence[Sequence[int]]
StopTokens = int | Collection[int] | None
Seeds = int | Sequence[int]


@dataclass(frozen=True)
class Turn:
    """What one turn did, for each of the B texts.

    tokens: the emitted tokens. origins: of each of them: ACCEPTED (a draft), CORRECTED (drawn after a draft was
    rejected), BONUS (drawn after all drafts on the way were accepted) or SAMPLED (no draft was tested).
    n_tested, n_accepted: drafts in a row that could have been emitted, and those that were (up to the text's end).
    active: whether the text was still being continued when the turn began. shape: what the pass verified and drafted.
    passes: (model, rows) of each forward pass, where the model is TARGET_MODEL or DRAFTER.
    last: the node of the draft tree that was accepted last, 0 is the root.
    result: decode.Result, the turn's tensors (drafts, p, q, ...), and rows: for each text its row in them, None where
    the text is not among them.
    """

    tokens: list[list[int]]
    origins: list[list[str]]
    n_tested: list[int]
    n_accepted: list[int]
    active: list[bool]
    shape: Shape
    passes: list[tuple[int, int]]
    last: list[int]
    result: Any = None
    rows: list[int | None] = field(default_factory=list)


@dataclass
class Generation:
    """All turns of one call. tokens: for each prompt its new tokens, with the stop token if one ended it."""

    tokens: list[list[int]] = field(default_factory=list)
    passes: int = 0
    draft_passes: int = 0
    prompt_passes: int = 0  # passes summed over the prompts that they continued
    tested: list[int] = field(default_factory=list)  # by draft position
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_per_pass(self) -> float:
        """Emitted tokens for each pass of the target model: 1.0 for plain decoding. Prefill emits none, and is none."""
        return sum(map(len, self.tokens)) / max(self.prompt_passes, 1)

    @property
    def acceptance(self) -> list[float]:
        """By draft position, the share of the drafts made there that were accepted."""
        return [accepted / tested for accepted, tested in zip(self.accepted, self.tested, strict=True)]

    def add(self, turn: Turn) -> None:
        """Counts one more turn in."""
        self.tokens = self.tokens or [[] for _ in turn.tokens]
        for tokens, new in zip(self.tokens, turn.tokens, strict=True):
            tokens += new
        models = [model for model, _ in turn.passes]
        self.passes += models.count(TARGET_MODEL)
        self.draft_passes += models.count(DRAFTER)
        self.prompt_passes += models.count(TARGET_MODEL) * sum(turn.active)
        longest = max([len(self.tested), *turn.n_tested])
        for counts, numbers in ((self.tested, turn.n_tested), (self.accepted, turn.n_accepted)):
            counts += [0] * (longest - len(counts))
            counts[:] = [count + sum(number > i for number in numbers) for i, count in enumerate(counts)]


class Texts:
    """The texts of one call: what each has so far, its context in the window, and how many tokens it may still have."""

    def __init__(
        self, prompts: Prompts, max_new_tokens: int, stop_token: StopTokens, seed: Seeds, config: GPTConfig
    ) -> None:
        """The arguments are those of Engine.stream. Raises InputError for what is out of bounds."""
        prompts = list(prompts)
        if not prompts or not hasattr(prompts[0], "__len__") or getattr(prompts[0], "ndim", 1) == 0:
            prompts = [prompts]  # one prompt: a list of numbers, or a tensor's or array's elements
        for prompt in prompts:
            if not 1 <= len(prompt) <= config.block_size:
                raise InputError(f"a prompt must have 1..{config.block_size} tokens, the window, not {len(prompt)}")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be a whole number of at least 1, not {max_new_tokens!r}")
        stop_tokens = [] if stop_token is None else [stop_token] if isinstance(stop_token, int) else stop_token
        for token in joined(stop_tokens, *prompts):
            if int(token) != token or not 0 <= token < config.vocab_size:
                raise InputError(f"tokens must be whole numbers in 0..{config.vocab_size - 1}, not {token}")
        seeds = [seed + b for b in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts) or any(type(seed) is not int or not 0 <= seed < 2**63 for seed in seeds):
            raise InputError(f"give one whole seed, or one for each of {len(prompts)} prompts, in 0..2**63 - 1")
        self.texts = [[int(token) for token in prompt] for prompt in prompts]
        self.stop_tokens, self.seeds, self.block_size = frozenset(map(int, stop_tokens)), seeds, config.block_size
        self.wanted, self.start = (
            [max_new_tokens] * len(prompts),
            [0] * len(prompts),
        )  # start: of the context in the text
        self.rows: list[int] = []  # the text of each row of the batch on the device
        self.turn: Turn | None = None  # the last one

    def begin_window(self, with_ended: bool) -> tuple[list[list[int]], list[int], list[int]]:
        """Moves contexts that have outgrown the window. Returns, of the texts that continue (or of all), the contexts,
        where in the text they begin, and the seeds."""
        for b, text in enumerate(self.texts):
            if len(text) - self.start[b] > self.block_size:
                self.start[b] = len(text) - self.block_size // 2
        self.rows = [b for b, wanted in enumerate(self.wanted) if wanted or with_ended]
        contexts = [self.texts[b][self.start[b] :] for b in self.rows]
        return contexts, [self.start[b] for b in self.rows], [self.seeds[b] for b in self.rows]

    def left(self, b: int) -> int:
        """Tokens that text b may still have in this window: its last place predicts one more."""
        return min(self.wanted[b], self.block_size + 1 - (len(self.texts[b]) - self.start[b]))

    @property
    def room(self) -> int:
        """The most that any text of the batch may still have in this window; 0: the window is done."""
        return max(map(self.left, self.rows))

    def active_rows(self) -> list[int]:
        """The rows of the batch whose texts continue in this window."""
        return [row for row, b in enumerate(self.rows) if self.left(b) > 0]

    def emit(self, shape: Shape, made: list[list[int]], result: Any = None, n_models: int = 1) -> Turn:
        """Ends a turn: appends what it made to the texts, cut at stop tokens and limits.

        made: for each row of the batch [drafts accepted, last accepted node, next token, accepted drafts, ...].
        """
        n_texts, n_drafts = len(self.texts), shape.tree.depth[-1]
        drafting = [(DRAFTER, 2 if i == 0 else 1) for i in range(n_drafts * (n_models - 1))]
        turn = Turn(
            tokens=[[] for _ in range(n_texts)], origins=[[] for _ in range(n_texts)], active=[False] * n_texts,
            n_tested=[0] * n_texts, n_accepted=[0] * n_texts, last=[0] * n_texts, rows=[None] * n_texts,
            shape=shape, passes=[*drafting, (TARGET_MODEL, shape.n_rows)], result=result,
        )  # fmt: skip
        for row, (b, (n_accepted, last, next_token, *drafts)) in enumerate(zip(self.rows, made, strict=True)):
            left = self.left(b)
            tokens = [*drafts[:n_accepted], next_token][:left]
            end = next((i for i, token in enumerate(tokens, 1) if token in self.stop_tokens), len(tokens))
            drawn = SAMPLED if n_drafts == 0 else BONUS if last not in shape.tree.parents else CORRECTED
            turn.tokens[b], turn.origins[b] = tokens[:end], ([ACCEPTED] * n_accepted + [drawn])[:end]
            turn.n_accepted[b] = min(n_accepted, end)
            turn.n_tested[b] = 0 if not left else n_drafts if end > n_accepted else turn.n_accepted[b]
            turn.active[b], turn.last[b], turn.rows[b] = left > 0, last, row
            self.texts[b] += tokens[:end]
            self.wanted[b] = 0 if end and tokens[end - 1] in self.stop_tokens else self.wanted[b] - end
        self.turn = turn
        return turn
