"""Layouts: published checkpoint files to and from llavakit's own.

A layout says how a folder that somebody published maps to a configuration and to names of tensors, and back. The
classic LLaVA code base, in a variation of which most systems published, is `checkpoints.classic`; each system's own
layout lives in its folder and is chosen by looking at the files, never at the folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from llavakit.checkpoints.files import LazyState
from llavakit.errors import CheckpointError, UserError
from llavakit.model.configuration import LlavakitConfig
from llavakit.registry import LAYOUTS

Renames = tuple[tuple[str, str], ...]

_DEAD_KEYS = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")


def rename_with(rules: Renames, *, keep_unmatched: bool = True) -> Callable[[str], str | None]:
    """A renaming function from (regex, replacement) pairs; the first that matches wins.

    Buffers that old transformers releases saved and new ones compute are dropped.
    """
    compiled = [(re.compile(pattern), target) for pattern, target in rules]

    def rename(name: str) -> str | None:
        if _DEAD_KEYS.search(name):
            return None
        for pattern, target in compiled:
            new, count = pattern.subn(target, name)
            if count:
                return new
        return name if keep_unmatched else None

    return rename


class Layout:
    """Base class; instances are registered in `llavakit.registry.LAYOUTS`.

    Attributes:
        system: Slug of the system whose files these are.
        form: "original" (the authors' files) or "hf" (transformers' own class for it).
        inert: Keys of its config.json that carry no meaning for inference, each with the reason; see `INERT`. Every
            other key must be read by `read`, or the folder is refused.
        known_changes: Options of a model that this layout has no place for, and that are written all the same, each
            with what that means; conversion tells the user. Any other option that is lost is an error.
        vllm_assumes: Keys of its config.json that vLLM's own class takes for granted, whatever the file says, with the
            values that it takes; a model that says otherwise would be answered for from wrong features.
        general: Whether other layouts are asked first about a folder.
    """

    system: ClassVar[str]
    form: ClassVar[str]
    inert: ClassVar[Mapping[str, str]] = {}
    known_changes: ClassVar[Mapping[str, str]] = {}
    vllm_assumes: ClassVar[Mapping[str, Any]] = {}
    general: ClassVar[bool] = False

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        """Whether a folder with this config.json is in this layout."""
        raise NotImplementedError(f"{type(self).__name__} must define matches")

    def implied_config(self, folder: Path, base: Path | None) -> dict[str, Any] | None:
        """config.json of a folder that holds none and is in this layout all the same; None for any other folder.

        Args:
            base: Folder of the language model, if it was named.

        Raises:
            CheckpointError: If the folder is in this layout, and the language model is needed to say more.
        """
        return None

    def read(
        self, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> tuple[LlavakitConfig, LazyState]:
        """Configuration and tensors under llavakit's names.

        Args:
            raw: The object in config.json; it notices which keys are read, see `llavakit.checkpoints.fields`.
            sources: Local folders of what the files need but do not hold: "base" (language model), "encoder".
        """
        raise NotImplementedError(f"{type(self).__name__} must define read")

    def read_own(self, folder: Path, raw: Mapping[str, Any]) -> LazyState:
        """Tensors that the folder itself holds, under llavakit's names; used when a single part is initialised."""
        return self.read(folder, raw, {})[1]

    def part_config(self, folder: Path, raw: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Options of the configuration `text_config` or `vision_config` of the folder's model."""
        return dict(raw[name])

    def expresses(self, config: LlavakitConfig) -> bool:
        """Whether a model with this configuration can be written in this layout."""
        return config.system == self.system

    def objections(self, config: LlavakitConfig) -> list[str]:
        """Why a model cannot be written in this layout, each naming an option; empty if it can."""
        return [] if self.expresses(config) else [f"its parts are not those of {self.system}"]

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        """The published config.json."""
        raise NotImplementedError(f"{type(self).__name__} must define write_config")

    def write_state(self, config: LlavakitConfig, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        """Tensors under their published names, one by one."""
        raise NotImplementedError(f"{type(self).__name__} must define write_state")

    def write_processor(self, processor: Any, config: LlavakitConfig, folder: Path) -> None:
        """Tokenizer and preprocessing files; the default writes the tokenizer."""
        processor.tokenizer.save_pretrained(folder)

    def write_parts(self, config: LlavakitConfig, folder: Path) -> None:
        """Configurations of parts that config.json only names; the default writes none."""


def layouts() -> dict[str, Layout]:
    """All registered layouts by name."""
    return {name: LAYOUTS.get(name)() for name in LAYOUTS}


def published(folder: Path, raw: Mapping[str, Any]) -> Layout | None:
    """The layout of a published folder; None if no layout is like it (a language model or an encoder alone)."""
    known = sorted(layouts().values(), key=lambda layout: layout.general)
    return next((layout for layout in known if layout.matches(raw, folder)), None)


def implied_config(folder: Path, base: Path | None) -> dict[str, Any] | None:
    """config.json of a folder without one, by the layout that knows its files; None if there is none."""
    found = (layout.implied_config(folder, base) for layout in layouts().values())
    return next((raw for raw in found if raw is not None), None)


def detect(folder: Path, raw: Mapping[str, Any]) -> Layout:
    """The layout of a published folder.

    Raises:
        CheckpointError: If none fits.
    """
    from llavakit.checkpoints.causal import CausalLayout

    for layout in (published(folder, raw), CausalLayout()):
        if layout is not None and layout.matches(raw, folder):
            return layout
    raise CheckpointError(
        f"{folder}: model_type {raw.get('model_type')!r} is not a layout that llavakit reads; "
        f"known layouts: {', '.join(LAYOUTS)}, and language models of transformers"
    )


def layout_for(config: LlavakitConfig, form: str) -> Layout:
    """The layout in which a model can be written.

    Raises:
        UserError: If it cannot.
    """
    from llavakit.checkpoints.causal import CausalLayout

    known = layouts().values() if config.media else [CausalLayout()]
    found = [(layout, layout.objections(config)) for layout in known if layout.form == form]
    found.sort(key=lambda pair: (len(pair[1]) > 0, pair[0].system != config.system, len(pair[1])))
    if not found:
        raise UserError(f"no layout of the form {form!r} is known")
    layout, objections = found[0]
    if objections:
        raise UserError(f"this model cannot be written as {form!r}: {'; '.join(objections)}")
    return layout
