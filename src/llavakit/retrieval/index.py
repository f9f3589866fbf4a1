"""Building a store: pages in, entries with their vectors out.

Pages are read, cut, encoded and appended a batch at a time, so that memory does not grow with their number. A store
says what it is made of; the same call goes on where a former one was killed, and another one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.data.preparation import Left
from llavakit.errors import MediaError, RecordError, UserError, quoted
from llavakit.media import load_image
from llavakit.retrieval.encoder import StoreEncoder
from llavakit.retrieval.entries import Entry
from llavakit.retrieval.pages import Page, Pages
from llavakit.retrieval.passages import TOKENS, pack
from llavakit.retrieval.sentences import sentences
from llavakit.retrieval.store import FEWEST_INDEXED, Store, check_free, is_store

EMBED = ("passage", "summary", "image")
ROWS = 4096  # entries of one append
ENCODE = 256  # texts that are handed to the encoder together
INDEXED = max(10_000, FEWEST_INDEXED)  # entries from which on approximate search pays
PICTURES = 16  # the same for pictures, which are held decoded


@dataclass
class Built:
    """What a run of `build_store` did.

    Attributes:
        entries: Entries of the store.
        pages: Pages that were read by this run.
        resumed: Page at which it began; others were in the store.
        left_out: One line per page that was left out.
    """

    store: Store
    entries: int = 0
    pages: int = 0
    resumed: int = 0
    left_out: list[str] = field(default_factory=list)


def build_store(
    pages: Pages,
    path: str | Path,
    encoder: StoreEncoder,
    *,
    embed: Sequence[str] = ("passage",),
    tokens: int = TOKENS,
    index: bool | None = None,
    on_bad_record: str = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> Built:
    """Build a store, or go on building it.

    Args:
        pages: The pages, from `open_pages`.
        path: Folder of the store.
        encoder: Makes the vectors.
        embed: What gets a vector: every `passage` (the entry is that passage); the title and `summary` of a page, or
            every `image` of it (the entry is the page with all its passages).
        tokens: Most tokens of a passage.
        index: Build the index of approximate search at the end; default where there are at least 10,000 entries.
        on_bad_record: "stop" at a page that cannot be read, or "skip" it.
        progress: Called with the pages that were read, and of how many.

    Raises:
        UserError: If the folder holds a store of something else, or no page has anything to embed.
        RecordError: At the first broken page, unless they are skipped.
    """
    unknown = [kind for kind in embed if kind not in EMBED]
    if unknown or not embed:
        raise UserError(f"embed {quoted(', '.join(unknown))}: must be any of {', '.join(EMBED)}")
    embed = [kind for kind in EMBED if kind in embed]
    if tokens < 1:
        raise UserError(f"tokens {quoted(tokens)}: a passage has at least one")
    left = Left(on_bad_record)
    made = {"source": pages.file, "identity": pages.identity(), "embed": list(embed), "tokens": tokens}
    store = _open(Path(path), encoder, made)
    done = Built(store, resumed=0 if store is None else store.last_record() + 1)
    if store is not None and store.settings.get("complete"):
        done.entries = len(store)
        return done
    waiting: list[tuple[int, Entry, Any]] = []
    ready: list[tuple[int, Entry]] = []
    vectors: list[np.ndarray] = []

    def encode() -> None:
        if waiting:
            vectors.append(_encode(encoder, [item for _, _, item in waiting]))
            ready.extend((number, entry) for number, entry, _ in waiting)
            waiting.clear()

    def append() -> None:
        nonlocal store
        encode()
        if not ready:
            return
        if store is None:
            store = Store.create(path, encoder.dimension, encoder=encoder.describe(), settings=made)
        store.add([entry for _, entry in ready], np.concatenate(vectors), record=[number for number, _ in ready])
        ready.clear()
        vectors.clear()

    for number in range(done.resumed, len(pages)):
        try:
            page = pages[number]
            found = list(_entries(page, embed, tokens, pages.file))
        except RecordError as error:
            left(error)
            continue
        for entry, item in found:
            waiting.append((number, entry, item))
            if len(waiting) >= (ENCODE if isinstance(item, str) else PICTURES):
                encode()
        if len(ready) >= ROWS:
            append()
        done.pages += 1
        if progress is not None:
            progress(number + 1, len(pages))
    append()
    if store is None:
        kinds = ", ".join(embed)
        raise UserError(f"{pages.file}: no page has anything to embed ({kinds}), so there is nothing to store")
    done.store, done.entries = store, len(store)
    if index or (index is None and done.entries >= INDEXED):
        store.build_index()
    # pieces of thousands of entries stay as they are: putting them together would take memory for all of them
    store.note(complete=True)
    done.left_out = [str(error) for error in left.bad.errors()]
    return done


def _open(path: Path, encoder: StoreEncoder, made: dict[str, Any]) -> Store | None:
    """The store that is to be gone on with, if there is one.

    Raises:
        UserError: If it is made of something else.
    """
    if not is_store(path):
        check_free(path)  # before anything is encoded
        return None
    store = Store.open(path, encoder=encoder.describe())
    for key, value in made.items():
        if key != "source" and store.settings.get(key) != value:
            there = store.settings.get("source") if key == "identity" else f"{key} {store.settings.get(key)}"
            raise UserError(f"{path}: is a store of {quoted(there)}, made otherwise; name another folder, or remove it")
    return store


def _entries(page: Page, embed: Sequence[str], tokens: int, file: str) -> Iterator[tuple[Entry, Any]]:
    """Entries of a page with what is encoded for them."""
    passages = (*page.passages, *pack(sentences(page.text), tokens)) if page.text else page.passages
    if "passage" in embed:
        for passage in passages:
            if passage.strip():
                yield Entry(page.name, (passage,), page.title, fields=page.fields), passage
    summary = " ".join(part for part in (page.title, page.summary) if part)
    if "summary" in embed and summary:
        yield Entry(page.name, passages, page.title, fields=page.fields), summary
    if "image" in embed:
        for image in page.images:
            try:
                picture = load_image(image)
            except MediaError as error:
                raise RecordError(file, page.line, "images", str(error)) from None
            yield Entry(page.name, passages, page.title, image, page.fields), picture


def _encode(encoder: StoreEncoder, items: Sequence[Any]) -> np.ndarray:
    texts = [number for number, item in enumerate(items) if isinstance(item, str)]
    images = [number for number, item in enumerate(items) if not isinstance(item, str)]
    out = np.empty((len(items), encoder.dimension), np.float32)
    if texts:
        out[texts] = encoder.texts([items[number] for number in texts])
    if images:
        out[images] = encoder.images([items[number] for number in images])
    return out
