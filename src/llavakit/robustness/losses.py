"""What attacks maximise and robust training minimises, and the accuracy that both are measured by."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llavakit.errors import UserError

LOGIT_SCALE = 100.0  # CLIP's temperature, which TeCoA keeps fixed
FEWEST_FOR_TARGETED_DLR = 4


def squared_distance(embeddings: Tensor, wanted: Tensor) -> Tensor:
    """FARE: squared Euclidean distance of every embedding [pictures, width] to the wanted one, not divided by width."""
    return (embeddings - wanted).square().sum(-1)


def class_logits(embeddings: Tensor, text: Tensor, scale: float = LOGIT_SCALE) -> Tensor:
    """Logits [pictures, classes] of embeddings against text embeddings in columns [width, classes]."""
    return embeddings @ (scale * text.to(embeddings))


def class_loss(embeddings: Tensor, text: Tensor, labels: Tensor, scale: float = LOGIT_SCALE) -> Tensor:
    """TeCoA: cross entropy of every picture against the classes' text embeddings."""
    return F.cross_entropy(class_logits(embeddings, text, scale), labels, reduction="none")


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio of every picture; at least three classes.

    -(z_y - max_{i != y} z_i) / (z_1 - z_3), with the logits sorted from the largest.
    """
    if logits.shape[-1] < 3:
        raise UserError(f"the DLR loss needs at least 3 classes, there are {logits.shape[-1]}; use cross entropy")
    ordered, places = logits.sort(-1)
    own = logits.gather(-1, labels[:, None]).squeeze(-1)
    first = (places[:, -1] == labels).to(logits.dtype)
    return -(own - ordered[:, -2] * first - ordered[:, -1] * (1.0 - first)) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted difference of logits ratio of every picture: -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2).

    Raises:
        UserError: If there are fewer than four classes, where it does not exist.
    """
    if logits.shape[-1] < FEWEST_FOR_TARGETED_DLR:
        raise UserError(
            f"the targeted DLR loss needs at least {FEWEST_FOR_TARGETED_DLR} classes, there are {logits.shape[-1]}; "
            "attack with cross entropy"
        )
    ordered, _ = logits.sort(-1)
    own = logits.gather(-1, labels[:, None]).squeeze(-1)
    target = logits.gather(-1, targets[:, None]).squeeze(-1)
    return -(own - target) / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of pictures whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).float().mean()


def unit(values: Tensor) -> Tensor:
    """Rows [..., width] of Euclidean length one."""
    return F.normalize(values, dim=-1)
