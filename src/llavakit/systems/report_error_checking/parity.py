"""The golden components of report error-checking: choices, edits, synthesis, records, votes and metrics."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import UserError
from llavakit.evaluation.score import score
from llavakit.proof.golden import Case, Example, Result, component, examples, take
from llavakit.systems.report_error_checking import answers, edits
from llavakit.systems.report_error_checking.damage import (
    damage,
    donor_sentences,
    remove_candidates,
    substitute_candidates,
)
from llavakit.systems.report_error_checking.donors import DonorIndex, DonorWriter
from llavakit.systems.report_error_checking.prompts import gaze_record
from llavakit.systems.report_error_checking.reading import read
from llavakit.systems.report_error_checking.tables import Tables

TABLES = ("lexicon", "substitutions", "negation", "uncertainty", "break", "donor_exclusion", "abbreviations")


def seeded_choice(case: Case) -> list[Example]:
    """Choices that follow from a seed."""
    return examples(lambda arguments: edits.pick(*take(arguments)), case.inputs)


def apply_edits(case: Case) -> list[Example]:
    """Edits made; and taken back, which must give the text before."""

    def made(one: Mapping[str, Any]) -> str:
        text, changes = one["text"], take(one["edits"])
        modified = edits.apply(text, changes)
        if edits.revert(modified, changes) != text:
            raise ValueError("taking the edits back does not give the original text")
        return modified

    return examples(made, case.inputs)


def error_synthesis(case: Case) -> Iterator[Example | Result]:
    """Every intermediate of every report, and what becomes of it under every seed."""
    tables = Tables.of({name: take(case.config[name]) for name in TABLES})
    corpus = take(case.inputs["corpus"])
    reports = {entry["report_id"]: read(entry["text"], tables) for entry in corpus}
    with tempfile.TemporaryDirectory() as folder:
        writer = DonorWriter(Path(folder))
        for number, entry in enumerate(corpus):
            report = reports[entry["report_id"]]
            found = [(place, report.sentence(place), labels) for place, labels in donor_sentences(report, tables)]
            writer.add(number, entry["split"], entry["subject_id"], entry["report_id"], found)
        writer.close()
        index = DonorIndex(Path(folder))
        donors = {
            entry["report_id"]: index.for_host(
                entry["split"], entry["subject_id"], reports[entry["report_id"]].asserted
            )
            for entry in corpus
        }
        listed = {name: [donors[name][number] for number in range(len(donors[name]))] for name in donors}
    yield Result(
        json={
            "sentences": {name: [list(span) for span in report.sentences] for name, report in reports.items()},
            "entities": {
                name: [dataclasses.asdict(entity) for entity in report.entities] for name, report in reports.items()
            },
            "remove_candidates": {name: remove_candidates(report) for name, report in reports.items()},
            "insert_candidates": {
                name: [[donor.report_id, donor.sentence, donor.text] for donor in own] for name, own in listed.items()
            },
            "substitute_candidates": {
                name: [list(span) for span in substitute_candidates(report, tables)] for name, report in reports.items()
            },
        }
    )

    def synthesised(one: tuple[str, int]) -> dict[str, Any]:
        name, seed = one
        found = damage(reports[name], name, seed, listed[name], tables)
        return {"report_id": name, "seed": seed, "modified": found.modified, **found.provenance()}

    pairs = [(entry["report_id"], seed) for entry in corpus for seed in take(case.inputs["seeds"])]
    yield from examples(synthesised, pairs, "synthesis")


@component(ordered=True)
def simple_record(case: Case) -> list[Example]:
    """Records of the later project; their ids count them."""
    dataset, kind = case.config["dataset"], case.config["image"]
    if kind not in ("heat-map variant", "plain"):
        raise UserError(f"image: must be heat-map variant or plain, not {kind!r}")
    entries = enumerate(case.inputs)
    return examples(lambda one: gaze_record(one[1], dataset, one[0], kind == "heat-map variant"), list(entries))


def votes_and_metrics(case: Case) -> Iterator[Example | Result]:
    """Replies read, votes of members, and the scores of predictions files."""
    config = {name: case.config[name] for name in ("positive", "tie", "unparsed")}
    if config["positive"] != "Y":
        raise UserError(f"positive: must be Y, not {config['positive']!r}")
    tie = config["tie"][:1]
    inputs = case.inputs
    yield from examples(answers.simple_answer, inputs["answers"], "parsed")
    models, gold = take(inputs["models"]), take(inputs["gold"])
    rules = {"majority": ("majority", tie), "any": ("any", tie), "all": ("all", tie)}
    rules["majority_tie_N"] = ("majority", "N")
    for name, (rule, way) in rules.items():
        votes = functools.partial(_ensemble, gold, models, rule=rule, tie=way)
        yield Example(f"votes.{name}", lambda votes=votes: votes()[0], f"votes.{name}")

    def alone() -> dict[str, Any]:
        return _fractions(_ensemble(gold, models[:1])[1])

    yield Example("metrics.model0", alone, "metrics.model0")
    ensemble = functools.cache(lambda: _ensemble(gold, models, tie=tie)[1])
    yield Example("metrics.majority", lambda: _fractions(ensemble()), "metrics.majority")

    def tested() -> dict[str, Any]:
        test = ensemble()["mcnemar"]["against"]  # the ensemble comes first there
        sides = {"only_first": test["only_second"], "only_second": test["only_first"]}
        return sides | {"p_exact_two_sided": test["p"]}

    yield Example("mcnemar", tested, "mcnemar_model0_vs_majority")

    def rescued() -> dict[str, Any]:
        found = ensemble()["rescue"]
        return {"n_last_model_wrong": found["reader_wrong"], "majority_right": found["rescued"]}

    yield Example("rescued", rescued, "rescued")

    def types() -> dict[str, Any]:
        said = [text or "" for text in take(inputs["complex_pred"])]
        _, metrics = _ensemble(take(inputs["complex_gold"]), [said])
        shares = {name: value / 100 for name, value in metrics["complex"]["own"].items()}
        by_type = {name: value / 100 for name, value in metrics["complex_f1"]["own"].items()}
        return {"per_class_f1": by_type, "macro_f1": shares["macro_f1"], "accuracy": shares["accuracy"]}

    yield Example("complex", types, "complex")


def _fractions(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Counts and shares of the drafts' own pictures as the case writes them."""
    cells = {name: value / 100 for name, value in metrics["simple"]["own"].items()}
    interval = [cells.pop("low"), cells.pop("high")]
    return metrics["simple_counts"]["own"] | cells | {"wilson95": interval}


def _ensemble(
    gold: Sequence[str], models: Sequence[Sequence[str]], **options: Any
) -> tuple[list[str | None], dict[str, Any]]:
    """Decisions and metrics of predictions files; the first model is tested against, the last one is the reader."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{number}.jsonl" for number in range(len(models))]
        for file, texts in zip(files, models, strict=True):
            _write(file, [{"question_id": number, "text": text} for number, text in enumerate(texts)])
        _write(folder / "gold.jsonl", [{"question_id": n, "answer": answer} for n, answer in enumerate(gold)])
        metrics = score(
            "report-errors",
            files[0],
            folder / "gold.jsonl",
            members=[str(file) for file in files[1:]],
            against=str(files[0]),
            reader=str(files[-1]),
            write=str(folder / "decisions.jsonl"),
            **options,
        )["metrics"]
        rows = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    return [row["text"] or None for row in rows], metrics


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


ADAPTERS = {
    "seeded_choice": seeded_choice,
    "edits": apply_edits,
    "error_synthesis": error_synthesis,
    "simple_record": simple_record,
    "votes_and_metrics": votes_and_metrics,
}
