"""Base classes of benchmarks: questions to ask, a score for the answers, a file for the benchmark's server.

Options of `score`, `questions` and `submission` are keyword arguments; unknown ones are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llavakit.conversation.messages import MEDIA, behind_images, is_media, record_boxes, split_literals
from llavakit.errors import FieldError, RecordError, UserError
from llavakit.evaluation.cases import PICTURE_FIELDS, Cases, Metrics, cases_of
from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.records import Record, pair, read_answers, read_records

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CHINESE = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


@dataclass(frozen=True)
class Turn:
    """One turn of the user.

    Attributes:
        text: The text, in which `<image>` marks the place of a picture.
        media: Content parts: `{"type": "image", "image": PATH or PIL image}`.
    """

    text: str
    media: tuple[Mapping[str, Any], ...] = ()

    def message(self) -> dict[str, Any]:
        """The turn as a message.

        Media go where the text has their marks (`<image>`), if it has as many; otherwise before the text.
        """
        parts = split_literals(self.text)
        places = [part for part in parts if is_media(part)]
        groups: list[list[Mapping[str, Any]]] = []  # an image and its boxes stay together
        for item in self.media:
            if item["type"] == "boxes" and groups:
                groups[-1].append(item)
            else:
                groups.append([item])
        if [place["type"] for place in places] == [group[0]["type"] for group in groups]:
            media = iter(groups)
            content = [own for part in parts for own in (next(media) if is_media(part) else [part])]
        else:
            text = "".join(part["text"] for part in parts if not is_media(part))
            text = text.strip() if places else text
            content = [*self.media, {"type": "text", "text": text}]
        return {"role": "user", "content": [dict(part) for part in content]}


@dataclass(frozen=True)
class Question:
    """One question as it is put to a model.

    Attributes:
        question_id: As in the published file.
        text: The user's text, with hints and the response-format sentence.
        media: Content parts that come before the text: `{"type": "image", "image": PATH or PIL image}`; the boxes of an
            image (`{"type": "boxes", ...}`) behind it.
        stored: Further fields to keep with the prediction (the prompt, the round of a circular question).
        later: Further turns of the user, asked one after another behind the model's own answers; the last answer is
            the prediction.
        replies: Given replies that the model ranks by their likelihood instead of writing one.
    """

    question_id: str | int
    text: str
    media: tuple[Mapping[str, Any], ...] = ()
    stored: Mapping[str, Any] = field(default_factory=dict)
    later: tuple[Turn, ...] = ()
    replies: tuple[str, ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """What is asked first, as one user message; see `Turn.message`."""
        return [Turn(self.text, self.media).message()]

    def turns(self) -> list[dict[str, Any]]:
        """All turns of the user as messages."""
        return [*self.messages(), *(turn.message() for turn in self.later)]


class Benchmark:
    """A benchmark; subclasses define the format of its files.

    Attributes:
        title: Name in the literature.
        max_new_tokens: Longest answer in the published evaluation.
        questions_are_gold: Whether the question file holds the gold answers too.
        picture_fields: Fields of a gold record that say which picture its question is about; for intervals.
    """

    title: ClassVar[str]
    max_new_tokens: ClassVar[int] = 128
    questions_are_gold: ClassVar[bool] = False
    picture_fields: ClassVar[tuple[str, ...]] = PICTURE_FIELDS

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """The questions of a published question file.

        Args:
            path: The file.
            images: Folder that image names are relative to; by default the folder of the file.

        Raises:
            RecordError: If a record lacks a field.
        """
        raise UserError(f"{self.title}: asking its questions is not supported; score a predictions file instead")

    def score(self, predictions: str | Path, gold: str | Path | None, **options: Any) -> dict[str, Any]:
        """Metrics of a predictions file (JSONL of `question_id` and `text`) against a gold file.

        Returns:
            Metric name -> number, None where undefined, or a table {row: {column: number}}. Rates are in percent. As
            `Metrics` they know the cases that they were computed from, and get intervals.

        Raises:
            RecordError: If a record is broken, or predictions and gold do not belong together.
        """
        raise NotImplementedError

    def cases(
        self,
        pairs: Iterable[Pair],
        measures: Mapping[str, Measure],
        tables: Mapping[str, Sequence[Any]] | None = None,
        pictures: Sequence[Hashable] | None = None,
    ) -> Cases:
        """The cases of a score, see `llavakit.evaluation.cases.cases_of`."""
        return cases_of(pairs, measures, tables, pictures=pictures, fields=self.picture_fields)

    def submission(
        self, predictions: str | Path, output: str | Path, questions: str | Path | None = None, **options: Any
    ) -> Path:
        """Write the file that the benchmark's server or official script takes.

        Args:
            questions: The test split, where the submission must hold every question of it.

        Raises:
            UserError: If the benchmark has no such file, or predictions are missing that it needs.
        """
        raise UserError(f"{self.title}: has no submission file; its score is computed locally")


def text_of(prediction: Record | None) -> str | None:
    """A prediction's text; None for a question without one."""
    return None if prediction is None else prediction.get("text", str)


