"""Training at the size of a first real model: llavakit beside transformers' Trainer, each in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/real_size.py [--stage full|connector] [--steps 3] [--batch-size 8]

The decoder has the shape of SmolLM2-135M (30 layers, 576 wide, 9 heads over 3, 49,152 tokens), the encoder that of
ViT-B/16 at 224 pixels (196 tokens); weights are random and the same on both sides, float32. `full` trains connector and
decoder, `connector` the connector alone; the encoder is frozen in both. Records are those of `benchmarks/training.py`,
as many per step on average. Both sides are charged for everything from prepared samples to the last step. Seconds are
processor time of all threads; peak memory is the largest resident set of the whole process (`ru_maxrss`), interpreter
and libraries included. Before anything is timed both give the same loss on the same batch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--stage", choices=("full", "connector"), default="full")
parser.add_argument("--steps", type=int, default=3, help="steps of the baseline; both see as many records")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--layers", type=int, default=30, help="fewer than 30 for a try")
parser.add_argument("--work", type=Path, help="keep models and records here, for another run")
parser.add_argument("--only", choices=("baseline", "llavakit"), help="one side alone")
parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of llavakit's stage")
parser.add_argument("--part", choices=("prepare", "baseline", "llavakit"), help=argparse.SUPPRESS)
options = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(options.threads)
TRAINED = {"full": ["multi_modal_projector", "language_model"], "connector": ["multi_modal_projector"]}
PIXELS, PATCH, VOCABULARY = 224, 16, 49_152


def raw_recipe(work: Path) -> dict[str, Any]:
    """The model and its stage."""
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": options.layers}
    text |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    vision = {"model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512}
    vision |= {"num_hidden_layers": 12, "num_attention_heads": 12, "image_size": PIXELS, "patch_size": PATCH}
    parts = {"text_config": text, "vision_config": vision, "tokenizer": str(work / "tokenizer")}
    parts["media"] = {"image": {"views": {"type": "pad", "size": PIXELS}}}
    stage = {"name": "tune", "train": TRAINED[options.stage], "learning_rate": 1e-4, "batch_size": options.batch_size}
    stage |= {"clip": 1.0, "log_steps": 1000}
    return {"parts": parts, "stages": [stage], "output": str(work / "run")}


def prepare(work: Path) -> None:
    """Records, tokenizer, and the model in both layouts."""
    from mixed_records import mixed_records

    from llavakit.checkpoints.convert import convert, save
    from llavakit.phantom.tokenizer import tiny_tokenizer
    from llavakit.training.build import build_model
    from llavakit.training.recipe import parse_recipe

    records = mixed_records(work / "world", options.steps * options.batch_size)
    (work / "records.json").write_text(json.dumps(records))
    texts = json.loads((work / "world" / "texts.json").read_text())
    tiny_tokenizer(texts).save_pretrained(work / "tokenizer")
    model, processor = build_model(parse_recipe(raw_recipe(work)))
    save(model.state_dict(), model.config, processor, work / "model")
    convert(work / "model", work / "hf", to="hf")


def prepared(work: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Records, and the samples that both sides train on."""
    from llavakit.checkpoints.opening import load_processor, open_checkpoint
    from llavakit.data.mixture import Mixture
    from llavakit.training.dataset import Samples

    records = Mixture({"path": str(work / "records.json"), "media_root": str(work / "world")})
    samples = Samples(records, load_processor(open_checkpoint(work / "model")))
    return records, [samples[number] for number in range(len(samples))]


def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The baseline's collator: pad to the longest sample, pictures in order."""
    from llavakit.data.collate import Collator

    batch = Collator(0)([{**sample, "visual_sizes": [], "visual_modalities": []} for sample in samples])
    return {name: batch[name] for name in ("input_ids", "labels", "attention_mask", "pixel_values") if name in batch}


