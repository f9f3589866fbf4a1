"""Readers, mixtures, samplers, packing and collation."""

import itertools
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llavakit.data import scienceqa
from llavakit.data.collate import Collator
from llavakit.data.dataset import SampleDataset
from llavakit.data.mixing import choose, mixed_order
from llavakit.data.mixture import Mixture, read_specs
from llavakit.data.packing import first_fit_decreasing, in_order, pack_rows
from llavakit.data.readers import JsonlSource, JsonSource, Selected, open_source
from llavakit.data.records import BadRecords, check_media, read_record
from llavakit.data.sampler import banded_by_length, length_grouped, modality_grouped, widely_grouped
from llavakit.errors import RecordError, UserError
from llavakit.proof.golden import run_case

GOLDEN = Path(__file__).parent / "golden"


def turns(question="Q?", answer="A."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def record(number, **keys):
    return {"id": number, "conversations": turns(f"Q{number}?", f"A{number}.")} | keys


def said(question, answer="A.", **keys):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **keys}]


def write_jsonl(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def questions(records):
    return [r.messages[0]["content"][-1]["text"] for r in records]


@pytest.mark.parametrize(
    "name",
    ["collator", "sampler", "sampler-chunks", "sampler-lengths", "scienceqa-conversion", "optimizer-groups"],
)
def test_golden_data(name):
    report = run_case(GOLDEN / "llava-1.5" / name)
    assert report.status == "passed", report.reason


# Readers


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_entries_come_back_as_written(tmp_path, suffix):
    entries = [record(n, text='brackets ]}[{ "quoted\\" \\\\', deep=[[[[[[[{"a": [n]}]]]]]]]) for n in range(20)]
    entries[3]["note"] = "täst 你好 \u2028"
    path = tmp_path / f"data{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("\n\n".join(json.dumps(e, ensure_ascii=False) for e in entries), encoding="utf-8")
    source = open_source(path)
    assert [source[n] for n in range(len(source))] == entries
    assert pickle.loads(pickle.dumps(source))[7] == entries[7]
    assert source.line(2) == (3 if suffix == ".json" else 5)


def test_lines_in_a_json_file_are_read_as_lines(tmp_path):
    path = tmp_path / "lines.json"
    write_jsonl(path, [record(0), record(1)])
    assert isinstance(open_source(path), JsonlSource)
    assert len(open_source(path)) == 2


def test_empty_json_list_has_no_entries(tmp_path):
    (tmp_path / "a.json").write_text(" [ ]\n")
    (tmp_path / "b.jsonl").write_text("")
    assert len(open_source(tmp_path / "a.json")) == len(open_source(tmp_path / "b.jsonl")) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("hello", "must be a JSON list"),
        ('[{"a": 1}, {"b": "cut', "cut off in or after record 2"),
        ('[{"a": 1}', "cut off in or after record 2"),
        ('[{"a": [1, {"b": 2}', "cut off in or after record 1"),
        ('[{"a": 1}]\n[{"a": 2}]', "there is more behind the end of its list of 1 records"),
        ('[{"a": 1}, {"b": 2}] {"a": 3}', "there is more behind the end of its list of 2 records"),
        ("[]]", "there is more behind the end of its list of 0 records"),
        ('{\n  "a": 1\n}\n{\n  "a": 2\n}\n', "its first record takes several lines"),
        ('\ufeff{"a":\n1}', "its first record takes several lines"),
    ],
)
def test_broken_json_file_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        open_source(path)


def test_what_a_file_holds_decides_how_it_is_read(tmp_path):
    entries = [record(n) for n in range(3)]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    listed = json.dumps(entries, indent=1)
    for name, text in (("a.json", lines), ("b.jsonl", lines), ("c.json", listed), ("d.jsonl", listed)):
        for mark in ("", "\ufeff"):
            (tmp_path / name).write_text(mark + text, encoding="utf-8")
            source = open_source(tmp_path / name)
            assert [source[n] for n in range(len(source))] == entries
    (tmp_path / "cut.jsonl").write_text('{"a": "cut\n' + lines)  # one broken line is not a file of several-line records
    assert len(open_source(tmp_path / "cut.jsonl")) == 4
    (tmp_path / "lists.jsonl").write_text('[1]\n{"a": 1}\n')
    assert open_source(tmp_path / "lists.jsonl")[1] == {"a": 1}


