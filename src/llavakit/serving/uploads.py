"""Files that clients send ahead of the requests that name them: whose they are, how many, and for how long.

The API keeps their content in memory, the web app the paths of files; both under the rules of this module.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from llavakit.errors import quoted
from llavakit.media.policy import Refused

T = TypeVar("T")


@dataclass(frozen=True)
class UploadPolicy:
    """How much may be sent ahead.

    Attributes:
        total_bytes: All uploads together; more are refused with 507.
        owner_bytes: Uploads of one owner; more make the server forget those that he has not used for longest.
        seconds: An upload that was not used for so long is forgotten.
    """

    total_bytes: int = 512 * 2**20
    owner_bytes: int = 128 * 2**20
    seconds: float = 3600.0


@dataclass
class _Upload(Generic[T]):
    content: T
    size: int
    account: str
    used: float


class Uploads(Generic[T]):
    """Uploads by holder and name.

    Args:
        policy: How many.
        dropped: Told the content of every upload that is forgotten, whatever the reason.
        clock: Seconds.
    """

    def __init__(
        self,
        policy: UploadPolicy,
        dropped: Callable[[T], None] = lambda content: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy, self._dropped, self._clock = policy, dropped, clock
        self._files: OrderedDict[tuple[str, str], _Upload[T]] = OrderedDict()  # those used last come last
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        """Size of all uploads."""
        with self._lock:
            return sum(upload.size for upload in self._files.values())

    def add(self, holder: str, name: str, content: T, size: int, account: str | None = None) -> None:
        """Keep an upload, or count one that is kept at another size; where there is no room it stays as it was.

        Args:
            holder: Who alone may use it.
            account: Whose quota it counts for, if that is somebody else.

        Raises:
            Refused: If there is no room for it.
        """
        account = holder if account is None else account
        with self._lock:
            self.expire()
            known = self._files.pop((holder, name), None)
            try:
                if size > self.policy.owner_bytes:
                    raise Refused(f"uploads of one client hold at most {self.policy.owner_bytes} bytes", 413)
                self._make_room(account, size)
                if self.bytes + size > self.policy.total_bytes:
                    raise Refused("the server keeps as many uploads as it can; try again later", 507)
            except Refused:
                if known is not None:
                    self._files[holder, name] = known
                raise
            self._files[holder, name] = _Upload(content, size, account, self._clock())
            if known is not None and known.content != content:
                self._dropped(known.content)

    def _make_room(self, account: str, size: int) -> None:
        own = [(key, upload.size) for key, upload in self._files.items() if upload.account == account]
        surplus = sum(each for _, each in own) + size - self.policy.owner_bytes
        for key, each in own:
            if surplus <= 0:
                return
            self.remove(*key)
            surplus -= each

    def get(self, holder: str, name: str) -> T:
        """An upload of this holder.

        Raises:
            Refused: If it is unknown, somebody else's, or forgotten.
        """
        with self._lock:
            self.expire()
            upload = self._files.get((holder, name))
            if upload is None:
                raise Refused(f"upload {quoted(name)} is unknown or has been forgotten; upload it again", 404)
            upload.used = self._clock()
            self._files.move_to_end((holder, name))
            return upload.content

    def remove(self, holder: str, name: str) -> bool:
        """Forget an upload of this holder; whether there was one."""
        with self._lock:
            upload = self._files.pop((holder, name), None)
        if upload is not None:
            self._dropped(upload.content)
        return upload is not None

    def expire(self) -> None:
        """Forget what was not used for too long."""
        with self._lock:
            oldest = self._clock() - self.policy.seconds
            for key in [key for key, upload in self._files.items() if upload.used < oldest]:
                self.remove(*key)

    def known(self, name: str) -> bool:
        """Whether anybody holds an upload of this name."""
        with self._lock:
            return any(key[1] == name for key in self._files)

    def of(self, holder: str) -> UploadsOf[T]:
        """The uploads of one holder."""
        return UploadsOf(self, holder)


class UploadsOf(Generic[T]):
    """What one holder may use."""

    def __init__(self, uploads: Uploads[T], holder: str) -> None:
        self._uploads, self._holder = uploads, holder

    def get(self, name: str) -> T:
        """An upload's content; see `Uploads.get`."""
        return self._uploads.get(self._holder, name)
