"""Retrieval: a store of passages and pages on disk, search by vector, and retrievers that models ask.

`store` keeps entries and vectors in an embedded LanceDB table, `exact` searches a matrix, `encoder` turns texts and
pictures into vectors, `pages` and `passages` read sources, `index` builds a store from them, and `retriever` is what
responders and tools use. Nothing here knows a system or a prompt.
"""

from llavakit.retrieval.entries import NO_NEIGHBOUR, Entry, Hit

__all__ = ["NO_NEIGHBOUR", "Entry", "Hit"]
