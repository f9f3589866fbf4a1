"""Who may ask the server, and from where: decided from a request's headers alone, in front of everything.

`Access` is the outermost part of the application but for CORS. It reads no body: a request for a host that is not
served, from a page of another origin, or without a valid key is answered before its first byte is taken. The API and
the web app are under the same rules.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from llavakit.errors import quoted
from llavakit.serving.protocol import error_body

COOKIE = "llavakit_session"
LOGIN = "/login"
PAGES = frozenset({"/", "/editing"})  # of the web app, where a browser that has no key is asked for one
OPEN = frozenset({"/health"})  # what is answered without a key
_SESSION_SECONDS = 24 * 3600
_MOST_LOGIN = 4096
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_LOGIN_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>llavakit</title>
<style>body { font: 16px system-ui, sans-serif; display: grid; place-content: center; min-height: 90vh }
input, button { font: inherit; padding: .4em .6em }</style>
<form method="post" action="/login"><p><label for="password">API key</label></p>
<p><input id="password" name="password" type="password" autocomplete="current-password" required autofocus>
<button>Open</button></p><p role="alert">NOTE</p></form></html>"""


@dataclass(frozen=True)
class AccessPolicy:
    """Who may ask.

    Attributes:
        keys: Keys of which a client must send one; none asks for none.
        hosts: Names under which the server may be called besides localhost and addresses; `*` is any name, `*.x.org`
            any name below x.org.
        origins: Origins of web pages of other hosts that may call the API; `*` is any.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def owner(self, authorization: bytes) -> str | None:
        """Whom a valid key belongs to, by the content of an Authorization header; None without one."""
        scheme, _, sent = authorization.partition(b" ")
        return self.owner_of_key(sent.strip()) if scheme.lower() == b"bearer" else None

    def owner_of_key(self, sent: bytes) -> str | None:
        """Whom a valid key belongs to, else None."""
        matches = [hmac.compare_digest(sent, key.encode()) for key in self.keys]  # all, so that time tells nothing
        return _digest(self.keys[matches.index(True)]) if any(matches) else None

    @property
    def owners(self) -> frozenset[str]:
        """All owners that keys stand for."""
        return frozenset(map(_digest, self.keys))

    def serves(self, host: str) -> bool:
        """Whether a Host header names this server.

        A web page can make its own name resolve to an address of this machine, but cannot call this server by another
        name than its own: addresses are safe, names must be known.
        """
        name = _without_port(host).lower().rstrip(".")
        try:
            ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
        except ValueError:
            pass
        else:
            return True
        if name == "localhost" or name.endswith(".localhost"):
            return True
        return any(
            known == "*" or name == known.lower() or (known.startswith("*.") and name.endswith(known[1:].lower()))
            for known in self.hosts
        )

    def welcomes(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may call the server under this host."""
        scheme, _, place = origin.partition("://")
        own = place.lower().removesuffix(_DEFAULT_PORTS.get(scheme, ""))
        same = bool(own) and own in (host.lower(), host.lower().removesuffix(_DEFAULT_PORTS.get(scheme, "")))
        return same or origin in self.origins or "*" in self.origins


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _without_port(host: str) -> str:
    if host.startswith("["):
        address, bracket, _ = host.partition("]")
        return address + bracket
    return host.partition(":")[0]


class Sessions:
    """Sessions of browsers: signed cookies, nothing is stored.

    Attributes:
        page: Whether there is a web app, to which a browser can log in.
    """

    def __init__(self) -> None:
        self.page = False
        self._secret = secrets.token_bytes(32)

    def begin(self, owner: str = "") -> str:
        """The cookie of a new session of an owner."""
        session = f"{secrets.token_hex(16)}.{owner}.{int(time.time()) + _SESSION_SECONDS}"
        return f"{session}.{self._signature(session)}"

    def read(self, cookies: str) -> tuple[str, str] | None:
        """Session and owner that a Cookie header belongs to, None if it belongs to none."""
        try:
            morsel = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return None
        session, _, signature = (morsel.value if morsel is not None else "").rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(session).encode()):
            return None
        identity, owner, expires = session.split(".")
        return (identity, owner) if int(expires) > time.time() else None

    def _signature(self, session: str) -> str:
        return hmac.new(self._secret, session.encode(), hashlib.sha256).hexdigest()

    def set_cookie(self, headers: list[tuple[bytes, bytes]], cookie: str, scheme: str) -> list[tuple[bytes, bytes]]:
        """Response headers with a session's cookie."""
        secure = "; Secure" if scheme == "https" else ""
        field = f"{COOKIE}={cookie}; Path=/; HttpOnly; SameSite=Strict{secure}"
        return [*headers, (b"set-cookie", field.encode())]


