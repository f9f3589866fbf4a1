"""Pictures and masks that tools made, by id, for as long as a session needs them; bounded in number and bytes."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from llavakit.tools.skill import SkillError


@dataclass(frozen=True)
class Artefact:
    """A picture or a mask.

    Attributes:
        value: An RGB picture, or a boolean matrix [height, width].
        kind: "picture" or "mask".
        size: Bytes that it holds.
        born: As `time.monotonic` counts.
    """

    value: Any
    kind: str
    size: int
    born: float


class Artefacts:
    """What the tools of one session made; the oldest goes when there is no room.

    Args:
        most: Most artefacts.
        most_bytes: Most bytes of all of them.
        seconds: How long one is kept.
        clock: What time it is.

    Attributes:
        picture: What tools see when a call names no picture: the user's.
        mask: The mask that was made last.
    """

    def __init__(
        self,
        picture: Image.Image | None = None,
        *,
        most: int = 64,
        most_bytes: int = 256 * 2**20,
        seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.picture, self.mask = picture, None
        self.most, self.most_bytes, self.seconds, self.clock = most, most_bytes, seconds, clock
        self._kept: OrderedDict[str, Artefact] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, value: Image.Image | np.ndarray) -> str:
        """Keep a picture or a mask; its id cannot be guessed.

        Raises:
            SkillError: If it is larger than all that may be kept.
        """
        if isinstance(value, Image.Image):
            kind, size = "picture", value.width * value.height * len(value.getbands())
        else:
            kind, size = "mask", value.size
            self.mask = value
        if size > self.most_bytes:
            raise SkillError(f"a {kind} of {size} bytes is more than a session may keep")
        name = f"{kind}-{uuid.uuid4().hex}"
        with self._lock:
            self._kept[name] = Artefact(value, kind, size, self.clock())
            self._expire()
            while len(self._kept) > self.most or sum(one.size for one in self._kept.values()) > self.most_bytes:
                self._kept.popitem(last=False)
        return name

    def get(self, name: str, kind: str) -> Any:
        """A picture or mask by its id.

        Raises:
            SkillError: If there is none, or it is of the other kind.
        """
        with self._lock:
            self._expire()
            found = self._kept.get(name)
        if found is None or found.kind != kind:
            raise SkillError(f"there is no {kind} {name[:80]!r} in this session; it may have expired")
        return found.value

    def share(self, other: Artefacts) -> None:
        """Keep things in the same place as another session; its picture and mask stay its own."""
        self._kept, self._lock = other._kept, other._lock

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._kept

    @property
    def held_bytes(self) -> int:
        """What all of them take."""
        with self._lock:
            return sum(one.size for one in self._kept.values())

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    def _expire(self) -> None:
        past = self.clock() - self.seconds
        for name in [name for name, one in self._kept.items() if one.born < past]:
            del self._kept[name]
