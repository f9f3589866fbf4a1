"""A store: entries and their vectors in an embedded LanceDB table, with a note of what made them.

A store is a folder: `store.json` says the dimension, how vectors are compared and which encoder made them, and
`entries.lance` is the table. Appending is atomic: what was added before a process died is there, and nothing else.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from llavakit.data.strict_json import read_json
from llavakit.errors import UserError, quoted
from llavakit.retrieval import partitions
from llavakit.retrieval.entries import NO_NEIGHBOUR, Entry, Hit
from llavakit.retrieval.exact import best, unit

FORMAT = 1
IN_MEMORY = 1 << 30  # bytes of vectors up to which exact search keeps them
BLOCK, READ = 8192, 2048  # rows that are compared and that are read at a time
SAMPLE_RATE = 32  # vectors per partition that the index is trained on
BITS = 4  # to which a number of a vector is quantised in the index
PROBES = 20  # partitions of the index that a query looks into
REFINED = 8  # candidates per neighbour whose vectors are compared exactly
FEWEST_INDEXED = 256  # entries from which on an index can be trained
_TABLE = "entries"
_NOTE = "store.json"

Metric = Literal["cosine", "dot"]


def _lancedb() -> ModuleType:
    try:
        import lancedb
    except ModuleNotFoundError as error:
        raise UserError("stores need lancedb: pip install 'llavakit[retrieval]'") from error
    return lancedb


def is_store(path: str | Path) -> bool:
    """Whether a folder is a store."""
    return (Path(path) / _NOTE).is_file()


def check_free(path: Path) -> None:
    """Refuse a place where something is.

    Raises:
        UserError: If it is no empty folder, and exists.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already; name a new folder for the store, or remove it")


