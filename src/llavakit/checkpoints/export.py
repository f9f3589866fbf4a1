"""Rehearsal of an export: transformers loads a small copy and must answer like llavakit, before anything is published.

The copy is the model itself, or its first decoder layers where the whole would not fit in memory twice; the files of
the rest are covered by `readback`. Pixels, ids and logits are compared on phantom pictures.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llavakit.checkpoints.files import LazyState, write_state
from llavakit.checkpoints.prompts import REFUSED
from llavakit.checkpoints.transformers_layout import TransformersLayout, write_json
from llavakit.errors import CheckpointError, UserError
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.processing import LlavakitProcessor

TOLERANCE = 1e-5
WHOLE = 2**29  # parameters up to which the whole model is tried
SHORT = 2  # decoder layers of the copy of a larger one
_LAYER = re.compile(r"^model\.language_model\.(?:layers|h)\.(\d+)\.")


def rehearse(
    layout: TransformersLayout,
    config: LlavakitConfig,
    state: LazyState,
    processor: LlavakitProcessor | None,
    build: Any,
) -> None:
    """Write a copy, have transformers load it, and compare.

    Args:
        build: Makes a llavakit model of a configuration and tensors.

    Raises:
        CheckpointError: If transformers does not load it, or gives other pixels, ids or logits.
    """
    config, state = shortened(config, state)
    with tempfile.TemporaryDirectory() as scratch, _as_refusal(config):
        folder = Path(scratch)
        layout.write_parts(config, folder)
        write_json(folder / "config.json", layout.write_config(config))
        write_state(folder, layout.write_state(config, state))
        if processor is not None:
            layout.write_processor(processor, config, folder)
        inputs = layout.prompts(processor, config, folder)
        theirs = _their_logits(layout, folder, [theirs for _, theirs in inputs])
        ours = _our_logits(build(config, state), [ours for ours, _ in inputs])
    for mine, other in zip(ours, theirs, strict=True):
        size = mine.shape[-1]
        worst = float((mine - other[..., :size]).abs().max())
        if not worst <= TOLERANCE * max(1.0, float(mine.abs().max())):
            raise CheckpointError(
                f"{REFUSED} transformers' {layout.class_name} gives logits that differ by {worst:.1e}"
            )


def shortened(config: LlavakitConfig, state: LazyState) -> tuple[LlavakitConfig, LazyState]:
    """The model, or its first decoder layers if it is large."""
    copied = LlavakitConfig.from_dict(config.to_dict())
    layers = {int(found[1]) for name in state if (found := _LAYER.match(name))}
    with torch.device("meta"):
        from llavakit.model.modeling import LlavakitForConditionalGeneration

        parameters = sum(p.numel() for p in LlavakitForConditionalGeneration(copied).parameters())
    if parameters <= WHOLE or len(layers) <= SHORT:
        return copied, state
    text = copied.text_config
    text.num_hidden_layers = SHORT
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:SHORT]

    def keep(name: str) -> str | None:
        found = _LAYER.match(name)
        return None if found and int(found[1]) >= SHORT else name

    return copied, state.renamed(keep)


@contextmanager
def _as_refusal(config: LlavakitConfig) -> Any:
    """What transformers raises on an export becomes one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever its classes raise on parts that they were not made for
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise CheckpointError(
            f"{REFUSED} transformers' class does not run with vision_config.model_type "
            f"{config.vision_config.model_type!r} and text_config.model_type {config.text_config.model_type!r} "
            f"({lines[0][:200]})"
        ) from error


def _their_logits(layout: TransformersLayout, folder: Path, inputs: list[Mapping[str, Any]]) -> list[Tensor]:
    cls = getattr(transformers, layout.class_name)
    model, report = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            name = sorted(map(str, report[kind]))[0]
            raise CheckpointError(f"{REFUSED} transformers' {layout.class_name} reports {kind}: {name}")
    model.eval()
    with torch.no_grad():
        return [model(**given).logits for given in inputs]


def _our_logits(model: Any, inputs: list[Mapping[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**given).logits for given in inputs]
