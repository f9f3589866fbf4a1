"""What is in a model: parts, parameters by part, template, tokens per media item. Reads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavakit.checkpoints.opening import open_checkpoint, skeleton
from llavakit.model.routes import MediaSpec
from llavakit.views.plan import MediaSize

EXAMPLES = {
    "image": [MediaSize(1, 336, 336), MediaSize(1, 480, 640), MediaSize(1, 1080, 1920)],
    "multi_image": [MediaSize(1, 480, 640)],
    "video": [MediaSize(8, 480, 640)],
    "volume": [MediaSize(32, 256, 256)],
}


def inspect_model(model: str | Path, **sources: Any) -> dict[str, Any]:
    """Facts about a checkpoint in any known layout.

    Args:
        model: Folder or hub id.
        sources: `base` and `vision_tower`, see `open_checkpoint`.

    Returns:
        JSON-able: layout, base of an adapter, system, template, parts with type and parameters, tokens of example
        media.
    """
    checkpoint = open_checkpoint(model, **sources)
    config = checkpoint.config
    net = skeleton(checkpoint)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.model.named_children()}
    if net.model.image_newline is not None:
        parts["image_newline"] = net.model.image_newline.numel()
    if not config.tie_word_embeddings:
        parts["lm_head"] = sum(p.numel() for p in net.lm_head.parameters())
    types = {
        "multi_modal_projector": config.connector["type"],
        "language_model": config.text_config.model_type,
        "language_adapter": (config.language_adapter or {}).get("type"),
    }
    types |= {name: config.encoder_config(name)[0].model_type for name in config.encoder_names()}
    types |= {name: options["type"] for name, options in config.extra_connectors.items()}
    spec = MediaSpec(config)
    tokens = []
    for modality, route in spec.routes.items():
        for size in map(route.planner.fitted, EXAMPLES[modality]):
            plan = spec.plan(modality, size)
            tokens.append(
                {
                    "modality": modality,
                    "size": list(size),
                    "planner": type(route.planner).__name__,
                    "views": len(plan.views),
                    "tokens": spec.count(modality, size),
                }
            )
    return {
        "folder": str(checkpoint.folder),
        "layout": checkpoint.layout,
        "adapter": str(checkpoint.base.folder) if checkpoint.base else None,
        "system": config.system,
        "template": config.template,
        "parts": [{"name": n, "type": types.get(n), "parameters": count} for n, count in parts.items()],
        "parameters": sum(parts.values()),
        "tokens": tokens,
    }
