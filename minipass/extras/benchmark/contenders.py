"""What the bench measures: checkpoints, held-out text, and the methods that compete on it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipass import losses, weights
from minipass.api import DEFAULT_LOOKUP
from minipass.auto import MOST_AUTO_LOOKAHEAD, AdaptiveTree, Auto, best_tree, turn_seconds
from minipass.data import Document, encode_documents, even_windows, read_documents, split_documents
from minipass.decode import Engine, Fused, Plain, TwoModels, TwoPass
from minipass.extras.benchmark.measuring import Contender, ours
from minipass.model import GPT
from minipass.sampling import REJECTION, Sampling
from minipass.trees import DraftTree

GREEDY, SAMPLED, PLAIN_SAMPLED = "greedy", "T = 0.8, top-k 10", "T = 1"
DECODINGS = {GREEDY: Sampling(), SAMPLED: Sampling(0.8, top_k=10), PLAIN_SAMPLED: Sampling(1.0)}
PLAIN, TWO_PASS, FUSED, TREE, LOOKUP = "plain", "two-pass", "fused", "tree of 4 L", "prompt lookup alone"
NO_HEAD = ", no head"  # at a name's end: with the model's draft head left out


@dataclass(frozen=True, eq=False)
class Subject:
    """A checkpoint that is measured, under the name that the user gave."""

    name: str
    loaded: weights.Checkpoint

    @property
    def model(self) -> GPT:
        return self.loaded.model

    @cached_property
    def headless(self) -> "Subject":
        """The same without its draft head."""
        model = copy.deepcopy(self.model)
        model.new_draft_head(0)
        return Subject(f"{self.name}{NO_HEAD}", replace(self.loaded, model=model))

    def with_and_without_head(self) -> list["Subject"]:
        return [self] if self.model.draft_head is None else [self, self.headless]

    def model_of(self, name: str) -> GPT:
        """What a contender of this name runs with."""
        return self.headless.model if name.endswith(NO_HEAD) else self.model

    @property
    def millions(self) -> str:
        """Its size in words."""
        return f"{sum(parameter.numel() for parameter in self.model.parameters()) / 1e6:.2g}M parameters"


@dataclass(frozen=True, eq=False)
class Bench:
    """What the experiments share: checkpoints, held-out text and counts.

    frozen, draft: None where there is none; compared: more checkpoints, and where the log of each one's training is.
    use_graphs: the Engine's, for all methods alike.
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
    use_graphs: bool = False

    @cache  # noqa: B019 - one bench a run, here and below
    def heldout(self, domain: str) -> list[Document]:
        """The held-out documents of a corpus."""
        return split_documents(read_documents(domain))[1]

    @cache  # noqa: B019
    def tokens(self, subject: Subject, domain: str) -> np.ndarray:
        """These in the subject's tokens, (N,)."""
        return encode_documents(self.heldout(domain), subject.loaded.encoding)

    def prompts(self, subject: Subject, domain: str) -> list[list[int]]:
        """Evenly spaced windows of held-out text."""
        return even_windows(self.tokens(subject, domain), self.n_prompts, self.prompt_tokens).tolist()

    @cache  # noqa: B019
    def forced(self, subject: Subject, domain: str) -> dict:
        """Teacher-forced figures on held-out text, see losses.evaluate: loops of a generated text don't touch them."""
        windows = even_windows(self.tokens(subject, domain), 128, subject.model.config.block_size + 1)
        return losses.evaluate(subject.model, windows)

    def engine(self, method: Any, decoding: str = GREEDY, model: GPT | None = None) -> Engine:
        """A method with a model, by default the subject's."""
        return Engine(model or self.subject.model, method, DECODINGS[decoding], use_graphs=self.use_graphs)

    def methods(self, n_drafts: int, decoding: str) -> dict[str, Any]:
        """Our methods with so many drafts in a row, by their names in the tables."""
        tree = self.tree(n_drafts, 4 * n_drafts)
        found = {
            TWO_PASS: TwoPass(n_drafts),
            FUSED: Fused(n_drafts),
            f"{FUSED}, rejection": Fused(n_drafts, REJECTION),
            f"{FUSED} + prompt lookup": Fused(n_drafts, lookup=DEFAULT_LOOKUP),
            LOOKUP: Fused(0, lookup=DEFAULT_LOOKUP),  # the same for any number of drafts
            TREE: Fused(tree),
            f"{TREE}, rejection": Fused(tree, REJECTION),
        }
        if self.subject.model.draft_head is not None:
            found[f"{FUSED}{NO_HEAD}"] = Fused(n_drafts)
        if decoding == GREEDY:  # both rules are one
            found = {name: method for name, method in found.items() if not name.endswith("rejection")}
        return found | ({"two models": TwoModels(self.draft.model, n_drafts)} if self.draft else {})

    def contender(
        self,
        name: str,
        method: Any,
        domain: str,
        decoding: str,
        n_drafts: int | None = None,
        *,
        subject: Subject | None = None,
        baseline: Contender | None = None,
    ) -> Contender:
        """A method of ours on held-out prompts, by default with the subject."""
        subject = subject or self.subject
        engine, prompts = self.engine(method, decoding, subject.model_of(name)), self.prompts(subject, domain)
        return ours(name, engine, prompts, self.new_tokens, n_drafts, baseline)

    def family(
        self, domain: str, decoding: str, lengths: Sequence[int], names: Sequence[str] | None = None
    ) -> list[Contender]:
        """Plain decoding of the subject, then each method (or those named) with each number of drafts in a row."""
        plain = self.contender(PLAIN, Plain(), domain, decoding)
        methods = {n_drafts: self.methods(n_drafts, decoding) for n_drafts in lengths}
        return [plain] + [
            self.contender(name, methods[n][name], domain, decoding, None if name == LOOKUP else n, baseline=plain)
            for name in names or methods[lengths[0]]
            for n in (lengths[:1] if name == LOOKUP else lengths)
        ]

    def accuracy(self, n_lookahead: int) -> list[list[float]]:
        """How often the subject's drafts of each rank are right, (n_lookahead, ranks)."""
        return self.forced(self.subject, self.data)["rank_accuracy"][:n_lookahead]

    def tree(self, n_lookahead: int, n_drafts: int) -> DraftTree:
        """The tree of n_drafts nodes, at most n_lookahead deep, of which most of the subject's drafts are accepted."""
        return best_tree(self.accuracy(n_lookahead), n_drafts)

    def auto(self, decoding: str) -> Auto:
        """Trees that fit this machine and the text."""
        accuracy = self.accuracy(MOST_AUTO_LOOKAHEAD)
        seconds = turn_seconds(self.subject.model, accuracy, DECODINGS[decoding], use_graphs=self.use_graphs)
        return Auto(AdaptiveTree(accuracy, seconds))

    def caption(self, subject: Subject, *parts: str) -> str:
        """What is above a table."""
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
