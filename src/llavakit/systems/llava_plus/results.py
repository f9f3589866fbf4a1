"""What a tool found, as LLaVA-Plus is told of it: cleaned, rounded, and printed as Python prints it.

A tool's result is a mapping with the published names: `boxes`, `logits`, `phrases`, `scores`, `texts`, `caption`,
`tags`, `retrieval_results`, `size`; pictures under `edited_image`, `image_seg` and `iou_sort_masks`; masks as COCO run
lengths under `masks_rle`. Source: `http_bot` of the published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HIDDEN = ("masks_rle", "edited_image", "image_seg", "iou_sort_masks", "size")
ROUNDED = ("boxes", "logits", "scores")
DONE = "The {} has processed the image."


def rounded(value: Any) -> Any:
    """Numbers to two decimals, also inside lists; what is no number stays."""
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return round(value, 2)


def cleaned(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without what is not for the model.

    Args:
        name: The tool, as the model is told of it.
    """
    found = {key: rounded(value) if key in ROUNDED else value for key, value in result.items() if key not in HIDDEN}
    if name == "easyocr":
        found.pop("boxes", None)
        found.pop("scores", None)
    if isinstance(found.get("retrieval_results"), list):
        found["retrieval_results"] = [
            {"caption": one.get("caption"), "similarity": rounded(one.get("similarity"))}
            for one in found["retrieval_results"]
        ]
    return found or {"message": DONE.format(name)}


def result_text(name: str, result: Any) -> str:
    """The line that says what a tool found; a mapping is cleaned first."""
    return f"{name} model outputs: {cleaned(name, result) if isinstance(result, Mapping) else result}"
