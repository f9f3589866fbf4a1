"""A stream of a million records beside one of ten thousand: how soon it starts, how much memory it takes.

    python benchmarks/streaming.py [--records 1000000] [--few 10000] [--read 10000]

A tar file of 1,000 records with pictures of 8 x 8 pixels is written once and linked under as many names as are needed.
Every size is read in a process of its own, as a stage of a recipe reads it. *Start* is what depends on the data until
the first batch: stamp and check of the recipe, opening, the first buffer, the first samples. Then the process reads
on, buffer by buffer, through the first `--read` records, and makes samples of one batch in 16. *Peak* is its largest
resident memory.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

SHARD = 1000
MOST_SECONDS, MOST_MEMORY = 5.0, 1.1


def write_shards(folder: Path, count: int) -> str:
    """Shards of 1,000 records, all the same file; returns their pattern."""
    from PIL import Image

    folder.mkdir()
    first = folder / "00000.tar"
    with tarfile.open(first, "w") as tar:
        for number in range(SHARD):
            out = io.BytesIO()
            Image.new("RGB", (8, 8), (number % 256, number // 4, 40)).save(out, "PNG")
            turns = [{"from": "human", "value": f"<image>\\nHow many squares are there in picture {number} ?"}]
            turns.append({"from": "gpt", "value": " ".join(["one"] * (1 + number % 9))})
            record = json.dumps({"conversations": turns}).encode()
            for ending, content in (("json", record), ("png", out.getvalue())):
                info = tarfile.TarInfo(f"{number:06d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    shards = count // SHARD
    for number in range(1, shards):
        os.link(first, folder / f"{number:05d}.tar")
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def recipe_of(work: Path, pattern: str, read: int) -> dict[str, Any]:
    """A tiny LLaVA-1.5 that learns from the stream."""
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1200}
    vision = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 24, "patch_size": 8, "projection_dim": 16}
    parts = {"text_config": text, "vision_config": vision, "tokenizer": str(work / "tokenizer")}
    parts["media"] = {"image": {"views": {"type": "pad", "size": 24}}}
    stage = {"name": "tune", "train": ["language_model"], "learning_rate": 1e-3, "batch_size": 8}
    stage["max_steps"] = read // 8
    base = {"system": "llava-1.5", "parts": parts, "data": [{"path": pattern}], "stages": [stage]}
    return base | {"output": str(work / "run")}


def measure(recipe: dict[str, Any]) -> dict[str, float]:
    """Seconds to the first batch, processor seconds for so many records, and the peak memory."""
    from llavakit.training.check import check_recipe
    from llavakit.training.dataset import open_records
    from llavakit.training.fingerprint import Content, fingerprint
    from llavakit.training.objectives.base import objective_of
    from llavakit.training.recipe import parse_recipe
    from llavakit.training.streaming import StreamBatches, StreamSamples

    parsed = parse_recipe(recipe)
    stage = parsed.stages[0]
    objective = objective_of(stage)
    objective.bind(*objective.describe(parsed))
    begin, used = time.perf_counter(), time.process_time()
    fingerprint(parsed, 0, Content())
    check_recipe(parsed, [0])
    samples = StreamSamples(open_records(parsed, 0, objective.read), objective)
    seconds, made, records = None, 0, 0
    for number, batch in enumerate(StreamBatches(samples, stage, 0)):
        records += len(batch.chosen)
        if number % 16 == 0:
            made += len(samples.__getitems__(batch))
            seconds = seconds or time.perf_counter() - begin
    used = time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"start": seconds, "seconds": used, "records": records, "made": made, "peak": peak}


def main() -> None:
    """Measure both sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--few", type=int, default=10_000)
    parser.add_argument("--read", type=int, default=10_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return
    from llavakit.phantom.tokenizer import tiny_tokenizer

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        tiny_tokenizer().save_pretrained(work / "tokenizer")
        for count in (options.few, options.records):
            recipe = recipe_of(work, write_shards(work / str(count), count), min(count, options.read))
            command = [sys.executable, __file__, "--measure", json.dumps(recipe)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[count] = json.loads(done.stdout.splitlines()[-1])
    print("| records | shards | start | read | CPU time per record | peak memory |\n|---|---|---|---|---|---|")
    for count, row in found.items():
        print(
            f"| {count:,} | {count // SHARD:,} | {row['start']:.2f} s | {row['records']:,} | "
            f"{1000 * row['seconds'] / row['records']:.2f} ms | {row['peak']:.0f} MiB |"
        )
    start, ratio = found[options.records]["start"], found[options.records]["peak"] / found[options.few]["peak"]
    print(f"\nstart {start:.2f} s (target < {MOST_SECONDS:g}), memory {ratio:.2f} x (target <= {MOST_MEMORY:g})")


if __name__ == "__main__":
    main()
