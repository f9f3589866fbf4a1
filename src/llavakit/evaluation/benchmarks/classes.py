"""Questions whose answer is one of fixed classes, answered in free text.

Record: `question_id`, `text` or `question`, `answer` (a label), and `image`, `video` or `volume`. A reply is mapped to
a class (`metrics.classes.ClassAnswers`) or is invalid: then it is wrong, and belongs to no class of the averages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llavakit.errors import quoted
from llavakit.evaluation.benchmarks.base import (
    Benchmark,
    Pair,
    Question,
    folder_of,
    media_parts,
    need_gold,
    percent,
    text_of,
)
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.classes import ClassAnswers, macro_scores
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.metrics.resampling import divide
from llavakit.evaluation.records import Record, pair, read_answers, read_records

Media = tuple[Mapping[str, Any], ...]


class Classes(Benchmark):
    """Accuracy, macro precision, recall and F of free answers over fixed classes.

    Attributes:
        labels: The classes; empty for those that the answers of the gold file are.
    """

    title = "Classes in free text"
    max_new_tokens = 64
    questions_are_gold = True
    labels: ClassVar[tuple[str, ...]] = ()

    def ask(self, record: Record, media: Media, choices: Sequence[str] = ()) -> Question:
        """The question of a record about its media; with `choices`, it names the classes."""
        text = record.get("question" if "question" in record.data else "text", str)
        if choices:
            text += f"\nAnswer with one of: {', '.join(choices)}."
        return Question(record.id, text, media, {"prompt": text})

    def questions(self, path: str | Path, images: str | Path | None = None, *, choices: bool = False) -> list[Question]:
        """The questions of a JSONL file.

        Args:
            choices: Whether a question names the classes.
        """
        records = read_records(path)
        named = self.classes(records) if choices else ()
        return [self.ask(record, media_parts(record, folder_of(path, images)), named) for record in records]

    def classes(self, records: Sequence[Record]) -> Sequence[str]:
        """The classes of gold records."""
        return self.labels or sorted({record.get("answer", str) for record in records})

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        labels: list[str] | None = None,
        zero_division: float = 1.0,
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Accuracy, macro averages and the rate of invalid replies in percent.

        Args:
            labels: The classes; default: the answers of the gold file.
            zero_division: Precision of a class that is never predicted, see `metrics.classes.macro_scores`.
        """
        records = read_records(need_gold(gold, self.title, "JSONL of question_id and answer"))
        pairs = list(pair(records, read_answers(predictions), missing=missing, extra=extra))
        return self.score_pairs(pairs, labels or self.classes(records), zero_division)

    def score_pairs(self, pairs: Sequence[Pair], labels: Sequence[str], zero_division: float = 1.0) -> dict[str, Any]:
        """Scores of gold records and their predictions.

        Raises:
            RecordError: If a gold answer is none of the classes.
        """
        mapped, numbers = ClassAnswers(labels), {label: number for number, label in enumerate(labels)}
        truth, found = [], []
        for record, answer in pairs:
            label = record.get("answer", str)
            if label not in numbers:
                raise record.error("answer", f"is {quoted(label)}, which is no class of {self.title}")
            truth.append(numbers[label])
            found.append(mapped(text_of(answer) or ""))
        invalid = sum(label is None for label in found)
        scores = {
            name: percent(value) for name, value in macro_scores(truth, found, zero_division=zero_division).items()
        }
        metrics = scores | {"invalid_rate": percent(invalid / len(found)), "invalid": invalid, "count": len(found)}
        measures = class_measures(truth, found, len(labels), zero_division)
        return Metrics(
            metrics, self.cases(pairs, measures | {"invalid_rate": Measure.mean([n is None for n in found])})
        )


def class_measures(
    truth: Sequence[int], found: Sequence[int | None], classes: int, zero_division: float
) -> dict[str, Measure]:
    """`macro_scores` as measures: of every class how often it is right, is the truth, and is said."""
    right = [label == guess for label, guess in zip(truth, found, strict=True)]
    one = np.eye(classes + 1)
    is_truth, is_said = one[list(truth)], one[[classes if guess is None else guess for guess in found]]
    hit = is_truth * np.array(right, float)[:, None]
    table = np.stack([hit, is_truth, is_said], axis=1)[..., :classes].reshape(len(truth), -1)

    def macro(rate: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Measure:
        def value(sums: np.ndarray) -> np.ndarray:
            hits, occurs, said = np.split(sums, 3, axis=-1)
            counted = (occurs + said) > 0
            return divide((rate(hits, occurs, said) * counted).sum(-1), counted.sum(-1))

        return Measure(table, value)

    return {
        "accuracy": Measure.mean(right),
        "precision": macro(lambda hits, occurs, said: divide(hits, said, zero_division)),
        "recall": macro(lambda hits, occurs, said: divide(hits, occurs, zero_division)),
        "fscore": macro(lambda hits, occurs, said: divide(2 * hits, occurs + said, zero_division)),
    }
