"""Which stretch of a sample plays which role: system prompt, image, instruction, answer, last instruction.

Pure arithmetic on one sample without padding. Stretches are half-open [start, end).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llavakit.splice.scatter import IGNORE

USER_MARKER = (11889, 29901)  # "USER:" in the Llama-2 vocabulary

Span = tuple[int, int]


class Roles(NamedTuple):
    """Stretches of one sample.

    Attributes:
        image: From the first to the last visual token; with several images, the text between them is included.
        instruct: After the image up to the answer; earlier turns belong to it.
        answer: The last assistant turn; empty if nothing is supervised.
        last_instruct: The last user turn within `instruct`, from its marker; all of `instruct` if there is none.
    """

    system: Span
    image: Span
    instruct: Span
    answer: Span
    last_instruct: Span

    def shifted(self, offset: int) -> Roles:
        """All stretches moved to the right, for a sample behind left padding."""
        return Roles(*((start + offset, end + offset) for start, end in self))

    def clipped(self, length: int) -> Roles:
        """All bounds limited to `length`, for a sample that is cut there."""
        return Roles(*((min(start, length), min(end, length)) for start, end in self))


def token_roles(
    visual: Sequence[bool],
    labels: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
    marker: Sequence[int] = USER_MARKER,
) -> Roles:
    """Roles in one sample of `len(visual)` positions.

    Args:
        visual: True at visual positions.
        labels: -100 at positions that are not supervised; the answer begins one past the last of them.
        ids: Token ids, to find the last user turn.
        marker: Ids with which a user turn begins.
    """
    length = len(visual)
    places = [place for place, is_visual in enumerate(visual) if is_visual]
    image = (places[0], places[-1] + 1) if places else (0, 0)
    answer = length
    if labels is not None:
        while answer > 0 and labels[answer - 1] != IGNORE:
            answer -= 1
    answer = max(answer, image[1])
    last = image[1]
    if ids is not None:
        width, wanted = len(marker), list(marker)
        starts = range(answer - width, image[1] - 1, -1)
        last = next((start for start in starts if list(ids[start : start + width]) == wanted), last)
    return Roles((0, image[0]), image, (image[1], answer), (answer, length), (last, answer))


def trim_unsupervised(labels: Sequence[int]) -> int:
    """Length of a sample without what follows its last supervised position (a template's closing newline)."""
    end = len(labels)
    while end > 0 and labels[end - 1] == IGNORE:
        end -= 1
    return end or len(labels)
