"""Video-ChatGPT's benchmark: answers about videos, judged from 0 to 5 under five aspects (arXiv 2306.05424).

Files: the published lists of `video_name`, `Q` and `A` (correctness, detail, context; another list for temporal
understanding), and of `video_name`, `Q1`, `Q2` and `A` (consistency of two answers). Takes predictions of a run, or the
published form, in which `pred` (`pred1`, `pred2`) stand beside the question. What the judge is told is the published
text, word for word, since scores under another are not comparable; scores by another judge are not either.
"""

from __future__ import annotations

import ast
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Unpack

from llavakit.errors import UserError, quoted
from llavakit.evaluation.benchmarks.base import Benchmark, Question, folder_of, need_gold
from llavakit.evaluation.benchmarks.judged import JudgeOptions, judged, make_judge
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.records import Record, as_records, index, read_answers, read_records, refuse_surplus

PLAIN = (str, int, float)  # answers such as 3 are written without quotation marks in places
TEMPERATURES = (0.0, 0.5, 1.0)  # of the attempts at a reply that can be read
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
ASKED = "Please evaluate the following video-based question-answer pair:\n\n"


@functools.cache
def aspects() -> dict[str, dict[str, str]]:
    """The published texts by aspect: `system`, and `reply`, which says what to reply with."""
    return json.loads((resources.files("llavakit.evaluation") / "five_aspects.json").read_text(encoding="utf-8"))


def judge_messages(aspect: str, item: Mapping[str, str]) -> list[dict[str, str]]:
    """The conversation with the judge about one item, see `FiveAspects.items`."""
    if "Q1" in item:
        told = f"Question 1: {item['Q1']}\nQuestion 2: {item['Q2']}\nCorrect Answer: {item['A']}\n"
        told += f"Predicted Answer to Question 1: {item['pred1']}\nPredicted Answer to Question 2: {item['pred2']}"
    else:
        told = f"Question: {item['Q']}\nCorrect Answer: {item['A']}\nPredicted Answer: {item['pred']}"
    texts = aspects()[aspect]
    return [
        {"role": "system", "content": texts["system"]},
        {"role": "user", "content": f"{ASKED}{told}\n\n{texts['reply']}"},
    ]


def parse_reply(reply: str) -> Any:
    """The Python literal that a reply is; None if it is none.

    The published example, {''score': 4.8}, is none.
    """
    try:
        return ast.literal_eval(reply)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def score_in(judgement: Any) -> int:
    """The score of a parsed reply, cut to a whole number as published.

    Raises:
        TypeError, KeyError, ValueError, OverflowError: If it holds none.
    """
    return int(judgement["score"])


def average_score(judgements: Sequence[Any]) -> float:
    """Mean score of parsed replies; raises as `score_in`, and ZeroDivisionError without any."""
    return sum(map(score_in, judgements)) / len(judgements)


def item_keys(videos: Sequence[str]) -> list[str]:
    """What identifies an item: its video, and its number among the items of that video."""
    seen: Counter[str] = Counter()
    keys = []
    for video in videos:
        keys.append(f"{video}_{seen[video]}")
        seen[video] += 1
    return keys


