"""The connector of LLaVA-Mini: compression, shared projector, pre-fusion; images, high resolution, videos.

Per unit (an image, or one frame of a video): the compressed tokens go to the prompt's visual positions, the text that
the blocks fused with the unit's vision tokens takes the place of the prompt's own embeddings. Units are worked on
some at a time, so that memory does not grow with the length of a video.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from llavakit.connectors.base import Features, Grid, Prompt, tokens_in
from llavakit.connectors.general import MLP
from llavakit.errors import UserError
from llavakit.systems.llava_mini.compressor import Compressor
from llavakit.systems.llava_mini.prefusion import Prefusion, States
from llavakit.views.plan import Plan


@dataclass(frozen=True)
class Shape:
    """What the units of one pass have in common.

    Attributes:
        tiles: Numbers of the unit's views that make up the raster, in reading order; none if it is one view.
        whole: Number of the view of the whole image or frame.
        rows, cols: Places of tiles in the raster.
        grid: Feature grid of every view.
    """

    tiles: tuple[int, ...]
    whole: int
    rows: int
    cols: int
    grid: Grid

    @functools.cached_property
    def raster(self) -> tuple[int, int]:
        """Rows and columns of features that the compressor reads."""
        depth, rows, cols = self.grid
        return (self.rows * depth * rows, self.cols * cols)

    @property
    def tokens(self) -> int:
        """Vision tokens that pre-fusion reads, without the compressed ones."""
        return tokens_in(self.grid) * self.views

    @property
    def views(self) -> int:
        """Views of a unit."""
        return len(self.tiles) + 1


@dataclass(frozen=True)
class Unit:
    """An image or a frame: its media item (counted among the connector's own), first view and shape."""

    item: int
    first: int
    shape: Shape = field(repr=False)


@dataclass
class Texts:
    """The text of every sample that has media, padded at the end.

    Attributes:
        number: (row, segment) of a sample -> its row here.
        index: Places in the flattened prompt [samples, longest].
        real: Where `index` is one [samples, longest].
        visible: Places that pre-fusion may see [samples, longest].
        embeds: Embeddings without gradient [samples, longest, hidden].
    """

    number: dict[tuple[int, int], int]
    index: Tensor
    real: Tensor
    visible: Tensor
    embeds: Tensor


class CompressorPrefusion(MLP):
    """`compressor_prefusion`.

    Several media of one sample count as frames of one video: each is fused with the same text, and the text becomes
    the mean of what they gave.

    Args:
        compressor_size: C; an image becomes C x C tokens.
        compressor_heads: Attention heads of the compressor.
        prefusion_layer_num: Number of pre-fusion blocks.
        second_turn: What happens to earlier answers in later turns: "fuse" them like all text (the
            published behaviour), or leave them "raw" and hidden as in training, so that the decoder's cache of the
            first turn stays valid.
        text_only: Samples without media: "raw" leaves their embeddings alone, "blank" fuses them with an image of
            zeros as in the published training.
        hidden_token_ids: Ids that pre-fusion never sees; the published code hides id 0.
        pass_tokens: About how many vision tokens go through the blocks at once.
        depth, act, bias: Of the projector, see `mlp`.
    """

    needs_prompt = True
    streams = True

    def __init__(
        self,
        *,
        vision_width: int,
        hidden_size: int,
        text_config: Any,
        compressor_size: int = 1,
        compressor_heads: int = 8,
        prefusion_layer_num: int = 4,
        second_turn: str = "fuse",
        text_only: str = "raw",
        hidden_token_ids: Sequence[int] = (0,),
        pass_tokens: int = 10_000,
        depth: int = 2,
        act: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__(vision_width=vision_width, hidden_size=hidden_size, depth=depth, act=act, bias=bias)
        for name, value, known in (
            ("second_turn", second_turn, ("fuse", "raw")),
            ("text_only", text_only, ("raw", "blank")),
        ):
            if value not in known:
                raise UserError(f"connector 'compressor_prefusion': {name} must be one of {known}, not {value!r}")
        if vision_width % 4 or vision_width % compressor_heads:
            raise UserError(
                f"connector 'compressor_prefusion': the encoder's width {vision_width} must be a multiple of 4 and of "
                f"compressor_heads ({compressor_heads})"
            )
        self.compressor = Compressor(vision_width, compressor_size, compressor_heads)
        self.prefusion = Prefusion(text_config, prefusion_layer_num)
        self.second_turn, self.blank_image = second_turn, text_only == "blank"
        self.hidden_token_ids, self.pass_tokens = tuple(hidden_token_ids), pass_tokens

    @classmethod
    def token_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        side = options.get("compressor_size", 1)
        return [(1, side, side)] * len({view.index for view in plan.views})

    # one pass

    def compress(self, views: Tensor, shape: Shape, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Compressed features [units, C x C, vision width] of units [units, views, tokens, vision width]."""
        return self.compressor(self._raster(views, shape), *shape.raster, weights=weights)

    def vision_tokens(self, views: Tensor, shape: Shape) -> Tensor:
        """What the blocks read of every unit: raster, whole, compressed; [units, tokens, hidden]."""
        compressed, _ = self.compress(views, shape)
        parts = [self._raster(views, shape)] if shape.tiles else []
        parts += [views[:, shape.whole], compressed]
        return self.project(torch.cat(parts, dim=1))

    @staticmethod
    def _raster(views: Tensor, shape: Shape) -> Tensor:
        """Features of the tiles as one map in reading order, [units, raster, width]."""
        if not shape.tiles:
            return views[:, shape.whole]
        depth, rows, cols = shape.grid
        tiles = views[:, list(shape.tiles)].unflatten(2, (depth * rows, cols))
        return tiles.unflatten(1, (shape.rows, shape.cols)).transpose(2, 3).flatten(1, 4)

    @property
    def compressed(self) -> int:
        """Tokens that a unit becomes."""
        return self.compressor.side**2

    # the whole batch

    def forward(
        self, features: Features, plans: Sequence[Plan], prompt: Prompt | None = None
    ) -> tuple[Features, Tensor]:
        """Vision tokens, one entry (1, C, C) per unit, and the prompt's embeddings with their text fused."""
        units = units_of(features, plans)
        texts = self._texts(prompt)
        samples = torch.tensor([texts.number[prompt.media_segments[prompt.media[unit.item]]] for unit in units])
        samples = samples.to(prompt.embeds.device)
        exact = torch.promote_types(prompt.embeds.dtype, torch.float32)
        total = torch.zeros(texts.embeds.shape, dtype=exact, device=prompt.embeds.device)
        vision: list[Tensor] = []
        done = 0
        for key, group in self._passes(units, self._keys(units, prompt)):
            own = samples[done : done + len(group)]
            done += len(group)
            text, visible = texts.embeds[own], texts.visible[own]
            if torch.is_grad_enabled():
                fused, text = self.prefusion(self._vision_tokens_of(features, group), text, visible)
                fused = fused[:, -self.compressed :]
                total = total.index_add(0, own, text.to(exact))
            else:
                fused, states = self._read_images(features, group, key, prompt.memory)
                text = self.prefusion.read_text(states, text, visible)
                total.index_add_(0, own, text.to(exact))
            vision.append(fused.flatten(0, 1))
        counts = torch.bincount(samples, minlength=len(total))
        mean = (total / counts[:, None, None]).to(prompt.embeds.dtype)
        values = torch.where(texts.visible.unsqueeze(-1), mean, texts.embeds)[texts.real]
        embeds = prompt.embeds.flatten(0, 1).index_put((texts.index[texts.real],), values).view_as(prompt.embeds)
        prompt.changed = torch.zeros_like(prompt.visual)
        prompt.changed.view(-1)[texts.index[texts.visible]] = True
        grid = (1, self.compressor.side, self.compressor.side)
        return Features(torch.cat(vision), [grid] * len(units), [unit.item for unit in units]), embeds

    def _vision_tokens_of(self, features: Features, group: Sequence[Unit]) -> Tensor:
        shape = group[0].shape
        views = features.part(group[0].first, group[-1].first + shape.views)
        return self.vision_tokens(views.view(len(group), shape.views, -1, views.shape[-1]), shape)

    def _read_images(self, features: Features, group: Sequence[Unit], key: Any, memory: Any) -> tuple[Tensor, States]:
        """What does not depend on the text: vision tokens [units, C x C, hidden] and states, kept under `key`."""
        held = None if key is None else memory.get(key)
        if held is None:
            hidden, states = self.prefusion.read_vision(self._vision_tokens_of(features, group))
            held = hidden[:, -self.compressed :].clone(), states
            if key is not None:
                memory.put(key, held, self.prefusion.state_bytes(hidden.shape[1], hidden.element_size()))
        return held

    @staticmethod
    def _keys(units: Sequence[Unit], prompt: Prompt) -> list[Any]:
        """What names the images whose states may be kept; None for frames of videos and while training."""
        if prompt.memory is None or prompt.digests is None or torch.is_grad_enabled():
            return [None] * len(units)
        frames = Counter(unit.item for unit in units)
        digests = [prompt.digests[prompt.media[unit.item]] for unit in units]
        return [
            (digest, "prefusion") if frames[unit.item] == 1 else None
            for unit, digest in zip(units, digests, strict=True)
        ]

    def _passes(self, units: Sequence[Unit], keys: Sequence[Any]) -> Iterator[tuple[Any, list[Unit]]]:
        """Stretches of units of one shape that go through the blocks together; an image with a key goes alone."""
        pairs = zip(keys, units, strict=True)
        for (key, shape), group in groupby(pairs, key=lambda pair: (pair[0], pair[1].shape)):
            members = [unit for _, unit in group]
            size = 1 if key is not None else max(self.pass_tokens // (shape.tokens + self.compressed), 1)
            yield from ((key, members[start : start + size]) for start in range(0, len(members), size))

    def _texts(self, prompt: Prompt) -> Texts:
        own = {prompt.media_segments[item] for item in prompt.media}
        segments = int(prompt.segments.max()) + 1
        rows = torch.arange(len(prompt.segments), device=prompt.segments.device)
        sample = (rows[:, None] * segments + prompt.segments).flatten()
        wanted = torch.tensor(sorted(row * segments + segment for row, segment in own), device=sample.device)
        places = (prompt.visible & ~prompt.visual).flatten() & torch.isin(sample, wanted)
        flat = places.nonzero().squeeze(1)
        of = torch.searchsorted(wanted, sample[flat])
        counts = torch.bincount(of, minlength=len(wanted))
        within = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[of]
        index = flat.new_zeros(len(wanted), int(counts.max()))
        real = torch.zeros_like(index, dtype=torch.bool)
        index[of, within], real[of, within] = flat, True
        number = {divmod(int(key), segments): row for row, key in enumerate(wanted.tolist())}
        embeds = prompt.embeds.detach().flatten(0, 1)[index]
        return Texts(number, index, real, real & ~self._hidden(prompt).flatten()[index], embeds)

    def _hidden(self, prompt: Prompt) -> Tensor:
        """Text that the blocks do not see: given ids, answers that are being learnt, perhaps earlier answers."""
        hidden = torch.zeros_like(prompt.visual)
        if prompt.ids is not None and self.hidden_token_ids:
            hidden |= torch.isin(prompt.ids, torch.tensor(self.hidden_token_ids, device=prompt.ids.device))
        if prompt.labels is not None:
            hidden |= prompt.labels != -100
        elif prompt.answers is not None and self.second_turn == "raw":
            hidden |= prompt.answers
        return hidden


def units_of(features: Features, plans: Sequence[Plan]) -> list[Unit]:
    """The units of all media, in the order of their views.

    Raises:
        ValueError: If the views of an image do not make up a raster and a whole.
    """
    units = []
    first = 0
    known: dict[int, list[Shape]] = {}  # by the identity of a plan, for media of one size share theirs
    for item, plan in enumerate(plans):
        if id(plan) not in known:
            known[id(plan)] = _shapes(plan, features.grids[first : first + len(plan.views)])
        for shape in known[id(plan)]:
            units.append(Unit(item, first, shape))
            first += shape.views
    return units


def _shapes(plan: Plan, grids: Sequence[Grid]) -> list[Shape]:
    """The shape of every unit of a media item whose views have these feature grids."""
    shapes = []
    pairs = zip(plan.views, grids, strict=True)
    for _, members in groupby(pairs, key=lambda pair: pair[0].index):
        views, own = zip(*members, strict=True)
        tiles = sorted((view.row, view.col, number) for number, view in enumerate(views) if view.role == "tile")
        whole = [number for number, view in enumerate(views) if view.role != "tile"]
        if len(whole) != 1 or len(set(own)) != 1 or len(tiles) not in (0, plan.rows * plan.cols):
            raise ValueError(
                f"compressor_prefusion reads one view, or all tiles of one size and the whole image; "
                f"got {len(tiles)} tiles, {len(whole)} others, grids {sorted(set(own))}"
            )
        rows, cols = (plan.rows, plan.cols) if tiles else (1, 1)
        shapes.append(Shape(tuple(number for *_, number in tiles), whole[0], rows, cols, own[0]))
    return shapes