class Store:
    """Entries with a vector each, numbered from 0 in the order of adding. Opened by `create` and `open`.

    Attributes:
        path: The folder.
        dimension: Length of a vector.
        metric: `cosine` compares directions: vectors are divided by their length when they are added. `dot` keeps
            vectors as they are. Queries are divided by their length in both.
        encoder: What made the vectors: `name` and `identity` of the encoder, or empty if the vectors came from
            elsewhere.
        settings: What else is noted about the making of the store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        note = self._read_note()
        self.dimension: int = note["dimension"]
        self.metric: Metric = note["metric"]
        self.encoder: dict[str, str] = note["encoder"]
        self.settings: dict[str, Any] = note["settings"]
        lancedb = _lancedb()
        with self._reading():
            self._table = lancedb.connect(str(self.path)).open_table(_TABLE)
            self._size = self._table.count_rows()
        self._lock = threading.Lock()
        self._matrix: np.ndarray | None = None
        self._partitions: partitions.Partitions | None = None
        self._indexed = False

    @classmethod
    def create(
        cls,
        path: str | Path,
        dimension: int,
        *,
        metric: Metric = "cosine",
        encoder: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Store:
        """A new, empty store.

        Raises:
            UserError: If the folder is taken, or the dimension or metric is none.
        """
        path = Path(path)
        if metric not in ("cosine", "dot"):
            raise UserError(f"metric {quoted(metric)}: must be cosine or dot")
        if isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 1:
            raise UserError(f"dimension {quoted(dimension)}: must be a positive number")
        check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        _lancedb().connect(str(path)).create_table(_TABLE, schema=_schema(dimension))
        note = {"format": FORMAT, "dimension": dimension, "metric": metric}
        note |= {"encoder": dict(encoder or {}), "settings": dict(settings or {})}
        # The note comes last: a folder with it is a store.
        _write(path / _NOTE, note)
        return cls(path)

    @classmethod
    def open(cls, path: str | Path, *, encoder: Mapping[str, str] | None = None) -> Store:
        """A store that exists.

        Args:
            encoder: `name` and `identity` of the encoder of the queries.

        Raises:
            UserError: If the folder is no store, or another encoder made it.
        """
        store = cls(path)
        if encoder is not None:
            store.check_encoder(encoder)
        return store

    def check_encoder(self, encoder: Mapping[str, str]) -> None:
        """Refuse queries of an encoder that did not make the vectors.

        Raises:
            UserError: If it is another one.
        """
        if self.encoder and self.encoder.get("identity") != encoder.get("identity"):
            made, given = quoted(self.encoder.get("name")), quoted(encoder.get("name"))
            same = " (other weights or settings under the same name)" if made == given else ""
            raise UserError(
                f"{self.path}: was made with the encoder {made}, not with {given}{same}; "
                "query it with its own encoder, or build the store again"
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What LanceDB says of files that are missing or damaged becomes one line."""
        try:
            yield
        except UserError:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.path}: its table cannot be read ({reason}); build the store again") from None

    def _read_note(self) -> dict[str, Any]:
        path = self.path / _NOTE
        if not path.is_file():
            raise UserError(f"{self.path}: is not a store; `llavakit index SOURCE STORE` makes one")
        note = read_json(path, kind=dict)
        if note.get("format") != FORMAT:
            raise UserError(f"{path}: format {quoted(note.get('format'))}, this llavakit reads format {FORMAT}")
        kinds = {"dimension": int, "metric": str, "encoder": dict, "settings": dict}
        for key, kind in kinds.items():
            if not isinstance(note.get(key), kind):
                raise UserError(f"{path}: {key}: missing or not of its type; build the store again")
        return note

    def note(self, **settings: Any) -> None:
        """Add to `settings` on disk."""
        self.settings |= settings
        note = {"format": FORMAT, "dimension": self.dimension, "metric": self.metric}
        _write(self.path / _NOTE, note | {"encoder": self.encoder, "settings": self.settings})

    def __len__(self) -> int:
        return self._size

    def add(self, entries: Sequence[Entry], vectors: np.ndarray, *, record: Sequence[int] | None = None) -> None:
        """Append entries; all of them, or none.

        Args:
            entries: The entries.
            vectors: Their vectors, [entries, dimension].
            record: Number in its source of the record that each entry was made from.

        Raises:
            UserError: If numbers of entries and vectors, or the dimension, do not fit, or a value is not finite.
        """
        import pyarrow as pa

        vectors = self._vectors(vectors, "vectors")
        if len(entries) != len(vectors):
            raise UserError(f"{self.path}: {len(entries)} entries and {len(vectors)} vectors; there must be one each")
        if not len(entries):
            return
        if self.metric == "cosine":
            vectors = unit(vectors)
        start = len(self)
        columns = [
            pa.array(np.arange(start, start + len(entries)), pa.int64()),
            pa.array([-1] * len(entries) if record is None else list(record), pa.int64()),
            pa.array([entry.page for entry in entries], pa.string()),
            pa.array([entry.title for entry in entries], pa.string()),
            pa.array([list(entry.passages) for entry in entries], pa.list_(pa.string())),
            pa.array([entry.image for entry in entries], pa.string()),
            pa.array([json.dumps(dict(entry.fields)) for entry in entries], pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.dimension),
        ]
        self._table.add(pa.Table.from_arrays(columns, schema=_schema(self.dimension)))
        with self._lock:
            self._matrix, self._partitions, self._size = None, None, start + len(entries)

    def last_record(self) -> int:
        """Number of the record that the last entry was made from; -1 if there is none."""
        count = len(self)
        if not count:
            return -1
        return self._table.take_offsets([count - 1]).select(["record"]).to_arrow().column("record")[0].as_py()

    def finish(self) -> None:
        """Put small appended pieces together into few files, and remove what earlier versions left."""
        self._table.optimize(cleanup_older_than=timedelta(milliseconds=1))

    def entries(self, indices: Sequence[int]) -> list[Entry]:
        """Entries by number, in the order asked for.

        Raises:
            IndexError: If there is no such entry.
        """
        wanted = sorted({int(index) for index in indices})
        if not wanted:
            return []
        if wanted[0] < 0 or wanted[-1] >= len(self):
            raise IndexError(f"entries {wanted[0]} to {wanted[-1]} of {len(self)}")
        with self._reading():
            rows = self._table.take_offsets(wanted).select(_COLUMNS).to_arrow().to_pylist()
        found = {row["number"]: _entry(row) for row in rows}
        return [found[int(index)] for index in indices]

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The vectors in order: number of the first row, and rows float32 [rows, dimension]."""
        if self._matrix is not None:
            yield 0, self._matrix
            return
        for start in range(0, len(self), BLOCK):
            rows = np.empty((min(BLOCK, len(self) - start), self.dimension), np.float32)
            for begin in range(0, len(rows), READ):
                # one scan of everything would read far ahead, and hold much of the table
                with self._reading():
                    search = self._table.search().select(["number", "vector"]).offset(start + begin)
                    part = search.limit(min(READ, len(rows) - begin)).to_arrow()
                wanted = np.arange(start + begin, start + min(begin + READ, len(rows)))
                if not np.array_equal(part.column("number").to_numpy(), wanted):
                    raise UserError(f"{self.path}: entries are missing or out of order; build the store again")
                own = part.column("vector").combine_chunks().flatten().to_numpy().reshape(-1, self.dimension)
                rows[begin : begin + len(wanted)] = own
            yield start, rows

    def neighbours(self, queries: np.ndarray, k: int, *, approximate: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The nearest entries of every query.

        Args:
            queries: Vectors, [queries, dimension]; of any length, which does not matter.
            k: Neighbours of a query.
            approximate: Ask the index that `build_index` made. Without, every vector is compared.

        Returns:
            Scores float32 [queries, k] and numbers of entries int64 [queries, k], best first. Where the store has
            fewer than `k` entries the rest is minus infinity and `NO_NEIGHBOUR`.

        Raises:
            UserError: If the store is empty, or a query does not fit.
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise UserError(f"k {quoted(k)}: must be a positive number of neighbours")
        queries = unit(self._vectors(queries, "query"))
        if not len(self):
            raise UserError(f"{self.path}: the store is empty; `llavakit index SOURCE STORE` fills one")
        if approximate:
            return self._approximate(queries, int(k))
        self._keep_in_memory()
        return best(queries, self.blocks(), int(k))

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        approximate: bool = False,
        keep: Callable[[Entry], bool] | None = None,
    ) -> list[list[Hit]]:
        """What `neighbours` finds, with the entries; fewer than `k` hits where there are no more.

        Args:
            queries, k, approximate: See `neighbours`.
            keep: Leave out entries for which this is false, and fill up with further neighbours.
        """
        queries = np.atleast_2d(np.asarray(queries))
        found: list[list[Hit]] = [[] for _ in queries]
        open_, ask = list(range(len(queries))), k
        while open_:
            scores, numbers = self.neighbours(queries[open_], ask, approximate=approximate)
            for row, query in enumerate(open_):
                there = numbers[row] != NO_NEIGHBOUR
                found[query] = self._hits(scores[row][there], numbers[row][there], keep)[:k]
            done = ask >= len(self) or keep is None
            open_ = [] if done else [query for query in open_ if len(found[query]) < k]
            ask = min(len(self), ask * 4)
        return found

    @property
    def has_index(self) -> bool:
        """Whether `build_index` was called."""
        if not self._indexed:
            indices = self._table.list_indices()
            own = any("vector" in index.columns for index in indices)
            self._indexed = own or (self.path / partitions.FILE).is_file()
        return self._indexed

    def build_index(self) -> None:
        """Make the index of approximate search; entries that are added later are compared one by one.

        Up to a GiB of vectors are put into partitions that searches hold in memory; larger tables get LanceDB's own
        index (RaBitQ), whose candidates are compared exactly.

        Raises:
            UserError: If the store has too few entries.
        """
        if len(self) < FEWEST_INDEXED:
            raise UserError(f"{self.path}: an index needs {FEWEST_INDEXED} entries, the store has {len(self)}")
        if self._fits:
            file = self.path / partitions.FILE
            partitions.build(self.blocks, len(self), file, spherical=self.metric == "cosine")
        else:
            from lancedb.index import IvfRq

            config = IvfRq(distance_type="dot", num_bits=BITS, sample_rate=SAMPLE_RATE)
            self._table.create_index("vector", config=config, replace=True)
        self._indexed, self._partitions = True, None

    @property
    def _fits(self) -> bool:
        """Whether all vectors may be held in memory."""
        return len(self) * self.dimension * 4 <= IN_MEMORY

    def _approximate(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if not self.has_index:
            raise UserError(f"{self.path}: has no index; build one, or search without `approximate`")
        file = self.path / partitions.FILE
        if self._fits and file.is_file():
            with self._lock:
                if self._partitions is None:
                    self._partitions = partitions.Partitions(file, self.blocks(), len(self), self.dimension)
                held = self._partitions
            return held.search(queries, k)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        numbers = np.full((len(queries), k), NO_NEIGHBOUR, np.int64)
        search = self._table.search(list(queries), vector_column_name="vector").distance_type("dot").limit(k)
        search = search.nprobes(PROBES).refine_factor(REFINED).select(["number", "_distance"])
        with self._reading():
            found = search.to_arrow()
        asked = found.column("query_index").to_numpy() if len(queries) > 1 else np.zeros(len(found), np.int64)
        # Lance's distance is one minus the inner product
        values, places = 1 - found.column("_distance").to_numpy(), found.column("number").to_numpy()
        for row in range(len(queries)):
            own = np.flatnonzero(asked == row)
            own = own[np.argsort(-values[own], kind="stable")]
            scores[row, : len(own)], numbers[row, : len(own)] = values[own], places[own]
        return scores, numbers

    def _hits(self, scores: np.ndarray, numbers: np.ndarray, keep: Callable[[Entry], bool] | None) -> list[Hit]:
        entries = self.entries(numbers.tolist())
        hits = [
            Hit(int(number), float(score), entry) for number, score, entry in zip(numbers, scores, entries, strict=True)
        ]
        return [hit for hit in hits if keep is None or keep(hit.entry)]

    def _vectors(self, vectors: Any, what: str) -> np.ndarray:
        try:
            vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        except (TypeError, ValueError):
            raise UserError(f"{self.path}: {what}: not an array of numbers") from None
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise UserError(f"{self.path}: {what} of shape {list(vectors.shape)}; must be [number, {self.dimension}]")
        if not np.isfinite(vectors).all():
            raise UserError(f"{self.path}: {what}: row {int(np.argmin(np.isfinite(vectors).all(1)))} is not finite")
        return vectors

    def _keep_in_memory(self) -> None:
        with self._lock:
            size = len(self)
            if self._matrix is not None or not self._fits:
                return
            matrix = np.empty((size, self.dimension), np.float32)
            for start, rows in self.blocks():
                matrix[start : start + len(rows)] = rows
            self._matrix = matrix


_COLUMNS = ["number", "page", "title", "passages", "image", "fields"]


def _schema(dimension: int) -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("number", pa.int64(), nullable=False),
            pa.field("record", pa.int64(), nullable=False),
            pa.field("page", pa.string(), nullable=False),
            pa.field("title", pa.string(), nullable=False),
            pa.field("passages", pa.list_(pa.string()), nullable=False),
            pa.field("image", pa.string()),
            pa.field("fields", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dimension), nullable=False),
        ]
    )


def _entry(row: Mapping[str, Any]) -> Entry:
    fields = json.loads(row["fields"])
    return Entry(row["page"], tuple(row["passages"]), row["title"], row["image"], fields)


def _write(path: Path, note: Mapping[str, Any]) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)
