"""The datastore: captions of training pictures by what they say, looked up by pictures.

llavakit prepare kg_datastore triplets.json knowledge.store encoder=medclip
llavakit prepare kg_triplets mimic_nle.json retrieved_triplets.json store=knowledge.store encoder=medclip images=data
llavakit prepare kg_datastore datastore/kg_nle_index knowledge.store        # a folder of the original code
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llavakit.data.preparation import Left
from llavakit.data.readers import open_source
from llavakit.data.strict_json import read_json
from llavakit.errors import MediaError, RecordError, UserError, quoted
from llavakit.media import load_image
from llavakit.retrieval.encoder import load_encoder
from llavakit.retrieval.entries import Entry, Hit
from llavakit.retrieval.retriever import open_retriever
from llavakit.retrieval.store import Store, check_free
from llavakit.systems.kg_llava.triplets import Caption, owners, read_captions

SEARCHED, KEPT = 15, 7
BATCH = 256  # captions that the original encodes together, which without a mask decides their vectors
PICTURES = 64
OWN = ("image", "study", "patient")
_CAPTIONS = "_captions.json"


def entry(caption: Caption) -> Entry:
    """A caption as an entry of a store."""
    return Entry(caption.image, (caption.text,), fields={"image": caption.image, **caption.owners})


def store_captions(
    captions: Sequence[Caption], vectors: np.ndarray, path: str | Path, encoder: Mapping[str, str] | None = None
) -> Store:
    """A store of captions and their vectors.

    Raises:
        UserError: If there is nothing to store, or the folder is taken.
    """
    if not captions:
        raise UserError(f"{path}: no captions, so there is nothing to store")
    store = Store.create(path, int(vectors.shape[-1]), encoder=encoder, settings={"source": "captions"})
    store.add([entry(caption) for caption in captions], vectors)
    return store


def neighbours_of_others(
    store: Store,
    queries: np.ndarray,
    whose: Sequence[Mapping[str, str]],
    *,
    searched: int | None = SEARCHED,
    kept: int = KEPT,
    exclude: Sequence[str] = ("image",),
) -> list[list[Hit]]:
    """Neighbours of pictures among the captions of others, for training data.

    Args:
        queries: Vectors of the pictures, [pictures, dimension].
        whose: `image`, and `study` and `patient` where they are known, of every picture.
        searched: Neighbours that are looked at, as published; None for as many as it takes.
        kept: Neighbours that a picture gets.
        exclude: What a caption may not have in common with the picture. Published is the image alone, which leaves a
            study's own triplets in training data when it has two views; `study` and `patient` leave them out.

    Raises:
        UserError: If a picture has too few neighbours of others.
    """
    unknown = [key for key in exclude if key not in OWN]
    if unknown:
        raise UserError(f"exclude {quoted(unknown[0])}: must be any of {', '.join(OWN)}")
    found = []
    for query, own in zip(queries, whose, strict=True):

        def others(candidate: Entry, own: Mapping[str, str] = own) -> bool:
            return not any(key in own and candidate.fields.get(key) == own[key] for key in exclude)

        if searched is None:
            hits = store.search(query[None], kept, keep=others)[0]
        else:
            hits = [hit for hit in store.search(query[None], searched)[0] if others(hit.entry)][:kept]
        if len(hits) < kept:
            raise UserError(
                f"{store.path}: {quoted(own.get('image'))} has {len(hits)} neighbours of others, it needs {kept}; "
                "search further (searched=), keep fewer (kept=), or store more captions"
            )
        found.append(hits)
    return found


def read_original(index: Path) -> tuple[np.ndarray, list[str]]:
    """Vectors and captions of a datastore of the original code: `NAME` (faiss) and `NAME_captions.json`.

    Raises:
        UserError: If a file is missing or damaged, or they do not belong together.
    """
    captions = index.with_name(index.name + _CAPTIONS)
    if index.is_dir():
        found = sorted(index.glob(f"*{_CAPTIONS}"))
        if len(found) != 1:
            raise UserError(f"{index}: holds {len(found)} files named *{_CAPTIONS}; a datastore has one")
        captions, index = found[0], found[0].with_name(found[0].name.removesuffix(_CAPTIONS))
    texts = read_json(captions, kind=list)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{captions}: holds something else than text")
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UserError(f"{index}: reading it needs faiss: pip install faiss-cpu") from error
    if not index.is_file():
        raise UserError(f"{index}: there is no such index beside {captions.name}")
    try:
        read = faiss.read_index(str(index))
        vectors = read.reconstruct_n(0, read.ntotal)
    except RuntimeError as error:
        raise UserError(f"{index}: not an index of faiss ({str(error).strip().splitlines()[-1]})") from None
    if len(vectors) != len(texts):
        raise UserError(f"{index}: holds {len(vectors)} vectors, {captions.name} {len(texts)} captions")
    return vectors, texts


def kg_datastore(
    source: Path,
    output: Path,
    bad: Left,
    *,
    encoder: str | None = None,
    split: str = "train",
    join: bool = True,
    unique: bool = False,
    least_patients: int = 1,
    mask: bool = True,
) -> dict[str, Any]:
    """A store of the triplets of training pictures, or of a datastore that the original code wrote.

    Args:
        encoder: Folder of MedCLIP (see `medclip`) or of another encoder of texts and pictures.
        split, join, unique, least_patients: See `read_captions`.
        mask: Leave padding out of a caption's vector. False as published: then a vector depends on the longest of the
            256 captions around it, which is needed to go on with an index of the original code.
    """
    original = source.is_dir() or source.with_name(source.name + _CAPTIONS).is_file()
    if encoder is None and not original:
        raise UserError("encoder: missing; name the folder of MedCLIP or of another encoder")
    made = None if encoder is None else load_encoder(encoder, **({} if mask else {"mask": False}))
    described = None if made is None else made.describe()
    if original:
        vectors, texts = read_original(source)
        with _whole(output) as place:
            store = Store.create(place, int(vectors.shape[1]), metric="dot", encoder=described)
            store.add([Entry(str(number), (text,)) for number, text in enumerate(texts)], vectors)
            store.finish()
        return {"captions": len(texts)}
    captions = read_captions(source, split=split, join=join, unique=unique, least_patients=least_patients)
    with _whole(output) as place:
        store = Store.create(place, made.dimension, encoder=described, settings={"source": str(source)})
        for begin in range(0, len(captions), BATCH):
            some = captions[begin : begin + BATCH]
            store.add([entry(caption) for caption in some], made.texts([caption.text for caption in some]))
        store.finish()
    return {"captions": len(captions), "pictures": len({caption.image for caption in captions})}


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A folder that takes the place of `output` when all is written, or is removed."""
    check_free(output)
    place = output.with_name(f"{output.name}.partial")
    shutil.rmtree(place, ignore_errors=True)
    try:
        yield place
        if output.exists():
            output.rmdir()
        place.rename(output)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def kg_triplets(
    source: Path,
    output: Path,
    bad: Left,
    *,
    store: str,
    encoder: str | None = None,
    images: str = ".",
    searched: int | None = None,
    kept: int = KEPT,
    exclude: Sequence[str] | str = OWN,
) -> dict[str, Any]:
    """The triplets of the nearest captions of every picture: a JSON object of picture ids and their triplets.

    Args:
        store: The store.
        encoder: Folder of its encoder; default the one that the store names.
        images: Folder of the pictures.
        searched, kept, exclude: See `neighbours_of_others`; published are `searched=15 exclude=image`.
    """
    retriever = open_retriever(store, encoder=encoder)
    wanted = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    entries = open_source(source)
    found: dict[str, list[str]] = {}

    def pictures() -> Iterator[tuple[dict[str, str], Any]]:
        for number in range(len(entries)):
            line = entries.line(number)
            try:
                record = entries[number]
                if not isinstance(record, Mapping) or not isinstance(record.get("img_path"), str):
                    raise RecordError(str(source), line, "img_path", "missing; a record names its picture")
                own = {"image": str(record.get("img_id", record["img_path"]))}
                own |= owners(record)
                yield own, load_image(Path(images) / record["img_path"])
            except MediaError as error:
                bad(RecordError(str(source), line, "img_path", str(error)))
            except RecordError as error:
                bad(error)

    for batch in _batches(pictures()):
        vectors = retriever.vectors([picture for _, picture in batch])
        hits = neighbours_of_others(
            retriever.store, vectors, [own for own, _ in batch], searched=searched, kept=kept, exclude=wanted
        )
        for (own, _), near in zip(batch, hits, strict=True):
            found[own["image"]] = [hit.entry.text for hit in near]
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.with_name(f"{output.name}.tmp")
    scratch.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    scratch.replace(output)
    return {"pictures": len(found)}


def _batches(items: Iterator[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == PICTURES:
            yield batch
            batch = []
    if batch:
        yield batch
