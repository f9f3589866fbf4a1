"""LLaVA-Bench (in the wild): free answers that a judge compares with reference answers.

Takes either reviews that were made already, or answers and the options of a judge. The instruction to the judge is
llavakit's own; to compare with published figures give the published one with `rules`, and the same judge. A judge that
reads text alone goes by captions; one that sees (LLaVA-Critic) is shown the picture with `look`. Source: spec of
LLaVA-1.5, section 7, and of LLaVA-Critic, section 4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import (
    Benchmark,
    Question,
    folder_of,
    media_parts,
    need_gold,
    stored_questions,
    text_of,
    write_lines,
)
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.metrics.answers import judged_answers, relative_score
from llavakit.evaluation.metrics.intervals import Measure
from llavakit.evaluation.records import Record, index, pair, read_json, read_records
from llavakit.evaluation.reviews import parse_pair, review_content, review_record

if TYPE_CHECKING:
    from llavakit.evaluation.judges import Judge

SYSTEM_MESSAGE = "You check the quality of answers. Be helpful and precise."
RULE = (
    "Two AI assistants answered the question above, which a user asked about an image. {sight}\n"
    "Judge how helpful, relevant, accurate and detailed each answer is, and give each assistant one overall score from "
    "1 to 10; higher is better.\n"
    "Begin with a line that holds nothing but the two scores, that of Assistant 1 and then that of Assistant 2, with a "
    "space between them.\n"
    "Then explain your scores on the following lines. Do not favour an answer for the place in which it is shown."
)
HIDDEN = "You cannot see the image; the context describes it in a few sentences."
SHOWN = "The image is shown to you; the context describes it in a few sentences."
CATEGORIES = ("llava_bench_conv", "llava_bench_detail", "llava_bench_complex")


class JudgeOptions(TypedDict, total=False):
    """Options of a score that has a judge: the judge (a model, or a `Judge`), and what `Judge` and `APIClient` take."""

    judge: Any
    base_url: str | None
    temperature: float | None
    max_tokens: int | None
    concurrency: int | None
    cache: str | Path | None
    price_in: float | None
    price_out: float | None
    max_cost: float | None


def make_judge(options: JudgeOptions, predictions: str | Path, **defaults: Any) -> Judge:
    """The judge that the options of a score name; by default its cache is beside the predictions."""
    from llavakit.evaluation.judges import Judge

    found = {name: value for name, value in options.items() if value is not None}
    model = found.pop("judge")
    if isinstance(model, Judge):
        return model
    return Judge(model, **{"cache": Path(predictions).with_suffix(".judge.jsonl"), **defaults, **found})


def judged(judge: Judge, failures: Sequence[Exception], count: int) -> dict[str, Any]:
    """What a result says of its judge: what was asked and used, and how many calls failed and count for nothing.

    Raises:
        UserError: If no call brought an answer.
    """
    if failures and len(failures) == count:
        raise UserError(f"{failures[0]} (so did all {count} calls)")
    return {"failed_calls": len(failures), "judge": judge.report()}


def judged_measures(judgements: Sequence[Any]) -> dict[str, Measure]:
    """Accuracy and score of `judged_answers`, case by case."""
    found = [judged_answers([one]) for one in judgements]
    accuracy = [one["yes"] / (one["yes"] + one["no"]) if one["yes"] + one["no"] else None for one in found]
    return {"accuracy": Measure.mean(accuracy), "score": Measure.mean([one["score"] for one in found], scale=1.0)}


def summarise(reviews: Iterable[tuple[str | None, Sequence[float]]]) -> dict[str, Any]:
    """Relative score, reference mean and candidate mean (both x 10) of all reviews and by category.

    Args:
        reviews: (category or None, (reference score, candidate score)).
    """
    groups: dict[str, list[Sequence[float]]] = defaultdict(list)
    everything: list[Sequence[float]] = []
    for category, scores in reviews:
        everything.append(scores)
        if category is not None:
            groups[category].append(scores)
    if not everything:
        raise UserError("there is no review to summarise")

    def row(pairs: Sequence[Sequence[float]]) -> dict[str, Any]:
        relative, reference, candidate = relative_score(pairs)
        failed = sum(scores[0] < 0 or scores[1] < 0 for scores in pairs)
        return {
            "relative_score": relative,
            "reference": reference,
            "candidate": candidate,
            "count": len(pairs),
            "failed": failed,
        }

    metrics: dict[str, Any] = row(everything)
    if groups:
        metrics["by_category"] = {name: row(groups[name]) for name in sorted(groups)}
    return metrics


def _scores(review: Record, reparse: bool) -> Sequence[float]:
    """The two scores of a review: as stored, or read from the reply again."""
    for name in () if reparse else ("tuple", "score"):
        stored = review.get(name, list, None)
        if stored is not None:
            if len(stored) != 2 or not all(isinstance(value, (int, float)) for value in stored):
                raise review.error(name, "must be two numbers")
            return stored
    return parse_pair(review.get("content" if "content" in review.data else "text", str))


class LLaVABench(Benchmark):
    """The candidate's score in percent of a text-only GPT-4's, which saw captions instead of images."""

    title = "LLaVA-Bench"
    max_new_tokens = 1024

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """Questions of `questions.jsonl`; no response-format sentence."""
        return stored_questions(path, images, keep=("category",))

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        ignore: Sequence[str | int] | str | int = (),
        reparse: bool = False,
        context: str | Path | None = None,
        reference: str | Path | None = None,
        rules: str | Path | None = None,
        look: bool = False,
        images: str | Path | None = None,
        reviews: str | Path | None = None,
        missing: str = "error",
        extra: str = "error",
        **judging: Unpack[JudgeOptions],
    ) -> dict[str, Any]:
        """Summary of reviews: of a published review file, or of answers that a judge reviews first.

        Args:
            predictions: Reviews (with `tuple` or `score`), or answers (with `question_id` and `text`).
            gold: `questions.jsonl`; needed for answers, and for reviews that do not name their category.
            ignore: Ids of questions to leave out.
            reparse: Read scores from the replies again instead of the stored ones.
            context: `context.jsonl` with `image` and `caption`.
            reference: The reference answers, `answers_gpt4.jsonl`.
            rules: Published `rule.json` (category -> prompt and role); default: llavakit's own instruction.
            look: Show the judge the picture too, for one that sees.
            images: Folder that names of pictures are relative to; default: that of the questions.
            reviews: Where to write the reviews; default: beside the predictions.
            judging: Who reviews, and the judge's options. A call that fails is no review: it is counted in
                `failed_calls`, and the next call asks it again.
        """
        metrics: dict[str, Any] = {}
        records = read_records(predictions)
        if records and not any(name in records[0].data for name in ("tuple", "score", "content")):
            if judging.get("judge") is None or context is None or reference is None:
                raise UserError(
                    f"{predictions}: holds answers, not reviews; give judge, context and reference to have them "
                    "reviewed (-o judge=MODEL -o context=FILE -o reference=FILE)"
                )
            questions = read_records(need_gold(gold, self.title, "questions.jsonl"))
            pairs = list(pair(questions, records, missing=missing, extra=extra))
            asked = make_judge(judging, predictions)
            folder = folder_of(need_gold(gold, self.title, "questions.jsonl"), images) if look else None
            rows, failures = review(pairs, context, reference, rules, asked, folder)
            metrics = judged(asked, failures, len(pairs))
            output = write_lines(reviews or Path(predictions).with_suffix(".reviews.jsonl"), rows)
            records = read_records(output)
        categories = {}
        if gold is not None:
            categories = {record.id: record.get("category", str, None) for record in read_records(gold)}
        left_out = {str(name) for name in ([ignore] if isinstance(ignore, (str, int)) else ignore)}
        kept = [record for record in records if record.id not in left_out]
        rows = [record.get("category", str, categories.get(record.id)) for record in kept]
        scores = [_scores(record, reparse) for record in kept]
        summary = summarise(zip(rows, scores, strict=True))
        cases = self.cases([(record, None) for record in kept], review_measures(scores), {"by_category": rows})
        return Metrics(summary | metrics, cases)


def review_measures(scores: Sequence[Sequence[float]]) -> dict[str, Measure]:
    """The columns of `summarise` as measures; without the rounding of the published ones."""
    first, second = ([pair[side] for pair in scores] for side in (0, 1))
    return {
        "relative_score": Measure(np.array(list(zip(second, first, strict=True)), float).reshape(-1, 2)),
        "reference": Measure.mean(first, scale=10.0),
        "candidate": Measure.mean(second, scale=10.0),
    }


def review(
    pairs: Sequence[tuple[Record, Record | None]],
    context: str | Path,
    reference: str | Path,
    rules: str | Path | None,
    judge: Judge,
    images: Path | None = None,
) -> tuple[list[dict[str, Any]], list[Exception]]:
    """Have a judge compare every answer with the reference answer, which is shown first.

    Args:
        pairs: Question and answer; a question without an answer is reviewed with an empty one.
        images: Folder of the pictures, for a judge that is to see them.

    Returns:
        Review records in the published format, in order of the questions, and the calls that failed.

    Raises:
        RecordError: If a question has no context or reference.
    """
    contexts = {record.get("image", str): record for record in read_records(context)}
    references = index(read_records(reference), lambda record: record.id)
    published = read_rules(rules) if rules is not None else {}
    prepared = []
    for question, answer in pairs:
        image, category = question.get("image", str), question.get("category", str)
        category = category if category.startswith("llava_bench_") else f"llava_bench_{category}"
        if rules is not None and category not in published:
            raise question.error("category", f"{category!r} is not in {rules}; it has {', '.join(published)}")
        own = RULE.format(sight=HIDDEN if images is None else SHOWN)
        rule = published.get(category, {"prompt": own, "role": "Assistant"})
        if image not in contexts:
            raise question.error("image", f"{image!r} has no context in {context}")
        if question.id not in references:
            raise question.error("question_id", f"{question.id!r} has no answer in {reference}")
        first = references[question.id]
        content = review_content(
            contexts[image].get("caption", (str, list)),
            question.get("text", str),
            first.get("text", str),
            text_of(answer) or "",
            rule["prompt"],
            rule["role"],
        )
        shown: str | list[dict[str, Any]] = content
        if images is not None:  # as LLaVA-Critic learned it: the picture, a line break, what is asked
            shown = [*media_parts(question, images), {"type": "text", "text": f"\n{content}"}]
        prepared.append((question, first, answer, category, shown))
    replies = judge.ask_all(
        [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": shown}] for *_, shown in prepared
    )
    failures = [reply for reply in replies if isinstance(reply, Exception)]
    rows = [
        review_record(
            number,
            question.data,
            first.data.get("answer_id", first.data["question_id"]),
            None if answer is None else answer.data.get("answer_id", answer.data["question_id"]),
            category,
            reply,
        )
        for number, ((question, first, answer, category, _), reply) in enumerate(zip(prepared, replies, strict=True), 1)
        if not isinstance(reply, Exception)
    ]
    return rows, failures


def read_rules(path: str | Path) -> dict[str, dict[str, str]]:
    """Instructions to a judge by category, as `rule.json` has them: each with `prompt` and `role`.

    Raises:
        UserError: If the file has another form.
    """
    rules = read_json(path)
    if not isinstance(rules, dict) or not all(isinstance(rule, dict) for rule in rules.values()):
        raise UserError(f"{path}: must be an object of categories, each with prompt and role")
    for name, rule in rules.items():
        if not isinstance(rule.get("prompt"), str) or not isinstance(rule.get("role"), str):
            raise UserError(f"{path}: category {name!r} needs the texts prompt and role")
    return rules
