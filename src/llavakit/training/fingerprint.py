"""What a stage is made of: digests of everything that decides what it learns.

Data and base models count by their content, not by their paths: a run goes on after its files were moved, and does not
go on when they were changed. Files up to `WHOLE` bytes are read; larger ones count by size and time. Of the media a
sample is looked at. The shards of a stream count by name and size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoints.files import read_json
from llavakit.checkpoints.identity import file_identity, model_identity
from llavakit.checkpoints.opening import local_folder
from llavakit.conversation.messages import media_of
from llavakit.data.mixture import Mixture, read_specs
from llavakit.data.paths import is_stream, split_part
from llavakit.data.records import Record, read_record
from llavakit.data.shards import open_shards
from llavakit.errors import RecipeError, RecordError, UserError
from llavakit.registry import OBJECTIVES
from llavakit.training.dataset import source_options
from llavakit.training.recipe import Recipe, Source

STAMP = "training.json"
WHOLE = 256 * 1024**2
MEDIA = 32  # media files per source that are looked at
# Keys that change how a run is watched or stored, not what it learns.
NON_SEMANTIC_KEYS = {"save_steps", "keep", "log_steps", "workers"}
_CONTENT = "content of "


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Content:
    """Content of a recipe's files, each looked at once. None if a file does not exist (any more)."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], str | None] = {}

    def _once(self, kind: str, name: str, compute: Any) -> str | None:
        if (kind, name) not in self._seen:
            try:
                self._seen[kind, name] = compute()
            except (UserError, OSError):  # what is wrong with it is said where it is read
                self._seen[kind, name] = None
        return self._seen[kind, name]

    def of_model(self, name: str) -> str | None:
        """Weights, configuration, tokenizer and processor of a model folder or hub id."""
        return self._once("model", name, lambda: _digest([model_identity(local_folder(name)), _small_files(name)]))

    def of_tokenizer(self, name: str) -> str | None:
        """The files of a tokenizer's folder or hub id."""
        return self._once("tokenizer", name, lambda: _digest(_small_files(name)))

    def of_source(self, source: Source, seed: int, read: Callable[..., Record] = read_record) -> str | None:
        """Records of a source, and a sample of its media.

        Args:
            read: How its entries are read.
        """
        return self._once("data", json.dumps(source.model_dump()), lambda: _source_content(source, seed, read))


def _small_files(name: str) -> list[tuple[str, str]]:
    """Tokenizer, processor and template of a model folder; `model_identity` knows the configurations."""
    folder = local_folder(name)
    skipped = {"config.json", "adapter_config.json", STAMP}
    files = [p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".txt", ".model") and p.name not in skipped]
    return [(path.name, file_identity(path)) for path in sorted(files) if not path.name.endswith(".index.json")]


def _source_content(source: Source, seed: int, read: Callable[..., Record]) -> str:
    specs = read_specs(source_options(source), where=f"data.{source.name}")
    indexed = [spec for spec in specs if not is_stream(spec.path)]
    files = [_path_content(Path(split_part(spec.path)[0])) for spec in indexed]
    files += [_path_content(Path(spec.boxes)) for spec in specs if spec.boxes is not None]
    mixture = Mixture(indexed, seed=seed, check_files=False, read=read)
    streams = [open_shards(s.path, split=s.split, config=s.config).identity() for s in specs if is_stream(s.path)]
    return _digest([files, _media_content(mixture), *streams])


def _path_content(path: Path) -> Any:
    if path.is_dir():
        return [(str(own.relative_to(path)), _path_content(own)) for own in sorted(path.rglob("*")) if own.is_file()]
    stat = path.stat()
    if stat.st_size > WHOLE:
        return [stat.st_size, stat.st_mtime_ns]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _media_content(mixture: Mixture) -> list[Any]:
    found: list[Any] = []
    for index in spread(len(mixture), MEDIA):
        try:
            media = media_of(mixture[index].messages)
        except RecordError:
            continue
        for part in media:
            path = part[part["type"]]
            if isinstance(path, str) and Path(path).is_file():
                found.append(file_identity(Path(path)))
    return found


def spread(total: int, most: int) -> list[int]:
    """At most `most` of the numbers below `total`, evenly spread, first and last among them."""
    if total <= most:
        return list(range(total))
    return [number * (total - 1) // (most - 1) for number in range(most)]


def fingerprint(recipe: Recipe, number: int, content: Content) -> dict[str, str | None]:
    """Digests by section of everything that decides what stage `number` learns, earlier stages included."""
    raw = recipe.model_dump(mode="json")
    sections: dict[str, str | None] = {key: _digest(raw[key]) for key in ("seed", "system")}
    if recipe.parts is None:
        sections[f"{_CONTENT}model"] = content.of_model(str(recipe.model))
    else:
        own = {key: value for key, value in raw["parts"].items() if key not in ("init", "tokenizer")}
        sections["parts"] = _digest(own | {"init": sorted(recipe.parts.init)})
        for part, name in recipe.parts.init.items():
            sections[f"{_CONTENT}parts.init.{part}"] = content.of_model(name)
        if recipe.parts.tokenizer is not None:
            sections[f"{_CONTENT}parts.tokenizer"] = content.of_tokenizer(recipe.parts.tokenizer)
    used = [source for source in recipe.data if any(_uses(recipe, stage, source) for stage in range(number + 1))]
    sections["data"] = _digest([[split_part(source.path)[1], source.weight, source.subset] for source in used])
    for source in used:
        first = next(stage for stage in range(number + 1) if _uses(recipe, stage, source))
        read = OBJECTIVES.get(recipe.stages[first].objective.type)(recipe.stages[first]).read
        sections[f"{_CONTENT}data.{source.name}"] = content.of_source(source, recipe.seed, read)
    for stage in raw["stages"][: number + 1]:
        kept = {key: value for key, value in stage.items() if key not in NON_SEMANTIC_KEYS}
        sections[f"stages.{stage['name']}"] = _digest(kept)
    return sections


def _uses(recipe: Recipe, number: int, source: Source) -> bool:
    wanted = recipe.stages[number].data
    return wanted is None or source.name in wanted


def check_stamp(path: Path, wanted: Mapping[str, str | None], folder: Path) -> None:
    """Refuse to go on with what another recipe, other data or another base made.

    Args:
        path: The stamp that was left.
        wanted: The fingerprint of the recipe that is to go on; sections that are None cannot be compared.
        folder: The stage's folder, for messages.

    Raises:
        RecipeError: Naming what is different.
    """
    found = read_json(path).get("recipe")
    found = found if isinstance(found, dict) else {}
    changed = next((key for key, value in wanted.items() if value is not None and found.get(key) != value), None)
    if changed is None:
        return
    rest = "choose another `output`, or remove the folder to train again"
    if changed.startswith(_CONTENT) and changed in found:
        raise RecipeError(f"{folder}: the {changed} has changed since this was made; put it back, {rest}")
    raise RecipeError(f"{folder}: was made by a recipe with another `{changed.removeprefix(_CONTENT)}`; {rest}")


def stamp_text(stamp: Mapping[str, str | None]) -> str:
    """The content of a stamp file."""
    return json.dumps({"recipe": dict(stamp)}, indent=1) + "\n"
