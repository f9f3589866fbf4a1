"""The demo with a budget of seconds: every stage runs, the report stands alone, a second run trains nothing."""

from __future__ import annotations

import json
import shutil

from rich.console import Console

from llavakit.demo.report import curve
from llavakit.demo.run import Budget, Demo


def test_the_demo_runs_from_nothing_and_is_found_again(tmp_path):
    budget = Budget(cases=30, tower_steps=4, caption_epochs=1.0, tune_epochs=1.0, questions=6)
    console = Console(quiet=True)
    first = Demo(tmp_path / "demo", budget, console).run()
    assert first["questions"] == 6
    assert {stage["name"] for stage in first["stages"]} == {
        "parts/caption",
        "llava/align",
        "llava/tune",
        "text-only/tune",
    }
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text())["accuracy"] == first["accuracy"]
    report = (tmp_path / "demo" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 6
    assert "http" not in report.replace("http-equiv", "")
    final = tmp_path / "demo" / "final"
    shutil.copytree(final, tmp_path / "copy", symlinks=True)  # cp -r keeps links as they are
    assert not final.is_symlink()
    assert (tmp_path / "copy" / "model.safetensors").is_file()
    weights = final / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = Demo(tmp_path / "demo", budget, console).run()
    assert weights.stat().st_mtime_ns == written
    assert again["accuracy"] == first["accuracy"]


def test_a_curve_is_drawn_inside_its_frame():
    svg = curve([{"step": 1, "loss": 4.0}, {"step": 50, "loss": 1.0}, {"step": 100, "loss": 0.5}])
    points = [tuple(map(float, pair.split(","))) for pair in svg.split('points="')[1].split('"')[0].split()]
    assert points[0][1] < points[-1][1]
    assert all(0 <= x <= 420 and 0 <= y <= 170 for x, y in points)
    assert "too few steps" in curve([{"step": 1, "loss": 1.0}])
