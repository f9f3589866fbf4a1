"""Lets vLLM's CPU build start where torchvision is a build for GPUs; put this folder on PYTHONPATH.

The wheels of torchvision on PyPI want CUDA's libraries. Without them its compiled operators do not exist, and importing
it fails where it describes their shapes. Nothing that serves these models calls them, so it is enough to declare
them, without an implementation, before torchvision is imported; calling one is still an error. Python runs this module
at the start of every process that inherits PYTHONPATH, which vLLM's workers do. A torchvision that loads is left alone.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "qroi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)


class DeclareOperators(MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is about to be imported, once."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            spec = PathFinder.find_spec(name)
            if spec is not None and spec.origin and not _loads(Path(spec.origin).with_name("_C.so")):
                self.library = _declared()
        return None


def _loads(library: Path) -> bool:
    import torch  # noqa: F401  the library needs torch's own libraries in the process

    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def _declared() -> object:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        library.define(operator)
    return library


# a library takes its declarations back when it is collected, so something must hold the finder that holds it
FINDER = DeclareOperators()
sys.meta_path.insert(0, FINDER)
