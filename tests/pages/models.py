"""Stand-ins for models: small, at random, under the names by which pages call published ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from things import ROOT, thing

if TYPE_CHECKING:
    from llavakit import LlavakitConfig

SYSTEM_OF = {
    "path/to/dynamic-llava-7b": "dynamic-llava",
    "WeihuangLin/INF-LLaVA-sft": "inf-llava",
    "runs/kg-llava": "kg-llava",
    "lmms-lab/llava-critic-7b": "llava-critic",
    "runs/critic": "llava-critic",
    "microsoft/llava-med-v1.5-mistral-7b": "llava-med",
    "path/to/llava-mini-llama-3.1-8b": "llava-mini",
    "lmms-lab/llava-next-interleave-qwen-7b": "llava-next-interleave",
    "Xkev/Llama-3.2V-11B-cot": "llava-o1",
    "lmms-lab/llava-onevision-qwen2-0.5b-ov": "llava-onevision",
    "lmms-lab/llava-onevision-qwen2-7b-ov": "llava-onevision",
    "LLaVA-VL/llava_plus_v0_7b": "llava-plus",
    "m42-health/Llama3-Med42-8B": "med42-v2",
    "path/to/MedM-VL-CT-Chest-3B-en": "medm-vl",
    "aimagelab/ReflectiVA": "reflectiva",
    "path/to/Video-LLaVA-7B": "video-llava",
    "src/llavakit/systems/llava_med/README.md#runs/llava-med-7b/final": "llava-med",
    "src/llavakit/systems/surgical_llava/README.md#runs/surgical-llava-7b/final": "surgical-llava",
    "src/llavakit/systems/mg_llava/README.md#mg": "mg-llava",
    "src/llavakit/systems/reflectiva/README.md#tiny": "reflectiva",
    "runs/checker-0/final": "report-error-checking",
    "runs/checker-1/final": "report-error-checking",
    "runs/checker-2/final": "report-error-checking",
}
"""A model of a system's small recipe, by the name of a published one or of a run that a page leaves out."""


def save_model(folder: Path, config: LlavakitConfig, tokenizer: object) -> None:
    """A model at random, with all that a folder of llavakit's has."""
    import torch

    from llavakit.model.modeling import LlavakitForConditionalGeneration
    from llavakit.model.processing import LlavakitProcessor

    torch.manual_seed(0)
    model = LlavakitForConditionalGeneration(config)
    speak_briefly(model, tokenizer)
    model.save_pretrained(folder)
    LlavakitProcessor.from_config(config, tokenizer).save_pretrained(folder)


def speak_briefly(model: Any, tokenizer: Any) -> None:
    """Let a model at random end its replies after a few tokens: the end's logit spreads wider than all others'."""
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 8