@pytest.mark.parametrize("name", ["run#3.jsonl", "part#1", "{a,b}.jsonl", "50%.jsonl", "a#500.jsonl", "x.jsonl#500"])
def test_a_path_that_exists_is_that_path(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    path = write_jsonl(folder / name if name.endswith("l") else folder / "data.jsonl", [record(n) for n in range(4)])
    assert len(Mixture(str(path))) == 4
    assert len(Mixture(f"{path}#2")) == 2
    assert len(Mixture(f"{path}#random:50%")) == 2


def test_a_saved_dataset_that_is_none_is_one_line(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: not a dataset that save_to_disk wrote"):
        open_source(tmp_path / "folder")


def test_stray_values_in_a_list_are_records_of_their_own(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1}, null, "text", oops, {"b": 2}]')
    source = JsonSource(path)
    assert len(source) == 5
    assert (source[1], source[2], source[4]) == (None, "text", {"b": 2})
    with pytest.raises(RecordError, match=r"data.json:4: record: not valid JSON"):
        source[3]


def test_subsets(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [record(n) for n in range(10)])
    ids = lambda source: [source[n]["id"] for n in range(len(source))]  # noqa: E731
    assert ids(open_source(f"{path}#3")) == [0, 1, 2]
    assert ids(open_source(f"{path}#25%")) == [0, 1, 2]
    assert ids(open_source(f"{path}#end:2")) == [8, 9]
    drawn = open_source(f"{path}#random:4")
    assert ids(drawn) == ids(open_source(f"{path}#random:4"))
    assert drawn.line(0) == drawn[0]["id"] + 1
    with pytest.raises(UserError, match="sampling_strategy: must be all"):
        Selected(open_source(path), "some:3")
    with pytest.raises(UserError, match="there is no such data file"):
        open_source(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"must be a .json or .jsonl"):
        open_source(tmp_path / "data.csv")


def test_sampling_strategies_of_onevision():
    case = GOLDEN / "llava-onevision/dataset_sampling"
    inputs, outputs = (json.loads((case / f"{name}.json").read_text()) for name in ("inputs", "outputs"))
    for key, mix in inputs.items():
        if "seed" not in mix:
            mix["datasets"] = [d for d in mix["datasets"] if not d.get("sampling_strategy", "").startswith("random")]
        shuffle = random.Random(mix.get("seed"))
        chosen = [
            f"{number}-{index}"
            for number, data in enumerate(mix["datasets"])
            for index in choose(range(data["n"]), data.get("sampling_strategy", "all"), shuffle)
        ]
        assert chosen == outputs[key][: len(chosen)]


def test_saved_hugging_face_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    picture = Image.new("RGB", (4, 3), (9, 8, 7))
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    said.append({"role": "assistant", "content": [{"type": "text", "text": "Grey."}]})
    table = datasets.Dataset.from_dict({"messages": [said], "images": [[picture]]})
    table.cast_column("images", datasets.List(datasets.Image())).save_to_disk(str(tmp_path / "saved"))
    found = Mixture(str(tmp_path / "saved"))[0]
    image = found.messages[0]["content"][0]["image"]
    assert image.size == (4, 3)
    assert found.messages[1]["content"] == [{"type": "text", "text": "Grey."}]


# Records


def picture(tmp_path, name="a.png"):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path / name


def test_media_are_found_below_their_folder(tmp_path):
    path = picture(tmp_path)
    said = turns("<image>\nQ")
    assert read_record({"image": "a.png", "conversations": said}, media_root=tmp_path).messages[0]["content"][0] == {
        "type": "image",
        "image": str(path),
    }
    assert read_record({"image": "a.png", "conversations": said}, str(tmp_path / "data.json"))
    inline = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    messages = [{"role": "user", "content": [inline]}, {"role": "assistant", "content": "x"}]
    assert read_record({"messages": messages}).messages[0]["content"][0]["image"] == b"ABC"


@pytest.mark.parametrize(
    ("entry", "field", "problem"),
    [
        ("text", "record", "must be an object"),
        ({"id": 1}, "record", "needs conversations or messages; it has id"),
        ({"conversations": turns(answer=" ")}, "conversations.1.value", "the answer is empty"),
        ({"conversations": turns()[:1]}, "conversations", "holds no answer"),
        ({"conversations": turns()[:1] + turns()}, "conversations.1", "a second turn of the user"),
        ({"conversations": turns("<image>")}, "conversations.0.value", "is <image> alone, but the record has no media"),
        ({"image": "a.png", "conversations": turns()}, "conversations", "0 <image> in the text, but 1 media"),
        ({"image": "no.png", "conversations": turns("<image>")}, "image", "there is no file"),
        ({"image": "http://x/a.png", "conversations": turns("<image>")}, "image", "must be a local file"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations.0.from", "must be human or gpt"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0", "names no image"),
        ({"messages": [{"role": "user", "content": "x"}], "images": ["a"]}, "messages", "1 more images"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "data:x,1"}]}]},
            "messages",
            "holds no answer",
        ),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "conversations.0.from", "must be human or gpt"),
        (
            {"messages": [{"role": "user", "content": [{"type": ["text"]}]}]},
            "messages.0.content.0.type",
            "must be a string",
        ),
        ({"messages": [{"role": {}, "content": "x"}]}, "messages.0.role", "must be one of system, user"),
        ({"image": 7, "conversations": turns("<image>")}, "image", "must name a file, not 7"),
        ({"image": {"bytes": "x"}, "conversations": turns("<image>")}, "image", "must hold bytes"),
        ({"image": "x" * 5000, "conversations": turns("<image>")}, "image", "there is no file"),
        ({"image": "a\0b", "conversations": turns("<image>")}, "image", "there is no file"),
        ({"conversations": turns(), "messages": []}, "record", "has conversations and messages"),
        ({"conversations": turns(), "tools": "[{}]"}, "tools", "cannot be learned from yet"),
        ({"conversations": turns(), "audios": ["a.wav"]}, "audios", "sound cannot be read"),
        ({"conversations": turns(), "system": ["x"]}, "system", "must be a string"),
        ({"messages": said("Q?"), "images": ["a.png"]}, "messages", "1 more images"),
        (
            {"messages": said("<image><image>Q?"), "images": ["data:,x"]},
            "messages",
            "2 <image> in the text, but 1 images",
        ),
        ({"messages": said("Q?", weight=0)}, "messages.1.weight", "single turns cannot be left unlearned"),
        ({"messages": said("Q?", loss=False)}, "messages.1.loss", "single turns cannot be left unlearned"),
        ({"messages": said("Q?", tool_calls=[{}])}, "messages.1.tool_calls", "calls cannot be learned from yet"),
    ],
)
def test_broken_records_name_file_line_and_field(entry, field, problem):
    with pytest.raises(RecordError) as error:
        read_record(entry, "folder/data.jsonl", 7)
    assert str(error.value).startswith(f"folder/data.jsonl:7: {field}: {problem}")
    assert "\n" not in str(error.value)


