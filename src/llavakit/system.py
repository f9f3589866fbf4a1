"""System cards: what llavakit knows of a published system without importing its code.

Every folder of `llavakit.systems` and every entry point of the group `llavakit.systems` provides one `SYSTEM`.
A card is plain data; whatever needs PyTorch is named as "module:attribute" and imported on first use. What a folder
holds under the usual file names (`recipe.yaml`, `parity.py`, ...) is found and need not be named on the card.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit import registry
from llavakit.errors import UserError

ENTRY_POINT_GROUP = "llavakit.systems"
_MODULES = {"parity": "ADAPTERS", "cost": "cost", "miniature": "run"}  # file of a system's folder -> what it defines


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and where it can be re-tested."""

    text: str
    source: str


@dataclass(frozen=True, kw_only=True)
class System:
    """One published system.

    Targets are written "module:attribute"; with a dot in front the module is in the card's own package.

    Args:
        package: The package that holds the system, `__name__` of the module with the card.
        slug: Name on the command line and in golden cases ("llava-1.5").
        title: Name in the literature.
        paper: arXiv number of the paper.
        summary: One sentence: what a user gets from it.
        claims: What the paper claims; the miniature re-tests the first.
        checkpoints: Hub ids of published weights.
        parts: Registry name -> {part name -> target} of the parts that only this system has.
        parity: Target of a dict from golden component names to adapters, see `llavakit.proof.golden`; default
            `ADAPTERS` of `parity.py`.
        cost: Target of a function that returns a `llavakit.proof.cost.CostReport`; default `cost` of `cost.py`.
        miniature: Target of a function that returns a `llavakit.proof.miniature.Verdict`; default `run` of
            `miniature.py`.
        checkpoint: Target of the `llavakit.checkpoints.layouts.Layout` of its published files; default the first layout
            among `parts`.
        responder: Target of a factory of what answers in this system's way, if that is more than the model alone.
            Called with the model's own responder and options, it returns a `llavakit.generation.responder.Responder`.
        codec: Name of the codec in which its models write reasoning and tool calls; None is the default one.
        recipe: The YAML file of every training stage at published scale; default `recipe.yaml`.
        readme: The system's page; default `README.md`.
    """

    package: str | None = None
    slug: str
    title: str
    paper: str
    summary: str
    claims: tuple[Claim, ...] = ()
    checkpoints: tuple[str, ...] = ()
    parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    parity: str | None = None
    cost: str | None = None
    miniature: str | None = None
    checkpoint: str | None = None
    responder: str | None = None
    codec: str | None = None
    recipe: Path | None = None
    readme: Path | None = None

    def __post_init__(self) -> None:
        """Complete targets with the package, and fields with what its folder holds."""

        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        settle("parts", {kind: {n: self._full(t) for n, t in own.items()} for kind, own in self.parts.items()})
        folder = Path(sys.modules[self.package].__file__).parent if self.package else None
        for name, attribute in _MODULES.items():
            if getattr(self, name) is None and folder is not None and (folder / f"{name}.py").is_file():
                settle(name, f"{self.package}.{name}:{attribute}")
        if self.checkpoint is None:
            settle("checkpoint", next(iter(self.parts.get("layouts", {}).values()), None))
        for name, file in (("recipe", "recipe.yaml"), ("readme", "README.md")):
            if getattr(self, name) is None and folder is not None and (folder / file).is_file():
                settle(name, folder / file)
        for name in (*_MODULES, "checkpoint", "responder"):
            settle(name, self._full(getattr(self, name)))

    def _full(self, target: str | None) -> str | None:
        return f"{self.package}{target}" if target is not None and target.startswith(".") else target

    def load(self, what: str) -> Callable[..., Any] | Any:
        """The object behind `parity`, `cost`, `miniature`, `checkpoint` or `responder`.

        Raises:
            UserError: If this system has none.
        """
        target = getattr(self, what)
        if target is None:
            raise UserError(f"system {self.slug!r} has no {what} yet; `llavakit systems {self.slug}` shows what it has")
        return registry.resolve(target)


_REGISTRIES = {
    "encoders": registry.ENCODERS,
    "encoder_files": registry.ENCODER_FILES,
    "planners": registry.PLANNERS,
    "arrangements": registry.ARRANGEMENTS,
    "connectors": registry.CONNECTORS,
    "adapters": registry.ADAPTERS,
    "templates": registry.TEMPLATES,
    "label_policies": registry.LABEL_POLICIES,
    "text_metrics": registry.TEXT_METRICS,
    "benchmarks": registry.BENCHMARKS,
    "rubrics": registry.RUBRICS,
    "worlds": registry.WORLDS,
    "codecs": registry.CODECS,
    "objectives": registry.OBJECTIVES,
    "layouts": registry.LAYOUTS,
    "preparations": registry.PREPARATIONS,
    "record_edits": registry.RECORD_EDITS,
    "store_encoders": registry.STORE_ENCODERS,
    "skills": registry.SKILLS,
    "pipelines": registry.PIPELINES,
    "comparisons": registry.COMPARISONS,
}


@functools.cache
def systems() -> dict[str, System]:
    """All systems by slug; registers their parts on the first call.

    Raises:
        ValueError: If two systems share a slug, or register the same part name.
    """
    found: dict[str, System] = {}
    package = importlib.import_module("llavakit.systems")
    modules = [f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__) if m.ispkg]
    cards = [importlib.import_module(name).SYSTEM for name in sorted(modules)]
    cards += [point.load() for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)]
    for card in cards:
        if found.get(card.slug, card) is not card:
            raise ValueError(f"two systems are called {card.slug!r}")
        found[card.slug] = card
        for kind, parts in card.parts.items():
            for name, target in parts.items():
                _REGISTRIES[kind].add(name, target)
    return found


def get_system(slug: str) -> System:
    """The system called `slug`.

    Raises:
        UserError: If there is none; the message names the nearest.
    """
    known = systems()
    if slug not in known:
        raise UserError(f"unknown system {slug!r}{registry.nearest(slug, list(known))}")
    return known[slug]
