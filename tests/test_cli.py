"""The command line: what users type, what they get, and what a mistake looks like."""

import builtins
import errno
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_server import small_chat

import llavakit
from llavakit.cli import app as cli
from llavakit.conversation.turns import ReasoningDelta, TextDelta
from llavakit.errors import UserError
from llavakit.generation.responder import Responder

COMMANDS = [
    "chat",
    "generate",
    "serve",
    "new",
    "show",
    "train",
    "prepare",
    "boxes",
    "phantom",
    "prefer",
    "eval",
    "compare",
    "attack",
    "convert",
    "inspect",
    "index",
    "synthesize",
    "systems",
    "parity",
    "cost",
    "reproduce",
    "tools",
    "replay",
    "studio",
    "doctor",
    "score",
]


class Echo(Responder):
    """A model that repeats what it was told and how many media came with it."""

    def __init__(self):
        super().__init__(name="echo")
        self.seen = []

    def run(self, call):
        self.seen.append((call.messages, call.sampling))
        content = call.messages[-1]["content"]
        media = [part for part in content if part["type"] != "text"]
        text = content[-1]["text"]
        if text == "bad":
            raise UserError("image: cannot be read")
        if text == "think":
            yield ReasoningDelta(text="hm", stage="PLAN")
        if text == "slow":
            yield TextDelta(text=f"{len(media)} ")
            time.sleep(0.2)  # until it is written
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # Ctrl-C
            while True:
                time.sleep(0.01)
                call.check()
        yield TextDelta(text=f"{len(media)} {text}")


@pytest.fixture
def model(monkeypatch):
    echo = Echo()
    monkeypatch.setitem(llavakit.__dict__, "load", lambda name, **options: echo)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    yield echo
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a b.png"
    Image.new("RGB", (8, 8)).save(path)
    return str(path)


