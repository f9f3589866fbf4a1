"""Streams: tar, Parquet and Hugging Face shards, read in shares, shuffled, resumed, trained on."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from llavakit.data.mixture import Mixture
from llavakit.data.paths import expand, is_stream
from llavakit.data.records import BadRecords
from llavakit.data.shards import open_shards
from llavakit.data.stream import Reader, RecordStream
from llavakit.data.webdataset import record_of
from llavakit.errors import FieldError, RecipeError, RecordError, UserError
from llavakit.training.recipe import Source, parse_recipe
from llavakit.training.run import train
from llavakit.training.streaming import DrawnBatch, StreamBatches, StreamSamples, _draw

QUIET = Console(quiet=True)


def picture(value: int = 0, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value % 256, 80, 10)).save(out, "PNG")
    return out.getvalue()


def pair(answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nwhat colour ?"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | more


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, members in samples:
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, shards: int, each: int) -> str:
    """Tar files of pairs whose answers are their numbers; returns their pattern."""
    for shard in range(shards):
        own = range(shard * each, (shard + 1) * each)
        samples = [(f"{n:06d}", {"json": json.dumps(pair(f"n{n}")).encode(), "png": picture(n)}) for n in own]
        write_tar(folder / f"{shard:03d}.tar", samples)
    return str(folder / f"{{000..{shards - 1:03d}}}.tar")


def write_table(path: Path, count: int, group: int = 4) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [pair(f"n{n}", image={"bytes": picture(n), "path": None}) for n in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def answers(stream: RecordStream, entries: Any) -> list[str]:
    return [stream.record(entry).messages[-1]["content"][0]["text"] for entry in entries]


# Names


def test_patterns_name_shards_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "x{1}.tar"):
        (tmp_path / name).touch()
    assert expand("s/{008..011}.tar") == ["s/008.tar", "s/009.tar", "s/010.tar", "s/011.tar"]
    assert expand("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand(str(tmp_path / "[ab].tar")) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert expand(str(tmp_path / "x{1}.tar")) == [str(tmp_path / "x{1}.tar")]
    assert [is_stream(name) for name in ("a.tar", "a.TGZ", "hf://a/b", "a.parquet#5", "a.json", "tar", ["a.tar"])] == [
        *(True, True, True, True),
        *(False, False, False),
    ]
    assert [Source(path=path).name for path in ("d/mix/{00..12}.tar", "d/mix/*.parquet", "d/part-{0..3}.tar")] == [
        *("mix", "mix"),
        "part-{0..3}",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "none/{0..2}.tar"}, "none/{0..2}.tar: there is no file 'none/0.tar'"),
        ({"path": "none/*.parquet"}, "none/*.parquet: there is no such file"),
        ({"path": "{5..1}.tar"}, "{5..1}: must run from a number to a larger one"),
        ({"path": "{0..999999999}.tar"}, "at most 1000000 files"),
        ({"path": "TAR#10%"}, "a stream has no part; name fewer of its shards"),
        ({"path": "TAR", "sampling_strategy": "first:3"}, "a stream has no part"),
        ({"path": "TAR", "split": "train"}, "split belongs to a Hugging Face dataset (hf://NAME)"),
        ({"path": "TAR", "split": 3}, "split: must be a name, not 3"),
        ({"path": "hf://FOLDER/none"}, "the split 'train' cannot be streamed ("),
        ({"path": "BAD.parquet"}, "BAD.parquet: not a Parquet file ("),
    ],
)
def test_a_wrong_stream_gets_one_clear_line(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    path = options["path"].replace("TAR", write_shards(tmp_path, 1, 1)).replace("FOLDER", str(tmp_path))
    (tmp_path / "BAD.parquet").write_bytes(b"none")
    path = str(tmp_path / path) if path.startswith("BAD") else path
    with pytest.raises(UserError) as caught:
        RecordStream(options | {"path": path})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stream_is_no_indexed_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a stream, which training alone reads"):
        Mixture(write_shards(tmp_path, 1, 1))


# Samples of tar files


@pytest.mark.parametrize(
    ("members", "key", "expected"),
    [
        ({"json": pair("a"), "jpg": b"J"}, "image", [b"J"]),
        ({"json": pair("a", image="000.jpg"), "jpg": b"J"}, "image", b"J"),
        ({"json": pair("a", image="coco/train/77.jpg"), "png": b"P"}, "image", b"P"),
        ({"json": pair("a", image=["000.2.png", "000.1.png"]), "1.png": b"1", "2.png": b"2"}, "image", [b"2", b"1"]),
        ({"json": pair("a", image=["000.2.JPG", "000.1.JPG"]), "1.jpg": b"1", "2.jpg": b"2"}, "image", [b"2", b"1"]),
        ({"json": pair("a", image=["000.jpg", "000.jpg"]), "jpg": b"J"}, "image", [b"J", b"J"]),
        ({"json": pair("a"), "mp4": b"V"}, "video", [b"V"]),
        ({"json": pair("a"), "nii.gz": b"N"}, "volume", [b"N"]),
        ({"json": pair("a", image="else.jpg")}, "image", "else.jpg"),
        ({"json": {"url": "x"}, "jpg": b"J", "txt": b"a cat\n"}, "image", [b"J"]),
    ],
)
def test_members_of_a_sample_become_its_media(members: dict[str, Any], key: str, expected: Any) -> None:
    contents = {name: json.dumps(value).encode() if name == "json" else value for name, value in members.items()}
    raw = record_of("000", contents)
    assert raw[key] == expected
    assert raw["id"] == "000"
    if "txt" in members:
        assert [turn["value"] for turn in raw["conversations"]] == ["<image>", "a cat"]


def test_content_parts_and_columns_of_openais_form_take_members() -> None:
    parts = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "which?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "it"}]
    members = {"json": json.dumps({"messages": messages}).encode(), "png": b"B"}
    assert record_of("d/7", members)["messages"][0]["content"][0]["image"] == b"B"
    members["json"] = json.dumps({"messages": messages, "images": ["y.png"]}).encode()
    with pytest.raises(FieldError, match=r"image: the record names 2, the sample holds 1 more: d/7\.png"):
        record_of("d/7", members)


@pytest.mark.parametrize("compressed", [False, True])
def test_errors_name_shard_and_record(tmp_path: Path, compressed: bool) -> None:
    sound = {"json": json.dumps(pair("a")).encode(), "png": picture()}
    samples = [
        ("0", sound),
        ("1", {"json": b"{", "png": picture()}),
        ("2", {"json": json.dumps(pair("a", image=["a.png", "b.png"])).encode(), "png": picture()}),
        ("3", {"png": picture()}),
        ("4", sound),
    ]
    path = write_tar(tmp_path / ("a.tar.gz" if compressed else "a.tar"), samples, "w:gz" if compressed else "w")
    path.write_bytes(path.read_bytes()[: -30 if compressed else 8720])  # inside of the last picture
    stream = RecordStream(str(path))
    entries = list(stream.entries(0, 0))
    said = []
    for entry in entries:
        try:
            said.append(stream.record(entry).messages[-1]["role"])
        except RecordError as error:
            said.append(str(error).removeprefix(f"{path}:"))
    assert said[0] == "assistant"
    assert said[1].startswith("2: record: ")
    assert "(in 1.json)" in said[1]
    assert said[2] == "3: image: the record names 2, the sample holds 1 more: 2.png (sample 2)"
    assert said[3].startswith("4: record: needs conversations or messages; it has id, image")
    assert said[4].startswith("5: record: the shard cannot be read from here on (")
    assert [entry.line for entry in stream.entries(0, 0, skip=3)] == [4, 5]
    assert not list(stream.entries(0, 0, skip=5))  # the error was taken too


def test_parquet_and_hugging_face_shards_hold_pictures(tmp_path: Path) -> None:
    write_table(tmp_path / "t" / "train-0.parquet", 10)
    write_table(tmp_path / "t" / "train-1.parquet", 6)
    tables = RecordStream(str(tmp_path / "t" / "*.parquet"))
    hub = RecordStream({"path": f"hf://{tmp_path / 't'}", "split": "train"})
    assert (tables.shards, hub.shards) == (5, 2)
    for stream in (tables, hub):
        found = [entry for shard in range(stream.shards) for entry in stream.entries(0, shard)]
        assert answers(stream, found) == [f"n{n}" for n in [*range(10), *range(6)]]
        content = stream.record(found[9]).messages[0]["content"][0]["image"]
        assert Image.open(io.BytesIO(content)).getpixel((0, 0)) == (9, 80, 10)
        behind = [6, 7] if stream is tables else [2, 3, 4, 5]
        assert answers(stream, stream.entries(0, 1, skip=2)) == [f"n{n}" for n in behind]
    assert [entry.line for entry in tables.entries(0, 1)] == [5, 6, 7, 8]
    assert open_shards(f"hf://{tmp_path / 't'}").read(1).__next__().file.endswith("t (train, shard 2 of 2)")


# Shares and places


@pytest.mark.parametrize(("shards", "each", "world"), [(7, 3, 1), (7, 3, 3), (2, 5, 4), (1, 6, 3)])
def test_every_record_is_read_once_an_epoch_whatever_the_shares(
    tmp_path: Path, shards: int, each: int, world: int
) -> None:
    stream = RecordStream(write_shards(tmp_path, shards, each))
    seen: list[str] = []
    orders = []
    for rank in range(world):
        reader = Reader(stream, 5, rank, world)
        first = answers(stream, reader.take(1000))  # one source: at most an epoch
        assert reader.state()[0]["epoch"] == 0
        second = answers(stream, reader.take(1000))
        orders.append((first, second))
        seen += first
    assert sorted(Counter(seen)) == sorted(f"n{n}" for n in range(shards * each))
    assert max(Counter(seen).values()) == 1
    if shards > 2:
        assert any(first != second for first, second in orders)  # shards in another order
    assert Reader(stream, 5, 0, world).take(3) == Reader(stream, 5, 0, world).take(3)
    if shards > 2:
        assert Reader(stream, 5, 0, world).take(9) != Reader(stream, 6, 0, world).take(9)


@pytest.mark.parametrize("world", [1, 4])
def test_a_reader_goes_on_at_any_entry(tmp_path: Path, world: int) -> None:
    write_table(tmp_path / "t.parquet", 10, group=3)
    (tmp_path / "more.json").write_text(json.dumps([pair(f"m{n}", image="p.png") for n in range(5)]))
    (tmp_path / "p.png").write_bytes(picture())
    sources = [
        write_shards(tmp_path, 3, 4),
        str(tmp_path / "t.parquet"),
        {"path": str(tmp_path / "more.json"), "weight": 0.5},
    ]
    stream = RecordStream(sources)
    whole = Reader(stream, 1, world - 1, world)
    expected = answers(stream, whole.take(60))
    assert Counter(answer[0] for answer in expected)["m"] == 12  # 0.5 of 2.5
    for count in (0, 1, 7, 12, 13, 31, 59):
        before = Reader(stream, 1, world - 1, world)
        before.take(count)
        state = json.loads(json.dumps(before.state()))
        after = Reader(stream, 1, world - 1, world, state)
        assert answers(stream, after.take(60 - count)) == expected[count:]


def test_a_share_without_records_is_said(tmp_path: Path) -> None:
    reader = Reader(RecordStream(write_shards(tmp_path, 1, 2)), 0, 2, 3)
    with pytest.raises(UserError, match="holds no record for process 3 of 3"):
        reader.take(1)
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(UserError, match=r"empty.tar: holds no record$"):
        Reader(RecordStream(str(tmp_path / "empty.tar")), 0).take(1)


# Training


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The squares of the tests of training, also as tar files."""
    folder = tiny_training.write_world(tmp_path_factory.mktemp("streamed"))
    records = json.loads((folder / "records.json").read_text())
    for shard in range(4):
        samples = []
        for record in records[shard * 6 : shard * 6 + 6]:
            members = {"json": json.dumps(record).encode()}
            if "image" in record:
                members["png"] = (folder / "images" / record["image"]).read_bytes()
            samples.append((f"{int(record['id']):04d}", members))
        write_tar(folder / "shards" / f"{shard}.tar", samples)
    return folder


