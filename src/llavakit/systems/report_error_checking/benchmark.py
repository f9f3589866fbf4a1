"""The benchmark `report-errors`: drafts with and without mistakes, always asked three times.

A question file is what `llavakit synthesize report_errors` writes; it is the gold file too. Every draft is asked about
with its own picture, with a blank picture of the same size, and with the picture of another subject: without these two,
a score may come from traces of the editing (spec sections 7 and 9). Short forms of gold are lines of `question_id` and
`answer` (Y, N, or a type of mistake).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.errors import UserError, quoted
from llavakit.evaluation.benchmarks.base import (
    Benchmark,
    Question,
    folder_of,
    image_of,
    need_gold,
    percent,
    write_lines,
)
from llavakit.evaluation.benchmarks.likelihood import shares
from llavakit.evaluation.cases import Metrics
from llavakit.evaluation.controls import blank
from llavakit.evaluation.metrics.intervals import Measure, mcnemar
from llavakit.evaluation.records import Record, choose, index, read_records, refuse_surplus
from llavakit.systems.report_error_checking import answers
from llavakit.systems.report_error_checking.edits import pick

OWN, CONTROLS = "own", ("blank", "swapped")
REPLIES = {"simple": ("Y", "N"), "complex": ("A", "B", "C")}


@dataclass(frozen=True)
class Draft:
    """A draft that is asked about.

    Attributes:
        record: Where it stands.
        name: Its id.
        level: "simple" or "complex".
        answer: "Y" or "N", or the type of mistake.
        pictured: Whether it has a picture, so that there are controls.
    """

    record: Record
    name: str
    level: str
    answer: str
    pictured: bool

    @property
    def runs(self) -> tuple[str, ...]:
        """The pictures with which it is asked."""
        return (OWN, *CONTROLS) if self.pictured else (OWN,)


def run_id(name: str, pictures: str) -> str:
    """Id of a question about a draft with its own or other pictures."""
    return name if pictures == OWN else f"{name}#{pictures}"


def drafts_of(path: str | Path) -> list[Draft]:
    """The drafts of a file.

    Raises:
        RecordError: If a record is broken or an id is used twice.
    """
    records = read_records(path)
    found = [_draft(record) for record in records]
    index(records, lambda record: _name(record))
    return found


def _name(record: Record) -> str:
    return str(record.get("question_id" if "question_id" in record.data else "id", (str, int)))


def _draft(record: Record) -> Draft:
    said = record.data.get("answer")
    if said is None:
        turns = record.get("conversations", list)
        if len(turns) != 2 or not all(
            isinstance(turn, Mapping) and isinstance(turn.get("value"), str) for turn in turns
        ):
            raise record.error("conversations", "must be a question and its answer")
        said = turns[1]["value"]
    if not isinstance(said, str):
        raise record.error("answer", "must be Y, N, or a type of mistake")
    name, pictured = _name(record), record.data.get("image") is not None
    simple = answers.simple_answer(said)
    if simple is not None:
        return Draft(record, name, "simple", simple, pictured)
    kind = answers.complex_answer(said)
    if kind is None:
        raise record.error("answer", f"must be Y, N, or one of {', '.join(answers.TYPES)}; is {quoted(said)}")
    return Draft(record, name, "complex", kind, pictured)


class ReportErrors(Benchmark):
    """Whether a draft has a mistake (SIMPLE), and of which type (COMPLEX)."""

    title = "Report error-checking"
    max_new_tokens = 8
    questions_are_gold = True

    def questions(
        self, path: str | Path, images: str | Path | None = None, *, by: str = "text", seed: int = 0
    ) -> list[Question]:
        """Every draft with its own, a blank and a swapped picture.

        Args:
            by: "text" lets the model write; "likelihood" compares the likelihoods of the options, which the rule
                "mean" needs.
            seed: Of the choice of swapped pictures.
        """
        choose(by, "by", ("text", "likelihood"))
        drafts, folder = drafts_of(path), folder_of(path, images)
        pictures = list(
            dict.fromkeys(
                (str(d.record.data.get("subject_id")), d.record.get("image", str)) for d in drafts if d.pictured
            )
        )
        found = []
        for draft in drafts:
            turns = draft.record.get("conversations", list)
            text = turns[0]["value"].removeprefix("<image>\n")
            for run in draft.runs:
                media = ()
                if run == OWN and draft.pictured:
                    media = (image_of(folder / draft.record.get("image", str)),)
                elif run == "blank":
                    media = ({"type": "image", "image": blank(folder / draft.record.get("image", str))},)
                elif run == "swapped":
                    media = (image_of(folder / _other(draft, pictures, seed)),)
                stored = {"prompt": text, "pictures": run}
                replies = REPLIES[draft.level] if by == "likelihood" else ()
                found.append(Question(run_id(draft.name, run), text, media, stored, replies=replies))
        return found

    def score(
        self,
        predictions: str | Path,
        gold: str | Path | None,
        *,
        members: str | list[str] | None = None,
        rule: str = "majority",
        tie: str = "Y",
        against: str | None = None,
        reader: str | None = None,
        write: str | None = None,
        missing: str = "error",
        extra: str = "error",
    ) -> dict[str, Any]:
        """Shares in percent with 95 % intervals of Wilson, for the draft's own, blank and swapped pictures.

        Args:
            members: Predictions files of further members of an ensemble.
            rule: How members decide: "majority", "any", "all", or "mean" (of the probability of a mistake; needs
                predictions that were asked with by=likelihood). Types of mistake go by the majority.
            tie: What equal numbers of Y and N are.
            against: Predictions file of another system, for an exact McNemar test.
            reader: Predictions file of a reference reader; reported is which share of its mistakes is put right.
            write: File to write the decisions to, as predictions.
            missing: What a question without a prediction is: an "error", or "wrong".
            extra: What a prediction without a question is: an "error", or left out ("ignore").
        """
        choose(rule, "rule", answers.RULES)
        choose(tie, "tie", ("Y", "N"))
        choose(missing, "missing", ("error", "wrong"))
        drafts = drafts_of(need_gold(gold, self.title, "the question file, or JSONL of question_id and answer"))
        more = members.split(",") if isinstance(members, str) else list(members or ())
        files = [predictions, *(name.strip() for name in more)]
        runs = [_read(file, drafts, missing, extra) for file in files]
        decided = {key: _decide([run[key] for run in runs], level, rule, tie) for key, level in _keys(drafts)}
        if write is not None:
            rows = [{"question_id": key, "text": said or ""} for key, said in decided.items()]
            write_lines(write, rows)
        found: dict[str, Any] = {"count": len(drafts), "members": len(files)}
        if len(files) > 1:
            found |= {"rule": rule, "tie": tie}
        for level, tables in (("simple", _simple), ("complex", _complex)):
            some = [draft for draft in drafts if draft.level == level]
            found |= tables(some, decided) if some or not drafts else {}
        right = {key: said == truth for (key, said), truth in zip(decided.items(), _truths(drafts), strict=True)}
        tests = _controls(drafts, right)
        own = [right[draft.name] for draft in drafts]
        if against is not None:
            tests["against"] = mcnemar(own, _right(against, drafts, rule, tie, missing))
        if tests:
            found["mcnemar"] = tests
        if reader is not None:
            rescue = answers.rescued(_right(reader, drafts, rule, tie, missing), own)
            found["rescue"] = rescue | {"rate": percent(rescue["rate"])}
        tables_ = [name for name in ("simple", "complex") if name in found]
        bounds = {
            name: {run: {"accuracy": [row["low"], row["high"]]} for run, row in found[name].items()} for name in tables_
        }
        pairs = [(draft.record, runs[0][draft.name]) for draft in drafts]
        return Metrics(found, self.cases(pairs, {"accuracy": Measure.mean(own)}), bounds)


def _other(draft: Draft, pictures: Sequence[tuple[str, str]], seed: int) -> str:
    """The picture of another subject.

    Raises:
        RecordError: If there is none.
    """
    subject, image = str(draft.record.data.get("subject_id")), draft.record.get("image", str)
    start = pick(seed, draft.record.data.get("report_id") or draft.name, "swap", 0, len(pictures))
    for step in range(len(pictures)):
        other, name = pictures[(start + step) % len(pictures)]
        if name != image and ("subject_id" not in draft.record.data or other != subject):
            return name
    raise draft.record.error("image", "there is no picture of another subject to swap it with")


def _keys(drafts: Sequence[Draft]) -> list[tuple[str, str]]:
    """Ids of all questions, with their levels."""
    return [(run_id(draft.name, run), draft.level) for draft in drafts for run in draft.runs]


def _truths(drafts: Sequence[Draft]) -> list[str]:
    return [draft.answer for draft in drafts for _ in draft.runs]


def _read(file: str | Path, drafts: Sequence[Draft], missing: str, extra: str) -> dict[str, Record | None]:
    """The prediction of every question; None for one that is missing and counts as wrong.

    Raises:
        RecordError: For a missing, surplus or repeated one.
    """
    found = index(read_records(file), lambda record: record.id)
    places = {run_id(draft.name, run): draft for draft in drafts for run in draft.runs}
    absent = [key for key in places if key not in found]
    if absent and missing == "error":
        controls = " (blank and swapped pictures are asked about too)" if "#" in absent[0] else ""
        raise places[absent[0]].record.error(
            "question_id",
            f"{quoted(absent[0])} has no prediction in {file}{controls}; finish the run, or score with missing=wrong",
        )
    refuse_surplus(found, places, extra)
    return {key: found.get(key) for key in places}


def _decide(rows: Sequence[Record | None], level: str, rule: str, tie: str) -> str | None:
    """What the members' predictions of one question decide."""
    if level == "simple" and rule == "mean":
        return answers.mean_vote([None if row is None else _probability(row) for row in rows])
    texts = [None if row is None else row.get("text", str) for row in rows]
    if level == "complex":
        return answers.type_vote([None if text is None else answers.complex_answer(text) for text in texts])
    return answers.vote([None if text is None else answers.simple_answer(text) for text in texts], rule, tie)


