"""transformers' Auto classes learn of llavakit's model, without `import llavakit` importing transformers.

If the Auto modules are loaded already, registration happens at once. Otherwise a finder in `sys.meta_path` waits for
them: it changes nothing about how a module is found or executed, and only notices when one has been. Registration then
runs as soon as no module of transformers or llavakit is half imported, because registering imports both. When all is
registered the finder removes itself.
"""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."
_REGISTRATIONS = {  # an Auto module whose import calls for it -> function of llavakit.model.registration
    _AUTO + "configuration_auto": "register_config",
    _AUTO + "modeling_auto": "register_models",
    _AUTO + "image_processing_auto": "register_processors",
    _AUTO + "processing_auto": "register_processors",
}


class _Watcher(MetaPathFinder):
    """Follows imports of transformers and llavakit, and registers in the pauses between them."""

    def __init__(self) -> None:
        self.waiting = dict(_REGISTRATIONS)
        self.due: list[str] = []
        self.nesting = threading.local()
        self.registering = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in ("transformers", "llavakit"):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Noticing(spec.loader, self)
        return spec

    def enter(self) -> None:
        self.nesting.depth = getattr(self.nesting, "depth", 0) + 1

    def leave(self, name: str) -> None:
        self.nesting.depth -= 1
        self.notice(name)
        if self.nesting.depth == 0:
            self.register()

    def notice(self, name: str) -> None:
        """A module has been imported; what it calls for becomes due, once."""
        function = self.waiting.get(name)
        if function is not None:
            self.due.append(function)
            self.waiting = {module: other for module, other in self.waiting.items() if other != function}

    def register(self) -> None:
        """Run what is due; imports that this causes do not register a second time inside it."""
        if self.registering:
            return
        self.registering = True
        try:
            while self.due:
                function = self.due.pop(0)
                try:
                    getattr(importlib.import_module("llavakit.model.registration"), function)()
                except Exception as error:  # transformers must stay usable whatever is wrong here
                    reason = " ".join(str(error).split())
                    warnings.warn(f"llavakit: {function} failed, Auto classes lack it: {reason}", stacklevel=2)
        finally:
            self.registering = False
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Noticing(Loader):
    """Stands in for a module's loader during the one call that executes the module."""

    def __init__(self, loader: Loader, watcher: _Watcher) -> None:
        self.loader, self.watcher = loader, watcher

    def __getattr__(self, name: str) -> Any:  # whoever only looks at the spec (runpy, resources) asks the real loader
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__spec__.loader = module.__loader__ = self.loader
        self.watcher.enter()
        try:
            self.loader.exec_module(module)
        finally:
            self.watcher.leave(name)


def install() -> None:
    """Register now what can be, and the rest when transformers' Auto modules are imported."""
    if any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        return
    watcher = _Watcher()
    for module in _REGISTRATIONS:
        if module in sys.modules:
            watcher.notice(module)
    if watcher.waiting:
        sys.meta_path.insert(0, watcher)
    watcher.register()
