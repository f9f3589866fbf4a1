"""Preference training: llavakit's objective `dpo` beside TRL's DPOTrainer, in one run.

    python benchmarks/dpo.py [--pairs 96] [--vocabulary 512 32000] [--threads 1] [--hidden 192] [--layers 4]

Both align the same tiny LLaVA-1.5 (same weights, float32, full training, same pictures and pairs, batches of eight, one
epoch), each in a process of its own, and are charged for all that a user pays: from the folder of the model and the
file of pairs to the folder of the trained model, the reference included. Tokens that count are those of both sequences
of a pair (picture and prompt twice, both answers), whether a trainer computes the prompt once or twice. Seconds are
processor time of all threads. Memory is the highest resident set above that of the process before it loads the model.
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
parser.add_argument("--pairs", type=int, default=96)
parser.add_argument("--vocabulary", type=int, nargs="+", default=[512], help="its entries; one table each")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--hidden", type=int, default=192)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--words", type=int, default=12, help="longest answer")
parser.add_argument("--side", choices=["both", "prepare", "llavakit", "trl"], default="both")
parser.add_argument("--folder", type=Path)
options = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(options.threads)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(options.threads)
SIDE, PATCH, BATCH, RATE = 96, 8, 8, 1e-4
TEXT = "what is there a red blue green square disc left right of the above below large small no yes"
WORDS = TEXT.split()


def recipe(folder: Path) -> dict[str, Any]:
    """The model's parts, and one stage on its pairs."""
    text = {"model_type": "llama", "hidden_size": options.hidden, "intermediate_size": 4 * options.hidden}
    text |= {"num_hidden_layers": options.layers, "num_attention_heads": 4, "vocab_size": options.vocabulary[0]}
    vision = {"model_type": "clip_vision_model", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4}
    vision |= {"num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 16}
    parts = {"text_config": text, "vision_config": vision, "tokenizer": str(folder / "tokenizer")}
    parts["media"] = {"image": {"views": {"type": "square", "size": SIDE}}}
    stage = {"name": "align", "objective": {"type": "dpo", "beta": 0.1}, "batch_size": BATCH, "learning_rate": RATE}
    stage |= {"train": ["vision_tower", "multi_modal_projector", "language_model", "lm_head"], "log_steps": 1}
    source = {"path": str(folder / "pairs.jsonl"), "images": str(folder)}
    return {"parts": parts, "data": [source], "stages": [stage], "output": str(folder / "run")}


def prepare(folder: Path) -> None:
    """Pictures, pairs, tokenizer, and the model in both layouts."""
    from llavakit.checkpoints.convert import convert, save
    from llavakit.phantom.tokenizer import tiny_tokenizer
    from llavakit.training.build import build_model
    from llavakit.training.recipe import parse_recipe

    draw, rows = np.random.default_rng(0), []
    tiny_tokenizer([" ".join(WORDS)], specials=("<image>",)).save_pretrained(folder / "tokenizer")

    def said(most: int) -> str:
        return " ".join(draw.choice(WORDS, int(draw.integers(2, most + 1))))

    for number in range(options.pairs):
        Image.fromarray(draw.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        answers = {"chosen": "yes " + said(options.words), "rejected": "no " + said(options.words)}
        rows.append({"prompt": said(20), "image": f"{number}.png", **answers})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, processor = build_model(parse_recipe(recipe(folder)))
    save(model.state_dict(), model.config, processor, folder / "own")
    convert(str(folder / "own"), folder / "hf", to="hf")


def run_llavakit(folder: Path) -> dict[str, float]:
    """From folder to folder, and the tokens of both sequences of every pair."""
    from rich.console import Console

    from llavakit.training.build import load_checkpoint
    from llavakit.training.dataset import open_records
    from llavakit.training.objectives.dpo import DPO, answers_of
    from llavakit.training.recipe import parse_recipe
    from llavakit.training.run import train

    raw = recipe(folder)
    made = parse_recipe({**raw, "parts": None, "model": str(folder / "own")})
    before, start = rss(), time.process_time()
    train(made, console=Console(quiet=True))
    seconds, memory = time.process_time() - start, rss() - before
    objective = DPO(made.stages[0])
    model, processor = load_checkpoint(folder / "own")
    objective.bind(model.config, processor)
    records = open_records(made, 0, objective.read)
    pairs = (objective.encode(records[number], media=False) for number in range(len(records)))
    tokens = sum(len(row["input_ids"]) for pair in pairs for row in answers_of(pair))
    return {"seconds": seconds, "memory": memory, "tokens": tokens}


def run_trl(folder: Path) -> dict[str, float]:
    """From folder to folder."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig, DPOTrainer

    system = "A chat between a curious user and an artificial intelligence assistant. "
    system += "The assistant gives helpful, detailed, and polite answers to the user's questions."
    before, start = rss(), time.process_time()
    policy, reference = (AutoModelForImageTextToText.from_pretrained(folder / "hf") for _ in range(2))
    processor = AutoProcessor.from_pretrained(folder / "hf")
    rows = []
    for line in (folder / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = f"{system} USER: <image>\n{row['prompt']} ASSISTANT: "
        answers = {name: f"{row[name]}</s>" for name in ("chosen", "rejected")}
        rows.append({"prompt": prompt, **answers, "images": [Image.open(folder / row["image"]).convert("RGB")]})
    settings = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=RATE,
        beta=0.1,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(str(folder / "trl" / "final"))  # with its processor
    return {"seconds": time.process_time() - start, "memory": rss() - before}


def rss() -> float:
    """Highest resident set so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run both sides and print the tables."""
    if options.side != "both":
        found = {"prepare": prepare, "llavakit": run_llavakit, "trl": run_trl}[options.side](options.folder)
        print("RESULT " + json.dumps(found))
        return
    for vocabulary in options.vocabulary:
        table(vocabulary)


def table(vocabulary: int) -> None:
    """Run both sides with a vocabulary and print what they took."""
    with tempfile.TemporaryDirectory() as place:
        results = {}
        for side in ("prepare", "llavakit", "trl"):
            given = [*sys.argv[1:], "--vocabulary", str(vocabulary), "--side", side, "--folder", place]
            done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, check=False)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"{side} failed: {done.stderr[-2000:]}")
            results[side] = json.loads(line.removeprefix("RESULT "))
    tokens = results["llavakit"]["tokens"]
    shape = f"{options.layers} layers of width {options.hidden}, vocabulary {vocabulary}"
    print(f"{options.pairs} pairs, {tokens} tokens of both sequences, {shape}")
    print("| | processor s | tokens/s | memory above the start, MB |\n|---|---|---|---|")
    for side in ("trl", "llavakit"):
        own = results[side]
        print(f"| {side} | {own['seconds']:.1f} | {tokens / own['seconds']:.0f} | {own['memory']:.0f} |")
    ours, theirs = results["llavakit"], results["trl"]
    print(f"| ratio | | {theirs['seconds'] / ours['seconds']:.2f} | {ours['memory'] / theirs['memory']:.2f} |")


if __name__ == "__main__":
    main()
