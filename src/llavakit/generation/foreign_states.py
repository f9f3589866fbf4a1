"""What a model of transformers keeps of prompts that it has read: states that are forked, cut and gone on from.

`generate` gives every class the inputs of its forward pass in its own way; here they are kept as it gave them, so that
no class is known by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from llavakit.generation.cache import ByteBounded

ENCODED = re.compile(r"^(pixel_values|mm_encoder_outputs|input_features)")  # inputs that only the prompt has
_MOST = 4  # prompts whose states are kept


class States:
    """What a model keeps of some rows that it has read.

    Args:
        ids: All ids so far [rows, length].
        kwargs: Inputs of the next forward pass besides.
        outputs: Of the last one.
    """

    def __init__(self, model: Any, ids: Tensor, kwargs: dict[str, Any], outputs: Any) -> None:
        self._model, self._ids, self._kwargs, self._outputs = model, ids, kwargs, outputs

    @classmethod
    def behind(cls, model: Any, ids: Tensor, kwargs: dict[str, Any]) -> tuple[States, Tensor]:
        """States behind a prompt and its last logits."""
        inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
        outputs = model(**inputs, return_dict=True)
        kept = {name: value for name, value in kwargs.items() if not ENCODED.match(name)}
        return cls(model, ids, kept, outputs), outputs.logits[:, -1]

    @property
    def bytes(self) -> int:
        """Size of keys and values."""
        layers = getattr(self._outputs.past_key_values, "layers", ())
        tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def beginning(self, length: int) -> States | None:
        """A copy that has read the first positions only; None if these states cannot be cut."""
        whole, found = self._ids.shape[1], self.forked(1)
        if length == whole:
            return found
        crossing = getattr(self._model.config.get_text_config(), "cross_attention_layers", None) or ()
        for number, layer in enumerate(found._outputs.past_key_values.layers):
            if type(layer) is not DynamicLayer:
                return None
            if number not in crossing:  # those hold what the text sees of the media
                if layer.keys.shape[-2] != whole:
                    return None
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        found._ids = found._ids[:, :length]
        found._kwargs = cut(found._kwargs, length, whole)
        return found

    def forked(self, rows: int) -> States:
        """A copy, every row repeated."""
        outputs, kwargs, ids = copy.copy(self._outputs), dict(self._kwargs), self._ids
        cache = _copied(outputs.past_key_values)
        kwargs.pop("past_key_values", None)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
            ids, kwargs = self._model._expand_inputs_for_generation(expand_size=rows, input_ids=ids, **kwargs)
        outputs.past_key_values = cache
        return States(self._model, ids, kwargs, outputs)

    def step(self, ids: Tensor) -> Tensor:
        """Logits [rows, new, vocabulary] at new ids [rows, new]."""
        new = ids.shape[1]
        kwargs = self._model._update_model_kwargs_for_generation(
            self._outputs, dict(self._kwargs), is_encoder_decoder=False, num_new_tokens=new
        )
        kwargs = {name: _grown_by(new, self._kwargs.get(name), value) for name, value in kwargs.items()}
        if "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = new
        self._ids = torch.cat([self._ids, ids], 1)
        inputs = self._model.prepare_inputs_for_generation(self._ids, next_sequence_length=new, **kwargs)
        self._kwargs, self._outputs = kwargs, self._model(**inputs, return_dict=True)
        return self._outputs.logits[:, -new:]


def _grown_by(new: int, before: Any, now: Any) -> Any:
    """An input per position that grew by fewer positions than are new: some classes (Mllama) always add one."""
    if not isinstance(before, Tensor) or not isinstance(now, Tensor) or before.dim() < 2 or now.dim() != before.dim():
        return now
    grown = now.shape[1] - before.shape[1]
    if not 0 < grown < new:
        return now
    return torch.cat([now, now[:, -1:].expand(-1, new - grown, *now.shape[2:])], 1)


def _copied(cache: Any) -> Any:
    """A cache that can be filled without the other one changing; dynamic layers make new tensors when they grow."""
    if not all(isinstance(layer, DynamicLayer) for layer in getattr(cache, "layers", (None,))):
        return copy.deepcopy(cache)
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found


class Prefixes:
    """States of the newest prompts, found by what prompts begin with.

    Args:
        limit: Most bytes of keys and values.
    """

    def __init__(self, limit: int) -> None:
        self._held = ByteBounded(limit, _MOST)
        self._inputs: dict[int, Mapping[str, Tensor]] = {}
        self._next = 0

    def find(self, inputs: Mapping[str, Tensor], least: int) -> tuple[int, States | None]:
        """Length of the longest beginning that a kept prompt shares, and its states; at least one position is left.

        Args:
            least: Positions that must be shared for media to be the same: up to the last one.
        """
        best, found = 0, None
        for number in list(self._held):
            shared = min(_shared(self._inputs[number], inputs), inputs["input_ids"].shape[1] - 1)
            if shared > max(best, least - 1):
                states = self._held.get(number).beginning(shared)
                if states is not None:
                    best, found = shared, states
        return best, found

    def put(self, inputs: Mapping[str, Tensor], states: States) -> None:
        """Keep states of a prompt; they must not be changed."""
        if not self._held.limit:
            return
        self._held.put(self._next, states, states.bytes)
        self._inputs[self._next] = inputs
        self._next += 1
        self._inputs = {number: self._inputs[number] for number in self._held}


def _shared(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> int:
    """Length of the common beginning of two prompts; 0 if they have other media or settings."""
    lengths = [inputs["input_ids"].shape[1] for inputs in (one, other)]
    if set(one) != set(other):
        return 0
    shared = min(lengths)
    for name in one:
        first, second = one[name], other[name]
        if _by_position(first, lengths[0]) and _by_position(second, lengths[1]):
            same = (first[0, :shared] == second[0, :shared]).reshape(shared, -1).all(-1)
            shared = int(same.long().cumprod(0).sum())
        elif first.shape != second.shape or not torch.equal(first, second):
            return 0
    return shared


def cut(inputs: Mapping[str, Any], length: int, whole: int | None = None) -> dict[str, Any]:
    """Inputs of the first positions."""
    whole = inputs["input_ids"].shape[1] if whole is None else whole
    return {name: value[:, :length] if _by_position(value, whole) else value for name, value in inputs.items()}


def with_reply(inputs: Mapping[str, Tensor], ids: Sequence[int]) -> dict[str, Tensor]:
    """Inputs with generated ids behind them."""
    if not ids:
        return dict(inputs)
    whole, found = inputs["input_ids"].shape[1], {}
    for name, value in inputs.items():
        if not _by_position(value, whole):
            found[name] = value
            continue
        if name == "input_ids":
            more = value.new_tensor([list(ids)])
        elif name in ("attention_mask", "cross_attention_mask"):  # all of the prompt stays visible
            more = value[:, -1:].expand(-1, len(ids), *value.shape[2:])
        else:  # kinds of tokens: 0 is text
            more = torch.zeros_like(value[:, :1]).expand(-1, len(ids), *value.shape[2:])
        found[name] = torch.cat([value, more], 1)
    return found


def _by_position(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == (1, length)
