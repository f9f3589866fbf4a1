"""Registries: the parts of the pipeline by exact name.

A registry maps a name to a class or to the place where it is defined ("package.module:attribute"), so that
listing parts imports nothing heavy. Names are looked up exactly, duplicates are refused. A name that is not there yet
makes a registry load the system cards, which register the parts of published systems and of third parties.
"""

from __future__ import annotations

import difflib
import importlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llavakit.errors import UserError

LONGEST_LIST = 400


def resolve(target: str) -> Any:
    """The object named by "package.module:attribute"."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def nearest(name: str, known: list[str]) -> str:
    """A hint such as "; did you mean 'pad'?" for a misspelt name, or the list of known names."""
    close = difflib.get_close_matches(name[:100], known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    listed = ", ".join(sorted(known)) or "none"
    if len(listed) > LONGEST_LIST:
        listed = f"{listed[:LONGEST_LIST].rpartition(', ')[0]} and others"
    return f"; known: {listed}"


_loading = threading.RLock()
_loads = 0


def _load_cards() -> None:
    """Let the system cards register their parts; does nothing in a card that asks while it is loaded itself."""
    global _loads
    with _loading:
        if _loads:
            return
        _loads += 1
        try:
            from llavakit.system import systems  # which imports this module

            systems()
        finally:
            _loads -= 1


class Registry:
    """Parts of one kind by exact name.

    Args:
        kind: What the entries are, in words ("connector"); used in messages.
        builtin: Module that registers llavakit's own entries when it is imported; imported when a name is missing.
    """

    def __init__(self, kind: str, builtin: str | None = None) -> None:
        self.kind, self.builtin = kind, builtin
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
        if name not in self:
            raise UserError(f"unknown {self.kind} {name!r}{nearest(str(name), list(self._entries))}")
        target = self._entries[name]
        return resolve(target) if isinstance(target, str) else target

    def build(self, options: Mapping[str, Any], **extra: Any) -> Any:
        """Construct the part that `options["type"]` names with the other options as keywords.

        Raises:
            UserError: If the type is unknown or an option does not fit.
        """
        if not isinstance(options, Mapping):
            raise UserError(f"{self.kind}: must be a mapping with a type, not {options!r}")
        options = dict(options)
        name = options.pop("type", None)
        cls = self.get(name)
        try:
            return cls(**options, **extra)
        except UserError:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            problem = f"has no option {unknown[1]!r}" if unknown else str(error).partition(".__init__() ")[2] or error
            raise UserError(f"{self.kind} {name!r}: {problem}") from error

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if name not in self._entries:
            self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def _load(self) -> None:
        if self.builtin is not None:
            importlib.import_module(self.builtin)
        _load_cards()


ENCODERS = Registry("vision encoder")
ENCODER_FILES = Registry("form of encoder files")
PLANNERS = Registry("view planner")
ARRANGEMENTS = Registry("token arrangement")
CONNECTORS = Registry("connector", "llavakit.connectors")
ADAPTERS = Registry("language adapter")
TEMPLATES = Registry("chat template", "llavakit.conversation")
LABEL_POLICIES = Registry("label policy")
TEXT_METRICS = Registry("text metric", "llavakit.evaluation.metrics")
BENCHMARKS = Registry("benchmark", "llavakit.evaluation")
RUBRICS = Registry("rubric")
WORLDS = Registry("phantom world", "llavakit.phantom")
CODECS = Registry("assistant codec")
OBJECTIVES = Registry("training objective")
LAYOUTS = Registry("checkpoint layout")
PREPARATIONS = Registry("preparation of data")
RECORD_EDITS = Registry("record edit")
STORE_ENCODERS = Registry("encoder of a store")
SKILLS = Registry("skill")
PIPELINES = Registry("synthesis pipeline")
COMPARISONS = Registry("comparison of answers")

# Built-in parts, as places to import from on first use. Parts of one published system are on that system's card.
ENCODERS.add("llavakit_multiscale", "llavakit.vision.multiscale:MultiscaleEncoder")

LABEL_POLICIES.add("spans", "llavakit.conversation.labels:SpanLabels")
LABEL_POLICIES.add("marks", "llavakit.conversation.labels:MarkLabels")
LABEL_POLICIES.add("rounds", "llavakit.conversation.labels:RoundLabels")

PREPARATIONS.add("pair_features", "llavakit.vision.pairs:pair_features")

RECORD_EDITS.add("media_in_front", "llavakit.data.edits:MediaInFront")
RECORD_EDITS.add("lead_with_media", "llavakit.data.edits:LeadWithMedia")
RECORD_EDITS.add("remove_text", "llavakit.data.edits:RemoveText")

COMPARISONS.add("labelled", "llavakit.evaluation.comparisons:Labelled")

OBJECTIVES.add("contrastive", "llavakit.training.objectives.contrastive:Contrastive")
OBJECTIVES.add("dpo", "llavakit.training.objectives.dpo:DPO")
OBJECTIVES.add("fare", "llavakit.training.objectives.adversarial:FARE")
OBJECTIVES.add("tecoa", "llavakit.training.objectives.adversarial:TeCoA")
OBJECTIVES.add("supervised", "llavakit.training.objectives.supervised:Supervised")

PLANNERS.add("square", "llavakit.views.image:Square")
PLANNERS.add("pad", "llavakit.views.image:Pad")
PLANNERS.add("squash", "llavakit.views.image:Squash")
PLANNERS.add("anyres", "llavakit.views.image:AnyRes")
PLANNERS.add("frames", "llavakit.views.frames:Frames")

ARRANGEMENTS.add("flat", "llavakit.splice.layout:Flat")
ARRANGEMENTS.add("spatial", "llavakit.splice.tiles:Spatial")
ARRANGEMENTS.add("spatial_unpad", "llavakit.splice.tiles:SpatialUnpad")
ARRANGEMENTS.add("frames", "llavakit.splice.tiles:Frames")
ARRANGEMENTS.add("wrapped", "llavakit.splice.wrapped:Wrapped")
ARRANGEMENTS.add("faster_video", "llavakit.splice.tiles:FasterVideo")

CODECS.add("plain", "llavakit.conversation.codecs:Codec")
CODECS.add("hermes", "llavakit.conversation.codecs:Hermes")
CODECS.add("think", "llavakit.conversation.stages:think")

SKILLS.add("detect_shapes", "llavakit.tools.shapes:shapes_skill")
SKILLS.add("segment", "llavakit.tools.segmentation:segmentation_skill")
SKILLS.add("inpaint", "llavakit.tools.inpainting:inpainting_skill")
SKILLS.add("retrieve", "llavakit.tools.knowledge:retrieve")
SKILLS.add("ocr", "llavakit.tools.reading:reading_skill")
SKILLS.add("grounding_dino", "llavakit.tools.weights:grounding_dino")
SKILLS.add("owlv2", "llavakit.tools.weights:owlv2")
SKILLS.add("sam", "llavakit.tools.weights:sam")
SKILLS.add("blip2", "llavakit.tools.weights:blip2")
SKILLS.add("stable_diffusion", "llavakit.tools.diffusion:stable_diffusion")
SKILLS.add("stable_inpainting", "llavakit.tools.diffusion:stable_inpainting")
SKILLS.add("instruct_pix2pix", "llavakit.tools.diffusion:instruct_pix2pix")
SKILLS.add("gligen", "llavakit.tools.diffusion:gligen")
SKILLS.add("controlnet", "llavakit.tools.diffusion:controlnet")
