"""Running text against reference texts: BLEU, ROUGE, CIDEr and word overlap.

The same word means different numbers in different toolkits, so the toolkit is part of every registered name:

    coco_*       the COCO caption evaluation, on texts split at white space
    nltk_*       NLTK's sentence BLEU, mean over sentences
    sacrebleu_*  corpus BLEU of the package sacrebleu, its own tokenisation (13a)
    google_*     F1 of the package rouge-score, without stemming
    medical_*    word overlap of medical VQA (LLaVA-Med)
    pypi_*       the package rouge 1.0.1 (`metrics.rouge`)

A metric takes texts and gives a `TextScore`. The COCO and NLTK definitions are written out here, since the packages
that hold them want Java or download data. METEOR and BERTScore are missing: they need WordNet and a language model.
"""

from __future__ import annotations

import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llavakit.evaluation.metrics.answers import mean, token_scores
from llavakit.evaluation.packages import need
from llavakit.evaluation.processors import medical_answer

Words = Sequence[str]
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class TextScore:
    """A metric over a corpus.

    Attributes:
        value: Of the whole corpus; between 0 and 1, CIDEr between 0 and 10.
        each: Of every text; None if the metric has no value for a single text.
    """

    value: float
    each: Sequence[float] | None = None


# N-grams


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


# The definitions of NLTK and of the COCO caption evaluation


def corpus_bleu(
    candidates: Sequence[Words],
    references: Sequence[Sequence[Words]],
    weights: Sequence[float] = (0.25,) * 4,
    epsilon: float | None = None,
) -> float:
    """BLEU of a corpus as NLTK defines it: counts of n-grams and lengths are summed over all texts.

    Args:
        weights: One weight per n-gram order.
        epsilon: What an order without any match counts as its numerator (NLTK's smoothing method 1 uses 0.1); without
            it, the smallest positive number is its precision. Texts without a common word score 0 anyway.
    """
    pairs = list(zip(candidates, references, strict=True))
    orders = range(1, len(weights) + 1)
    hits = [sum(_clipped(words, own, n) for words, own in pairs) for n in orders]
    if not hits[0]:
        return 0.0
    totals = [sum(max(1, len(words) - n + 1) for words, _ in pairs) for n in orders]
    logs = []
    for hit, total, weight in zip(hits, totals, weights, strict=True):
        precision = hit / total if hit else (sys.float_info.min if epsilon is None else epsilon / total)
        logs.append(weight * math.log(precision))
    length = sum(len(words) for words, _ in pairs)
    wanted = sum(_closest_length(len(words), own) for words, own in pairs)
    penalty = 1.0 if length > wanted else math.exp(1 - wanted / length)
    return penalty * math.exp(math.fsum(logs))


def sentence_bleu(
    candidate: Words, references: Sequence[Words], weights: Sequence[float] = (0.25,) * 4, epsilon: float | None = None
) -> float:
    """BLEU of one sentence as NLTK defines it; see `corpus_bleu`."""
    return corpus_bleu([candidate], [references], weights, epsilon)


def coco_bleu(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]], order: int = 4
) -> tuple[list[float], list[list[float]]]:
    """BLEU-1..order of a corpus and of each sentence, as the COCO caption evaluation defines it.

    Orders without a match count about 1e-15 hits, so that a sentence's score is never exactly 0; the reference length
    is the closest one per sentence.

    Returns:
        `[order]` corpus values, `[order][sentences]` values.
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
    """Length of the longest common subsequence, a column of the table at a time in the bits of one integer.

    Hyyrö 2004: the zeros of `row` are where the table's row grows.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    whole = (1 << len(a)) - 1
    row = whole
    for word in b:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & whole
    return len(a) - row.bit_count()


