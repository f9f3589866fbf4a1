"""Synthesis: one output for any number of threads, processes and kills; refusals, faults, the price ceiling."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_pipelines
from fake_api import Failure, FakeAPI

from llavakit.cli import app as cli
from llavakit.errors import APIRefused, UserError
from llavakit.synthesis.run import synthesize

TESTS = Path(__file__).parent
tiny_pipelines.register()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Repeats wait milliseconds."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def said(body):
    return body["messages"][-1]["content"]


def echo(body):
    return said(body).upper()


def facts(folder, count, name="facts.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps({"id": f"i{n}", "text": f"fact {n}"}) + "\n" for n in range(count)))
    return path


def numbers(folder, count=300):
    path = folder / "numbers.jsonl"
    rows = ({"id": f"n{n}", "value": n * 37 % 1009} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rounds_records_in_order_and_refusals_in_a_file_of_their_own(tmp_path):
    def reply(body):
        time.sleep(0.02 if "fact 0" in said(body) else 0)  # the first item is the last to be finished
        return "no" if said(body) == "fact 3 1" else echo(body)

    with FakeAPI(reply) as server:
        out = tmp_path / "out.jsonl"
        found = synthesize("rounds", facts(tmp_path, 9), out, teacher=f"{server.url}#m", concurrency=3)
        assert 1 < server.most <= 3
    kept = [n for n in range(9) if n != 3]
    assert lines(out) == [{"id": f"i{n}-{r}", "text": f"FACT {n} {r}"} for n in kept for r in range(2)]
    assert lines(tmp_path / "out.refused.jsonl") == [
        {"line": 4, "id": "i3", "outcome": "refused", "reason": "round 1 said no"}
    ]
    assert (found["records"], found["refused"], found["failed"], found["asked"]) == (16, 1, 0, 18)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "facts.jsonl", "out.jsonl", "out.refused.jsonl", "out.run.json", "out.teacher.jsonl",
    ]  # fmt: skip


def test_a_finished_run_asks_nothing_again_and_another_is_kept_out(tmp_path):
    with FakeAPI(echo) as server:
        source, out, teacher = facts(tmp_path, 3), tmp_path / "out.jsonl", f"{server.url}#m"
        first = synthesize("rounds", source, out, teacher=teacher)
        asked = len(server.bodies)
        assert synthesize("rounds", source, out, teacher=teacher) == first
        assert len(server.bodies) == asked
        with pytest.raises(UserError, match="run with other options; choose another output"):
            synthesize("rounds", source, out, teacher=teacher, options={"rounds": 1})
        facts(tmp_path, 4)
        with pytest.raises(UserError, match="run with other source"):
            synthesize("rounds", source, out, teacher=teacher)
        out.with_name("out.run.json").unlink()
        with pytest.raises(UserError, match="was not written by this command"):
            synthesize("rounds", source, out, teacher=teacher)


def test_a_json_list_holds_the_same_records(tmp_path):
    source = numbers(tmp_path, 40)
    synthesize("ranks", source, tmp_path / "a.jsonl")
    synthesize("ranks", source, tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == lines(tmp_path / "a.jsonl")
    (tmp_path / "none.jsonl").write_text("")
    synthesize("ranks", tmp_path / "none.jsonl", tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == []


def test_failed_calls_are_asked_again_by_the_next_run(tmp_path):
    down = {"fact 2 0", "fact 5 1"}

    def reply(body):
        return Failure(400, "no such luck") if said(body) in down else echo(body)

    with FakeAPI(reply) as server:
        source, out, teacher = facts(tmp_path, 7), tmp_path / "out.jsonl", f"{server.url}#m"
        found = synthesize("rounds", source, out, teacher=teacher)
        assert (found["records"], found["failed"]) == (10, 2)
        assert [entry["id"] for entry in lines(tmp_path / "out.refused.jsonl")] == ["i2", "i5"]
        down.clear()
        asked = len(server.bodies)
        found = synthesize("rounds", source, out, teacher=teacher)
        assert len(server.bodies) - asked == 3  # the first round of i5 was answered before
    assert (found["records"], found["failed"]) == (14, 0)
    assert [entry["id"] for entry in lines(out)] == [f"i{n}-{r}" for n in range(7) for r in range(2)]
    assert not (tmp_path / "out.refused.jsonl").exists()
    assert not (tmp_path / "out.journal.jsonl").exists()


def test_a_teacher_that_never_answers_ends_the_run(tmp_path):
    with FakeAPI(lambda body: Failure(400, "broken")) as server, pytest.raises(APIRefused, match="8 first items"):
        synthesize("rounds", facts(tmp_path, 50), tmp_path / "out.jsonl", teacher=f"{server.url}#m")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_ceiling_stops_and_a_higher_one_goes_on(tmp_path):
    source, out = facts(tmp_path, 30), tmp_path / "out.jsonl"
    prices = {"price_in": 1.0, "price_out": 1000.0}
    with FakeAPI(echo) as server:
        teacher = f"{server.url}#m"
        with pytest.raises(APIRefused, match="raise max_cost"):
            synthesize("rounds", source, out, teacher=teacher, max_tokens=10, api={**prices, "max_cost": 0.2})
        assert not out.exists()
        first = len(server.bodies)
        assert 10 < first < 50  # 5 tokens a reply are counted, 10 are reckoned with
        with pytest.raises(APIRefused, match=r"of max_cost 0\.2 is spent"):  # a second time it is spent already
            synthesize("rounds", source, out, teacher=teacher, max_tokens=10, api={**prices, "max_cost": 0.2})
        assert len(server.bodies) - first <= 1
        found = synthesize("rounds", source, out, teacher=teacher, max_tokens=10, api={**prices, "max_cost": 9})
        assert len(server.bodies) == 60
    assert found["records"] == 60
    assert found["cost"] == pytest.approx(60 * (10 * 1e-6 + 5 * 1e-3))
    assert [entry["id"] for entry in lines(out)] == [f"i{n}-{r}" for n in range(30) for r in range(2)]


def command(*arguments):
    return [sys.executable, str(TESTS / "tiny_pipelines.py"), "synthesize", *map(str, arguments)]


@pytest.mark.parametrize("ends", [(5, 23), (1,), (40,)])
def test_kill_9_loses_and_doubles_nothing(tmp_path, ends):
    """Killed when the teacher has been asked so often, and started again."""
    source, out, gate = facts(tmp_path, 25), tmp_path / "out.jsonl", threading.Event()
    limit = [0]

    def reply(body):
        if len(server.bodies) >= limit[0]:
            gate.set()
        return "no" if said(body).startswith("fact 11") else echo(body)

    with FakeAPI(reply) as server:
        arguments = ["rounds", source, out, "--teacher", f"{server.url}#m", "--concurrency", 4]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS), *sys.path]))
        for end in ends:
            limit[0] = end
            gate.clear()
            process = subprocess.Popen(command(*arguments), env=environment, stderr=subprocess.PIPE)
            assert gate.wait(60), process.stderr.read()
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not out.exists()
        limit[0] = 10**9
        done = subprocess.run(command(*arguments, "--json"), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        questions = [json.dumps(body["messages"]) for _, _, body in server.bodies]
    kept = [n for n in range(25) if n != 11]
    assert lines(out) == [{"id": f"i{n}-{r}", "text": f"FACT {n} {r}"} for n in kept for r in range(2)]
    assert len(questions) - len(set(questions)) <= 4 * len(ends)  # only what was under way is asked twice
    assert json.loads(done.stdout)["refused"] == 1


@pytest.mark.parametrize("cut", [1, 3, 40, 200])
def test_a_journal_or_records_cut_anywhere_go_on(tmp_path, cut):
    source, whole = numbers(tmp_path), tmp_path / "whole.jsonl"
    synthesize("ranks", source, whole)
    for name in ("journal", "partial"):
        out = tmp_path / f"{name}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            _interrupted(source, out)
        file = tmp_path / f"{name}.{name}.jsonl"
        os.truncate(file, max(0, file.stat().st_size - cut))
        synthesize("ranks", source, out)
        assert out.read_bytes() == whole.read_bytes()


def _interrupted(source, out):
    from llavakit.synthesis.ledger import Ledger

    append, calls = Ledger.append, []

    def stop(self, done, cost):
        append(self, done, cost)
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "append", stop)
        synthesize("ranks", source, out)


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    source = numbers(tmp_path)
    outputs = [tmp_path / f"{processes}.jsonl" for processes in (1, 2, 3)]
    for processes, out in enumerate(outputs, 1):
        synthesize("ranks", source, out, processes=processes)
    assert len({out.read_bytes() for out in outputs}) == 1
    refused = {out.with_name(f"{out.stem}.refused.jsonl").read_bytes() for out in outputs}
    assert len(refused) == 1
    assert len(lines(outputs[0])) > 200


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    psutil = pytest.importorskip("psutil")
    source = numbers(tmp_path, 2000)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS), *sys.path]))
    arguments = command("ranks", source, tmp_path / "out.jsonl", "pause=0.01", "--processes", 2)
    process = subprocess.Popen(arguments, env=environment)
    journal = tmp_path / "out.journal.jsonl"
    end = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 10) and time.monotonic() < end:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_two_runs_do_not_write_one_output(tmp_path):
    from llavakit.synthesis.ledger import Ledger

    pytest.importorskip("fcntl")
    first = Ledger(tmp_path / "out.jsonl", {}, 3)
    with pytest.raises(UserError, match="another run is writing it now"):
        Ledger(tmp_path / "out.jsonl", {}, 3)
    first.close()
    Ledger(tmp_path / "out.jsonl", {}, 3).close()


def test_broken_records_are_named_before_anything_is_paid(tmp_path):
    source = facts(tmp_path, 12)
    source.write_text(source.read_text() + "[1]\n" + '{"id": "late"}\n')
    with FakeAPI(echo) as server:
        with pytest.raises(UserError, match=r"facts.jsonl:13: record: must be an object, not list"):
            synthesize("rounds", source, tmp_path / "out.jsonl", teacher=f"{server.url}#m")
        assert not server.bodies
        found = synthesize("rounds", source, tmp_path / "out.jsonl", teacher=f"{server.url}#m", on_bad_record="skip")
    assert (found["bad"], found["records"]) == (2, 24)
    reasons = [(entry["line"], entry["outcome"]) for entry in lines(tmp_path / "out.refused.jsonl")]
    assert reasons == [(13, "bad"), (14, "bad")]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nothing"], "unknown synthesis pipeline 'nothing'"),
        (["ranks", "--teacher", "m"], "asks no teacher"),
        (["rounds"], "asks a teacher; name it with --teacher"),
        (["rounds", "--teacher", "m", "--processes", "2"], "--concurrency makes it faster"),
        (["ranks", "speed=3"], "has no option 'speed'"),
        (["ranks", "rank"], "not an assignment"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, arguments, problem):
    name, *rest = arguments
    assert cli.run(["synthesize", name, str(numbers(tmp_path, 3)), str(tmp_path / "o.jsonl"), *rest]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()


def test_a_missing_source_and_a_wrong_suffix(tmp_path, capsys):
    assert cli.run(["synthesize", "ranks", str(tmp_path / "no.jsonl"), str(tmp_path / "o.jsonl")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert cli.run(["synthesize", "ranks", str(numbers(tmp_path, 3)), str(tmp_path / "o.txt")]) == 2
    assert "must be a .jsonl or .json file" in capsys.readouterr().err


def test_the_command_says_what_was_done(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert cli.run(["synthesize", "ranks", str(numbers(tmp_path, 50)), str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: 50 items, {len(lines(out))} records, 7 refused, 0 bad, 0 failed")
    assert f"7 items became no record; {tmp_path / 'out.refused.jsonl'} has the reasons" in printed.err


@pytest.mark.ray
def test_ray_gives_the_same_output(ray, tmp_path):
    source = numbers(tmp_path)
    synthesize("ranks", source, tmp_path / "local.jsonl")
    synthesize("ranks", source, tmp_path / "ray.jsonl", runner="ray", processes=2)
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()
    with FakeAPI(lambda body: "no" if said(body).startswith("fact 4") else echo(body)) as server:
        source = facts(tmp_path, 20)
        for runner in ("local", "ray"):
            out = tmp_path / f"{runner}-asked.jsonl"
            found = synthesize("rounds", source, out, teacher=f"{server.url}#m", runner=runner)
            assert (found["records"], found["refused"], found["asked"]) == (38, 1, 39)
    for end in ("jsonl", "refused.jsonl"):
        assert (tmp_path / f"ray-asked.{end}").read_bytes() == (tmp_path / f"local-asked.{end}").read_bytes()


def test_ray_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'llavakit\[ray\]'"):
        synthesize("ranks", numbers(tmp_path, 3), tmp_path / "o.jsonl", runner="ray")
