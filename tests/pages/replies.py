"""What the API of a teacher or a judge answers on a page."""

from __future__ import annotations

import json
from typing import Any

DIALOGUE = "User: What does the picture show?\nAssistant: It shows a mass.\nUser: Where?\nAssistant: In the abdomen."


def reply(body: dict[str, Any]) -> str:
    """An answer that whoever asked can read, by what it asks for."""
    text = json.dumps(body["messages"])
    if "severe" in text and "slight" in text:
        return '{"severe": {"side": 0, "size": 1}, "slight": {"side": 0, "size": 0}}'
    if "User:" in text:
        return DIALOGUE
    return "8 7\nBoth are right, the first says more."
