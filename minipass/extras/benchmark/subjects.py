"""What the bench measures: checkpoints, and texts for them to continue."""

import argparse
import copy
import os
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import tiktoken
import torch

from minipass import losses, weights
from minipass.auto import best_tree, likeliest_tree
from minipass.chat import encode_chat
from minipass.data import encode_documents, even_windows, read_documents, split_documents
from minipass.model import GPT
from minipass.texts import Prompts
from minipass.trees import DraftTree

WINDOW, MOST_WINDOWS, MILLIONS = 256, 128, 2000  # teacher-forced: tokens; windows; windows x million weights
BATCHES, N_BATCHES = {f"{size} texts at once": size for size in (1, 4, 16, 64)}, 3
PROSE, CHAT, EDIT, SUMMARY = "docstrings", "answers in chat", "edits of code", "summaries of prose"
QUESTIONS = (
    "What is the speed of light?", "Write a Python function that reverses a string.",
    "Explain what a prime number is to a child.", "Write an email that declines an invitation politely.",
)  # fmt: skip
ASKED = {
    EDIT: "Repeat this code, with a comment before each function:\n\n```python\n{}\n```",
    SUMMARY: "Summarize this text, in sentences from it:\n\n{}",
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A checkpoint to measure, with the name that the user gave; see weights.Checkpoint."""

    name: str
    model: GPT
    encoding: tiktoken.Encoding
    record: dict
    chat_template: str | None

    @cached_property
    def headless(self) -> "Subject | None":
        """The same without its draft head; None if it has none."""
        if self.model.draft_head is None:
            return None
        model = copy.deepcopy(self.model)
        model.new_draft_head(0)
        return replace(self, name=f"{self.name}, no head", model=model)

    @cache  # noqa: B019 - subjects are few, here and below
    def tokens(self, source: str) -> np.ndarray:
        """The held-out documents of a corpus, (N,)."""
        return encode_documents(heldout(source), self.encoding)

    @cache  # noqa: B019
    def forced(self, source: str) -> dict:
        """Teacher-forced figures on held-out text, see losses.evaluate, and the record of the training."""
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        count = max(1, min(MOST_WINDOWS, int(MILLIONS / millions)))
        windows = even_windows(self.tokens(source), count, 1 + min(WINDOW, self.model.config.block_size))
        row = {"checkpoint": self.name, "text": os.path.basename(source), "million_weights": millions}
        row |= {"stage": self.record.get("stage"), "seconds": self.record.get("seconds")}
        found = losses.evaluate(self.model, windows, batch_size=4)
        return row | {"first_acceptance": [*found["acceptance"], None][0], "constant_acceptance": None} | found


def load(name: str, device: torch.device, dtype: torch.dtype, adapters: str | None = None) -> Subject:
    """A Subject, by weights.load. Raises InputError."""
    found = weights.load(name, device=device, dtype=dtype, adapters=adapters)
    return Subject(name, found.model, found.encoding, found.record, found.chat_template)


def heldout(source: str) -> list:
    """The held-out documents of a corpus."""
    return split_documents(read_documents(source))[1]


@dataclass(frozen=True, eq=False)
class Bench:
    """What an experiment works with. options: bench.py's arguments. draft: the draft model, or None. compared: more
    checkpoints. place: device and dtype."""

    options: argparse.Namespace
    subject: Subject
    draft: Subject | None
    compared: list[Subject]
    place: tuple[torch.device, torch.dtype]

    def tree(
        self, n_lookahead: int, n_drafts: int, subject: Subject | None = None, *, fixed: bool = False
    ) -> DraftTree:
        """The tree of n_drafts nodes, at most n_lookahead deep, with the most accepted drafts for the subject, chosen
        for each turn anew or, if fixed, once."""
        accuracy = (subject or self.subject).forced(self.options.data)["rank_accuracy"][:n_lookahead]
        return (best_tree if fixed else likeliest_tree)(accuracy, n_drafts)

    def prompts(self, text: str) -> list[Prompts]:
        """The prompts, always the same: windows of a corpus's held-out part, one or several at once, or requests to
        edit or sum up such windows; or questions. Raises InputError for a request without a chat template."""
        subject, data, length, count = self.subject, self.options.data, self.options.prompt_tokens, self.options.prompts

        def asked(question: str) -> list[int]:
            return encode_chat(subject.encoding, subject.chat_template, [{"role": "user", "content": question}])

        if text == CHAT:
            return list(map(asked, QUESTIONS[:count]))
        size = BATCHES.get(text, 0)
        source = PROSE if text == SUMMARY else data if text == EDIT or size else text
        windows = even_windows(subject.tokens(source), N_BATCHES * size or count, length).tolist()
        if text in ASKED:
            return [asked(ASKED[text].format(subject.encoding.decode(window))) for window in windows]
        n = max(1, len(windows) // N_BATCHES)  # fewer than `size` where there is little text
        return [windows[i : i + n] for i in range(0, n * N_BATCHES, n)][: len(windows)] if size else windows
