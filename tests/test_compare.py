"""Two systems on the same questions: `llavakit compare`."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from llavakit.cli.app import run
from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.generic import ExactMatch
from llavakit.evaluation.compare import compare, predictions_in, verdict
from llavakit.evaluation.comparison_page import write_page
from llavakit.evaluation.metrics.intervals import Measure, paired

pytestmark = pytest.mark.usefixtures("measures_give_the_metrics")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    """40 questions about 40 pictures of one colour each; the first is right about 35 of them, the second about 20."""
    gold, answers = [], {"first": [], "second": []}
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        row = {"question_id": number, "image": f"{number}.png", "text": f"<i>Question</i> {number}?"}
        gold.append(row | {"answer": "red", "type": "even" if number % 2 == 0 else "odd"})
        for name, right in (("first", number < 35), ("second", number % 2 == 0)):
            text = "red" if right else "<script>alert(1)</script>"
            answers[name].append({"question_id": number, "text": text, "model_id": name, "asked": f"{number}"})
    made = {name: lines(tmp_path / f"{name}.jsonl", rows) for name, rows in answers.items()}
    return made | {"gold": lines(tmp_path / "gold.jsonl", gold), "rows": answers}


def test_right_and_wrong_answers_are_tested_by_mcnemar(files):
    result = compare("exact_match", files["first"], files["second"], files["gold"]).result()
    row = result["metrics"]["accuracy"]
    assert (row["first"]["value"], row["second"]["value"], row["difference"]) == (87.5, 50.0, 37.5)
    assert (row["only_first"], row["only_second"], row["test"]) == (17, 2, "McNemar, exact")
    assert row["p"] == pytest.approx(stats.binomtest(17, 19).pvalue)
    assert 0 < row["low"] < 37.5 < row["high"]
    by_type = result["tables"]["by_type"]
    assert {name: (row["n"], row["difference"]) for name, row in by_type.items()} == {
        "even": (20, -10.0),
        "odd": (20, 85.0),
    }
    assert verdict(result).startswith("first is better in accuracy (first minus second +37.5, 95 % ")


def test_sides_exchanged_give_the_opposite(files):
    one, other = (
        compare("exact_match", *order, files["gold"]).result()["metrics"]["accuracy"]
        for order in ((files["first"], files["second"]), (files["second"], files["first"]))
    )
    assert one["difference"] == -other["difference"]
    assert one["p"] == other["p"]
    assert (one["low"], one["high"]) == pytest.approx((-other["high"], -other["low"]))


def test_order_of_lines_does_not_matter(files):
    before = compare("exact_match", files["first"], files["second"], files["gold"]).result()
    lines(files["second"], files["rows"]["second"][::-1])
    assert compare("exact_match", files["first"], files["second"], files["gold"]).result() == before


def test_questions_about_one_picture_change_sides_together(files):
    """Four questions about each of ten pictures: the test has ten pictures, not forty questions."""
    rows = [json.loads(line) for line in files["gold"].read_text().splitlines()]
    lines(files["gold"], [row | {"image": f"{n // 4}.png"} for n, row in enumerate(rows)])
    right = {"first": lambda n: n < 36, "second": lambda n: n < 8}
    for name, own in right.items():
        said = [{"question_id": n, "text": "red" if own(n) else "blue"} for n in range(40)]
        lines(files[name], said)
    row = compare("exact_match", files["first"], files["second"], files["gold"]).result()["metrics"]["accuracy"]
    assert row["test"] == "exchange"
    assert row["p"] == pytest.approx(2 / 2**7, abs=0.006)  # 7 pictures differ, all in one direction
    assert row["only_first"] == 28


def test_a_difference_of_none_is_not_certain():
    same = Measure.mean([True] * 20)
    found = paired(same, same, np.arange(20))
    assert (found.value, found.p) == (0, 1)
    assert found.interval[0] < -5 < 5 < found.interval[1]


def test_95_of_100_differences_hold_the_truth():
    rng, held = np.random.default_rng(2), {"share": 0, "mean": 0}
    for _ in range(300):
        skill = rng.normal(size=60)
        right = [(skill + rng.normal(size=60) + shift > 0) for shift in (0.6, 0.3)]
        found = paired(*map(Measure.mean, right), np.arange(60))
        expected = 100 * (stats.norm.cdf(0.6 / 2**0.5) - stats.norm.cdf(0.3 / 2**0.5))
        held["share"] += found.interval[0] <= expected <= found.interval[1]
        means = [np.clip(0.5 + 0.05 * skill + 0.05 * rng.normal(size=60) + shift, 0, 1) for shift in (0.02, 0.0)]
        found = paired(*map(Measure.mean, means), np.arange(60))
        held["mean"] += found.interval[0] <= 2.0 <= found.interval[1]
    assert 0.92 <= held["share"] / 300 <= 0.99
    assert 0.90 <= held["mean"] / 300 <= 0.985


def test_what_is_no_share_is_compared_by_resampling(files):
    rows = [{"question_id": n, "text": "cat" if n % 3 else "a cat", "model_id": "m"} for n in range(40)]
    lines(files["first"], rows)
    lines(files["second"], [row | {"text": "cats"} for row in rows])
    gold = [{"question_id": n, "answer": "cat"} for n in range(40)]
    lines(files["gold"], gold)
    row = compare("anls", files["first"], files["second"], files["gold"]).result()["metrics"]["anls"]
    assert row["test"] == "exchange"
    assert "only_first" not in row
    assert row["low"] < row["difference"] < row["high"]


def test_the_page_shows_what_differs_and_runs_nothing(files, tmp_path):
    found = compare("exact_match", files["first"], files["second"], files["gold"])
    questions = ExactMatch().questions(files["gold"])
    write_page(tmp_path / "page.html", found, found.result(), questions)
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="card"') == 19
    assert page.count("data:image/png;base64,") == 19
    assert "&lt;script&gt;" in page
    assert "&lt;i&gt;Question&lt;/i&gt; 1?" in page
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    write_page(tmp_path / "few.html", found, found.result(), most=5)
    few = (tmp_path / "few.html").read_text()
    assert few.count('class="card"') == 5
    assert "The 5 with the largest differences are shown" in few


def refused(files, match, task="exact_match", **options):
    with pytest.raises(UserError, match=match) as error:
        compare(task, files["first"], files["second"], files["gold"], **options)
    assert "\n" not in str(error.value)


def test_other_questions_are_refused_and_shared_ones_can_be_compared(files):
    lines(files["second"], files["rows"]["second"][:30])
    refused(files, "30 are in both, 10 of .*first.jsonl are not in the other.*--common")
    found = compare("exact_match", files["first"], files["second"], files["gold"], common=True).result()
    assert found["n"] == 30
    assert found["metrics"]["accuracy"]["first"]["value"] == 100.0


def test_no_shared_question_is_refused(files):
    lines(files["second"], [row | {"question_id": f"x{row['question_id']}"} for row in files["rows"]["second"]])
    refused(files, "share no question; they begin with '?0'? and 'x0'")


def test_another_picture_or_text_is_refused(files):
    lines(files["second"], [row | {"asked": "other"} for row in files["rows"]["second"]])
    refused(files, "second.jsonl:1: asked: question '0' had another text or picture")


def test_another_task_is_refused(files):
    files["second"].with_suffix(".run.json").write_text(json.dumps({"run": "r", "task": "pope"}))
    refused(files, "second.jsonl: holds answers to the task pope, not to exact_match")
    refused(files, "unknown benchmark|is not a known", task="exact_macth")


def test_a_file_is_not_compared_with_itself(files):
    with pytest.raises(UserError, match="is compared with itself"):
        compare("exact_match", files["first"], files["first"], files["gold"])


def test_a_folder_stands_for_the_one_file_in_it(files, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(UserError, match="holds no predictions file"):
        predictions_in(folder)
    for name in ("a.jsonl", "a.0123.jsonl", "a.judge.jsonl"):
        (folder / name).write_text("")
    for name, digest in (("a", "4567"), ("a.0123", "0123")):
        (folder / f"{name}.run.json").write_text(json.dumps({"run": digest}))
    assert predictions_in(folder).name == "a.jsonl"  # what an earlier state of the model said is no second one
    (folder / "b.jsonl").write_text("")
    (folder / "b.run.json").write_text(json.dumps({"run": "89"}))
    with pytest.raises(UserError, match=r"holds 2 predictions files \(a.jsonl, b.jsonl\); name one"):
        predictions_in(folder)


def test_the_command(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sides = [str(files["first"]), str(files["second"]), "--task", "exact_match"]
    assert run(["compare", *sides, "--questions", str(files["gold"]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"]["accuracy"]["difference"] == 37.5
    assert told["metrics"]["accuracy"]["only_first"] == 17
    assert (tmp_path / told["page"]).read_text().count("data:image/png;base64,") == 19
    assert run(["compare", *sides]) == 2
    assert run(["compare", *sides, "--gold", str(files["gold"])]) == 0
    shown = capsys.readouterr().out
    assert "first is better in accuracy" in shown
    assert "by_type" in shown
