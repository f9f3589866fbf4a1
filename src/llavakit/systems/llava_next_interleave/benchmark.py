"""The LLaVA-Interleave Bench: questions over several pictures from records in the M4 format, scored by data set.

Record: `sample_id`, `image` (a name or several), `conversations`, `metadata` with `dataset` and `question_type`
("open-ended" or "multi-choice"). The published test files hold such records; they are questions and gold at once. A
conversation of several turns is asked turn by turn, and the last answer counts. Result files of the authors' script
(`dataset`, `question_type`, `sample_id`, `gt_response`, `pred_response`) are scored without a gold file.

The published figures rest on the script's prompts (`--template qwen_1_5_pieces`) and on scores by `variant=published`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.conversation.messages import Message, from_llava, is_media, to_llava
from llavakit.errors import FieldError
from llavakit.evaluation.benchmarks.base import (
    Benchmark,
    Question,
    Turn,
    folder_of,
    need_gold,
    percent,
    text_of,
    write_json,
)
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.metrics.resampling import divide
from llavakit.evaluation.records import Record, choose, pair, read_answers, read_records
from llavakit.systems.llava_next_interleave import scoring

KINDS = ("open-ended", "multi-choice")
CHOICES = "nlrv2"  # a data set of this name is multiple choice unless its records say open-ended, as published


@dataclass(frozen=True)
class Row:
    """A prediction with its reference.

    Attributes:
        record: Where it stands.
        kind_field: The field that says the kind of question.
    """

    dataset: str
    sample_id: str
    reference: str
    prediction: str
    record: Record
    kind_field: str

    @property
    def kind(self) -> str:
        """The kind of question, "open-ended" or "multi-choice".

        Raises:
            RecordError: If the record says something else.
        """
        return kind_of(self.record, self.kind_field)

    @property
    def is_open(self) -> bool:
        """Whether the script scores it as an open answer."""
        if self.dataset == CHOICES and self.record.data.get(self.kind_field) != "open-ended":
            return False
        return self.kind == "open-ended"


class InterleaveBench(Benchmark):
    """ROUGE-L or accuracy by data set, and unweighted means over the data sets of a category."""

    title = "LLaVA-Interleave Bench"
    max_new_tokens = 1024
    questions_are_gold = True

    def questions(
        self,
        path: str | Path,
        images: str | Path | None = None,
        *,
        mcq_post_prompt: str = "",
        oe_post_prompt: str = "",
    ) -> list[Question]:
        """The records' turns of the user.

        Args:
            mcq_post_prompt, oe_post_prompt: What the evaluation harness writes behind multiple choices and open
                questions; the first line of a multiple choice is then all that is asked, as published.
        """
        folder = folder_of(path, images)
        questions = []
        for record in read_records(path):
            dataset, kind = of_dataset(record)
            asked = [turn_of(message, folder) for message in messages_of(record) if message["role"] == "user"]
            first, *later = asked
            text = scoring.harness_question(first.text, kind, mcq_post_prompt, oe_post_prompt)
            stored = {"dataset": dataset, "question_type": kind, "prompt": text}
            questions.append(Question(name_of(record), text, first.media, stored, tuple(later)))
        return questions

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        variant: str = "published",
        report: str | Path | None = None,
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Categories and data sets, in percent.

        Args:
            predictions: Predictions, or a result file of the authors' script, which brings its own references.
            gold: The test file.
            variant: "published" scores as the authors' script does, "harness" as lmms-eval's task does; their figures
                cannot be compared.
            report: JSON file for the values of every data set, category and sample, as fractions.
            missing: What a question without a prediction is: an "error", or "wrong".
            extra: What a prediction without a question is: an "error", or left out ("ignore").
        """
        choose(variant, "variant", ("published", "harness"))
        rows = self._rows(predictions, gold, missing, extra)
        found = published(rows) if variant == "published" else harness(rows)
        if report is not None:
            write_json(report, found.report())
        counted = [row for row, _ in found.values]
        places = {
            "categories": [found.category_of(row) for row in counted],
            "datasets": [row.dataset for row in counted],
        }
        cases = self.cases([(row.record, None) for row in counted], found.measures(), places)
        return Metrics(found.metrics(), cases)

    def _rows(self, predictions: str | Path, gold: str | Path | None, missing: str, extra: str) -> list[Row]:
        records = read_records(predictions)
        if gold is None and all("gt_response" in record.data for record in records):
            return [result_row(record) for record in records]
        questions = read_records(need_gold(gold, self.title, "the test file, records with conversations and metadata"))
        pairs = pair(
            questions, read_answers(predictions), key=lambda r: r.id, gold_key=name_of, missing=missing, extra=extra
        )
        return [gold_row(question, text_of(answer) or "") for question, answer in pairs]


