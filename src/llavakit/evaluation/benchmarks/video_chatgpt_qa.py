"""Open questions about videos, judged as Video-ChatGPT published it (MSVD-QA, MSRVTT-QA, TGIF-QA, ActivityNet-QA).

Files: `test_q.json`, a list of `video_name`, `question` and `question_id`, and `test_a.json`, a list of `answer` in the
same order. An answer belongs to the question at its place whatever part of the list a run has asked; the published
script counts from zero in every part of a run on several GPUs, so it scores all parts but the first by wrong answers.

Takes predictions of a run; the published answers (`id`, `question`, `answer`, `pred`); or judgements, in the published
form `{id: [judgement, {"q", "a", "pred"}]}`. What the judge is told is the published text, word for word, since scores
under another are not comparable; scores by another judge are not either. Source: spec of Video-LLaVA, section 7.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Unpack

from llavakit.errors import RecordError, UserError
from llavakit.evaluation.benchmarks.base import Benchmark, Question, folder_of, need_gold, percent, write_json
from llavakit.evaluation.benchmarks.five_aspects import ASKED, TEMPERATURES, parse_reply, video_file
from llavakit.evaluation.benchmarks.judged import JudgeOptions, judged, judged_measures, make_judge
from llavakit.evaluation.cases import Cases, Metrics
from llavakit.evaluation.metrics.answers import judged_answers
from llavakit.evaluation.records import Record, as_records, choose, index, read_answers, read_json, read_records

SHORT = (str, int, float)


@functools.cache
def texts() -> dict[str, str]:
    """The published texts: `system`, and `reply`, which says what to reply with."""
    return json.loads((resources.files("llavakit.evaluation") / "video_qa.json").read_text(encoding="utf-8"))


def judge_messages(item: Mapping[str, str]) -> list[dict[str, str]]:
    """The conversation with the judge about an item, see `VideoChatGPTQA.items`."""
    told = f"Question: {item['q']}\nCorrect Answer: {item['a']}\nPredicted Answer: {item['pred']}"
    return [
        {"role": "system", "content": texts()["system"]},
        {"role": "user", "content": f"{ASKED}{told}\n\n{texts()['reply']}"},
    ]


class VideoChatGPTQA(Benchmark):
    """Accuracy and mean score from 0 to 5 by a judge."""

    title = "Video question answering, judged as by Video-ChatGPT"
    max_new_tokens = 1024

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """The questions of `test_q.json`.

        Args:
            images: Folder of the videos, whose names lack the suffix, and in ActivityNet a leading `v_`.
        """
        folder, asked = folder_of(path, images), []
        for record in read_records(path):
            text = record.get("question", str)
            media = ({"type": "video", "video": str(video_file(record, folder, prefixes=("", "v_")))},)
            asked.append(Question(_key(record), text, media, {"prompt": text}))
        return asked

    def items(
        self, predictions: str | Path, gold: str | Path | None, questions: str | Path | None, missing: str, extra: str
    ) -> dict[str, dict[str, str]]:
        """What is judged, by question: `q`, `a` and `pred`.

        Raises:
            RecordError: If a field is missing, a question has no answer or two, or an answer no question.
        """
        records = read_records(predictions)
        if records and {"answer", "pred"} <= set(records[0].data):  # the published form
            published = index(records, _key)
            return {
                key: {"q": record.get("question", str), "a": _text(record, "answer"), "pred": _text(record, "pred")}
                for key, record in published.items()
            }
        asked, answers = self._gold(need_gold(gold, self.title, "test_a.json beside test_q.json"), questions)
        found = index(read_answers(predictions), lambda record: record.id)
        keys = index(asked, _key)
        surplus = next((record for name, record in found.items() if name not in keys), None)
        if surplus is not None and extra == "error":
            raise surplus.error("question_id", f"{surplus.id!r} is not among the questions; is this the right file?")
        items = {}
        for (key, question), answer in zip(keys.items(), answers, strict=True):
            if key not in found and missing == "error":
                raise question.error("question_id", f"{key!r} has no prediction in {predictions}")
            pred = found[key].get("text", str) if key in found else ""
            items[key] = {"q": question.get("question", str), "a": _text(answer, "answer"), "pred": pred}
        return items

    @staticmethod
    def _gold(gold: Path, questions: str | Path | None) -> tuple[list[Record], list[Record]]:
        """The questions and the answers, which are in one file or in two of the same order."""
        answers = read_records(gold)
        if questions is None and answers and "question" in answers[0].data:
            return answers, answers
        beside = gold.with_name(gold.name.replace("_a", "_q", 1))
        if questions is None and not (beside != gold and beside.is_file()):
            raise UserError(
                f"{gold}: holds answers alone, and there is no test_q.json beside it; give -o questions=FILE"
            )
        asked = read_records(questions or beside)
        if len(asked) != len(answers):
            raise UserError(
                f"{gold}: holds {len(answers)} answers for the {len(asked)} questions of {questions or beside}"
            )
        return asked, answers

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        questions: str | Path | None = None,
        judgements: str | Path | None = None,
        attempts: int = 3,
        missing: str = "error",
        extra: str = "error",
        **judging: Unpack[JudgeOptions],
    ) -> dict[str, Any]:
        """Accuracy in percent of the judgements that say yes or no, and the mean score, cut to whole numbers.

        Args:
            predictions: Of a run, in the published form with the answers, or judgements.
            gold: `test_a.json`, or one file with question and answer; not needed for the published forms.
            questions: `test_q.json`; default: the file beside `gold` with `_q` for `_a` in its name.
            judgements: Where to write what the judge said, in the published form.
            judging: Who judges, and the judge's options. A call that fails is no judgement: it is counted in
                `failed_calls`, and the next call asks it again.
            attempts: How often (1 to 3) a judge is asked whose reply is no Python literal; the published script asks
                without end. An item without one is left out and counted in `unreadable`.
            missing: What a question without a prediction is: an "error", or "wrong" (judged with an empty answer).
            extra: What a prediction without a question is: an "error", or left out ("ignore").
        """
        choose(missing, "missing", ("error", "wrong"))
        choose(extra, "extra", ("error", "ignore"))
        stored = _stored(predictions)
        if stored is not None:
            records = as_records(predictions, ({} for _ in stored))
            return Metrics(_metrics(stored, len(stored)), self._cases(records, stored))
        if judging.get("judge") is None:
            raise UserError(f"{predictions}: holds answers, not judgements; give judge to have them judged")
        items = self.items(predictions, gold, questions, missing, extra)
        asker = make_judge(judging, predictions)

        def judgement(item: Mapping[str, str]) -> list[Any] | None:
            return asker.ask_parsed(judge_messages(item), _literal, TEMPERATURES[:attempts])

        found = asker.map(judgement, list(items.values()))
        failures = [one for one in found if isinstance(one, Exception)]
        read = {
            key: [one[0], item]
            for (key, item), one in zip(items.items(), found, strict=True)
            if one is not None and not isinstance(one, Exception)
        }
        if judgements is not None:
            write_json(judgements, read, default=repr)
        judgements_ = [one for one, _ in read.values()]
        metrics = _metrics(judgements_, len(items) - len(failures)) | judged(asker, failures, len(items))
        records = as_records(predictions, ({"question_id": key} for key in read))
        return Metrics(metrics, self._cases(records, judgements_))

    def _cases(self, records: Sequence[Record], judgements: Sequence[Any]) -> Cases:
        return self.cases([(record, None) for record in records], judged_measures(judgements))


def _metrics(judgements: Sequence[Any], count: int) -> dict[str, Any]:
    counted = judged_answers(judgements)
    answered = counted["yes"] + counted["no"]
    return {
        "accuracy": percent(counted["accuracy"]) if answered else None,
        "score": counted["score"] if judgements else None,
        "yes": counted["yes"],
        "no": counted["no"],
        "count": len(judgements),
        "unreadable": count - len(judgements),
    }


def _literal(reply: str) -> list[Any] | None:
    """A parsed reply in a list, so that the literal None is one too; None if there is no literal."""
    parsed = parse_reply(reply)
    return [parsed] if parsed is not None or reply.strip() == "None" else None


def _stored(path: str | Path) -> list[Any] | None:
    """Judgements that were made before, None if the file holds answers."""
    if Path(path).suffix == ".json" and isinstance(whole := read_json(path), dict):
        for number, (key, entry) in enumerate(whole.items(), 1):
            if not isinstance(entry, list) or len(entry) != 2:
                raise RecordError(str(path), number, key, "must be a list of a judgement and of what was judged")
        return [entry[0] for entry in whole.values()]
    records = read_records(path)
    if records and all({"pred", "score"} <= set(record.data) for record in records):
        return [record.data for record in records]
    return None


def _key(record: Record) -> str:
    return str(record.get("question_id" if "question_id" in record.data else "id", (str, int)))


def _text(record: Record, field: str) -> str:
    return str(record.get(field, SHORT))
