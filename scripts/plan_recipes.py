"""What `llavakit train RECIPE --plan` says of the recipes in recipes/ at published scale, where no weights are at hand.

    python scripts/plan_recipes.py [NAME ...]

A folder with the configuration of the model that a recipe starts from takes the place of its weights, since a plan
reads none. The records fill `max_length`, so that no batch of other records takes more; the pictures are phantom
scenes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from llavakit.model.processing import LlavakitProcessor
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.phantom.write import build_world
from llavakit.system import get_system
from llavakit.training.build import config_of
from llavakit.training.memory import in_gb
from llavakit.training.plan import plan_recipe
from llavakit.training.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("llava-1.5", {}),
    "lora-7b-24gb": ("llava-1.5", {}),
    "qlora-7b-12gb": ("llava-1.5", {}),
    "full-7b-8gpus": ("llava-1.5", {}),
    "radiology-reports": ("llava-rad", {}),
    "surgical-video": (
        "llava-onevision",  # the language model of 0.5B
        {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
}
"""Recipe -> the system whose published model it starts from, and what differs from the system's own recipe."""
RECORDS = 64
WORDS = "The picture shows a red square."
MARKS = ["<|im_start|>", "<|im_end|>"]


def write_model(folder: Path, slug: str, changes: dict[str, Any]) -> None:
    """Configuration, tokenizer and no weights."""
    raw = load_recipe(get_system(slug).recipe).model_dump()
    raw["parts"]["text_config"] |= changes
    config = config_of(Recipe.model_validate(raw), read_sources=False)
    config.save_pretrained(folder)
    LlavakitProcessor.from_config(config, tiny_tokenizer([WORDS], vocab_size=400, specials=MARKS)).save_pretrained(
        folder
    )
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")


def write_records(folder: Path, words: int, clips: bool) -> None:
    """Records about a picture or a clip, with answers of so many words."""
    scene = build_world("scene", size=336).sample(seed=0, index=0).items[0].media[0]
    picture = Image.fromarray(scene).convert("RGB")
    picture.save(folder / "scene.png")
    with av.open(str(folder / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=1)
        stream.width, stream.height = picture.size
        for packet in [p for _ in range(32) for p in stream.encode(av.VideoFrame.from_ndarray(np.array(picture)))]:
            file.mux(packet)
        file.mux(stream.encode())
    media = {"video": "clip.mp4"} if clips else {"image": "scene.png"}
    turns = [
        {"from": "human", "value": f"<{next(iter(media))}>\nWhat is it?"},
        {"from": "gpt", "value": "red " * words},
    ]
    records = [{"id": str(number), **media, "conversations": turns} for number in range(RECORDS)]
    (folder / "records.json").write_text(json.dumps(records))


def planned(name: str, folder: Path) -> Iterator[str]:
    """What the stages of a recipe take on a card, a line each."""
    raw = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    write_records(folder, max(stage["max_length"] for stage in raw["stages"]), clips="video" in name)
    overrides = []
    for number in range(len(raw["data"])):
        overrides += [f"data.{number}.path={folder / 'records.json'}", f"data.{number}.images={folder}"]
    if "heldout" in raw:
        overrides += ["heldout=null"]
    if name in STARTS:
        write_model(folder / "model", *STARTS[name])
        overrides += [f"model={folder / 'model'}"]
    else:
        tiny_tokenizer([WORDS], vocab_size=400, specials=MARKS).save_pretrained(folder / "tokenizer")
        overrides += [f"parts.tokenizer={folder / 'tokenizer'}", "parts.init={}"]
    for found in plan_recipe(load_recipe(RECIPES / f"{name}.yaml", overrides)):
        terms = {term: size for term, size in found.memory.terms.items() if term not in ("samples", "process")}
        said = ", ".join(f"{term} {in_gb(size)}" for term, size in terms.items())  # those two are never on a card
        yield f"{name}, {found.stage}: {in_gb(sum(terms.values()))} ({said})"


if __name__ == "__main__":
    for chosen in sys.argv[1:] or [*STARTS, "nano"]:
        with tempfile.TemporaryDirectory() as scratch:
            print(*planned(chosen, Path(scratch)), sep="\n", flush=True)
