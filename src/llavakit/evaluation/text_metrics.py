"""Metrics of running text against reference texts: BLEU, ROUGE, CIDEr, in the definitions that papers used.

The same name means different numbers in different toolkits, so each function says whose definition it is. Tokenised
text is a list of words; who splits it, and how, is the caller's decision.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]


def ngrams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    """Counts of the n-grams of a text."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _clipped(candidate: Words, references: Sequence[Words], n: int) -> int:
    """How many n-grams of the candidate are in a reference, each at most as often as there."""
    allowed: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        allowed |= ngrams(reference, n)
    return (ngrams(candidate, n) & allowed).total()


def _closest_length(candidate: int, references: Sequence[Words]) -> int:
    return min((abs(len(reference) - candidate), len(reference)) for reference in references)[1]


def sentence_bleu(
    candidate: Words, references: Sequence[Words], weights: Sequence[float] = (0.25,) * 4, epsilon: float | None = None
) -> float:
    """BLEU of one sentence as NLTK defines it.

    Args:
        weights: One weight per n-gram order.
        epsilon: What an order without any match counts as its numerator (NLTK's smoothing method 1 uses 0.1); without
            it, the smallest positive number is its precision. A text without a common word scores 0 anyway.
    """
    hits = [_clipped(candidate, references, n) for n in range(1, len(weights) + 1)]
    if not hits[0]:
        return 0.0
    logs = []
    for n, (hit, weight) in enumerate(zip(hits, weights, strict=True), 1):
        total = max(1, len(candidate) - n + 1)
        precision = hit / total if hit else (sys.float_info.min if epsilon is None else epsilon / total)
        logs.append(weight * math.log(precision))
    wanted = _closest_length(len(candidate), references)
    penalty = 1.0 if len(candidate) > wanted else math.exp(1 - wanted / len(candidate))
    return penalty * math.exp(math.fsum(logs))


def coco_bleu(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]], order: int = 4
) -> tuple[list[float], list[list[float]]]:
    """BLEU-1..order of a corpus and of each sentence, as the COCO caption evaluation defines it.

    Orders without a match count about 1e-15 hits, so that a sentence's score is never exactly 0; the reference length
    is the closest one per sentence.

    Returns:
        [order] corpus values, [order][sentences] values.
    """
    tiny, small = 1e-15, 1e-9
    rows = []
    for candidate, answers in zip(candidates, references, strict=True):
        hits = [_clipped(candidate, answers, n) for n in range(1, order + 1)]
        totals = [max(0, len(candidate) - n + 1) for n in range(1, order + 1)]
        rows.append((hits, totals, len(candidate), _closest_length(len(candidate), answers)))

    def value(hits: Sequence[int], totals: Sequence[int], length: int, wanted: int) -> list[float]:
        relative = (length + tiny) / (wanted + small)
        penalty = math.exp(1 - 1 / relative) if relative < 1 else 1.0
        product, values = 1.0, []
        for n, (hit, total) in enumerate(zip(hits, totals, strict=True), 1):
            product *= (hit + tiny) / (total + small)
            values.append(product ** (1 / n) * penalty)
        return values

    single = [value(*row) for row in rows]
    summed = [[sum(column) for column in zip(*(row[i] for row in rows), strict=True)] for i in (0, 1)]
    corpus = value(*summed, sum(row[2] for row in rows), sum(row[3] for row in rows))
    return corpus, [list(column) for column in zip(*single, strict=True)]


def common_length(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if left == right else max(row[j], row[j - 1])
    return row[-1]


def coco_rouge_l(candidate: Words, references: Sequence[Words], beta: float = 1.2) -> float:
    """ROUGE-L of one sentence as the COCO caption evaluation defines it.

    Precision and recall are each the best over the references, then combined with `beta`.
    """
    lengths = [common_length(candidate, reference) for reference in references]
    precision = max((length / len(candidate) for length in lengths if candidate), default=0.0)
    recall = max((length / len(reference) for length, reference in zip(lengths, references, strict=True) if reference))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def rouge_words(text: str) -> list[str]:
    """The words of Google's rouge_score without stemming: lower-cased runs of ASCII letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge(candidate: str, reference: str, n: int | str = "L") -> tuple[float, float, float]:
    """ROUGE-n or ROUGE-L of one text as Google's rouge_score defines it.

    Returns:
        precision, recall, F1.
    """
    a, b = rouge_words(candidate), rouge_words(reference)
    if n == "L":
        hits, found, wanted = common_length(a, b), len(a), len(b)
    else:
        left, right = ngrams(a, int(n)), ngrams(b, int(n))
        hits, found, wanted = (left & right).total(), left.total(), right.total()
    if not hits:
        return 0.0, 0.0, 0.0
    precision, recall = hits / found, hits / wanted
    return precision, recall, 2 * precision * recall / (precision + recall)


def cider(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]], order: int = 4, sigma: float = 6.0
) -> tuple[float, list[float]]:
    """CIDEr as the COCO caption evaluation computes it (the "D" variant), between 0 and 10.

    Cosine of tf-idf vectors per n-gram order, the candidate's weights clipped at the reference's, damped by a Gaussian
    of the difference in length; document frequencies come from the references given here.

    Returns:
        The mean, and the value of each sentence.
    """
    frequency: Counter[tuple[str, ...]] = Counter()
    for answers in references:
        frequency.update({gram for answer in answers for n in range(1, order + 1) for gram in ngrams(answer, n)})
    log_documents = math.log(len(references))

    def vectors(words: Words) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        weighted = [
            {
                gram: count * (log_documents - math.log(max(1, frequency[gram])))
                for gram, count in ngrams(words, n).items()
            }
            for n in range(1, order + 1)
        ]
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in weighted]
        return weighted, norms, max(0, len(words) - 1)  # the toolkit takes the number of bigrams as the length

    scores = []
    for candidate, answers in zip(candidates, references, strict=True):
        ours, our_norms, our_length = vectors(candidate)
        total = 0.0
        for answer in answers:
            theirs, their_norms, their_length = vectors(answer)
            damping = math.exp(-((our_length - their_length) ** 2) / (2 * sigma**2))
            for n in range(order):
                dot = sum(min(weight, theirs[n].get(g, 0.0)) * theirs[n].get(g, 0.0) for g, weight in ours[n].items())
                norm = our_norms[n] * their_norms[n]
                total += (dot / norm if norm else dot) * damping
        scores.append(10 * total / order / len(answers))
    return sum(scores) / len(scores), scores
