"""`llavakit studio` without a browser: jobs outlive the page and say how they ended; projects know where they stand."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from PIL import Image
from tiny_server import small_chat

from llavakit.checkpoints.convert import save
from llavakit.data.strict_json import read_json
from llavakit.errors import UserError
from llavakit.studio.actions import Studio, same
from llavakit.studio.jobs import Job
from llavakit.studio.run import serve_studio


def wait(job: Job, *states: str, seconds: float = 240) -> str:
    end = time.time() + seconds
    while job.state not in states:
        assert time.time() < end, f"{job.state}: {job.log()}"
        time.sleep(0.05)
    return job.state


# jobs


def test_a_job_runs_a_command_and_keeps_what_it_printed(tmp_path):
    job = Job(tmp_path / "systems")
    assert job.state == "none"
    assert job.command == []
    assert job.log() == ""
    job.start(["systems", "--json"])
    assert Job(tmp_path / "systems").command == ["systems", "--json"], "another page sees the same job"
    assert wait(job, "finished") == "finished"
    assert '"llava-1.5"' in job.output()
    assert job.log() == ""
    assert job.problem == ""


def test_a_command_that_refuses_says_why(tmp_path):
    job = Job(tmp_path / "job")
    job.start(["tools", "--config", str(tmp_path / "nothing.yaml")])
    assert wait(job, "failed") == "failed"
    assert "nothing.yaml" in job.problem
    assert "\n" not in job.problem


@pytest.fixture
def lasting(tmp_path):
    """A job that never ends by itself: a server on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = Job(tmp_path / "job")
    job.start(["tools", "--mcp", "--http", "--port", str(port)])
    end = time.time() + 240
    with socket.socket() as caller:
        while caller.connect_ex(("127.0.0.1", port)) and time.time() < end:
            time.sleep(0.05)
    yield job
    if job.state == "running":
        os.killpg(pid_of(job), signal.SIGKILL)


def pid_of(job: Job) -> int:
    return read_json(job.folder / "job.json", kind=dict)["pid"]


def test_a_job_can_be_stopped_and_started_again(lasting):
    with pytest.raises(UserError, match="tools is running; stop it first"):
        lasting.start(["systems"])
    lasting.stop()
    assert wait(lasting, "stopped") == "stopped"
    lasting.stop()  # once more does nothing
    lasting.start(["systems", "--json"])
    assert wait(lasting, "finished") == "finished"


def test_a_studio_knows_what_goes_on_without_it(lasting, tmp_path):
    project = tmp_path / "runs" / "one"
    project.mkdir(parents=True)
    (project / "project.json").write_text('{"commands": []}')
    (project / "jobs").mkdir()
    assert Studio(tmp_path / "runs").running() == []
    (project / "jobs" / "serve").symlink_to(lasting.folder)
    (job,) = Studio(tmp_path / "runs").running()
    assert job.command == lasting.command


def test_a_killed_job_is_told_from_one_that_ended(lasting):
    os.killpg(pid_of(lasting), signal.SIGKILL)
    assert wait(lasting, "died") == "died"
    assert "killed, or ran out of memory" in lasting.problem


# projects


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    chat = small_chat()
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(chat.model.state_dict(), chat.model.config, chat.processor, folder)
    return folder


@pytest.fixture
def table(tmp_path):
    rows = ["file,label"]
    for number in range(12):
        colour = ("red", "green", "blue")[number % 3]
        Image.new("RGB", (8 + number, 8), colour).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{colour}")
    path = tmp_path / "colours.csv"
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def test_pictures_become_a_project_that_a_new_studio_finds(table, model, tmp_path):
    studio = Studio(tmp_path / "runs")
    assert studio.open is None
    with pytest.raises(UserError, match="make or open a project first"):
        studio.train()
    with pytest.raises(UserError, match="name a folder of pictures"):
        studio.make(" ", "")
    studio.make(str(table), str(model))
    assert studio.project.folder == tmp_path / "runs" / "colours"
    assert studio.project.commands["train"] == ["train", str(tmp_path / "runs" / "colours" / "recipe.yaml")]
    assert studio.training() == "Not trained yet."
    assert studio.project.score() is None
    assert studio.project.answers() == []
    (part,) = studio.project.media(studio.project.questions[0])
    assert Image.open(part["image"]).height == 8
    studio.make(str(table), str(model))
    assert studio.project.name == "colours-2", "nothing is written over"
    assert Studio(tmp_path / "runs").project.name == "colours-2"
    assert sorted(studio.names()) == ["colours", "colours-2"]
    studio.choose("colours")
    assert studio.project.name == "colours"


def test_a_project_is_the_same_from_another_working_folder(table, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Studio(Path("runs")).make(table.name, str(model))
    monkeypatch.chdir("/")
    studio = Studio(tmp_path / "runs")
    assert studio.project.commands["train"] == ["train", str(tmp_path / "runs" / "colours" / "recipe.yaml")]
    with pytest.raises(UserError, match="choose a project"):
        studio.compare(None)


def test_questions_may_hold_any_separator_of_lines(table, model, tmp_path):
    studio = Studio(tmp_path / "runs")
    studio.make(str(table), str(model))
    path = studio.project.folder / "heldout.jsonl"
    row = studio.project.questions[0] | {"text": "What\u2028is it?"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (path.parent / "answers.jsonl").write_text(
        json.dumps({"question_id": row["question_id"], "text": "a\u2028b"}, ensure_ascii=False), encoding="utf-8"
    )
    assert [one["reply"] for one in studio.project.answers()] == ["a\u2028b"]


def test_a_folder_that_is_no_project_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"holds no project\.json"):
        Studio(tmp_path).choose("other")
    (tmp_path / "other" / "project.json").write_text('{"commands": [1]}')
    with pytest.raises(UserError, match="commands must be"):
        Studio(tmp_path).choose("other")


def test_training_that_was_killed_says_so_and_that_it_can_go_on(table, model, tmp_path):
    studio = Studio(tmp_path / "runs")
    studio.make(str(table), str(model))
    folder = studio.project.job("train").folder
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"command": ["train"], "pid": 1}))
    stage = Path(studio.project.recipe.output) / studio.project.recipe.stages[0].name
    stage.mkdir(parents=True)
    (stage / "metrics.json").write_text(json.dumps({"steps": 40, "batches": 150, "log": []}))
    assert studio.training() == (
        "The training process is gone (tune: step 40 of 150): llavakit train was killed, or ran out of memory. "
        "It can go on from its last checkpoint."
    )


def test_a_reply_is_right_but_for_case_and_a_full_stop():
    assert same("Red", "red. ")
    assert not same("red", "reddish")


def test_other_machines_need_a_key(tmp_path):
    with pytest.raises(UserError, match="give --api-key"):
        serve_studio(tmp_path, host="0.0.0.0")
