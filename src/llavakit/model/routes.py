"""What a checkpoint does to each modality, as arithmetic: plan, feature grids, token grids, layout.

Processor and model share this, so that the processor's placeholder ids and the model's visual tokens agree by
construction. Nothing here runs a network.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llavakit.connectors.base import Connector, Grid
from llavakit.errors import UserError
from llavakit.media.regions import Region
from llavakit.model.configuration import MAIN_CONNECTOR, ROUTE_KEYS, LlavakitConfig, check_keys
from llavakit.registry import ARRANGEMENTS, CONNECTORS, PLANNERS
from llavakit.splice.layout import Arrangement, Run
from llavakit.views.plan import MediaSize, Plan, Planner
from llavakit.vision.geometry import Geometry, geometry_of

MODALITIES = ("image", "video", "volume", "multi_image")


@dataclass(frozen=True)
class Route:
    """How one modality goes through the model.

    Attributes:
        encoders: Attribute names of the encoders; a view names its own by number (`View.encoder`).
        geometries, keep_prefix: Of every encoder.
        widths, region_widths: Channels that the connector reads of a feature and of a region's vector, per encoder.
    """

    modality: str
    encoders: tuple[str, ...]
    connector: str
    planner: Planner
    arrangement: Arrangement
    geometries: tuple[Geometry, ...]
    keep_prefix: tuple[bool, ...]
    widths: tuple[int, ...]
    region_widths: tuple[int, ...]
    connector_cls: type[Connector]
    connector_options: dict[str, Any]

    def plan(self, size: MediaSize, regions: Sequence[Region] = ()) -> Plan:
        """The plan of a media item.

        Raises:
            UserError: If it has regions and the model takes none.
        """
        if self.planner.takes_regions:
            return self.planner.plan(size, regions)
        if regions:
            raise UserError(f"this model takes no boxes with an {self.modality}; leave them out")
        return self.planner.plan(size)

    def select_regions(self, size: MediaSize, regions: Sequence[Region], text_length: int) -> list[Region]:
        """The regions that the model is to see; all of them where the planner takes none, so that `plan` refuses."""
        if not self.planner.takes_regions:
            return list(regions)
        return self.planner.select_regions(size, regions, text_length)

    def feature_grids(self, plan: Plan) -> list[Grid]:
        """Grid of the encoder's features for every view."""
        return [self.geometries[view.encoder].grid(view, self.keep_prefix[view.encoder]) for view in plan.views]

    @property
    def reduces(self) -> bool:
        """Whether the connector begins with a step without weights, see `Connector.reduces`."""
        return self.connector_cls.reduces

    def reduced_grids(self, plan: Plan) -> list[Grid]:
        """Grids that this step leaves of the features."""
        return self.connector_cls.reduced_grids(self.connector_options, plan, self.feature_grids(plan))

    def token_grids(self, plan: Plan) -> list[Grid]:
        """Grids that come out of the connector."""
        return self.connector_cls.token_grids(self.connector_options, plan, self.feature_grids(plan))

    def layout(self, plan: Plan) -> list[Run]:
        """The stretch of prompt that a media item becomes."""
        return self.arrangement.layout(plan, self.token_grids(plan))


