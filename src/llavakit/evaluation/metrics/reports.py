"""Metrics of radiology reports on what labellers found: CheXbert's classes, RadGraph's graphs, ranks of retrieval.

Labels and graphs come from models with weights of their own; here they are given. Numbers are those of LLaVA-Rad's
evaluation (arXiv 2403.08002).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from llavakit.errors import UserError

BLANK, POSITIVE, NEGATIVE, UNCERTAIN = range(4)
CONDITIONS = (
    *("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation"),
    *("Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    *("Support Devices", "No Finding"),
)
FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
LEVELS = ("simple", "partial", "complete")
RESAMPLES = 500


class Interval(NamedTuple):
    """Median of a bootstrap distribution and its 95 % interval."""

    median: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[..., float], *values: np.ndarray, seed: int = 3, resamples: int = RESAMPLES
) -> Interval:
    """Percentile interval of a statistic, cases resampled together: `scipy.stats.bootstrap` with `RandomState(seed)`.

    Args:
        statistic: Takes the arrays, cases along the last axis, and gives a number.
        values: [cases] or more arrays of the same cases.

    Raises:
        UserError: If there are fewer than two cases.
    """
    count = values[0].shape[-1]
    if count < 2:
        raise UserError(f"a bootstrap interval needs at least 2 cases, there is {count}")
    drawn = np.random.RandomState(seed).randint(0, count, (resamples, count))
    found = [statistic(*(own[..., rows] for own in values)) for rows in drawn]
    low, median, high = np.percentile(found, [2.5, 50, 97.5])
    return Interval(float(median), float(low), float(high))


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


def agreement_by_class(found: np.ndarray, wanted: np.ndarray, weights: Sequence[float]) -> dict[str, float]:
    """Agreement on one condition: kappa, and F1 of every class alone.

    Args:
        found, wanted: Classes [reports].
        weights: Of the F1 of negation, uncertain and positive in `weighted f1`.
    """

    def f1(one: np.ndarray, other: np.ndarray) -> float:
        return float(_ratios((one & other).sum(), one.sum(), other.sum())["f1-score"])

    single = {
        "negation": f1(found == NEGATIVE, wanted == NEGATIVE),
        "uncertain": f1(found == UNCERTAIN, wanted == UNCERTAIN),
        "positive": f1(found == POSITIVE, wanted == POSITIVE),
    }
    return {
        "kappas": kappa(found, wanted),
        "weighted f1": float(np.dot(list(single.values()), weights)),
        "blank f1": f1(found == BLANK, wanted == BLANK),
        **{f"{name} f1": value for name, value in single.items()},
        "mention f1": f1(found != BLANK, wanted != BLANK),
    }


def average_agreement(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the conditions, in the order of `CONDITIONS`.

    As published, negation leaves out "No Finding", and uncertain "Support Devices" too.
    """

    def average(key: str, *without: str) -> float:
        kept = [own[key] for own, name in zip(each, CONDITIONS, strict=True) if name not in without]
        return float(np.mean(kept))

    whole = {key: average(key) for key in each[0]}
    whole["negation f1"] = average("negation f1", "No Finding")
    return whole | {"uncertain f1": average("uncertain f1", "No Finding", "Support Devices")}


def kappa(one: np.ndarray, other: np.ndarray) -> float:
    """Cohen's kappa; NaN where both always say the same one class."""
    kinds = np.union1d(one, other)
    shares = [np.array([(x == kind).mean() for kind in kinds]) for x in (one, other)]
    expected = float(np.dot(*shares))
    return float("nan") if expected == 1 else float(((one == other).mean() - expected) / (1 - expected))


# RadGraph


def graph_items(graph: Mapping[str, Mapping[str, Any]], level: str) -> set[tuple[Any, ...]]:
    """What of a report's graph is compared.

    Args:
        graph: Entities by number: `tokens`, `label`, and `relations` as pairs of a kind and an entity's number.
        level: "simple": text and label; "partial": and whether the entity has relations; "complete": every relation
            with its target in lower case, entities without relations as they are written.
    """
    items: set[tuple[Any, ...]] = set()
    for entity in graph.values():
        tokens, label, relations = entity["tokens"], entity["label"], entity["relations"]
        if level == "complete" and relations:
            items |= {(tokens.lower(), label, kind, graph[to]["tokens"].lower()) for kind, to in relations}
        else:
            items.add((tokens, label, True) if level == "partial" and relations else (tokens, label))
    return items


def radgraph_f1(
    hypothesis: Mapping[str, Any], reference: Mapping[str, Any], level: str = "partial"
) -> tuple[float, float, float]:
    """(F1, precision, recall) of two reports' graphs; 0 if one is empty."""
    said, true = graph_items(hypothesis, level), graph_items(reference, level)
    if not said or not true:
        return (0.0, 0.0, 0.0)
    hits = len(said & true)
    precision, recall = hits / len(said), hits / len(true)
    return (2 * precision * recall / (precision + recall) if hits else 0.0, precision, recall)


# Retrieval


def retrieval_ranks(images: Tensor, texts: Tensor, at: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """R@k, mean and median rank of matched pairs in both directions; ranks count from 1.

    Args:
        images, texts: Unit vectors [pairs, width]; row i matches row i.
    """
    scores = (images.double() @ texts.double().T).numpy()
    found: dict[str, float] = {}
    for name, table in (("image_to_text", scores), ("text_to_image", scores.T)):
        ranks = (table > np.diag(table)[:, None]).sum(1)
        found[f"{name}_mean_rank"] = float(ranks.mean() + 1)
        found[f"{name}_median_rank"] = float(np.floor(np.median(ranks)) + 1)
        found |= {f"{name}_R@{k}": float((ranks < k).mean()) for k in at}
    return found