def need_gold(gold: str | Path | None, title: str, what: str) -> Path:
    """The gold path.

    Raises:
        UserError: If there is none; the message says what it should be.
    """
    if gold is None:
        raise UserError(f"{title}: give --gold FILE ({what})")
    return Path(gold)


def media_parts(record: Record, folder: Path) -> tuple[dict[str, Any], ...]:
    """The content parts for a record's fields `image`, `video` and `volume`: a file name or a list of them each.

    Boxes of the images (`boxes`) come behind them.
    """
    parts = []
    for modality in MEDIA:
        value = record.get(modality, (str, list), None)
        names = [] if value is None else [value] if isinstance(value, str) else value
        if not all(isinstance(name, str) and name for name in names):
            raise record.error(modality, "must be a file name or a list of file names")
        parts += [{"type": modality, modality: str(folder / name)} for name in names]
    if record.data.get("boxes") is not None:
        try:
            boxes = record_boxes(record.data, sum(part["type"] == "image" for part in parts))
        except FieldError as error:
            raise record.error(error.field, error.problem) from None
        parts = behind_images(parts, boxes) if boxes else parts
    return tuple(parts)


def folder_of(path: str | Path, images: str | Path | None) -> Path:
    """The folder that image names are relative to."""
    return Path(images) if images is not None else Path(path).parent


def percent(fraction: float | None) -> float | None:
    """100 x fraction; None stays None."""
    return None if fraction is None else 100 * fraction


