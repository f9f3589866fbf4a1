"""Overlap of texts with one reference each, as sums over texts (`resampling.Sums`): resamples cost no recounting.

Names are those of `text` and `rouge`, whose definitions these are, and more of the same toolkits:

    sacrebleu_1 ... sacrebleu_4           corpus BLEU, tokenisation 13a, exponential smoothing
    coco_bleu_1 ... coco_bleu_4           corpus BLEU of the COCO caption evaluation
    nltk_corpus_bleu_1 ... _4             corpus BLEU of NLTK, unsmoothed
    nltk_bleu_1 ... _4 (_smoothed)        NLTK's sentence BLEU, mean over texts (smoothed: its method 1)
    google_rouge_1, _2, _l (_stemmed)     F1 of rouge-score, without and with Porter's stemmer, mean over texts
    coco_rouge_l, coco_cider              ROUGE-L and CIDEr-D of the COCO caption evaluation, mean over texts
    pypi_rouge_l                          F of the package rouge 1.0.1, mean over texts

CIDEr's document frequencies are those of all references given, in every resample; of a single text it is not defined.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

import numpy as np

from llavakit.evaluation.metrics import text
from llavakit.evaluation.metrics.resampling import Sums, divide
from llavakit.evaluation.metrics.rouge import rouge_l
from llavakit.evaluation.packages import need

ORDERS = (1, 2, 3, 4)
COCO = (*(f"coco_bleu_{n}" for n in ORDERS), "coco_rouge_l", "coco_cider")
OVERLAP = (
    *(f"sacrebleu_{n}" for n in ORDERS),
    *COCO,
    *(f"nltk_corpus_bleu_{n}" for n in ORDERS),
    *(f"nltk_bleu_{n}{kind}" for kind in ("", "_smoothed") for n in ORDERS),
    *(f"google_rouge_{kind}{stemmed}" for stemmed in ("", "_stemmed") for kind in ("1", "2", "l")),
    "pypi_rouge_l",
)
_TEN = 10.0  # CIDEr's highest value

Words = Sequence[str]


class Overlap:
    """Texts beside their references.

    Args:
        texts, references: One reference per text.
    """

    def __init__(self, texts: Sequence[str], references: Sequence[str]) -> None:
        self.texts, self.references = list(texts), list(references)

    def sums(self, name: str) -> Sums:
        """The metric `name`, of `OVERLAP`.

        Raises:
            UserError: If the package that defines it is not installed.
        """
        toolkit, _, kind = name.partition("_")
        return getattr(self, f"_{toolkit}")(kind)

    # Corpus BLEU: matches and n-grams by order, length, length of the reference

    def _sacrebleu(self, kind: str) -> Sums:
        table = self._counts_of_13a
        return Sums(table, functools.partial(_corpus_bleu, int(kind), _smoothed_as_sacrebleu, _short_as_sacrebleu))

    def _coco(self, kind: str) -> Sums:
        if kind == "rouge_l":
            return Sums.mean([text.rouge_l_of_sentence(a, [b]) for a, b in self._split])
        if kind == "cider":
            if len(self.texts) < 2:  # every n-gram is in one of one references: all weights are 0
                return Sums.mean([None] * len(self.texts), high=_TEN)
            words = list(zip(*self._split, strict=True))
            return Sums.mean(text.cider(words[0], [[reference] for reference in words[1]])[1], high=_TEN)
        return Sums(self._counts_of_words, functools.partial(_coco_bleu, int(kind[-1])))

    def _nltk(self, kind: str) -> Sums:
        if kind.startswith("corpus"):
            return Sums(self._nltk_counts, functools.partial(_nltk_bleu, int(kind[-1])))
        order, smoothed = int(kind.split("_")[1]), kind.endswith("_smoothed")
        values = _nltk_bleu(order, self._nltk_counts, 0.1 if smoothed else None)
        return Sums.mean(values)

    @functools.cached_property
    def _counts_of_13a(self) -> np.ndarray:
        tokenise = need("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
        return _counts([(tokenise(a.rstrip()).split(), tokenise(b.rstrip()).split()) for a, b in self._pairs])

    @functools.cached_property
    def _counts_of_words(self) -> np.ndarray:
        return _counts(self._split)

    @functools.cached_property
    def _nltk_counts(self) -> np.ndarray:
        """As `_counts_of_words`, but a text shorter than an order counts as one n-gram, as NLTK has it."""
        table = self._counts_of_words.copy()
        table[:, 4:8] = np.maximum(table[:, 4:8], 1.0)
        return table

    # ROUGE

    def _google(self, kind: str) -> Sums:
        _, which, *stemmed = kind.split("_")
        pairs = self._stems if stemmed else self._letters
        if which == "l":
            return Sums.mean([_f1(text.common_length(a, b), len(a), len(b)) for a, b in pairs])
        order = int(which)
        grams = [(text.ngrams(a, order), text.ngrams(b, order)) for a, b in pairs]
        return Sums.mean([_f1((a & b).total(), a.total(), b.total()) for a, b in grams])

    def _pypi(self, kind: str) -> Sums:
        return Sums.mean([rouge_l(a, b) for a, b in self._pairs])

    # Words

    @functools.cached_property
    def _pairs(self) -> list[tuple[str, str]]:
        return list(zip(self.texts, self.references, strict=True))

    @functools.cached_property
    def _split(self) -> list[tuple[Words, Words]]:
        return [(a.split(), b.split()) for a, b in self._pairs]

    @functools.cached_property
    def _letters(self) -> list[tuple[Words, Words]]:
        return self._google_words(None)

    @functools.cached_property
    def _stems(self) -> list[tuple[Words, Words]]:
        return self._google_words(_Stemmer())

    def _google_words(self, stemmer: _Stemmer | None) -> list[tuple[Words, Words]]:
        words = functools.partial(need("rouge_score.tokenize").tokenize, stemmer=stemmer)
        return [(words(a), words(b)) for a, b in self._pairs]


class _Stemmer:
    """Porter's stemmer as rouge-score uses it, each word once."""

    def __init__(self) -> None:
        self.stem: Callable[[str], str] = functools.cache(need("nltk.stem.porter").PorterStemmer().stem)


