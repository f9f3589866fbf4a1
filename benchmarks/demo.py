"""CPU seconds and accuracy of `make demo`, beside those of another checkout, one after the other.

git worktree add --detach /tmp/before ad04f4b
python benchmarks/demo.py /tmp/before --rounds 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def run(checkout: Path) -> dict[str, float]:
    """One demo from nothing with the source of a checkout; CPU time is of all its processes."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
        command = [sys.executable, "-m", "llavakit.demo", "--out", scratch]
        began = time.perf_counter()
        demo = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(demo.pid, 0)
        if status:
            raise SystemExit(f"{checkout}: `{' '.join(command)}` failed with status {status}")
        metrics = json.loads((Path(scratch) / "metrics.json").read_text(encoding="utf-8"))
        return {
            "CPU seconds": usage.ru_utime + usage.ru_stime,
            "seconds": time.perf_counter() - began,
            "accuracy": metrics["accuracy"],
            "text only": metrics["text_only"],
        }


def main() -> None:
    """Print a table of medians and the ratio of CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("baseline", type=Path, nargs="?", help="another checkout; without it this one alone runs")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    checkouts = {"here": HERE} if arguments.baseline is None else {"baseline": arguments.baseline, "here": HERE}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(arguments.rounds):
        for name, checkout in checkouts.items():
            runs[name].append(run(checkout.resolve()))
            print(name, {key: round(value, 1) for key, value in runs[name][-1].items()}, flush=True)
    medians = {name: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for name, rows in runs.items()}
    print("| build | CPU seconds | seconds | accuracy, % | text only, % |\n|---|---|---|---|---|")
    for name, row in medians.items():
        print(f"| {name} |", " | ".join(f"{value:.1f}" for value in row.values()), "|")
    if "baseline" in medians:
        print(f"ratio of CPU seconds: {medians['here']['CPU seconds'] / medians['baseline']['CPU seconds']:.2f}")


if __name__ == "__main__":
    main()
