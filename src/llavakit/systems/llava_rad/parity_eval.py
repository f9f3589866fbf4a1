"""LLaVA-Rad's golden components that score reports."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig

from llavakit.evaluation.metrics import reports
from llavakit.evaluation.metrics.chexbert import CheXbert, report_ids, word_pieces
from llavakit.evaluation.metrics.resampling import Sums, draw, estimate
from llavakit.evaluation.reports.rubric import read_rubric
from llavakit.evaluation.score import score
from llavakit.proof.entries import check_keys
from llavakit.proof.golden import Case, Example, Result, component, examples, take

Raw = Mapping[str, Any]
SEED = 3  # of the original script's resamples
PARTS = ("precision", "recall", "fmeasure")


def retrieval(case: Case) -> Result:
    """R@k and ranks in both directions; a common factor of the scores changes no rank."""
    case.informational("config.logit_scale")
    return Result(json=reports.retrieval_ranks(case.tensors["image_features"], case.tensors["text_features"]))


def scored(pairs: Sequence[tuple[Raw, Raw]], names: Sequence[str], **options: Any) -> dict[str, dict[str, float]]:
    """`llavakit score report` of pairs of (prediction, reference), fractions instead of percent."""
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / name for name in ("predictions.jsonl", "references.jsonl")]
        for file, side in zip(files, zip(*pairs, strict=True), strict=True):
            lines = [json.dumps({"id": number, "text": "", **own}) + "\n" for number, own in enumerate(side)]
            file.write_text("".join(lines))
        found = score("report", *files, metrics=names, seed=SEED, empty="score", **options)["metrics"]["scores"]
    return {name: {key: value and value / 100 for key, value in own.items()} for name, own in found.items()}


def interval(found: Mapping[str, float]) -> dict[str, float]:
    """A bootstrap interval under the script's names."""
    return {"median": found["median"], "ci_l": found["low"], "ci_h": found["high"]}


@component(ordered=True)  # which texts a seeded resample holds depends on their places
def rouge_and_bleu(case: Case) -> Iterator[Example]:
    """Every text alone, and the corpus with the script's resamples."""
    case.informational("config.rouge_score", "config.sacrebleu", "config.bootstrap")
    texts = [str(text) for text in case.inputs["predictions"]]
    wanted = [str(text) for text in case.inputs["references"]]
    pairs = [({"text": own}, {"text": other}) for own, other in zip(texts, wanted, strict=True)]
    kinds = {"rougeL": "google_rouge_l", "rouge1": "google_rouge_1", "rouge2": "google_rouge_2"}

    def per_item() -> Result:
        rows = [scored([pair], list(kinds.values())) for pair in pairs]
        values = [{kind: [None, None, row[name]["value"]] for kind, name in kinds.items()} for row in rows]
        ignored = {f"per_item.*.{part}": "`score report` gives F1 alone" for part in (0, 1)}
        return Result(json=values, ignored=ignored)

    def rouge(kind: str) -> Result:
        own = interval(scored(pairs, [kinds[kind]])[kinds[kind]])
        ends = {f"ROUGE-*.{end}": "one report: there is nothing to resample" for end in ("ci_l", "ci_h")}
        return Result(json=own, ignored=ends if len(pairs) == 1 else {})

    def bleu(order: int) -> Result:
        name = f"sacrebleu_{order}"
        whole = scored(pairs, [name])[name]["value"] * 100  # which the script calls a median
        reason = "sacrebleu's interval is symmetric and may leave the range; `score report` gives percentiles"
        return Result(
            json={"median": whole, "ci_l": None, "ci_h": None},
            ignored={f"BLEU-*.{end}": reason for end in ("ci_l", "ci_h")},
        )

    yield Example("per_item", per_item, "per_item")
    for name in case.wanted.json:
        if name.startswith("ROUGE-"):
            yield Example(name, partial(rouge, f"rouge{name[6:]}"), name)
        elif name.startswith("BLEU-"):
            yield Example(name, partial(bleu, int(name[5:])), name)


def chexbert(case: Case) -> Iterator[Example]:
    """F1 of CheXbert's classes, agreement by class, and the resampled averages."""
    case.informational(*(f"config.{name}" for name in ("five", "no_finding", "bootstrap", "condition_order")))
    case.informational("config.class_ids", "config.class_ids.*", "config.original_metrics_condition_names")
    found, wanted = (np.array(take(case.inputs[f"{side}_classes"])) for side in ("hypothesis", "reference"))
    weights = [float(weight) for weight in case.inputs["weighted_f1_weights"]]
    kinds = {"f14": {}, "f5": {"five": True}, "f14p": {"uncertain": True}, "f5p": {"five": True, "uncertain": True}}

    def script() -> dict[str, Any]:
        names = [name for name in case.wanted.json["original_test"] if name != "avg"]  # in the script's wrong order
        return dict(zip([*names, "avg"], reports.agreement(found, wanted, weights), strict=True))

    def resampled() -> dict[str, Any]:
        sides = ([{"text": "x", "labels": own} for own in side.T.tolist()] for side in (found, wanted))
        names = {kind: f"chexbert_f1_{kind}_14" for kind in ("micro", "macro")}
        values = scored(list(zip(*sides, strict=True)), list(names.values()), coding="chexbert")
        return {kind: interval(values[name]) for kind, name in names.items()}

    for name, options in kinds.items():
        yield Example(name, partial(reports.chexbert_f1, found, wanted, **options), name)
    yield Example("original_test", script, "original_test")
    yield Example("bootstrap_f14", resampled, "bootstrap_f14")


