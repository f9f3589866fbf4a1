"""Files of the web app: what a browser may name, and the one function that opens it.

Everything that comes back from a browser is input, also what the page put there itself: a conversation, an upload, an
example. A path in it is worth nothing until `PageFiles.locate` has found it among the uploads of the same session, or
among the files that the page offers to everybody. `PageGuard` stands in front of the page's framework and checks every
event, upload and download in this way, whatever the framework itself checks; it lets through only the operations that
the page uses.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from anyio import to_thread
from starlette.responses import FileResponse, JSONResponse

from llavakit.data.strict_json import JsonError, parse_json
from llavakit.media.policy import Refused
from llavakit.serving.access import PAGES, Sessions
from llavakit.serving.uploads import UploadPolicy, Uploads

FILES = "/gradio_api/file="
UPLOAD = "/gradio_api/upload"
EVENTS = frozenset(f"/gradio_api/{name}" for name in ("run/predict", "queue/join", "cancel", "reset"))
# What the page needs besides its files; everything else that the framework offers stays closed.
_PLAIN = re.compile(
    r"/|/editing|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/assets/.+|/static/.+"
    r"|/gradio_api/(upload_progress|queue/data|heartbeat/\w+)"
)
_SHOWN = re.compile(r"^(image/(png|jpeg|gif|webp|bmp|avif)|video/(mp4|webm|ogg|quicktime))$")
_NAMED = frozenset({"path", "url", "file", "files"})  # keys under which the framework looks for files
_MOST_DEPTH = 64


class PageFiles:
    """The files that one page knows.

    Args:
        folder: Where the page's framework puts uploads; nothing else should write there.
        file_bytes: Largest file.
        policy: How many uploads are kept, and for how long.
    """

    def __init__(self, folder: Path, file_bytes: int, policy: UploadPolicy | None = None) -> None:
        self.folder, self.file_bytes = folder.resolve(), file_bytes
        self.uploads: Uploads[Path] = Uploads(policy or UploadPolicy(), self._delete)
        self._shared: set[Path] = set()

    def share(self, path: Path) -> None:
        """Let every session use a file of the page's own."""
        self._shared.add(path.resolve(strict=True))

    def add(self, session: str, path: str, account: str | None = None) -> None:
        """Note that a session uploaded a file; one for which there is no room is deleted.

        Args:
            account: Whose quota it counts for, if not the session's.

        Raises:
            Refused: If there is no room, or the file lies outside the folder of uploads.
        """
        found = Path(path).resolve()
        if not found.is_relative_to(self.folder) or not found.is_file():
            raise Refused("the upload was kept outside the folder of uploads", 500)
        try:
            self.uploads.add(session, str(found), found, found.stat().st_size, account)
        except Refused:
            self._delete(found)
            raise

    def _delete(self, path: Path) -> None:
        """Remove a file that nobody holds any more, and the folder that the framework made for it."""
        if path not in self._shared and not self.uploads.known(str(path)):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is not empty
                if path.parent != self.folder:
                    path.parent.rmdir()

    def tidy(self, seconds: float = 600.0) -> None:
        """Forget uploads that are too old, and remove what the framework left behind."""
        self.uploads.expire()
        oldest = time.time() - seconds
        for path in list(self.folder.rglob("*")):
            with contextlib.suppress(OSError):
                if path.is_file() and path.stat().st_mtime < oldest:
                    self._delete(path)

    def locate(self, session: str | None, path: Any) -> Path:
        """The file that a browser means, resolved.

        Raises:
            Refused: If it is no upload of this session and nothing that the page offers.
        """
        refused = Refused("this file is not an upload of this session; upload it (again)", 403)
        if not isinstance(path, str):
            raise refused
        named = Path(os.path.normpath(path))  # the file system is not asked about paths that nobody uploaded
        try:
            if named not in self._shared:
                self.uploads.get(session or "", str(named))
            if named.resolve(strict=True) != named:
                raise refused
        except (Refused, OSError, RuntimeError):
            raise refused from None
        return named

    def open(self, session: str | None, path: Any) -> bytes:
        """The content of a file that a browser named: the only place where the page opens one.

        Raises:
            Refused: If the session may not read it, or it is no file of the allowed size.
        """
        found = self.locate(session, path)
        try:
            descriptor = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise Refused("the file is gone; upload it again", 404) from None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > self.file_bytes:
                raise Refused(f"the upload is no file of at most {self.file_bytes} bytes", 413)
            return file.read(self.file_bytes)

    def check(self, session: str | None, value: Any) -> None:
        """Refuse a value from a browser that names a file which `locate` does not know, at any depth.

        Raises:
            Refused: With 403 for a file, 400 for what no event of the page holds.
        """
        for name in _named_files(value):
            self.locate(session, name)


