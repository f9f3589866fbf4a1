"""Reading text in pictures with RapidOCR, whose package brings its ONNX models along."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
from PIL import Image

from llavakit.tools.skill import Outcome, Skill, absent, number, parameters, picture

_one_at_a_time = threading.Lock()


@functools.cache
def _engine() -> Any:
    from rapidocr_onnxruntime import RapidOCR

    return RapidOCR()


def read_text(image: Image.Image, *, least: float = 0.5) -> Outcome:
    """The lines of text in a picture.

    Args:
        image: RGB picture.
        least: Confidence below which a line is left out.

    Returns:
        `texts`, `boxes` around them and `scores`, in the order of reading; and `size` [height, width].
    """
    pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    height, width = pixels.shape[:2]
    with _one_at_a_time:
        found, _ = _engine()(pixels)
    data: dict[str, Any] = {"boxes": [], "texts": [], "scores": [], "size": [height, width]}
    for corners, text, score in found or ():
        if float(score) < least:
            continue
        across, down = [float(x) / width for x, _ in corners], [float(y) / height for _, y in corners]
        box = min(across), min(down), max(across), max(down)
        data["boxes"].append([round(min(max(edge, 0.0), 1.0), 4) for edge in box])
        data["texts"].append(text)
        data["scores"].append(round(float(score), 4))
    return Outcome(data)


def reading_skill() -> Skill:
    """The skill `ocr`."""
    return Skill(
        name="ocr",
        description="Read the text in the picture, with the boxes of its lines.",
        parameters=parameters(image=picture(), least=number("Confidence below which a line is left out.", 0, 1, 0.5)),
        function=read_text,
        needs=("rapidocr-onnxruntime",),
        missing=absent("rapidocr_onnxruntime", "rapidocr-onnxruntime", "tools"),
        shared=False,
    )
