"""LLaVA-Interactive: golden cases, costs, and its miniature in small."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavakit.proof.golden import run_case
from llavakit.system import get_system

pytest.importorskip("cv2")
CASES = sorted((Path(__file__).parent / "golden" / "llava-interactive").iterdir())


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_golden_cases(case):
    report = run_case(case)
    assert report.status == "passed", report.reason


def test_costs():
    rows = {row.name: row.value for row in get_system("llava-interactive").load("cost")().rows}
    assert rows["as it is"] == 256 * 1024
    assert rows["a disc of half the width, as run lengths"] < 2048
    assert rows["visual tokens of a message with the picture"] == 576


def test_miniature_in_small():
    verdict = get_system("llava-interactive").load("miniature")(seeds=(0, 1), scenes=8, chained=2)
    strokes, handing_over = verdict.comparisons
    assert strokes.idea.mean > strokes.baseline.mean
    assert handing_over.baseline.mean == 0
