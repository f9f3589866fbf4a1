#!/usr/bin/env bash
# libx264 in PyAV's wheel writes different files for the same frames, within one process and with one thread.
#
# Seen with av 18.1.0 (libavcodec 62.28.102), numpy 2.4.6, Python 3.11, x86-64: six frames, encoded 300 times with
# `crf=12, preset=veryfast, thread_count=1`, gave 1 to 40 different files, depending on the frames' size. What changes is
# the memory that was allocated in between. The pixels that reach the encoder are equal each time. Without the look-ahead
# (`rc-lookahead=0:mbtree=0`), or without the assembler (`asm=0`), 300 of 300 files are equal. `deterministic=1`, x264's
# default, does not prevent it. So whoever compares digests of encoded videos, or writes test data that must be
# repeatable, switches the look-ahead off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
cat >"$folder/check.py" <<'PYTHON'
import hashlib
import io
import sys

import av
import numpy as np


def encode(frames, parameters):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": "12", "preset": "veryfast", "x264-params": parameters}
        stream = container.add_stream("libx264", rate=4, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv444p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return hashlib.sha256(file.getvalue()).hexdigest()


def files(side, parameters):
    """Number of different files of 300 encodings of the same frames."""
    small = np.random.default_rng(side).integers(0, 255, (6, side // 4, side // 4, 3), dtype=np.uint8)
    frames = small.repeat(4, 1).repeat(4, 2)
    found = set()
    for number in range(300):
        sizes = np.random.default_rng(number).integers(1_000, 200_000, 20)
        used = [np.random.default_rng(number).integers(0, 255, size, dtype=np.uint8) for size in sizes]
        found.add(encode(frames, parameters))
        del used
    return len(found)


print(av.__version__, av.library_versions["libavcodec"])
usual = {side: files(side, "deterministic=1") for side in (56, 72, 96, 144)}
without = {side: files(side, "rc-lookahead=0:mbtree=0") for side in (56, 72, 96, 144)}
print("different files by side of the frame, as usual:         ", usual)
print("different files by side of the frame, without look-ahead:", without)
sys.exit(not (max(usual.values()) > 1 and set(without.values()) == {1}))
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
