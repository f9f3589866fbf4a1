"""What the editing page knows of each browser: its editing session, what it is shown, and how long it is kept.

Nothing here knows the page's framework. An event that a browser sends is checked by the session; what comes of it, or
why nothing does, is one JSON-able view of the whole session.
"""

from __future__ import annotations

import base64
import io
import itertools
import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from llavakit.editing.chat import PictureChat
from llavakit.editing.log import archive
from llavakit.editing.objects import FIRST
from llavakit.editing.session import Backends, Session
from llavakit.editing.tabs import TABS
from llavakit.errors import UserError
from llavakit.generation.responder import Responder
from llavakit.media.policy import Refused
from llavakit.serving.uploads import UploadPolicy, Uploads

LONGEST = 1024  # pixels of the longer side; larger pictures are scaled down, so that an edit takes seconds at most
THUMBNAIL = 96  # pixels of its longer side
LEAST_BYTES = 4 * 2**20  # what a session counts at least, so that their number is bounded too
LAYER_BYTES = 32  # per pixel, of the layers and masks of a selected object
TINT = (255, 0, 170)
_DRAWS = ("generate", "insert", "create")
DONE = {
    "upload": "Opened",
    "remove": "Removed the object",
    "move": "Moved the object",
    "replace": "Replaced the object",
    "insert": "Added",
    "create": "Made a new picture",
}
_VIEWS = itertools.count(1)  # no two views are equal, else a page would not see that there is another one
EXPIRED = "this session has ended; open a picture to begin a new one"


def png(pixels: np.ndarray | Image.Image, level: int = 1) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def offers(backends: Backends) -> dict[str, Any]:
    """What a page over these backends offers: tabs, ways to mark an object, and what is to be said of them."""
    cuts = backends.segmenter is not None and backends.filler is not None
    draws = backends.generator is not None
    return {
        "tabs": [{"name": name, **asdict(tab)} for name, tab in TABS.items() if (draws if tab.draws else cuts)],
        "marks": list(getattr(backends.segmenter, "marks", ("stroke", "box", "points"))) if cuts else [],
        "draws": draws,
        "notes": {kind: note for kind, note in backends.notes.items() if getattr(backends, kind) is not None},
    }


