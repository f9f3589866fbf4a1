"""Golden cases under another configuration, where the golden numbers themselves say what must come out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import parity_entries
import pytest
from safetensors.torch import load_file, save_file

from llavakit.proof.golden import run_case

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = ("tokenizer_model_max_length",)


@pytest.mark.parametrize(
    ("case", "setting", "length"),
    [
        ("medm-vl/e2e_2d_siglip_mlp", ("llm_max_length",), 5),
        ("medm-vl/e2e_3d_slices_siglip_attn_pooling", ("llm_max_length",), 4),
        ("llava-uhd/end_to_end", TOKENIZER, 7),
        ("llava-mini/e2e_hires_2x2", ("llm", *TOKENIZER), 9),
        ("llava-mini/e2e_video_3frames", ("llm", *TOKENIZER), 12),
    ],
)
def test_a_row_cut_in_the_middle_of_a_medium_keeps_the_values_of_what_is_left(tmp_path, case, setting, length):
    folder = tmp_path / "case"
    shutil.copytree(GOLDEN / case, folder)
    meta = json.loads((folder / "case.json").read_text())
    config = meta["config"]
    for key in setting[:-1]:
        config = config[key]
    config[setting[-1]] = length
    (folder / "case.json").write_text(json.dumps(meta))
    outputs = load_file(GOLDEN / case / "outputs.safetensors")
    rows = {
        name: tensor[:, :length].contiguous()
        for name, tensor in outputs.items()
        if name == "logits" or name == "inputs_embeds" or "mask" in name or "labels" in name
    }
    assert {"logits", "inputs_embeds"} <= set(rows)
    save_file(rows, folder / "outputs.safetensors")
    report = run_case(folder)
    assert report.status == "passed", report.reason


@pytest.mark.slow
@pytest.mark.parametrize("system", parity_entries.proved_systems())
def test_cases_fail_where_a_user_entry_is_broken(system):
    for name, holds, remark in parity_entries.bites(system):
        assert holds, f"{name}: {remark}"
