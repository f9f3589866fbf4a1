"""What the pages name and a reader has: pictures, files of data, models, each made small under the name in the page.

`place(page, folder)` puts into a folder all that a page names. A thing that several pages name is made once and copied.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from blocks import PAGES, ROOT
from PIL import Image

if TYPE_CHECKING:
    from llavakit import LlavakitConfig

Maker = Callable[[Path], object]
THINGS: dict[str, Maker] = {}
"""Path as pages write it to what makes it; `PAGE#PATH` is for one page alone."""


def thing(*paths: str) -> Callable[[Maker], Maker]:
    """Register a maker; it gets the path that it shall make, whose parent is there."""

    def add(make: Maker) -> Maker:
        THINGS.update(dict.fromkeys(paths, make))
        return make

    return add


def needed(page: str) -> dict[str, Maker]:
    """Paths that a page names, with their makers."""
    found: dict[str, Maker] = {}
    for name, make in THINGS.items():
        where, _, path = name.rpartition("#")
        if where in ("", page) and re.search(rf"(?<![\w/.-]){re.escape(path)}(?![\w-])", PAGES[page]):
            found[path] = make
    return found


def place(page: str, folder: Path, made: Path) -> None:
    """Put what a page names into a folder; `made` keeps what was made for others."""
    for name in ("recipes", "examples", "scripts", "tests", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    for path, make in needed(page).items():
        copy, there = made / make.__name__ / path, folder / path
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            make(copy)
        if there.exists():
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if copy.is_dir() else shutil.copy)(copy, there)


def lines(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_model(folder: Path, config: LlavakitConfig, tokenizer: object) -> None:
    """A model at random, with all that a folder of llavakit's has."""
    import torch

    from llavakit.model.modeling import LlavakitForConditionalGeneration
    from llavakit.model.processing import LlavakitProcessor

    torch.manual_seed(0)
    LlavakitForConditionalGeneration(config).save_pretrained(folder)
    LlavakitProcessor.from_config(config, tokenizer).save_pretrained(folder)


@thing(
    "photo.jpg", "chart.png", "bridge.jpg", "street.jpg", "scene.png", "kite.jpg", "ct.png", "before.jpg", "after.jpg"
)
def picture(path: Path) -> None:
    from llavakit.phantom.write import build_world

    item = build_world("scene", size=96).sample(seed=0, index=len(path.name)).items[0]
    Image.fromarray(item.media).convert("RGB").save(path)


@thing("pictures", "photos", "val2014", "images")
def pictures(path: Path) -> None:
    path.mkdir()
    for number in range(6):
        Image.new("RGB", (48, 40), (40 * number, 200 - 30 * number, 90)).save(path / f"{number}.png")


@thing("mine.json", "my.json", "asked.json")
def own_records(path: Path) -> None:
    rows = []
    for number in range(6):
        turns = [("human", "<image>\nWhat colour is it?"), ("gpt", ("red", "green", "blue")[number % 3])]
        conversation = [{"from": who, "value": text} for who, text in turns]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": conversation})
    path.write_text(json.dumps(rows))


@thing(".venv/bin/activate")
def activate(path: Path) -> None:
    path.write_text("")


@thing("runs/demo")
def demo(path: Path) -> None:
    """What `make demo` leaves: its pictures and questions, few of them, and its model before training."""
    from llavakit.demo.run import SIDE, WORLDS, text_config, vision_config
    from llavakit.model.configuration import LlavakitConfig
    from llavakit.phantom.tokenizer import tiny_tokenizer
    from llavakit.phantom.write import write_world

    texts = []
    for name, (world, seed, options) in WORLDS.items():
        write_world(world, path / "data" / name, n=30, seed=seed, size=SIDE, difficulty="easy", **options)
        texts += json.loads((path / "data" / name / "texts.json").read_text())
    tokenizer = tiny_tokenizer(texts, vocab_size=1200)
    config = LlavakitConfig(
        text_config=text_config(len(tokenizer)),
        vision_config=vision_config(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        media={"image": {"views": {"type": "square", "size": SIDE}}},
    )
    save_model(path / "final", config, tokenizer)


@thing("liuhaotian/llava-v1.5-7b")
def llava_1_5(path: Path) -> None:
    from tiny_checkpoints import write_classic

    model, encoder = write_classic(path.parent, mm_vision_tower=f"{path.parent.name}/{path.name}/encoder")
    model.rename(path)
    encoder.rename(path / "encoder")  # the folder that the authors' configuration names


@thing("README.md#predictions.jsonl")
def answers(path: Path) -> None:
    lines(path, *({"question_id": number, "text": text} for number, text in ((1, "A"), (2, "The answer is B."))))


@thing("scienceqa_gold.jsonl")
def scienceqa_gold(path: Path) -> None:
    lines(path, *({"question_id": n, "answer": letter, "has_image": n == 1} for n, letter in ((1, "A"), (2, "C"))))


def reply_of(page: str) -> Callable[[dict], object]:
    """What the API of a teacher or judge answers on a page."""
    return lambda body: "8 7\nBoth are right, the first says more."


if __name__ == "__main__":  # in the warm process, which has imported what models need
    place(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
