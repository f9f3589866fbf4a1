"""Media that clients upload ahead of their requests."""

from __future__ import annotations

from llavakit.generation.cache import ByteBounded
from llavakit.media.policy import Refused


class Uploads:
    """Media that clients sent ahead of their requests, in memory under names of the server's own.

    Those that were not used for longest are forgotten when the store is full.

    Args:
        total_bytes: Memory for all of them.
    """

    def __init__(self, total_bytes: int) -> None:
        self._files = ByteBounded(total_bytes)

    def add(self, name: str, content: bytes) -> None:
        """Keep an upload, forgetting old ones if need be."""
        self._files.put(name, content, len(content))

    def get(self, name: str) -> bytes:
        """An upload's content.

        Raises:
            Refused: If it is unknown or forgotten.
        """
        content = self._files.get(name)
        if content is None:
            raise Refused(f"upload {name[:64]!r} is unknown or has been forgotten; upload it again", 404)
        return content

    def remove(self, name: str) -> bool:
        """Forget an upload; whether there was one."""
        known = self._files.get(name) is not None
        self._files.drop(name)
        return known
