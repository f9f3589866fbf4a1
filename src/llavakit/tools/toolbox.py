"""Running skills for somebody else: a model, a client of MCP, a page.

Whatever a call names is checked before the skill sees it, and whatever a skill does ends in one `Result`: an unknown
name, arguments that do not fit, a picture that cannot be opened, a skill that fails, hangs or answers too much are
its `error`, one line for the model and the user. Results are data; nothing in them is evaluated.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from llavakit.conversation.turns import Tool
from llavakit.data.strict_json import JsonError, parse_json
from llavakit.errors import UserError, quoted, shorten
from llavakit.media.image import load_image
from llavakit.media.policy import MediaPolicy, Refused, decode_data_url
from llavakit.registry import nearest
from llavakit.tools.artefacts import Artefacts
from llavakit.tools.rle import decode_mask, encode_mask
from llavakit.tools.skill import IMAGE, MASK, Outcome, Skill, SkillError


@dataclass(frozen=True)
class Limits:
    """What one call may take.

    Attributes:
        seconds: Longest time.
        argument_bytes: Longest arguments as JSON, data URLs of pictures aside.
        result_bytes: Largest figures and texts of a result as JSON.
        pictures, masks: Most of them in a result.
        pixels: Of the largest picture or mask in a result.
        hanging: Calls of one skill that may still be running when nobody waits for them any longer; when there are as
            many, further calls fail at once.
    """

    seconds: float = 60.0
    argument_bytes: int = 64 * 2**10
    result_bytes: int = 256 * 2**10
    pictures: int = 16
    masks: int = 256
    pixels: int = 50_000_000
    hanging: int = 4


@dataclass
class Result:
    """What became of a call.

    Attributes:
        name: The skill.
        data: What it found, JSON-able.
        pictures: RGB pictures by name.
        masks: Boolean matrices [height, width].
        artefacts: Ids of pictures (by name) and masks (`mask`, `mask-2`, ...) in the session.
        error: What went wrong, for the model and the user; None if nothing did.
        seconds: How long it took.
    """

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    masks: tuple[np.ndarray, ...] = ()
    artefacts: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0

    def text(self) -> str:
        """The result as JSON for a model that reads text."""
        if self.error is not None:
            return json.dumps({"error": self.error}, ensure_ascii=False)
        return json.dumps(self.data | ({"artefacts": self.artefacts} if self.artefacts else {}), ensure_ascii=False)

    def whole(self) -> dict[str, Any]:
        """Everything but pictures, masks as COCO run lengths."""
        found = dict(self.data)
        if self.masks:
            found["masks_rle"] = [encode_mask(mask) for mask in self.masks]
        return found | ({"artefacts": self.artefacts} if self.artefacts else {})


class Toolbox:
    """Skills that may be called by name.

    Args:
        skills: The skills; a later one of the same name replaces an earlier one.
        allow: Effects that are allowed (`WRITES`, `FETCHES`); skills with others are refused.
        limits: Of every call.
        media: What may be opened when an argument names a picture by address.
    """

    def __init__(
        self,
        skills: Iterable[Skill],
        *,
        allow: Iterable[str] = (),
        limits: Limits | None = None,
        media: MediaPolicy | None = None,
    ) -> None:
        self.skills = {skill.name: skill for skill in skills}
        self.allow, self.limits, self.media = frozenset(allow), limits or Limits(), media or MediaPolicy(fetch=False)
        self._hanging: dict[str, int] = {}
        self._alone = {name: threading.Lock() for name, skill in self.skills.items() if not skill.shared}
        self._guard = threading.Lock()

    def state(self, skill: Skill) -> str | None:
        """Why a skill cannot be called here; None if it can."""
        if skill.missing:
            return skill.missing
        refused = sorted(skill.effects - self.allow)
        return f"it {' and '.join(refused)}, which is not allowed (allow: {refused})" if refused else None

    def ready(self) -> list[Skill]:
        """The skills that can be called."""
        return [skill for skill in self.skills.values() if self.state(skill) is None]

    def tools(self) -> list[Tool]:
        """The skills that can be called, as models are told of them."""
        return [skill.tool() for skill in self.ready()]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.skills

    def call(self, name: str, arguments: Any = None, artefacts: Artefacts | None = None) -> Result:
        """Run a skill; whatever goes wrong is the result's `error`.

        Args:
            arguments: A mapping, or JSON text of one. Pictures and masks may be open already, or named by id, data URL
                or address; a picture that is not named is the session's, a mask the one that was made last.
            artefacts: Of the session; takes what the skill makes.
        """
        began = time.perf_counter()
        artefacts = artefacts if artefacts is not None else Artefacts()
        result = Result(str(name))
        try:
            skill = self._skill(name)
            result = self._result(skill, self._run(skill, self._arguments(skill, arguments, artefacts)), artefacts)
        except UserError as error:
            result.error = " ".join(str(error).split())
        result.seconds = time.perf_counter() - began
        return result

    def _skill(self, name: Any) -> Skill:
        if not isinstance(name, str) or name not in self.skills:
            raise SkillError(f"there is no tool {quoted(name)}{nearest(str(name), list(self.skills))}")
        skill = self.skills[name]
        why = self.state(skill)
        if why is not None:
            raise SkillError(f"{name}: cannot be called here: {why}")
        return skill

    # ------------------------------------------------------------------ arguments

    def _arguments(self, skill: Skill, given: Any, artefacts: Artefacts) -> dict[str, Any]:
        if isinstance(given, str):
            try:
                given = parse_json(given)
            except JsonError as error:
                raise SkillError(f"{skill.name}: the arguments are not JSON: {error}") from None
        if not isinstance(given or {}, Mapping):
            raise SkillError(f"{skill.name}: the arguments must be an object, not {quoted(given)}")
        given = dict(given or {})
        media = {name: given.pop(name) for name in skill.opened(IMAGE) + skill.opened(MASK) if name in given}
        self._check(skill, given, media)
        for name in skill.opened(IMAGE):
            given[name] = self._picture(media[name], f"{skill.name}: {name}", artefacts) if name in media else None
            if given[name] is None and name == IMAGE:
                given[name] = artefacts.picture
            if given[name] is None:
                del given[name]
                if name in skill.needed:
                    raise SkillError(f"{skill.name}: needs a picture; none was given")
        for name in skill.opened(MASK):
            found = self._mask(media[name], f"{skill.name}: {name}", artefacts) if name in media else None
            if found is None and name == MASK:
                found = artefacts.mask
            if found is None and name in skill.needed:
                raise SkillError(f"{skill.name}: needs a mask; none was made before")
            if found is not None:
                given[name] = found
        return given

    def _check(self, skill: Skill, given: Mapping[str, Any], media: Mapping[str, Any]) -> None:
        try:
            size = len(json.dumps(given, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            raise SkillError(f"{skill.name}: the arguments must be JSON values with finite numbers") from None
        if size > self.limits.argument_bytes:
            raise SkillError(f"{skill.name}: the arguments take {size} bytes; {self.limits.argument_bytes} are allowed")
        schema = dict(skill.parameters)
        hidden = {*skill.opened(IMAGE), *skill.opened(MASK)}
        schema["required"] = [name for name in schema.get("required", ()) if name not in hidden]
        problem = mismatch(given, schema)
        if problem:
            raise SkillError(f"{skill.name}: {problem}")

    def _picture(self, value: Any, where: str, artefacts: Artefacts) -> Image.Image | None:
        if value is None:
            return None
        if isinstance(value, Image.Image):
            return value.convert("RGB")
        if not isinstance(value, str):
            raise SkillError(f"{where}: must be the id, data URL or address of a picture, not {quoted(value)}")
        if value in artefacts or value.startswith("picture-"):
            return artefacts.get(value, "picture")
        limits = self.media.limits
        try:
            if value.startswith("data:"):
                return load_image(decode_data_url(value, self.media.file_bytes), limits=limits)
            if "://" in value:
                if not self.media.fetch and not value.startswith("file:"):
                    raise SkillError(f"{where}: addresses are not fetched here; send the picture itself")
                from llavakit.media.fetch import read_url

                return load_image(read_url(value, self.media), limits=limits)
        except Refused as error:
            raise SkillError(f"{where}: {error}") from None
        raise SkillError(f"{where}: {quoted(value)} is no id of a picture, data URL or address")

    def _mask(self, value: Any, where: str, artefacts: Artefacts) -> np.ndarray | None:
        if value is None:
            return None
        if isinstance(value, np.ndarray):
            return value.astype(bool)
        if isinstance(value, Mapping):
            return decode_mask(value, where)
        if isinstance(value, str) and (value in artefacts or value.startswith("mask-")):
            return artefacts.get(value, "mask")
        found = self._picture(value, where, artefacts)
        return None if found is None else np.asarray(found.convert("L")) > 127

    # ------------------------------------------------------------------ running

    def _run(self, skill: Skill, arguments: Mapping[str, Any]) -> Outcome:
        """The outcome of a skill, in a thread that is left alone when its time is over."""
        with self._guard:
            if self._hanging.get(skill.name, 0) >= self.limits.hanging:
                raise SkillError(
                    f"{skill.name}: does not answer; {self.limits.hanging} earlier calls are still running"
                )
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        waited_for = threading.Event()
        waited_for.set()

        def work() -> None:
            alone = self._alone.get(skill.name)
            try:
                if alone is None:
                    answers.put(skill(**arguments))
                else:
                    with alone:
                        answers.put(skill(**arguments) if waited_for.is_set() else None)
            except BaseException as error:  # a skill may be anybody's code
                answers.put(error)
            with self._guard:
                if not waited_for.is_set():
                    self._hanging[skill.name] -= 1

        threading.Thread(target=work, name=f"tool-{skill.name}", daemon=True).start()
        try:
            found = answers.get(timeout=self.limits.seconds)
        except queue.Empty:
            with self._guard:
                waited_for.clear()
                self._hanging[skill.name] = self._hanging.get(skill.name, 0) + 1
            raise SkillError(f"{skill.name}: gave no answer within {self.limits.seconds:g} s") from None
        if isinstance(found, UserError):
            raise found
        if isinstance(found, BaseException):
            said = " ".join(str(found).split())
            raise SkillError(f"{skill.name}: failed ({type(found).__name__}{f': {shorten(said)}' if said else ''})")
        return found

    def _result(self, skill: Skill, found: Any, artefacts: Artefacts) -> Result:
        """An outcome within its limits."""
        limits, name = self.limits, skill.name
        if not isinstance(found, Outcome):
            raise SkillError(f"{name}: answered with {type(found).__name__}, not an Outcome")
        try:
            data = json.loads(json.dumps(dict(found.data), default=_plain))
        except (TypeError, ValueError, RecursionError):
            raise SkillError(f"{name}: its result is not made of JSON values") from None
        size = len(json.dumps(data).encode("utf-8", "replace"))
        if size > limits.result_bytes:
            raise SkillError(f"{name}: its result takes {size} bytes; {limits.result_bytes} are allowed")
        if _unfinished(data):
            raise SkillError(f"{name}: its result holds numbers that are not finite")
        if len(found.pictures) > limits.pictures or len(found.masks) > limits.masks:
            raise SkillError(f"{name}: its result holds more pictures or masks than are allowed")
        masks = tuple(np.asarray(one).astype(bool) for one in found.masks)
        sizes = [one.width * one.height for one in found.pictures.values()] + [one.size for one in masks]
        if max(sizes, default=0) > limits.pixels:
            raise SkillError(f"{name}: its result holds a picture of more than {limits.pixels:,} pixels")
        pictures = {key: one.convert("RGB") for key, one in found.pictures.items()}
        kept = {key: artefacts.add(one) for key, one in pictures.items()}
        for number, one in reversed(list(enumerate(masks, 1))):  # the first one is the session's mask afterwards
            kept["mask" if number == 1 else f"mask-{number}"] = artefacts.add(one)
        return Result(name, data, pictures, masks, kept)


def mismatch(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> str | None:
    """What does not fit a JSON schema, in one line that names the argument; None if all fits.

    Raises:
        UserError: If the schema itself is none.
    """
    try:
        import jsonschema
        import referencing
    except ImportError:
        raise UserError("jsonschema is needed to call tools; pip install 'llavakit[tools]'") from None
    try:
        # without a registry of its own, jsonschema fetches what a schema refers to
        validator = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
        errors = sorted(validator.iter_errors(dict(arguments)), key=lambda error: list(map(str, error.absolute_path)))
    except Exception as error:  # of a schema that somebody else wrote
        raise UserError(f"the schema of the arguments is broken: {shorten(' '.join(str(error).split()))}") from None
    if not errors:
        return None
    place = ".".join(map(str, errors[0].absolute_path))
    return f"{f'{place}: ' if place else ''}{shorten(' '.join(errors[0].message.split()))}"


def _plain(value: Any) -> Any:
    """Figures of NumPy as Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(type(value).__name__)


def _unfinished(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_unfinished, value.values()))
    if isinstance(value, list):
        return any(map(_unfinished, value))
    return isinstance(value, float) and not math.isfinite(value)


def renamed(skill: Skill, name: str) -> Skill:
    """The skill under another name, as a model may have learned it."""
    return replace(skill, name=name)
