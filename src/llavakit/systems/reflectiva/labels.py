"""What ReflectiVA learns of a conversation: answers with their end mark, and never what stands in a paragraph."""

from __future__ import annotations

from llavakit.conversation.labels import Labels, SpanLabels, Tokens
from llavakit.conversation.template import Template
from llavakit.errors import UserError
from llavakit.systems.reflectiva.prompts import DEFAULT, frame_of
from llavakit.systems.reflectiva.tokens import BEGIN, END

HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


class ReflectiveLabels:
    """Answers without the paragraphs in them, and without the first occurrence of what stands around a paragraph.

    A paragraph is in a turn of the user, which is not learned anyway; both rules matter where an answer quotes one.

    Args:
        template_paragraph: Name of the text around a paragraph, see `prompts.FRAMES`.
        mask_paragraph: Whether paragraphs in answers are left out.
        counted: Leave a whole sample out, as the original does, whose text does not end with an open header of the
            assistant: it counts tokens and expects one. For comparison with original runs.
    """

    def __init__(
        self, *, template_paragraph: str = DEFAULT, mask_paragraph: bool = True, counted: bool = False
    ) -> None:
        self.frame, self.counted = frame_of(template_paragraph), counted
        self.masks = mask_paragraph
        self._spans = SpanLabels(ignore=[(BEGIN, END)] if mask_paragraph else ())

    def check(self, template: Template) -> None:
        """Refuse templates of other headers."""
        if template.stop != ("<|eot_id|>",):
            raise UserError(
                f"template {template.name!r} has other headers than the label policy 'reflective'; use 'spans'"
            )

    def __call__(self, tokens: Tokens) -> Labels:
        if self.counted and not tokens.text.endswith(HEADER):
            return Labels([-100] * len(tokens.ids), fully_masked=True)
        labels = self._spans(tokens)
        for text in self.frame if self.masks else ():
            start = tokens.text.find(text) if text else -1
            for place, (begin, end) in enumerate(tokens.offsets if start >= 0 else ()):
                if end > begin and begin < start + len(text) and end > start:
                    labels.ids[place] = -100
        return labels
