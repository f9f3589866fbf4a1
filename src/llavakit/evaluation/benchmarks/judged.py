"""LLaVA-Bench (in the wild) and MM-Vet: free answers graded by a language model.

Both take either a file that was graded already, or a predictions file and the options of a judge. The instructions to
the judge here are llavakit's own words; to compare with published figures give the published ones with `rules`, and
the same judge. Source: spec of LLaVA-1.5, section 7.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit.errors import RecordError, UserError
from llavakit.evaluation.benchmarks.base import (
    Benchmark,
    Question,
    folder_of,
    is_lines,
    need_gold,
    percent,
    stored_questions,
    text_of,
    write_json,
    write_lines,
)
from llavakit.evaluation.metrics import mean, relative_score
from llavakit.evaluation.records import (
    Record,
    as_records,
    index,
    pair,
    read_answers,
    read_json,
    read_records,
    read_text,
)
from llavakit.evaluation.reviews import parse_pair, review_content, review_record

if TYPE_CHECKING:
    from llavakit.evaluation.judges import Judge

SYSTEM_MESSAGE = "You check the quality of answers. Be helpful and precise."
RULE = (
    "Two AI assistants answered the question above, which a user asked about an image. You cannot see the image; the "
    "context describes it in a few sentences.\n"
    "Judge how helpful, relevant, accurate and detailed each answer is, and give each assistant one overall score from "
    "1 to 10; higher is better.\n"
    "Begin with a line that holds nothing but the two scores, that of Assistant 1 and then that of Assistant 2, with a "
    "space between them.\n"
    "Then explain your scores on the following lines. Do not favour an answer for the place in which it is shown."
)
CATEGORIES = ("llava_bench_conv", "llava_bench_detail", "llava_bench_complex")

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


def make_judge(options: dict[str, Any], predictions: str | Path) -> Judge:
    """A judge from the options of a score; its cache lies beside the predictions unless they say otherwise."""
    from llavakit.evaluation.judges import Judge

    options = dict(options)
    model = options.pop("judge")
    if isinstance(model, Judge):
        return model
    options.setdefault("cache", Path(predictions).with_suffix(".judge.jsonl"))
    return Judge(model, **options)


def judged(judge: Judge, failures: Sequence[Exception], count: int) -> dict[str, Any]:
    """What a result says of its judge: what was asked and used, and how many calls failed and count for nothing.

    Raises:
        UserError: If no call brought an answer.
    """
    if failures and len(failures) == count:
        raise UserError(f"{failures[0]} (so did all {count} calls)")
    return {"failed_calls": len(failures), "judge": judge.report()}


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
    columns = ("relative_score", "reference", "candidate", "count", "failed")

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """Questions of `questions.jsonl`; no response-format sentence."""
        return stored_questions(path, images, keep=("category",))

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        ignore: Sequence[str | int] = (),
        reparse: bool = False,
        context: str | Path | None = None,
        reference: str | Path | None = None,
        rules: str | Path | None = None,
        reviews: str | Path | None = None,
        judge: str | Judge | None = None,
        base_url: str | None = None,
        temperature: float | None = None,
        concurrency: int | None = None,
        cache: str | Path | None = None,
        price_in: float | None = None,
        price_out: float | None = None,
        max_cost: float | None = None,
        missing: str = "error",
        extra: str = "error",
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
            reviews: Where to write the reviews; default: beside the predictions.
            judge: Model that reviews; the further options are those of `Judge` and `APIClient`. A call that fails is
                no review: it is counted in `failed_calls`, and the next call asks it again.
        """
        metrics: dict[str, Any] = {}
        records = read_records(predictions)
        if records and not any(name in records[0].data for name in ("tuple", "score", "content")):
            if judge is None or context is None or reference is None:
                raise UserError(
                    f"{predictions}: holds answers, not reviews; give judge, context and reference to have them "
                    "reviewed (-o judge=MODEL -o context=FILE -o reference=FILE)"
                )
            options = {
                "judge": judge,
                "base_url": base_url,
                "temperature": temperature,
                "concurrency": concurrency,
                "cache": cache,
                "price_in": price_in,
                "price_out": price_out,
                "max_cost": max_cost,
            }
            questions = read_records(need_gold(gold, self.title, "questions.jsonl"))
            pairs = list(pair(questions, records, missing=missing, extra=extra))
            asked = make_judge(_given(options), predictions)
            rows, failures = review(pairs, context, reference, rules, asked)
            metrics = judged(asked, failures, len(pairs))
            output = write_lines(reviews or Path(predictions).with_suffix(".reviews.jsonl"), rows)
            records = read_records(output)
        categories = {}
        if gold is not None:
            categories = {record.id: record.data.get("category") for record in read_records(gold)}
        left_out = {str(name) for name in ([ignore] if isinstance(ignore, (str, int)) else ignore)}
        summary = summarise(
            (record.data.get("category", categories.get(record.id)), _scores(record, reparse))
            for record in records
            if record.id not in left_out
        )
        return summary | metrics


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def review(
    pairs: Sequence[tuple[Record, Record | None]],
    context: str | Path,
    reference: str | Path,
    rules: str | Path | None,
    judge: Judge,
) -> tuple[list[dict[str, Any]], list[Exception]]:
    """Have a judge compare every answer with the reference answer, which is shown first.

    Args:
        pairs: Question and answer; a question without an answer is reviewed with an empty one.

    Returns:
        Review records in the published format, in order of the questions, and the calls that failed.

    Raises:
        RecordError: If a question has no context or reference.
    """
    contexts = {record.get("image", str): record for record in read_records(context)}
    references = index(read_records(reference), lambda record: record.id)
    published = read_json(rules) if rules is not None else {}
    prepared = []
    for question, answer in pairs:
        image, category = question.get("image", str), question.get("category", str)
        category = category if category.startswith("llava_bench_") else f"llava_bench_{category}"
        if rules is not None and category not in published:
            raise question.error("category", f"{category!r} is not in {rules}; it has {', '.join(published)}")
        rule = published.get(category, {"prompt": RULE, "role": "Assistant"})
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
        prepared.append((question, first, answer, category, content))
    replies = judge.ask_all(
        [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": content}]
        for *_, content in prepared
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


# MM-Vet


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


class MMVet(Benchmark):
    """Mean grade in percent, in total and by capability."""

    title = "MM-Vet"
    max_new_tokens = 1024
    columns = ("score", "count")

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """Questions of LLaVA's JSONL, or of `mm-vet.json`; no response-format sentence."""
        if is_lines(path):
            return stored_questions(path, images)
        folder, found = folder_of(path, images), []
        for record in _mmvet_gold(path):
            text = record.get("question", str)
            image = {"type": "image", "image": str(folder / record.get("imagename", str))}
            found.append(Question(record.id, text, (image,), {"prompt": text}))
        return found

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        rules: str | Path | None = None,
        judge: str | Judge | None = None,
        base_url: str | None = None,
        concurrency: int | None = None,
        cache: str | Path | None = None,
        price_in: float | None = None,
        price_out: float | None = None,
        max_cost: float | None = None,
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Mean grades.

        Args:
            predictions: Graded records (with `score` between 0 and 1), or answers that `judge` grades first.
            gold: `mm-vet.json`.
            rules: Text file with the official instruction and examples; default: llavakit's own.
            judge: Model that grades; the further options are those of `Judge` and `APIClient`. A reply that is no
                number is asked for again at temperatures up to 2, then counts 0 (`unparsed`). A call that fails is no
                grade: it is counted in `failed_calls`, and the next call asks it again.
        """
        metrics: dict[str, Any] = {}
        questions = _mmvet_gold(need_gold(gold, self.title, "mm-vet.json"))
        records = read_records(predictions)
        pairs = list(pair(questions, records, key=_mmvet_id, gold_key=lambda row: row.id, missing=missing, extra=extra))
        if records and all("score" in record.data for record in records):
            grades = [0.0 if answer is None else float(answer.get("score", (int, float))) for _, answer in pairs]
        elif judge is None:
            raise UserError(f"{predictions}: holds answers without grades; give judge to have them graded")
        else:
            rule = read_text(rules).rstrip() if rules is not None else GRADE_RULE
            options = {
                "judge": judge,
                "base_url": base_url,
                "concurrency": concurrency,
                "cache": cache,
                "price_in": price_in,
                "price_out": price_out,
                "max_cost": max_cost,
            }
            asker = make_judge(_given(options), predictions)
            unparsed = 0

            def grade(item: tuple[Record, Record | None]) -> float:
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
        return summary | metrics

    def submission(
        self, predictions: str | Path, output: str | Path, questions: str | Path | None = None, **options: Any
    ) -> Path:
        """The results file of the official grader."""
        return write_json(output, mmvet_submission(read_answers(predictions)))


def _mmvet_gold(path: str | Path) -> list[Record]:
    whole = read_json(path)
    if not isinstance(whole, dict) or not all(isinstance(row, dict) for row in whole.values()):
        raise RecordError(str(path), 1, "(json)", "must be mm-vet.json: an object of v1_ID -> question")
    return as_records(path, ({**row, "question_id": name} for name, row in whole.items()))
