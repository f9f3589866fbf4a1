"""llavakit: every published system of the LLaVA family in one library.

Importing this package is cheap: PyTorch and transformers are imported when something needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llavakit import hf

if TYPE_CHECKING:
    from llavakit.errors import UserError as UserError
    from llavakit.generation.load import load as load
    from llavakit.model.configuration import LlavakitConfig as LlavakitConfig
    from llavakit.model.modeling import LlavakitForConditionalGeneration as LlavakitForConditionalGeneration
    from llavakit.model.modeling import LlavakitModel as LlavakitModel
    from llavakit.model.processing import LlavakitProcessor as LlavakitProcessor
    from llavakit.system import Claim as Claim
    from llavakit.system import System as System

_LAZY = {
    "Claim": "llavakit.system",
    "LlavakitConfig": "llavakit.model.configuration",
    "LlavakitForConditionalGeneration": "llavakit.model.modeling",
    "LlavakitModel": "llavakit.model.modeling",
    "LlavakitProcessor": "llavakit.model.processing",
    "System": "llavakit.system",
    "UserError": "llavakit.errors",
    "load": "llavakit.generation.load",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value = version("llavakit")
    elif name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'llavakit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


hf.install()
