"""Which model an adapter was trained on: recorded beside it by place and by content, and found again.

adapter/
  adapter_config.json         PEFT's options; `base_model_name_or_path` is what other tools read
  adapter_model.safetensors   PEFT's tensors, modules that were trained in full among them
  adapter_base.json           where the base was, relative to this folder and in full, and its identity
  trained_parameters.safetensors   parameters trained in full that no module of PEFT's can hold
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from llavakit.checkpoints.adapters import CONFIG
from llavakit.checkpoints.files import read_json
from llavakit.checkpoints.identity import model_identity
from llavakit.errors import CheckpointError

RECORD = "adapter_base.json"
TRAINED = "trained_parameters.safetensors"


class OtherBase(UserWarning):
    """An adapter is put on another model than the one it was trained on."""


def record_base(folder: Path, base: Path, place: Path | None = None) -> None:
    """Write down which model an adapter belongs to.

    Args:
        folder: The adapter's folder.
        base: The model's folder.
        place: Where `folder` will be in the end, if it is moved there.
    """
    record = {
        "relative": os.path.relpath(base.absolute(), (place or folder).absolute()),
        "absolute": str(base.absolute()),
        "identity": model_identity(base),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def move_record(folder: Path, source: Path, target: Path) -> None:
    """Correct the record in a copy of an adapter's folder.

    Args:
        folder: The copy.
        source: What it is a copy of.
        target: Where the copy will be in the end.
    """
    if not (folder / RECORD).is_file():
        return
    record = read_json(folder / RECORD)
    base = source.absolute() / str(record["relative"])
    (folder / RECORD).unlink()  # it may be a link to the original
    record["relative"] = os.path.relpath(base, target.absolute())
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def find_base(folder: Path, given: str | Path | None = None) -> str | Path:
    """The model that an adapter belongs to: a folder, or a hub id.

    Args:
        given: Take this one, whatever the adapter says; a warning says so if its content is another.

    Raises:
        CheckpointError: If the model is not where it was, or is not what it was.
    """
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    if given is not None:
        if Path(given).is_dir() and record and model_identity(Path(given)) != record.get("identity"):
            warnings.warn(
                f"{folder}: the adapter was trained on another model than {given} (their contents differ)",
                OtherBase,
                stacklevel=2,
            )
        return given
    named = read_json(folder / CONFIG).get("base_model_name_or_path")
    places = [folder / str(record["relative"])] if record.get("relative") else []
    places += [Path(str(place)) for place in (record.get("absolute"), named) if place]
    for place in places:
        if not place.is_dir():
            continue
        if record and model_identity(place) != record.get("identity"):
            raise CheckpointError(
                f"{folder}: its base {place} is not the model that the adapter was trained on any more "
                "(the content differs); name the right one with --base"
            )
        return place.resolve()
    if named and not record and str(named).count("/") == 1 and not str(named).startswith((".", "/", "~")):
        return str(named)  # of the hub
    where = f"{places[0]} is not a folder" if places else f"{CONFIG} names none"
    raise CheckpointError(f"{folder}: holds an adapter without its base model ({where}); name it with --base")
