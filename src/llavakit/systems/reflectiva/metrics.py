"""Scores of Encyclopedic-VQA and InfoSeek answers, as published, quirks included.

Source: the evaluation scripts of both benchmarks (google-research `encyclopedic_vqa`, `open-vision-language/infoseek`).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llavakit.errors import FieldError
from llavakit.evaluation.processors import NUMBER_WORDS, contractions

Number = float | list[float]
Equivalence = Callable[[str, str, str], float]  # (candidate, reference, question) -> probability that both say the same

# Encyclopedic-VQA

QUESTION_TYPES = ("templated", "automatic", "multi_answer", "2_hop")
_DELETED = str.maketrans("", "", string.punctuation + "‘’´`_")
_DROPPED = re.compile(r"\b(the answer is|a|an|the)\b")
_PREFIX = "<extra_id_0> "
_WORDS = NUMBER_WORDS | {"entailment": "yes", "true": "yes", "contradiction": "no", "false": "no"}


def preprocess_answer(text: str) -> str:
    """A text as exact match compares it.

    Apostrophes are deleted before contractions get theirs back, so that "dont" and "don't" are the same.
    """
    text = text.lower().replace("\n", " ").replace("\t", " ").strip()
    text = text.replace(_PREFIX, "") if text.startswith(_PREFIX) else text
    words = _DROPPED.sub(" ", text.translate(_DELETED)).split()
    words = [_WORDS.get(word, word) for word in words]
    return " ".join(contractions().get(word, word) for word in words)


def listed_match(reference: str, candidate: str, threshold: float = 0.5) -> bool:
    """Whether a list of answers shares enough with the reference, whose items `&&` separates.

    Args:
        threshold: Least intersection over union.

    Raises:
        FieldError: If the reference has no item.
    """
    wanted = {preprocess_answer(item) for item in reference.split("&&")} - {""}
    if not wanted:
        raise FieldError("answer", "Reference list is empty after preprocessing.")
    found = candidate.replace(" and ", ",").replace(" & ", ",").split(",")
    given = {preprocess_answer(item) for item in found} - {""}
    return len(wanted & given) / len(wanted | given) >= threshold


def encyclopedic_score(
    question: str,
    references: Sequence[str],
    candidate: str,
    question_type: str,
    equivalence: Equivalence | None = None,
    *,
    iou_threshold: float = 0.5,
    bem_threshold: float = 0.5,
) -> float:
    """1 if an answer is right by any reference, else 0: exact match first, then equivalence of meaning.

    Args:
        equivalence: The answer equivalence model (BEM); None leaves it at exact match.
        bem_threshold: Least probability.

    Raises:
        FieldError: If there is no reference, one is empty, or the question type is unknown.
    """
    if not references:
        raise FieldError("answer", "Reference list cannot be empty.")
    thresholds = {"iou_threshold": iou_threshold, "bem_threshold": bem_threshold}
    return max(_score(question, own, candidate, question_type, equivalence, **thresholds) for own in references)


def _score(
    question: str,
    reference: str,
    candidate: str,
    question_type: str,
    equivalence: Equivalence | None,
    *,
    iou_threshold: float,
    bem_threshold: float,
) -> float:
    if not reference:
        raise FieldError("answer", "Reference answer cannot be empty.")
    if question_type not in QUESTION_TYPES:
        raise FieldError("question_type", f"Unknown question type. Valid options are {list(QUESTION_TYPES)}")
    if question_type == "multi_answer":
        if listed_match(reference, candidate, iou_threshold):
            return 1.0
        reference = reference.replace("&&", ",")
    else:
        wanted = preprocess_answer(reference)
        if not wanted:
            raise FieldError("answer", "Reference answer is empty after preprocessing.")
        if preprocess_answer(candidate) == wanted:
            return 1.0
    return float(equivalence is not None and equivalence(candidate, reference, question) >= bem_threshold)


# InfoSeek

_NUMBER = re.compile(r"[-+]?[.]?[\d]+(?:,\d\d\d)*[\.]?\d*(?:[eE][-+]?\d+)?")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
TOLERANCE = 0.1  # of a reference that is one number
_TINY = 1e-12


def normalize_answer(text: str) -> str:
    """A text as names and times are compared: lower case, no ASCII punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two texts are the same by `normalize_answer`."""
    return normalize_answer(prediction) == normalize_answer(reference)


def spaced_range(text: str) -> str:
    """A text with blanks around every hyphen that follows a digit, so that "9-10" holds two positive numbers."""
    return "".join(
        " - " if letter == "-" and place and text[place - 1].isdigit() else letter for place, letter in enumerate(text)
    )


def parse_number(text: str) -> Number:
    """The first number of a text, or the range of its first two; [0, 0] without any.

    Two numbers that fall are the first of them. A dot in front of a number is lost: ".5" is 5.
    """
    found = [token.replace(",", "").strip(".") for token in _NUMBER.findall(spaced_range(text))]
    numbers = [float(token.split(".")[0] if token.count(".") > 1 else token) for token in found][:2]
    if not numbers:
        return [0, 0]
    return numbers if len(numbers) == 2 and numbers[0] <= numbers[1] else numbers[0]


def range_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two ranges, whose ends may come in any order; 0 where both are points."""
    overlap = max(0.0, min(max(one), max(other)) - max(min(one), min(other)))
    lengths = [max(both) - min(both) + _TINY for both in (one, other)]
    return overlap / (sum(lengths) - overlap)


def number_match(prediction: Number, reference: Number, tolerance: float = TOLERANCE) -> bool:
    """Whether a number lies in a range, or a range does or shares at least half with it.

    Args:
        reference: A range, or one number, which stands for itself plus and minus `tolerance` of it; by the published
            rule a negative one is met by nothing.
    """
    if not isinstance(reference, list):
        reference = [reference * (1 - tolerance), reference * (1 + tolerance)]
    low, high = reference[:2]
    if not isinstance(prediction, list):
        return low <= prediction <= high
    inside = all(low <= end <= high for end in prediction)
    return inside or range_iou(prediction, reference[:2]) >= 0.5 - _TINY


def infoseek_match(
    prediction: str, references: Iterable[Any], question_type: str, tolerance: float = TOLERANCE
) -> bool:
    """Whether an answer is right.

    Args:
        references: Texts; for numbers the range first, as a list or as an object with `range`, or one number.
        question_type: "numerical" in any case of letters is compared as numbers; every other one as text.

    Raises:
        FieldError: If the references of a numerical question hold no number.
    """
    if question_type.lower() == "numerical":
        return number_match(parse_number(prediction), _wanted_range(references), tolerance)
    texts = references if isinstance(references, (list, tuple)) else [references]
    return any(exact_match(prediction, str(text)) for text in texts)


def _wanted_range(references: Any) -> Number:
    first = references
    if isinstance(first, (list, tuple)):
        if not first:
            raise FieldError("answer_eval", "is empty; give an object with a range, or a number")
        first = first[0]
    if isinstance(first, dict):
        first = first.get("range")
    numbers = first[:2] if isinstance(first, (list, tuple)) else [first]
    try:
        found = [float(number) for number in numbers]
    except (TypeError, ValueError):
        found = []
    if not found:
        raise FieldError("answer_eval", "must be an object with a range of two numbers, or a number")
    return found if len(found) == 2 else found[0]


def harmonic(one: float, other: float) -> float:
    """Harmonic mean of two scores, rounded to two digits; a score of 0 counts as a very small one."""
    return round(2 / sum(1 / (score or _TINY) for score in (one, other)), 2)
