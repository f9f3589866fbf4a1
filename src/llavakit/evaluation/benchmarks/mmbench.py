"""MMBench: multiple-choice questions, asked again with rotated options ("circular": all rounds must be right).

Published file: a TSV with `index`, `question`, `hint`, `A` to `D`, `answer`, `category` and the image in base64. The
official server extracts choices with a language model and computes circular accuracy; `score` does it locally with
the rules of `processors.option_letter`, on the splits whose answers are public (dev). Source: spec of LLaVA-1.5,
section 7.
"""

from __future__ import annotations

import base64
import binascii
import csv
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import (
    LETTER,
    LETTER_CHINESE,
    Benchmark,
    Question,
    folder_of,
    need_gold,
    percent,
)
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import grouped_mean, mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.processors import option_letter
from llavakit.evaluation.records import Record, pair, read_answers, read_table

LETTERS = ("A", "B", "C", "D")
_CIRCULAR_STRIDE = 1_000_000  # copies of a question with rotated options have index + k * stride
_NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")


def is_missing(value: Any) -> bool:
    """Whether a cell of the table counts as empty: None, NaN, "nan", "none"."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.lower() in ("nan", "none")


def rounds(
    row: Mapping[str, Any], all_rounds: bool = False, chinese: bool = False, letters: Sequence[str] = LETTERS
) -> list[dict[str, Any]]:
    """The prompts of one row: one, or with `all_rounds` one per option.

    Options stop at the first missing one. Each round rotates them left by one while the printed letters stay in
    order; `option_char` are the original letters in the order shown.

    Returns:
        For each round: round_id, prompt (stored), message (with placeholder and letter sentence), options, option_char.
    """
    options = []
    for letter in letters:
        if is_missing(row.get(letter)):
            break
        options.append(row[letter])
    chars = list(letters[: len(options)])
    question = row["question"] if is_missing(row.get("hint")) else f"{row['hint']}\n{row['question']}"
    sentence = LETTER_CHINESE if chinese else LETTER
    found = []
    for turn in range(len(options) if all_rounds else 1):
        shown = options[turn:] + options[:turn]
        lines = [f"{letter}. {option}" for letter, option in zip(letters, shown, strict=False)]
        prompt = "\n".join([question, *lines])
        found.append(
            {
                "round_id": turn,
                "prompt": prompt,
                "message": f"<image>\n{prompt}\n{sentence}",
                "options": shown,
                "option_char": chars[turn:] + chars[:turn],
            }
        )
    return found


def _image(row: Record, folder: Path) -> Any:
    """The row's image: the bytes of base64 data, or a file of the folder."""
    data = row.get("image", str, None)
    if data is None:
        raise row.error("image", "is missing; give base64 data or a file name")
    if len(data) < 256:
        return str(folder / data)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.error("image", f"is not base64 data: {error}") from error


