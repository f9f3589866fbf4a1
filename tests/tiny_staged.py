"""A tiny model that answers in stages: LLaVA-o1's recipe made small, trained on captions of phantom pictures."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.phantom.write import write_world
from llavakit.system import get_system
from llavakit.training.recipe import load_recipe, parse_recipe
from llavakit.training.run import train
from llavakit.training.scaling import scale

TAGS = [f"{slash}{name}>" for name in ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION") for slash in ("<", "</")]
MARKS = ("<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
STEPS = {"batch_size": 8, "workers": 0, "shard": False, "learning_rate": 3e-3}


def in_stages(folder: Path, looks: str = "look") -> str:
    """Captions as conclusions of replies in stages; the name of the file."""
    records = json.loads((folder / "captions.json").read_text())
    for record in records:
        answer = record["conversations"][1]
        stages = "".join(f"{TAGS[n]} {looks} {TAGS[n + 1]}\n\n" for n in (0, 2, 4))
        answer["value"] = f"{stages}{TAGS[6]} {answer['value']} {TAGS[7]}"
    (folder / "staged.json").write_text(json.dumps(records))
    return "staged.json"


def staged_model(folder: Path, steps: int = 110) -> tuple[Path, Path]:
    """A checkpoint that writes stages, and a picture."""
    world = folder / "world"
    write_world("scene", world, n=40, seed=0, size=48)
    in_stages(world)
    texts = [*json.loads((world / "texts.json").read_text()), *([" look ".join(TAGS)] * 20)]
    tiny_tokenizer(texts, specials=MARKS).save_pretrained(world / "tokenizer")
    options = STEPS | {"max_steps": steps}
    recipe = scale(load_recipe(get_system("llava-o1").recipe), vocab=1300, patch_size=4, image_size=16, stages=options)
    raw = recipe.model_dump() | {"output": str(folder / "run")}
    raw["data"] = [{"name": "staged", "path": str(world / "staged.json"), "images": str(world)}]
    raw["parts"]["tokenizer"] = str(world / "tokenizer")
    result = train(parse_recipe(raw), console=Console(quiet=True))
    return Path(result.final), world / json.loads((world / "captions.json").read_text())[0]["image"]
