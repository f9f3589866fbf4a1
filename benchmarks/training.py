"""Training throughput: llavakit beside transformers' Trainer and TRL's SFTTrainer with transformers' own LLaVA class.

    python benchmarks/training.py [--records 288] [--epochs 3] [--threads 1] [--hidden 192] [--layers 4]

Both train connector and language model of the same tiny LLaVA-1.5 (same weights, frozen encoder, float32, same
optimiser, same records of the phantom world, same number of records per step on average) and are charged for
everything from prepared samples to the last step; llavakit also for filling its feature cache, images decoded anew.
The baseline pads every batch to its longest sample, as a collator for LLaVA does. Tokens that count are those that
are not padding. Seconds are processor time of all threads, so that other programs on the machine matter little. Before
timing, both models must give the same loss on the same batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--records", type=int, default=288)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--hidden", type=int, default=192)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--batch-size", type=int, default=16)
options = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(options.threads)

import torch  # noqa: E402
from mixed_records import mixed_records  # noqa: E402
from rich.console import Console  # noqa: E402
from transformers import (  # noqa: E402
    AutoProcessor,
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging  # noqa: E402

from llavakit.checkpoints.convert import convert, save  # noqa: E402
from llavakit.data.collate import Collator  # noqa: E402
from llavakit.data.mixture import Mixture  # noqa: E402
from llavakit.phantom.tokenizer import tiny_tokenizer  # noqa: E402
from llavakit.training.build import build_model, load_checkpoint  # noqa: E402
from llavakit.training.dataset import PreparedSamples, Samples, plan_batches  # noqa: E402
from llavakit.training.lora import prepare  # noqa: E402
from llavakit.training.objectives import Run  # noqa: E402
from llavakit.training.objectives.supervised import Supervised  # noqa: E402
from llavakit.training.recipe import Recipe, parse_recipe  # noqa: E402
from llavakit.training.run import training_arguments  # noqa: E402
from llavakit.training.trainer import StageTrainer  # noqa: E402

logging.set_verbosity_error()
torch.set_num_threads(options.threads)
IMAGE = 48


def recipe_of(work: Path, vocabulary: int) -> Recipe:
    """The tiny LLaVA-1.5 and its second stage."""
    h = options.hidden
    text = {"model_type": "llama", "hidden_size": h, "intermediate_size": 3 * h, "num_hidden_layers": options.layers}
    text |= {"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": vocabulary}
    vision = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    vision |= {"num_attention_heads": 4, "image_size": IMAGE, "patch_size": 8, "projection_dim": 64}
    stage = {"name": "tune", "train": ["multi_modal_projector", "language_model", "lm_head"], "learning_rate": 1e-3}
    stage |= {"epochs": options.epochs, "batch_size": options.batch_size, "clip": 1.0, "log_steps": 1000}
    return parse_recipe(
        {
            "system": "llava-1.5",
            "parts": {
                "text_config": text,
                "vision_config": vision,
                "media": {"image": {"views": {"type": "pad", "size": IMAGE}}},
                "tokenizer": str(work / "tokenizer"),
            },
            "stages": [stage],
            "output": str(work / "run"),
        }
    )


def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The baseline's collator: pad to the longest sample, pictures in order."""
    batch = Collator(0)([{**sample, "visual_sizes": [], "visual_modalities": []} for sample in samples])
    return {name: batch[name] for name in ("input_ids", "labels", "attention_mask", "pixel_values") if name in batch}


