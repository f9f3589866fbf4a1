"""Metrics of radiology reports on what labellers found: CheXbert's classes, RadGraph's graphs, ranks of retrieval.

Labels and graphs come from models with weights of their own; here they are given. Numbers are those of LLaVA-Rad's
evaluation (arXiv 2403.08002).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from llavakit.evaluation.metrics.agreement import kappa
from llavakit.evaluation.metrics.resampling import Sums, divide

BLANK, POSITIVE, NEGATIVE, UNCERTAIN = range(4)
CONDITIONS = (
    *("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation"),
    *("Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    *("Support Devices", "No Finding"),
)
FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
LEVELS = ("simple", "partial", "complete")
CLASSES = 4


# CheXbert


def findings(classes: np.ndarray, *, uncertain: bool = False) -> np.ndarray:
    """True where a condition is found [conditions, reports].

    Args:
        classes: Class per condition and report, 0 blank, 1 positive, 2 negative, 3 uncertain.
        uncertain: Whether uncertain counts as found (the "+" variants).
    """
    return (classes == POSITIVE) | (uncertain & (classes == UNCERTAIN))


def _ratios(hits: Any, said: Any, true: Any) -> dict[str, Any]:
    """Precision, recall and F1, 0 where one is undefined."""

    def ratio(a: Any, b: Any) -> Any:
        return np.divide(a, b, out=np.zeros_like(np.asarray(a, float)), where=np.asarray(b) > 0)

    return {"precision": ratio(hits, said), "recall": ratio(hits, true), "f1-score": ratio(2.0 * hits, said + true)}


def classification_report(found: np.ndarray, wanted: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support by condition, and their averages, under scikit-learn's names.

    A condition that never occurs and is never said has F1 0 and counts in the macro average (`zero_division=0`).

    Args:
        found, wanted: [conditions, reports], bool.
        names: Of the conditions.
    """
    hits = found & wanted
    counts = [x.sum(1).astype(float) for x in (hits, found, wanted)]
    each, support = _ratios(*counts), counts[2]
    report = {
        name: {key: float(values[n]) for key, values in each.items()} | {"support": float(support[n])}
        for n, name in enumerate(names)
    }
    total = float(support.sum())
    shares = support / total if total else np.zeros_like(support)
    samples = _ratios(*(x.sum(0).astype(float) for x in (hits, found, wanted)))
    averages = {
        "micro avg": _ratios(*(count.sum() for count in counts)),
        "macro avg": {key: values.mean() for key, values in each.items()},
        "weighted avg": {key: (values * shares).sum() for key, values in each.items()},
        "samples avg": {key: values.mean() if len(values) else 0.0 for key, values in samples.items()},
    }
    return report | {
        name: {key: float(value) for key, value in own.items()} | {"support": total} for name, own in averages.items()
    }


def chexbert_f1(
    found: np.ndarray, wanted: np.ndarray, *, five: bool = False, uncertain: bool = False
) -> dict[str, dict[str, float]]:
    """CheXbert F1: of all 14 conditions, or of the five that papers report.

    Args:
        found, wanted: Classes [14, reports] in the order of `CONDITIONS`.
    """
    names = FIVE if five else CONDITIONS
    rows = [CONDITIONS.index(name) for name in names]
    both = (findings(np.asarray(classes)[rows], uncertain=uncertain) for classes in (found, wanted))
    return classification_report(*both, names)


def f1_sums(
    found: np.ndarray, wanted: np.ndarray, average: str, *, five: bool = False, uncertain: bool = False
) -> Sums:
    """F1 of CheXbert's classes as sums over reports; see `chexbert_f1`.

    Args:
        found, wanted: Classes [14, reports] in the order of `CONDITIONS`.
        average: "micro" (hits and misses of all conditions together); "macro" (mean over conditions; one that never
            occurs and is never said counts as 0, as published); "present" (mean over the conditions that the references
            have; not defined where they have none).
    """
    rows = [CONDITIONS.index(name) for name in (FIVE if five else CONDITIONS)]
    said, true = (findings(np.asarray(classes)[rows], uncertain=uncertain) for classes in (found, wanted))
    table = np.concatenate([said & true, said, true]).T.astype(float)  # [reports, 3 x conditions]

    def value(sums: np.ndarray) -> np.ndarray:
        hits, said, true = np.split(sums, 3, axis=-1)
        if average == "micro":
            return divide(2 * hits.sum(-1), said.sum(-1) + true.sum(-1), empty=0.0)
        each = divide(2 * hits, said + true, empty=0.0)
        if average == "macro":
            return each.mean(-1)
        return divide((each * (true > 0)).sum(-1), (true > 0).sum(-1))

    return Sums(table, value)


