"""The media of a batch on their way through the model: views to encoder features, grouped by connector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llavakit.connectors.base import Features, Grid, StreamedFeatures
from llavakit.model.routes import MediaSpec
from llavakit.views.plan import Box, Plan
from llavakit.vision.encode import encode_regions, encode_views
from llavakit.vision.geometry import geometry_of


@dataclass
class Visuals:
    """Encoder features of the media of a batch.

    Attributes:
        modalities: Modality of every media item.
        plans: Plan of every media item.
        features: Per connector one `Features` for each encoder that it reads; `media_index` counts among the media
            of that connector.
    """

    modalities: list[str]
    plans: list[Plan]
    features: dict[str, tuple[Features, ...]]

    def joined(self, other: Visuals) -> Visuals:
        """These media and then the others."""
        features = dict(self.features)
        for name, more in other.features.items():
            features[name] = tuple(map(_joined, features[name], more)) if name in features else more
        return Visuals(self.modalities + other.modalities, self.plans + other.plans, features)


def _joined(first: Features, second: Features) -> Features:
    shift = first.media_index[-1] + 1
    regions = None if first.regions is None and second.regions is None else [*_regions(first), *_regions(second)]
    return Features(
        torch.cat([first.values, second.values]),
        first.grids + second.grids,
        first.media_index + [number + shift for number in second.media_index],
        regions,
    )


def _regions(features: Features) -> list[Tensor]:
    return features.regions or [features.values[:0]] * len(features.grids)


class ViewJob(NamedTuple):
    """Which encoder sees a view, and which of its regions are pooled."""

    encoder: str
    regions: tuple[Box, ...]


def view_jobs(spec: MediaSpec, modalities: Sequence[str], plans: Sequence[Plan]) -> list[ViewJob]:
    """The work of every view of a batch, in the order of `pixel_values`."""
    return [
        ViewJob(spec.route(modality).encoders[view.encoder], view.regions)
        for modality, plan in zip(modalities, plans, strict=True)
        for view in plan.views
    ]


def run_encoders(model: Any, pixel_values: Tensor | Sequence[Tensor], jobs: Sequence[ViewJob]) -> list[Tensor]:
    """Encoder features of every view; views of one shape and encoder are encoded together.

    Args:
        model: The `LlavakitModel` that owns the encoders.
        pixel_values: One view per job, [channels, (depth,) height, width] each.

    Returns:
        For every view its tokens [tokens, width]; a view with regions is followed by their vectors [regions, width].
    """
    groups: dict[tuple, list[int]] = {}
    for view, job in enumerate(jobs):
        groups.setdefault((job.encoder, bool(job.regions), tuple(pixel_values[view].shape)), []).append(view)
    encoded: dict[int, list[Tensor]] = {}
    for (name, with_regions, _), views in groups.items():
        config, layer, strategy = model.config.encoder_config(name)
        whole = len(views) == len(jobs) and isinstance(pixel_values, Tensor)
        pixels = pixel_values if whole else torch.stack([pixel_values[view] for view in views])
        encoder = getattr(model, name)
        pixels = pixels.to(encoder.device, encoder.dtype)
        if with_regions:
            boxes = [jobs[view].regions for view in views]
            tokens, pooled = encode_regions(encoder, pixels, boxes, layer, strategy, geometry_of(config))
            encoded |= {view: [*pair] for view, *pair in zip(views, tokens, pooled, strict=True)}
        else:
            tokens = encode_views(encoder, pixels, layer, strategy, geometry_of(config))
            encoded |= {view: [own] for view, own in zip(views, tokens, strict=True)}
    return [tensor for view in range(len(jobs)) for tensor in encoded[view]]


def gather_media(
    spec: MediaSpec,
    modalities: list[str],
    plans: list[Plan],
    tensors: Sequence[Tensor],
    *,
    reduced: bool = False,
) -> Visuals:
    """Visuals from the features of every view.

    Args:
        tensors: As from `run_encoders`, in the order of the plans.
        reduced: Whether the tensors of connectors that reduce (`Connector.reduces`) are what `reduce` made of them.
    """
    found: dict[str, list[_Slot]] = {}
    media: dict[str, int] = {}
    remaining = iter(tensors)
    for modality, plan in zip(modalities, plans, strict=True):
        route = spec.route(modality)
        slots = found.setdefault(route.connector, [_Slot() for _ in route.encoders])
        number = media.get(route.connector, 0)
        media[route.connector] = number + 1
        if reduced and route.reduces:
            slots[0].reduced = True
            for grid in route.reduced_grids(plan):
                slots[0].add(number, next(remaining), grid, None)
            continue
        for view, grid in zip(plan.views, route.feature_grids(plan), strict=True):
            tokens = next(remaining)
            slots[view.encoder].add(number, tokens, grid, next(remaining) if view.regions else None)
    return Visuals(modalities, plans, {name: tuple(slot.features() for slot in slots) for name, slots in found.items()})


class _Slot:
    """The views that one encoder of a connector sees."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.grids: list[Grid] = []
        self.media_index: list[int] = []
        self.regions: list[Tensor | None] = []
        self.reduced = False

    def add(self, media_index: int, tokens: Tensor, grid: Grid, regions: Tensor | None) -> None:
        self.tokens.append(tokens)
        self.grids.append(grid)
        self.media_index.append(media_index)
        self.regions.append(regions)

    def features(self) -> Features:
        regions = None
        present = [vectors for vectors in self.regions if vectors is not None]
        if present:
            regions = [present[0][:0] if vectors is None else vectors for vectors in self.regions]
        values = torch.cat(self.tokens) if self.tokens else torch.zeros(0, 0)
        return Features(values, self.grids, self.media_index, regions, self.reduced)


def streamed(
    spec: MediaSpec,
    modalities: Sequence[str],
    plans: Sequence[Plan],
    read: Callable[[int, int], Tensor],
) -> StreamedFeatures:
    """Features of one connector that are computed when they are asked for; see `StreamedFeatures`."""

    def views() -> Iterator[tuple[int, Grid]]:
        for number, (modality, plan) in enumerate(zip(modalities, plans, strict=True)):
            for grid in spec.route(modality).feature_grids(plan):
                yield number, grid

    media_index, grids = zip(*views(), strict=True)
    return StreamedFeatures(read, list(grids), list(media_index))
