"""What a training step takes in memory, found by running it on tensors that have none.

A fake tensor has a shape, a type and a device, and PyTorch's own operations make the next ones of it. The step is the
real one, with encoder, connector, decoder, loss, backward pass and optimiser; `LiveBytes` counts what there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer

from llavakit.errors import UserError
from llavakit.language.likelihood import cross_entropy, token_logps
from llavakit.language.packed import can_narrow, last_layer_at, packed_attention, packed_row, switch_on
from llavakit.model.visuals import Visuals
from llavakit.training.memory import LiveBytes, Memory
from llavakit.training.parameter_groups import Rates, core, optimizer_groups
from llavakit.training.recipe import Stage
from llavakit.training.recompute import recompute


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch.

    Attributes:
        rows: Rows and their length.
        row: Position ids of the one row, where its samples are attended to one by one; else None.
        targets: Positions whose tokens are learned.
        views: Shape of every view [channels, (depth,) height, width].
        sizes, modalities: Of the media, see `LlavakitModel.encode_media`.
    """

    rows: tuple[int, int]
    row: Sequence[int] | None
    targets: int
    views: Sequence[Sequence[int]]
    sizes: Sequence[Sequence[int]]
    modalities: Sequence[int]

    @property
    def positions(self) -> int:
        """Of all rows."""
        return self.rows[0] * self.rows[1]


def rehearse(
    model: nn.Module,
    stage: Stage,
    shape: Shape,
    arguments: Any,
    *,
    device: str,
    pairs: bool = False,
    narrow: bool = False,
) -> Memory:
    """Run a step of a prepared model on meta tensors; the model is used up.

    Args:
        model: As the trainer trains it, on meta tensors of the types that it has then.
        shape: Of its largest batch.
        arguments: transformers' of the stage.
        pairs: Whether the loss takes log-probabilities of single tokens (preferences) instead of their sum.
        narrow: Whether the last layer leaves out what is not read, if it can.
    """
    sizes, modalities = torch.tensor([list(size) for size in shape.sizes]), torch.tensor(list(shape.modalities))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        core(model).tie_weights()
        model.train()
        flat = shape.row is not None and switch_on(core(model))
        recompute(model, stage.gradient_checkpointing)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        narrow = narrow and flat and shape.targets > 0 and can_narrow(core(model))
        run = _Step(core(model), stage, shape, device, flat=flat, pairs=pairs, narrow=narrow)
        memory = run(trained, sizes, modalities)
        memory.weights = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
        memory.optimiser = _optimiser_bytes(model, stage, arguments, memory.notes)
    if stage.accumulation > 1:  # gradients are there while the next batch runs forward
        memory.gradients = sum(parameter.nbytes for parameter in trained)
    return memory


class _Step:
    def __init__(
        self, net: Any, stage: Stage, shape: Shape, device: str, *, flat: bool, pairs: bool, narrow: bool
    ) -> None:
        self.net, self.stage, self.shape, self.device = net, stage, shape, device
        self.flat, self.pairs, self.narrow = flat, pairs, narrow
        self.notes: list[str] = []
        self.gradients = self.loss = 0

    def __call__(self, trained: Sequence[Tensor], sizes: Tensor, modalities: Tensor) -> Memory:
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._accumulated)
        own = [*self.net.parameters(), *self.net.buffers()]
        ids = torch.zeros(self.shape.rows, dtype=torch.long, device=self.device)
        chosen = torch.zeros(self.shape.targets, dtype=torch.long, device=self.device)
        visuals = None
        if self.stage.cache_features and self.shape.views:
            visuals = self._encode(sizes, modalities)
        kind = torch.device(self.device).type
        with (
            LiveBytes(own, lambda: (self.gradients, self.loss)) as live,
            torch.autocast(kind, torch.bfloat16, enabled=self.stage.bf16),
        ):
            hidden = self._hidden(ids, visuals, sizes, modalities)
            before = live.now
            predicting = hidden.flatten(0, 1).index_select(0, chosen)
            del hidden
            if self.pairs:
                value = token_logps(self.net.lm_head, predicting, chosen).logps.sum()
            else:
                value = cross_entropy(self.net.lm_head, predicting, chosen)
            self.loss = max(live.now - before, 0)
            del predicting
            visuals = None
            if trained:
                value.backward()
        gradients, loss = live.at_peak
        loss = min(loss, live.peak - gradients)
        activations = live.peak - gradients - loss
        return Memory(gradients=gradients, activations=activations, loss=loss, notes=self.notes)

    def _accumulated(self, parameter: Tensor) -> None:
        self.gradients += parameter.grad.nbytes

    def _encode(self, sizes: Tensor, modalities: Tensor) -> Visuals:
        views = [torch.zeros(*view, device=self.device) for view in self.shape.views]
        same = len({tuple(view.shape) for view in views}) == 1
        return self.net.model.encode_media(torch.stack(views) if same else views, sizes, modalities)

    def _vectors(self, visuals: Visuals | None, sizes: Tensor, modalities: Tensor) -> Tensor | None:
        if not self.shape.views:
            return None
        visuals = self._encode(sizes, modalities) if visuals is None else visuals
        if self.net.model.reads_prompt:
            self.notes.append("the connector reads the prompt; its activations are not counted")
            return None
        try:
            return torch.cat(self.net.model.connect(visuals)[0])
        except (RuntimeError, NotImplementedError) as error:
            said = " ".join(str(error).split())[:80]
            self.notes.append(f"the connector's activations are not counted ({type(error).__name__}: {said})")
            return None

    def _hidden(self, ids: Tensor, visuals: Visuals | None, sizes: Tensor, modalities: Tensor) -> Tensor:
        model = self.net.model
        embeds = model.embed_ids(ids)
        vectors = self._vectors(visuals, sizes, modalities)
        visuals = None
        if vectors is not None:
            places = torch.zeros(len(vectors), dtype=torch.long, device=self.device)
            embeds = embeds.flatten(0, 1).index_copy(0, places, vectors.to(embeds.dtype)).view_as(embeds)
        del vectors
        if model.language_adapter is not None:
            self.notes.append("the language adapter is not counted")
        if not self.flat:
            return model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        row, length = packed_row(self.shape.row), len(self.shape.row)
        read = range(max(length - self.shape.targets, 0), length)
        narrows = last_layer_at(model.language_model, read) if self.narrow else nullcontext()
        with packed_attention(), narrows:
            return model.language_model(
                inputs_embeds=embeds, position_ids=ids, use_cache=False, packed_row=row
            ).last_hidden_state


def _optimiser_bytes(model: nn.Module, stage: Stage, arguments: Any, notes: list[str]) -> int:
    """What the optimiser keeps, found by a step of it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        groups = optimizer_groups(model, Rates.of(stage))
        for group in groups:
            del group["names"]
        optimizer = cls(groups, **options)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.dim()
        )
    except (RuntimeError, TypeError, ValueError, ImportError, UserError, NotImplementedError):
        notes.append(f"what {stage.optimizer} keeps could not be counted; taken to be two averages")
        return 2 * sum(parameter.nbytes for parameter in trained)
