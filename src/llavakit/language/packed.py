"""Packed rows on CPUs: attention that computes only what a row's samples see, and a last layer cut to what is read.

transformers' SDPA path gives packed rows a full mask, so a row costs as much as one long sample. FlashAttention
solves that on GPUs; here the stretches of a row go through SDPA one by one. `switch_on` makes a model use it,
`packed_row` finds the stretches.

Position ids say what a row is. Where they start again at 0, a sample begins. Where they start again at p > 0, a
stretch goes on from the first p positions of the path before it, so a prompt that samples share stands in the row once:

    position   0 1 2 3 4 5 3 4 3 4 5 0 1
    sample     a a a a a a b b c c c d d        b and c begin with the first three tokens of a

A loss that reads few positions needs the last layer's output there alone. `last_layer_at` lets that layer compute
keys and values of the whole row, and queries, MLP and output at those positions; `can_narrow` tries whether a
decoder's layer can be called so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "llavakit_packed"
_packed: ContextVar[bool] = ContextVar("packed", default=False)


@dataclass(frozen=True)
class Stretch:
    """Neighbouring positions of a row that attend to themselves, and to others in front of them.

    Attributes:
        begin, end: Where it lies.
        seen: Pieces of the row that it sees as a whole, by number and in order.
        own: The pieces that it is made of.
        mask: Which keys, of `seen` and `own` together, each of its positions sees; None if causal order is all.
    """

    begin: int
    end: int
    seen: tuple[int, ...]
    own: tuple[int, ...]
    mask: Tensor | None


@dataclass(frozen=True)
class PackedRow:
    """What attention must know of a row; see `packed_row`.

    Attributes:
        sizes: Lengths of the pieces that it is cut into: every stretch and everything that one sees is made of whole
            ones.
        stretches: In order.
    """

    sizes: tuple[int, ...]
    stretches: tuple[Stretch, ...]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """All positions to what they see: [1, heads, length, width] each to [1, heads, length, width]."""
        queries = query.split([stretch.end - stretch.begin for stretch in self.stretches], dim=2)
        masks = [stretch.mask for stretch in self.stretches]
        return self._attend(queries, masks, self.stretches, key, value, **options)

    def attend_at(self, places: Sequence[int], query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """As `attend`, with queries of some positions alone, in ascending order: [1, heads, places, width]."""
        own = [[place for place in places if stretch.begin <= place < stretch.end] for stretch in self.stretches]
        read = [(stretch, held) for stretch, held in zip(self.stretches, own, strict=True) if held]
        masks = []
        for stretch, held in read:
            before = sum(self.sizes[piece] for piece in stretch.seen)
            reach = torch.tensor(held, device=query.device) - stretch.begin + before
            keys = torch.arange(before + stretch.end - stretch.begin, device=query.device)
            masks.append(keys <= reach[:, None])
        queries = query.split([len(held) for _, held in read], dim=2)
        return self._attend(queries, masks, [stretch for stretch, _ in read], key, value, **options)

    def _attend(
        self,
        queries: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        stretches: Sequence[Stretch],
        key: Tensor,
        value: Tensor,
        **options: Any,
    ) -> Tensor:
        keys, values = (tensor.split(self.sizes, dim=2) for tensor in (key, value))
        parts = []
        for query, mask, stretch in zip(queries, masks, stretches, strict=True):
            pieces = (*stretch.seen, *stretch.own)
            own = [_joined([held[piece] for piece in pieces]) for held in (keys, values)]
            parts.append(F.scaled_dot_product_attention(query, *own, attn_mask=mask, is_causal=mask is None, **options))
        return torch.cat(parts, dim=2)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=2)


@dataclass
class _Kept:
    """Takes the keys and values of a row, and attends to nothing."""

    key: Tensor | None = None
    value: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.key, self.value = key, value
        return query.new_zeros(*query.shape[:3], value.shape[-1])


@dataclass(frozen=True)
class _Narrowed:
    """Attends with the queries of some positions to keys and values that were computed before."""

    row: PackedRow
    places: Sequence[int]
    kept: _Kept

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return self.row.attend_at(self.places, query, self.kept.key, self.kept.value, **options)


def packed_row(positions: Sequence[int]) -> PackedRow:
    """The stretches of a row, see above.

    Args:
        positions: The position id of each of its tokens.

    Raises:
        ValueError: If a stretch goes on from more than what is in front of it.
    """
    starts = [0, *(place + 1 for place, (a, b) in enumerate(pairwise(positions)) if b != a + 1)]
    found: list[tuple[int, int, list[tuple[int, int]]]] = []
    path: list[tuple[int, int]] = []
    for begin, end in pairwise([*starts, len(positions)]):
        seen, missing = [], positions[begin]
        for first, last in path:
            if missing > 0:
                seen.append((first, min(last, first + missing)))
                missing -= seen[-1][1] - first
        if missing > 0:
            raise ValueError(f"position {positions[begin]} at {begin} goes on from fewer positions")
        found.append((begin, end, seen))
        path = [*seen, (begin, end)]
    bounds = {bound for begin, end, seen in found for pair in (*seen, (begin, end)) for bound in pair}
    cuts = sorted(bounds | {0, len(positions)})
    number = {cut: place for place, cut in enumerate(cuts)}
    stretches = []
    for begin, end, seen in found:
        before = sum(last - first for first, last in seen)
        mask = None
        if before:
            shape = (end - begin, before + end - begin)
            mask = torch.ones(shape, dtype=torch.bool).tril(before)
        pieces = tuple(piece for first, last in seen for piece in range(number[first], number[last]))
        stretches.append(Stretch(begin, end, pieces, tuple(range(number[begin], number[end])), mask))
    return PackedRow(tuple(last - first for first, last in pairwise(cuts)), tuple(stretches))


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_row: PackedRow | _Kept | _Narrowed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[rows, heads, length, width] to [rows, length, heads, width]."""
    if packed_row is None:
        if _packed.get():
            raise NotImplementedError(f"{type(module).__name__} does not hand packed rows to its attention")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    return packed_row.attend(query, key, value, **options).transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _packed.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def packed_attention() -> Iterator[None]:
    """While the rows of a forward pass are packed."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def switch_on(model: nn.Module) -> bool:
    """Let the decoder of a model use it, if it can; returns whether it does.

    It can if it runs on a CPU through SDPA, without a language adapter, and its layers hand options down to their
    attention, which a try on two tokens shows.
    """
    decoder = model.model.language_model
    if decoder.config._attn_implementation == NAME:
        return True
    if model.model.language_adapter is not None or decoder.config._attn_implementation != "sdpa":
        return False
    if next(decoder.parameters()).device.type != "cpu" or getattr(decoder.config, "sliding_window", None):
        return False
    decoder.set_attn_implementation(NAME)
    embeds = torch.zeros(1, 2, decoder.config.hidden_size, dtype=decoder.dtype)
    try:
        with torch.no_grad():
            _run(decoder, embeds, [0, 0])
    except (NotImplementedError, TypeError):
        decoder.set_attn_implementation("sdpa")
        return False
    return True


def _run(decoder: nn.Module, embeds: Tensor, positions: Sequence[int]) -> Tensor:
    with packed_attention():
        given = {"inputs_embeds": embeds, "position_ids": torch.tensor([positions]), "use_cache": False}
        return decoder(**given, packed_row=packed_row(positions)).last_hidden_state


def can_share(model: nn.Module) -> bool:
    """Whether samples of a row may share what they begin with.

    No connector may read the prompt, of which it would see a part, and nothing may be dropped at random (adapters do
    that): of shared states that would be the same for all.
    """
    dropped = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    text = model.config.text_config
    return not (dropped or getattr(text, "attention_dropout", 0) or model.model.reads_prompt)


def can_narrow(model: nn.Module) -> bool:
    """Whether `last_layer_at` gives what the decoder of a model gives without it, which a try shows.

    The decoder must attend as `switch_on` makes it.
    """
    decoder = model.model.language_model
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or not len(decoder.layers):
        return False
    positions, places = [0, 1, 2, 3, 2, 3, 0], [1, 3, 5, 6]
    draw = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 7, decoder.config.hidden_size, generator=draw).to(decoder.dtype)
    training = decoder.training
    decoder.eval()
    try:
        with torch.no_grad():
            wanted = _run(decoder, embeds, positions)[:, places].float()
            with last_layer_at(decoder, places):
                found = _run(decoder, embeds, positions).float()
    except (AttributeError, TypeError, ValueError, RuntimeError, KeyError):
        return False
    finally:
        decoder.train(training)
    if isinstance(found, FakeTensor):  # a plan asks, and there are no numbers
        return found.shape == wanted.shape
    close = 1e-4 if decoder.dtype.itemsize > 2 else 0.05
    return found.shape == wanted.shape and bool((found - wanted).norm() <= close * wanted.norm())


@contextmanager
def last_layer_at(decoder: nn.Module, places: Sequence[int]) -> Iterator[None]:
    """Let the last layer of a decoder give some positions of the one packed row alone, [1, places, hidden].

    Args:
        decoder: Which hands its layers a `packed_row`.
        places: Positions, ascending, at least one.
    """
    layer = decoder.layers[-1]

    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden, *rest = args
        kept, row = _Kept(), kwargs["packed_row"]
        layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs | {"packed_row": kept})
        chosen = torch.tensor(places, device=hidden.device)
        kwargs = {name: _at(chosen, value) if name in _BY_POSITION else value for name, value in kwargs.items()}
        kwargs["packed_row"] = _Narrowed(row, places, kept)
        return (hidden.index_select(1, chosen), *rest), kwargs

    # What it keeps is little, and a layer that is computed again would be so without the hook.
    again = getattr(layer, "gradient_checkpointing", False)
    handle = layer.register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        if again:
            layer.gradient_checkpointing = False
        yield
    finally:
        handle.remove()
        if again:
            layer.gradient_checkpointing = again


_BY_POSITION = ("position_ids", "position_embeddings")  # what a layer is handed that has a row per position


def _at(chosen: Tensor, value: Any) -> Any:
    """Those of some positions, of [1, length, ...] each."""
    if isinstance(value, Tensor):
        return value.index_select(1, chosen)
    return None if value is None else type(value)(_at(chosen, own) for own in value)
