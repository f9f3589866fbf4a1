"""`llavakit score report --audit`: phantom reports damaged on purpose, and the finding-level score that notices."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from llavakit.cli.app import run
from llavakit.errors import UserError
from llavakit.evaluation.metrics.phantom_findings import facts, finding_f1
from llavakit.evaluation.reports.audit import DAMAGES, FINDINGS, audit, paraphrase, report
from llavakit.phantom.patient import MODALITIES, SETTINGS, Finding, draw_findings

EFFUSION = Finding("effusion", "left", size="small")
NODULES = [Finding("nodule", "left", "upper", "small"), Finding("nodule", "right", "lower", "large")]


@pytest.fixture(scope="module")
def found():
    return audit(200)


def test_facts_of_a_report_are_those_of_the_patient():
    text = report([Finding("cardiomegaly"), *NODULES, EFFUSION])
    assert facts(text) == Counter(
        [
            ("cardiomegaly", None, None, None),
            ("nodule", "left", "upper", "small"),
            ("nodule", "right", "lower", "large"),
            ("effusion", "left", None, "small"),
            ("no", "consolidation"),
            ("no", "pneumothorax"),
        ]
    )
    assert facts("Two nodules are seen.") == Counter({("nodule", None, None, None): 2})
    assert facts("Small left effusion and a large nodule in the right upper zone.") == Counter(
        [("effusion", "left", None, "small"), ("nodule", "right", "upper", "large")]
    )
    assert facts("The heart size is normal. No cardiomegaly.") == Counter([("no", "cardiomegaly")])
    assert facts("") == Counter()
    assert (finding_f1("", ""), finding_f1("", "No nodule.")) == (1, 0)


def test_paraphrases_are_faithful_and_in_other_words():
    rng = np.random.default_rng(0)
    for _ in range(300):
        findings = draw_findings(rng, MODALITIES, 2, SETTINGS["full"])
        text, other = report(findings), paraphrase(rng, findings)
        assert text != other
        assert facts(text) == facts(other), (text, other)


def test_damages_change_what_is_said_except_for_order():
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(300):
        findings = draw_findings(rng, MODALITIES, 2, SETTINGS["full"])
        text = report(findings)
        for name, damage in DAMAGES.items():
            damaged = damage(rng, findings)
            if damaged is None:
                continue
            seen[name] += 1
            assert damaged != text, name
            assert (facts(damaged) == facts(text)) == (name == "order"), (name, text, damaged)
    assert set(seen) == set(DAMAGES)
    assert DAMAGES["side"](rng, [EFFUSION]) == report([Finding("effusion", "right", size="small")])
    assert DAMAGES["size"](rng, [EFFUSION]) is None
    assert DAMAGES["invention"](rng, [Finding(kind) for kind in MODALITIES]) is None


def test_the_finding_level_score_is_right_where_overlap_is_not(found):
    right = found["right"]
    assert right[FINDINGS]["all"] >= 99
    assert all(right[FINDINGS][name] >= 99 for name in DAMAGES)
    for name in ("sacrebleu_4", "google_rouge_l", "coco_cider"):
        assert right[name]["side"] < 10
        assert right[name]["all"] < 50
    assert right["rules_f1_micro_14"]["omission"] > 95
    assert right["rules_f1_micro_14"]["location"] == 0
    assert found["applicable"]["order"] == found["reports"] == 200
    shares = [right["sacrebleu_1"][name] * found["applicable"][name] for name in DAMAGES]
    assert right["sacrebleu_1"]["all"] == pytest.approx(sum(shares) / sum(found["applicable"].values()))


def test_the_command_prints_the_audit(capsys):
    assert run(["score", "report", "--audit", "--audit-reports", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == audit(5)
    assert run(["score", "report", "--audit", "--audit-reports", "5", "--seed", "4"]) == 0
    printed = capsys.readouterr().out
    assert "5 phantom reports, seed 4" in printed
    assert "phantom_findings" in printed
    assert run(["score", "report", "--audit", "--predictions", "x"]) == 2
    with pytest.raises(UserError, match="reports=0"):
        audit(0)