def recipe(world: Path, out: Path, **stage: Any) -> dict[str, Any]:
    raw = tiny_training.recipe(world, output=str(out), data=[{"path": str(world / "shards" / "{0..3}.tar")}])
    own = {"buffer": 4, "save_steps": 2, "packing": True, "max_length": 64, "batch_size": 2}
    raw["stages"] = [raw["stages"][1] | own | stage]
    return raw


def test_killed_training_ends_in_the_same_bits_with_any_number_of_workers(world: Path, tmp_path: Path) -> None:
    whole = train(parse_recipe(recipe(world, tmp_path / "whole")), console=QUIET)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(world, tmp_path / "cut")))
    script = (
        "import os, signal, sys\n"
        "from llavakit.training.run import train\n"
        "from llavakit.training.trainer import StageTrainer\n"
        "step = StageTrainer.training_step\n"
        "def kill(self, *args):\n"
        "    if self.state.global_step == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *args)\n"
        "StageTrainer.training_step = kill\n"
        "train(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], env=os.environ, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    folder = tmp_path / "cut" / "tune"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    state = json.loads((folder / "checkpoint-4" / "stream_0.json").read_text())
    assert state["batches"] == 4
    assert state["buffer"] > 0  # not in the first buffer any more
    with pytest.raises(RecipeError, match="left by 1 processes"):
        StreamBatches(None, parse_recipe(recipe(world, tmp_path)).stages[0], 0, world=2, state=state)
    rest = train(parse_recipe(recipe(world, tmp_path / "cut", workers=2)), console=QUIET)
    assert [entry["loss"] for entry in rest.stages[0].metrics["log"]] == [
        entry["loss"] for entry in whole.stages[0].metrics["log"]
    ]
    ours, theirs = (load_file(result.final / "model.safetensors") for result in (whole, rest))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def one_rank(recipe: str, rank: int, port: int) -> None:
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in places.items()})
    train(recipe, console=QUIET)


