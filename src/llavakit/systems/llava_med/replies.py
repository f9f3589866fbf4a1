"""Replies of v1.0, which begin with the name of the speaker: the prompt of its evaluation ends in front of it."""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.conversation.codecs import Codec, Parser
from llavakit.conversation.turns import Event

ROLES = ("Assistant:", "Human:")


class RoleParser(Parser):
    """Cuts the name of a speaker from the beginning of a reply."""

    def __init__(self) -> None:
        super().__init__()
        self._held: str | None = ""  # None once the beginning is read

    def feed(self, text: str) -> list[Event]:
        if self._held is None:
            return self._content(text)
        self._held = (self._held + text).lstrip()
        if any(role.startswith(self._held) and role != self._held for role in ROLES):
            return []
        return self._begin()

    def finish(self, reason: str | None = "stop") -> list[Event]:
        return [] if self._held is None else self._begin()

    def _begin(self) -> list[Event]:
        text, self._held = self._held or "", None
        role = next((role for role in ROLES if text.startswith(role)), "")
        return self._content(text.removeprefix(role))


class RoleCodec(Codec):
    """Plain text behind `Assistant:`, which may be missing."""

    def parser(self, tools: Sequence[str] = (), *, parallel: bool = True) -> Parser:
        return RoleParser()
