"""Commands of retrieval: `index`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llavakit.cli.common import Device, Dtype, Json, app, given, print_json, writing
from llavakit.cli.training import OnBadRecord
from llavakit.errors import UserError


@app.command()
def index(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Pages: a .jsonl or .json file, or a folder of Markdown and HTML.")
    ],
    store: Annotated[Path | None, typer.Argument(metavar="STORE", help="Folder of the store to build.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="CLIP, SigLIP or text encoder: a folder or hub id. Default: the store's own.")
    ] = None,
    embed: Annotated[
        str, typer.Option(help="What gets a vector: passage, summary (with the title), image; several with commas.")
    ] = "passage",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a passage.")] = 300,
    pooling: Annotated[
        str | None, typer.Option(help="Of a text encoder: mean of the tokens, or the first one.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the records' pictures. Default: that of SOURCE.")
    ] = None,
    ann: Annotated[
        bool | None, typer.Option("--ann/--no-ann", help="Build the index of approximate search. Default: if large.")
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="Look in the store SOURCE for a text or the file of a picture.")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Entries that --query prints.")] = 5,
    approximate: Annotated[bool, typer.Option(help="Ask the index instead of comparing every vector.")] = False,
    on_bad_record: Annotated[OnBadRecord, typer.Option(help="What to do with a broken page.")] = OnBadRecord.stop,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Build a store of passages and pictures, or look something up in one.

    Interrupted, the same command goes on. A record has id or url, and title, text or passages, summary, images.

    \b
    Examples:
      llavakit index wiki.jsonl wiki.store --encoder google/siglip2-base-patch16-224
      llavakit index notes/ notes.store --encoder intfloat/e5-small-v2 --tokens 200
      llavakit index wiki.store --query bridge.jpg --k 3
    """
    loading = given(device=device, dtype=dtype, pooling=pooling)
    if query is not None:
        if store is not None:
            raise UserError(f"{store}: --query looks in one store; `llavakit index STORE --query ...`")
        _look(source, query, k, approximate, as_json, given(encoder=encoder) | loading)
    elif store is None:
        _describe(source, as_json)
    else:
        if encoder is None:
            raise UserError("--encoder: missing; name a CLIP, SigLIP or text encoder to build the store with")
        kinds = [kind.strip() for kind in embed.split(",")]
        _build(
            source,
            store,
            images,
            encoder,
            loading,
            as_json,
            embed=kinds,
            tokens=tokens,
            index=ann,
            on_bad_record=on_bad_record.value,
        )


def _build(
    source: Path, store: Path, images: Path | None, encoder: str, loading: dict[str, Any], as_json: bool, **options: Any
) -> None:
    from llavakit.retrieval.encoder import load_encoder
    from llavakit.retrieval.index import build_store
    from llavakit.retrieval.pages import open_pages

    pages = open_pages(source, images)

    def progress(done: int, of: int) -> None:
        if sys.stderr.isatty() and (done % 100 == 0 or done == of):
            print(f"\r{done} of {of} pages", end="\n" if done == of else "", file=sys.stderr, flush=True)

    with writing(store):
        built = build_store(pages, store, load_encoder(encoder, **loading), progress=progress, **options)
    for line in built.left_out:
        print(f"left out: {line}", file=sys.stderr)
    counts = {"entries": built.entries, "pages": built.pages, "resumed": built.resumed, "left_out": built.left_out}
    if as_json:
        print_json({"store": str(store), **counts})
        return
    state = (
        "was complete"
        if not built.pages
        else f"{built.pages} pages" + (f", went on at page {built.resumed + 1}" if built.resumed else "")
    )
    print(f"{store}: {built.entries} entries ({state})")


def _look(store: Path, query: str, k: int, approximate: bool, as_json: bool, options: dict[str, Any]) -> None:
    from llavakit.media import load_image
    from llavakit.retrieval.retriever import open_retriever

    retriever = open_retriever(store, approximate=approximate, **options)
    if "embed" in retriever.store.settings and not retriever.store.settings.get("complete"):
        print(f"{store}: is not complete; the command that builds it goes on", file=sys.stderr)
    wanted = load_image(query) if Path(query).is_file() else query
    hits = retriever.retrieve([wanted], k)[0]
    if as_json:
        found = [
            {"score": hit.score, "index": hit.index, "page": hit.entry.page, "title": hit.entry.title}
            | {"text": hit.entry.text, "image": hit.entry.image, "fields": dict(hit.entry.fields)}
            for hit in hits
        ]
        print_json(found)
        return
    for hit in hits:
        title = f" ({hit.entry.title})" if hit.entry.title and hit.entry.title != hit.entry.page else ""
        print(f"{hit.score:.4f}  {hit.entry.page}{title}")
        text = " ".join(hit.entry.text.split())
        print(f"        {text if len(text) <= 200 else text[:199] + '…'}")


def _describe(path: Path, as_json: bool) -> None:
    from llavakit.retrieval.store import Store, is_store

    if not is_store(path) and path.exists():
        raise UserError(f"{path}: is not a store; to build one, name the folder of the store behind it")
    store = Store.open(path)
    about = {
        "entries": len(store),
        "dimension": store.dimension,
        "metric": store.metric,
        "encoder": store.encoder.get("name"),
        "approximate": store.has_index,
        "source": store.settings.get("source"),
        "complete": store.settings.get("complete", False),
    }
    if as_json:
        print_json(about)
        return
    for key, value in about.items():
        print(f"{key}: {value if value is not None else 'unknown'}")
