"""`reflective`: next-token cross entropy, with the tokens that ask for passages weighted on their own if wanted.

    objective: reflective                        # the mean over all labels, as published
    objective: {type: reflective, weight: 5}     # 5 x the mean over retrieval tokens + the mean over all others

How often the likeliest token is the right one is logged for both pairs of reflective tokens. Means are those of a
batch; a batch counts by its labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from llavakit.errors import UserError
from llavakit.model.configuration import LlavakitConfig
from llavakit.splice.scatter import IGNORE
from llavakit.systems.reflectiva.tokens import FITS, NEEDS, id_of
from llavakit.training.objectives.base import Loss, Step
from llavakit.training.objectives.language import LanguageObjective
from llavakit.training.objectives.preference import targets_of
from llavakit.training.recipe import ObjectiveOptions


class Losses(NamedTuple):
    """Mean cross entropies, each not a number where no label is of its kind.

    Attributes:
        all: Over all labels.
        retrieval: Over labels that are a retrieval token.
        rest: Over all other labels.
    """

    all: Tensor
    retrieval: Tensor
    rest: Tensor

    def weighted(self, weight: float) -> Tensor:
        """weight x retrieval + rest."""
        return weight * self.retrieval + self.rest


def losses(logits: Tensor, targets: Tensor, retrieval: Sequence[int]) -> Losses:
    """Cross entropies of predicted tokens.

    Args:
        logits: [targets, vocabulary].
        targets: The right tokens [targets].
        retrieval: Ids of the retrieval tokens.
    """
    return means(F.cross_entropy(logits.float(), targets, reduction="none"), targets, retrieval)


def means(each: Tensor, targets: Tensor, retrieval: Sequence[int]) -> Losses:
    """Cross entropies [targets] of predicted tokens [targets] by kind; `retrieval` as in `losses`."""
    special = torch.isin(targets, torch.tensor(list(retrieval), device=targets.device))
    return Losses(each.mean(), each[special].mean(), each[~special].mean())


def predicted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What predicts the labels of a batch: logits [targets, vocabulary], tokens [targets] and rows [targets].

    Args:
        logits: [rows, length, vocabulary]; those at a position predict the label behind it.
        labels: [rows, length], -100 where nothing is learned.
    """
    targets = targets_of(labels)
    return logits.flatten(0, 1)[targets.sources], targets.ids, targets.owners


class Choices:
    """Which of two tokens stood at every label that is one of them, and which token was the likeliest there.

    Args:
        pair: Ids of both tokens.
    """

    def __init__(self, pair: Sequence[int]) -> None:
        self.pair = tuple(pair)
        self.wanted: list[int] = []
        self.found: list[int] = []
        self.groups: list[Any] = []

    def add(self, logits: Tensor, targets: Tensor, groups: Sequence[Any]) -> None:
        """Take the targets of a batch.

        Args:
            logits: [targets, vocabulary].
            targets: The right tokens [targets].
            groups: What every target belongs to, for instance the name of its data set.
        """
        self.take(logits.argmax(-1), targets, groups)

    def take(self, likeliest: Tensor, targets: Tensor, groups: Sequence[Any]) -> None:
        """As `add`, of the likeliest tokens [targets]."""
        chosen = torch.isin(targets, torch.tensor(self.pair, device=targets.device)).nonzero().flatten()
        self.wanted += targets[chosen].tolist()
        self.found += likeliest[chosen].tolist()
        self.groups += [groups[place] for place in chosen.tolist()]

    def accuracy(self, *, token: int | None = None, group: Any = None) -> float | None:
        """Share of right tokens in percent, None without one.

        Args:
            token: Count the labels that are this token alone.
            group: Count the labels of this group alone.
        """
        hits = [
            wanted == found
            for wanted, found, own in zip(self.wanted, self.found, self.groups, strict=True)
            if token in (None, wanted) and group in (None, own)
        ]
        return 100 * sum(hits) / len(hits) if hits else None

    @property
    def decided(self) -> float | None:
        """Share of labels at which the likeliest token is one of the two, in percent; None without a label."""
        hits = [found in self.pair for found in self.found]
        return 100 * sum(hits) / len(hits) if hits else None


class ReflectiveOptions(ObjectiveOptions):
    """Options of `reflective`.

    Attributes:
        weight: Factor of the mean over retrieval tokens, which is then added to the mean over all other labels; None
            takes the mean over all labels.
    """

    weight: float | None = Field(None, ge=0)


class Reflective(LanguageObjective):
    """Cross entropy on answers with reflective tokens in them."""

    Options = ReflectiveOptions
    uses = LanguageObjective.uses - {"loss_weights"}
    by_position = True

    def bind(self, config: LlavakitConfig, processor: Any) -> None:
        """As in the base class; looks up the tokens."""
        super().bind(config, processor)
        self.needs = [id_of(token, processor.tokenizer) for token in NEEDS]
        self.fits = [id_of(token, processor.tokenizer) for token in FITS]

    def items(self, batch: Mapping[str, Any]) -> Tensor:
        """Supervised positions."""
        return (batch["labels"][:, 1:] != IGNORE).sum()

    def loss(self, model: nn.Module, batch: dict[str, Any], step: Step) -> Loss:
        """The loss of a batch, times its share of the step's labels; a kind without a label adds nothing."""
        if "label_weights" in batch:
            raise UserError("labels: weights of tokens have no meaning for the objective 'reflective'; take them out")
        sources, targets, rows = targets_of(batch["labels"])
        outputs = self.forward(model, batch, targets=(sources, targets), likeliest=True, skip_loss=True)
        logps, likeliest = outputs.likelihood.logps, outputs.likelihood.likeliest
        parts = means(-logps, targets, self.needs)
        value = parts.all
        if self.options.weight is not None:
            value = parts._replace(**{name: torch.nan_to_num(own) for name, own in parts._asdict().items()}).weighted(
                self.options.weight
            )
        value = value * (self.items(batch) / step.items)
        logged = {"retrieval_loss": parts.retrieval, "answer_loss": parts.rest}
        for name, pair in (("retrieval_accuracy", self.needs), ("relevance_accuracy", self.fits)):
            choices = Choices(pair)
            choices.take(likeliest, targets, rows.tolist())
            share = choices.accuracy()
            logged[name] = logps.new_tensor(torch.nan if share is None else share)
        if outputs.aux_loss is not None:
            value = value + outputs.aux_loss * (self.stage.loss_weights.auxiliary / step.batches)
            logged["auxiliary"] = outputs.aux_loss
        return Loss(value, {name: number.detach() for name, number in logged.items() if not number.isnan()})