def _probability(row: Record) -> float:
    """Probability of Y from the likelihoods of Y and N."""
    likelihoods = row.data.get("likelihoods")
    sums = [own.get("sum") if isinstance(own, Mapping) else None for own in likelihoods or ()]
    if len(sums) != 2 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in sums):
        raise row.error("likelihoods", "are missing; ask with by=likelihood, or use another rule than mean")
    return shares(sums)[0]


def _right(file: str, drafts: Sequence[Draft], rule: str, tie: str, missing: str) -> list[bool]:
    """Whether another system, or a reader, is right about the drafts with their own pictures."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    plain = [Draft(draft.record, draft.name, draft.level, draft.answer, pictured=False) for draft in drafts]
    found = _read(file, plain, missing, "ignore")
    rule = rule if rule != "mean" else "majority"
    return [_decide([found[draft.name]], draft.level, rule, tie) == draft.answer for draft in drafts]


def _by_run(
    drafts: Sequence[Draft], decided: Mapping[str, str | None], metrics: Callable[..., dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Metrics with own, blank and swapped pictures; the latter two only where drafts have any."""
    found = {}
    for run in (OWN, *CONTROLS):
        asked = [draft for draft in drafts if run in draft.runs]
        if asked or run == OWN:
            said = [decided[run_id(draft.name, run)] for draft in asked]
            found[run] = metrics([draft.answer for draft in asked], said)
    return found


