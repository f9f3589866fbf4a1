"""Zero-shot classification with a contrastive encoder: a classifier of text embeddings, and its figures.

Definitions are those of CLIP_benchmark: accuracy among the first one and five, mean recall over the classes that occur,
average precision of every class.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llavakit.robustness.balls import at_least_single
from llavakit.robustness.losses import LOGIT_SCALE, class_logits, unit

DEPTH = 5  # classes that CLIP_benchmark ranks, where there are so many


def classifier_of(text: Tensor, templates: int) -> Tensor:
    """The classifier [width, classes]: of every class the unit mean over templates of unit text embeddings.

    Args:
        text: [classes * templates, width], the templates of a class one after another.
    """
    means = unit(at_least_single(text).unflatten(0, (-1, templates))).mean(1)
    return (means / means.norm(dim=-1, keepdim=True)).T


def zero_shot_logits(embeddings: Tensor, classifier: Tensor) -> Tensor:
    """100 times the cosine of pictures [pictures, width] and classes [pictures, classes]."""
    return class_logits(unit(at_least_single(embeddings)), classifier, LOGIT_SCALE)


def zero_shot(embed: Callable[[Tensor], Tensor], classifier: Tensor) -> Callable[[Tensor], Tensor]:
    """A classifier of pixels, for attacks."""
    return lambda pixels: zero_shot_logits(embed(pixels), classifier.to(pixels))


def accuracy_among(logits: Tensor, labels: Tensor, count: int) -> float:
    """Share of pictures whose label is among the `count` most likely classes; NaN with fewer classes.

    Ties are broken as in CLIP_benchmark, which ranks the five most likely classes even where one is asked for.
    """
    classes = logits.shape[-1]
    if classes < count:
        return math.nan
    ranked = logits.topk(max(count, DEPTH) if classes >= DEPTH else count, -1, sorted=True).indices
    found = ranked[:, :count] == labels[:, None]
    return float(found.any(-1).sum()) / len(labels)


def mean_recall(predictions: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the share of their pictures that is recognised."""
    found = [(predictions[labels == label] == label).double().mean() for label in labels.unique()]
    return float(torch.stack(found).mean())


def average_precisions(scores: Tensor, truth: Tensor) -> Tensor:
    """Average precision of every class [classes].

    Args:
        scores, truth: [pictures, classes]; `truth` is 1 where a picture is of a class.
    """
    order = scores.argsort(0, descending=True)
    sorted_truth = truth.gather(0, order).to(scores.dtype)
    ranks = torch.arange(1, len(scores) + 1, dtype=scores.dtype)[:, None]
    precision = sorted_truth.cumsum(0) / ranks
    return (precision * sorted_truth).sum(0) / sorted_truth.sum(0).clamp(min=1)