def _named_files(value: Any) -> Iterator[Any]:
    """Whatever stands in a value where the page's framework would look for a file."""
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > _MOST_DEPTH:
            raise Refused(f"the event is nested more than {_MOST_DEPTH} levels deep")
        if isinstance(node, list):
            waiting += ((item, depth + 1) for item in node)
            continue
        if not isinstance(node, dict):
            continue
        if "component" in node or "constructor_args" in node:
            raise Refused("a conversation holds texts and files, no components", 403)
        for key, item in node.items():
            if key == "url":
                if item is not None:
                    yield _path_of(item)
            elif key in _NAMED and item is not None and not isinstance(item, (list, dict)):
                yield item
            elif key in _NAMED and isinstance(item, list):
                yield from (name for name in item if not isinstance(name, dict))
                waiting += ((name, depth + 2) for name in item if isinstance(name, dict))
            else:
                waiting.append((item, depth + 1))


def _path_of(url: Any) -> Any:
    """The path in an address under which the page shows a file; nothing else is an address of a file."""
    try:
        _, mark, path = urlsplit(url).path.partition(FILES)
    except (AttributeError, TypeError, ValueError):
        return None
    return unquote(path) if mark else None


class PageGuard:
    """ASGI middleware in front of the page's framework; `Access` has told it the session.

    Args:
        files: The page's files.
        sessions: Makes the cookies.
        others: Matches the paths that do not belong to the page.
        event_bytes: Largest body of an event.
    """

    def __init__(
        self, app: Any, files: PageFiles, sessions: Sessions, others: re.Pattern[str], event_bytes: int = 2**20
    ) -> None:
        self.app, self.files, self.sessions, self.others, self.event_bytes = app, files, sessions, others, event_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or self.others.match(scope["path"]):
            await self.app(scope, receive, send)
            return
        try:
            await self._page(scope, receive, send)
        except Refused as refused:
            await JSONResponse({"error": str(refused), "detail": str(refused)}, refused.status)(scope, receive, send)

    async def _page(self, scope: Any, receive: Any, send: Any) -> None:
        path, method = scope["path"], scope["method"]
        session, owner = scope["state"]["session"], scope["state"]["owner"]
        if path.startswith(FILES) and method in ("GET", "HEAD"):
            await self._download(session, path.removeprefix(FILES))(scope, receive, send)
        elif path == UPLOAD and method == "POST":
            await self._upload(_needed(session), owner, scope, receive, send)
        elif path in EVENTS and method == "POST":
            body = await self._body(receive)
            value = await to_thread.run_sync(_parsed, body)
            self.files.check(_needed(session), value)
            await self.app(scope, _again(body, receive), send)
        elif _PLAIN.fullmatch(path) and method in ("GET", "HEAD"):
            if session is None and path in (*PAGES, "/config"):
                send = self._beginning(send, owner, scope["scheme"])
            await self.app(scope, receive, send)
        else:
            raise Refused("the page has no such address", 404)

    async def _body(self, receive: Any) -> bytes:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused("the client closed the request", 499)
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.event_bytes:
                raise Refused(f"an event of the page holds at most {self.event_bytes} bytes", 413)
        return bytes(body)

    def _beginning(self, send: Any, owner: str, scheme: str) -> Any:
        """A `send` that gives the browser the cookie of a new session."""

        async def begin(message: Any) -> None:
            if message["type"] == "http.response.start":
                cookie = self.sessions.begin(owner)
                message = message | {"headers": self.sessions.set_cookie(list(message["headers"]), cookie, scheme)}
            await send(message)

        return begin

    def _download(self, session: str | None, path: str) -> FileResponse:
        found = self.files.locate(session, path)
        response = FileResponse(found, headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "private"})
        if not _SHOWN.match(response.media_type or ""):  # a browser would run it as a page of this server
            response.headers["Content-Type"] = "application/octet-stream"
            response.headers["Content-Disposition"] = "attachment"
        return response

    async def _upload(self, session: str, owner: str, scope: Any, receive: Any, send: Any) -> None:
        """Hand an upload on, and note whose it is when the framework says where it put it."""
        held: list[Any] = []

        async def keep(message: Any) -> None:
            held.append(message)

        await self.app(scope, receive, keep)
        if held and held[0]["status"] == 200:
            answer = b"".join(part.get("body", b"") for part in held)
            for path in json.loads(answer):
                self.files.add(session, path, owner or None)
        for part in held:
            await send(part)


def _needed(session: str | None) -> str:
    if session is None:
        raise Refused("the session is unknown; open the page (again)", 401)
    return session


def _parsed(body: bytes) -> Any:
    try:
        return parse_json(body)
    except JsonError as error:
        raise Refused(f"the event is not valid JSON: {error}") from None


def _again(body: bytes, receive: Any) -> Any:
    """A `receive` that hands out a body which was read already."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return waiting.pop() if waiting else await receive()

    return replay
