"""Retrievers: what a responder or a tool asks for knowledge.

A `Retriever` answers queries - a text, a picture or a vector - with the entries that fit. `StoreRetriever` searches a
store with its encoder; a system or a test may bring another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llavakit.errors import UserError
from llavakit.retrieval.encoder import StoreEncoder, load_encoder
from llavakit.retrieval.entries import Entry, Hit
from llavakit.retrieval.store import Store

Query = str | Image.Image | np.ndarray


class Retriever(ABC):
    """Answers queries with entries."""

    @abstractmethod
    def retrieve(
        self, queries: Sequence[Query], k: int, *, keep: Callable[[Entry], bool] | None = None
    ) -> list[list[Hit]]:
        """The best entries of every query, best first.

        Args:
            queries: Texts, pictures or vectors [dimension].
            k: Entries of a query; fewer come back only if there are no more.
            keep: Leave out entries for which this is false.
        """


class StoreRetriever(Retriever):
    """Searches a store.

    Args:
        store: The store.
        encoder: The encoder that made it; without one, queries are vectors.
        approximate: Ask the store's index instead of comparing every vector.

    Raises:
        UserError: If another encoder made the store.
    """

    def __init__(self, store: Store, encoder: StoreEncoder | None = None, *, approximate: bool = False) -> None:
        if encoder is not None:
            store.check_encoder(encoder.describe())
            if encoder.dimension != store.dimension:
                raise UserError(
                    f"{store.path}: its vectors have {store.dimension} numbers, "
                    f"{encoder.name} gives {encoder.dimension}; query it with its own encoder"
                )
        self.store, self.encoder, self.approximate = store, encoder, approximate

    def retrieve(
        self, queries: Sequence[Query], k: int, *, keep: Callable[[Entry], bool] | None = None
    ) -> list[list[Hit]]:
        if not queries:
            return []
        return self.store.search(self.vectors(queries), k, approximate=self.approximate, keep=keep)

    def vectors(self, queries: Sequence[Query]) -> np.ndarray:
        """The vectors of queries, float32 [queries, dimension].

        Raises:
            UserError: If a text or picture is asked for without an encoder.
        """
        out = np.empty((len(queries), self.store.dimension), np.float32)
        texts = [number for number, query in enumerate(queries) if isinstance(query, str)]
        images = [number for number, query in enumerate(queries) if isinstance(query, Image.Image)]
        if (texts or images) and self.encoder is None:
            raise UserError(f"{self.store.path}: needs the encoder that made it to look for a text or picture")
        if texts:
            out[texts] = self.encoder.texts([queries[number] for number in texts])
        if images:
            out[images] = self.encoder.images([queries[number] for number in images])
        for number in set(range(len(queries))) - set(texts) - set(images):
            vector = np.asarray(queries[number])
            if vector.shape != (self.store.dimension,):
                shape = list(vector.shape)
                raise UserError(f"{self.store.path}: query of shape {shape}; must be [{self.store.dimension}]")
            out[number] = vector
        return out


def open_retriever(
    path: str | Path, *, encoder: str | Path | None = None, approximate: bool = False, **options: Any
) -> StoreRetriever:
    """A retriever over a store on disk.

    Args:
        path: The store.
        encoder: Folder or hub id of its encoder; default the one that the store names.
        approximate: See `StoreRetriever`.
        options: `device`, `dtype` and `pooling` of the encoder.

    Raises:
        UserError: If the store or its encoder cannot be opened, or do not belong together.
    """
    store = Store.open(path)
    named = encoder or store.encoder.get("name")
    if "pooling" in store.encoder:
        options = {"pooling": store.encoder["pooling"], **options}
    return StoreRetriever(store, None if named is None else load_encoder(named, **options), approximate=approximate)
