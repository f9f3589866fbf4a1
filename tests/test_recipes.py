"""The recipes that people start with build at published scale on meta tensors, and train small on phantom data."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from plan_recipes import STARTS, planned
from rich.console import Console
from tiny_recipes import MARKS

from llavakit.checkpoints.convert import save
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.phantom.write import write_world
from llavakit.system import get_system
from llavakit.training.build import build_meta, build_model
from llavakit.training.features import cacheable
from llavakit.training.lora import prepare
from llavakit.training.parameter_groups import trainable_by_part
from llavakit.training.recipe import Recipe, load_recipe, parse_recipe
from llavakit.training.run import train
from llavakit.training.scaling import scale

FOLDER = Path(__file__).parents[1] / "recipes"
NAMES = [*STARTS, "nano"]
SMALL = {
    "max_steps": 2,
    "batch_size": 2,
    "accumulation": 1,
    "workers": 0,
    "log_steps": 1,
    "gradient_checkpointing": False,
}
SMALL |= {"bf16": False, "dtype": "float32", "shard": False, "global_batch": None}


def raw(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def with_parts(name: str) -> Recipe:
    """The recipe with the parts of the model that it starts from in place of its name."""
    recipe = raw(name)
    if name in STARTS:
        slug, changes = STARTS[name]
        parts = load_recipe(get_system(slug).recipe).model_dump()["parts"]
        parts["text_config"] |= changes
        recipe = {key: value for key, value in recipe.items() if key != "model"} | {"parts": parts}
    return parse_recipe(recipe)


def test_every_recipe_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*NAMES, "preference"}


@pytest.mark.parametrize("name", NAMES)
def test_builds_at_published_scale_without_memory(name):
    recipe = with_parts(name)
    net = build_meta(recipe)
    size = sum(parameter.numel() for parameter in net.model.language_model.parameters())
    assert {"nano": 0.13e9, "surgical-video": 0.49e9}.get(name, 6.6e9) < size < 7e9
    stage = recipe.stages[-1]
    lora = stage.lora and stage.lora.model_copy(update={"quantize": None})  # quantising needs weights
    with torch.device("meta"):
        trained = prepare(net, stage.model_copy(update={"lora": lora}))
    assert trainable_by_part(trained)
    assert not stage.cache_features or cacheable(trained)
    assert all(one.save_steps for one in recipe.stages), "an interrupted run would begin again"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_takes_the_memory_that_its_comment_says(name, tmp_path):
    if name == "qlora-7b-12gb":
        pytest.importorskip("bitsandbytes")
    comment = re.match(r"(?:#.*\n)+", (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))[0].replace("\n# ", " ")
    said = re.findall(r"([\d.]+ GB) \(weights", comment)
    assert said == [re.search(r": ([\d.]+ GB) \(", line)[1] for line in planned(name, tmp_path)]
    assert f"scripts/plan_recipes.py {name}" in comment


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    write_world("thorax", folder / "thorax", n=12, seed=0, size=24, difficulty="easy")
    write_world("procedure", folder / "procedure", n=3, seed=0, size=24, frames=4)
    for name in ("thorax", "procedure"):
        texts = json.loads((folder / name / "texts.json").read_text())
        tiny_tokenizer(texts, specials=MARKS).save_pretrained(folder / name / "tokenizer")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_trains_small_on_phantom_data(name, worlds, tmp_path):
    world = worlds / ("procedure" if name == "surgical-video" else "thorax")
    small = scale(with_parts(name), vocab=1300, patch_size=4, image_size=16).model_dump()
    small["parts"]["tokenizer"] = str(world / "tokenizer")
    small = parse_recipe(small)
    files = ["captions.json", "train.json"] if name == "nano" else ["train.json"]
    overrides = [f"output={tmp_path / 'run'}"]
    for number, file in enumerate(files):
        overrides += [f"data.{number}.path={world / file}", f"data.{number}.images={world}"]
    for stage in small.stages:
        overrides += [f"stages.{stage.name}.{key}={json.dumps(value)}" for key, value in SMALL.items()]
        if stage.lora is not None and stage.lora.quantize:
            overrides.append(f"stages.{stage.name}.lora.quantize=null")  # needs a package and a GPU
    if name == "radiology-reports":
        questions = world / "heldout_questions.jsonl"
        overrides += [f"heldout.questions={questions}", f"heldout.images={world}", "heldout.limit=2"]
        overrides.append("heldout.task=exact_match")  # a random model would write 512 tokens of report
    if name == "nano":
        recipe = small.model_dump()
        path = tmp_path / "nano.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe, default=str))))
    else:
        net, processor = build_model(small)
        save(net.state_dict(), net.config, processor, tmp_path / "model")
        path = FOLDER / f"{name}.yaml"
        overrides.append(f"model={tmp_path / 'model'}")
    console = Console(file=io.StringIO(), width=200)
    result = train(load_recipe(path, overrides), console=console)
    assert [len(stage.metrics["log"]) for stage in result.stages] == [2] * len(files)
    adapter = name == "qlora-7b-12gb"
    assert (result.final / ("adapter_config.json" if adapter else "model.safetensors")).is_file()
    assert (result.output / "report.html").is_file() == (name == "radiology-reports"), console.file.getvalue()