def write_json(path: str | Path, value: Any, default: Callable[[Any], Any] | None = None) -> Path:
    """Write a JSON file; returns its path.

    Args:
        default: What is written for a value that JSON does not have.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, default=default), encoding="utf-8")
    return path


def write_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a JSONL file; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def stored_questions(
    path: str | Path, images: str | Path | None, suffix: str = "", keep: tuple[str, ...] = ()
) -> list[Question]:
    """The questions of a JSONL in LLaVA's format: `question_id`, `image`, `text` with the prompt in it.

    Args:
        suffix: Response-format sentence, appended as a line to texts that do not have it.
        keep: Fields to keep with the prediction.
    """
    folder = folder_of(path, images)
    questions = []
    for record in read_records(path):
        text = record.get("text", str)
        if suffix and suffix not in text:
            text = f"{text}\n{suffix}"
        kept = {name: record.data[name] for name in keep if name in record.data}
        name = record.get("question_id", (str, int))
        questions.append(Question(name, text, media_parts(record, folder), {"prompt": text, **kept}))
    return questions


def is_lines(path: str | Path) -> bool:
    """Whether a question file is JSONL in LLaVA's format rather than the benchmark's own JSON."""
    try:
        return all(isinstance(record.data.get("text"), str) for record in read_records(path)[:1])
    except RecordError:
        return False


# Benchmarks that pair, read and score


Pair = tuple[Record, Record | None]
Scored = Sequence[tuple[Record, float]]


class PairedBenchmark(Benchmark):
    """A benchmark that pairs every gold record with its prediction and takes the mean of a value per question.

    A subclass says how its question file becomes prompts (`question`), how gold is read (`read_gold`), and what one
    answer is worth (`value`, between 0 and 1).

    Attributes:
        gold_file: What the gold file should be, for messages.
        suffix: Response-format sentence, appended to questions of LLaVA's JSONL that do not have it.
        keep: Fields of a question that are stored with its prediction.
        metric: Name of the mean, in percent.
        tables: Name of a table -> field of the gold record whose values are its rows.
    """

    gold_file: ClassVar[str] = "JSONL of question_id and answer"
    suffix: ClassVar[str] = ""
    keep: ClassVar[tuple[str, ...]] = ()
    metric: ClassVar[str] = "accuracy"
    tables: ClassVar[Mapping[str, str]] = {}

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """Questions of LLaVA's JSONL, or of the benchmark's own file."""
        if is_lines(path):
            return stored_questions(path, images, self.suffix, self.keep)
        folder = folder_of(path, images)
        return [self.question(record, folder, **options) for record in self.read_questions(path)]

    def read_questions(self, path: str | Path) -> list[Record]:
        """The records of the benchmark's own question file; by default it is the gold file."""
        return self.read_gold(path)

    def question(self, record: Record, folder: Path, **options: Any) -> Question:
        """The question that a record of the benchmark's own file asks; its media are in `folder`."""
        raise record.error("text", f"is missing; {self.title} is asked from LLaVA's JSONL (question_id, image, text)")

    def read_gold(self, path: str | Path) -> list[Record]:
        """The records of a gold file."""
        return read_records(path)

    def prediction_key(self, prediction: Record) -> Any:
        """What identifies a prediction's question."""
        return prediction.id

    def gold_key(self, question: Record) -> Any:
        """What identifies a gold record's question."""
        return question.id

    def pairs(self, predictions: str | Path, gold: str | Path | None, missing: str, extra: str) -> list[Pair]:
        """Every gold record with its prediction, see `llavakit.evaluation.records.pair`."""
        questions = self.read_gold(need_gold(gold, self.title, self.gold_file))
        keys = {"key": self.prediction_key, "gold_key": self.gold_key}
        return list(pair(questions, read_answers(predictions), **keys, missing=missing, extra=extra))

    def value(self, question: Record, text: str) -> float:
        """What an answer is worth, between 0 and 1."""
        raise NotImplementedError(f"{type(self).__name__} must define value")

    def score(
        self, predictions: str | Path, gold: str | Path | None, *, missing: str = "error", extra: str = "error"
    ) -> dict[str, Any]:
        """Mean value in percent, in total and by the groups of `tables`.

        Args:
            missing: What a question without a prediction is: an "error", or "wrong" (worth 0).
            extra: What a prediction without a question is: an "error", or left out ("ignore").
        """
        return self.score_pairs(self.pairs(predictions, gold, missing, extra), self.value)

    def score_pairs(self, pairs: Sequence[Pair], value: Callable[[Record, str], float]) -> dict[str, Any]:
        """The summary of pairs by the value of every answer; a question without prediction is worth 0."""
        scored = []
        for question, prediction in pairs:
            text = text_of(prediction)
            scored.append((question, 0.0 if text is None else float(value(question, text))))
        return Metrics(self.summary(scored), self.cases(pairs, self.measures(scored), self.rows(scored)))

    def summary(self, scored: Scored) -> dict[str, Any]:
        """Metrics from all questions and their values."""
        metrics: dict[str, Any] = {self.metric: percent(mean(value for _, value in scored)), "count": len(scored)}
        for table, name in self.tables.items():
            rows = by_field(scored, name)
            if rows:
                metrics[table] = {row: percent(mean(values)) for row, values in rows.items()}
        return metrics

    def measures(self, scored: Scored) -> dict[str, Measure]:
        """The metrics of `summary` that have an interval, the main one first."""
        return {self.metric: Measure.mean([value for _, value in scored])}

    def rows(self, scored: Scored) -> dict[str, list[Any]]:
        """In which row of every table of `summary` a question counts."""
        return {table: [question.data.get(name) for question, _ in scored] for table, name in self.tables.items()}


def field_text(question: Record, name: str) -> str | None:
    """The content of a field as text, None where it is null or missing."""
    value = question.data.get(name)
    return None if value is None else str(value)


def by_field(scored: Scored, name: str) -> dict[str, list[float]]:
    """Values by the content of a field, as text; questions without it are left out."""
    rows: dict[str, list[float]] = {}
    for question, value in scored:
        if (text := field_text(question, name)) is not None:
            rows.setdefault(text, []).append(value)
    return rows


def image_of(path: Path) -> dict[str, str]:
    """The content part of an image file."""
    return {"type": "image", "image": str(path)}
