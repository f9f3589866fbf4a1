"""What a skill is: a name, a JSON schema, a callable, what it needs, and whether it can run here.

A skill is a plain function of pictures, masks and JSON values that returns an `Outcome`. Properties of its schema with
`"format": "image"` reach it as RGB pictures, those with `"format": "mask"` as matrices of booleans; whoever calls it by
text (a model, an MCP client, a page) names them by id, data URL or address, and `Toolbox` opens them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from llavakit.conversation.turns import Tool
from llavakit.errors import UserError

IMAGE, MASK = "image", "mask"  # formats of properties
WRITES, FETCHES = "writes", "fetches"  # effects that have to be allowed


class SkillError(UserError):
    """A call that a skill cannot answer; the message is for the model and the user."""


@dataclass(frozen=True)
class Outcome:
    """What a skill found.

    Attributes:
        data: JSON-able figures and texts; boxes are [x0, y0, x1, y1] in fractions of the picture.
        pictures: RGB pictures by name (`edited_image`, `image_seg`).
        masks: Boolean matrices [height, width].
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    masks: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skill:
    """Something that a model or a person can have done.

    Attributes:
        name: What it is called by.
        description: What it does, for models and people.
        parameters: JSON schema of its arguments, of type object.
        function: Called with the arguments by keyword.
        needs: Packages and weights, in words.
        missing: Why it cannot run here; None if it can.
        effects: `WRITES` if it changes something outside its result, `FETCHES` if it reaches into a network; either
            has to be allowed.
        shared: Whether calls may run at the same time.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Outcome]
    needs: tuple[str, ...] = ()
    missing: str | None = None
    effects: frozenset[str] = frozenset()
    shared: bool = True

    def __call__(self, **arguments: Any) -> Outcome:
        """Run it on pictures and masks that are open already.

        Raises:
            SkillError: If it cannot run here, or cannot answer this call.
        """
        if self.missing:
            raise SkillError(f"{self.name}: {self.missing}")
        return self.function(**arguments)

    @property
    def properties(self) -> Mapping[str, Mapping[str, Any]]:
        """Schemas of the arguments by name."""
        return self.parameters.get("properties", {})

    def opened(self, kind: str) -> list[str]:
        """Names of the arguments that are pictures (`IMAGE`) or masks (`MASK`)."""
        return [name for name, schema in self.properties.items() if schema.get("format") == kind]

    @property
    def needed(self) -> list[str]:
        """Arguments without which it cannot run; those called `image` and `mask` are, unless they have a default."""
        given = [name for name in (IMAGE, MASK) if name in self.properties and "default" not in self.properties[name]]
        return list(dict.fromkeys([*self.parameters.get("required", ()), *given]))

    def tool(self) -> Tool:
        """The skill as a model is told of it: without the pictures and masks that are filled in for it."""
        hidden = {*self.opened(IMAGE), *self.opened(MASK)}
        schema = dict(self.parameters)
        schema["properties"] = {name: own for name, own in self.properties.items() if name not in hidden}
        required = [name for name in schema.pop("required", ()) if name not in hidden]
        return Tool(self.name, self.description, schema | ({"required": required} if required else {}))


def parameters(required: tuple[str, ...] = (), **properties: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema of arguments that allows no others."""
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": list(required)} if required else {})


def picture(description: str = "The picture: an id, a data URL or an address.") -> dict[str, Any]:
    """Schema of an argument that is a picture."""
    return {"type": "string", "format": IMAGE, "description": description}


def mask(description: str = "The area: an id, a data URL, or COCO run lengths.") -> dict[str, Any]:
    """Schema of an argument that is a mask."""
    return {"type": ["string", "object"], "format": MASK, "description": description}


def number(description: str, low: float, high: float, default: float | None = None) -> dict[str, Any]:
    """Schema of a number in a range."""
    schema = {"type": "number", "minimum": low, "maximum": high, "description": description}
    return schema | ({} if default is None else {"default": default})


FRACTION = {"type": "number", "minimum": 0, "maximum": 1}
POINT = {"type": "array", "items": FRACTION, "minItems": 2, "maxItems": 2}
BOX = {"type": "array", "items": FRACTION, "minItems": 4, "maxItems": 4}


def absent(module: str, package: str, extra: str | None = None) -> str | None:
    """Why a skill that imports this module cannot run here; None if it can."""
    if importlib.util.find_spec(module) is not None:
        return None
    return f"{package} is not installed; pip install {repr(f'llavakit[{extra}]') if extra else package}"
