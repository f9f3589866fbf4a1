"""Preference learning as arithmetic: log-probabilities of answers, and losses of pairs.

A pair is a chosen and a rejected answer to one prompt. Its loss compares how much likelier the policy makes each than
the reference does. This module knows neither models nor records. Sources: DPO (2305.18290), IPO (2310.12036), KTO
(2402.01306); LLaVA-NeXT's trainer, whose `kto_pair` is a form of KTO on pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


class Targets(NamedTuple):
    """Which positions predict which tokens, over all answers of a batch.

    Attributes:
        sources: Position whose output predicts the token [targets], an index into the flattened rows.
        ids: The token [targets].
        owners: The answer that it belongs to [targets].
    """

    sources: Tensor
    ids: Tensor
    owners: Tensor


def targets_of(labels: Tensor) -> Targets:
    """The targets of one answer per row.

    Args:
        labels: [rows, length], -100 where nothing counts; the first position is predicted by nothing.
    """
    rows, columns = torch.where(labels[:, 1:] != IGNORE)
    return Targets(rows * labels.shape[1] + columns, labels[rows, columns + 1], rows)


def token_logps(logits: Tensor, ids: Tensor, places: Tensor | None = None) -> Tensor:
    """Log-probabilities of tokens [targets], in float32 if the logits have fewer digits.

    Args:
        logits: [positions, vocabulary].
        ids: Token of each target [targets].
        places: Row of `logits` that predicts each target [targets]; default: one after another.
    """
    places = torch.arange(len(ids), device=ids.device) if places is None else places
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits[places, ids] - logits.logsumexp(-1)[places]


def sums_by(owners: Tensor, values: Tensor, count: int) -> Tensor:
    """Sum of the values of every owner [count], 0 without one."""
    return values.new_zeros(count).index_add(0, owners, values)


def sequence_logps(logits: Tensor, labels: Tensor, *, average: bool = False) -> Tensor:
    """Log-probability of the labelled tokens of every row [rows].

    Args:
        logits: [rows, length, vocabulary].
        labels: [rows, length], -100 where nothing counts.
        average: Mean over a row's tokens instead of their sum; not a number for a row without any.
    """
    targets = targets_of(labels)
    sums = sums_by(targets.owners, token_logps(logits.flatten(0, 1), targets.ids, targets.sources), len(labels))
    return sums / counts_of(targets.owners, len(labels)) if average else sums


def counts_of(owners: Tensor, count: int) -> Tensor:
    """Targets of every answer [count]."""
    return torch.bincount(owners, minlength=count)


class Pairs(NamedTuple):
    """Log-probabilities of both answers of pairs [pairs] each: sums over their tokens, or means for "ipo"."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor


def sigmoid(pairs: Pairs, margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """DPO: a logistic loss of the margin; a share `smoothing` of the pairs is taken to be labelled the wrong way."""
    return -(1 - smoothing) * F.logsigmoid(beta * margin) - smoothing * F.logsigmoid(-beta * margin)


def hinge(pairs: Pairs, margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """SLiC's hinge loss of the margin."""
    return torch.relu(1 - beta * margin)


def ipo(pairs: Pairs, margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """IPO: the margin of means is drawn to 1 / (2 beta)."""
    return (margin - 1 / (2 * beta)).square()


def kto_pair(pairs: Pairs, margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """KTO on pairs: each answer against the other kind's divergence in the batch; chosen terms, then rejected ones."""
    chosen = pairs.policy_chosen - pairs.reference_chosen
    rejected = pairs.policy_rejected - pairs.reference_rejected
    of_chosen, of_rejected = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
    return torch.cat(
        [1 - torch.sigmoid(beta * (chosen - of_rejected)), 1 - torch.sigmoid(beta * (of_chosen - rejected))]
    )


LOSSES: dict[str, Callable[[Pairs, Tensor, float, float], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "kto_pair": kto_pair,
}


def pair_losses(
    pairs: Pairs,
    loss: str = "sigmoid",
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of pairs, and the rewards of their answers.

    Args:
        loss: A name of `LOSSES`.
        beta: Strength of the pull towards the reference; rewards are in its unit.
        label_smoothing: For "sigmoid".
        reference_free: Leave the reference out of the margin. Rewards still are against it.

    Returns:
        Losses [pairs] ("kto_pair": [2 x pairs]), rewards of chosen and of rejected answers [pairs], without gradient.
    """
    margin = pairs.policy_chosen - pairs.policy_rejected
    if not reference_free:
        margin = margin - (pairs.reference_chosen - pairs.reference_rejected)
    losses = LOSSES[loss](pairs, margin, beta, label_smoothing)
    chosen = beta * (pairs.policy_chosen - pairs.reference_chosen).detach()
    return losses, chosen, beta * (pairs.policy_rejected - pairs.reference_rejected).detach()
