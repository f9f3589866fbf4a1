"""`make bench-gpu` in its small shape: every part runs, both sides agree, and the section is Markdown."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def run(gpu, monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", *arguments])
    with pytest.raises(SystemExit) as left:
        gpu.main()
    return left.value.code, capsys.readouterr().out


def test_all_parts_run_and_both_sides_agree(gpu, monkeypatch, capsys):
    code, out = run(gpu, monkeypatch, capsys)
    assert code == 0, out
    assert out.startswith("## The GPU benchmark's small shape on a CPU: no measurement")
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if re.match(r"\| \S", line)]
    decoded = [row for row in rows if row[0] in ("1", "2")]
    assert [row[1] for row in decoded] == ["transformers `generate`", "llavakit"] * 2
    assert {row[-1] for row in decoded} == {"100 %"}
    losses = {row[0]: float(row[1]) for row in rows if row[0] in ("transformers", "llavakit")}
    assert losses["transformers"] == pytest.approx(losses["llavakit"], abs=2e-3)
    assert {row[0] for row in rows} >= {"llavakit, LLaVA-Mini", "8", "80"}


def test_what_is_left_out_or_fails_is_said(gpu, monkeypatch, capsys):
    code, out = run(gpu, monkeypatch, capsys, "--minutes", "0", "--parts", "frames")
    assert code == 0
    assert "frames: left out, 0 minutes are nearly over" in out

    def broken(bench):
        raise RuntimeError("no memory")

    monkeypatch.setitem(gpu.PARTS, "frames", broken)
    code, out = run(gpu, monkeypatch, capsys, "--parts", "frames")
    assert code == 1
    assert "frames: failed, RuntimeError: no memory" in out
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--parts", "nothing"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "nothing is unknown" in capsys.readouterr().err