def _counts(pairs: Sequence[tuple[Words, Words]]) -> np.ndarray:
    """Per text: matched n-grams [4], its n-grams [4], its length, the reference's length."""
    rows = []
    for words, reference in pairs:
        grams = [text.ngrams(words, n) for n in ORDERS]
        matches = [(own & text.ngrams(reference, n)).total() for n, own in zip(ORDERS, grams, strict=True)]
        rows.append([*matches, *(own.total() for own in grams), len(words), len(reference)])
    return np.array(rows, float).reshape(len(pairs), 10)


def _corpus_bleu(
    order: int,
    smooth: Callable[[np.ndarray, np.ndarray], np.ndarray],
    short: Callable[[np.ndarray, np.ndarray], np.ndarray],
    sums: np.ndarray,
) -> np.ndarray:
    matches, totals = sums[..., :order], sums[..., 4 : 4 + order]
    with np.errstate(divide="ignore"):
        logs = np.log(smooth(matches, totals)).mean(-1)
    return np.where(matches[..., 0] > 0, short(sums[..., 8], sums[..., 9]) * np.exp(logs), 0.0)


def _smoothed_as_sacrebleu(matches: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Orders without a match have 1/2, 1/4, ... of one match; an order without n-grams has none."""
    halved = np.cumsum((matches == 0) & (totals > 0), axis=-1)
    return divide(np.where(matches > 0, matches, 0.5**halved), totals, empty=0.0)


def _short_as_sacrebleu(length: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    penalty = np.exp(np.minimum(1.0 - divide(wanted, length, empty=np.inf), 0.0))
    return np.where(length < wanted, penalty, 1.0)


def _coco_bleu(order: int, sums: np.ndarray) -> np.ndarray:
    """As `text.coco_bleu`, with its two tiny constants."""
    tiny, small = 1e-15, 1e-9
    relative = (sums[..., 8] + tiny) / (sums[..., 9] + small)
    penalty = np.where(relative < 1, np.exp(1 - 1 / relative), 1.0)
    precisions = (sums[..., :order] + tiny) / (sums[..., 4 : 4 + order] + small)
    return precisions.prod(-1) ** (1 / order) * penalty


def _nltk_bleu(order: int, sums: np.ndarray, epsilon: float | None = None) -> np.ndarray:
    """As `text.corpus_bleu`."""
    matches, totals = sums[..., :order], sums[..., 4 : 4 + order]
    missing = np.full_like(totals, sys.float_info.min) if epsilon is None else divide(epsilon, totals, empty=1.0)
    precisions = np.where(matches > 0, divide(matches, totals, empty=1.0), missing)
    length, wanted = sums[..., 8], sums[..., 9]
    penalty = np.where(length > wanted, 1.0, np.exp(1 - divide(wanted, length, empty=1.0)))
    values = penalty * np.exp(np.log(precisions).mean(-1))
    return np.where(matches[..., 0] > 0, values, 0.0)


def _f1(hits: float, said: float, true: float) -> float:
    precision, recall = hits / max(said, 1), hits / max(true, 1)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


__all__ = ["COCO", "ORDERS", "OVERLAP", "Overlap"]