def baseline(model: Any, samples: list[dict[str, Any]], work: Path, *, trl: bool = False) -> float:
    """Processor seconds of transformers' Trainer, or of TRL's SFTTrainer on the same prepared samples."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    settings = {
        "output_dir": str(work / "baseline"),
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "max_grad_norm": 1.0,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    if trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        prepared = {"max_length": None, "bf16": False, "gradient_checkpointing": False}
        prepared["dataset_kwargs"] = {"skip_prepare_dataset": True}
        processor = AutoProcessor.from_pretrained(work / "hf")
        numbers = Dataset.from_dict({"number": list(range(len(samples)))})  # it takes no list of samples

        def collate(rows: list[dict[str, int]]) -> dict[str, Any]:
            return pad([samples[row["number"]] for row in rows])

        given = {"train_dataset": numbers, "data_collator": collate, "processing_class": processor}
        trainer = SFTTrainer(model, SFTConfig(**settings, **prepared), **given)
    else:
        trainer = Trainer(model, TrainingArguments(**settings), train_dataset=samples, data_collator=pad)
    trainer.remove_callback(PrinterCallback)
    began = time.process_time()
    trainer.train()
    return time.process_time() - began


def ours(
    work: Path, records: Mixture, recipe: Recipe, *, packing: bool, cached: bool, own_attention: bool = True
) -> tuple[float, int, int]:
    """Processor seconds, steps and tokens of llavakit's trainer.

    Args:
        own_attention: Attend sample by sample (`llavakit.language.packed`) rather than with a mask over packed rows.
    """
    model, processor = load_checkpoint(work / "model")
    model.train()
    stage = recipe.stages[0]
    pixels = Samples(records, processor)
    mean = sum(abs(pixels.length(number)) for number in range(len(pixels))) / len(pixels)
    if packing:
        budget = round(options.batch_size * mean)  # one row with as many tokens as the baseline's batch has on average
        stage = stage.model_copy(update={"packing": True, "max_length": budget, "batch_size": 1})
    if cached:
        stage = stage.model_copy(update={"cache_features": True})
    net = prepare(model, stage)
    objective = Supervised(stage)
    objective.bind(model.config, processor)
    samples = PreparedSamples(records, objective)
    about = Run(
        recipe=recipe,
        stage=stage,
        seed=0,
        folder=work / "run",
        cache=work / "cache",
        module=model,
        wrapped=net,
        processor=processor,
        samples=samples,
        start=lambda: load_checkpoint(work / "model"),
        console=Console(quiet=True),
        world=1,
    )
    began = time.process_time()
    objective.begin(about)  # fills the cache
    filled = time.process_time() - began
    if not own_attention:
        model.model.language_model.set_attn_implementation("sdpa")
        objective.flat = False
    for number in range(len(samples)):
        samples.length(number)  # tokenised, untimed for all
    began = time.process_time() - filled
    trainer = StageTrainer(
        net,
        training_arguments(recipe, stage, work / "run", 0),
        stage=stage,
        objective=objective,
        samples=samples,
        batches=plan_batches(samples, stage, seed=0),
        collator=objective.collator(about),
        processor=processor,
    )
    gc.freeze()  # as `llavakit train` does: what lives already need not be searched by accelerate
    try:
        trainer.train()
    finally:
        gc.unfreeze()
    return time.process_time() - began, len(trainer.batches), trainer.count_tokens()


def main() -> None:
    """Prepare, check equality, time, print."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        raw = mixed_records(work / "world", options.records)
        tokenizer = tiny_tokenizer(json.loads((work / "world" / "texts.json").read_text()))
        tokenizer.save_pretrained(work / "tokenizer")
        recipe = recipe_of(work, len(tokenizer))
        model, processor = build_model(recipe)
        save(model.state_dict(), model.config, processor, work / "model")
        convert(work / "model", work / "hf", to="hf")
        reference = LlavaForConditionalGeneration.from_pretrained(work / "hf").train()
        (work / "records.json").write_text(json.dumps(raw))
        records = Mixture({"path": str(work / "records.json"), "media_root": str(work / "world")})
        prepared = Samples(records, processor)
        samples = [prepared[number] for number in range(len(prepared))]

        batch = Collator(0)(samples[:8])
        theirs = reference(**pad(samples[:8])).loss
        own = model(**batch, skip_logits=True).loss
        if abs(theirs - own) > 1e-4:
            sys.exit(f"the models differ: loss {theirs:.6f} and {own:.6f}")
        lengths = [len(sample["input_ids"]) for sample in samples]
        tokens = sum(lengths) * options.epochs
        media = sum(bool(sample["visual_modalities"]) for sample in samples)
        print(
            f"{len(samples)} records ({media} with a picture), {min(lengths)} to {max(lengths)} tokens, mean "
            f"{sum(lengths) / len(lengths):.0f}; {sum(p.numel() for p in model.parameters()):,} parameters; "
            f"loss of both on one batch {own:.4f}; {options.threads} threads"
        )
        steps = -(-len(samples) // options.batch_size) * options.epochs
        rows = [("transformers Trainer, padded", baseline(reference, samples, work), steps)]
        again = LlavaForConditionalGeneration.from_pretrained(work / "hf").train()
        rows.append(("TRL SFTTrainer, padded", baseline(again, samples, work, trl=True), steps))
        variants = (
            ("llavakit, padded", {"packing": False, "cached": False}),
            ("llavakit, packed, mask over rows", {"packing": True, "cached": False, "own_attention": False}),
            ("llavakit, packed", {"packing": True, "cached": False}),
            ("llavakit, packed, cached features", {"packing": True, "cached": True}),
        )
        for name, switches in variants:
            seconds, own_steps, seen = ours(work, records, recipe, **switches)
            if seen != tokens:
                sys.exit(f"{name}: saw {seen} tokens, not {tokens}")
            rows.append((name, seconds, own_steps))
        print(f"{'':36}{'steps':>7}{'seconds':>10}{'tokens/s':>11}{'ratio':>8}")
        for name, seconds, count in rows:
            print(f"{name:36}{count:>7}{seconds:>10.2f}{tokens / seconds:>11,.0f}{rows[0][1] / seconds:>8.2f}")


if __name__ == "__main__":
    main()
