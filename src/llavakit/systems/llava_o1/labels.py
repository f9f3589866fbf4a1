"""Labels of LLaVA-o1's training: answers with their end mark and the line break behind the assistant's header."""

from __future__ import annotations

from llavakit.conversation.labels import Labels, Tokens, by_spans
from llavakit.conversation.template import Template
from llavakit.errors import UserError

HEADER, BREAK = "<|start_header_id|>assistant<|end_header_id|>", "\n\n"


class HeaderBreak:
    """Answers of Llama-3's template, each from the line break behind its header on."""

    def check(self, template: Template) -> None:
        """Refuse templates of other headers."""
        if template.file != "llama_3":
            raise UserError(
                f"template {template.name!r} has other headers than the label policy 'header_break'; use 'spans'"
            )

    def __call__(self, tokens: Tokens) -> Labels:
        spans = [
            (start - len(BREAK) if tokens.text.endswith(HEADER + BREAK, 0, start) else start, end)
            for start, end in tokens.answers
        ]
        return Labels(by_spans(spans, tokens.ids, tokens.offsets))
