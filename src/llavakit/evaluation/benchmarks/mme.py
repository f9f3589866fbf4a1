"""MME: two yes/no questions per image in fourteen sub-tasks; the score adds accuracy and accuracy+.

Published files: a folder per sub-task with `IMAGE.txt` of `question TAB answer` lines, and LLaVA's question JSONL with
`question_id` = `SUBTASK/IMAGE.png` for both questions of an image. Source: spec of LLaVA-1.5, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import SHORT_ANSWER, Pair, PairedBenchmark, need_gold, text_of
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import MME_COGNITION, MME_PERCEPTION, mme_scores
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.metrics.resampling import ratio
from llavakit.evaluation.processors import mme_answer
from llavakit.evaluation.records import Record, pair, read_answers, read_records, read_text

_YES_OR_NO = "Please answer yes or no."


def _question(text: str) -> str:
    """A question without the sentences that prompts append and without doubled spaces, for looking it up."""
    return " ".join(text.replace(SHORT_ANSWER, "").replace(_YES_OR_NO, "").split())


def _read_folder(folder: Path) -> list[Record]:
    """The official folder: SUBTASK/IMAGE.txt or SUBTASK/questions_answers_YN/IMAGE.txt."""
    records = []
    for file in sorted(folder.rglob("*.txt")):
        place = file.relative_to(folder).parts
        if len(place) < 2:
            continue
        for number, line in enumerate(read_text(file).splitlines(), 1):
            if not line.strip():
                continue
            question, tab, answer = line.partition("\t")
            row = {"category": place[0], "image": file.stem, "text": question, "answer": answer.strip()}
            record = Record(str(file), number, row)
            if not tab or row["answer"].lower() not in ("yes", "no"):
                raise record.error("(line)", "must be a question, a tab, and Yes or No")
            records.append(record)
    if not records:
        raise UserError(f"{folder}: holds no SUBTASK/IMAGE.txt; give MME_Benchmark_release_version")
    return records


def _place(record: Record) -> tuple[str, str]:
    """Sub-task and image stem of a record, from its own fields or from `SUBTASK/IMAGE.png` as the id."""
    path = PurePosixPath(record.data["question_id"]) if isinstance(record.data.get("question_id"), str) else None
    parts = path.parts if path is not None else ()
    category = record.data.get("category") or (parts[0] if len(parts) > 1 else None)
    image = record.data.get("image") or (path.name if path is not None else None)
    if not isinstance(category, str) or not isinstance(image, str):
        raise record.error("question_id", "must be SUBTASK/IMAGE; or give category and image")
    return category, PurePosixPath(image).stem


class MME(PairedBenchmark):
    """Perception (at most 2000), cognition (at most 800), and every sub-task."""

    title = "MME"
    gold_file = "the official folder, or JSONL of question_id, category, image, answer"
    suffix = SHORT_ANSWER
    keep = ("category",)

    def read_gold(self, path: str | Path) -> list[Record]:
        """The official folder, or a JSONL."""
        return _read_folder(Path(path)) if Path(path).is_dir() else read_records(path)

    def pairs(self, predictions: str | Path, gold: str | Path | None, missing: str, extra: str) -> list[Pair]:
        """Pairs by id; where ids repeat (both questions of an image), by image and question text."""
        gold = need_gold(gold, self.title, self.gold_file)
        rows, answers = self.read_gold(gold), read_answers(predictions)
        keys = {}
        if gold.is_dir() or len({row.id for row in rows}) < len(rows):
            keys = {
                "key": lambda record: (*_place(record), _question(record.get("prompt", str))),
                "gold_key": lambda record: (*_place(record), _question(record.get("text", str))),
            }
        return list(pair(rows, answers, **keys, missing=missing, extra=extra))

    def answer(self, text: str) -> str:
        """A reply as `mme_scores` reads it."""
        return text

    def score(
        self, predictions: str | Path, gold: str | Path | None, *, missing: str = "error", extra: str = "error"
    ) -> dict[str, Any]:
        """Sums and sub-tasks.

        Predictions that repeat an id (both questions of an image) are told apart by their `prompt`.

        Args:
            gold: The official folder, or a JSONL of `question_id`, `answer` (yes or no), `category`, `image`, and
                `text` where ids repeat.
        """
        items = []
        pairs = self.pairs(predictions, gold, missing, extra)
        for question, prediction in pairs:
            answer = str(question.data.get("answer", question.data.get("label", ""))).strip().lower()
            if answer not in ("yes", "no"):
                raise question.error("answer", f"must be yes or no, is {answer!r}")
            category, image = _place(question)
            items.append((category, image, self.answer(text_of(prediction) or ""), answer))
        metrics = mme_scores(items)
        found = {"perception": metrics["perception"], "cognition": metrics["cognition"], "count": len(items)}
        places = [(task, image) for task, image, *_ in items]
        tables = {"by_task": [task for task, _ in places]}
        return Metrics(found | {"by_task": metrics["by_task"]}, self.cases(pairs, _measures(items), tables, places))


def _measures(items: Sequence[tuple[str, str, str, str]]) -> dict[str, Measure]:
    """The sums and the columns of sub-tasks; whether all of an image is right stands at its first question."""
    right = [mme_answer(text) == answer for _, _, text, answer in items]
    whole: dict[tuple[str, str], bool] = {}
    for (task, image, *_), hit in zip(items, right, strict=True):
        whole[task, image] = whole.get((task, image), True) and hit
    seen: set[tuple[str, str]] = set()
    plus: list[bool | None] = []
    for task, image, *_ in items:
        plus.append(None if (task, image) in seen else whole[task, image])
        seen.add((task, image))
    accuracy, accuracy_plus = Measure.mean(right), Measure.mean(plus)
    both = np.concatenate([accuracy.table, accuracy_plus.table], axis=1)
    measures = {}
    for name, tasks in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        asked = [task for task in tasks if any(item[0] == task for item in items)]
        mine = np.array([[item[0] == task for task in asked] for item in items], float)[:, :, None]
        if asked:
            measures[name] = Measure((mine * both[:, None]).reshape(len(items), -1), _scores)
    return measures | {"accuracy": accuracy, "accuracy_plus": accuracy_plus, "score": Measure(both, _scores)}


def _scores(sums: np.ndarray) -> np.ndarray:
    """Sum over sub-tasks of both accuracies, from right, questions, right images and images of each."""
    return ratio(sums.reshape(*sums.shape[:-1], -1, 2)).sum(-1)