class MMBench(Benchmark):
    """Accuracy of single rounds, and circular accuracy where all rounds were asked."""

    title = "MMBench"
    max_new_tokens = 1024
    chinese: ClassVar[bool] = False
    letters: ClassVar[Sequence[str]] = LETTERS  # columns of options

    def questions(
        self, path: str | Path, images: str | Path | None = None, *, all_rounds: bool = False, **options: Any
    ) -> list[Question]:
        """Questions of the published TSV.

        Args:
            all_rounds: Ask every rotation of the options too.
        """
        folder, found = folder_of(path, images), []
        for row in read_table(path, ("index", "question", "A")):
            name = row.get("index", str)
            media = ({"type": "image", "image": _image(row, folder)},)
            for turn in rounds(row.data, all_rounds, self.is_chinese(row.data), self.letters):
                stored = {key: turn[key] for key in ("round_id", "prompt", "options", "option_char")}
                found.append(Question(int(name) if _is_number(name) else name, turn["message"], media, stored))
        return found

    def is_chinese(self, row: Mapping[str, Any]) -> bool:
        """Whether a question is asked for its letter in Chinese."""
        return self.chinese

    def chosen(self, record: Record, row: Record) -> str | None:
        """The original letter of the option that a prediction chose."""
        return _chosen(record, row)

    def score(
        self, predictions: str | Path, gold: str | Path | None, *, missing: str = "error", extra: str = "error"
    ) -> dict[str, Any]:
        """Accuracy over rounds, circular accuracy over questions, and accuracy by category.

        Args:
            gold: The TSV with `index` and `answer`. Rotated copies that it holds (index + k * 1,000,000) count as
                rounds of one question, as do the rounds of the predictions file.
            missing: "wrong" also counts a round that was not asked of a question whose other rounds were, or the
                question as a whole, as wrong.
        """
        gold = need_gold(gold, self.title, "the TSV with index and answer")
        asked = _rounds_by_id(read_answers(predictions))
        rows = read_table(gold, ("index", "answer"))
        first = [next(iter(records.values())) for records in asked.values()]
        pairs = list(pair(rows, first, gold_key=lambda row: row.get("index", str), missing=missing, extra=extra))
        circular = any(len(records) > 1 for records in asked.values())
        copies = Counter(_base(row.data["index"]) for row in rows)
        hits: list[tuple[str, bool]] = []  # (base question, round right)
        rounds_: list[tuple[Record, Record | None]] = []
        for row, prediction in pairs:
            answer = row.get("answer", str).strip().upper()
            records = asked[prediction.id] if prediction is not None else {}
            count = _options(row, records, self.letters) if circular and copies[_base(row.data["index"])] == 1 else 1
            if len(records) < count and missing == "error":
                raise row.error(
                    "index",
                    f"{row.data['index']!r} has predictions of {len(records)} of its {count} rounds; finish the run, "
                    "or score with missing=wrong to count the others as wrong",
                )
            for number in range(max(count, len(records))):
                record = list(records.values())[number] if number < len(records) else None
                hit = record is not None and self.chosen(record, row) == answer
                hits.append((_base(row.data["index"]), hit))
                rounds_.append((row, record))
        rows_ = [row.data.get("category") or None for row, _ in rounds_]
        categories = [(name, hit) for name, (_, hit) in zip(rows_, hits, strict=True) if name is not None]
        metrics: dict[str, Any] = {"accuracy": percent(mean(hit for _, hit in hits)), "count": len(hits)}
        groups: dict[str, list[bool]] = defaultdict(list)
        for base, hit in hits:
            groups[base].append(hit)
        if len(groups) < len(hits):
            metrics["circular_accuracy"] = percent(mean(all(group) for group in groups.values()))
            metrics["circular_count"] = len(groups)
        if categories:
            metrics["by_category"] = {name: percent(value) for name, value in grouped_mean(categories).items()}
        bases = [base for base, _ in hits]
        last = {base: number for number, base in enumerate(bases)}  # where the circular verdict on a question stands
        circled = [all(groups[base]) if last[base] == number else None for number, base in enumerate(bases)]
        measures = {"accuracy": Measure.mean([hit for _, hit in hits]), "circular_accuracy": Measure.mean(circled)}
        return Metrics(metrics, self.cases(rounds_, measures, {"by_category": rows_}, bases))

    def submission(
        self, predictions: str | Path, output: str | Path, questions: str | Path | None = None, **options: Any
    ) -> Path:
        """The server's table: the question file without hint, category, source and image, with `prediction`.

        Written as TSV, or as XLSX (which the server wants) if the output ends so and openpyxl is installed.
        """
        if questions is None:
            raise UserError(f"{self.title}: give the TSV as the question file; the upload repeats its rows")
        rows = read_table(questions, ("index", "question"))
        texts = {record.id: record.get("text", str) for record in reversed(read_answers(predictions))}
        header = [name for name in rows[0].data if name not in _NOT_SUBMITTED] if rows else []
        header.insert(6, "prediction")
        lines = []
        for row in rows:
            if row.data["index"] not in texts:
                raise row.error("index", f"{row.data['index']!r} has no prediction; MMBench takes complete files only")
            values = {**row.data, "prediction": texts[row.data["index"]]}
            lines.append([values[name] for name in header])
        return _write_table(Path(output), header, lines)


class MMBenchChinese(MMBench):
    """MMBench-CN: the same with Chinese questions and letter sentence."""

    title = "MMBench-CN"
    chinese = True


def _base(index: str) -> str:
    return str(int(index) % _CIRCULAR_STRIDE) if _is_number(index) else index


def _is_number(index: str) -> bool:
    return index.isascii() and index.isdigit() and len(index) < 19


def _rounds_by_id(answers: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Predictions by question and round.

    Raises:
        RecordError: If a round was answered twice.
    """
    found: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in answers:
        number = record.get("round_id", int, 0)
        if number in found[record.id]:
            before = found[record.id][number].line
            raise record.error("question_id", f"{record.id!r}, round {number}, was used in line {before} already")
        found[record.id][number] = record
    return found


def _options(row: Record, rounds_: Mapping[int, Record], letters: Sequence[str]) -> int:
    """Number of options of a question, which is that of its rounds."""
    shown = list(itertools.takewhile(lambda letter: not is_missing(row.data.get(letter)), letters))
    stored = [len(record.get("option_char", list, [])) for record in rounds_.values()]
    return len(shown) or max(stored, default=0) or len(LETTERS)


def _chosen(record: Record, row: Record) -> str | None:
    """The original letter of the option that a prediction chose."""
    order = record.get("option_char", list, list(LETTERS))
    shown = record.get("options", list, [row.data.get(letter) for letter in LETTERS])
    texts = ["" if is_missing(text) else str(text) for text in shown]
    letter = option_letter(record.get("text", str), LETTERS[: len(order)], texts)
    return order[LETTERS.index(letter)] if letter else None


def _write_table(path: Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".xlsx":
        try:
            from openpyxl import Workbook
        except ImportError as error:
            raise UserError(
                f"{path}: writing XLSX needs openpyxl (pip install openpyxl); or name a .tsv file"
            ) from error
        book = Workbook()
        for line in (header, *lines):
            book.active.append(list(line))
        book.save(path)
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *lines])
    return path