def radgraph(case: Case) -> Iterator[Example]:
    """F1 of graphs by level, the mean over reports, and resampled values."""
    case.informational("config.tuple", "config.bootstrap")
    level = case.config.get("reported_level", "partial")

    def graphs(pair: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return take(pair["hypothesis"]), take(pair["reference"])

    def rewards(pair: Mapping[str, Any]) -> dict[str, Any]:
        both = graphs(pair)
        found = {name: list(reports.radgraph_f1(*both, name)) for name in reports.LEVELS}
        return found | {"all": list(found.values()) if all(both) else [0.0, 0.0, 0.0]}

    def per_report() -> list[list[float]]:
        own = [list(reports.radgraph_f1(*graphs(pair), level)) for pair in case.inputs["pairs"]]
        return own + [[0.0] * 3] * (len(case.wanted.json["per_report"]) - len(own))  # reports without a text

    def means() -> dict[str, float]:
        columns = np.mean(per_report(), axis=0)
        found = dict(zip(("f1-radgraph", "precision-radgraph", "recall-radgraph"), map(float, columns), strict=True))
        both = [graphs(pair) for pair in case.inputs["pairs"]]
        both += [({}, {})] * (len(case.wanted.json["per_report"]) - len(both))
        records = [({"graph": own}, {"graph": other}) for own, other in both]
        return found | {"f1-radgraph": scored(records, [f"radgraph_{level}"])[f"radgraph_{level}"]["value"]}

    def resampled() -> dict[str, float]:
        values = Sums.mean([float(value) for value in case.inputs["bootstrap_values"]], -np.inf, np.inf)
        return interval(estimate(values, draw(len(values.table), seed=SEED))._asdict())

    yield from examples(rewards, case.inputs["pairs"], "rewards")
    yield Example("per_report", per_report, "per_report")
    yield Example("mean", means, "mean_with_two_empty_reports")
    yield Example("bootstrap", resampled, "bootstrap")


def chexprompt_parser(case: Case) -> Iterator[Example]:
    """Counts in a judge's replies, and the end of the message to it."""
    case.informational(*(f"config.{part}" for part in ("error_types", "error_types.*", "defaults", "defaults.*")))

    rubric = read_rubric("chexprompt")

    def rating(reply: str) -> dict[str, Any]:
        found = rubric.parse(reply)
        significant, insignificant = found or (None, None)
        return {
            "clinically_significant": significant,
            "clinically_insignificant": insignificant,
            "valid": found is not None,
        }

    def tail() -> str:
        prompt = replace(rubric, examples="EXAMPLES").messages("REF", "CAND")[-1]["content"]
        return prompt[prompt.index("##\nEXAMPLES") :]

    yield from examples(rating, case.inputs["completions"], "ratings")
    yield Example("tail", tail, "user_prompt_tail")


def chexbert_network(case: Case) -> Result:
    """Scores of every condition's head."""
    case.informational("config.published")
    config = BertConfig(**check_keys(take(case.config["bert"]), BertConfig().to_dict(), "config.bert"))
    net = CheXbert(config).load(case.weights())
    with torch.no_grad():
        heads = net(case.tensors["input_ids"], case.tensors["attention_mask"])
    return Result(tensors={f"head_{number}": scores for number, scores in enumerate(heads)})


def chexbert_ids(case: Case) -> Iterator[Example]:
    """Ids of reports; `REPEAT:s:n` in a case is the string s, n times."""
    with tempfile.TemporaryDirectory() as place:
        vocabulary = Path(place) / "vocab.txt"
        vocabulary.write_text("".join(f"{piece}\n" for piece in case.config["vocab"]), encoding="utf-8")
        tokenizer = word_pieces(vocabulary, lower=case.config.get("do_lower_case", True))

    def ids(report: str) -> list[int]:
        found = re.fullmatch(r"REPEAT:(.*):(\d+)", report, re.DOTALL)
        return report_ids(found[1] * int(found[2]) if found else report, tokenizer)

    yield from examples(ids, case.inputs["reports"], "ids")


ADAPTERS: dict[str, Any] = {
    "metric_cross_modal_retrieval": retrieval,
    "metric_rouge_l_bleu": rouge_and_bleu,
    "metric_chexbert_f1": chexbert,
    "metric_network_chexbert": chexbert_network,
    "metric_preprocessing_chexbert": chexbert_ids,
    "metric_radgraph_f1": radgraph,
    "metric_chexprompt_parser": chexprompt_parser,
}
