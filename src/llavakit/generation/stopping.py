"""Stop strings: matched in the streamed text, or by id where a special token leaves no text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llavakit.conversation.tokens import special_tokens, stop_token_ids
from llavakit.errors import UserError
from llavakit.generation.request import SamplingParams


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


def check_stops(params: SamplingParams, tokenizer: Any) -> None:
    """Refuse stop strings that can never match: there is no tokenizer, or they hold a special token beside other text.

    Raises:
        UserError: With the string and the token.
    """
    if params.stop and tokenizer is None:
        raise UserError("sampling: stop strings need an engine with a tokenizer")
    special = special_tokens(tokenizer) if params.stop and params.skip_special_tokens else {}
    for stop in params.stop:
        if stop not in special:
            inside = next((token for token in special if token in stop), None)
            if inside is not None:
                raise UserError(
                    f"sampling: stop {stop[:200]!r} holds the special token {inside!r} beside other text; give the "
                    "token as a stop string of its own"
                )


def generate_options(params: SamplingParams, tokenizer: Any, eos_token_ids: Iterable[int]) -> dict[str, Any]:
    """The ends of a reply as options of transformers' `generate`: ids and, where there are any, stop strings.

    Args:
        eos_token_ids: The model's, for parameters that name none.
    """
    check_stops(params, tokenizer)
    by_id = stop_token_ids(params.stop, tokenizer)
    in_text = [stop for stop in params.stop if stop not in by_id.values()]
    eos = eos_token_ids if params.eos_token_ids is None else params.eos_token_ids
    options: dict[str, Any] = {"stop_strings": in_text, "tokenizer": tokenizer} if in_text else {}
    return options | {"eos_token_id": sorted({*eos, *by_id}) or None}


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text in front of the first stop string."""
    watch = StopStrings(stops)
    shown, _ = watch.push(text)
    return shown + watch.flush()