@pytest.mark.slow
def test_two_processes_with_a_share_each_are_killed_and_go_on(world: Path, tmp_path: Path) -> None:
    def start(folder: str) -> list[Any]:
        file = tmp_path / f"{folder}.yaml"
        raw = recipe(world, tmp_path / folder, max_steps=40)
        file.write_text(yaml.safe_dump(raw))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["llavakit.training.run"])
        found = [context.Process(target=one_rank, args=(str(file), rank, port)) for rank in (0, 1)]
        for process in found:
            process.start()
        return found

    def finish(processes: list[Any]) -> None:
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0, 0]

    finish(start("whole"))
    processes = start("cut")
    while all(process.is_alive() for process in processes) and not [*tmp_path.glob("cut/tune/checkpoint-*")]:
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    (left,) = tmp_path.glob("cut/tune/checkpoint-*")
    states = [json.loads((left / f"stream_{rank}.json").read_text()) for rank in (0, 1)]
    assert states[0]["batches"] == states[1]["batches"] < 40
    assert [state["world"] for state in states] == [2, 2]
    assert [(left / f"rng_state_{rank}.pth").is_file() for rank in (0, 1)] == [True, True]
    finish(start("cut"))
    ours, theirs = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert ours == theirs


class Words:
    """Makes samples of words."""

    def encode(self, record: Any, *, media: bool = True) -> dict[str, Any]:
        if record.messages[-1]["content"][0]["text"] == "broken" and media:
            raise UserError("cannot be decoded")
        return {"text": record.messages[-1]["content"][0]["text"]}

    def check(self, sample: dict[str, Any], record: Any) -> dict[str, Any]:
        return sample

    def length(self, sample: dict[str, Any]) -> int:
        return len(sample["text"])


