"""Prompt lookup: drafts copied from the text itself, from where its last tokens stood before.

The text stays exact wherever a draft comes from: a copied draft has all of p, so it is accepted with probability q(d).
Text that repeats itself, code above all, is copied in long runs (A. Saxena, 2023; N. Yang et al., arXiv 2304.04487).
"""

from collections.abc import Sequence

from minipass.texts import Texts

NGRAMS = (3, 2, 1)  # how many of the last tokens are looked up: the longest n-gram that is found decides


class PromptLookup:
    """An index of one text's n-grams: for each, where the text last went on after it."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram to the place in the text after it

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds the next tokens of the text."""
        for token in tokens:
            for n in NGRAMS:
                self.follows[tuple(self.text[-n:])] = len(self.text)
            self.text.append(token)

    def drafts(self, n_drafts: int, shortest: int = 1) -> list[int]:
        """The n_drafts tokens that followed where the text's last `shortest` tokens or more stood before; none if they
        never did.

        A copy that reaches the end of the text goes on from its own beginning, as a loop does.
        """
        for n in NGRAMS:
            start = self.follows.get(tuple(self.text[-n:])) if n >= shortest else None
            if start is not None:
                followed = self.text[start : start + n_drafts]
                return [followed[i % len(followed)] for i in range(n_drafts)]
        return []


def copied_drafts(indices: Sequence[PromptLookup], texts: Texts, n: int, shortest: int) -> list[list[int]] | None:
    """n drafts for each text; None if no text that continues repeats itself. Updates the indices.

    -1 for a text that continues but does not repeat itself. shortest: of the last tokens, so many or more must have
    stood in the text before.
    """
    for index, text in zip(indices, texts.texts, strict=True):
        index.extend(text[len(index.text) :])
    missing = [-1 if texts.left(b) > 0 else 0 for b in range(len(indices))]
    found = [index.drafts(n, shortest) if token else [] for index, token in zip(indices, missing, strict=True)]
    return [drafts or [token] * n for drafts, token in zip(found, missing, strict=True)] if any(found) else None
