"""Open questions about videos, each answer judged right or wrong with a score from 0 to 5 (MSVD-QA, ActivityNet-QA).

Record: `question_id`, `video`, `text` (the question) and `answer`. Takes either predictions that were judged already
(with `pred` and `score`), or answers and the options of a judge. The instruction to the judge is llavakit's own; to
compare with published figures give the published one with `rules`. Source: spec of LLaVA-Mini, section 7.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import Pair, PairedBenchmark, need_gold, percent, text_of
from llavakit.evaluation.benchmarks.judged import JudgeOptions, judged, judged_measures, make_judge
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import judged_answers
from llavakit.evaluation.records import pair, read_records, read_text

RULE = (
    "A question was asked about a video. Compare the predicted answer with the correct one; synonyms and paraphrases "
    "are as good, and only the meaning counts.\n\n"
    "Question: {question}\nCorrect answer: {answer}\nPredicted answer: {prediction}\n\n"
    "Reply with nothing but a dictionary of two keys: 'pred', which is 'yes' if the predicted answer is correct and "
    "'no' if it is not, and 'score', a whole number from 0 (worst) to 5 (best). For example: "
    "{'pred': 'yes', 'score': 4}"
)
TEMPERATURES = (0.0, 0.5, 1.0)


def parse_judgement(reply: str) -> Mapping[str, Any] | None:
    """The dictionary in a reply, None if there is none that can be read."""
    found = re.search(r"\{[^{}]*\}", reply)
    try:
        judgement = ast.literal_eval(found.group()) if found else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return judgement if isinstance(judgement, dict) and {"pred", "score"} <= set(judgement) else None


class VideoQA(PairedBenchmark):
    """Accuracy and mean score of judged answers."""

    title = "Video question answering"
    max_new_tokens = 1024
    gold_file = "JSONL of question_id, text and answer"

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
        """Accuracy in percent of the judgements that say yes or no, and the mean score.

        Args:
            predictions: Judgements (with `pred` and `score`), or answers that `judge` judges first.
            gold: The questions with their answers.
            rules: Text file with the instruction, in which {question}, {answer} and {prediction} are filled in.
            judging: Who judges, and the judge's options. A reply that cannot be read is asked for again at higher
                temperatures; if none can, it counts in the mean score as 0, as published (`unreadable`). A call that
                fails is no judgement: it is counted in `failed_calls`, and the next call asks it again.
        """
        metrics: dict[str, Any] = {}
        questions = read_records(need_gold(gold, self.title, self.gold_file))
        records = read_records(predictions)
        pairs = list(pair(questions, records, missing=missing, extra=extra))
        if records and all("pred" in record.data and "score" in record.data for record in records):
            judgements = [{} if answer is None else answer.data for _, answer in pairs]
        elif judging.get("judge") is None:
            raise UserError(f"{predictions}: holds answers, not judgements; give judge to have them judged")
        else:
            asker = make_judge(judging, predictions)
            rule = read_text(rules) if rules is not None else RULE

            def judgement(item: Pair) -> Mapping[str, Any]:
                question, answer = item
                if answer is None:
                    return {}
                asked = rule.replace("{question}", question.get("text", str))
                asked = asked.replace("{answer}", str(question.get("answer", (str, int, float))))
                asked = asked.replace("{prediction}", text_of(answer) or "")
                found = asker.ask_parsed([{"role": "user", "content": asked}], parse_judgement, TEMPERATURES)
                return found or {}

            found = asker.map(judgement, pairs)
            failures = [one for one in found if isinstance(one, Exception)]
            metrics = judged(asker, failures, len(pairs))
            kept = [(one, own) for one, own in zip(found, pairs, strict=True) if not isinstance(one, Exception)]
            judgements, pairs = [one for one, _ in kept], [own for _, own in kept]
        counted = judged_answers(judgements)
        summary = {
            "accuracy": percent(counted["accuracy"]),
            "score": counted["score"],
            "yes": counted["yes"],
            "no": counted["no"],
            "count": len(judgements),
            "unreadable": sum(not {"pred", "score"} <= set(one) for one in judgements),
        } | metrics
        return Metrics(summary, self.cases(pairs, judged_measures(judgements)))