def _columns(found: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """A table of shares in percent, the first with its interval, by run."""
    return {
        run: {
            names[0]: percent(own[names[0]]),
            "low": percent(own["wilson95"][0]),
            "high": percent(own["wilson95"][1]),
            **{name: percent(own[name]) for name in names[1:]},
        }
        for run, own in found.items()
    }


def _simple(drafts: Sequence[Draft], decided: Mapping[str, str | None]) -> dict[str, Any]:
    """Tables of the SIMPLE level."""
    found = _by_run(drafts, decided, answers.simple_metrics)
    precisions = {
        run: {
            f"{100 * share:g} %": percent(answers.precision_at(share, own["recall"], own["specificity"]))
            for share in answers.PREVALENCES
        }
        for run, own in found.items()
    }
    return {
        "simple": _columns(found, ("accuracy", "recall", "specificity", "precision", "f1")),
        "simple_counts": {
            run: {name: own[name] for name in ("tp", "tn", "fp", "fn", "unparsed")} for run, own in found.items()
        },
        "simple_precision_where_mistakes_are": precisions,
    }


def _complex(drafts: Sequence[Draft], decided: Mapping[str, str | None]) -> dict[str, Any]:
    """Tables of the COMPLEX level."""
    found = _by_run(drafts, decided, answers.complex_metrics)
    return {
        "complex": _columns(found, ("accuracy", "macro_f1")),
        "complex_f1": {
            run: {name: percent(value) for name, value in own["per_class_f1"].items()} for run, own in found.items()
        },
        "complex_confusion": found[OWN]["confusion"],
    }


def _controls(drafts: Sequence[Draft], right: Mapping[str, bool]) -> dict[str, Any]:
    """The draft's own picture against blank and swapped ones."""
    pictured = [draft for draft in drafts if draft.pictured]
    if not pictured:
        return {}
    own = [right[draft.name] for draft in pictured]
    return {run: mcnemar(own, [right[run_id(draft.name, run)] for draft in pictured]) for run in CONTROLS}
