"""`llavakit generate`: files of prompts answered in order, whatever is killed; on Ray the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_server import small_chat

import llavakit
from llavakit.cli import app as cli
from llavakit.errors import CallFailed, UserError
from llavakit.evaluation.run import OnRay, evaluate
from llavakit.generation.request import SamplingParams
from llavakit.synthesis.prompts import generate

ASK = "What is in this picture?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    chat = small_chat()
    chat.model.save_pretrained(folder)
    chat.processor.save_pretrained(folder)
    return folder


def write_prompts(folder: Path, count: int) -> Path:
    """Prompts with and without pictures, of which every third has an id and settings of its own."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        Image.new("RGB", (24, 24), (number * 9 % 256, 90, 30)).save(folder / f"{number}.png")
        parts = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": f"{ASK} {number}"}]
        rows.append({"messages": [{"role": "user", "content": parts if number % 2 else f"{ASK} {number}"}]})
        if number % 3 == 0:
            rows[-1] |= {"id": f"p{number}", "max_tokens": 3, "source": "kept out"}
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_replies_are_those_of_the_model_in_the_order_of_the_prompts(model: Path, tmp_path: Path) -> None:
    source, out = write_prompts(tmp_path, 12), tmp_path / "out.jsonl"
    chat = llavakit.load(model, device="cpu")
    found = generate(chat, source, out, max_new_tokens=6, max_batch=2)
    replies = lines(out)
    assert found["replies"] == found["items"] == len(replies) == 12
    assert found["completion_tokens"] == sum(reply["usage"]["completion_tokens"] for reply in replies)
    for number, (row, reply) in enumerate(zip(lines(source), replies, strict=True)):
        length = row.get("max_tokens", 6)
        content = row["messages"][0]["content"]
        if number % 2:
            content[0]["image"] = str(tmp_path / content[0]["image"])
        assert reply["content"] == chat.submit(row["messages"], SamplingParams(max_new_tokens=length)).result().content
        assert reply.get("id") == (f"p{number}" if number % 3 == 0 else None)
        assert reply["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] == length
    assert generate(chat, source, out, max_new_tokens=6, max_batch=2) == found  # it is done
    with pytest.raises(UserError, match="belongs to a run with other sampling; choose another output"):
        generate(chat, source, out, max_new_tokens=7)


def test_draws_repeat_and_a_prompt_may_have_several_replies(model: Path, tmp_path: Path) -> None:
    chat = llavakit.load(model, device="cpu")
    source = tmp_path / "p.json"
    body = {"model": "any", "messages": [{"role": "user", "content": ASK}], "n": 3, "temperature": 1.5, "stop": ["zz"]}
    source.write_text(json.dumps([{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}]))
    outs = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        generate(chat, source, out, max_new_tokens=8, seed=seed)
    (row,) = lines(outs[0])
    assert row["id"] == "a"
    assert len({reply["content"] for reply in row["replies"]}) == 3
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()


def test_quantised_weights_answer_as_in_chat(model: Path, tmp_path: Path, capsys: Any) -> None:
    source, out = write_prompts(tmp_path, 2), tmp_path / "out.jsonl"
    command = ["generate", str(model), str(source), str(out), "--device", "cpu", "--max-new-tokens", "6"]
    assert cli.run([*command, "--quantize", "int8"]) == 0
    chat = llavakit.load(model, device="cpu", quantize="int8")
    first, reply = lines(source)[0], lines(out)[0]
    length = first.get("max_tokens", 6)
    assert reply["content"] == chat.submit(first["messages"], SamplingParams(max_new_tokens=length)).result().content
    assert cli.run(command) == 2
    assert "belongs to a run with other options" in capsys.readouterr().err


def test_killed_at_any_line_nothing_is_lost_or_there_twice(model: Path, tmp_path: Path) -> None:
    source = write_prompts(tmp_path, 40)
    generate(llavakit.load(model, device="cpu"), source, tmp_path / "whole.jsonl", max_new_tokens=4, max_batch=4)
    out = tmp_path / "cut.jsonl"
    arguments = [str(model), str(source), str(out), "--max-new-tokens", "4", "--max-batch", "4", "--device", "cpu"]
    command = [sys.executable, "-m", "llavakit.cli", "generate", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    partial = tmp_path / "cut.partial.jsonl"
    while process.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") >= 5):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    done = partial.read_bytes().count(b"\n")
    assert 5 <= done < 40
    assert not out.exists()
    with partial.open("ab") as torn:  # what a kill in the middle of a line leaves
        torn.write(b'{"content": "half')
    assert cli.run(["generate", *arguments]) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


class Moody:
    """A model that refuses some prompts, fails at others, and answers these later."""

    name = "moody"
    modalities = ("image",)

    def __init__(self, chat: Any) -> None:
        self.chat, self.fails = chat, True

    def start(self) -> None:
        self.chat.start()

    def stop(self, *, drain: bool = True) -> None:
        self.chat.stop(drain=drain)

    def submit(self, messages: Any, *args: Any, **more: Any) -> Any:
        text = messages[-1]["content"][-1]["text"]
        if text.endswith("2"):
            raise UserError("this prompt is refused")
        if text.endswith("4") and self.fails:
            raise CallFailed("the connection was lost")
        return self.chat.submit(messages, *args, **more)


def test_prompts_without_a_reply_keep_their_line(model: Path, tmp_path: Path) -> None:
    source, out = write_prompts(tmp_path, 6), tmp_path / "out.jsonl"
    with source.open("a") as file:
        file.write('{"id": "bad", "messages": []}\n')
    with pytest.raises(UserError, match=r"prompts.jsonl:7: messages: must hold at least one message"):
        generate(moody := Moody(llavakit.load(model, device="cpu")), source, out, max_new_tokens=2)
    assert not out.exists()
    found = generate(moody, source, tmp_path / "o.jsonl", max_new_tokens=2, on_bad_record="skip")
    assert [found[name] for name in ("items", "replies", "refused", "bad", "failed")] == [7, 4, 1, 1, 1]
    rows = lines(tmp_path / "o.jsonl")
    assert [row.get("error") for row in rows[:6]] == [
        None,
        None,
        "this prompt is refused",
        None,
        *rows[4].values(),
        None,
    ]
    assert rows[4] == {"error": "the connection was lost"}
    assert rows[6]["error"].endswith("prompts.jsonl:7: messages: must hold at least one message")
    moody.fails = False
    found = generate(moody, source, tmp_path / "o.jsonl", max_new_tokens=2, on_bad_record="skip")
    assert (found["replies"], found["failed"]) == (5, 0)
    assert "content" in lines(tmp_path / "o.jsonl")[4]


HELLO = [{"role": "user", "content": "a"}]
SEEN = [{"role": "user", "content": "<image> a"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [*HELLO, {"role": "assistant", "content": "b"}]}, "messages: end with an answer"),
        ({"image": "none.png", "messages": SEEN}, "there is no file"),
        ({"image": "../x.png", "messages": SEEN}, "image: '"),
        ({"image": "https://a.b/c.png", "messages": SEEN}, "image: URLs are not fetched in this run"),
        ({"image": "ftp://a.b/c.png", "messages": SEEN}, "must be a local file"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature: must be a number, not 'hot'"),
        ({"messages": HELLO, "max_tokens": 1.5}, "max_tokens: must be a whole number, not 1.5"),
        ({"messages": HELLO, "top_p": 2}, "top_p"),
        ({"messages": HELLO, "stop": 3}, "stop: must be a string or a list of strings"),
        ({"messages": HELLO, "tools": [1]}, "tools: prompts with tools"),
        ({"body": {"messages": HELLO, "temprature": 1}}, "body.temprature: is not known"),
        ({"body": 3}, "body: must be an object with messages"),
        ([1], "record: must be an object"),
    ],
)
def test_a_wrong_prompt_is_one_line_before_a_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: Any, row: Any, said: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "p.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr("llavakit.generation.load.build", None)
    with pytest.raises(UserError) as caught:
        generate(model, folder / "p.jsonl", tmp_path / "o.jsonl", fetch=False)
    assert f"{folder / 'p.jsonl'}:1: " in str(caught.value)
    assert said in str(caught.value)


def test_media_outside_are_read_where_their_folder_is_allowed(model: Path, tmp_path: Path, capsys: Any) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "in").mkdir()
    row = {"messages": [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "x.png")}]}]}
    row["messages"][0]["content"].append({"type": "text", "text": ASK})
    (tmp_path / "in" / "p.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["generate", str(model), str(tmp_path / "in" / "p.jsonl"), str(tmp_path / "o.jsonl")]
    arguments += ["--max-new-tokens", "2", "--device", "cpu"]
    assert cli.run(arguments) == 2
    assert "allow its folder with --media-folder" in capsys.readouterr().err
    assert cli.run([*arguments, "--media-folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'o.jsonl'}: 1 replies to 1 prompts, 2 tokens\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runner": "dask"}, "runner must be local or ray, not 'dask'"),
        ({"processes": 2}, "several belong to --runner ray"),
        ({"temperature": -1}, "temperature"),
        ({"on_bad_record": "ignore"}, "must be stop or skip"),
    ],
)
def test_wrong_options_are_one_line(model: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        generate(model, write_prompts(tmp_path, 1), tmp_path / "o.jsonl", **options)


# Ray


def test_ray_is_named_where_it_is_missing(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'llavakit\[ray\]'"):
        generate(model, write_prompts(tmp_path, 1), tmp_path / "o.jsonl", runner="ray")
    arguments = ["eval", str(model), "--task", "exact_match", "--questions", str(tmp_path / "prompts.jsonl")]
    assert cli.run([*arguments, "--runner", "ray"]) == 2


@pytest.mark.ray
def test_two_workers_of_ray_give_the_same_and_one_of_them_is_killed(ray: Any, model: Path, tmp_path: Path) -> None:
    source = write_prompts(tmp_path, 24)
    here = tmp_path / "here.jsonl"
    generate(model, source, here, max_new_tokens=4, max_batch=1, options={"device": "cpu"})
    out = tmp_path / "ray.jsonl"
    killer = subprocess.Popen([sys.executable, "-c", KILL, str(out.with_name("ray.partial.jsonl")), str(os.getpid())])
    found = generate(
        model, source, out, max_new_tokens=4, max_batch=1, runner="ray", processes=2, options={"device": "cpu"}
    )
    assert killer.wait(60) == 0  # it found a worker and killed it before the end
    assert found["replies"] == 24
    assert out.read_bytes() == here.read_bytes()


KILL = """
import os, signal, sys, time
import psutil
partial, parent = sys.argv[1], int(sys.argv[2])
until = time.time() + 300
while time.time() < until:
    if os.path.exists(partial) and open(partial, "rb").read().count(b"\\n") >= 1:
        tree = psutil.Process(parent).children(recursive=True)
        workers = [one for one in tree if "ray::_Worker" in " ".join(one.cmdline())]
        if workers:
            workers[-1].send_signal(signal.SIGKILL)
            sys.exit(0)
    time.sleep(0.01)
sys.exit(1)
"""


@pytest.mark.ray
def test_evaluation_on_ray_writes_the_same_predictions(ray: Any, model: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    rows = [{"question_id": n, "text": f"{ASK} {n}", "answer": "x", "type": "t"} for n in range(9)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"batch_size": 2, "max_new_tokens": 4, "gold": questions}
    here = evaluate(llavakit.load(model, device="cpu"), "exact_match", questions, tmp_path / "a.jsonl", **options)
    workers = OnRay(model, 2, device="cpu")
    there = evaluate(workers, "exact_match", questions, tmp_path / "b.jsonl", **options)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert there["metrics"] == here["metrics"]
    assert evaluate(workers, "exact_match", questions, tmp_path / "a.jsonl", **options)["asked"] == 0  # the same run
    workers.close()
    with pytest.raises(UserError, match="no such folder"):
        OnRay(tmp_path / "none", 1)


@pytest.mark.ray
def test_a_worker_that_cannot_live_ends_the_run(ray: Any, tmp_path: Path) -> None:
    from llavakit.generation.actors import RESTARTS, Actors

    actors = Actors(Deadly, 1)
    assert list(actors.map("square", [(n,) for n in range(5)])) == [0, 1, 4, 9, 16]
    with pytest.raises(UserError, match=f"died {RESTARTS + 1} times"):
        list(actors.map("die", [()]))
    actors.close()


class Deadly:
    """Held by a worker of Ray."""

    def square(self, number: int) -> int:
        return number * number

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
