"""Stores and retrievers: what is found, in which order, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
from PIL import Image

from llavakit.cli import app as cli
from llavakit.errors import UserError
from llavakit.retrieval import NO_NEIGHBOUR, Entry
from llavakit.retrieval.encoder import StoreEncoder, load_encoder
from llavakit.retrieval.exact import best, unit
from llavakit.retrieval.index import build_store
from llavakit.retrieval.pages import open_pages
from llavakit.retrieval.passages import pack
from llavakit.retrieval.retriever import StoreRetriever, open_retriever
from llavakit.retrieval.sentences import sentences

pytest.importorskip("lancedb")

from llavakit.retrieval.store import Store


class Letters(StoreEncoder):
    """Counts letters of texts, and shades of pictures."""

    name, identity, dimension = "letters", "1", 26

    def texts(self, texts):
        return np.array([[text.count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)

    def images(self, images):
        return np.array([[image.convert("L").getpixel((0, 0)) == i for i in range(26)] for image in images], np.float32)


def entries(*texts: str) -> list[Entry]:
    return [Entry(f"p{i}", (text,), title=text.title(), fields={"patient": str(i % 2)}) for i, text in enumerate(texts)]


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "store", 26, encoder=Letters().describe(), settings={"source": "x"})
    found = entries("aaa", "abb", "bbb", "ccc")
    store.add(found[:3], Letters().texts(["aaa", "abb", "bbb"]))
    store.add(found[3:], Letters().texts(["ccc"]))
    return store


def test_a_store_comes_back_as_it_was_written(store):
    again = Store.open(store.path, encoder=Letters().describe())
    assert len(again) == 4
    assert (again.dimension, again.metric, again.settings) == (26, "cosine", {"source": "x"})
    assert again.entries([3, 0, 0]) == [entries("aaa", "", "", "ccc")[i] for i in (3, 0, 0)]
    assert entries("aaa")[0].text == "aaa"
    with pytest.raises(IndexError):
        again.entries([4])


def test_exact_search_is_brute_force_and_does_not_see_the_length_of_a_query(tmp_path):
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(500, 16)).astype("f4"), rng.normal(size=(9, 16)).astype("f4")
    for metric in ("cosine", "dot"):
        store = Store.create(tmp_path / metric, 16, metric=metric)
        store.add(entries(*"x" * 500), vectors)
        rows = unit(vectors) if metric == "cosine" else vectors
        expected = unit(queries).astype(np.float64) @ rows.T.astype(np.float64)
        scores, numbers = store.neighbours(queries * 7, 12)
        assert (numbers == np.argsort(-expected, axis=1)[:, :12]).all()
        np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :12], rtol=1e-5, atol=1e-6)
        assert (store.neighbours(queries[2:3], 12)[1] == numbers[2]).all()


def test_a_small_store_says_which_neighbours_it_lacks(store):
    scores, numbers = store.neighbours(Letters().texts(["a"]), 6)
    assert numbers.tolist()[0][:2] == [0, 1]
    assert numbers.tolist()[0][4:] == [NO_NEIGHBOUR] * 2
    assert np.isneginf(scores[0, 4:]).all()
    assert [hit.index for hit in store.search(Letters().texts(["a"]), 6)[0]] == numbers.tolist()[0][:4]


@pytest.mark.parametrize("seed", range(30))
def test_neighbours_are_those_of_a_flat_faiss_index_also_among_equals(seed):
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(seed)
    n, d, k, q = (int(rng.integers(1, high)) for high in (300, 9, 40, 40))
    base = unit(rng.normal(size=(max(1, n // int(rng.integers(1, 8))), d)))
    vectors, queries = base[rng.integers(0, len(base), n)], unit(rng.normal(size=(q, d)))
    index = faiss.IndexFlatIP(d)
    index.add(vectors)
    cut = int(rng.integers(1, n + 1))
    blocks = [(begin, vectors[begin : begin + cut]) for begin in range(0, n, cut)]
    assert (best(queries, blocks, k)[1] == index.search(queries, k)[1]).all()


def test_a_retriever_takes_texts_pictures_and_vectors_together(store):
    retriever = StoreRetriever(store, Letters())
    picture = Image.new("L", (2, 2), 2)
    vector = Letters().texts(["bb"])[0]
    text, image, given = retriever.retrieve(["aa", picture, vector], 1)
    assert [hits[0].entry.text for hits in (text, image, given)] == ["aaa", "ccc", "bbb"]
    assert text[0].score == pytest.approx(1)
    assert retriever.retrieve([], 3) == []


def test_entries_that_are_not_kept_make_room_for_further_ones(store):
    hits = StoreRetriever(store, Letters()).retrieve(["a"], 2, keep=lambda entry: entry.fields["patient"] == "1")
    assert [hit.entry.page for hit in hits[0]] == ["p1", "p3"]
    assert StoreRetriever(store, Letters()).retrieve(["a"], 2, keep=lambda entry: False) == [[]]


@pytest.mark.parametrize("in_memory", [True, False])
def test_approximate_search_finds_most_of_the_neighbours(tmp_path, monkeypatch, in_memory):
    from llavakit.retrieval import store as module

    if not in_memory:
        monkeypatch.setattr(module, "IN_MEMORY", 0)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 32))
    vectors = (centres[rng.integers(0, 40, 2000)] + 0.5 * rng.normal(size=(2000, 32))).astype("f4")
    store = Store.create(tmp_path / "store", 32)
    store.add(entries(*"x" * 2000), vectors)
    assert not store.has_index
    with pytest.raises(UserError, match="has no index"):
        store.neighbours(vectors[:1], 1, approximate=True)
    store.build_index()
    assert Store.open(store.path).has_index
    for asked in (vectors[:50], vectors[7:8]):
        exact, found = store.neighbours(asked, 10), store.neighbours(asked, 10, approximate=True)
        shared = [len(set(a) & set(b)) for a, b in zip(exact[1].tolist(), found[1].tolist(), strict=True)]
        assert sum(shared) >= 9.5 * len(asked)
        assert (found[1][:, 0] == exact[1][:, 0]).all()
        np.testing.assert_allclose(found[0][:, 0], 1, atol=1e-5)
    store.add(entries("late"), -vectors[:1])
    assert store.neighbours(-vectors[:1], 1, approximate=True)[1].tolist() == [[2000]]
    assert Store.open(store.path).neighbours(-vectors[:1], 1, approximate=True)[1].tolist() == [[2000]]


def test_an_index_of_another_store_is_refused(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(400, 8)).astype("f4")
    stores = []
    for name, count in (("a", 400), ("b", 300)):
        stores.append(Store.create(tmp_path / name, 8))
        stores[-1].add(entries(*"x" * count), vectors[:count])
    tiny = Store.create(tmp_path / "tiny", 8)
    tiny.add(entries("x"), vectors[:1])
    with pytest.raises(UserError, match="an index needs 256 entries, the store has 1"):
        tiny.build_index()
    stores[0].build_index()
    file = stores[0].path / "partitions.safetensors"
    (stores[1].path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="belongs to another store"):
        Store.open(stores[1].path).neighbours(vectors[:1], 1, approximate=True)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        Store.open(stores[0].path).neighbours(vectors[:1], 1, approximate=True)


def test_bad_stores_and_queries_are_one_line(store, tmp_path):
    other = Letters()
    other.identity, other.name = "2", "other"
    vector = Letters().texts(["a"])
    cases = [
        (lambda: Store.create(store.path, 26), "exists already"),
        (lambda: Store.create(tmp_path / "x", 0), "dimension 0: must be a positive number"),
        (lambda: Store.create(tmp_path / "x", 3, metric="l2"), "must be cosine or dot"),
        (lambda: Store.open(tmp_path), "is not a store; `llavakit index SOURCE STORE` makes one"),
        (lambda: StoreRetriever(store, other), "was made with the encoder 'letters', not with 'other'"),
        (lambda: StoreRetriever(store).retrieve(["a"], 1), "needs the encoder that made it"),
        (lambda: store.neighbours(vector, 0), "k 0: must be a positive number"),
        (lambda: store.neighbours(vector[:, :5], 1), r"must be \[number, 26\]"),
        (lambda: store.neighbours(vector * np.nan, 1), "query: row 0 is not finite"),
        (lambda: store.add(entries("a", "b"), vector), "2 entries and 1 vectors"),
        (lambda: Store.create(tmp_path / "empty", 26).neighbours(vector, 1), "the store is empty"),
        (lambda: load_encoder(tmp_path), "has no config.json"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
    assert len(store) == 4
    for file in (store.path / "entries.lance" / "data").iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="its table cannot be read"):
        Store.open(store.path).neighbours(vector, 1)
    note = store.path / "store.json"
    for wrong, message in (({"format": 9}, "format 9"), ({"format": 1}, "dimension: missing")):
        note.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            Store.open(store.path)


def clip_folder(folder):
    """A tiny CLIP with tokenizer and image processor."""
    import torch
    from tiny_training import write_tokenizer
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    sides = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sides | {"vocab_size": 80, "max_position_embeddings": 12},
        vision_config=sides | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_a_clip_model_encodes_texts_and_pictures_into_one_space(tmp_path):
    encoder = load_encoder(clip_folder(tmp_path / "clip"))
    texts = encoder.texts(["red square", "blue white", "red square red square red square red square red square red"])
    images = encoder.images([Image.new("RGB", (20, 30), "red"), Image.new("L", (16, 16))])
    assert texts.shape == (3, 8)
    assert images.shape == (2, 8)
    np.testing.assert_allclose(texts[1], encoder.texts(["blue white"])[0], atol=1e-6)
    store = Store.create(tmp_path / "store", 8, encoder=encoder.describe())
    store.add(entries("red square", "blue white"), texts[:2])
    found = open_retriever(store.path).retrieve(["blue white"], 1)
    assert found[0][0].entry.text == "blue white"
    assert load_encoder(tmp_path / "clip").identity == encoder.identity


def test_a_text_encoder_averages_or_takes_the_first_token(tmp_path):
    import torch
    from tiny_training import write_tokenizer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=80,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    mean, first = load_encoder(tmp_path), load_encoder(tmp_path, pooling="first")
    alone, together = mean.texts(["red square"]), mean.texts(["red square", "blue blue blue white"])
    np.testing.assert_allclose(alone[0], together[0], atol=1e-6)
    assert abs(first.texts(["red square"]) - alone).max() > 1e-3
    assert first.identity != mean.identity
    with pytest.raises(UserError, match="encodes texts alone"):
        mean.images([Image.new("RGB", (4, 4))])
    with pytest.raises(UserError, match="pooling 'max'"):
        load_encoder(tmp_path, pooling="max")


def test_passages_are_packed_greedily():
    sentences = [("One two three.", 4), ("Four five six seven.", 5), ("Eight nine!", 3), ("Ten?", 2)]
    assert pack(sentences, 8) == ["One two three.", "Four five six seven. Eight nine!", "Ten?"]
    assert pack(sentences) == ["One two three. Four five six seven. Eight nine! Ten?"]
    assert pack([("long", 9), ("a", 1), ("b", 1), ("long", 9), ("c", 1)], 3) == ["long", "a b", "long", "c"]
    assert pack([]) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "No pneumonia.  Mild edema at 3 cm. Dr. Smith saw it.",
            [("No pneumonia.", 3), (" Mild edema at 3 cm.", 7), ("Dr. Smith saw it.", 5)],
        ),
        (
            "Effusion, e.g. left.Small (1.5 cm)?! A. B. end",
            [("Effusion, e.g. left.", 5), ("Small (1.5 cm)?!", 7), ("A. B. end", 3)],
        ),
        ("It can't be 8 p.m. now... or so", [("It can't be 8 p.m. now... or so", 10)]),
        ("a\n\nbb. c", [("a\n\nbb.", 4), ("c", 1)]),
        ("www.example.org is it. Yes", [("www.example.org is it.", 4), ("Yes", 1)]),
        ("x-ray and/or CT:)", [("x-ray and/or CT:)", 6)]),
        ("", []),
        ("  ", [("  ", 1)]),
    ],
)
def test_sentences_are_those_of_spacys_rules(text, found):
    assert sentences(text) == found
    spacy = sys.modules.get("spacy") or importlib.util.find_spec("spacy")
    if spacy is not None:
        pipeline = importlib.import_module("spacy").blank("en")
        pipeline.add_pipe("sentencizer")
        assert [(sentence.text, len(sentence)) for sentence in pipeline(text).sents] == found


def pages_file(folder, count=12):
    records = [
        {"id": f"p{i}", "title": f"Page {i}", "text": "aaa bbb. " * 3 + f"{chr(97 + i)} here.", "kind": i}
        for i in range(count)
    ]
    path = folder / "pages.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_store_is_built_from_records_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    from llavakit.retrieval import index

    monkeypatch.setattr(index, "ROWS", 3)
    monkeypatch.setattr(index, "ENCODE", 2)
    source = pages_file(tmp_path)

    class Killed(Letters):
        left = 4

        def texts(self, texts):
            Killed.left -= 1
            if not Killed.left:
                raise KeyboardInterrupt
            return super().texts(texts)

    whole = index.build_store(open_pages(source), tmp_path / "whole", Letters(), tokens=6)
    assert (whole.entries, whole.pages, whole.resumed) == (24, 12, 0)
    with pytest.raises(KeyboardInterrupt):
        index.build_store(open_pages(source), tmp_path / "killed", Killed(), tokens=6)
    assert 0 < len(Store.open(tmp_path / "killed")) < 24
    rest = index.build_store(open_pages(source), tmp_path / "killed", Letters(), tokens=6)
    assert 0 < rest.resumed < 12
    assert rest.pages == 12 - rest.resumed
    one, other = Store.open(tmp_path / "whole"), Store.open(tmp_path / "killed")
    assert one.entries(range(24)) == other.entries(range(24))
    assert all((a == b).all() for (_, a), (_, b) in zip(one.blocks(), other.blocks(), strict=True))
    assert one.entries([1])[0] == Entry("p0", ("aaa bbb. a here.",), "Page 0", None, {"kind": "0"})
    assert index.build_store(open_pages(source), tmp_path / "whole", Letters(), tokens=6).pages == 0
    with pytest.raises(UserError, match=r"tokens 6.*made otherwise"):
        index.build_store(open_pages(source), tmp_path / "whole", Letters(), tokens=7)
    source.write_text(source.read_text() * 2)
    with pytest.raises(UserError, match="made otherwise"):
        index.build_store(open_pages(source), tmp_path / "whole", Letters(), tokens=6)


def test_pages_of_a_folder_are_their_text_titles_and_pictures(tmp_path):
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    Image.new("L", (4, 4), 2).save(folder / "c.png")
    Image.new("L", (4, 4), 3).save(tmp_path / "outside.png")
    (folder / "a.md").write_text(
        "# Head\n\nSome *text* with a [link](http://x.org).\n\n![p](c.png) ![q](../outside.png) ![r](http://x.org/y.png)\n"
    )
    html = "<title>T &amp; U</title><script>no()</script><h1>Big</h1><p>One<br>two</p><img src='../c.png?x=1'>"
    (folder / "sub" / "b.html").write_text(html)
    (folder / "ignored.txt").write_text("x")
    pages = open_pages(folder)
    assert [page.name for page in (pages[0], pages[1])] == ["a.md", "sub/b.html"]
    assert (pages[0].title, pages[0].text) == ("Head", "Head\nSome text with a link.")
    assert (pages[1].title, pages[1].text) == ("T & U", "Big\nOne\ntwo")
    assert pages[0].images == pages[1].images == (str(folder / "c.png"),)
    built = build_store(pages, tmp_path / "store", Letters(), embed=["image", "summary", "passage"])
    entries = built.store.entries(range(built.entries))
    assert [(entry.page, entry.text, entry.image is not None) for entry in entries] == [
        ("a.md", "Head\nSome text with a link.", False),
        ("a.md", "Head\nSome text with a link.", False),
        ("a.md", "Head\nSome text with a link.", True),
        ("sub/b.html", "Big\nOne\ntwo", False),
        ("sub/b.html", "Big\nOne\ntwo", False),
        ("sub/b.html", "Big\nOne\ntwo", True),
    ]
    with pytest.raises(UserError, match="holds no Markdown or HTML file"):
        open_pages(tmp_path / "store")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "record: is"),
        ({"text": "x"}, "id: missing"),
        ({"id": "a", "text": 3}, "text: is 3; must be text"),
        ({"id": "a", "passages": "x"}, "passages: is 'x'; must be a list of text"),
        ({"id": "a", "passages": [], "sections": []}, "passages: given beside sections"),
        ({"id": "a", "images": ["nothing.png"]}, "images: .*nothing.png"),
    ],
)
def test_broken_pages_are_named_or_left_out(tmp_path, record, message):
    path = tmp_path / "pages.jsonl"
    path.write_text(json.dumps({"id": 0, "passages": ["abc"]}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"pages.jsonl:2: {message}"):
        build_store(open_pages(path), tmp_path / "x", Letters(), embed=["passage", "image"])
    built = build_store(open_pages(path), tmp_path / "y", Letters(), embed=["passage", "image"], on_bad_record="skip")
    assert built.entries == 1
    assert len(built.left_out) == 1
    assert not (tmp_path / "x").exists()


def test_nothing_to_embed_leaves_nothing_behind(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text(json.dumps({"id": 0, "passages": ["abc"]}) + "\n")
    with pytest.raises(UserError, match="no page has anything to embed"):
        build_store(open_pages(path), tmp_path / "store", Letters(), embed=["image"])
    with pytest.raises(UserError, match="embed 'audio': must be any of"):
        build_store(open_pages(path), tmp_path / "store", Letters(), embed=["audio"])
    assert not (tmp_path / "store").exists()


def test_the_command_builds_describes_and_queries(tmp_path, capsys):
    encoder, source, store = str(clip_folder(tmp_path / "clip")), pages_file(tmp_path), str(tmp_path / "store")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    assert cli.run(["index", str(source), store, "--encoder", encoder]) == 0
    assert capsys.readouterr().out == f"{store}: 12 entries (12 pages)\n"
    assert cli.run(["index", str(source), store, "--encoder", encoder]) == 0
    assert "12 entries (was complete)" in capsys.readouterr().out
    assert cli.run(["index", store, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["entries"], about["dimension"], about["complete"]) == (12, 8, True)
    for query in (str(tmp_path / "red.png"), "a here"):
        assert cli.run(["index", store, "--query", query, "--k", "2", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found) == 2
        assert found[0]["score"] >= found[1]["score"]
        assert cli.run(["index", store, "--query", query]) == 0
        assert capsys.readouterr().out.count("aaa bbb.") >= 5
    for arguments, message in (
        (["index", str(source), str(tmp_path / "new")], "--encoder: missing"),
        (["index", str(source)], "is not a store"),
        (["index", store, store, "--query", "x"], "looks in one store"),
        (["index", store, "--query", "x", "--approximate"], "has no index"),
        (["index", str(source), store, "--encoder", encoder, "--tokens", "9"], "made otherwise"),
        (["index", str(source), encoder, "--encoder", encoder], "exists already; name a new folder"),
    ):
        assert cli.run(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
