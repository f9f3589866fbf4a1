"""Metrics over answers: fractions in [0, 1] unless a docstring says otherwise."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from llavakit.evaluation.processors import bracket_letter, mme_answer, scienceqa_letter, vqa_answer


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 if whole is 0."""
    return part / whole if whole else 0.0


def grouped_mean(pairs: Iterable[tuple[Hashable, float]]) -> dict[Any, float]:
    """Mean per group, groups in order of first appearance."""
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for group, value in pairs:
        groups[group].append(value)
    return {group: sum(values) / len(values) for group, values in groups.items()}


# Open answers


def consensus_scores(answers: Sequence[str], process: Callable[[str], str] = vqa_answer) -> dict[str, float]:
    """Soft score of every distinct annotated answer (VQA): how many annotators agree.

    For each annotator the others are asked: min(1, agreeing others / 3); the score is the mean over annotators.
    """
    counts = Counter(process(answer) for answer in answers)
    total = len(answers)
    return {
        answer: (count * min(1.0, (count - 1) / 3) + (total - count) * min(1.0, count / 3)) / total
        for answer, count in counts.items()
    }


def vqa_accuracy(prediction: str, answers: Sequence[str], process: Callable[[str], str] = vqa_answer) -> float:
    """VQA soft accuracy of one answer against (usually ten) annotators."""
    return consensus_scores(answers, process).get(process(prediction), 0.0)


def any_match(prediction: str, answers: Iterable[str], process: Callable[[str], str] = vqa_answer) -> bool:
    """Whether the processed prediction equals any processed answer."""
    return process(prediction) in {process(answer) for answer in answers}


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Levenshtein distance with unit costs."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def anls(prediction: str, answers: Iterable[str], threshold: float = 0.5, *, collapse: bool = True) -> float:
    """Average normalised Levenshtein similarity of one answer: the best over the answers.

    1 - distance / length of the longer string, on lower-cased and stripped text; below `threshold` it is 0.

    Args:
        collapse: Take any run of white space for one space, as the evaluation of DocVQA and InfographicVQA does; that
            of ST-VQA in LLaVA's code does not.
    """

    def clean(text: str) -> str:
        text = text.lower().strip()
        return " ".join(text.split()) if collapse else text

    best = 0.0
    a = clean(prediction)
    for answer in answers:
        b = clean(answer)
        longer = max(len(a), len(b))
        similarity = 1 - edit_distance(a, b) / longer if longer else 1.0
        best = max(best, similarity if similarity >= threshold else 0.0)
    return best


def number_in(text: str) -> float | None:
    """The finite number that a whole text is ("3", "3.0", " 3."), None if it is none."""
    try:
        value = float(text.strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _percentage(text: str) -> float | None:
    text = text.strip()
    value = number_in(text.removesuffix("%"))
    return value / 100 if value is not None and text.endswith("%") else value


def relaxed_match(prediction: str, answer: str, tolerance: float = 0.05) -> bool:
    """ChartQA: numbers within 5 % of a non-zero target ("12%" is 0.12), other text equal ignoring case."""
    value, target = _percentage(prediction), _percentage(answer)
    if value is not None and target:
        return abs(value - target) <= tolerance * abs(target)
    return prediction.strip().lower() == answer.strip().lower()


def token_scores(prediction: str, reference: str) -> dict[str, float]:
    """Word overlap of medical VQA: precision, recall and F1 of lower-cased words.

    True positives are counted with the PREDICTION's multiplicity (a repeated right word counts again); false
    negatives with the reference's. All zero if nothing is shared.
    """
    found, wanted = Counter(prediction.lower().split()), Counter(reference.lower().split())
    hits = sum(count for word, count in found.items() if word in wanted)
    if not hits:
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    precision = hits / found.total()
    recall = hits / (hits + sum(count for word, count in wanted.items() if word not in found))
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


# Choices


def binary_metrics(predictions: Sequence[str], labels: Sequence[str], positive: str = "yes") -> dict[str, float]:
    """Counts and rates of yes/no answers (POPE); a rate whose denominator is zero is 0.

    Returns:
        tp, fp, tn, fn (counts); accuracy, precision, recall, f1, yes_ratio.
    """
    pairs = Counter(
        (prediction == positive, label == positive) for prediction, label in zip(predictions, labels, strict=True)
    )
    tp, fp, tn, fn = pairs[True, True], pairs[True, False], pairs[False, False], pairs[False, True]
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "accuracy": ratio(tp + tn, pairs.total()),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(tp + fp, pairs.total()),
    }


MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_scores(items: Iterable[tuple[str, Hashable, str, str]]) -> dict[str, Any]:
    """MME: per sub-task 100 * (accuracy + share of images with every question right), and their sums.

    Args:
        items: (sub-task, image, prediction text, "yes" or "no") per question.

    Returns:
        perception (at most 2000), cognition (at most 800), by_task {name: {accuracy, accuracy_plus, score}} with all
        values in percent.
    """
    right: dict[str, dict[Hashable, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for task, image, prediction, answer in items:
        right[task][image].append(mme_answer(prediction) == answer.strip().lower())
    by_task = {}
    for task, images in right.items():
        questions = [hit for hits in images.values() for hit in hits]
        accuracy = 100 * sum(questions) / len(questions)
        plus = 100 * sum(all(hits) for hits in images.values()) / len(images)
        by_task[task] = {"accuracy": accuracy, "accuracy_plus": plus, "score": accuracy + plus}
    return {
        "perception": sum(by_task[task]["score"] for task in MME_PERCEPTION if task in by_task),
        "cognition": sum(by_task[task]["score"] for task in MME_COGNITION if task in by_task),
        "by_task": by_task,
    }


def scienceqa_index(text: str, choices: int, options: Sequence[str]) -> int:
    """Index of the chosen option; -1 if no letter is found or it is beyond the `choices` of the question."""
    letter = scienceqa_letter(text, options)
    return options.index(letter) if letter in options[:choices] else -1


def choice_in_reply(prediction: str, reference: str) -> tuple[str, bool] | None:
    """Whether the reference's first bracketed group occurs anywhere in the prediction (CT-RATE multiple choice).

    Returns:
        The group with its brackets and whether it occurs; None if the reference has no bracketed group.
    """
    found = re.search(r"\((.*?)\)", reference.strip())
    return (found.group(), found.group() in prediction.strip()) if found else None


def bracket_choice_match(prediction: str, answer: str) -> bool:
    """MVBench and MLVU: the answer's text between its first "(" and ")" against `bracket_letter` of the prediction."""
    begin, end = answer.find("("), answer.find(")")
    return 0 <= begin < end and bracket_letter(prediction) == answer[begin + 1 : end]


# Boxes


def box_iou(a: Sequence[float], b: Sequence[float], inclusive: bool = False) -> float:
    """Intersection over union of two corner boxes (x1, y1, x2, y2).

    Args:
        inclusive: Corners are pixels that belong to the box, so a side is x2 - x1 + 1 (RefCOCO and MedM-VL scripts).
    """
    one = 1 if inclusive else 0
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + one)
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + one)
    shared = width * height
    areas = sum((box[2] - box[0] + one) * (box[3] - box[1] + one) for box in (a, b))
    return ratio(shared, areas - shared)


# Judges


def judged_answers(judgements: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Video question answering by a judge that says `pred` yes/no and `score` 0 to 5.

    The score is truncated to an integer. "yes" is looked for first, as a substring. A judgement without a readable
    score counts in the average score's denominator and nowhere else.

    Returns:
        yes, no (counts); accuracy = yes / (yes + no); score = mean.
    """
    total = points = yes = no = 0
    for judgement in judgements:
        total += 1
        try:
            points += int(judgement["score"])
            verdict = judgement["pred"].lower()
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            continue
        yes += "yes" in verdict
        no += "yes" not in verdict and "no" in verdict
    return {"yes": yes, "no": no, "accuracy": ratio(yes, yes + no), "score": ratio(points, total)}


def relative_score(pairs: Iterable[Sequence[float]]) -> tuple[float, float, float]:
    """LLaVA-Bench: the candidate's mean in percent of the reference's.

    Means are rounded to three digits before the division; unparsed reviews enter as -1, as published.

    Args:
        pairs: (reference score, candidate score) per question.

    Returns:
        relative score, reference mean x 10, candidate mean x 10; each rounded to one digit.
    """
    pairs = list(pairs)
    reference, candidate = (round(sum(pair[i] for pair in pairs) / len(pairs), 3) for i in (0, 1))
    relative = round(candidate / reference * 100, 1) if reference else 0.0
    return relative, round(reference * 10, 1), round(candidate * 10, 1)