def cpu_seconds(arguments: list[str]) -> tuple[float, str]:
    """CPU time of a new Python process, which other work on the machine does not lengthen, and its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.check_output([sys.executable, *arguments], text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, out


def test_help_is_quick_and_names_every_command():
    seconds, shown = min(cpu_seconds(["-m", "llavakit.cli", "--help"]) for _ in range(3))
    assert seconds < 1
    listed = shown.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.strip().splitlines()] == COMMANDS


def test_importing_the_package_is_cheap():
    code = "import sys, llavakit; print(*[m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules])"
    runs = [cpu_seconds(["-c", code]) for _ in range(3)]
    assert runs[0][1].split() == []
    bare = min(cpu_seconds(["-c", "pass"]) for _ in range(3))
    assert min(runs)[0] - bare[0] < 0.3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples(command, capsys):
    assert cli.run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"  llavakit {command}" in shown.partition("Examples:")[2]


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["llavakit", llavakit.__version__]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["systems", "llava-1.55"], "unknown system 'llava-1.55'; did you mean 'llava-1.5'?"),
        (["parity", "no/such/folder"], "no/such/folder: no such folder"),
        (["chat", "model", "--image", "missing.png"], "missing.png: no such image file"),
        (["chat", "model", "--image", __file__], "test_cli.py: is not an image"),
        (["phantom", "scene", "out", "size"], "size: not an assignment; write key=value"),
        (["phantom", "scen", "out"], "did you mean 'scene'?"),
        (["score", "pop", "--predictions", "p"], "did you mean 'pope'?"),
        (["eval", "model", "--task", "pope", "--questions", "missing.json"], "missing.json: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, words, capsys):
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("llavakit: ")
    assert words in captured.err


@pytest.mark.parametrize("arguments", [["nonsense"], ["chat"], ["convert", "a", "b", "--to", "tar"], ["score", "--x"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    assert cli.run(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def failing(error):
    def train(recipe, overrides, check):
        raise error

    return SimpleNamespace(train=train)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("recipe.yaml: stages.0.lr: unknown key\nsecond"), 2, "llavakit: recipe.yaml: stages.0.lr: unknown"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "out: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "out: Permission denied"),
        (ModuleNotFoundError("no nibabel", name="nibabel"), 2, "pip install 'llavakit[medical]'"),
    ],
)
def test_failures_that_users_can_mend(error, status, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llavakit.training.run", failing(error))
    assert cli.run(["train", "recipe.yaml"]) == status
    err = capsys.readouterr().err
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_interruption_is_status_130(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llavakit.training.run", failing(KeyboardInterrupt()))
    assert cli.run(["train", "recipe.yaml"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_our_own_faults_keep_their_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, "llavakit.training.run", failing(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        cli.run(["train", "recipe.yaml"])


def test_train_passes_overrides_on_and_names_the_model(monkeypatch, capsys):
    seen = []
    stages = [SimpleNamespace(name="align", ran=True, folder=Path("x/align"))]

    def train(*arguments, check):
        seen.append((*arguments, check))
        return SimpleNamespace(stages=stages, final=Path("x/final"))

    monkeypatch.setitem(sys.modules, "llavakit.training.run", SimpleNamespace(train=train))
    assert cli.run(["train", "r.yaml", "stages.0.lr=1e-3", "output=x", "--on-bad-record", "skip"]) == 0
    assert seen == [(Path("r.yaml"), ["stages.0.lr=1e-3", "output=x", "on_bad_record=skip"], "sample")]
    captured = capsys.readouterr()
    assert captured.out == "x/final\n"
    assert "align: trained" in captured.err


def test_phantom_writes_a_world_once(tmp_path, capsys):
    arguments = ["phantom", "scene", str(tmp_path / "scene"), "size=32", "progress=false", "--n", "10"]
    assert cli.run(arguments) == 0
    assert "9 train" in capsys.readouterr().out
    assert cli.run([*arguments, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert (manifest["seed"], manifest["reused"], manifest["options"]) == (0, True, {"size": 32})


def test_chat_once(model, picture, capsys):
    asked = ["chat", "m", "--image", picture, "--image", picture, "--prompt", "what?", "--system", "Be brief."]
    assert cli.run([*asked, "--max-new-tokens", "7"]) == 0
    assert capsys.readouterr().out == "2 what?\n"
    messages, options = model.seen[0]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[1]["content"][0] == {"type": "image", "image": picture}
    assert options.max_new_tokens == 7
    assert cli.run(["chat", "m", "--prompt", "think"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "0 think\n"  # a pipe gets the answer alone
    assert "[PLAN] hm" in captured.err


def test_chat_in_a_conversation(model, picture, capsys, monkeypatch):
    lines = iter(
        [f"/image '{picture}'", "one", "/image nothing.png", "/what", "", "bad", "slow", "/reset", "two", "/exit", "x"]
    )
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    assert cli.run(["chat", "m"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "[image attached to the next message]",
        "1 one",
        "0  [stopped]",
        "[new conversation]",
        "0 two",
    ]
    assert captured.err.splitlines() == [
        "nothing.png: no such image file",
        "/what: unknown command; /help lists them",
        "image: cannot be read",
    ]
    histories = [[message["role"] for message in messages] for messages, _ in model.seen]
    first, failed, stopped, fresh = histories
    assert first == fresh == ["user"]
    assert failed == stopped == ["user", "assistant", "user"]
    assert next(lines) == "x"


def test_chat_reads_a_pipe_to_its_end(model, capsys, monkeypatch):
    lines = iter(["a", "b"])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)
    assert cli.run(["chat", "m"]) == 0
    assert capsys.readouterr().out == "0 a\n0 b\n"


def write_case(folder, component, expected):
    folder.mkdir(parents=True)
    case = {"system": "toy", "component": component, "config": {}, "tolerance": {"atol": 0, "rtol": 0}}
    (folder / "case.json").write_text(json.dumps(case))
    (folder / "outputs.json").write_text(json.dumps(expected))


@pytest.fixture
def toy(monkeypatch):
    """A system with parity, cost and a miniature, that only this test knows."""
    from rich.table import Table

    from llavakit.proof import golden as parity
    from llavakit.proof.miniature import Arm, Comparison, Verdict

    adapters = {"right": lambda case: 1, "wrong": lambda case: 2, "aside": parity.declined("incidental")}

    def miniature(seeds=(0, 1, 2), progress=None):
        progress("running")
        idea, baseline = Arm("idea", [0.9] * len(seeds)), Arm("baseline", [0.5] * len(seeds))
        comparison = Comparison(metric="accuracy", idea=idea, baseline=baseline)
        return Verdict(system="toy", claim="c", paper="p", comparisons=(comparison,), seeds=tuple(seeds))

    cost = SimpleNamespace(to_dict=lambda: {"flops": 7}, table=lambda: Table("flops"))
    offers = {"parity": adapters, "cost": lambda: cost, "miniature": miniature}
    system = SimpleNamespace(load=offers.__getitem__)
    monkeypatch.setattr("llavakit.system.get_system", lambda slug: system)
    monkeypatch.setattr("llavakit.proof.golden.get_system", lambda slug: system)
    monkeypatch.setattr("llavakit.proof.golden.systems", lambda: {"toy": system})


def test_parity_prints_one_object_or_one_line_per_case(toy, tmp_path, capsys):
    for component in ("right", "wrong", "aside"):
        write_case(tmp_path / component, component, 1)
    assert cli.run(["parity", str(tmp_path), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert [result[name] for name in ("passed", "failed", "declined")] == [1, 1, 1]
    assert result["cases"][0] == {
        "path": str(tmp_path / "aside"),
        "system": "toy",
        "component": "aside",
        "status": "declined",
        "max_abs_error": None,
        "reason": "incidental",
        "examples": 0,
        "passed_examples": 0,
    }
    assert cli.run(["parity", str(tmp_path / "right"), str(tmp_path / "aside"), "--only", "toy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["passed", "declined", "1"]
    assert cli.run(["parity", str(tmp_path), "--only", "other"]) == 2


def test_reproduce_and_cost(toy, capsys):
    assert cli.run(["reproduce", "toy", "--seeds", "4", "--json"]) == 0
    captured = capsys.readouterr()
    verdict = json.loads(captured.out)
    assert (verdict["verdict"], verdict["seeds"]) == ("supported", [0, 1, 2, 3])
    assert captured.err == "running\n"
    assert cli.run(["reproduce", "toy"]) == 0
    assert "supported" in capsys.readouterr().out
    assert cli.run(["cost", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"flops": 7}
    assert cli.run(["cost", "toy"]) == 0
    assert "flops" in capsys.readouterr().out


def test_systems_lists_and_shows(capsys):
    assert cli.run(["systems", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    row = next(row for row in rows if row["slug"] == "llava-1.5")
    assert row["title"] == "LLaVA-1.5"
    assert set(row["works"]) == {"parity", "cost", "miniature", "recipe", "checkpoint"}
    assert cli.run(["systems"]) == 0
    assert "llava-1.5" in capsys.readouterr().out
    assert cli.run(["systems", "llava-1.5"]) == 0
    assert "2310.03744" in capsys.readouterr().out


def test_score_prints_the_metrics_as_json(tmp_path, capsys):
    predictions, gold = tmp_path / "p.jsonl", tmp_path / "g.jsonl"
    predictions.write_text("".join(json.dumps({"question_id": n, "text": t}) + "\n" for n, t in [(1, "A"), (2, "C")]))
    gold.write_text(
        "".join(
            json.dumps({"question_id": n, "text": "q", "label": label}) + "\n" for n, label in [(1, "yes"), (2, "no")]
        )
    )
    predictions.write_text(predictions.read_text().replace('"A"', '"Yes."').replace('"C"', '"Yes"'))
    assert cli.run(["score", "pope", "--predictions", str(predictions), "--gold", str(gold), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["task"] == "pope"
    assert isinstance(result["metrics"], dict)


def test_doctor_is_json_and_a_table(capsys):
    assert cli.run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["packages"]["torch"]
    assert report["extras"]["medical"]["install"] == "pip install 'llavakit[medical]'"
    assert report["cache"]["path"]
    assert cli.run(["doctor"]) == 0
    assert "transformers" in capsys.readouterr().out


def test_doctor_names_what_is_wrong(monkeypatch):
    from llavakit.cli import doctor

    found = {"transformers": "4.37.2", "av": None}
    monkeypatch.setattr(doctor, "_version", lambda name, real=doctor._version: found.get(name, real(name)))
    problems = doctor.examine()["problems"]
    assert any("version 4.37.2 is installed: pip install 'transformers<" in line for line in problems)
    assert any(line.startswith("av>=") and "not installed" in line for line in problems)


def test_eval_knows_a_model_by_its_content(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chat = small_chat()
    chat.model.save_pretrained("run/final")
    chat.processor.save_pretrained("run/final")
    Path("q.jsonl").write_text(json.dumps({"question_id": 1, "text": "Red or blue?", "answer": "red"}) + "\n")

    def asked(model):
        options = ["--task", "exact_match", "--questions", "q.jsonl", "--max-new-tokens", "2"]
        assert cli.run(["eval", model, *options]) == 0
        return capsys.readouterr().err

    assert "1 questions asked" in asked("run/final")
    Path("link").symlink_to("run/final")
    for spelling in ("run/final", "run/final/", str(tmp_path / "run" / "final"), "./run/../run/final", "link"):
        assert "0 questions asked" in asked(spelling), spelling
    with torch.no_grad():
        chat.model.lm_head.weight[9] += 1
    chat.model.save_pretrained("run/final")
    said = asked("run/final")
    assert "1 questions asked" in said
    assert "keeps the answers of before" in said
    assert len(list(Path("runs/eval/exact_match").glob("run--final*.jsonl"))) == 2