class Access:
    """ASGI middleware: refuses from the headers.

    What it lets through finds `owner` (who sent a key, "" where none are asked for) and `session` (of a browser, or
    None) in the request's state.

    Args:
        policy: Who may ask.
        sessions: Of browsers.
        refused: Told the status of every request that is refused here.
    """

    def __init__(self, app: Any, policy: AccessPolicy, sessions: Sessions, refused: Callable[[int], None]) -> None:
        self.app, self.policy, self.sessions, self.refused = app, policy, sessions, refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = await self._refusal(scope, receive)
        if answer is not None:
            if answer.status_code >= 400:
                self.refused(answer.status_code)
            answer.headers["Connection"] = "close"  # what is left of the body is not read
            await answer(scope, receive, send)
            return

        async def plain(message: Any) -> None:
            """Whatever a part of the application thinks of other origins, CORS is decided in one place."""
            if message["type"] == "http.response.start":
                kept = [field for field in message["headers"] if not field[0].lower().startswith(b"access-control-")]
                message = message | {"headers": kept}
            await send(message)

        await self.app(scope, receive, plain)

    async def _refusal(self, scope: Any, receive: Any) -> Response | None:
        """The answer to a request that goes no further."""
        fields: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            glue = b"; " if name == b"cookie" else b", "
            fields[name] = fields[name] + glue + value if name in fields else value
        host = fields.get(b"host", b"").decode("latin-1")
        if host and not self.policy.serves(host):
            hint = f"start it with --allowed-host {quoted(_without_port(host))} if it should be"
            return _error(421, f"this server is not called {quoted(host)}; {hint}")
        origin = fields.get(b"origin")
        if origin is not None and not self.policy.welcomes(origin.decode("latin-1"), host):
            return _error(403, f"pages of {quoted(origin.decode('latin-1'))} may not call this server; see --origin")
        known = self.sessions.read(fields.get(b"cookie", b"").decode("latin-1"))
        session, owner = known or (None, None)
        if self.policy.keys:
            sent = self.policy.owner(fields.get(b"authorization", b""))
            owner = sent or (owner if owner in self.policy.owners else None)
            if self.sessions.page and scope["path"] == LOGIN and scope["method"] == "POST":
                return await self._login(scope, receive)
            if owner is None and scope["path"] not in OPEN:
                if self.sessions.page and scope["path"] in PAGES and scope["method"] in ("GET", "HEAD"):
                    return _login_page(401)
                message = "a valid API key is needed in the Authorization header"
                return _error(401, message, "authentication_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        scope.setdefault("state", {}).update(owner=owner or "", session=session)
        return None

    async def _login(self, scope: Any, receive: Any) -> Response:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > _MOST_LOGIN:
                return _login_page(413, "That is no API key.")
        sent = parse_qs(body, max_num_fields=10).get(b"password", [b""])[0]
        owner = self.policy.owner_of_key(sent)
        if owner is None:
            return _login_page(401, "This API key is not valid.")
        answer = RedirectResponse("/", 303)
        answer.raw_headers = self.sessions.set_cookie(answer.raw_headers, self.sessions.begin(owner), scope["scheme"])
        return answer


def _error(
    status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, headers: Any = None
) -> JSONResponse:
    return JSONResponse(error_body(message, kind, code=code), status, headers=headers)


def _login_page(status: int, note: str = "") -> HTMLResponse:
    return HTMLResponse(_LOGIN_PAGE.replace("NOTE", note), status)


def hosts_of(machine: str, host: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Names under which a server may be called: that of its machine, the one it listens on, and those allowed."""
    return tuple(dict.fromkeys(name for name in (machine, host, *allowed) if name))