def drawn(samples: StreamSamples, batches: StreamBatches) -> list[list[str]]:
    return [[sample["text"] for sample in samples.__getitems__(batch)] for batch in batches if batch is not None]


def stage_of(**changes: Any) -> Any:
    raw = {"name": "a", "train": ["all"], "learning_rate": 1, "max_steps": 12, "batch_size": 3, "buffer": 7} | changes
    return parse_recipe({"model": "m", "stages": [raw]}).stages[0]


@pytest.mark.parametrize(
    "changes", [{}, {"packing": True, "max_length": 6}, {"group_by_modality": True}, {"accumulation": 2}]
)
def test_batches_go_on_after_any_of_them(tmp_path: Path, changes: dict[str, Any]) -> None:
    stage = stage_of(**changes)
    samples = StreamSamples(RecordStream(write_shards(tmp_path, 4, 5)), Words())
    whole = StreamBatches(samples, stage, 3)
    expected = drawn(samples, whole)
    assert len(expected) == len(whole) == stage.max_steps * stage.accumulation
    assert len({text for batch in expected for text in batch}) == 20
    places = []
    running = StreamBatches(samples, stage, 3)
    iterator = iter(running)
    for count in range(len(whole)):
        places.append(
            json.loads(json.dumps(running.state(count) if count else StreamBatches(samples, stage, 3)._begin))
        )
        next(iterator)
    for count, place in enumerate(places):
        again = StreamBatches(samples, stage, 3, state=place)
        assert sum(batch is None for batch in again) == count  # the trainer passes over these
        assert drawn(samples, again) == expected[count:]


