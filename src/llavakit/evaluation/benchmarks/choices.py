"""Multiple choice about videos: MVBench, MLVU and EgoSchema.

Record: `video`, `question`, `candidates` and `answer` (the text of the right candidate), as MVBench and MLVU publish
them; `question_id` is the number of the record where it is missing, and `task_type` (or `question_type`) names the
task. EgoSchema's records are LLaVA's JSONL with `answer` a letter or an index. Source: spec of LLaVA-Mini, section 7.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavakit.evaluation.benchmarks.base import LETTER, PairedBenchmark, Question, Scored, by_field, field_text, percent
from llavakit.evaluation.metrics.answers import bracket_choice_match, mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.processors import LETTERS, bracket_question, first_letter
from llavakit.evaluation.records import Record, read_records


class BracketChoice(PairedBenchmark):
    """Letters in brackets: options are shown as "(A) text"; an answer is read up to its first closing bracket."""

    questions_are_gold = True
    gold_file = "JSON list or JSONL of video, question, candidates and answer"
    tables = {"by_task": "task"}

    def read_gold(self, path: str | Path) -> list[Record]:
        """Records with an id and the name of their task."""
        found = []
        for record in read_records(path):
            task = record.data.get("task_type", record.data.get("question_type"))
            data = {"question_id": str(record.line), **record.data, "task": task}
            found.append(Record(record.file, record.line, data))
        return found

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """Questions with their options and the sentence that asks for a letter."""
        folder = Path(images) if images is not None else Path(path).parent
        return [self.question(record, folder) for record in self.read_gold(path)]

    def question(self, record: Record, folder: Path, **options: Any) -> Question:
        """A question with its options."""
        asked, _ = _asked(record)
        video = {"type": "video", "video": str(folder / record.get("video", str))}
        text = f"{asked}\n{LETTER}"
        return Question(record.get("question_id", (str, int)), text, (video,), {"prompt": text})

    def value(self, question: Record, text: str) -> float:
        """Whether the letter of the right option was given."""
        return bracket_choice_match(text, _asked(question)[1])

    def summary(self, scored: Scored) -> dict[str, Any]:
        """Accuracy over questions, and the mean over tasks, which is the published average."""
        metrics: dict[str, Any] = {"accuracy": percent(mean(value for _, value in scored)), "count": len(scored)}
        tasks = {name: percent(mean(values)) for name, values in by_field(scored, "task").items()}
        return metrics | ({"average": mean(tasks.values()), "by_task": tasks} if tasks else {})

    def measures(self, scored: Scored) -> dict[str, Measure]:
        """Accuracy, and its mean over tasks."""
        values, tasks = [value for _, value in scored], [field_text(question, "task") for question, _ in scored]
        return super().measures(scored) | {"average": Measure.macro(values, tasks)}


def _asked(record: Record) -> tuple[str, str]:
    """The question with its options, and the right option as "(B) text"."""
    candidates = record.get("candidates", list)
    if not candidates or not all(isinstance(candidate, (str, int, float)) for candidate in candidates):
        raise record.error("candidates", "must be a non-empty list of texts")
    if len(candidates) > len(LETTERS):
        raise record.error("candidates", f"must be at most {len(LETTERS)}")
    candidates = list(map(str, candidates))
    answer = str(record.get("answer", (str, int, float)))
    if answer not in candidates:
        raise record.error("answer", "must be one of the candidates")
    return bracket_question(record.get("question", str), candidates, answer)


class MVBench(BracketChoice):
    """Twenty tasks about short videos."""

    title = "MVBench"


class MLVU(BracketChoice):
    """Tasks about long videos."""

    title = "MLVU"


class EgoSchema(PairedBenchmark):
    """Five options; the first character of a reply that is one of their letters is the answer."""

    title = "EgoSchema"
    questions_are_gold = True
    suffix = LETTER

    def value(self, question: Record, text: str) -> float:
        """Whether the first option letter of the reply is the right one."""
        letters = LETTERS[:5]
        answer = question.get("answer", (str, int))
        if isinstance(answer, int) and 0 <= answer < len(letters):
            answer = letters[answer]
        if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
            raise question.error("answer", f"must be one of {', '.join(letters)}, or an index from 0 to 4")
        return first_letter(text, letters) == answer
