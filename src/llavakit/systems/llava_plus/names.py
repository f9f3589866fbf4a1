"""Templates by the name of a served model, as the published server chooses them."""

from __future__ import annotations


def template_of(name: str) -> str:
    """The chat template for a model of this name."""
    spelt, name = name, name.lower()
    if "llava" not in name:  # these names are taken as they are spelt, as published
        return next(
            (template for part, template in (("mpt", "mpt_text"), ("llama-2", "llama_2")) if part in spelt), "vicuna_v1"
        )
    if "llama-2" in name:
        return "llava_llama_2"
    tagged = "mmtag" in name or ("plain" in name and "finetune" not in name)
    if "v1" in name:
        return "v1_mmtag" if tagged else "llava_v1"
    if "mpt" in name:
        return "mpt"
    return "v0_mmtag" if tagged and ("mmtag" in name or "tools" not in name) else "llava_v0"


def is_tagged(template: str) -> bool:
    """Whether a template shows pictures between tags, in a turn of their own."""
    return template.endswith("_mmtag")
