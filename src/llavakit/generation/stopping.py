"""Stop strings in streamed text: what may be shown already, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches a growing text; never lets out a character that may belong to a stop string.

    Args:
        stops: The stop strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.met: str | None = None  # the stop string that has come

    def push(self, text: str) -> tuple[str, bool]:
        """Add text.

        Returns:
            Text that is safe to show, and whether a stop string was met (the text ends in front of it).
        """
        self._held += text
        found = [(self._held.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in self._held]
        if found:  # the one that is complete first, however the text was cut into pieces
            end, length, self.met = min(found)
            place = end + length
            shown, self._held = self._held[:place], ""
            return shown, True
        kept = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back; no stop string came after all."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Longest end of the held text that begins the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if stop.startswith(self._held[-size:])), 0)
