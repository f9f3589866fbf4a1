"""Error synthesis at scale: `llavakit synthesize report_errors` on a made-up corpus, by number of processes.

    python benchmarks/error_synthesis.py [--reports 100000] [--rounds 3]

Prints for every number of processes the time of the whole command (reading, surveying, damaging, writing), reports per
second and the largest memory of any of its processes, on the whole corpus and on a tenth of it; and whether all outputs
are the same bytes. The fastest of several alternating rounds counts: other work on the machine only slows one down.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

NORMAL = (
    "The heart is normal in size.", "Lungs are clear.", "No pneumothorax is seen.", "The mediastinum is unremarkable.",
    "No focal consolidation.", "Osseous structures are intact.", "No pleural effusion or pneumothorax.",
    "The hilar contours are within normal limits.", "Cardiomediastinal silhouette is stable compared to prior.",
)  # fmt: skip
FINDINGS = (
    "pleural effusion", "consolidation", "atelectasis", "opacity", "nodule", "pneumothorax", "edema", "pneumonia",
    "fracture", "cardiomegaly",
)  # fmt: skip


def report(number: int) -> dict[str, str]:
    """A made-up report of five to nine sentences."""
    draw = random.Random(number)
    sentences = draw.sample(NORMAL, draw.randint(3, 5))
    for finding in draw.sample(FINDINGS, draw.randint(0, 4)):
        size, side = draw.choice(("small", "mild", "moderate", "large")), draw.choice(("left", "right", "bilateral"))
        zone = draw.choice(("upper zone", "lower zone", "base", "apex"))
        form = draw.choice(("There is a {} {} {}.", "A {} {} {} is seen{}.", "Possible {} {} {}{}."))
        sentences.append(form.format(size, side, finding, f" in the {zone}"))
    draw.shuffle(sentences)
    return {
        "report_id": f"r{number:07d}",
        "subject_id": f"p{number // 2:06d}",
        "split": "train" if number // 2 % 10 else "test",
        "image": f"{number // 1000:03d}/{number:07d}.png",
        "findings": " ".join(sentences),
    }


def measured(source: Path, output: Path, processes: int) -> tuple[float, float, float]:
    """Seconds of the command, MiB of its largest process, and CPU seconds of all of them."""
    command = [sys.executable, "-m", "llavakit", "synthesize", "report_errors", str(source), str(output)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "repeated=keep", "--processes", str(processes)], stdout=subprocess.DEVNULL)
    most, ended = [0], threading.Event()

    def watch() -> None:
        me = psutil.Process(process.pid)
        while not ended.is_set():
            try:
                for one in (me, *me.children(recursive=True)):
                    most[0] = max(most[0], one.memory_info().rss - one.memory_info().shared)
            except psutil.Error:
                pass
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)  # its usage holds that of the processes it waited for
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    if status:
        raise SystemExit("the command failed")
    return seconds, most[0] / 2**20, usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reports", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, digests, best = Path(name), set(), {}
        for count in (options.reports // 10, options.reports):
            source = folder / f"{count}.jsonl"
            with source.open("w") as file:
                file.writelines(json.dumps(report(number)) + "\n" for number in range(count))
            for number in range(options.rounds if count == options.reports else 1):
                for processes in (1, 2):
                    output = folder / f"{count}-{processes}-{number}.jsonl"
                    found = measured(source, output, processes)
                    old = best.get((count, processes), found)
                    best[count, processes] = min(old[0], found[0]), max(old[1], found[1]), min(old[2], found[2])
                    if count == options.reports:
                        digests.add(hashlib.sha256(output.read_bytes()).hexdigest())
                    for file in folder.glob(f"{output.stem}*"):
                        file.unlink()
        for (count, processes), (seconds, memory, used) in best.items():
            print(
                f"{count:>7} reports, {processes} process{'es'[: 2 * (processes > 1)]}: {seconds:6.1f} s, "
                f"{used:6.1f} s of CPU, {count / seconds:6.0f} reports/s, {memory:4.0f} MiB"
            )
        speed = best[options.reports, 1][0] / best[options.reports, 2][0]
        print(f"two processes are {speed:.2f} times as fast as one: {speed / 2:.2f} of linear")
        shared = best[options.reports, 1][2] / best[options.reports, 2][2]
        print(f"they use {1 / shared:.2f} times its CPU time: at most {shared:.2f} of linear on free cores")
        print(f"outputs are {'the same bytes' if len(digests) == 1 else 'DIFFERENT'}; {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