class Text(Words):
    """Samples without media."""

    def length(self, sample: dict[str, Any]) -> int:
        return -10


def test_the_short_buffer_at_the_end_of_an_epoch_may_fill_no_chunk(tmp_path: Path) -> None:
    samples = StreamSamples(RecordStream(write_shards(tmp_path, 2, 5)), Text())
    stage = stage_of(packing="stream", max_length=32, batch_size=1, buffer=8)  # of ten records two are left over
    assert sum(batch is not None for batch in StreamBatches(samples, stage, 0)) == 12
    with pytest.raises(UserError, match="its records do not fill a batch"):
        list(StreamBatches(samples, stage_of(packing="stream", max_length=320, batch_size=1, buffer=8), 0))


def test_a_broken_record_is_replaced_by_one_of_its_source(tmp_path: Path) -> None:
    few, many = (RecordStream(write_shards(tmp_path / name, 1, count)) for name, count in (("few", 5), ("many", 40)))
    one, other = list(few.entries(0, 0)), [replace(entry, source=1) for entry in many.entries(0, 0)]
    batch = _draw([*other, *one], [40], 2, 0)
    assert [entry.source for entry in batch.entries] == [0, 0, 0]
    assert {entry.source for entry in _draw([*other, one[0]], [40], 2, 0).entries[1:]} == {1}


def test_broken_records_stop_a_stream_or_are_left_out(tmp_path: Path) -> None:
    texts = ["n0", "n1", "broken", "n3", "n4", "n5", "n6", "n7"]
    samples = [(f"{n}", {"json": json.dumps(pair(text)).encode(), "png": picture()}) for n, text in enumerate(texts)]
    samples[1] = ("1", {"json": b"[", "png": picture()})
    samples[4] = ("4", {"json": json.dumps({"conversations": []}).encode(), "png": picture()})
    path = write_tar(tmp_path / "a.tar", samples)
    stream, stage = RecordStream(str(path)), stage_of(max_steps=6, batch_size=2, buffer=8)
    with pytest.raises(RecordError, match=r"a.tar:2: record: .*\(in 1.json\)"):
        drawn(strict := StreamSamples(stream, Words()), StreamBatches(strict, stage, 0))
    bad = BadRecords(tmp_path / "bad.jsonl")
    lenient = StreamSamples(stream, Words(), on_bad_record="skip", bad=bad)
    found = drawn(lenient, StreamBatches(lenient, stage, 0))
    assert {text for batch in found for text in batch} == {"n0", "n3", "n5", "n6", "n7"}
    assert all(len(batch) == 2 for batch in found)
    assert [error.line for error in bad.errors()] == [2, 3, 5]
    entries = [entry for entry in stream.entries(0, 0) if entry.line == 3]  # nothing that could replace it
    with pytest.raises(UserError, match="no usable record in the source of"):
        lenient.__getitems__(DrawnBatch(entries, [0], 0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_steps": None}, "stages.0.max_steps: is missing; where a stream ends is not known"),
        ({"packing": False, "cache_features": True}, "stages.0.cache_features: takes every record beforehand"),
        ({"objective": "dpo"}, "stages.0.objective: 'dpo' looks at every record beforehand"),
    ],
)
def test_a_stage_that_must_know_all_records_refuses_a_stream(
    world: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        train(parse_recipe(recipe(world, tmp_path, **changes)), console=QUIET)
    assert said in str(caught.value)


def test_broken_shards_are_found_before_the_first_step(world: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "s" / "0.tar", [("a", {"json": json.dumps(pair("it")).encode(), "png": b"none"})])
    raw = recipe(world, tmp_path / "out") | {"data": [{"path": str(tmp_path / "s" / "*.tar")}]}
    with pytest.raises(RecordError, match=r"s/0.tar:1: image: "):
        train(parse_recipe(raw), console=QUIET)
    with pytest.raises(UserError, match=r"no usable record among those looked at in .*; .*0.tar:1: image"):
        train(parse_recipe(raw, ["on_bad_record=skip"]), console=QUIET)
    assert not (tmp_path / "out").exists()