class FiveAspects(Benchmark):
    """Mean scores from 0 to 5 by a judge."""

    title = "Video-ChatGPT's five aspects"
    max_new_tokens = 1024
    questions_are_gold = True

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """The questions of a published list; items of consistency ask twice.

        Args:
            images: Folder of the videos, whose names lack the suffix.
        """
        records = read_records(path)
        folder, asked = folder_of(path, images), []
        keys = item_keys([record.get("video_name", str) for record in records])
        for record, key in zip(records, keys, strict=True):
            media = ({"type": "video", "video": str(video_file(record, folder))},)
            for name, field in _fields(record):
                text = record.get(field, str)
                asked.append(Question(f"{key}{name}", text, media, {"prompt": text}))
        return asked

    def items(self, predictions: str | Path, gold: str | Path | None, extra: str = "error") -> list[dict[str, str]]:
        """What is judged: `key`, `video`, `A`, and `Q` with `pred`, or `Q1` and `Q2` with `pred1` and `pred2`.

        Raises:
            RecordError: If a field is missing, a question has no answer, or an answer no question (unless `extra` is
                "ignore").
        """
        records = read_records(predictions)
        published = bool(records) and not {"pred", "pred1"}.isdisjoint(records[0].data)
        if not published:
            records = read_records(need_gold(gold, self.title, "published list of video_name, Q and A"))
        answers = {} if published else index(read_answers(predictions), lambda record: record.id)
        keys = item_keys([record.get("video_name", str) for record in records])
        items, asked = [], set()
        for record, key in zip(records, keys, strict=True):
            item = {"key": key, "video": record.get("video_name", str), "A": str(record.get("A", PLAIN))}
            for name, field in _fields(record):
                item[field] = str(record.get(field, PLAIN))
                own = field.replace("Q", "pred")
                asked.add(f"{key}{name}")
                if published:
                    item[own] = str(record.get(own, PLAIN))
                elif f"{key}{name}" in answers:
                    item[own] = answers[f"{key}{name}"].get("text", str)
                else:
                    raise record.error(field, f"has no answer: {predictions} holds no question_id {key + name!r}")
            items.append(item)
        refuse_surplus(answers, asked, extra)
        if not items:
            raise UserError(f"{predictions}: holds no item")
        return items

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        aspects: list[str] | str | None = None,
        attempts: int = 3,
        extra: str = "error",
        **judging: Unpack[JudgeOptions],
    ) -> dict[str, Any]:
        """Mean score of every aspect.

        Args:
            predictions: Of a run, or the published form with the answers beside the questions.
            gold: The published list; not needed for the published form.
            aspects: Names of aspects; default: consistency for items of two questions, else correctness, detail and
                context. The list for temporal understanding is judged with aspects=temporal.
            judging: Who judges, and the judge's options. A call that fails is no judgement: it is counted in
                `failed_calls`, and the next call asks it again.
            attempts: How often (1 to 3) a judge is asked whose reply cannot be read. An item without a readable score
                is left out of the mean and counted in `unreadable`.
            extra: What an answer without a question is: an "error", or to be left out ("ignore").
        """
        if judging.get("judge") is None:
            raise UserError(f"{predictions}: holds answers; give judge to have them judged (-o judge=MODEL)")
        items = self.items(predictions, gold, extra)
        names = self._aspects(aspects, items)
        asker = make_judge(judging, predictions)
        metrics: dict[str, Any] = {}
        unreadable, failures, measures = {}, [], {}
        for name in names:

            def judgement(item: Mapping[str, str], name: str = name) -> int | None:
                return asker.ask_parsed(judge_messages(name, item), _readable_score, TEMPERATURES[:attempts])

            found = asker.map(judgement, items)
            failed = [one for one in found if isinstance(one, Exception)]
            scores = [one for one in found if one is not None and not isinstance(one, Exception)]
            failures += failed
            metrics[name] = mean(scores)
            readable = [None if isinstance(one, Exception) else one for one in found]
            measures[name] = Measure.mean(readable, scale=1.0)
            unreadable[name] = len(items) - len(scores) - len(failed)
        metrics |= {
            "count": len(items),
            "unreadable": sum(unreadable.values()),
            **judged(asker, failures, len(items) * len(names)),
        }
        records = as_records(predictions, ({"question_id": item["key"]} for item in items))
        videos = [item["video"] for item in items]
        return Metrics(metrics, self.cases([(record, None) for record in records], measures, pictures=videos))

    @staticmethod
    def _aspects(aspects: list[str] | str | None, items: Sequence[Mapping[str, str]]) -> list[str]:
        double = {"Q1" in item for item in items}
        if len(double) > 1:
            raise UserError("some items have one question and some two; judge them apart")
        fitting = ["consistency"] if double.pop() else ["correctness", "detail", "context", "temporal"]
        wanted = [aspects] if isinstance(aspects, str) else fitting[:3] if aspects is None else list(aspects)
        for name in wanted:
            if name not in fitting:
                raise UserError(f"aspects={name}: these items can be judged for {', '.join(fitting)}")
        return wanted


def _readable_score(reply: str) -> int | None:
    try:
        return score_in(parse_reply(reply))
    except (TypeError, KeyError, ValueError, OverflowError):
        return None


def _fields(record: Record) -> list[tuple[str, str]]:
    """What is added to an item's key, and the field, of every question of a record."""
    return [(":1", "Q1"), (":2", "Q2")] if "Q1" in record.data else [("", "Q")]


def video_file(record: Record, folder: Path, prefixes: Sequence[str] = ("",)) -> Path:
    """The video that a record names without its suffix, in a folder.

    Args:
        prefixes: What may stand before the name.

    Raises:
        RecordError: If there is none, or the name can be no file's.
    """
    name = record.get("video_name", str)
    if not name.strip():
        raise record.error("video_name", "is empty; name the video")
    candidates = [folder / f"{prefix}{name}{suffix}" for prefix in prefixes for suffix in ("", *VIDEO_SUFFIXES)]
    try:
        found = next((path for path in candidates if path.is_file() or path.is_dir()), None)
    except OSError as error:  # a name too long, a folder that may not be read
        raise record.error("video_name", f"{quoted(name)}: {error.strerror}") from None
    if found is None:
        raise record.error("video_name", f"{quoted(name)}: {folder} holds no such video ({', '.join(VIDEO_SUFFIXES)})")
    return found
