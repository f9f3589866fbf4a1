"""Four options ranked by likelihood beside four separate forward passes: equal to 1e-5, in one run.

    OMP_NUM_THREADS=1 python benchmarks/likelihoods.py [--repeats 5]

A question with a picture or a text in front, and four options of 4 to 24 tokens. One side runs the model on prompt and
option, four times; the other is `Engine.score`, which computes the prompt once. Nothing is kept from question to
question. Processor time.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from stage_search import IMAGE, TOKEN, VISUAL, new_model

from llavakit.generation import Engine, Request

OPTIONS = (4, 8, 16, 24)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, draws = new_model(8, 256), random.Random(0)
    engine = Engine(model)
    print("| prompt | four passes, s | ranked, s | ratio | largest difference |\n|---|---|---|---|---|")
    for name, length, picture in (("text of 300 tokens", 300, False), ("picture and 100 tokens", 100, True)):
        seconds, ratios, worst = ([], []), [], 0.0
        for repeat in range(arguments.repeats):
            engine.forget()
            ids = [draws.randrange(10, 1000) for _ in range(length)]
            ids = [1, *[TOKEN] * VISUAL, *ids] if picture else ids
            pixels = torch.randn(1, 3, IMAGE, IMAGE) if picture else None
            sizes = torch.tensor([[1, IMAGE, IMAGE]])
            options = [[draws.randrange(10, 1000) for _ in range(count)] for count in OPTIONS]
            started = time.process_time()
            wanted = []
            with torch.inference_mode():
                for option in options:
                    whole = torch.tensor([[*ids, *option]])
                    media = {"pixel_values": pixels, "visual_sizes": sizes} if picture else {}
                    logits = model(input_ids=whole, **media).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
                    wanted.append(logits.gather(-1, torch.tensor(option)[:, None])[:, 0])
            middle = time.process_time()
            media = {"pixel_values": pixels, "visual_sizes": sizes} if picture else {}
            found = engine.score(Request(input_ids=ids, **media), options)
            ended = time.process_time()
            worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)))
            if repeat:  # the first one warms up
                seconds[0].append(middle - started)
                seconds[1].append(ended - middle)
                ratios.append((ended - middle) / (middle - started))
        times = [statistics.median(own) for own in seconds]
        print(f"| {name} | {times[0]:.3f} | {times[1]:.3f} | {statistics.median(ratios):.2f} | {worst:.1e} |")


if __name__ == "__main__":
    main()
