"""Answers that are one of a fixed list of classes: free text to a class, and scores over classes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

from llavakit.errors import UserError, quoted


def plain_label(text: str) -> str:
    """Lower case, `_` and `-` as spaces, spaces collapsed, final punctuation dropped."""
    text = unicodedata.normalize("NFC", text).lower().replace("_", " ").replace("-", " ")
    return " ".join(" ".join(text.split()).rstrip(" .,;:!?").split())


class ClassAnswers:
    """Free text to the number of a class.

    The class whose label the text is; else the one with the longest label that the text contains as whole words. None
    if there is no such class, or several labels of that length.

    Args:
        labels: The classes.

    Raises:
        UserError: If two labels differ in nothing that a text is compared by.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.plain = [plain_label(label) for label in labels]
        self._exact = {text: number for number, text in enumerate(self.plain)}
        if len(self._exact) < len(labels):
            twice = next(text for text, count in Counter(self.plain).items() if count > 1)
            raise UserError(f"labels: two of them read {quoted(twice)}")
        self._words = [re.compile(rf"(?<!\w){re.escape(text)}(?!\w)") for text in self.plain]

    def __call__(self, text: str) -> int | None:
        text = plain_label(text)
        if text in self._exact:
            return self._exact[text]
        found = [number for number, words in enumerate(self._words) if self.plain[number] and words.search(text)]
        longest = max((len(self.plain[number]) for number in found), default=0)
        best = [number for number in found if len(self.plain[number]) == longest]
        return best[0] if len(best) == 1 else None


def macro_scores(
    truth: Sequence[Hashable], predicted: Sequence[Hashable | None], *, zero_division: float = 1.0
) -> dict[str, float]:
    """`accuracy`, and `precision`, `recall` and `fscore` averaged over the classes that occur on either side.

    Args:
        truth: Class of every item.
        predicted: The same as predicted; None is an invalid prediction: wrong, and of no class.
        zero_division: Value of a rate whose denominator is 0: the precision of a class that is never predicted, the
            recall of one that never occurs.

    Raises:
        UserError: If there is no item, or the lengths differ.
    """
    if len(truth) != len(predicted) or not truth:
        raise UserError(f"{len(truth)} classes and {len(predicted)} predictions; there must be as many, at least one")
    classes = dict.fromkeys([*truth, *(label for label in predicted if label is not None)])
    hits = Counter(label for label, guess in zip(truth, predicted, strict=True) if label == guess)
    occurs, guessed = Counter(truth), Counter(label for label in predicted if label is not None)

    def rate(part: float, whole: float) -> float:
        return part / whole if whole else zero_division

    def average(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "accuracy": hits.total() / len(truth),
        "precision": average([rate(hits[label], guessed[label]) for label in classes]),
        "recall": average([rate(hits[label], occurs[label]) for label in classes]),
        "fscore": average([rate(2 * hits[label], occurs[label] + guessed[label]) for label in classes]),
    }