# Records


def of_dataset(record: Record) -> tuple[str, str]:
    """Name of a record's data set, and its kind of question.

    Raises:
        RecordError: If the metadata do not say them.
    """
    metadata = metadata_of(record)
    return metadata.get("metadata.dataset", str), kind_of(metadata, "metadata.question_type")


def metadata_of(record: Record) -> Record:
    """The fields of a record's metadata under their dotted names."""
    fields = record.get("metadata", dict)
    return Record(record.file, record.line, {f"metadata.{key}": value for key, value in fields.items()})


def kind_of(record: Record, field: str) -> str:
    """The kind of question that a field names."""
    kind = record.get(field, str)
    if kind not in KINDS:
        raise record.error(field, f"must be {' or '.join(KINDS)}, is {kind[:200]!r}")
    return kind


def name_of(record: Record) -> str:
    """What identifies a question: data sets number their samples each for itself."""
    return f"{of_dataset(record)[0]}/{record.get('sample_id', (str, int))}"


def messages_of(record: Record) -> list[Message]:
    """The conversation without an assistant's turn in front.

    Raises:
        RecordError: If marks and pictures differ in number, or there is no turn of the user.
    """
    try:
        messages = from_llava(record.data)
    except FieldError as error:
        raise record.error(error.field, error.problem) from None
    messages = messages[1:] if messages[0]["role"] == "assistant" else messages
    if not any(message["role"] == "user" for message in messages):
        raise record.error("conversations", "holds no turn of the user")
    return messages


def turn_of(message: Message, folder: Path) -> Turn:
    """A user's turn with the places of its pictures in the text, and their files."""
    media = []
    for part in message["content"]:
        if is_media(part):
            name = part[part["type"]]
            media.append({"type": part["type"], part["type"]: str(folder / name) if isinstance(name, str) else name})
    return Turn(to_llava([message])["conversations"][0]["value"], tuple(media))


def gold_row(record: Record, prediction: str) -> Row:
    """A test record with its prediction; the reference is the last turn of the assistant.

    Raises:
        RecordError: If it has none.
    """
    answers = [turn for turn in to_llava(messages_of(record))["conversations"] if turn["from"] == "gpt"]
    if not answers:
        raise record.error("conversations", "holds no answer to compare with")
    metadata = metadata_of(record)
    sample_id = str(record.get("sample_id", (str, int)))
    dataset, kind_field = metadata.get("metadata.dataset", str), "metadata.question_type"
    return Row(dataset, sample_id, answers[-1]["value"], prediction, metadata, kind_field)


def result_row(record: Record) -> Row:
    """A line of the script's result file."""
    return Row(
        record.get("dataset", str),
        str(record.get("sample_id", (str, int, float, bool, type(None)))),
        record.get("gt_response", str),
        record.get("pred_response", str),
        record,
        "question_type",
    )


