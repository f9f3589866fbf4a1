"""ROUGE-L as the PyPI package `rouge` 1.0.1 computes it, on which published figures of multi-image benchmarks rest.

It is not the ROUGE-L of its paper: sentences end at every full stop, and what is matched is a set of words. The package
is not maintained, so its definition is written out here.
"""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.text import References, TextScore


def sentences_of(text: str) -> list[list[str]]:
    """The words of every sentence; sentences are what full stops separate, words what single spaces separate."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def matched_words(reference: Sequence[str], candidate: Sequence[str]) -> set[str]:
    """The words of one longest common subsequence: of several, the one found from the end by taking equal words, else
    leaving out a word of the reference only where that keeps strictly more."""
    lengths = [[0] * (len(candidate) + 1)]
    for left in reference:
        above, row = lengths[-1], [0]
        for place, right in enumerate(candidate):
            row.append(above[place] + 1 if left == right else max(above[place + 1], row[-1]))
        lengths.append(row)
    words: set[str] = set()
    i, j = len(reference), len(candidate)
    while i and j:
        if reference[i - 1] == candidate[j - 1]:
            words.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_l(candidate: str, reference: str) -> float:
    """F of one text against one reference, between 0 and 1; a text without a sentence has 0."""
    ours, theirs = sentences_of(candidate), sentences_of(reference)
    if not ours or not theirs:
        return 0.0
    matched = set().union(*(matched_words(wanted, own) for wanted in theirs for own in ours))
    precision = len(matched) / len({word for sentence in ours for word in sentence})
    recall = len(matched) / len({word for sentence in theirs for word in sentence})
    return 2 * (precision * recall / (precision + recall + 1e-8))


def pypi_rouge_l(candidates: Sequence[str], references: References) -> TextScore:
    """The mean over texts; of several references the best."""
    each = [max(rouge_l(own, text) for text in texts) for own, texts in zip(candidates, references, strict=True)]
    return TextScore(mean(each) or 0.0, each)
