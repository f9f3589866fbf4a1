"""Files of the web app: what a browser may name, and the one function that opens it.

Everything that comes back from a browser is input, also what the page put there itself: a conversation, an upload, an
example. A path in it is worth nothing until `PageFiles.locate` has found it among the uploads of the same session, or
among the files that the page offers to everybody. `PageGuard` stands in front of the page's framework and checks every
event, upload and download in this way, whatever the framework itself checks; it lets through only the operations that
the page uses.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.responses import FileResponse, JSONResponse

from llavakit.media.policy import Refused

COOKIE = "llavakit_page"
FILES = "/gradio_api/file="
UPLOAD = "/gradio_api/upload"
EVENTS = frozenset(f"/gradio_api/{name}" for name in ("run/predict", "queue/join", "cancel", "reset"))
# What the page needs besides its files; everything else that the framework offers stays closed.
_PLAIN = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/login|/logout|/assets/.+|/static/.+"
    r"|/gradio_api/(login_check|upload_progress|queue/data|heartbeat/\w+)"
)
_SHOWN = re.compile(r"^(image/(png|jpeg|gif|webp|bmp|avif)|video/(mp4|webm|ogg|quicktime))$")
_NAMED = frozenset({"path", "url", "file", "files"})  # keys under which the framework looks for files
_MOST_DEPTH = 64
_MOST_EVENT = 4 * 2**20


class PageFiles:
    """The files that one page knows.

    Args:
        folder: Where the page's framework puts uploads; nothing else should write there.
        file_bytes: Largest file.
    """

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self.folder, self.file_bytes = folder.resolve(), file_bytes
        self._secret = secrets.token_bytes(32)
        self._shared: set[Path] = set()
        self._owned: dict[str, set[Path]] = {}
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ sessions

    def begin(self) -> str:
        """The cookie of a new session."""
        session = secrets.token_hex(16)
        return f"{session}.{self._signature(session)}"

    def session(self, cookies: str) -> str | None:
        """The session that a Cookie header belongs to, None if it belongs to none."""
        try:
            morsel = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return None
        session, _, signature = (morsel.value if morsel is not None else "").partition(".")
        known = hmac.compare_digest(signature.encode(), self._signature(session).encode())
        return session if known else None

    def _signature(self, session: str) -> str:
        return hmac.new(self._secret, session.encode(), hashlib.sha256).hexdigest()

    # ------------------------------------------------------------------ files

    def share(self, path: Path) -> None:
        """Let every session use a file of the page's own."""
        self._shared.add(path.resolve(strict=True))

    def add(self, session: str, path: str) -> None:
        """Note that a session uploaded a file.

        Raises:
            Refused: If it lies outside the folder of uploads.
        """
        found = Path(path).resolve()
        if not found.is_relative_to(self.folder):
            raise Refused("the upload was kept outside the folder of uploads", 500)
        with self._lock:
            self._owned.setdefault(session, set()).add(found)

    def locate(self, session: str | None, path: Any) -> Path:
        """The file that a browser means, resolved.

        Raises:
            Refused: If it is no upload of this session and nothing that the page offers.
        """
        refused = Refused("this file is not an upload of this session; upload it (again)", 403)
        if not isinstance(path, str):
            raise refused
        named = Path(os.path.normpath(path))  # the file system is not asked about paths that nobody uploaded
        with self._lock:
            known = named in self._shared or (session is not None and named in self._owned.get(session, ()))
        try:
            if not known or named.resolve(strict=True) != named:
                raise refused
        except (OSError, RuntimeError):
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
    """ASGI middleware in front of the page's framework.

    Args:
        files: The page's files and sessions.
        others: Matches the paths that do not belong to the page.
    """

    def __init__(self, app: Any, files: PageFiles, others: re.Pattern[str]) -> None:
        self.app, self.files, self.others = app, files, others

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
        sent = b"; ".join(value for name, value in scope["headers"] if name == b"cookie")
        session = self.files.session(sent.decode("latin-1"))
        if path.startswith(FILES) and method in ("GET", "HEAD"):
            await self._download(session, path.removeprefix(FILES))(scope, receive, send)
        elif path == UPLOAD and method == "POST":
            await self._upload(_needed(session), scope, receive, send)
        elif path in EVENTS and method == "POST":
            body = await _body(receive)
            self.files.check(_needed(session), _parsed(body))
            await self.app(scope, _again(body, receive), send)
        elif _PLAIN.fullmatch(path) and (method in ("GET", "HEAD") or (path == "/login" and method == "POST")):
            begins = session is None and path in ("/", "/config")
            await self.app(scope, receive, _with_cookie(send, self.files.begin()) if begins else send)
        else:
            raise Refused("the page has no such address", 404)

    def _download(self, session: str | None, path: str) -> FileResponse:
        found = self.files.locate(session, path)
        response = FileResponse(found, headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "private"})
        if not _SHOWN.match(response.media_type or ""):  # a browser would run it as a page of this server
            response.headers["Content-Type"] = "application/octet-stream"
            response.headers["Content-Disposition"] = "attachment"
        return response

    async def _upload(self, session: str, scope: Any, receive: Any, send: Any) -> None:
        """Hand an upload on, and note whose it is when the framework says where it put it."""
        held: list[Any] = []

        async def note(message: Any) -> None:
            held.append(message)
            if message["type"] != "http.response.body" or message.get("more_body", False):
                return
            if held[0]["status"] == 200:
                answer = b"".join(part.get("body", b"") for part in held)
                for path in json.loads(answer):
                    self.files.add(session, path)
            for part in held:
                await send(part)

        await self.app(scope, receive, note)


def _needed(session: str | None) -> str:
    if session is None:
        raise Refused("the session is unknown; open the page (again)", 401)
    return session


async def _body(receive: Any) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused("the client closed the request", 499)
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > _MOST_EVENT:
            raise Refused(f"an event of the page holds at most {_MOST_EVENT} bytes", 413)
    return bytes(body)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the event is not valid JSON") from None


def _again(body: bytes, receive: Any) -> Any:
    """A `receive` that hands out a body which was read already."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return waiting.pop() if waiting else await receive()

    return replay


def _with_cookie(send: Any, cookie: str) -> Any:
    async def begin(message: Any) -> None:
        if message["type"] == "http.response.start":
            field = (b"set-cookie", f"{COOKIE}={cookie}; Path=/; HttpOnly; SameSite=Strict".encode())
            message = message | {"headers": [*message["headers"], field]}
        await send(message)

    return begin