def test_truncated_image_is_found_when_media_are_checked(tmp_path):
    path = picture(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    found = read_record({"image": "a.png", "conversations": turns("<image>")}, media_root=tmp_path)
    with pytest.raises(RecordError, match="image: "):
        check_media(found)


def test_placeholders_in_strings_take_the_images_beside_them(tmp_path):
    for name in "abc":
        picture(tmp_path, f"{name}.png")
    swift = {"messages": said("<image>Left or <image> right?"), "images": ["a.png", {"path": "b.png"}]}
    factory = {"messages": said("<image>\nQ?"), "images": "c.png", "system": "Be brief.", "tools": ""}
    first, second = (read_record(raw, media_root=tmp_path).messages for raw in (swift, factory))
    found = [(part["type"], part.get("text", Path(part.get("image", "")).name)) for part in first[0]["content"]]
    wanted = [("image", "a.png"), ("text", "Left or "), ("image", "b.png"), ("text", " right?")]
    assert [part for part in found if part != ("text", "")] == wanted
    assert second[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [part["type"] for part in second[1]["content"]] == ["image", "text"]
    typed = {"messages": said([{"type": "image"}, {"type": "text", "text": "What is <image>?"}]), "images": ["a.png"]}
    content = read_record(typed, media_root=tmp_path).messages[0]["content"]
    assert content[1] == {"type": "text", "text": "What is <image>?"}  # its parts say where the media are
    assert read_record({"messages": said("What is <image>?")}).messages[0]["content"][0]["text"] == "What is <image>?"


def test_every_kind_of_media_is_opened_by_one_function(tmp_path):
    path = picture(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    for key in ("image", "video", "volume"):
        found = read_record({key: "a.png", "conversations": turns("<image>")}, media_root=tmp_path)
        with pytest.raises(RecordError, match=rf"<memory>:1: {key}: .*a.png"):
            check_media(found)

    def strange(part):
        raise ZeroDivisionError("in a\nreader")

    with pytest.raises(RecordError, match=r"<memory>:1: image: cannot be used \(ZeroDivisionError: in a reader\)"):
        check_media(read_record({"image": "a.png", "conversations": turns("<image>")}, media_root=tmp_path), strange)


# Mixtures


def test_mixture_of_files(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [record(n) for n in range(4)])
    (tmp_path / "b.json").write_text(json.dumps([record(n) for n in range(10, 13)]))
    mixture = Mixture([str(a), {"path": tmp_path / "b.json", "sampling_strategy": "first:2"}, {"path": [record(99)]}])
    assert questions(mixture) == ["Q0?", "Q1?", "Q2?", "Q3?", "Q10?", "Q11?", "Q99?"]
    assert mixture.place(5) == (str(tmp_path / "b.json"), 2)
    assert mixture.lengths(lambda r: len(r.raw["conversations"])) == [2] * 7
    with pytest.raises(IndexError):
        mixture[7]


def test_yaml_lists_of_the_published_kind(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [record(n) for n in range(8)])
    entries = ["{json_path: a.jsonl, sampling_strategy: end:25%}", "{json_path: b.jsonl, sampling_strategy: first:1}"]
    (tmp_path / "mix.yaml").write_text("datasets:\n" + "".join(f"- {entry}\n" for entry in entries))
    assert questions(Mixture(tmp_path / "mix.yaml")) == ["Q6?", "Q7?", "Q0?"]
    for strategy in ("end:0", "end:0%", "end", "first", "random", "all"):  # as the published code slices and compares
        (tmp_path / "odd.yaml").write_text(f"datasets:\n- {{json_path: a.jsonl, sampling_strategy: '{strategy}'}}\n")
        assert len(Mixture(tmp_path / "odd.yaml")) == 8, strategy
    for strategy in ("first:0", "random:0"):
        (tmp_path / "odd.yaml").write_text(f"datasets:\n- {{json_path: a.jsonl, sampling_strategy: '{strategy}'}}\n")
        assert len(Mixture(tmp_path / "odd.yaml")) == 0, strategy
    assert len(Mixture(f"{tmp_path}/a.jsonl#end:0")) == 0
    assert len(Mixture(f"{tmp_path}/{{a,b}}.jsonl")) == 16
    with pytest.raises(UserError, match="data: unknown key 'sampling_stategy'; did you mean 'sampling_strategy'"):
        read_specs({"path": "a.jsonl", "sampling_stategy": "all"})
    for text, message in (
        ("- a\n", "must hold a list named datasets"),
        ("datasets: [a.jsonl]\nsampling: all\n", "'sampling': unknown key"),
        ("datasets: [" + "[" * 100 + "]" * 101, "nested too deeply"),
        ("datasets: [{path: a.jsonl, weight: heavy}]", "datasets.0.weight: must be a number"),
        ("datasets: [{path: 5}]", "datasets.0.path: must be a path, not 5"),
        ("datasets: [{path: a.jsonl, sampling_strategy: [1]}]", "datasets.0.sampling_strategy: must be all"),
        ("datasets: 2024-02-31", "not valid YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(f"{n}: &{n} [*{p}, *{p}]\n" for p, n in CHAIN), "a million"),
        ("datasets: [a.jsonl]\ndatasets: [b.jsonl]\n", "'datasets' is there twice"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=message.replace("a million", "more than 1000000 values")):
            Mixture(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match=r"mix.yaml: first:3: a part of a list of files"):
        Mixture({"path": tmp_path / "mix.yaml", "sampling_strategy": "first:3"})
    weighted = read_specs({"path": tmp_path / "mix.yaml", "weight": 2})
    assert [spec.weight for spec in weighted] == [2, 2]


CHAIN = list(itertools.pairwise("bcdefghijklmnopqrstuvwxyz"))  # every list holds the one before twice


def test_check_stops_or_skips_and_lists_what_it_skipped(tmp_path):
    entries = [record(0), {"conversations": turns(answer="")}, record(2), {"oops": 1}]
    path = write_jsonl(tmp_path / "data.jsonl", entries)
    path.write_text(path.read_text() + "{cut\n")
    with pytest.raises(RecordError, match=r"data.jsonl:2: conversations.1.value"):
        Mixture(path).check()
    mixture = Mixture(path)
    bad = mixture.check(on_bad_record="skip", bad=BadRecords(tmp_path / "bad.jsonl"))
    assert questions(mixture) == ["Q0?", "Q2?"]
    assert [error.line for error in bad.errors()] == [2, 4, 5]
    assert len(BadRecords(tmp_path / "bad.jsonl")) == 3
    assert bad.report(1).splitlines()[0] == "3 records were left out:"
    assert bad.report(1).splitlines()[-1] == "  and 2 more"
    with pytest.raises(UserError, match="no usable record"):
        Mixture([{"path": [{"oops": 1}]}]).check(on_bad_record="skip")
    with pytest.raises(UserError, match="on_bad_record: must be one of stop, skip"):
        mixture.check(on_bad_record="ignore")


def test_the_report_says_how_unusual_records_were_read(tmp_path):
    entries = [record(0), {"conversations": turns("What is <image>?")}, {"conversations": turns("<image3d> and x")}]
    entries += [{"conversations": turns("<image> tags?")}, {"conversations": turns("<image>")}]
    path = write_jsonl(tmp_path / "data.jsonl", entries)
    mixture = Mixture(path)
    bad = mixture.check(on_bad_record="skip")
    lines = bad.report().splitlines()
    assert lines[0] == "1 record was left out:"
    assert lines[2:] == [
        f"{path}:2: the record has no media, so <image> in it is text (and 1 more such)",
        f"{path}:3: the record has no media, so <image3d> in it is text",
    ]

    def encode(messages):
        return {"input_ids": [1, 2], "labels": [-100, 2], "notes": ("a turn is left out",)}

    data = SampleDataset(mixture, encode)
    assert "notes" not in data[0]
    assert data.bad.report().splitlines() == ["no record was left out", f"{path}:1: a turn is left out"]


def test_an_empty_answer_is_a_caption_or_an_error(tmp_path):
    picture(tmp_path)
    caption = {"image": "a.png", "conversations": turns("<image>", "")}
    assert read_record(caption, media_root=tmp_path).messages[1]["content"] == [{"type": "text", "text": ""}]
    for broken in ({"conversations": turns(answer="")}, caption | {"conversations": turns("<image>", "") + turns()}):
        with pytest.raises(RecordError, match="the answer is empty"):
            read_record(broken, media_root=tmp_path)


def test_order_depends_on_seed_and_epoch_only():
    sizes = [50, 20]
    first = mixed_order(sizes, seed=3, epoch=1)
    random.random(), torch.rand(3)
    assert mixed_order(sizes, seed=3, epoch=1) == first
    assert sorted(first) == [(0, n) for n in range(50)] + [(1, n) for n in range(20)]
    assert mixed_order(sizes, seed=3, epoch=2) != first
    assert mixed_order(sizes, seed=4, epoch=1) != first
    assert mixed_order(sizes, shuffle=False)[:3] == [(0, 0), (0, 1), (0, 2)]


def test_weights_repeat_and_thin_sources():
    epochs = [mixed_order([8, 3], [0.25, 2], seed=1, epoch=epoch) for epoch in range(4)]
    assert all(sum(source == 1 for source, _ in epoch) == 6 for epoch in epochs)
    seen = [index for epoch in epochs for source, index in epoch if source == 0]
    assert sorted(seen) == list(range(8))  # four quarters see every sample once
    with pytest.raises(UserError, match="weights"):
        mixed_order([1], [-1])
    with pytest.raises(UserError, match="weights"):
        mixed_order([1, 2], [1])


# Samplers


def test_grouped_samplers_are_permutations_of_one_modality_per_megabatch():
    generator = torch.Generator().manual_seed(0)
    lengths = [random.Random(n).randint(1, 99) * random.Random(-n).choice([1, -1]) for n in range(101)]
    for group in (length_grouped, widely_grouped):
        order = modality_grouped(lengths, 3, 2, generator, group=group)
        assert sorted(order) == list(range(101))
        whole = order[: len(order) - len(order) % 6 - 6]
        for begin in range(0, len(whole), 6):
            assert len({lengths[index] > 0 for index in whole[begin : begin + 6]}) == 1
    with pytest.raises(UserError, match="sample 1 has length 0"):
        modality_grouped([3, 0], 1, 1, generator)


def test_batches_of_a_band_of_lengths():
    lengths = [50, 98, 54, 6, 34, 66, 63, 52, 39, 62, 46, 75, 28, 65, 18, 37, 18, 97, 13, 80]
    order = banded_by_length(lengths, 1, 2, torch.Generator().manual_seed(3))
    assert order == [6, 0, 19, 10, 4, 17, 18, 16, 11, 7, 12, 1, 13, 9, 14, 3, 2, 8, 5, 15]  # of the published formula


def test_wide_grouping_of_onevision():
    case = GOLDEN / "llava-onevision/length_grouped_sampler"
    inputs, outputs = (json.loads((case / f"{name}.json").read_text()) for name in ("inputs", "outputs"))
    for key, run in inputs.items():
        auto = "group_by_modality_auto" in run
        order = modality_grouped(
            run["lengths"],
            run["batch_size"],
            run["world_size"],
            torch.Generator().manual_seed(run["seed"]),
            group=widely_grouped if auto else length_grouped,
            drop_remainder=auto,
        )
        assert order == outputs[key], key


# Packing


def test_first_fit_decreasing_by_hand():
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[0, 2, 3, 5], [1, 4]]
    assert first_fit_decreasing([], 10) == []
    assert in_order([4, 4, 4, 8], 10) == [[0, 1], [2], [3]]
    for pack in (first_fit_decreasing, in_order):
        with pytest.raises(ValueError, match="sample 1 has 11 tokens, a row holds 10"):
            pack([1, 11], 10)


def test_packing_keeps_every_sample_and_overfills_no_row():
    for seed in range(50):
        source = random.Random(seed)
        lengths = [source.randint(1, 40) for _ in range(source.randint(1, 60))]
        rows = first_fit_decreasing(lengths, 40)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(sum(lengths[index] for index in row) <= 40 for row in rows)
        assert len(rows) <= len(in_order(lengths, 40)) * 1.5
        assert len(pack_rows(lengths, 40)) <= len(rows)


# Collation


def sample(length, *, image=None, first_label=False):
    labels = [-100] * (length // 2) + list(range(length // 2, length))
    made = {"input_ids": list(range(1, length + 1)), "labels": labels}
    if image is not None:
        made |= {"pixel_values": [torch.full((3, *image), float(length))], "visual_sizes": [(1, *image)]}
        made["visual_modalities"] = [0]
    return made


def test_padded_batch():
    batch = Collator(0, 6)([sample(3), sample(8)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0], [1, 2, 3, 4, 5, 6]]
    assert batch["labels"][0].tolist() == [-100, 1, 2, -100, -100, -100]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert "pixel_values" not in batch
    left = Collator(0, padding_side="left")([sample(2), sample(4)])
    assert left["input_ids"].tolist() == [[0, 0, 1, 2], [1, 2, 3, 4]]
    assert left["attention_mask"].tolist() == [[0, 0, 1, 1], [1] * 4]
    assert Collator(0, pad_to_multiple_of=8)([sample(3)])["input_ids"].shape == (1, 8)


def test_real_token_that_equals_the_padding_is_masked_only_on_demand():
    made = {"input_ids": [5, 0, 6], "labels": [-100, 0, 6]}
    assert Collator(0)([made])["attention_mask"].tolist() == [[1, 1, 1]]
    assert Collator(0, mask_by_pad_id=True)([made])["attention_mask"].tolist() == [[1, 0, 1]]


def test_media_are_stacked_or_listed_in_order():
    same = Collator(0)([sample(3, image=(4, 4)), sample(2), sample(5, image=(4, 4))])
    assert same["pixel_values"].shape == (2, 3, 4, 4)
    assert same["pixel_values"][:, 0, 0, 0].tolist() == [3, 5]
    assert same["visual_sizes"].tolist() == [[1, 4, 4], [1, 4, 4]]
    assert same["visual_modalities"].dtype == torch.long
    ragged = Collator(0)([sample(3, image=(4, 4)), sample(5, image=(2, 6))])
    assert [tuple(view.shape) for view in ragged["pixel_values"]] == [(3, 4, 4), (3, 2, 6)]


def test_packed_batch():
    samples = [sample(3, image=(4, 4)), sample(6, image=(4, 4)), sample(4, image=(4, 4))]
    batch = Collator(0, 8, packing=True)(samples)
    assert set(batch) == {"input_ids", "labels", "position_ids", "pixel_values", "visual_sizes", "visual_modalities"}
    assert batch["input_ids"].tolist() == [[1, 2, 3, 1, 2, 3, 4, 0], [1, 2, 3, 4, 5, 6, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 0, 1]]
    assert batch["labels"][0].tolist() == [-100, 1, 2, -100, -100, 2, 3, -100]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [3, 4, 6]  # row after row, like the placeholders


def test_first_token_of_a_packed_sample_is_never_a_label():
    everything = {"input_ids": [7, 8], "labels": [7, 8]}
    batch = Collator(0, 5, packing=True)([everything, everything])
    assert batch["labels"].tolist() == [[-100, 8, -100, 8, -100]]


def test_wrong_collator_options():
    with pytest.raises(UserError, match="packing: needs max_length"):
        Collator(0, packing=True)
    with pytest.raises(UserError, match="padding_side"):
        Collator(0, padding_side="up")
    with pytest.raises(ValueError, match="must be equal rows"):
        Collator(0)([{"input_ids": [1, 2], "labels": [1]}])


# Dataset


def toy_encode(messages):
    text = "".join(part.get("text", "") for message in messages for part in message["content"])
    if "5" in text:
        raise UserError("cannot open it")
    ids = [9] * text.count("i") + [ord(letter) for letter in text]
    return {"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]}


def test_a_broken_sample_stops_or_is_replaced_at_random_from_its_source():
    entries = [record(n) for n in range(60)]
    for number in range(5, 15):
        entries[number] = record(5)  # which the toy cannot open
    mixture = Mixture([{"path": entries[:40]}, {"path": entries[40:50]}])
    with pytest.raises(RecordError, match="<memory>:6: record: cannot open it"):
        SampleDataset(mixture, toy_encode)[5]
    data = SampleDataset(mixture, toy_encode, on_bad_record="skip", bad=BadRecords())
    good = {tuple(data[n]["input_ids"]): n for n in range(40) if not 5 <= n < 15 and "5" not in str(n)}
    instead = [good[tuple(data[n]["input_ids"])] for n in range(5, 15)]
    assert len(set(instead)) > 5  # not one record ten times
    assert instead == [good[tuple(data[n]["input_ids"])] for n in range(5, 15)]  # by seed and number alone
    other = SampleDataset(mixture, toy_encode, on_bad_record="skip", seed=1)
    assert instead != [good[tuple(other[n]["input_ids"])] for n in range(5, 15)]
    assert set(range(6, 16)) <= {error.line for error in data.bad.errors()}
    mixed = Mixture([{"path": [record(5), record(15)]}, {"path": [record(1)]}])
    with pytest.raises(UserError, match="no usable record in the source of <memory>"):
        SampleDataset(mixed, toy_encode, on_bad_record="skip")[0]


@pytest.mark.parametrize(
    "error", [TypeError("TextEncodeInput must be\nstr"), RecursionError("deep"), KeyError("image"), MemoryError()]
)
def test_whatever_tokenizer_or_planner_raise_belongs_to_the_record(error):
    def encode(messages):
        raise error

    mixture = Mixture([{"path": [record(0)]}])
    with pytest.raises(RecordError, match=rf"<memory>:1: record: cannot be used \({type(error).__name__}") as caught:
        SampleDataset(mixture, encode)[0]
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_sample_without_a_label_is_a_broken_record():
    def encode(messages):
        return {"input_ids": [1, 2, 3], "labels": [7, -100, -100]}  # nothing comes before the first, so it never counts

    mixture = Mixture([{"path": [record(0)]}])
    with pytest.raises(RecordError, match="<memory>:1: record: no answer is left to learn"):
        SampleDataset(mixture, encode)[0]


def test_long_samples_are_cut_but_never_through_media():
    mixture = Mixture([{"path": [{"conversations": turns("iiiQQQ", "AA")}]}])
    data = lambda length, **keys: SampleDataset(mixture, toy_encode, max_length=length, **keys)[0]  # noqa: E731
    assert len(data(11)["input_ids"]) == 11
    assert len(data(10)["input_ids"]) == 10
    with pytest.raises(RecordError, match="takes 11 tokens, max_length is 2, and the cut would go through its media"):
        data(2, visual_token_id=9)
    with pytest.raises(RecordError, match="no answer is left before the cut"):
        data(7, visual_token_id=9)


def test_workers_share_the_list_of_broken_records(tmp_path):
    mixture = Mixture([{"path": [record(n) for n in range(8)]}])

    def encode(messages):
        return toy_encode(messages) | {"notes": ("read oddly",) if "Q2" in str(messages) else ()}

    data = SampleDataset(mixture, encode, on_bad_record="skip", bad=BadRecords(tmp_path / "bad.jsonl"))
    loader = DataLoader(data, batch_size=2, sampler=data.order(0, 0), collate_fn=Collator(0), num_workers=2)
    assert sum(len(batch["input_ids"]) for batch in loader) == 8
    assert [error.line for error in data.bad.errors()] == [6]
    assert data.bad.report().splitlines()[-1] == "<memory>:3: read oddly"
    assert data.lengths() == [-len(data[n]["input_ids"]) for n in range(8)]


def test_from_files_to_a_packed_batch_with_the_real_processor(tmp_path):
    from tiny import config

    from llavakit.model.processing import LlavakitProcessor
    from llavakit.systems.llava_1_5.parity_text import load_tokenizer

    tokenizer = load_tokenizer("nonlegacy", GOLDEN / "llava-1.5/tokenizer-sp/tokenizer_nonlegacy.json")
    processor = LlavakitProcessor.from_config(config(), tokenizer)
    for number, size in enumerate([(30, 20), (16, 16)]):
        Image.new("RGB", size, (number * 90, 50, 50)).save(tmp_path / f"{number}.png")
    entries = [{"image": f"{n}.png", "conversations": turns("<image>\nhow many ?", "two")} for n in range(2)]
    path = write_jsonl(tmp_path / "data.jsonl", [*entries, {"conversations": turns("how many ?", "two two")}])
    data = SampleDataset(Mixture(path), processor.encode, visual_token_id=processor.image_token_id)
    samples = [data[n] for n in range(3)]
    batch = Collator(0, 256, packing=True)(samples)
    visual = (batch["input_ids"] == processor.image_token_id).sum()
    assert visual == sum(ids.count(processor.image_token_id) for ids in (s["input_ids"] for s in samples)) > 0
    assert batch["visual_sizes"].tolist() == [[1, 20, 30], [1, 16, 16]]
    assert (batch["position_ids"] == 0).sum() >= 4  # three samples and the tail


# ScienceQA


def test_scienceqa_formats():
    problem = {"question": "Q?", "choices": ["x", "y"], "answer": 1, "hint": "", "caption": "c"}
    problem |= {"lecture": "L.", "solution": "S.", "image": None}
    assert scienceqa.prompt(problem, "QCLM-ALE") == (
        "Question: Q?\nContext: N/A\nBECAUSE: L.\nOptions: (A) x (B) y",
        "Answer: The answer is B. BECAUSE: L. S.",
    )
    assert scienceqa.prompt(problem, "CQM-ELA", use_caption=True)[1] == "Answer: S. L. The answer is B."
    spelled = problem | {"lecture": "Colours\\nmatter.", "solution": "One.\nTwo.\\n\\nThree."}
    assert scienceqa.prompt(spelled, "QCM-LEA")[1] == ("Answer: Colours\nmatter. One.\nTwo.\n\nThree. The answer is B.")
    assert "BECAUSE: Colours\nmatter." in scienceqa.prompt(spelled, "QCML-A")[0]
    with pytest.raises(UserError, match="ScienceQA format 'XYZ'"):
        scienceqa.prompt(problem, "XYZ")
