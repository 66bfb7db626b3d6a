"""What the bench measures: checkpoints, held-out text, and the methods that compete on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from minipass import losses, weights
from minipass.data import Document, encode_documents, even_windows, read_documents, split_documents
from minipass.extras.benchmark.measuring import Contender, ours
from minipass.generate import DEFAULT_PROMPT_LOOKUP
from minipass.model import GPT
from minipass.shapes import MOST_AUTO_LOOKAHEAD, AdaptiveTree, best_tree, round_seconds

GREEDY, SAMPLED, PLAIN_SAMPLED = "greedy", "T = 0.8, top-k 10", "T = 1"
DECODINGS: dict[str, dict] = {
    GREEDY: {"temperature": 0.0},
    SAMPLED: {"temperature": 0.8, "top_k": 10},
    PLAIN_SAMPLED: {"temperature": 1.0},
}
TREE, TWO_MODELS = "tree of 4 L", "two models"
COPYING, LOOKUP = "fused + prompt lookup", "prompt lookup alone"


@dataclass(frozen=True, eq=False)
class Subject:
    """A checkpoint that is measured, under the name that the user gave."""

    name: str
    loaded: weights.Checkpoint

    @property
    def model(self) -> GPT:
        return self.loaded.model

    @property
    def millions(self) -> str:
        """Its size in words."""
        return f"{sum(parameter.numel() for parameter in self.model.parameters()) / 1e6:.2g}M parameters"


@dataclass
class Bench:
    """What the experiments share: checkpoints, held-out text and counts.

    frozen, draft: None where there is none; compared: more checkpoints, and where the log of each one's training lies.
    captures: stream's, for all methods alike; None: eagerly.
    """

    subject: Subject
    frozen: Subject | None
    draft: Subject | None
    compared: list[tuple[Subject, Path]]
    device: torch.device
    dtype: torch.dtype
    data: str
    lookahead: list[int]
    n_prompts: int
    prompt_tokens: int
    new_tokens: int
    n_samples: int
    seed: int
    captures: dict | None = None
    _heldout: dict[str, list[Document]] = field(default_factory=dict)
    _tokens: dict[tuple[Subject, str], np.ndarray] = field(default_factory=dict)
    _forced: dict[tuple[Subject, str], dict] = field(default_factory=dict)

    def heldout(self, domain: str) -> list[Document]:
        """The held-out documents of a corpus."""
        if domain not in self._heldout:
            self._heldout[domain] = split_documents(read_documents(domain))[1]
        return self._heldout[domain]

    def tokens(self, subject: Subject, domain: str) -> np.ndarray:
        """These in the subject's tokens, (N,)."""
        key = (subject, domain)
        if key not in self._tokens:
            self._tokens[key] = encode_documents(self.heldout(domain), subject.loaded.encoding)
        return self._tokens[key]

    def prompts(self, subject: Subject, domain: str) -> list[list[int]]:
        """Evenly spaced windows of held-out text."""
        return even_windows(self.tokens(subject, domain), self.n_prompts, self.prompt_tokens).tolist()

    def forced(self, subject: Subject, domain: str) -> dict:
        """Teacher-forced figures on held-out text, see losses.evaluate: loops of a generated text don't touch them."""
        key = (subject, domain)
        if key not in self._forced:
            windows = even_windows(self.tokens(subject, domain), 128, subject.model.config.block_size + 1)
            self._forced[key] = losses.evaluate(subject.model, windows)
        return self._forced[key]

    def ours(self, name: str, subject: Subject, domain: str, decoding: str, **settings) -> Contender:
        """One of our methods on held-out prompts."""
        prompts = self.prompts(subject, domain)
        settings |= {"captures": self.captures, **DECODINGS[decoding]}
        return ours(name, subject.model, prompts, self.new_tokens, **settings)

    def methods(self) -> dict[str, Callable[[int], dict]]:
        """Our methods by their names in the tables; each gives stream's settings for L drafts."""
        found: dict[str, Callable[[int], dict]] = {
            "two-pass": lambda L: {"method": "pass-two-pass", "lookahead": L},
            "fused": lambda L: {"method": "pass", "lookahead": L},
            COPYING: lambda L: {"method": "pass", "lookahead": L, "prompt_lookup": DEFAULT_PROMPT_LOOKUP},
            LOOKUP: lambda L: {"method": "prompt-lookup"},  # the same for every L
            TREE: lambda L: self.tree(L, 4 * L),
        }
        if self.draft:
            draft_model = self.draft.model
            found[TWO_MODELS] = lambda L: {"method": "speculative", "lookahead": L, "draft_model": draft_model}
        return found

    def tree(self, lookahead: int, n_drafts: int, **settings) -> dict:
        """stream's settings for the tree of n_drafts nodes and at most L deep that keeps most drafts of the subject."""
        return {
            "method": "pass-tree",
            "lookahead": lookahead,
            "tree": best_tree(self.hits(lookahead), n_drafts),
            **settings,
        }

    def hits(self, lookahead: int) -> list[list[float]]:
        """How often the subject's drafts of each rank are right, (lookahead, ranks)."""
        return self.forced(self.subject, self.data)["hits"][:lookahead]

    def adaptive(self, decoding: str) -> dict:
        """stream's settings for trees that fit this machine and the text."""
        hits = self.hits(MOST_AUTO_LOOKAHEAD)
        return {
            "method": "pass-tree",
            "tree": AdaptiveTree(
                hits, round_seconds(self.subject.model, hits, captures=self.captures, **DECODINGS[decoding])
            ),
        }

    def family(
        self, domain: str, decoding: str, lengths: Sequence[int], without: Sequence[str] = ()
    ) -> list[Contender]:
        """Plain decoding of the subject, then each method, except those named, with each number of drafts in a row."""
        plain = self.ours("autoregressive", self.subject, domain, decoding, method="autoregressive")
        return [plain] + [
            self.ours(name, self.subject, domain, decoding, baseline=plain, **settings(length))
            for name, settings in self.methods().items()
            if name not in without
            for length in (lengths[:1] if name == LOOKUP else lengths)
        ]

    def caption(self, subject: Subject, *parts: str) -> str:
        """What stands above a table."""
        return ", ".join([f"`{subject.name}` ({subject.millions})", *parts])

    def counts(self, domain: str) -> str:
        """How much was generated, in words."""
        n_prompts = len(self.prompts(self.subject, domain))  # fewer than asked for where the text is short
        return f"{n_prompts} held-out prompts of {self.prompt_tokens} tokens ({domain}), {self.new_tokens} new tokens"

    def drafter(self) -> str:
        """One line about the draft model, or about its absence."""
        if self.draft:
            return f"Two models: the drafts are of `{self.draft.name}` ({self.draft.millions})."
        return "No row for two models: there is no draft model that fits (name one with --draft-model)."
