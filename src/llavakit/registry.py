"""Registries: the parts of the pipeline by exact name.

A registry maps a name to a class or to the place where it is defined ("package.module:attribute"), so that
listing parts imports nothing heavy. Names are looked up exactly, duplicates are refused.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from llavakit.errors import UserError


def resolve(target: str) -> Any:
    """The object named by "package.module:attribute"."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def nearest(name: str, known: list[str]) -> str:
    """A hint such as "; did you mean 'pad'?" for a misspelt name, or the list of known names."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"


class Registry:
    """Parts of one kind by exact name.

    Args:
        kind: What the entries are, in words ("connector"); used in messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Any] = {}

    def add(self, name: str, target: Any) -> None:
        """Register `target` (an object, or "module:attribute" to import on first use) under `name`.

        Raises:
            ValueError: If the name is taken by another target.
        """
        if self._entries.get(name, target) != target:
            raise ValueError(f"{self.kind} {name!r} is registered already")
        self._entries[name] = target

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator form of `add`."""

        def decorate(target: Any) -> Any:
            self.add(name, target)
            return target

        return decorate

    def get(self, name: str) -> Any:
        """The entry called exactly `name`.

        Raises:
            UserError: If there is none; the message names the nearest known name.
        """
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} {name!r}{nearest(str(name), list(self._entries))}")
        target = self._entries[name]
        return resolve(target) if isinstance(target, str) else target

    def build(self, options: dict[str, Any], **extra: Any) -> Any:
        """Construct the part that `options["type"]` names with the other options as keywords.

        Raises:
            UserError: If the type is unknown or an option does not fit.
        """
        options = dict(options)
        name = options.pop("type", None)
        cls = self.get(name)
        try:
            return cls(**options, **extra)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            problem = f"has no option {unknown[1]!r}" if unknown else str(error).partition(".__init__() ")[2] or error
            raise UserError(f"{self.kind} {name!r}: {problem}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


ENCODERS = Registry("vision encoder")
PLANNERS = Registry("view planner")
ARRANGEMENTS = Registry("token arrangement")
CONNECTORS = Registry("connector")
ADAPTERS = Registry("language adapter")
TEMPLATES = Registry("chat template")
BENCHMARKS = Registry("benchmark")
WORLDS = Registry("phantom world")
CODECS = Registry("assistant codec")
LAYOUTS = Registry("checkpoint layout")

# Built-in parts, as places to import from on first use. Parts of one published system are on that system's card.
ENCODERS.add("llavakit_multiscale", "llavakit.vision.multiscale:MultiscaleTower")

PLANNERS.add("square", "llavakit.views.image:Square")
PLANNERS.add("pad", "llavakit.views.image:Pad")
PLANNERS.add("squash", "llavakit.views.image:Squash")
PLANNERS.add("anyres", "llavakit.views.image:AnyRes")
PLANNERS.add("frames", "llavakit.views.frames:Frames")

ARRANGEMENTS.add("spatial", "llavakit.splice.tiles:Spatial")
ARRANGEMENTS.add("spatial_unpad", "llavakit.splice.tiles:SpatialUnpad")
ARRANGEMENTS.add("frames", "llavakit.splice.tiles:Frames")
ARRANGEMENTS.add("faster_video", "llavakit.splice.tiles:FasterVideo")

CODECS.add("plain", "llavakit.conversation.codecs:Codec")
CODECS.add("hermes", "llavakit.conversation.codecs:Hermes")
CODECS.add("think", "llavakit.conversation.stages:think")
