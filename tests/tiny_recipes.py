"""The published recipe of a system made small, on a phantom world: what tests train in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_staged import in_stages

from llavakit.data.preparation import prepare
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.phantom.write import write_world
from llavakit.system import get_system
from llavakit.training.recipe import load_recipe
from llavakit.training.scaling import scale

MARKS = ("<image>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
REFLECTIVE = ("[No Retrieval]", "[Retrieval]", "[No Relevant]", "[Relevant]", "<paragraph>", "</paragraph>")
STEPS = {"max_steps": 2, "batch_size": 2, "workers": 0, "shard": False, "log_steps": 1, "max_length": 2048}
WORLDS = {
    "pictures": ("scene", {"size": 48}),
    "scenes": ("scene", {"size": 32, "pairs": True, "videos": True}),
    "thorax": ("thorax", {"size": 32, "volumes": True}),
    "operations": ("procedure", {"size": 24}),
}
WORLD_OF = {
    "llava-onevision": "scenes",
    "llava-next-interleave": "scenes",
    "llava-mini": "scenes",
    "medm-vl": "thorax",
    "surgical-llava": "operations",
    "llava-critic": "scenes",
    "video-llava": "scenes",
}
"""The world that a system's recipe learns from; of the others `pictures`."""


def small_world(folder: Path, name: str) -> Path:
    """One of `WORLDS` with its tokenizer, in a folder of that name."""
    world, options = WORLDS[name]
    write_world(world, folder / name, n=12, seed=0, **options)
    texts = json.loads((folder / name / "texts.json").read_text())
    tiny_tokenizer(texts, specials=(*MARKS, *REFLECTIVE)).save_pretrained(folder / name / "tokenizer")
    return folder / name


def with_tools(folder: Path) -> list[str]:
    """Questions whose answers call the detector and go by what it finds."""
    prepare("llava_plus_scenes", folder, folder / "called.json", read=False)
    prepare("llava_plus", folder / "called.json", folder / "tools.json")
    return ["tools.json"] * 2


def text_alone(folder: Path) -> None:
    """Questions without their pictures, and preferences for the right answer."""
    turns, pairs = [], []
    for line in (folder / "heldout_questions.jsonl").read_text().splitlines():
        question = json.loads(line)
        asked = {"role": "user", "content": question["text"]}
        turns.append({"messages": [asked, {"role": "assistant", "content": question["answer"]}]})
        pairs.append({"prompt": [asked], "chosen": question["answer"], "rejected": "nothing"})
    for name, rows in (("text", turns), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def small_recipe(slug: str, folder: Path, separators: bool = True) -> dict[str, Any]:
    """A system's recipe with tiny parts and two steps a stage, on the world in `folder`.

    Args:
        slug: The system.
        folder: What `small_world` made.
        separators: Give ids of the small vocabulary to tokens that a recipe names by the ids of a published one.
    """
    recipe = scale(load_recipe(get_system(slug).recipe), vocab=1300, patch_size=4, image_size=16, stages=STEPS)
    raw = recipe.model_dump()
    names = ["captions.json"] + ["train.json"] * len(recipe.data)
    if slug == "llava-o1":
        names = [in_stages(folder)]
    if slug == "llava-plus":
        names = with_tools(folder)
    if slug == "med42-v2":
        names = ["text.jsonl" if "preference" not in source.name else "pairs.jsonl" for source in recipe.data]
        text_alone(folder)
        raw["stages"][0]["max_length"] = 64  # of a chunk
    raw["data"] = [
        {"name": source.name, "path": str(folder / name), "images": str(folder)}
        for source, name in zip(recipe.data, names, strict=False)
    ]
    raw["parts"]["tokenizer"] = str(folder / "tokenizer")
    if slug == "llava-uhd" and separators:
        for media in (raw["parts"]["media"], *(stage["media"] for stage in raw["stages"] if stage["media"])):
            media["image"]["arrange"] |= {"column_separator": 5, "row_separator": 6}
    if slug in ("surgical-llava", "llava-med") and separators:  # the tokens around a media item
        for media in raw["parts"]["media"].values():
            media["arrange"] |= {"before": [5], "after": [6]}
    return raw
