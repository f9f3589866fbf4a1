"""What a checkpoint does to each modality, as arithmetic: plan, feature grids, token grids, layout.

Processor and model share this, so that the processor's placeholder ids and the model's visual tokens agree by
construction. Nothing here runs a network.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from llavakit.connectors.base import Connector, Grid
from llavakit.errors import UserError
from llavakit.model.configuration import LlavakitConfig
from llavakit.registry import ARRANGEMENTS, CONNECTORS, PLANNERS
from llavakit.splice.layout import Arrangement, Run
from llavakit.views.plan import MediaSize, Plan, Planner
from llavakit.vision.geometry import Geometry, geometry_of

MODALITIES = ("image", "video", "volume", "multi_image")


@dataclass(frozen=True)
class Route:
    """How one modality goes through the model."""

    modality: str
    encoder: str
    connector: str
    planner: Planner
    arrangement: Arrangement
    geometry: Geometry
    keep_prefix: bool
    connector_cls: type[Connector]
    connector_options: dict[str, Any]

    def feature_grids(self, plan: Plan) -> list[Grid]:
        """Grid of the encoder's features for every view."""
        return [self.geometry.grid(view, self.keep_prefix) for view in plan.views]

    def token_grids(self, plan: Plan) -> list[Grid]:
        """Grids that come out of the connector."""
        return self.connector_cls.token_grids(self.connector_options, plan, self.feature_grids(plan))

    def layout(self, plan: Plan) -> list[Run]:
        """The stretch of prompt that a media item becomes."""
        return self.arrangement.layout(plan, self.token_grids(plan))


class MediaSpec:
    """The routes of a configuration.

    Args:
        config: Model configuration.
    """

    def __init__(self, config: LlavakitConfig) -> None:
        self.routes = {modality: self._route(config, modality, options) for modality, options in config.media.items()}
        self.plan = functools.lru_cache(maxsize=4096)(self._plan)
        self.layout = functools.lru_cache(maxsize=4096)(self._layout)

    @staticmethod
    def _route(config: LlavakitConfig, modality: str, options: dict[str, Any]) -> Route:
        if modality not in MODALITIES:
            raise UserError(f"config.media: unknown modality {modality!r}; known: {', '.join(MODALITIES)}")
        encoder = options.get("encoder", "vision_tower")
        connector = options.get("connector", "multi_modal_projector")
        encoder_config, _, strategy = config.encoder_config(encoder)
        connector_options = config.connector_options(connector)
        return Route(
            modality=modality,
            encoder=encoder,
            connector=connector,
            planner=PLANNERS.build(options["views"]),
            arrangement=ARRANGEMENTS.build(options.get("arrange", {"type": "flat"})),
            geometry=geometry_of(encoder_config),
            keep_prefix=strategy == "full",
            connector_cls=CONNECTORS.get(connector_options["type"]),
            connector_options=connector_options,
        )

    def route(self, modality: str) -> Route:
        """The route of a modality.

        Raises:
            UserError: If the model does not take this kind.
        """
        if modality == "multi_image" and modality not in self.routes:
            modality = "image"
        if modality not in self.routes:
            raise UserError(f"this model takes no {modality}; it takes: {', '.join(self.routes)}")
        return self.routes[modality]

    def _plan(self, modality: str, size: MediaSize) -> Plan:
        return self.route(modality).planner.plan(size)

    def _layout(self, modality: str, size: MediaSize) -> tuple[Run, ...]:
        return tuple(self.route(modality).layout(self.plan(modality, size)))

    def count(self, modality: str, size: MediaSize) -> int:
        """Prompt positions that a media item takes, literal separators included."""
        return sum(run.visual + len(run.ids) for run in self.layout(modality, size))

    def check_vocabulary(self, size: int) -> None:
        """Refuse layouts that write token ids which the language model lacks.

        Raises:
            UserError: Naming kind and id.
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
        return any(route.arrangement.uses_newline for route in self.routes.values())
