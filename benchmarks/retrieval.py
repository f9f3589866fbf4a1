"""Stores: exact search beside faiss, approximate search beside brute force, memory of building.

    OMP_NUM_THREADS=1 python benchmarks/retrieval.py [--part exact|approximate|memory] [--scratch DIR]

Needs the extra `retrieval`, and faiss-cpu for the first part. Vectors are drawn around centres, as those of passages
about common subjects lie; recall on vectors without any structure would be lower and says little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llavakit.retrieval.encoder import StoreEncoder
from llavakit.retrieval.entries import Entry
from llavakit.retrieval.exact import unit
from llavakit.retrieval.store import Store

CENTRES, SPREAD = 2000, 0.9
EXACT, APPROXIMATE = (37_016, 512, 1000, 7), (100_000, 384, 200, 10)


class Drawn(StoreEncoder):
    """Vectors around the centre that the number in a text names; an encoder without a network."""

    name, identity, dimension = "drawn", "1", 384

    def __init__(self) -> None:
        self.centres = np.random.default_rng(0).normal(size=(CENTRES, self.dimension)).astype(np.float32)

    def texts(self, texts):
        out = np.empty((len(texts), self.dimension), np.float32)
        for row, text in zip(out, texts, strict=True):
            number = int(text.split()[1])
            own = np.random.default_rng(number)
            row[:] = self.centres[own.integers(CENTRES)] + SPREAD * own.standard_normal(self.dimension)
        return out

    def images(self, images):
        raise NotImplementedError


def best_of(function, times: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def exact(scratch: Path) -> None:
    """A store of the size of KG-LLaVA's against a flat index of faiss."""
    import faiss

    faiss.omp_set_num_threads(1)
    count, dimension, asked, k = EXACT
    rng = np.random.default_rng(0)
    vectors, queries = (unit(rng.normal(size=(n, dimension))) for n in (count, asked))
    index = faiss.IndexFlatIP(dimension)
    index.add(vectors)
    path = scratch / "exact"
    store = Store.create(path, dimension)
    store.add([Entry(str(number)) for number in range(count)], vectors)
    store.finish()
    begin = time.perf_counter()
    found = Store.open(path).neighbours(queries, k)[1]
    first = time.perf_counter() - begin
    wanted = index.search(queries, k)[1]
    theirs, ours = best_of(lambda: index.search(queries, k)), best_of(lambda: store.neighbours(queries, k))
    print(f"\n{count:,} x {dimension}, {k} neighbours of {asked:,} queries, one thread")
    print(f"faiss IndexFlatIP {theirs:.3f} s; store {ours:.3f} s (x {ours / theirs:.2f}); with opening {first:.3f} s")
    print(f"identical neighbours: {(found == wanted).all()}")


def approximate(scratch: Path) -> None:
    """Recall and speed of the index."""
    count, dimension, asked, k = APPROXIMATE
    encoder = Drawn()
    store = Store.create(scratch / "approximate", dimension)
    for start in range(0, count, 4096):
        numbers = range(start, min(start + 4096, count))
        store.add([Entry(str(n)) for n in numbers], encoder.texts([f"passage {n}" for n in numbers]))
    begin = time.perf_counter()
    store.build_index()
    built = time.perf_counter() - begin
    queries = encoder.texts([f"query {10**6 + n}" for n in range(asked)])
    truth = store.neighbours(queries, k)[1]
    found = store.neighbours(queries, k, approximate=True)[1]
    recall = np.mean([len(set(a) & set(b)) / k for a, b in zip(truth.tolist(), found.tolist(), strict=True)])
    matrix = store._matrix

    def one_by_one(search) -> float:
        return best_of(lambda: [search(query[None]) for query in queries[:50]]) / 50

    fast = one_by_one(lambda query: store.neighbours(query, k, approximate=True))
    table, unit_queries = store._table, unit(queries)

    def scan(query: np.ndarray) -> None:
        search = table.search(query[0], vector_column_name="vector").distance_type("dot")
        search.bypass_vector_index().limit(k).select(["number", "_distance"]).to_arrow()

    scanned = best_of(lambda: [scan(query[None]) for query in unit_queries[:20]]) / 20
    product = one_by_one(lambda query: np.argpartition(matrix @ query[0], -k)[-k:])
    ours = one_by_one(lambda query: store.neighbours(query, k))
    print(f"\n{count:,} x {dimension}, {k} neighbours of one query after the other; index built in {built:.1f} s")
    print(f"recall@{k} {recall:.3f}; approximate {1e3 * fast:.2f} ms")
    for name, value in (
        ("LanceDB without its index", scanned),
        ("NumPy, all in memory", product),
        ("exact search of the store, all in memory", ours),
    ):
        print(f"{name}: {1e3 * value:.2f} ms, x {value / fast:.1f}")


def memory(scratch: Path) -> None:
    """Peak memory and bytes of building stores of two sizes, each in a process of its own."""
    print("\nbuilding with an encoder of 384-d vectors, `build_store` with the index")
    peaks = []
    for count in (10_000, 100_000):
        command = [sys.executable, __file__, "--build", str(count), "--scratch", str(scratch)]
        out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        peaks.append(out["peak"])
        print(f"{count:,} passages: peak {out['peak']} MB, {out['bytes'] / 1e6:.1f} MB on disk, {out['seconds']:.0f} s")
    print(f"ratio of the peaks: {peaks[1] / peaks[0]:.2f}")


def build(count: int, scratch: Path) -> None:
    """One store, measured from inside."""
    import torch  # noqa: F401  # an encoder needs it; it belongs to both sizes
    import transformers  # noqa: F401

    from llavakit.retrieval.index import build_store
    from llavakit.retrieval.pages import open_pages

    source = scratch / f"pages-{count}.jsonl"
    with source.open("w") as file:
        for number in range(count):
            text = f"passage {number} " + "with some words in it " * 12
            file.write(json.dumps({"id": number, "passages": [text]}) + "\n")
    path = scratch / f"store-{count}"
    shutil.rmtree(path, ignore_errors=True)
    begin = time.perf_counter()
    build_store(open_pages(source), path, Drawn(), index=True)
    seconds = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    # of this program alone; getrusage would count what the parent held when it was forked
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024
    print(json.dumps({"peak": peak, "bytes": size, "seconds": seconds}))


def main() -> None:
    """Run the parts."""
    parts = {"exact": exact, "approximate": approximate, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=parts, action="append")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--build", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as place:
        if options.build:
            build(options.build, Path(place))
            return
        print(f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}")
        for name in options.part or parts:
            parts[name](Path(place))


if __name__ == "__main__":
    main()
