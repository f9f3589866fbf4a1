"""Peak memory of MG-LLaVA's object tokens: stages read one at a time, or the whole pyramid as the original builds it.

    python benchmarks/mg_llava.py

ConvNeXt-L at its published dimensions with random weights, one picture of 768 x 768 pixels, 50 boxes. Every way runs in
a process of its own; what is compared is the growth of the process's peak memory over its size with the model loaded,
and the vectors that go into the projector.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llavakit.systems.mg_llava.checkpoint import CONVNEXT
from llavakit.systems.mg_llava.encoder import ConvNextPyramid, ConvNextPyramidConfig
from llavakit.vision.known import KNOWN_ENCODERS
from llavakit.vision.roi_align import axis_weights

WAYS = ("pyramid", "stages")


def boxes(count: int, side: int) -> Tensor:
    """Boxes of many sizes, left, top, right, bottom."""
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(0)) * side
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1).round()


def original(encoder: ConvNextPyramid, pixels: Tensor, own: Tensor) -> Tensor:
    """The pyramid as one tensor, RoIAlign to 56 x 56 for every box, and the mean."""
    (maps,) = encoder.pyramid(pixels)
    side, scale = encoder.config.bins, 1 / encoder.config.patch_size
    left, top, right, bottom = (own * scale).unbind(-1)
    aligned = torch.empty(len(own), maps.shape[0], side, side)
    for number in range(len(own)):
        part = slice(number, number + 1)
        rows = axis_weights(top[part], bottom[part], side, maps.shape[1])[0]
        columns = axis_weights(left[part], right[part], side, maps.shape[2])[0]
        aligned[number] = rows @ maps @ columns.T
    return aligned.mean((2, 3))


@torch.no_grad()
def measure(way: str, count: int, side: int, target: Path) -> dict[str, float]:
    """Peak memory of one way in this process, in bytes over that of the loaded model."""
    torch.manual_seed(0)
    options = {key: value for key, value in KNOWN_ENCODERS[CONVNEXT].items() if key != "model_type"}
    encoder = ConvNextPyramid(ConvNextPyramidConfig(**options, layer_scale_init_value=0.1)).eval()
    pixels, own = torch.randn(1, 3, side, side), boxes(count, side)
    loaded = resident()
    if way == "stages":
        (vectors,) = encoder.pool_regions(pixels, [own.tolist()])[1]
    else:
        vectors = original(encoder, pixels, own)
    torch.save(vectors, target)
    return {"way": way, "loaded": loaded, "peak": peak(), "grown": peak() - loaded}


def resident() -> int:
    """Resident size of this process now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxes", type=int, default=50)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process")
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    if told.way:
        print(json.dumps(measure(told.way, told.boxes, told.size, told.out)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found, vectors = {}, {}
        for way in WAYS:
            file = Path(folder) / f"{way}.pt"
            command = [sys.executable, __file__, "--way", way, "--out", str(file)]
            command += ["--boxes", str(told.boxes), "--size", str(told.size)]
            found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            vectors[way] = torch.load(file, weights_only=True)
    for way in WAYS:
        print(f"{way:8} peak {found[way]['grown'] / 2**20:8.0f} MiB over the loaded model")
    print(f"ratio    {found['stages']['grown'] / found['pyramid']['grown']:.3f}")
    scale = float(vectors["pyramid"].abs().max())
    worst = float((vectors["stages"] - vectors["pyramid"]).abs().max())
    print(f"largest difference {worst:.1e} of values up to {scale:.2f}")


if __name__ == "__main__":
    main()
