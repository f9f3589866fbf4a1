"""What the evaluation asks a LLaVA, by data set, and the text that its attacks aim at."""

from __future__ import annotations

from typing import Any

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import SHORT_ANSWER, UNANSWERABLE
from llavakit.registry import nearest

CAPTION = "Provide a short caption for this image."
CAPTIONS = ("coco", "flickr")
QUESTIONS = {"textvqa": SHORT_ANSWER, "vqav2": SHORT_ANSWER, "vizwiz": f"{UNANSWERABLE}\n{SHORT_ANSWER}"}
ANSWER_MARK = "ASSISTANT:"


def messages_for(
    dataset: str, image: Any, question: str | None = None, answer: str | None = None
) -> list[dict[str, Any]]:
    """The messages of an evaluation prompt, or with an answer those of an attack; an empty answer counts as none.

    Raises:
        UserError: If the data set is unknown.
    """
    if dataset in CAPTIONS:
        text = CAPTION
    elif dataset in QUESTIONS:
        text = f"{question}\n{QUESTIONS[dataset]}"
    else:
        raise UserError(f"dataset: unknown {dataset!r}{nearest(dataset, [*CAPTIONS, *QUESTIONS])}")
    asked = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": f"\n{text}"}]}
    return [asked, *([{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else [])]
