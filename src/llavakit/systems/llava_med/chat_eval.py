"""LLaVA-Med's chat evaluation: a judge compares answers with those of a text-only GPT-4 that read the captions.

    llavakit eval MODEL --task llava_med_chat --questions questions.jsonl --images images --output predictions.jsonl

A question has `question_id`, `image`, `text`, `type`, `domain` (flags), `fig_label`, `fig_caption`, the sentences that
mention the figure (`fig_context` or `in_text_mention`), and `gpt4_answer`, the reference. The relative score of a group
is the mean over its questions of candidate over reference; LLaVA-Bench takes the ratio of the means instead. The
instruction to the judge is llavakit's own: give the published one with `instruction` and `system` to compare with
published figures. Spec section 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import Benchmark, Question, need_gold, stored_questions, text_of, write_lines
from llavakit.evaluation.benchmarks.judged import RULE, SYSTEM_MESSAGE, JudgeOptions, judged, make_judge
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.records import Record, pair, read_records, read_text
from llavakit.evaluation.reviews import review_content

DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
OVERALL = "overall"
MARK = "\n<image>"
CHUNK = 8  # requests that go out together

Scores = tuple[float, float]  # of the reference and of the candidate


def review_messages(
    example: Mapping[str, Any], *, instruction: str = RULE, system: str = SYSTEM_MESSAGE
) -> list[dict[str, str]]:
    """What a judge is shown; a context that is a list is printed as Python prints it, as published.

    Args:
        example: `fig_label`, `fig_caption`, `fig_context`, `question`, `ans1` (reference) and `ans2`.
        instruction: What the judge is to do.
        system: The system message.
    """
    figure = f"Figure Caption:\n{example['fig_label']}: {example['fig_caption']}"
    context = f"{figure}\n\nFigure Context:\n\t- {example['fig_context']}"
    content = review_content(context, example["question"], example["ans1"], example["ans2"], instruction)
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def chunks(count: int, size: int) -> list[list[int]]:
    """Numbers below `count` in groups that are judged together; the last takes up to half as many more."""
    found, place = [], 0
    while place + 1.5 * size < count:
        found.append(list(range(place, place + size)))
        place += size
    return [*found, list(range(place, count))] if place < count else found


def parse_scores(review: str) -> Scores | None:
    """Reference's and candidate's score in the first line, which single spaces divide in two; None if it is not so."""
    fields = review.split("\n")[0].split(" ")
    try:
        reference, candidate = map(float, fields)
    except ValueError:
        return None
    return reference, candidate


def domain_of(flags: Mapping[str, Any] | None) -> str | None:
    """The first domain whose flag is true."""
    return next((name for name in DOMAINS if (flags or {}).get(name)), None)


def summarise(rows: Iterable[tuple[str | None, str | None, Scores]]) -> dict[str, dict[str, float]]:
    """Mean scores, relative score and count, overall and by group.

    Args:
        rows: (type of the question, domain, scores) of every question; None belongs to no group.
    """
    groups: dict[str, list[Scores]] = {}
    for kind, domain, scores in rows:
        for name in dict.fromkeys((kind, OVERALL, domain)):
            if name is not None:
                groups.setdefault(name, []).append(scores)
    return {
        name: {
            "relative_score": 100 * mean(candidate / reference for reference, candidate in own),
            "reference": mean(reference for reference, _ in own),
            "candidate": mean(candidate for _, candidate in own),
            "count": len(own),
        }
        for name, own in groups.items()
    }


class MedicalChat(Benchmark):
    """Conversations and detailed descriptions, judged against a reference that knows the captions."""

    title = "LLaVA-Med chat"
    max_new_tokens = 1024
    questions_are_gold = True

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """The questions; no response-format sentence."""
        return stored_questions(path, images, keep=("type", "domain"))

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        instruction: str | Path | None = None,
        system: str | Path | None = None,
        reviews: str | Path | None = None,
        missing: str = "error",
        extra: str = "error",
        **judging: Unpack[JudgeOptions],
    ) -> dict[str, Any]:
        """Relative scores of reviews that were made already (`gpt_eval`), or of answers that a judge reviews first.

        Args:
            gold: The question file; reviews that bring `type` and `domain` need none.
            instruction, system: Text files with the published wording.
            reviews: Where to write the reviews; default: beside the predictions.
            judging: Who reviews, and the judge's options; by default greedy. A call that failed is no review: it is
                counted in `failed_calls`, and the next call asks it again.
        """
        records, found = read_records(predictions), {}
        if records and all("gpt_eval" in record.data for record in records):
            known = {} if gold is None else {record.id: record for record in read_records(gold)}
            rows = [(known.get(record.id, record), record.get("gpt_eval", str)) for record in records]
        else:
            if judging.get("judge") is None:
                raise UserError(f"{predictions}: holds answers, not reviews; name who reviews them (--judge MODEL)")
            questions = read_records(need_gold(gold, self.title, "the question file"))
            pairs = list(pair(questions, records, missing=missing, extra=extra))
            asker = make_judge(judging, predictions, temperature=0.0)
            wording = {
                name: read_text(path)
                for name, path in (("instruction", instruction), ("system", system))
                if path is not None
            }
            asked = [
                review_messages(example_of(question, text_of(answer) or ""), **wording) for question, answer in pairs
            ]
            replies: list[Any] = []
            for own in chunks(len(asked), CHUNK):
                replies += asker.ask_all([asked[number] for number in own])
            failures = [reply for reply in replies if isinstance(reply, Exception)]
            found = judged(asker, failures, len(pairs))
            rows = [(own, reply) for (own, _), reply in zip(pairs, replies, strict=True) if isinstance(reply, str)]
            write_lines(reviews or Path(predictions).with_suffix(".reviews.jsonl"), map(review_row, rows))
        metrics = table(rows) | found
        scored = [
            (own, scores) for own, scores in ((own, parse_scores(reply)) for own, reply in rows) if scores and scores[0]
        ]
        shares = {
            "relative_score": Measure.mean([candidate / reference for _, (reference, candidate) in scored]),
            "reference": Measure.mean([reference for _, (reference, _) in scored], scale=1.0),
            "candidate": Measure.mean([candidate for _, (_, candidate) in scored], scale=1.0),
        }
        groups = [(own.get("type", str, None), domain_of(own.get("domain", dict, None))) for own, _ in scored]
        places = [[name for name in own if name is not None] for own in groups]
        return Metrics(metrics, self.cases([(own, None) for own, _ in scored], shares, {"by_group": places}))


def example_of(question: Record, answer: str) -> dict[str, Any]:
    """What `review_messages` shows of a question and an answer to it.

    Raises:
        RecordError: If the question lacks a field.
    """
    context = question.get("fig_context" if "fig_context" in question.data else "in_text_mention", (str, list), [])
    return {
        "fig_label": question.get("fig_label", str),
        "fig_caption": question.get("fig_caption", str),
        "fig_context": context,
        "question": question.get("text", str).removesuffix(MARK).removeprefix(MARK[1:] + "\n"),
        "ans1": question.get("gpt4_answer", str),
        "ans2": answer,
    }


def review_row(row: tuple[Record, str]) -> dict[str, Any]:
    """A review as the published files keep it."""
    question, reply = row
    kept = {name: question.data.get(name) for name in ("question_id", "type", "domain")}
    return kept | {"gpt_eval": reply}


def table(rows: Sequence[tuple[Record, str]]) -> dict[str, Any]:
    """Metrics of questions and the judge's replies; replies that cannot be read are counted and left out.

    Raises:
        UserError: If none can be read.
    """
    read = []
    for question, reply in rows:
        scores = parse_scores(reply)
        if scores is not None and scores[0]:
            kind = question.get("type", str, None)
            read.append((kind, domain_of(question.get("domain", dict, None)), scores))
    if not read:
        raise UserError("no review begins with a line of two scores")
    groups = summarise(read)
    overall = groups.pop(OVERALL)
    return {**overall, "unreadable": len(rows) - len(read), "by_group": groups}