class Desk:
    """One browser's session.

    Args:
        backends: Who does the work.
        responder: Who is talked to.
        most_bytes: Of the pictures of the session.

    Attributes:
        identity: Of the session; another one is begun under another.
        talk: The conversation, as the page shows it: `role`, `content`, and `failed` of what is no answer.
    """

    def __init__(self, backends: Backends, responder: Responder, most_bytes: int) -> None:
        self.backends, self.responder, self.most_bytes = backends, responder, most_bytes
        self._lock, self._talking = threading.Lock(), threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self.identity = secrets.token_hex(8)
        self.session = Session(self.backends, PictureChat(self.responder), most_bytes=self.most_bytes)
        self.talk: list[dict[str, Any]] = []
        self._asked: int | None = None

    @property
    def bytes(self) -> int:
        """What it counts."""
        image, versions = self.session.image, self.session.versions
        pixels = 0 if image is None else image.shape[0] * image.shape[1]
        return max(LEAST_BYTES, LAYER_BYTES * pixels + sum(one.image.nbytes for one in versions))

    def handle(self, event: Mapping[str, Any], upload: Image.Image | None = None) -> dict[str, Any]:
        """Carry out an event of the page; the view after it.

        Args:
            event: As `Session.apply` takes it, with the `session` and the version (`seen`) that the browser showed.
                Beside the session's there are `place` (move and paste), and `begin` (leave everything).
            upload: The picture of an `upload`.
        """
        given = dict(event)
        shown = given.pop("session", None), given.pop("seen", None)
        with self._lock:
            try:
                return self._view(self._done(given, shown, upload))
            except UserError as error:
                return self._view(str(error), failed=True)

    def _done(self, given: dict[str, Any], shown: tuple[Any, Any], upload: Image.Image | None) -> str:
        op = given.get("op")
        if op == "begin":
            self._begin()
            return "Open a picture to begin"
        if op == "chat":
            raise UserError("chat: is no event of the picture")
        if op == "upload":
            if upload is None:
                raise UserError("upload: holds no picture")
            given = {"op": op, "image": _scaled(upload)}
        elif shown[0] != self.identity:
            raise UserError(EXPIRED)
        elif shown[1] != self.session.current:
            raise UserError("the picture was changed in another window meanwhile; it is shown as it is now")
        if op in _DRAWS and (op != "generate" or given.get("text")):
            given.setdefault("seed", secrets.randbelow(2**31))  # in the log, so that a replay draws the same
        if op == "place":
            self.session.apply(given | {"op": "move"})
            given = {"op": "generate"}
        found = self.session.apply(given)
        return self._said(op, found, upload)

    def _said(self, op: Any, found: Mapping[str, Any], upload: Image.Image | None) -> str:
        if op == "segment":
            objects = self.session.objects
            said = f"Selected: {objects.found.labels[FIRST]}, {100 * objects.mask.mean():.1f} % of the picture"
            more = len(objects.found.labels) - 1
            return said + (f"; {more} more found, see Next" if more else "")
        if op in ("move", "dilate"):
            return f"The hole is grown by {self.session.objects.dilation} pixels"
        current = self.session.versions[self.session.current]
        said = f"Picture {current.number}: {DONE.get(current.op, current.op).lower()}"
        if upload is not None and max(upload.size) > LONGEST:
            said += f", scaled down from {upload.width} x {upload.height} pixels"
        return said

    def view(self) -> dict[str, Any]:
        """What the page shows."""
        with self._lock:
            return self._view("Open a picture to begin" if self.session.image is None else "")

    def _view(self, note: str, failed: bool = False) -> dict[str, Any]:
        session = self.session
        return {
            "view": next(_VIEWS),
            "session": self.identity,
            "version": session.current,
            "size": None if session.image is None else [session.image.shape[1], session.image.shape[0]],
            "versions": [
                {"number": one.number, "op": one.op, "parent": one.parent, "said": DONE.get(one.op, one.op)}
                for one in session.versions
            ],
            "undo": session.can_undo,
            "redo": session.can_redo,
            "object": self._object(),
            "note": note,
            "failed": failed,
        }

    def _object(self) -> dict[str, Any] | None:
        """The selected object where it was dragged, its pixels as a tint that is otherwise transparent."""
        objects = self.session.objects
        layer = None if objects is None else objects.changed[-1]
        if layer is None or layer.box is None:
            return None
        tint = Image.fromarray((layer.pixels[..., 3] == layer.id).astype(np.uint8)).convert("P")
        tint.putpalette([0, 0, 0, *TINT])
        tint.info["transparency"] = 0
        address = f"data:image/png;base64,{base64.b64encode(png(tint)).decode()}"
        count = len(objects.found.labels)
        found = {"label": layer.label, "box": list(layer.box), "count": count, "dilation": objects.dilation}
        return found | {"tint": address}

    def picture(self, number: int, small: bool = False) -> bytes | None:
        """A version as PNG; None if there is none of this number."""
        if not 0 <= number < len(self.session.versions):
            return None
        image = Image.fromarray(self.session.versions[number].image)
        if small:
            image.thumbnail((THUMBNAIL, THUMBNAIL))
        return png(image)

    def saved(self) -> bytes:
        """The session as `llavakit replay` takes it."""
        with self._lock:
            return archive(self.session)

    def forget(self) -> None:
        """Begin the conversation anew."""
        with self._lock:
            self.talk, self._asked = [], None
            self.session.forget()

    def say(self, text: str) -> Iterator[list[dict[str, Any]]]:
        """Ask about the current picture; the conversation as the answer grows."""
        text = text.strip()
        if not text:
            return
        if not self._talking.acquire(blocking=False):
            raise UserError("the model is still answering; wait, or stop it")
        try:
            session, talk = self.session, self.talk
            about, self._asked = self._asked, session.current
            said = text if about == session.current else f"(picture {session.current}) {text}"
            talk.append({"role": "user", "content": said})
            answer = {"role": "assistant", "content": ""}
            yield [*talk, answer]
            try:
                for answer["content"] in session.talk(text):
                    yield [*talk, answer]
            except UserError as error:
                answer = {"role": "assistant", "content": str(error), "failed": True}
            except GeneratorExit:
                self._asked = about
                answer = {"role": "assistant", "content": "Stopped", "failed": True}
                raise
            finally:
                talk.append(answer)
            yield list(talk)
        finally:
            self._talking.release()


def _scaled(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    if max(image.size) > LONGEST:
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return image


class Desks:
    """All sessions of the page, each of the browser that began it.

    Args:
        backends: Who does the work.
        responder: Who is talked to.
        policy: How much is kept, and for how long.
    """

    def __init__(self, backends: Backends, responder: Responder, policy: UploadPolicy) -> None:
        self.backends, self.responder, self.policy = backends, responder, policy
        self._kept: Uploads[Desk] = Uploads(policy)

    def of(self, browser: str, owner: str = "") -> Desk:
        """A browser's desk, a new one if it has none; counts what it holds by now.

        Args:
            owner: Of the key; the desks of one key share a quota.

        Raises:
            Refused: If there is no room.
        """
        desk = self.known(browser)
        if desk is None:
            desk = self.new()
        self._kept.add(browser, "desk", desk, desk.bytes, owner or None)
        return desk

    def new(self) -> Desk:
        """A desk that nobody has."""
        return Desk(self.backends, self.responder, self.policy.owner_bytes // 2)

    def known(self, browser: str | None) -> Desk | None:
        """The desk of a browser, if it has one."""
        try:
            return self._kept.get(browser or "", "desk")
        except Refused:
            return None

    def expire(self) -> None:
        """Forget desks that were not used for too long."""
        self._kept.expire()