class MediaSpec:
    """The routes of a configuration; empty for a model without a vision side.

    Args:
        config: Model configuration.

    Raises:
        UserError: If a route names a part or has a key that does not exist.
    """

    def __init__(self, config: LlavakitConfig) -> None:
        self.routes = {modality: self._route(config, modality, options) for modality, options in config.media.items()}
        self.plan = functools.lru_cache(maxsize=4096)(self._plan)
        self.layout = functools.lru_cache(maxsize=4096)(self._layout)

    @staticmethod
    def _route(config: LlavakitConfig, modality: str, options: Any) -> Route:
        where = f"media.{modality}"
        if modality not in MODALITIES:
            raise UserError(f"config.media: unknown modality {modality!r}; known: {', '.join(MODALITIES)}")
        check_keys(options, ROUTE_KEYS, where)
        if "views" not in options:
            raise UserError(f"{where}.views: is missing; it names the planner, for instance {{type: pad, size: 336}}")
        connector = options.get("connector", MAIN_CONNECTOR)
        connector_options = config.connector_options(connector)
        connector_cls = CONNECTORS.get(connector_options["type"])
        encoders = options.get("encoder") or config.connector_encoders(connector)
        encoders = (encoders,) if isinstance(encoders, str) else tuple(encoders)
        if len(encoders) != connector_cls.encoders:
            raise UserError(
                f"{where}.encoder: names {len(encoders)} encoders, connector {connector_options['type']!r} "
                f"reads {connector_cls.encoders}"
            )
        settings = [config.encoder_config(name) for name in encoders]
        widths, region_widths = zip(*(encoder_widths(config, name) for name in encoders), strict=True)
        return Route(
            modality=modality,
            encoders=encoders,
            connector=connector,
            planner=PLANNERS.build(options["views"]),
            arrangement=ARRANGEMENTS.build(options.get("arrange", {"type": "flat"})),
            geometries=tuple(geometry_of(encoder).for_strategy(strategy) for encoder, _, strategy in settings),
            keep_prefix=tuple(strategy == "full" for _, _, strategy in settings),
            widths=widths,
            region_widths=region_widths,
            connector_cls=connector_cls,
            connector_options=connector_options,
        )

    def route(self, modality: str) -> Route:
        """The route of a modality.

        Raises:
            UserError: If the model does not take it.
        """
        if modality == "multi_image" and modality not in self.routes:
            modality = "image"
        if modality not in self.routes:
            takes = f"it takes: {', '.join(self.routes)}" if self.routes else "it takes text alone"
            raise UserError(f"this model takes no {modality}; {takes}")
        return self.routes[modality]

    def _plan(self, modality: str, size: MediaSize, regions: tuple[Region, ...] = ()) -> Plan:
        return self.route(modality).plan(size, regions)

    def _layout(self, modality: str, size: MediaSize, regions: tuple[Region, ...] = ()) -> tuple[Run, ...]:
        return tuple(self.route(modality).layout(self.plan(modality, size, regions)))

    def count(self, modality: str, size: MediaSize) -> int:
        """Prompt positions that a media item takes, literal separators included."""
        return sum(run.visual + len(run.ids) for run in self.layout(modality, size))

    def check_vocabulary(self, size: int) -> None:
        """Refuse layouts that write token ids which the language model lacks.

        Raises:
            UserError: Naming modality and id.
        """
        for modality, route in self.routes.items():
            beyond = [token for token in route.arrangement.literal_ids if not 0 <= token < size]
            if beyond:
                raise UserError(
                    f"media.{modality}.arrange: token id {beyond[0]} is outside the vocabulary of {size}; "
                    "give the ids of this tokenizer"
                )

    @property
    def uses_newline(self) -> bool:
        """Whether any arrangement needs the learned `image_newline`."""
        return self.newline_vectors > 0

    @property
    def newline_vectors(self) -> int:
        """Vectors of the learned `image_newline`; 0 if no arrangement needs it."""
        arrangements = [route.arrangement for route in self.routes.values()]
        return max((own.newline_vectors for own in arrangements if own.uses_newline), default=0)

    @property
    def takes_regions(self) -> bool:
        """Whether any modality takes regions."""
        return any(route.planner.takes_regions for route in self.routes.values())


def encoder_widths(config: LlavakitConfig, name: str) -> tuple[int, int]:
    """Channels that a connector reads of an encoder's features, and of the vectors that regions are pooled to."""
    encoder, layer, _ = config.encoder_config(name)
    geometry = geometry_of(encoder)
    width = geometry.width * (1 if isinstance(layer, int) else len(layer))
    return width, geometry.region_width or width


def read_region_tensor(boxes: Tensor | None) -> tuple[Region, ...]:
    """Regions as a batch carries them, boxes [regions, 4] in pixels, as a plan takes them."""
    return () if boxes is None else tuple(Region(*box) for box in boxes.tolist())
