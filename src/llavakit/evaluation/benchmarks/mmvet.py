"""MM-Vet: free answers graded by a language model between 0 and 1.

Takes either a file that was graded already, or answers and the options of a judge. The instruction to the judge is
llavakit's own; to compare with published figures give the published one with `rules`, and the same judge. Source: spec
of LLaVA-1.5, section 7.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Unpack

from llavakit.errors import RecordError, UserError
from llavakit.evaluation.benchmarks.base import (
    Pair,
    PairedBenchmark,
    Question,
    image_of,
    need_gold,
    percent,
    write_json,
)
from llavakit.evaluation.benchmarks.judged import JudgeOptions, judged, make_judge
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.records import Record, as_records, pair, read_answers, read_json, read_records, read_text

GRADE_RULE = (
    "Grade the prediction of an AI model against the ground truth with a number between 0.0 (all wrong) and 1.0 (all "
    "right), in steps of 0.1. <AND> in the ground truth means that every part of it is needed, <OR> that one of them "
    "is enough. Complete the last line with the grade only.\n\n"
    "Question | Ground truth | Prediction | Grade\n"
    "--- | --- | --- | ---\n"
    "What is 3 + 4? | 7 | The result is 7. | 1.0\n"
    "What is 3 + 4? | 7 | 8 | 0.0\n"
    "Which animals are there? | dog <AND> cat | a dog | 0.5\n"
    "What colour is the car? | dark red <OR> maroon | It is maroon. | 1.0"
)
GRADE_TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)


def mmvet_submission(answers: Iterable[Record]) -> dict[str, str]:
    """The results file of the official grader: `v1_ID` -> text as it is."""
    return {_mmvet_id(record): record.get("text", str) for record in answers}


def _mmvet_id(record: Record) -> str:
    return record.id if record.id.startswith("v1_") else f"v1_{record.id}"


def grade_prompt(question: str, answer: str, prediction: str, rule: str = GRADE_RULE) -> str:
    """What the judge is asked: the instruction with worked examples, then an open line of the table."""
    answer = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{rule}\n{question} | {answer} | {prediction} |"


def parse_grade(reply: str) -> float | None:
    """The number that is the first space-separated word, if it is between 0 and 1."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


class MMVet(PairedBenchmark):
    """Mean grade in percent, in total and by capability. Questions have no response-format sentence."""

    title = "MM-Vet"
    max_new_tokens = 1024
    gold_file = "mm-vet.json"

    def read_gold(self, path: str | Path) -> list[Record]:
        """The questions of `mm-vet.json`."""
        whole = read_json(path)
        if not isinstance(whole, dict) or not all(isinstance(row, dict) for row in whole.values()):
            raise RecordError(str(path), 1, "(json)", "must be mm-vet.json: an object of v1_ID -> question")
        return as_records(path, ({**row, "question_id": name} for name, row in whole.items()))

    def question(self, record: Record, folder: Path, **options: Any) -> Question:
        """A question of `mm-vet.json`."""
        text = record.get("question", str)
        return Question(record.id, text, (image_of(folder / record.get("imagename", str)),), {"prompt": text})

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        rules: str | Path | None = None,
        missing: str = "error",
        extra: str = "error",
        **judging: Unpack[JudgeOptions],
    ) -> dict[str, Any]:
        """Mean grades.

        Args:
            predictions: Graded records (with `score` between 0 and 1), or answers that `judge` grades first.
            gold: `mm-vet.json`.
            rules: Text file with the official instruction and examples; default: llavakit's own.
            judging: Who grades, and the judge's options. A reply that is no number is asked for again at temperatures
                up to 2, then counts 0 (`unparsed`). A call that fails is no grade: it is counted in `failed_calls`, and
                the next call asks it again.
        """
        metrics: dict[str, Any] = {}
        questions = self.read_gold(need_gold(gold, self.title, self.gold_file))
        records = read_records(predictions)
        pairs = list(pair(questions, records, key=_mmvet_id, gold_key=lambda row: row.id, missing=missing, extra=extra))
        if records and all("score" in record.data for record in records):
            grades = [0.0 if answer is None else float(answer.get("score", (int, float))) for _, answer in pairs]
        elif judging.get("judge") is None:
            raise UserError(f"{predictions}: holds answers without grades; give judge to have them graded")
        else:
            rule = read_text(rules).rstrip() if rules is not None else GRADE_RULE
            asker = make_judge(judging, predictions)
            unparsed = 0

            def grade(item: Pair) -> float:
                nonlocal unparsed
                question, answer = item
                if answer is None:
                    return 0.0
                asked = grade_prompt(
                    question.get("question", str), question.get("answer", str), answer.get("text", str), rule
                )
                found = asker.ask_parsed([{"role": "user", "content": asked}], parse_grade, GRADE_TEMPERATURES)
                unparsed += found is None
                return found or 0.0

            found = asker.map(grade, pairs)
            failures = [one for one in found if isinstance(one, Exception)]
            metrics = {"unparsed": unparsed, **judged(asker, failures, len(pairs))}
            graded = [(one, pair_) for one, pair_ in zip(found, pairs, strict=True) if not isinstance(one, Exception)]
            grades, pairs = [one for one, _ in graded], [pair_ for _, pair_ in graded]
        by_capability: dict[str, list[float]] = defaultdict(list)
        for (question, _), grade_ in zip(pairs, grades, strict=True):
            for name in question.get("capability", list, []):
                by_capability[str(name)].append(grade_)
        summary: dict[str, Any] = {"score": percent(mean(grades)), "count": len(grades)}
        if by_capability:
            summary["by_capability"] = {name: percent(mean(values)) for name, values in by_capability.items()}
        capabilities = [question.get("capability", list, []) for question, _ in pairs]
        cases = self.cases(pairs, {"score": Measure.mean(grades)}, {"by_capability": capabilities})
        return Metrics(summary | metrics, cases)

    def submission(
        self, predictions: str | Path, output: str | Path, questions: str | Path | None = None, **options: Any
    ) -> Path:
        """The results file of the official grader."""
        return write_json(output, mmvet_submission(read_answers(predictions)))
