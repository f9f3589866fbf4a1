"""Which skills there are: those of the registry, as a YAML file chooses and configures them.

    skills:
      ocr: {}
      grounding_dino: {type: detect_shapes}     # under another name, as a model may have learned it
      sam: {model: weights/sam-vit-base}
      encyclopedia: {type: retrieve, store: runs/store}
    mcp:                                        # every tool of these servers becomes a skill
      files: {command: [python, server.py]}
      remote: {url: "https://tools.example/mcp", headers: {Authorization: "Bearer ..."}}
    allow: [fetches]                            # effects; none by default
    limits: {seconds: 30}
    media: {fetch: true}                        # whether pictures are fetched by address; not by default

Without a file: every skill of the registry, of which those that need weights say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit.errors import UserError, quoted
from llavakit.media.policy import MediaPolicy
from llavakit.registry import SKILLS, nearest
from llavakit.tools.skill import FETCHES, WRITES, Skill
from llavakit.tools.toolbox import Limits, Toolbox, renamed

_KEYS = ("skills", "mcp", "allow", "limits", "media")
_MEDIA = ("fetch", "file_bytes", "seconds")


def build_skill(name: str, options: Mapping[str, Any] | None = None, where: str = "skills") -> Skill:
    """A skill of the registry.

    Args:
        name: What it is to be called.
        options: `type` is its name in the registry, if that is another one; the rest is its own.

    Raises:
        UserError: If there is no such skill or option.
    """
    if not isinstance(options or {}, Mapping):
        raise UserError(f"{where}.{name}: must be a mapping of options, not {quoted(options)}")
    try:
        return renamed(SKILLS.build({"type": name, **(options or {})}), name)
    except UserError as error:
        raise UserError(f"{where}.{name}: {error}") from None


def all_skills() -> Iterator[Skill]:
    """Every skill of the registry, as far as it goes without configuration."""
    for name in SKILLS:
        yield build_skill(name)


def load_toolbox(source: str | Path | Mapping[str, Any] | None = None) -> Toolbox:
    """The skills of a configuration.

    Args:
        source: A YAML file, its content, or None for every skill of the registry.

    Raises:
        UserError: If something in it is wrong, or a server of MCP cannot be reached.
    """
    if source is None:
        return Toolbox(all_skills())
    where, config = ("tools", source) if isinstance(source, Mapping) else (str(source), _read(Path(source)))
    for key in config:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {quoted(key)}{nearest(str(key), list(_KEYS))}")
    chosen = _mapping(config.get("skills"), f"{where}: skills")
    skills = [build_skill(str(name), options, f"{where}: skills") for name, options in chosen.items()]
    servers = _mapping(config.get("mcp"), f"{where}: mcp")
    if servers:
        from llavakit.tools.mcp_client import skills_of

        for name, options in servers.items():
            skills += skills_of(str(name), _mapping(options, f"{where}: mcp.{name}"))
    return Toolbox(
        skills,
        allow=_allowed(config.get("allow"), where),
        limits=_dataclass(Limits, config.get("limits"), f"{where}: limits"),
        media=_dataclass(MediaPolicy, {"fetch": False} | _mapping(config.get("media"), f"{where}: media"), where),
    )


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    return _mapping(found, str(path))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value if value is not None else {}, Mapping):
        raise UserError(f"{where}: must be a mapping, not {quoted(value)}")
    return dict(value or {})


def _allowed(value: Any, where: str) -> tuple[str, ...]:
    allowed = [] if value is None else value
    if not isinstance(allowed, list) or any(one not in (FETCHES, WRITES) for one in allowed):
        raise UserError(f"{where}: allow must be a list of {FETCHES!r} and {WRITES!r}, not {quoted(value)}")
    return tuple(allowed)


def _dataclass(cls: Any, value: Any, where: str) -> Any:
    known = {entry.name: entry.type for entry in dataclasses.fields(cls)}
    known = known if cls is Limits else {name: known[name] for name in _MEDIA}
    given = _mapping(value, where)
    for name, one in given.items():
        if name not in known:
            raise UserError(f"{where}: unknown key {quoted(name)}{nearest(str(name), list(known))}")
        flag = name == "fetch"
        if isinstance(one, bool) != flag or not isinstance(one, (bool, int, float)) or (not flag and one <= 0):
            raise UserError(f"{where}: {name} must be {'true or false' if flag else 'a number above 0'}")
        if known[name] == "int" and int(one) != one:
            raise UserError(f"{where}: {name} must be a whole number, not {quoted(one)}")
    return cls(**given)
