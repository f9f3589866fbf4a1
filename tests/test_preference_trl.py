"""The objective `dpo` against TRL's DPOTrainer: the same picture preferences, the same weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_training
import torch
from PIL import Image

from llavakit.checkpoints.convert import convert, save
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.training.build import build_model
from llavakit.training.objectives.base import Step
from llavakit.training.objectives.dpo import DPO, pair_of
from llavakit.training.recipe import parse_recipe

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

BETA = 0.3


def moved(model, scale: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A policy and a reference as transformers' LLaVA, and the picture preferences."""
    folder = tiny_training.write_world(tmp_path_factory.mktemp("trl"))
    model, processor = build_model(parse_recipe(tiny_training.recipe(folder)))
    for name, seed in (("policy", 0), ("reference", 1)):
        moved(model, 0.05, seed)
        save(model.state_dict(), model.config, processor, folder / "own" / name)
        convert(str(folder / "own" / name), folder / name, to="hf")
    return folder


def trainer(world: Path, out: Path, reference: str, loss: str):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    rows = []
    for record in json.loads((world / "records.json").read_text()):
        if "image" in record:
            question = record["conversations"][0]["value"].removeprefix("<image>\n")
            rows.append(
                {
                    "prompt": f"USER : <image> {question} ASSISTANT : ",
                    "chosen": record["conversations"][1]["value"] + "</s>",
                    "rejected": "it is left</s>",
                    "images": [Image.open(world / "images" / record["image"]).convert("RGB")],
                }
            )
    policy, frozen = (
        AutoModelForImageTextToText.from_pretrained(world / name, dtype=torch.float32) for name in ("policy", reference)
    )
    args = trl.DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        beta=BETA,
        loss_type=[loss],
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        save_strategy="no",
    )
    return trl.DPOTrainer(
        model=policy,
        ref_model=frozen,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows[:6]),
        processing_class=AutoProcessor.from_pretrained(world / "policy"),
    )


def samples_of(batch) -> list[dict]:
    """Pairs of TRL's batch: chosen rows first, padded on the right."""
    rows = []
    for ids, mask, counted, pixels in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], batch["pixel_values"], strict=True
    ):
        kept = mask.bool()
        labels = ids.masked_fill(counted == 0, -100)[kept]
        media = {"visual_sizes": [(1, *pixels.shape[-2:])], "visual_modalities": [0]}
        rows.append({"input_ids": ids[kept], "labels": labels, "pixel_values": [pixels], **media})
    count = len(rows) // 2
    pairs = zip(rows[:count], rows[count:], strict=True)
    return [pair_of(*both) | {"key": number} for number, both in enumerate(pairs)]


@pytest.mark.parametrize(
    ("loss", "reference"),
    [("sigmoid", "policy"), ("sigmoid", "reference"), ("hinge", "reference"), ("ipo", "reference")],
)
def test_loss_and_gradients_are_those_of_trl(world, tmp_path, loss, reference):
    theirs = trainer(world, tmp_path, reference, loss)
    batch = next(iter(theirs.get_train_dataloader()))
    wanted = theirs.compute_loss(theirs.model, batch)
    wanted.backward()

    stage = {
        "name": "learn",
        "train": ["language_model"],
        "learning_rate": 0,
        "objective": {"type": "dpo", "loss": loss},
    }
    stage["objective"]["beta"] = BETA
    raw = tiny_training.recipe(world, stages=[stage])
    objective = DPO(parse_recipe(raw).stages[0])
    checkpoints = {name: open_checkpoint(world / name) for name in ("policy", reference)}
    models = {name: build(checkpoint).eval() for name, checkpoint in checkpoints.items()}
    _, processor = build_model(parse_recipe(raw))
    objective.bind(models["policy"].config, processor)
    samples = samples_of(batch)
    objective.use(models[reference])
    with torch.no_grad():
        known = objective.logps(models[reference], objective._collator()(samples))[0].chunk(2)
    objective.reference = dict(enumerate(zip(*(half.tolist() for half in known), strict=True)))
    objective.use(models["policy"])
    found = objective.loss(models["policy"], objective._collator()(samples), Step(torch.tensor(len(samples)), 1))
    found.value.backward()

    torch.testing.assert_close(found.value, wanted.float(), atol=1e-5, rtol=1e-5)
    if reference == "policy":
        assert found.value.item() == pytest.approx(math.log(2), abs=1e-5)
    gradients = dict(models["policy"].named_parameters())
    compared = 0
    for name, parameter in theirs.model.named_parameters():
        if parameter.grad is not None and name in gradients:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-5, rtol=1e-5, msg=name)
            compared += 1
    assert compared > 40