def peak() -> float:
    """Largest resident set so far in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def baseline(work: Path) -> dict[str, Any]:
    """transformers' Trainer, padded."""
    import torch
    from transformers import LlavaForConditionalGeneration, PrinterCallback, Trainer, TrainingArguments

    _, samples = prepared(work)
    model = LlavaForConditionalGeneration.from_pretrained(work / "hf").train()
    for name, parameter in model.named_parameters():
        trains = "multi_modal_projector" in name if options.stage == "connector" else "vision_tower" not in name
        parameter.requires_grad_(trains)
    with torch.no_grad():
        loss = float(model(**pad(samples[:2])).loss)
    arguments = TrainingArguments(
        output_dir=str(work / "baseline"),
        num_train_epochs=1,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        max_grad_norm=1.0,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=samples, data_collator=pad)
    trainer.remove_callback(PrinterCallback)
    before, began = peak(), time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    lengths = [len(sample["input_ids"]) for sample in samples]
    found = {"seconds": seconds, "steps": trainer.state.global_step, "tokens": sum(lengths), "loss": loss}
    return found | {"before": before, "shortest": min(lengths), "longest": max(lengths)}


def llavakit(work: Path) -> dict[str, Any]:
    """llavakit's stage, packed into rows of as many tokens as the baseline's batches have on average."""
    import torch
    from rich.console import Console
    from transformers import PrinterCallback

    from llavakit.data.collate import Collator
    from llavakit.training.build import load_checkpoint
    from llavakit.training.dataset import PreparedSamples, plan_batches
    from llavakit.training.lora import prepare as freeze
    from llavakit.training.memory import give_back_at_once
    from llavakit.training.objectives import Run
    from llavakit.training.objectives.supervised import Supervised
    from llavakit.training.recipe import parse_recipe
    from llavakit.training.recompute import recompute
    from llavakit.training.run import training_arguments
    from llavakit.training.trainer import StageTrainer

    give_back_at_once()  # as `llavakit train` does
    records, known = prepared(work)
    model, processor = load_checkpoint(work / "model")
    mean = sum(len(sample["input_ids"]) for sample in known) / len(known)
    packing = ["packing=true", "batch_size=1", f"max_length={round(options.batch_size * mean)}"]
    recipe = parse_recipe(raw_recipe(work), [f"stages.0.{assignment}" for assignment in (*packing, *options.set)])
    stage = recipe.stages[0]
    with torch.no_grad():
        loss = float(model(**Collator(0)(known[:2]), skip_logits=True).loss)
    net = freeze(model.train(), stage)
    recompute(net, stage.gradient_checkpointing)
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
    before, began = peak(), time.process_time()
    objective.begin(about)
    filled = time.process_time() - began
    for number in range(len(samples)):
        samples.length(number)  # tokenised, untimed on both sides
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
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = time.process_time() - began
    steps = trainer.state.global_step
    return {"seconds": seconds, "steps": steps, "tokens": trainer.count_tokens(), "loss": loss, "before": before}


def measure(part: str, work: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    given = [*sys.argv[1:], "--work", str(work), "--part", part]
    ended = subprocess.run([sys.executable, __file__, *given], stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{part}: ended with {ended.returncode}")
    return json.loads(ended.stdout.splitlines()[-1]) if part != "prepare" else {}


def main() -> None:
    """Prepare, run both sides, print."""
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "hf").is_dir():
            measure("prepare", work)
        sides = [options.only] if options.only else ["baseline", "llavakit"]
        found = {side: measure(side, work) for side in sides}
    first = found[sides[0]]
    for side, own in found.items():
        if abs(own["loss"] - first["loss"]) > 1e-4:
            sys.exit(f"the models differ: loss {first['loss']:.6f} and {own['loss']:.6f}")
        if own["tokens"] != first["tokens"]:
            sys.exit(f"{side} saw {own['tokens']} tokens, not {first['tokens']}")
    lengths = f" in records of {first['shortest']} to {first['longest']}" if "longest" in first else ""
    print(f"{options.stage}: {first['tokens']:,} tokens that count{lengths}; loss on one batch {first['loss']:.4f}")
    print(f"{'':12}{'steps':>7}{'seconds':>10}{'tokens/s':>11}{'ratio':>8}{'peak GB':>10}{'ratio':>8}{'before':>9}")
    for side, own in found.items():
        speed, memory = first["seconds"] / own["seconds"], own["peak"] / first["peak"]
        print(
            f"{side:12}{own['steps']:>7}{own['seconds']:>10.1f}{own['tokens'] / own['seconds']:>11,.1f}{speed:>8.2f}"
            f"{own['peak']:>10.2f}{memory:>8.2f}{own['before']:>9.2f}"
        )


if __name__ == "__main__":
    if options.part is None:
        main()
    else:
        result = {"prepare": prepare, "baseline": baseline, "llavakit": llavakit}[options.part](options.work)
        print(json.dumps({**(result or {}), "peak": peak()}))
