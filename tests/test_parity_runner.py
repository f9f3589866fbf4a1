"""The runner of golden cases: what passes, what fails, and that one bad case never stops the others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llavakit.errors import UserError
from llavakit.proof import golden as parity
from llavakit.proof.golden import Case, Declined, Result, find_cases, run_case, summary


@pytest.fixture
def write(tmp_path):
    """Writes one case and returns its folder."""

    def write_case(name="case", *, outputs=None, tensors=None, inputs=None, system="toy", component="part", **meta):
        folder = tmp_path / system / name
        folder.mkdir(parents=True)
        case = {"system": system, "component": component, "config": {}, "tolerance": {"atol": 1e-3, "rtol": 0}} | meta
        (folder / "case.json").write_text(json.dumps(case))
        if inputs is not None:
            (folder / "inputs.json").write_text(json.dumps(inputs))
        if outputs is not None:
            (folder / "outputs.json").write_text(json.dumps(outputs))
        if tensors is not None:
            save_file(tensors, folder / "outputs.safetensors")
        return folder

    return write_case


def run(folder: Path, result) -> parity.Report:
    return run_case(folder, adapter=result if callable(result) else lambda case: result)


def test_null_nan_and_a_missing_value_are_three_things(write):
    nan = float("nan")
    for number, wanted in enumerate((nan, None)):
        folder = write(f"case-{number}", outputs={"value": wanted, "rows": [wanted, 1.0]})
        for given in (nan, None):
            same = (given is None) == (wanted is None)
            report = run(folder, Result(json={"value": given, "rows": [given, 1.0]}))
            assert (report.status == "passed") == same, (wanted, given)
        for missing in (
            {"rows": [wanted, 1.0]},
            {"value": wanted, "rows": [wanted]},
            {"value": 0.0, "rows": [wanted, 1.0]},
        ):
            assert run(folder, Result(json=missing)).status == "failed", (wanted, missing)


def test_floats_pass_within_tolerance_and_all_else_must_be_exact(write):
    expected = {"score": 0.5, "count": 3, "name": "a", "flag": True, "none": None, "list": [1, 2.0, {"x": "y"}]}
    folder = write(outputs=expected)
    close = expected | {"score": 0.5004}
    report = run(folder, Result(json=close))
    assert report.status == "passed"
    assert report.max_abs_error == pytest.approx(0.0004)
    for wrong in (
        {"score": 0.502},
        {"count": 4},
        {"count": True},
        {"flag": 1},
        {"name": "b"},
        {"none": 0},
        {"list": [1, 2.0]},
        {"list": [1, 2.0, {"x": "y", "z": 1}]},
    ):
        report = run(folder, Result(json=expected | wrong))
        assert report.status == "failed", wrong
        assert next(iter(wrong)) in report.reason
    report = run(folder, Result(json={key: expected[key] for key in expected if key != "name"}))
    assert report.reason == "output name is missing"


def test_structures_of_other_types_are_compared_as_json_would_hold_them(write):
    folder = write(outputs={"box": [1, 2], "by_index": {"0": 1.0}})
    assert (
        run(folder, Result(json={"box": (1, torch.tensor(2)), "by_index": {0: torch.tensor(1.0)}})).status == "passed"
    )


def test_tensors_compare_shape_value_and_special_values(write):
    inf = float("inf")
    wanted = torch.tensor([[1.0, 2.0], [inf, float("nan")]])
    folder = write(tensors={"y": wanted, "ids": torch.tensor([2**53 + 1, 7])})
    good = {"y": wanted + 1e-4, "ids": torch.tensor([2**53 + 1, 7]), "further": torch.zeros(1)}
    assert run(folder, Result(tensors=good)).status == "passed"
    assert "shape [2], expected [2, 2]" in run(folder, Result(tensors=good | {"y": torch.zeros(2)})).reason
    assert (
        "y[0, 1]: 2.5, expected 2" in run(folder, Result(tensors=good | {"y": wanted + torch.tensor([0, 0.5])})).reason
    )
    assert run(folder, Result(tensors=good | {"ids": torch.tensor([2**53, 7])})).status == "failed"
    unstable = run(folder, Result(tensors=good | {"y": torch.full((2, 2), float("nan"))}))
    assert unstable.status == "failed"
    assert unstable.to_dict()["max_abs_error"] is None
    assert run(folder, Result(tensors={"y": wanted})).reason == "output ids is missing"


def test_relative_tolerance_never_loosens_integers(write):
    folder = write(tensors={"ids": torch.tensor([30000])}, tolerance={"atol": 0, "rtol": 1e-3})
    assert run(folder, Result(tensors={"ids": torch.tensor([30001])})).status == "failed"


def test_masks_ignored_outputs_and_single_tolerances(write):
    folder = write(outputs={"a": {"info": 1, "x": 2.0}, "corner": 1.0}, tensors={"y": torch.tensor([[1.0, 9.0]])})
    result = Result(
        json={"a": {"x": 2.0}, "corner": 1.5},
        tensors={"y": torch.tensor([[1.0, 0.0]])},
        mask={"y": torch.tensor([True, False])},
        ignored={"a.info": "printed only"},
        tolerances={"corner": (1.0, 0.0)},
    )
    report = run(folder, result)
    assert report.status == "passed"
    assert report.reason == "a.info not compared: printed only"
    everything = run(folder, Result(ignored={"*": "no"}))
    assert everything.status == "failed"
    assert "nothing was compared" in everything.reason


def test_a_plain_mapping_is_split_into_tensors_and_json(write):
    folder = write(outputs={"n": 1}, tensors={"y": torch.ones(2)})
    assert run(folder, {"n": 1, "y": torch.ones(2)}).status == "passed"
    assert run(write("bare", outputs=1.5), 1.5).status == "passed"


def test_declined_and_raising_adapters_are_reports(write):
    folder = write(outputs=[1])

    def decline(case):
        raise Declined("an incidental script")

    report = run(folder, decline)
    assert (report.status, report.reason, report.max_abs_error) == ("declined", "an incidental script", None)
    assert run(folder, parity.declined("why")).status == "declined"

    def broken(case):
        print("noise")
        raise ZeroDivisionError("one\ntwo")

    report = run(folder, broken)
    assert (report.status, report.reason) == ("failed", "ZeroDivisionError: one")
    assert "broken" in report.traceback


def test_adapters_run_repeatably_with_clean_standard_output(write, capsys):
    folder = write(tensors={"y": torch.zeros(3)})
    seen = []

    def noisy(case):
        print("noise")
        seen.append(torch.rand(3))
        return {"y": torch.zeros(3)}

    torch.set_default_dtype(torch.float64)
    try:
        run(folder, noisy)
        run(folder, noisy)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(*seen)
    assert seen[0].dtype == torch.float32
    assert "noise" not in capsys.readouterr().out


def test_unknown_system_component_and_broken_cases_fail_alone(write, tmp_path):
    write("a", outputs=1)
    broken = write("b", outputs=1)
    (broken / "case.json").write_text("{")
    reports = list(parity.run_parity([tmp_path]))
    assert [report.status for report in reports] == ["failed", "failed"]
    assert "unknown system 'toy'" in reports[0].reason
    assert "not a case description" in reports[1].reason
    counts = summary(reports)
    assert (counts["passed"], counts["failed"], counts["declined"]) == (0, 2, 0)
    fields = {"path", "system", "component", "status", "max_abs_error", "reason", "examples", "passed_examples"}
    assert set(counts["cases"][0]) == fields


def test_a_case_without_expected_outputs_fails(write):
    assert "neither outputs.json nor" in run(write(), {}).reason


def test_finding_cases_reports_what_is_wrong_and_counts_each_once(write, tmp_path):
    folder = write("a", outputs=1)
    write("b", outputs=1)
    assert len(find_cases([tmp_path, folder, folder / "case.json"])) == 2
    with pytest.raises(UserError, match="no such folder"):
        find_cases([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no golden case in it"):
        find_cases([tmp_path / "empty"])
    with pytest.raises(UserError, match="no case of system 'other'"):
        parity.run_parity([tmp_path], only="other")


def test_case_reads_its_files_and_finds_siblings(write, tmp_path):
    folder = write("a", inputs=[1, float("nan")], tolerance={"exact": True})
    neighbour = tmp_path / "elsewhere" / "toy" / "tokenizer"
    neighbour.mkdir(parents=True)
    (neighbour / "tokenizer.json").write_text("{}")
    case = Case.read(folder, [tmp_path / "elsewhere"])
    assert (case.atol, case.rtol) == (0.0, 0.0)
    assert case.inputs[0] == 1
    assert case.tensors == {}
    assert case.weights() == {}
    assert case.sibling("tokenizer/tokenizer.json") == neighbour / "tokenizer.json"
    with pytest.raises(UserError, match="needs nothing beside it"):
        case.sibling("nothing")
    with pytest.raises(UserError, match=r"there is no inputs\.json"):
        _ = Case.read(write("b")).inputs


def test_adapters_see_names_and_shapes_but_no_expected_value(write):
    folder = write(outputs={"runs": [{"name": "a", "x": 7}], "n": 3}, tensors={"y": torch.ones(2, 3).half()})
    seen = {}

    @parity.component(echoes=["runs.*.name"])
    def adapter(case):
        seen["wanted"] = case.wanted
        with pytest.raises(UserError, match="not for adapters"):
            case.sibling("outputs.json")
        return Result(json={"runs": [{"name": "ours", "x": 7}], "n": 3}, tensors={"y": torch.ones(2, 3)})

    assert run(folder, adapter).status == "passed"
    assert seen["wanted"].json == {"runs": [{"name": "a", "x": None}], "n": None}
    assert seen["wanted"].tensors == {"y": ((2, 3), torch.float16)}


def test_examples_run_one_by_one_and_are_counted(write):
    folder = write(
        outputs={"plans": [1, 2, 3], "b.c": {"n": 1}, "rest": 5}, tensors={"b.c/y": torch.ones(1), "z": torch.ones(1)}
    )

    def compute(item):
        if item == 2:
            raise ValueError("two is too many")
        return item

    def adapter(case):
        yield from parity.examples(compute, [1, 2, 4], "plans")
        yield from parity.examples(lambda item: {"n": 1, "y": 0, "b.c/y": torch.ones(1)}, {"b.c": 0}, tensors=True)
        yield Result(json={"rest": 5}, tensors={"z": torch.ones(1)})

    report = run(folder, adapter)
    assert (report.passed_examples, report.examples) == (2, 5)
    assert report.reason == "2 of 5; plans.1: ValueError: two is too many (and 2 more)"
    assert "two is too many" in report.traceback
    failed = run(folder, lambda case: parity.examples(compute, [1, 4, 3], "plans"))
    assert (failed.passed_examples, failed.examples) == (2, 4)  # what no example computes is missing


def test_keys_that_the_adapter_does_not_read_fail_the_case(write):
    config = {"known": {"a": 1, "b": 2}, "note": "x"}
    folder = write(outputs=1, inputs={"items": [{"n": 1, "m": 2}]}, config=config)

    def adapter(case):
        case.informational("config.note")
        return case.config["known"]["a"] * case.inputs["items"][0]["n"]

    assert run(folder, adapter).reason == "the adapter does not know config.known.b, inputs.items.0.m"

    def whole(case):
        case.informational("config.note")
        known = {**case.config["known"]}
        return len(parity.take(case.inputs)["items"]) * known["a"]

    assert run(folder, whole).status == "passed"
    blind = run(folder, lambda case: parity.take(case.config) and 1)
    assert blind.reason == "the adapter does not know inputs.json"
