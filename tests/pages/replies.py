"""What the API of a teacher or a judge answers on a page."""

from __future__ import annotations

import json
import re
from typing import Any

DIALOGUE = "User: What does the picture show?\nAssistant: It shows a mass.\nUser: Where?\nAssistant: In the abdomen."


def reply(body: dict[str, Any]) -> str:
    """An answer that whoever asked can read, by what it asks for."""
    text = json.dumps(body["messages"])
    if "severe" in text and "slight" in text:
        return '{"severe": {"side": 0, "size": 1}, "slight": {"side": 0, "size": 0}}'
    if "errors by type" in text:
        none = "((A, 0), (B, 1), (C, 0), (D, 0), (E, 0), (F, 0))"
        return "\n".join(
            f"Number of clinically {kind} errors by type: {none}" for kind in ("significant", "insignificant")
        )
    if pair := re.search(r"The first response: \[(.*?)\]\\nThe second response: \[(.*?)\]", text):
        return f"The better response: [{1 if pair[1] > pair[2] else 2}]"  # whichever way round they are shown
    if "User:" in text:
        return DIALOGUE
    return "8 7\nBoth are right, the first says more."
