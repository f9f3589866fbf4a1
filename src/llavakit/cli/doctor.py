"""What this installation can do: versions, devices, optional extras, and what to type where something is missing.

The module reads package metadata and asks PyTorch for its devices; it changes nothing, and works where PyTorch or
transformers are broken.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

if TYPE_CHECKING:
    from rich.table import Table

PACKAGE = "llavakit"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _requirements() -> list[tuple[Requirement, str | None]]:
    """Everything that the installed metadata asks for, with the extra that asks; references to itself left out."""
    found = []
    for requirement in map(Requirement, requires(PACKAGE) or []):
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", str(requirement.marker or ""))
        if requirement.name != PACKAGE:
            found.append((requirement, extra.group(1) if extra else None))
    return found


def extra_with(module: str) -> str | None:
    """The smallest extra that brings an importable module, None if no extra does."""
    sizes = Counter(extra for _, extra in _requirements())
    bringing = {extra for requirement, extra in _requirements() if requirement.name.replace("-", "_") == module}
    return min(bringing - {None}, key=lambda extra: sizes[extra], default=None)


def _devices() -> dict[str, Any]:
    """Devices by PyTorch's names.

    Raises:
        ImportError, OSError: If PyTorch is missing or its libraries do not load.
    """
    import torch

    devices: dict[str, Any] = {"cpu": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        devices.update({f"xpu:{i}": torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())})
    return devices


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _cache() -> dict[str, Any]:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    folder = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            writable = True
    except OSError:
        writable = False
    return {"path": str(folder), "writable": writable}


def examine() -> dict[str, Any]:
    """Everything that `llavakit doctor` shows, JSON-able.

    `problems` lists what stops llavakit from working as it is, each with what to do; it is empty on a healthy
    installation. Missing extras are not problems.
    """
    problems: list[str] = []
    base: dict[str, str | None] = {}
    extras: dict[str, dict[str, Any]] = {}
    for requirement, extra in _requirements():
        name, installed = requirement.name, _version(requirement.name)
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        wanted = f"{name}{requirement.specifier}"
        if extra is None:
            base[name] = installed
            if not fits:
                have = f"version {installed} is installed" if installed else "it is not installed"
                problems.append(f"{wanted} is needed, {have}: pip install '{wanted}'")
        else:
            entry = extras.setdefault(extra, {"missing": [], "install": f"pip install '{PACKAGE}[{extra}]'"})
            if not fits:
                entry["missing"].append(f"{wanted} ({installed} is installed)" if installed else name)
    try:
        devices, threads = _devices(), _threads()
    except (ImportError, OSError) as error:
        devices, threads = {}, None
        problems.append(f"PyTorch cannot be imported: {error}")
    cache = _cache()
    if not cache["writable"]:
        problems.append(f"the model cache {cache['path']} is not writable: set HF_HOME to a folder that is")
    return {
        "llavakit": _version(PACKAGE),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": base,
        "devices": devices,
        "threads": {"torch": threads, "cores": os.cpu_count()},
        "extras": extras,
        "cache": cache,
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
        "problems": problems,
    }


def table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    out = Table(show_header=False, box=None, pad_edge=False)
    out.add_row("llavakit", f"{report['llavakit']} on Python {report['python']}, {report['platform']}")
    out.add_row("packages", ", ".join(f"{name} {found or 'missing'}" for name, found in report["packages"].items()))
    for name, what in report["devices"].items():
        out.add_row("device", f"{name}: {what}")
    out.add_row("threads", f"{report['threads']['torch']} of {report['threads']['cores']} cores")
    for name, extra in report["extras"].items():
        missing = ", ".join(extra["missing"])
        out.add_row(f"extra {name}", escape(f"missing {missing}; {extra['install']}") if missing else "complete")
    writable = "writable" if report["cache"]["writable"] else "NOT writable"
    out.add_row("model cache", f"{report['cache']['path']}, {writable}{', offline' if report['offline'] else ''}")
    for problem in report["problems"]:
        out.add_row("problem", escape(problem))
    return out