# Scores


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        datasets: Metric's name and value of every data set, fractions.
        counts: Number of samples that were counted.
        details: Scores of the samples of every data set.
        categories: Value of every category.
        overall: Further means by name.
        values: Every sample that was counted, and its score.
        weights: Name of a further mean -> the part that each of its data sets has in it.
    """

    datasets: Mapping[str, tuple[str, float | None]]
    counts: Mapping[str, int]
    details: Mapping[str, list[dict[str, Any]]]
    categories: Mapping[str, float]
    overall: Mapping[str, float | None]
    values: Sequence[tuple[Row, float]]
    weights: Mapping[str, Mapping[str, float]]

    @staticmethod
    def category_of(row: Row) -> str | None:
        """The category that a sample's data set belongs to, None for none."""
        return next((name for name, sets in scoring.HARNESS_CATEGORIES.items() if row.dataset in sets), None)

    def measures(self) -> dict[str, Measure]:
        """The values of categories (first), of data sets, and the further means."""
        scores = [score for _, score in self.values]
        by_sample, sets = Measure.mean(scores), [row.dataset for row, _ in self.values]
        main = Measure.macro(scores, sets) if self.weights else by_sample
        found = {"mean": main} | {metric: by_sample for metric, _ in self.datasets.values()}
        if "overall" in self.overall:
            found["overall"] = Measure.macro(scores, [self.category_of(row) for row, _ in self.values])
        for name, parts in self.weights.items():
            if self.overall[name] is not None:
                mine = np.array([[own == known for known in parts] for own in sets], float)
                table = np.concatenate([mine * by_sample.table[:, :1], mine], axis=1)
                found[name] = Measure(table, functools.partial(_weighted, np.array(list(parts.values()))))
        return found

    def report(self) -> dict[str, Any]:
        """Everything as fractions, under the names of the authors' script."""
        return {
            "datasets": {name: {metric: value} for name, (metric, value) in self.datasets.items()},
            "details": dict(self.details),
            "categories": dict(self.categories),
            **self.overall,
        }

    def metrics(self) -> dict[str, Any]:
        """Rates in percent."""
        datasets = {
            name: {metric: percent(value), "count": self.counts[name]}
            for name, (metric, value) in self.datasets.items()
        }
        categories = {name: percent(value) for name, value in self.categories.items()}
        means = {name: percent(value) for name, value in self.overall.items()}
        return means | {"count": sum(self.counts.values()), "categories": categories, "datasets": datasets}


def _weighted(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Weighted sum of the ratios of the first half of sums and the second."""
    return divide(*np.split(sums, 2, axis=-1)) @ weights


def by_dataset(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by data set, in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.dataset, []).append(row)
    return found


def published(rows: Sequence[Row]) -> Scores:
    """As the authors' script: the first sample of a data set says which metric all of them get."""
    datasets: dict[str, tuple[str, float | None]] = {}
    details: dict[str, list[dict[str, Any]]] = {}
    counts, every = {}, []
    for name, own in by_dataset(rows).items():
        if own[0].is_open:
            metric = "Rouge-L f"
            pairs = [(row, scoring.overlap(row.prediction, row.reference)) for row in own]
            scored = [(row, value) for row, value in pairs if value is not None]
            details[name] = [{"id": row.sample_id, "score": str(round(value, 3))} for row, value in scored]
        else:
            metric = "Accuracy"
            scored = [(row, scoring.chosen(row.prediction, row.reference)) for row in own]
            details[name] = [{"id": row.sample_id, "score": str(int(value))} for row, value in scored]
        datasets[name] = metric, mean(value for _, value in scored)
        counts[name] = len(scored)
        every += [(row, float(value)) for row, value in scored]
    values = {name: value for name, (_, value) in datasets.items()}
    categories = scoring.category_means(values)
    overall = {
        "in_domain": scoring.average_of(scoring.IN_DOMAIN, categories),
        "out_of_domain": scoring.average_of(scoring.OUT_OF_DOMAIN, values),
    }
    known = {category: [name for name in scoring.CATEGORIES[category] if name in values] for category in categories}
    weights = {
        "in_domain": {
            name: 1 / len(scoring.IN_DOMAIN) / len(known[category])
            for category in scoring.IN_DOMAIN
            for name in known.get(category, ())
        },
        "out_of_domain": dict.fromkeys(scoring.OUT_OF_DOMAIN, 1 / len(scoring.OUT_OF_DOMAIN)),
    }
    return Scores(datasets, counts, details, categories, overall, every, weights)


def harness(rows: Sequence[Row]) -> Scores:
    """As the harness: every sample by its own kind of question, categories as means over samples."""
    datasets: dict[str, tuple[str, float | None]] = {}
    details: dict[str, list[dict[str, Any]]] = {}
    every, counts, scored = [], {}, []
    for name, own in by_dataset(rows).items():
        value_of = {"multi-choice": scoring.harness_chosen, "open-ended": scoring.harness_overlap}
        values = [float(value_of[row.kind](row.prediction, row.reference)) for row in own]
        details[name] = [{"id": row.sample_id, "score": value} for row, value in zip(own, values, strict=True)]
        datasets[name] = "score", mean(values)
        counts[name] = len(values)
        every += [(name, value) for value in values]
        scored += zip(own, values, strict=True)
    categories, overall = scoring.harness_overall(every)
    return Scores(datasets, counts, details, categories, {"overall": overall}, scored, {})
