"""LLaVA-Rad's golden components that score reports."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig

from llavakit.evaluation.metrics import reports
from llavakit.evaluation.metrics.chexbert import CheXbert, report_ids, word_pieces
from llavakit.evaluation.packages import need
from llavakit.proof.entries import check_keys
from llavakit.proof.golden import Case, Example, Result, examples, take
from llavakit.registry import TEXT_METRICS
from llavakit.systems.llava_rad import chexprompt

SEED = 3  # of the original script's resamples
PARTS = ("precision", "recall", "fmeasure")


def interval(found: reports.Interval) -> dict[str, float]:
    """A bootstrap interval under the script's names."""
    return {"median": found.median, "ci_l": found.low, "ci_h": found.high}


def retrieval(case: Case) -> Result:
    """R@k and ranks in both directions; a common factor of the scores changes no rank."""
    case.informational("config.logit_scale")
    return Result(json=reports.retrieval_ranks(case.tensors["image_features"], case.tensors["text_features"]))


def rouge_and_bleu(case: Case) -> Iterator[Example]:
    """Every text alone, and the corpus with the script's resamples."""
    case.informational("config.rouge_score", "config.sacrebleu", "config.bootstrap")
    texts = [str(text) for text in case.inputs["predictions"]]
    wanted = [str(text) for text in case.inputs["references"]]
    kinds = {"rougeL": "google_rouge_l", "rouge1": "google_rouge_1", "rouge2": "google_rouge_2"}

    def each(kind: str) -> list[tuple[float, float, float]]:
        score = need("rouge_score.rouge_scorer").RougeScorer([kind]).score
        return [tuple(getattr(score(b, a)[kind], part) for part in PARTS) for a, b in zip(texts, wanted, strict=True)]

    def per_item() -> list[dict[str, Any]]:
        columns = {kind: each(kind) for kind in kinds}
        return [{kind: list(values[n]) for kind, values in columns.items()} for n in range(len(texts))]

    def rouge(kind: str) -> dict[str, float]:
        values = TEXT_METRICS.get(kinds[kind])(texts, [[text] for text in wanted]).each
        np.random.seed(SEED)
        scoring = need("rouge_score.scoring")
        aggregator = scoring.BootstrapAggregator(confidence_interval=0.95, n_samples=reports.RESAMPLES)
        for value in values:
            aggregator.add_scores({kind: scoring.Score(value, value, value)})
        found = aggregator.aggregate()[kind]
        return {"median": found.mid.fmeasure, "ci_l": found.low.fmeasure, "ci_h": found.high.fmeasure}

    def bleu(order: int) -> dict[str, float]:
        score = need("sacrebleu.metrics").BLEU(max_ngram_order=order)
        found = score.corpus_score(texts, [wanted], n_bootstrap=reports.RESAMPLES)
        return {"median": found.score, "ci_l": found._mean - found._ci, "ci_h": found._mean + found._ci}

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
    kinds = {"f14": {}, "f5": {"five": True}, "f14p": {"uncertain": True}, "f5p": {"five": True, "uncertain": True}}

    def script() -> dict[str, Any]:
        names = [name for name in case.wanted.json["original_test"] if name != "avg"]  # in the script's wrong order
        weights = [float(weight) for weight in case.inputs["weighted_f1_weights"]]
        each = [reports.agreement_by_class(*rows, weights) for rows in zip(found, wanted, strict=True)]
        return dict(zip(names, each, strict=True)) | {"avg": reports.average_agreement(each)}

    def resampled() -> dict[str, Any]:
        def f1(kind: str, one: np.ndarray, other: np.ndarray) -> float:
            return reports.chexbert_f1(one, other)[f"{kind} avg"]["f1-score"]

        return {
            kind: interval(reports.bootstrap(partial(f1, kind), found, wanted, seed=SEED))
            for kind in ("micro", "macro")
        }

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
        return dict(zip(("f1-radgraph", "precision-radgraph", "recall-radgraph"), map(float, columns), strict=True))

    yield from examples(rewards, case.inputs["pairs"], "rewards")
    yield Example("per_report", per_report, "per_report")
    yield Example("mean", means, "mean_with_two_empty_reports")
    values = np.array([float(value) for value in case.inputs["bootstrap_values"]])
    yield Example("bootstrap", lambda: interval(reports.bootstrap(np.mean, values, seed=SEED)), "bootstrap")


def chexprompt_parser(case: Case) -> Iterator[Example]:
    """Counts in a judge's replies, and the end of the message to it."""
    case.informational(*(f"config.{part}" for part in ("error_types", "error_types.*", "defaults", "defaults.*")))

    def rating(reply: str) -> dict[str, Any]:
        found = chexprompt.parse(reply)
        return {
            "clinically_significant": found.significant,
            "clinically_insignificant": found.insignificant,
            "valid": found.valid,
        }

    yield from examples(rating, case.inputs["completions"], "ratings")
    yield Example("tail", lambda: chexprompt.tail("EXAMPLES", "REF", "CAND"), "user_prompt_tail")


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