def kappa_sums(found: np.ndarray, wanted: np.ndarray) -> Sums:
    """Mean Cohen's kappa over the 14 conditions as sums over reports, between -1 and 1.

    Conditions on which both always say the same one class have no kappa and are left out.
    """
    pairs = np.asarray(found) * CLASSES + np.asarray(wanted)  # [conditions, reports]
    table = (pairs.T[:, :, None] == np.arange(CLASSES**2)).astype(float).reshape(pairs.shape[1], -1)

    def value(sums: np.ndarray) -> np.ndarray:
        counts = sums.reshape(*sums.shape[:-1], len(CONDITIONS), CLASSES, CLASSES)
        shares = divide(counts, counts.sum((-2, -1), keepdims=True), empty=0.0)
        agreed = np.trace(shares, axis1=-2, axis2=-1)
        expected = (shares.sum(-1) * shares.sum(-2)).sum(-1)
        defined = expected < 1 - 1e-12
        each = divide(agreed - expected, np.where(defined, 1 - expected, 0.0), empty=0.0)
        return divide(each.sum(-1), defined.sum(-1))

    return Sums(table, value, low=-1.0)


def agreement(found: np.ndarray, wanted: np.ndarray, weights: Sequence[float]) -> list[dict[str, float]]:
    """Agreement on every condition by class, and last the means over them, as CheXbert's authors print them.

    "No Finding" has no negation and no uncertain: its F1 of both is 0. The mean of negation leaves it out, and that of
    uncertain leaves out "Support Devices" too.

    Args:
        found, wanted: Classes [14, reports] in the order of `CONDITIONS`.
        weights: Of the F1 of negation, uncertain and positive in `weighted f1`.
    """
    rows = zip(CONDITIONS, np.asarray(found), np.asarray(wanted), strict=True)
    each = [_agreement(own, other, weights, two_classes=name == "No Finding") for name, own, other in rows]

    def average(key: str, leave: int = 0) -> float:
        return float(np.mean([own[key] for own in each[: len(each) - leave]]))

    means = {key: average(key) for key in each[0]}
    return [*each, means | {"negation f1": average("negation f1", 1), "uncertain f1": average("uncertain f1", 2)}]


def _agreement(found: np.ndarray, wanted: np.ndarray, weights: Sequence[float], two_classes: bool) -> dict[str, float]:
    def f1(one: np.ndarray, other: np.ndarray) -> float:
        return float(_ratios((one & other).sum(), one.sum(), other.sum())["f1-score"])

    def of(kind: int) -> float:
        return f1(found == kind, wanted == kind)

    negation, uncertain = (0.0, 0.0) if two_classes else (of(NEGATIVE), of(UNCERTAIN))
    positive = of(POSITIVE)
    return {
        "kappas": kappa(found, wanted),
        "weighted f1": float(np.dot([negation, uncertain, positive], weights)),
        "blank f1": of(BLANK),
        "negation f1": negation,
        "uncertain f1": uncertain,
        "positive f1": positive,
        "mention f1": f1(found != BLANK, wanted != BLANK),
    }


# RadGraph


def graph_items(graph: Mapping[str, Mapping[str, Any]], level: str, *, lower: bool = False) -> set[tuple[Any, ...]]:
    """What of a report's graph is compared.

    Args:
        graph: Entities by number: `tokens`, `label`, and `relations` as pairs of a kind and an entity's number.
        level: "simple": text and label; "partial": and whether the entity has relations; "complete": every relation
            with its target in lower case, entities without relations as they are written.
        lower: All texts in lower case, as the package `radgraph` has them.
    """
    items: set[tuple[Any, ...]] = set()
    for entity in graph.values():
        tokens, label, relations = entity["tokens"], entity["label"], entity["relations"]
        tokens = tokens.lower() if lower else tokens
        if level == "complete" and relations:
            items |= {(tokens.lower(), label, kind, graph[to]["tokens"].lower()) for kind, to in relations}
        else:
            items.add((tokens, label, True) if level == "partial" and relations else (tokens, label))
    return items


def radgraph_f1(
    hypothesis: Mapping[str, Any], reference: Mapping[str, Any], level: str = "partial", *, lower: bool = False
) -> tuple[float, float, float]:
    """(F1, precision, recall) of two reports' graphs; 0 if one is empty. See `graph_items`."""
    said, true = (graph_items(graph, level, lower=lower) for graph in (hypothesis, reference))
    if not said or not true:
        return (0.0, 0.0, 0.0)
    hits = len(said & true)
    precision, recall = hits / len(said), hits / len(true)
    return (2 * precision * recall / (precision + recall) if hits else 0.0, precision, recall)


# Retrieval


def match_ranks(images: Tensor, texts: Tensor) -> dict[str, np.ndarray]:
    """Rank of every match among all candidates, 0 the best, in both directions; ties count for the match.

    Args:
        images, texts: Unit vectors [pairs, width]; row i matches row i.
    """
    scores = (images.double() @ texts.double().T).numpy()
    tables = {"image_to_text": scores, "text_to_image": scores.T}
    return {way: (table > np.diag(table)[:, None]).sum(1) for way, table in tables.items()}


def retrieval_ranks(images: Tensor, texts: Tensor, at: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """R@k, mean and median rank of matched pairs in both directions; ranks count from 1.

    Args:
        images, texts: Unit vectors [pairs, width]; row i matches row i.
    """
    found: dict[str, float] = {}
    for name, ranks in match_ranks(images, texts).items():
        found[f"{name}_mean_rank"] = float(ranks.mean() + 1)
        found[f"{name}_median_rank"] = float(np.floor(np.median(ranks)) + 1)
        found |= {f"{name}_R@{k}": float((ranks < k).mean()) for k in at}
    return found
