"""The template and labels of the released preference training: Qwen's, in an older form than supervised training's."""

from __future__ import annotations

import re
from dataclasses import replace

from llavakit.conversation.builtin import QWEN
from llavakit.conversation.labels import Labels, Tokens, by_spans
from llavakit.conversation.template import Template
from llavakit.errors import UserError

MARKS = re.compile(r"<\|im_start\|>|<\|im_end\|>\n?")


class TurnMarks:
    """Answers, and the marks that begin and end every turn with the newline behind; role words are not learned.

    In a preference loss the marks of the prompt cancel; they count in means and in the added cross entropy.
    """

    def check(self, template: Template) -> None:
        """Refuse templates of other marks."""
        if template.file != QWEN.file:
            raise UserError(
                f"template {template.name!r} has other marks than the label policy 'turn_marks'; use 'spans'"
            )

    def __call__(self, tokens: Tokens) -> Labels:
        spans = [*tokens.answers, *(found.span() for found in MARKS.finditer(tokens.text))]
        merged: list[tuple[int, int]] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return Labels(by_spans(merged, tokens.ids, tokens.offsets))


# Behind a media item there are two newlines, an empty answer still ends its turn, and texts are tokenised apart from
# the newline in front of them.
QWEN_PREFERENCE = replace(
    QWEN,
    name="qwen_1_5_preference",
    labels="turn_marks",
    values={**QWEN.values, "after": "\n", "keeps_empty": True},
    breaks=("<image>\n", *(f"<|im_start|>{role}\n" for role in ("system", "user", "assistant"))),
)