def rouge_l_of_sentence(candidate: Words, references: Sequence[Words], beta: float = 1.2) -> float:
    """ROUGE-L of one sentence as the COCO caption evaluation defines it.

    Precision and recall are each the best over the references, then combined with `beta`.
    """
    lengths = [common_length(candidate, reference) for reference in references]
    precision = max((length / len(candidate) for length in lengths if candidate), default=0.0)
    pairs = zip(lengths, references, strict=True)
    recall = max((length / len(reference) for length, reference in pairs if reference), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


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
        # the toolkit takes the number of bigrams as the length, so that unigrams alone have no penalty for it
        return weighted, norms, max(0, len(words) - 1) if order > 1 else 0

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


# Metrics by registered name


def _split(texts: Sequence[str]) -> list[list[str]]:
    return [text.split() for text in texts]


def _coco_bleu(order: int, candidates: Sequence[str], references: References) -> TextScore:
    corpus, single = coco_bleu(_split(candidates), [_split(texts) for texts in references])
    return TextScore(corpus[order - 1], single[order - 1])


def coco_rouge_l(candidates: Sequence[str], references: References, *, beta: float = 1.2) -> TextScore:
    """ROUGE-L of the COCO caption evaluation, mean over texts; it splits at single blanks, as its code does."""
    each = [
        rouge_l_of_sentence(candidate.split(" "), [text.split(" ") for text in texts], beta)
        for candidate, texts in zip(candidates, references, strict=True)
    ]
    return TextScore(mean(each) or 0.0, each)


def coco_cider(candidates: Sequence[str], references: References, *, order: int = 4, sigma: float = 6.0) -> TextScore:
    """CIDEr-D of the COCO caption evaluation, between 0 and 10."""
    return TextScore(*cider(_split(candidates), [_split(texts) for texts in references], order, sigma))


def _nltk_bleu(order: int, epsilon: float | None, candidates: Sequence[str], references: References) -> TextScore:
    weights = (1 / order,) * order
    each = [
        sentence_bleu(candidate.split(), _split(texts), weights, epsilon)
        for candidate, texts in zip(candidates, references, strict=True)
    ]
    return TextScore(mean(each) or 0.0, each)


def _sacrebleu(order: int, candidates: Sequence[str], references: References) -> TextScore:
    bleu = need("sacrebleu.metrics").BLEU(max_ngram_order=order)
    most = max(map(len, references))
    # The package wants streams: the first reference of every text, then the second, and None where a text has no more.
    streams = [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
    return TextScore(bleu.corpus_score(list(candidates), streams).score / 100)


def _google_rouge(kind: str, candidates: Sequence[str], references: References) -> TextScore:
    """F1 of rouge-score without stemming; of several references the best."""
    scorer = need("rouge_score.rouge_scorer").RougeScorer([kind])
    each = [
        max(scorer.score(text, candidate)[kind].fmeasure for text in texts)
        for candidate, texts in zip(candidates, references, strict=True)
    ]
    return TextScore(mean(each) or 0.0, each)


def _medical(name: str, candidates: Sequence[str], references: References) -> TextScore:
    """Word overlap after the normalisation of medical VQA; of several references the best."""
    each = [
        max(token_scores(medical_answer(candidate), medical_answer(text))[name] for text in texts)
        for candidate, texts in zip(candidates, references, strict=True)
    ]
    return TextScore(mean(each) or 0.0, each)


TextMetric = Callable[[Sequence[str], References], TextScore]

coco_bleu_1, coco_bleu_2, coco_bleu_3, coco_bleu_4 = (functools.partial(_coco_bleu, order) for order in (1, 2, 3, 4))
nltk_bleu_1, nltk_bleu_4 = (functools.partial(_nltk_bleu, order, None) for order in (1, 4))
nltk_bleu_1_smoothed, nltk_bleu_4_smoothed = (functools.partial(_nltk_bleu, order, 0.1) for order in (1, 4))
sacrebleu_1, sacrebleu_4 = (functools.partial(_sacrebleu, order) for order in (1, 4))
google_rouge_1, google_rouge_2, google_rouge_l = (
    functools.partial(_google_rouge, kind) for kind in ("rouge1", "rouge2", "rougeL")
)
medical_precision, medical_recall, medical_f1 = (
    functools.partial(_medical, name) for name in ("precision", "recall", "f1")
)
