"""`supervised`: next-token cross entropy on the answers of conversations, and what a language adapter adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llavakit.splice.scatter import IGNORE
from llavakit.training.objectives.base import Loss, Step
from llavakit.training.objectives.language import LanguageObjective


class Supervised(LanguageObjective):
    """The default objective."""

    by_position = True

    def items(self, batch: Mapping[str, Any]) -> Tensor:
        """Supervised positions."""
        return (batch["labels"][:, 1:] != IGNORE).sum()

    def loss(self, model: nn.Module, batch: dict[str, Any], step: Step) -> Loss:
        """Text averaged over all supervised positions of the step, the auxiliary term over its batches."""
        outputs = self.forward(model, batch, skip_logits=True, num_items_in_batch=step.items)
        weights, auxiliary = self.stage.loss_weights, outputs.aux_loss
        if auxiliary is None:
            return Loss(outputs.loss if weights.text == 1.0 else outputs.loss * weights.text)
        text = (outputs.loss - auxiliary) * weights.text
        return Loss(text + auxiliary * (weights.auxiliary / step.batches), {"auxiliary": auxiliary.detach()})
