"""Prompt lookup: drafts that are copied from the text itself, from where its last tokens stood before.

Any draft is exact, wherever it comes from: with all of p on it, it is accepted with probability q(d). Text that repeats
itself, code above all, is copied in long runs (A. Saxena, 2023; N. Yang et al., arXiv 2304.04487).
"""

from collections.abc import Sequence

from minipass.texts import Texts

NGRAMS = (3, 2, 1)  # lengths of what must have stood there before: the longest that is found decides


class PromptLookup:
    """An index of one text's n-grams, each with what followed it last."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}  # where in the text that is

    def extend(self, tokens: Sequence[int]) -> None:
        """The text continues."""
        for token in tokens:
            for n in NGRAMS:
                self.follows[tuple(self.text[-n:])] = len(self.text)
            self.text.append(token)

    def drafts(self, n_drafts: int) -> list[int]:
        """The n_drafts tokens that followed the text's last ones; none when these were never there before.

        Where the copy reaches the text's end it continues with its own beginning, as a loop does.
        """
        for n in NGRAMS:
            start = self.follows.get(tuple(self.text[-n:]))
            if start is not None:
                followed = self.text[start : start + n_drafts]
                return [followed[i % len(followed)] for i in range(n_drafts)]
        return []


def copied_drafts(indices: Sequence[PromptLookup], texts: Texts, n: int) -> list[list[int]] | None:
    """n drafts for each text, -1 where it does not repeat itself; None where no text does. Brings the indices up."""
    for index, text in zip(indices, texts.texts, strict=True):
        index.extend(text[len(index.text) :])
    found = [index.drafts(n) if texts.left(b) > 0 else [] for b, index in enumerate(indices)]
    return [drafts or [-1] * n for drafts in found] if any(found) else None
