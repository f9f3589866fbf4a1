"""Video-LLaVA: CPU time from an MP4 of a minute to the clip of 8 frames, against decoding every frame with PyAV.

    python benchmarks/video_llava.py [--seconds 60] [--size 640 360] [--repeats 3]

Both ways take the same 8 frames and cut them by the same planner; the clips must be equal bit for bit. Prints seconds
of CPU time (of all threads) and the ratio, with a key frame every two seconds and with one key frame alone.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image

from llavakit.media import load_video
from llavakit.media.frame_sampling import uniform
from llavakit.registry import PLANNERS
from llavakit.systems.video_llava.checkpoint import video_views
from llavakit.views.plan import MediaSize

FRAMES, RATE = 8, 25


def cpu_seconds() -> float:
    """Seconds that all threads of this process have computed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def write(path: Path, seconds: int, size: tuple[int, int], gap: int) -> None:
    """A film of moving gradients in H.264 with a key frame every `gap` frames."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "x264-params": f"keyint={gap}:min-keyint={gap}:scenecut=0"}
        for number in range(seconds * RATE):
            planes = [(x * 2 + number * 3) % 256, (y * 2 + number) % 256, (x + y + number * 2) % 256]
            frame = av.VideoFrame.from_ndarray(np.stack(planes, axis=-1).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def ours(path: Path) -> np.ndarray:
    """The clip as llavakit reads it."""
    video = load_video(path, {"type": "uniform", "frames": FRAMES})
    planner = PLANNERS.build(video_views(224, FRAMES))
    return planner.cut(video.frames, planner.plan(video.size))[0]


def every_frame(path: Path) -> np.ndarray:
    """The same from decoding the whole film."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        kept = list(container.decode(stream))
        frames = [Image.fromarray(kept[number].to_ndarray(format="rgb24")) for number in uniform(len(kept), FRAMES)]
    planner = PLANNERS.build(video_views(224, FRAMES))
    return planner.cut(frames, planner.plan(MediaSize(FRAMES, frames[0].height, frames[0].width)))[0]


def measure(path: Path, repeats: int) -> tuple[float, float]:
    """Least CPU time of both ways, run in turns."""
    times: dict[str, list[float]] = {"ours": [], "every": []}
    for _ in range(repeats):
        clips = {}
        for name, way in (("ours", ours), ("every", every_frame)):
            start = cpu_seconds()
            clips[name] = way(path)
            times[name].append(cpu_seconds() - start)
        if not np.array_equal(clips["ours"], clips["every"]):
            raise SystemExit("the two clips differ")
    return min(times["ours"]), min(times["every"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 360), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for title, gap in (("a key frame every 2 s", 2 * RATE), ("one key frame", given.seconds * RATE + 1)):
            path = Path(folder) / f"{gap}.mp4"
            write(path, given.seconds, tuple(given.size), gap)
            mine, whole = measure(path, given.repeats)
            print(f"{title}: {mine:.2f} s, every frame {whole:.2f} s, ratio {mine / whole:.3f}, equal pixels")


if __name__ == "__main__":
    main()
