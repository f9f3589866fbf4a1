"""LLaVA-NeXT-Interleave's golden components of its benchmark: normalisation, scores, the harness's variant, shards."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.evaluation.run import block_of
from llavakit.evaluation.score import benchmark, score
from llavakit.proof.entries import or_nan
from llavakit.proof.golden import Case, Example, Result, examples, take
from llavakit.systems.llava_next_interleave.scoring import harness_overall, normalised

TASK, DATASET = "interleave_bench", "RAVEN"
KINDS = {"rouge": "open-ended", "multichoice": "multi-choice", "choice_image": "multi-choice"}
METRICS = {"Rouge-L f", "Accuracy"}


def reported(rows: Sequence[Mapping[str, Any]], variant: str = "published") -> dict[str, Any]:
    """The report of `llavakit score` on a result file."""
    with tempfile.TemporaryDirectory() as folder:
        file, report = Path(folder) / "result.jsonl", Path(folder) / "report.json"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        score(TASK, file, variant=variant, report=report)
        found = json.loads(report.read_text(encoding="utf-8"))
    values = found["datasets"].items()
    return found | {"datasets": {name: {kind: or_nan(value) for kind, value in own.items()} for name, own in values}}


def normalise(case: Case) -> Iterator[Example]:
    """Answers as the script compares them."""
    yield from examples(normalised, case.inputs["answers"], "processed")


def scores(case: Case) -> Iterator[Example]:
    """Each metric on predictions of one data set."""

    def of_metric(request: Mapping[str, Any]) -> dict[str, Any]:
        kind = {"dataset": DATASET, "question_type": KINDS[request["metric"]]}
        found = reported([kind | take(row) for row in request["predictions"]])
        return {"result": found["datasets"][DATASET], "per_sample": found["details"][DATASET]}

    yield from examples(of_metric, case.inputs)


def benchmark_script(case: Case) -> Result:
    """The whole script on a result file."""
    found = reported(take(case.inputs["predictions"]))
    return Result(json={name: found[name] for name in ("datasets", "details", "categories")})


def harness(case: Case) -> Iterator[Example]:
    """The harness's scores of (reference, prediction) pairs, its questions, and its mean."""

    def of_kind(kind: str, pair: Sequence[str]) -> float:
        row = {"dataset": DATASET, "question_type": kind, "sample_id": 0}
        texts = dict(zip(("gt_response", "pred_response"), pair, strict=True))
        (detail,) = reported([row | texts], "harness")["details"][DATASET]
        return detail["score"]

    def asked(request: Mapping[str, Any]) -> str:
        doc, options = take(request["doc"]), take(request.get("kwargs") or {})
        record = {
            "sample_id": 0,
            "conversations": [{"from": "human", "value": doc["question"]}],
            "image": ["-"] * doc["question"].count("<image>") or None,
            "metadata": {"dataset": DATASET, "question_type": doc["question_type"]},
        }
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "test.json"
            file.write_text(json.dumps([record]), encoding="utf-8")
            return benchmark(TASK).questions(file, **options)[0].text

    def overall(samples: Sequence[Mapping[str, Any]]) -> float | None:
        return harness_overall([(row["sub_task"], row["score"]) for row in samples])[1]

    for name, kind in (("mcq", "multi-choice"), ("oe", "open-ended")):
        yield from examples(lambda pair, kind=kind: of_kind(kind, pair), case.inputs.get(name, ()), name)
    yield from examples(asked, case.inputs.get("docs", ()), "text")
    yield from examples(overall, case.inputs.get("overall", ()), "overall")


def chunks(case: Case) -> Iterator[Example]:
    """Blocks of a split; null for those that do not exist."""

    def blocks(query: Mapping[str, Any]) -> list[list[int] | None]:
        items = list(range(query["n"]))
        return [block_of(items, k + 1, query["chunks"]) or None for k in range(query["chunks"])]

    yield from examples(blocks, case.inputs["queries"], "chunks")


ADAPTERS = {
    "interleave_normalise": normalise,
    "interleave_scores": scores,
    "interleave_benchmark_script": benchmark_script,
    "lmms_eval_interleave": harness,
    "interleave_chunks": chunks,
}
