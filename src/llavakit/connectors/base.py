"""The contract of connectors: feature grids to visual tokens.

A connector never decides where tokens go. It works on ragged batches: one flat tensor of tokens with the grid of
every entry, never padded to the longest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.errors import UserError
from llavakit.views.plan import Plan

Grid = tuple[int, int, int]  # depth, rows, columns
AT_ONCE = 64  # entries of streamed features that are computed together when all are wanted


def check_heads(connector: str, width: int, heads: int) -> None:
    """Refuse attention heads that do not divide the width that they share.

    Raises:
        UserError: One line.
    """
    if heads < 1 or width % heads:
        raise UserError(f"connector {connector!r}: heads is {heads}, it must divide the width {width}")


def tokens_in(grid: Grid) -> int:
    """Number of tokens of a grid."""
    return grid[0] * grid[1] * grid[2]


@dataclass
class Features:
    """Ragged batch of feature grids.

    Attributes:
        values: [sum of tokens, width], entries one after another, each row-major (depth, rows, columns).
        grids: Grid of every entry.
        media_index: For every entry the index of the media item that it belongs to, ascending.
        regions: One vector per region of an entry's view, [regions, region width] per entry; None if no view of the
            batch has regions.
        reduced: Whether these are what `Connector.reduce` made of an encoder's features.
    """

    values: Tensor
    grids: list[Grid]
    media_index: list[int]
    regions: list[Tensor] | None = None
    reduced: bool = False

    def split(self) -> list[Tensor]:
        """One tensor [tokens, width] per entry."""
        return list(self.values.split([tokens_in(grid) for grid in self.grids]))

    def groups(self) -> Iterator[tuple[list[int], Tensor, Grid]]:
        """Entries of equal grid together: (entry numbers, [entries, tokens, width], grid)."""
        by_grid: dict[Grid, list[int]] = defaultdict(list)
        for entry, grid in enumerate(self.grids):
            by_grid[grid].append(entry)
        if len(by_grid) == 1:
            grid, entries = next(iter(by_grid.items()))
            yield entries, self.values.view(len(entries), tokens_in(grid), -1), grid
            return
        parts = self.split()
        for grid, entries in by_grid.items():
            yield entries, torch.stack([parts[entry] for entry in entries]), grid

    def by_media(self, count: int) -> list[list[int]]:
        """Entry numbers grouped by media item.

        Args:
            count: Number of media items.
        """
        entries: list[list[int]] = [[] for _ in range(count)]
        for entry, owner in enumerate(self.media_index):
            entries[owner].append(entry)
        return entries

    def part(self, start: int, stop: int) -> Tensor:
        """The tokens of the entries `start` to `stop - 1`, [tokens, width]."""
        before = sum(tokens_in(grid) for grid in self.grids[:start])
        return self.values[before : before + sum(tokens_in(grid) for grid in self.grids[start:stop])]

    def to(self, dtype: torch.dtype) -> Features:
        """The same features in another type."""
        regions = None if self.regions is None else [vectors.to(dtype) for vectors in self.regions]
        return replace(self, values=self.values.to(dtype), regions=regions)

    @classmethod
    def join(cls, parts: Mapping[int, Tensor], grids: Sequence[Grid], media_index: Sequence[int]) -> Features:
        """Features from one [tokens, width] tensor per entry number."""
        values = torch.cat([parts[entry] for entry in range(len(parts))])
        return cls(values, list(grids), list(media_index))


class StreamedFeatures(Features):
    """Features that are computed each time they are asked for, so that those of a long video never exist at once.

    Args:
        read: Gives the tokens [tokens, width] of the entries from the first number up to the second.
    """

    def __init__(self, read: Callable[[int, int], Tensor], grids: list[Grid], media_index: list[int]) -> None:
        self.read, self.grids, self.media_index, self.regions = read, grids, media_index, None

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """All of them, computed some at a time."""
        count = len(self.grids)
        return torch.cat([self.read(start, min(start + AT_ONCE, count)) for start in range(0, count, AT_ONCE)])

    def part(self, start: int, stop: int) -> Tensor:
        return self.read(start, stop)

    def to(self, dtype: torch.dtype) -> Features:
        read = self.read
        return StreamedFeatures(lambda start, stop: read(start, stop).to(dtype), self.grids, self.media_index)


@dataclass
class Prompt:
    """What a connector that reads the prompt gets to see.

    Attributes:
        embeds: Token embeddings [batch, length, hidden]; visual positions hold the placeholder's embedding.
        ids: Token ids [batch, length], expanded (one placeholder id per visual token).
        visible: True where a position is a real token [batch, length].
        visual: True at positions that visual tokens will fill [batch, length].
        labels: Labels [batch, length] or None; a position whose label is not -100 is an answer.
        segments: Number of the packed sample that a position belongs to [batch, length].
        media_segments: Row and segment that each media item of the batch belongs to, in prompt order.
        media: For every media item that the connector gets, its number among all media of the batch in prompt order.
        answers: True at the answers of earlier turns [batch, length], or None; known only to callers
            that encoded messages.
        digests: For every media item of the batch what names its content, or None.
        memory: With `digests`, where results that depend on a media item alone may be kept for later prompts:
            `get(key)` and `put(key, value, bytes)`.
        changed: Set by a connector whose changed embeddings depend on the media and on nothing behind them in the
            prompt: True at positions that it changed [batch, length]. States of such a prompt can be reused by
            prompts that begin in the same way.
    """

    embeds: Tensor
    ids: Tensor
    visible: Tensor
    visual: Tensor
    labels: Tensor | None
    segments: Tensor
    media_segments: list[tuple[int, int]] = field(default_factory=list)
    media: list[int] = field(default_factory=list)
    answers: Tensor | None = None
    digests: list[bytes] | None = None
    memory: Any = None
    changed: Tensor | None = None


class Connector(nn.Module):
    """Base class; subclasses are registered in `llavakit.registry.CONNECTORS`.

    Args:
        vision_width: Channels of the encoder's features; with several `encoders` a tuple with one number for each.
        hidden_size: Width of the language model.
        text_config: Configuration of the language model, for connectors that use its layers.

    A connector whose constructor has a parameter `region_width` gets the width of the vectors that regions are pooled
    to, like `vision_width` one number or a tuple.

    Attributes:
        encoders: How many encoders of one media item `forward` reads.
        needs_prompt: Whether `forward` gets a `Prompt` and returns changed prompt embeddings too.
        streams: Whether `forward` asks for features by `Features.part`, so that they need not exist all at once.
        reduces: Whether `forward` begins with `reduce`, a step without weights that leaves fewer tokens. A cache of
            features keeps what it gives instead of the encoder's, and `forward` gets that (`Features.reduced`).
        blank_image: With `needs_prompt`: whether a sample without media is to be read with an image of zeros, which
            gets no place in the prompt.
    """

    encoders = 1
    needs_prompt = False
    streams = False
    reduces = False
    blank_image = False

    def __init__(self, *, vision_width: Any, hidden_size: int, text_config: Any = None) -> None:
        super().__init__()
        self.vision_width, self.hidden_size = vision_width, hidden_size

    def start_at(self, vector: Tensor) -> None:
        """Set the weights so that every visual token is `vector` [hidden], whatever the image.

        Raises:
            UserError: If the connector cannot.
        """
        raise UserError(f"{type(self).__name__} cannot start with every visual token at one vector")

    @classmethod
    def token_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        """Grids of the tokens that come out for a media item whose views have the feature grids `grids`.

        Pure arithmetic on the configuration, so that token counts are known without a model. The default keeps
        every token.
        """
        return list(grids)

    @classmethod
    def reduced_grids(cls, options: Mapping[str, Any], plan: Plan, grids: Sequence[Grid]) -> list[Grid]:
        """Grids that `reduce` leaves of a media item whose views have the feature grids `grids`; `reduces` only."""
        raise NotImplementedError(f"{cls.__name__} must define reduced_grids")

    def reduce(self, features: Features, plans: Sequence[Plan]) -> Features:
        """What `forward` does first, without weights; `reduces` only, with one encoder and no regions."""
        raise NotImplementedError(f"{type(self).__name__} must define reduce")

    def forward(self, features: Any, plans: Sequence[Plan], prompt: Prompt | None = None) -> Any:
        """Tokens of width `hidden_size` as `Features`; with `needs_prompt` a pair (tokens, embeddings).

        Args:
            features: Encoder features of all views of the batch (`Features`); with several `encoders` a tuple with one
                entry for each encoder, which holds the views that this encoder sees.
            plans: Plan of every media item; `features.media_index` points into it.
            prompt: Given only if `needs_prompt`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")
