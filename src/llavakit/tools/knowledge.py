"""Looking things up in a store of `llavakit index`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from PIL import Image

from llavakit.tools.skill import Outcome, Skill, SkillError, absent, parameters, picture

MOST = 20  # entries of a result


def retrieve(store: str | None = None, encoder: str | None = None, approximate: bool = False, k: int = 4) -> Skill:
    """The skill `retrieve`.

    Args:
        store: The store.
        encoder: Folder of the encoder that made it; default: the one that it names.
        approximate: See `llavakit.retrieval.retriever.StoreRetriever`.
        k: Entries that are found unless a call says how many.
    """
    lock, opened = threading.Lock(), []

    def run(image: Image.Image | None = None, query: str | None = None, k: int = k) -> Outcome:
        from llavakit.retrieval.retriever import open_retriever

        asked: Any = query if query else image
        if asked is None:
            raise SkillError("retrieve: give a query, or a picture")
        with lock:
            if not opened:
                opened.append(open_retriever(store, encoder=encoder, approximate=approximate))
            hits = opened[0].retrieve([asked], k)[0]
        found = [
            {"caption": hit.entry.text, "title": hit.entry.title, "similarity": round(float(hit.score), 4)}
            for hit in hits
        ]
        return Outcome({"retrieval_results": found})

    missing = absent("lancedb", "lancedb", "retrieval")
    if missing is None and store is None:
        missing = "no store is configured; name one as `store` in the tools configuration"
    elif missing is None and not Path(store).is_dir():
        missing = f"{store}: there is no such store"
    return Skill(
        name="retrieve",
        description="Look up passages about a text, or about the picture.",
        parameters=parameters(
            image=picture("The picture to look up where there is no query.") | {"default": None},
            query={"type": "string", "minLength": 1, "maxLength": 1000, "description": "What to look up."},
            k={"type": "integer", "minimum": 1, "maximum": MOST, "default": k, "description": "How many passages."},
        ),
        function=run,
        needs=("lancedb", "a store of llavakit index"),
        missing=missing,
        shared=False,
    )
