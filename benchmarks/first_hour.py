"""`llavakit new` and `llavakit train` with no option changed: 60 pictures with a CSV, from the demo's stand-ins.

    make demo
    python benchmarks/first_hour.py runs/demo/parts/final

Prints held-out accuracy of the trained and of the untrained model with Wilson's 95 % intervals, and the time that the
commands took. The pictures are scenes that the demo did not see: another seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path

from scipy.stats import binomtest

from llavakit.cli.app import run
from llavakit.evaluation.score import score
from llavakit.phantom.write import write_world


def write_pictures(folder: Path, pictures: int, seed: int) -> Path:
    """Scenes with one coloured shape each, and a CSV that asks for its colour or shape."""
    write_world(
        "scene", folder / "scene", n=pictures, seed=seed, size=48, difficulty="easy", types="colour,shape", most=1
    )
    table = folder / "shapes.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["image", "question", "answer"])
        for name in ("train.json", "heldout.json"):
            for record in json.loads((folder / "scene" / name).read_text(encoding="utf-8")):
                question, answer = (turn["value"] for turn in record["conversations"][:2])
                text = question.replace("<image>\n", "").splitlines()[0]
                rows.writerow([f"scene/{record['image']}", text, answer])
    return table


def accuracy(model: str | Path, project: Path, answers: Path, images: Path) -> str:
    """Held-out accuracy of a model with its interval."""
    questions = str(project / "heldout.jsonl")
    options = ["--task", "exact_match", "--questions", questions, "--images", str(images), "--output", str(answers)]
    assert run(["eval", str(model), *options]) == 0
    found = score("exact_match", answers, questions)["metrics"]
    interval = binomtest(found["correct"], found["count"]).proportion_ci(method="wilson")
    low, high = 100 * interval.low, 100 * interval.high
    return f"{found['accuracy']:.1f} % ({found['correct']} of {found['count']}; {low:.0f} to {high:.0f} %)"


def main() -> None:
    """Write, make, train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the demo's stand-ins: runs/demo/parts/final")
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table = write_pictures(folder, arguments.pictures, arguments.seed)
        began, cpu = time.perf_counter(), time.process_time()
        project = folder / "project"
        assert run(["new", str(table), "--model", arguments.model, "--out", str(project)]) == 0
        assert run(["train", str(project / "recipe.yaml")]) == 0
        took = f"{time.perf_counter() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU time"
        trained = accuracy(project / "run" / "final", project, folder / "trained.jsonl", folder)
        untrained = accuracy(arguments.model, project, folder / "untrained.jsonl", folder)
    print(f"\nnew and train: {took}\ntrained: {trained}\nuntrained: {untrained}")


if __name__ == "__main__":
    main()
