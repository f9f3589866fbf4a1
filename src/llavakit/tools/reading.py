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


def text_lines(image: Image.Image) -> list[tuple[list[list[float]], str, float]]:
    """Lines of text: four corners in pixels from the top left clockwise, text, confidence; in the order of reading."""
    pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    with _one_at_a_time:
        found, _ = _engine()(pixels)
    return [(corners, text, float(score)) for corners, text, score in found or ()]


def read_text(image: Image.Image, *, least: float = 0.5) -> Outcome:
    """The lines of text in a picture.

    Args:
        image: RGB picture.
        least: Confidence below which a line is left out.

    Returns:
        `texts`, `boxes` around them and `scores`, in the order of reading; and `size` [height, width].
    """
    data: dict[str, Any] = {"boxes": [], "texts": [], "scores": [], "size": [image.height, image.width]}
    for corners, text, score in text_lines(image):
        if score < least:
            continue
        across, down = [float(x) / image.width for x, _ in corners], [float(y) / image.height for _, y in corners]
        box = min(across), min(down), max(across), max(down)
        data["boxes"].append([round(min(max(edge, 0.0), 1.0), 4) for edge in box])
        data["texts"].append(text)
        data["scores"].append(round(score, 4))
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
