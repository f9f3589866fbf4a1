"""What `train --plan` says, against what then happens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_training
import torch
import yaml
from typer.testing import CliRunner

from llavakit.cli.app import app
from llavakit.errors import RecipeError
from llavakit.training import callbacks, check, memory, plan
from llavakit.training.build import build_model
from llavakit.training.lora import prepare
from llavakit.training.plan import measure, plan_recipe
from llavakit.training.recipe import parse_recipe
from llavakit.training.run import train

# Large enough that the step outweighs what else a process does, and still a matter of seconds.
REAL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 4000}
# A text's states fill blocks above 4 MiB: smaller ones go back to the system later (`give_back_at_once`).
WIDE = REAL | {"hidden_size": 1152, "intermediate_size": 2048, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_training.write_world(tmp_path_factory.mktemp("world"))


def raw(world, folder, text_config=REAL, **stage):
    found = tiny_training.recipe(world, output=str(folder))
    found["parts"]["text_config"] |= text_config
    found["stages"] = [found["stages"][1] | {"batch_size": 24, "max_steps": 2} | stage]
    return found


GROWTH = """
import json, re, sys
from pathlib import Path
import psutil
from rich.console import Console
from llavakit.training.plan import plan_recipe
from llavakit.training.recipe import load_recipe, parse_recipe
from llavakit.training.run import train
recipe = load_recipe(sys.argv[1])
planned = plan_recipe(recipe)[0].memory
few = parse_recipe(recipe.model_dump(mode="json"), ["parts.text_config.hidden_size=16", f"output={sys.argv[2]}"])
train(few, console=Console(quiet=True))  # what is imported and started with a first step does not grow with the model
before = psutil.Process().memory_info().rss
train(recipe, console=Console(quiet=True))
status = Path("/proc/self/status").read_text()  # ru_maxrss would count the process that started this one too
peak = int(re.search("VmHWM:[^0-9]*([0-9]+)", status)[1]) * 1024
print(json.dumps({"planned": planned.total - planned.process, "found": peak - before}))
"""


@pytest.mark.parametrize(
    "stage",
    [{}, {"gradient_checkpointing": "light", "batch_size": 1, "packing": True, "max_length": 1000}],
    ids=["padded", "packed"],
)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what a process took at most")
def test_memory_is_as_planned(world, tmp_path, stage):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw(world, tmp_path / "run", WIDE, **stage)))
    command = [sys.executable, "-c", GROWTH, str(path), str(tmp_path / "few")]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert said["planned"] > 80e6
    assert said["planned"] == pytest.approx(said["found"], rel=0.15)


@pytest.mark.slow  # other programs on a machine move it by more than it allows
def test_time_is_as_measured(world, tmp_path, monkeypatch):
    for module in (plan, callbacks):  # processor time, since other programs run on the machine
        monkeypatch.setattr(module.time, "monotonic", plan.time.process_time)
    recipe = parse_recipe(raw(world, tmp_path, batch_size=4, max_steps=12, log_steps=100))
    expected = measure(recipe, 0, plan_recipe(recipe)[0])
    found = train(recipe).stages[0].metrics["seconds"]
    assert expected == pytest.approx(found, rel=0.15)


def test_sizes_are_those_of_the_run(world, tmp_path):
    recipe = parse_recipe(raw(world, tmp_path, batch_size=5, max_steps=None, epochs=2, train=["multi_modal_projector"]))
    (found,) = plan_recipe(recipe)
    metrics = train(recipe).stages[0].metrics
    assert (found.size.steps, found.size.tokens) == (metrics["steps"], metrics["tokens"])
    assert {part: own for part, (_, own) in found.parts.items() if own} == metrics["trainable"]
    assert found.memory.gradients + found.memory.optimiser < 4 * 4 * metrics["trainable"]["multi_modal_projector"]
    assert found.visual_tokens == 2 * 20 * 9  # 20 of 24 records have a picture of 3 x 3 tokens


def test_freezing_and_recomputing_take_less(world, tmp_path):
    def total(**stage):
        return plan_recipe(parse_recipe(raw(world, tmp_path, **stage)))[0].memory

    full, light = total(), total(gradient_checkpointing="light")
    connector = total(train=["multi_modal_projector"])
    assert light.activations < 0.8 * full.activations
    assert connector.activations < full.activations
    assert full.optimiser == pytest.approx(2 * full.weights, rel=0.02)  # all but the encoder trains
    assert connector.optimiser < 0.02 * full.optimiser


def test_weights_count_in_the_types_that_training_keeps_them_in(world, tmp_path, monkeypatch):
    def recipe(**lora):
        stage = {"dtype": "bfloat16", "train": ["multi_modal_projector"], "lora": {"rank": 4, **lora}}
        return parse_recipe(raw(world, tmp_path, **stage))

    found = plan_recipe(recipe())[0].memory
    module = build_model(recipe())[0].to(torch.bfloat16)
    adapted = prepare(module, recipe().stages[0])
    assert found.weights == sum(tensor.nbytes for tensor in {*adapted.parameters(), *adapted.buffers()})
    assert {p.dtype for name, p in adapted.named_parameters() if "lora_" in name} == {torch.float32}
    layers = [layer.base_layer.weight for layer in adapted.modules() if hasattr(layer, "base_layer")]
    count = sum(weight.numel() for weight in layers)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: name)  # bitsandbytes need not be here
    for kind, bits in (("nf4", 4.127), ("int8", 8)):
        quantised = plan_recipe(recipe(quantize=kind))[0].memory
        assert found.weights - quantised.weights == pytest.approx(count * (16 - bits) / 8, rel=1e-4)
        assert quantised.activations - found.activations == max(weight.nbytes for weight in layers)


def test_what_does_not_fit_is_refused_before_it_is_built(world, tmp_path, monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Free", (), {"available": 0}))
    huge = raw(world, tmp_path / "run")
    huge["parts"]["text_config"] |= {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 40}
    said = (
        r"stages\.0\.train: takes [\d.]+ GB of memory \(weights [\d.]+ GB, optimiser [\d.]+ GB, gradients [\d.]+ GB\)"
    )
    with pytest.raises(RecipeError, match=said):
        train(parse_recipe(huge))
    assert not (tmp_path / "run" / "tune").exists()


def test_the_command_prints_the_plan(world, tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw(world, tmp_path / "run")))
    shown = CliRunner().invoke(app, ["train", str(path), "--plan"])
    assert shown.exit_code == 0
    assert "24 records, 48 samples in 2 steps" in shown.output
    assert "fits" in shown.output
    monkeypatch.setattr(plan, "room_on", lambda device: 10**6)
    shown = CliRunner().invoke(app, ["train", str(path), "--plan", "--json"])
    assert shown.exit_code == 1
    (stage,) = json.loads(shown.stdout)["stages"]
    assert not stage["memory"]["fits"]
    assert stage["memory"]["total"] > 10**6
    assert not (tmp_path / "run").exists()