def demo_model(path: Path, texts: list[str], **fields: object) -> None:
    """The demo's model before training."""
    from llavakit.demo.run import SIDE, text_config, vision_config
    from llavakit.model.configuration import LlavakitConfig
    from llavakit.phantom.tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer(texts, vocab_size=1200)
    media = {"image": {"views": {"type": "square", "size": SIDE}}}
    config = LlavakitConfig(
        text_config=text_config(len(tokenizer)),
        vision_config=vision_config(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **{"media": media} | fields,
    )
    save_model(path, config, tokenizer)


@thing("runs/demo")
def demo(path: Path) -> None:
    """What `make demo` leaves: its pictures and questions, few of them, and its model before training."""
    from llavakit.demo.run import SIDE, WORLDS
    from llavakit.phantom.write import write_world

    texts = []
    for name, (world, seed, options) in WORLDS.items():
        write_world(world, path / "data" / name, n=30, seed=seed, size=SIDE, difficulty="easy", **options)
        texts += json.loads((path / "data" / name / "texts.json").read_text())
    demo_model(path / "final", texts)


@thing("MODEL", "runs/a", "runs/b", "runs/c", "runs/a/final", "runs/b/final", "llava-hf/llava-1.5-7b-hf")
def any_model(path: Path) -> None:
    demo_model(path, ["What is in this picture? A red square and a blue disc. Is the left one a ring?"])


@thing("docs/checkpoints.md#one-layer")
def one_layer(path: Path) -> None:
    demo_model(path, ["What is in this picture?"], connector={"type": "mlp", "depth": 1})


@thing("liuhaotian/llava-v1.5-7b")
def llava_1_5(path: Path) -> None:
    from tiny_checkpoints import write_classic

    model, encoder = write_classic(path.parent, mm_vision_tower=f"{path.parent.name}/{path.name}/encoder")
    model.rename(path)
    encoder.rename(path / "encoder")  # the folder that the authors' configuration names


def world_of(slug: str, made: Path) -> Path:
    """The world that a system's small recipe learns from; made once."""
    from tiny_recipes import WORLD_OF, small_world

    name = WORLD_OF.get(slug, "pictures")
    folder = made / "worlds" / slug
    return folder / name if (folder / name / "tokenizer").exists() else small_world(folder, name)


def top(path: Path, name: str) -> Path:
    """The folder in which a thing of this name was asked for."""
    return path.parents[len(Path(name).parts) - 1]


def model_of(slug: str, made: Path, **text_config: object) -> tuple[Any, Any]:
    """Model and processor of a system's small recipe; `text_config` changes the size of its language model."""
    from tiny_recipes import small_recipe

    from llavakit.training.build import build_model
    from llavakit.training.recipe import parse_recipe

    raw = small_recipe(slug, world_of(slug, made), separators=not text_config)
    raw["parts"]["text_config"] |= text_config
    model, processor = build_model(parse_recipe(raw))
    speak_briefly(model, processor.tokenizer)
    return model, processor


def small_model(name: str, slug: str) -> None:
    def system_model(path: Path) -> None:
        for part in model_of(slug, top(path, name).parent):
            part.save_pretrained(path)

    system_model.__name__ = slug
    thing(name)(system_model)


@thing("path/to/llava-uhd-144-13b")
def released_uhd(path: Path) -> None:
    """LLaVA-UHD in the layout of its authors, which has the separators of Llama's vocabulary."""
    from llavakit.checkpoints.convert import convert

    own = path.parent / "own"
    for part in model_of("llava-uhd", path.parents[3], vocab_size=32_000):
        part.save_pretrained(own)
    convert(own, path, to="original")


@thing("src/llavakit/systems/llava_uhd/README.md#openai/clip-vit-large-patch14-336")
def encoder_of_uhd(path: Path) -> None:
    model_of("llava-uhd", path.parents[2])[0].model.vision_tower.save_pretrained(path)


def one_stage(slug: str, made: Path) -> dict[str, Any]:
    """The last stage of a system's small recipe, a step of it."""
    from tiny_recipes import small_recipe

    raw = small_recipe(slug, world_of(slug, made))
    return raw | {"stages": [raw["stages"][-1] | {"max_steps": 1}]}


def small_system_recipe(slug: str, folder: str) -> None:
    name = f"src/llavakit/systems/{folder}/recipe.yaml"

    def system_recipe(path: Path) -> None:
        import yaml

        path.write_text(yaml.safe_dump(one_stage(slug, top(path, name).parent), sort_keys=False))

    thing(name)(system_recipe)


@thing("src/llavakit/systems/reflectiva/in_article.yaml")
def in_article(path: Path) -> None:
    import yaml

    raw = one_stage("reflectiva", path.parents[4]) | {"output": "runs/reflectiva-in-article"}
    path.write_text(yaml.safe_dump(raw, sort_keys=False))


@thing("src/llavakit/systems/robust_clip/recipe.yaml")
def encoder_recipe(path: Path) -> None:
    """An encoder alone, on pictures alone."""
    import yaml
    from tiny_recipes import STEPS

    from llavakit.system import get_system
    from llavakit.training.recipe import load_recipe
    from llavakit.training.scaling import scale

    world = world_of("robust-clip", path.parents[4])
    images = [{"image": record["image"]} for record in json.loads((world / "captions.json").read_text())]
    (world / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in images))
    alone = {key: value for key, value in STEPS.items() if key != "max_length"} | {"warmup": 1, "save_steps": None}
    recipe = load_recipe(get_system("robust-clip").recipe)
    raw = scale(recipe, patch_size=4, image_size=16, stages=alone).model_dump()
    raw["data"] = [{"path": str(world / "seen.jsonl"), "images": str(world)}]
    path.write_text(yaml.safe_dump(raw, sort_keys=False))


for _name, _slug in SYSTEM_OF.items():
    small_model(_name, _slug)
for _folder in sorted((ROOT / "src/llavakit/systems").glob("*/recipe.yaml")):
    _slug = _folder.parent.name.replace("llava_1_5", "llava_1.5").replace("_", "-")
    if _slug != "robust-clip":
        small_system_recipe(_slug, _folder.parent.name)


@thing("docs/recipes.md#recipe.yaml")
def a_recipe(path: Path) -> None:
    """LLaVA-1.5's, small."""
    import yaml

    raw = one_stage("llava-1.5", path.parent.parent) | {"output": "runs/first"}
    path.write_text(yaml.safe_dump(raw, sort_keys=False))


@thing("src/llavakit/systems/report_error_checking/README.md#recipe.yaml")
def checker_recipe(path: Path) -> None:
    import yaml

    raw = one_stage("report-error-checking", path.parent.parent)
    path.write_text(yaml.safe_dump(raw, sort_keys=False))


@thing("src/llavakit/systems/llava_o1/README.md#run/final")
def staged(path: Path) -> None:
    """A model that was trained a little to answer in stages."""
    from tiny_staged import staged_model

    shutil.copytree(staged_model(path.parent / "training", steps=20)[0], path)
