"""Preprocessing of images on one core: llavakit beside transformers' LLaVA image processor, in one run.

    python benchmarks/preprocess.py [--size 336] [--image FILE ...] [--no-pad] [--repeat 7]

Both get the same decoded RGB image and give the padded (or cropped), normalised float32 view. Every line first
checks that the two are equal, value for value, then prints the best of the repeats of each, in turns. Images are
made here (smooth colours with noise) unless files are given; files are also timed from disk to view.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and PyTorch start their threads

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llavakit.media import load_image
from llavakit.registry import PLANNERS
from llavakit.views.plan import MediaSize

SIZES = (
    (336, 336),
    (200, 150),
    (640, 480),
    (480, 640),
    (640, 640),
    (1024, 768),
    (1920, 1080),
    (1080, 1920),
    (4032, 3024),
)


def picture(width: int, height: int) -> Image.Image:
    """A photograph-like image: gradients, waves and a little noise."""
    rng = np.random.default_rng(width * 31 + height)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [120 + 90 * np.sin(x / (17 + 9 * c)) * np.cos(y / (23 + 7 * c)) for c in range(3)]
    noisy = np.stack(waves, -1) + rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def best_of(repeat: int, *functions: Callable[[], object]) -> list[float]:
    """Shortest processor time of every function in seconds, in turns so that both see the same machine."""
    best = [math.inf] * len(functions)
    for _ in range(repeat):
        for number, function in enumerate(functions):
            count, start = 0, time.process_time()
            while count == 0 or time.process_time() - start < 0.05:
                function()
                count += 1
            best[number] = min(best[number], (time.process_time() - start) / count)
    return best


def main() -> int:
    """Print one line per image; exit status 1 if any pixels differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=336, help="side of the view")
    parser.add_argument("--image", type=Path, nargs="*", default=[], help="image files to use instead")
    parser.add_argument("--no-pad", action="store_true", help="short side and centre crop instead of padding")
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = options.size
    theirs = LlavaImageProcessorPil(
        do_pad=not options.no_pad, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    planner = PLANNERS.build({"type": "square" if options.no_pad else "pad", "size": size})

    def run_theirs(image: Image.Image) -> np.ndarray:
        return theirs(image, return_tensors="np")["pixel_values"][0]

    def run_ours(image: Image.Image) -> np.ndarray:
        return planner.cut(image, planner.plan(MediaSize(1, image.height, image.width)))[0]

    def line(name: str, reference: Callable[[], np.ndarray], own: Callable[[], np.ndarray]) -> tuple[bool, float]:
        equal = np.array_equal(reference(), own())
        slow, fast = best_of(options.repeat, reference, own)
        print(f"{name:<32}{slow * 1e3:>10.2f} ms{fast * 1e3:>10.2f} ms{slow / fast:>8.2f} x   {equal}")
        return equal, slow / fast

    print(f"{'image':<32}{'transformers':>13}{'llavakit':>13}{'ratio':>10}   equal")
    results = []
    for width, height in () if options.image else SIZES:
        image = picture(width, height)
        results.append(line(f"{width} x {height}", lambda i=image: run_theirs(i), lambda i=image: run_ours(i)))
    for file in options.image:
        image = load_image(file)
        name = f"{file.name[:18]} {image.width} x {image.height}"
        results.append(line(name, lambda i=image: run_theirs(i), lambda i=image: run_ours(i)))
        from_disk = lambda f=file: run_theirs(Image.open(f))  # noqa: E731
        results.append(line("  from disk", from_disk, lambda f=file: run_ours(load_image(f))))
    ratios = [ratio for _, ratio in results]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    equal = all(same for same, _ in results)
    print(f"ratio: smallest {min(ratios):.2f}, geometric mean {mean:.2f}; pixels {'equal' if equal else 'DIFFER'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
