"""Optional packages of the extra `eval`."""

from __future__ import annotations

import importlib
from types import ModuleType

from llavakit.errors import UserError


def need(module: str) -> ModuleType:
    """An optional module.

    Raises:
        UserError: If it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise UserError(f"this needs {package}: pip install 'llavakit[eval]'") from error
