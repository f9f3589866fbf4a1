"""Whether the golden cases prove the product: entries broken on purpose, and cases run again under variations.

    python tests/parity_bites.py            every system
    python tests/parity_bites.py llava-1.5  one system

Each user entry is broken in turn; at least one case of the system must fail then, see `parity_entries`. After that the
cases run in variations whose right answer follows from the recorded one: lists of independent inputs reversed and
doubled, batches in another order, padding on the other side, inputs in another floating-point type. Prints one line
per check; exit status 1 if one does not hold.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from parity_entries import bites, proved_systems
from safetensors.torch import load_file, save_file

from llavakit.proof.golden import run_case

GOLDEN = Path(__file__).parent / "golden"

# Lists of inputs that are independent of each other, and the lists of their outputs.
PARALLEL: dict[str, tuple[str, tuple[str, ...]]] = {
    "llava-1.5/anyres-plan": ("sizes_wh", ("plans",)),
    "llava-1.5/model-name": ("paths", ("names", "conv_mode")),
    "llava-1.5/sampler": ("runs", ("runs",)),
    "llava-1.5/sampler-chunks": ("calls", ("chunks",)),
    "llava-1.5/sampler-lengths": ("data", ("lengths", "modality_lengths")),
    "llava-1.5/tokenizer-image-token": ("prompts", ("legacy", "nonlegacy", "bpe")),
    "llava-1.5/labels-plain": ("samples", ("legacy", "nonlegacy", "bpe")),
    "llava-1.5/eval-textvqa-prompt": ("prompts", ("questions",)),
    "llava-1.5/unpad": ("calls", ("kept",)),
    "llava-onevision/anyres_plan": ("sizes", ("plans",)),
    "llava-onevision/prompts": ("queries", ("prompts",)),
    "llava-onevision/select_best_resolution": ("queries", ("best",)),
    "llava-onevision/tokenizer_image_token": ("prompts", ("ids",)),
    "llava-onevision/video_sampling": ("queries", ("results",)),
    "llava-uhd/planner": ("sizes", ("plans",)),
    "llava-uhd/planner_after_1024": ("sizes", ("plans",)),
    "llava-uhd/planner_preview": ("sizes", ("plans",)),
    "llava-uhd/pooling_size": ("grids_hw", ("pool_hw",)),
    "llava-uhd/prompts": ("dialogs", ("dialogs",)),
    "llava-mini/labels_llama3": ("samples", ("samples",)),
    "llava-mini/prompts": ("conversations", ("prompts",)),
    "llava-mini/split_plan": ("items", ("plans",)),
    "dynamic-llava/tau_schedule": ("items", ("tau",)),
    "dynamic-llava/token_roles": ("samples", ("samples",)),
    "medm-vl/templates": ("", ("",)),
    "surgical-llava/frame_sampling": ("pairs", ("sampling",)),
    "surgical-llava/inference_prompt": ("", ("",)),
    "surgical-llava/training_prompt_and_labels": ("", ("",)),
}
# Batches whose rows each own one medium, and the setting that says where they are padded.
BATCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "llava-1.5/e2e-logits": (("input_ids", "attention_mask", "labels", "pixel_values"), None),
    "llava-mini/e2e_image_c1_batch": (("input_ids", "attention_mask", "images"), ("llm", "tokenizer_padding_side")),
    "llava-mini/e2e_train_multiturn": (
        ("input_ids", "attention_mask", "labels", "images"),
        ("llm", "tokenizer_padding_side"),
    ),
    "llava-uhd/end_to_end": ((), ("padding_side",)),
    "medm-vl/e2e_2d_siglip_mlp": ((), ("llm_padding_side",)),
    "medm-vl/e2e_3d_m3dclip_spatial_pooling": (
        ("input_ids", "attention_mask", "labels", "image3d"),
        ("llm_padding_side",),
    ),
}
# Inputs that may come in any floating-point type; the outputs change by rounding alone.
TYPES = (
    "llava-1.5/clip-tower",
    "llava-1.5/s2-tower",
    "llava-1.5/projector",
    "llava-1.5/e2e-logits",
    "llava-1.5/e2e-anyres",
    "llava-1.5/splice",
    "llava-onevision/siglip_tower",
    "llava-onevision/pool2d",
    "llava-onevision/projector",
    "llava-uhd/clip_native_aspect",
    "llava-uhd/perceiver_resampler",
    "llava-uhd/spatial_resampler",
    "llava-uhd/end_to_end",
    "llava-mini/compressor_c2",
    "llava-mini/e2e_image_c1_batch",
    "dynamic-llava/image_predictor",
    "dynamic-llava/text_predictor",
    "dynamic-llava/decoder_layer_policy",
    "medm-vl/connector_mlp",
    "medm-vl/connector_spatial_pooling",
    "medm-vl/connector_attn_pooling",
    "medm-vl/e2e_2d_siglip_mlp",
    "medm-vl/tower_m3dclip",
    "medm-vl/tower_medmclip",
    "surgical-llava/clip_to_video_tokens",
    "surgical-llava/e2e_logits",
)
EXACT = ("keep", "shape", "ids", "generate", "num_", "hidden_states")


@contextmanager
def varied(name: str, change: Callable[[Path], None]) -> Iterator[Path]:
    """A copy of a case beside its siblings, changed."""
    source = GOLDEN / name
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / source.parent.name / source.name
        shutil.copytree(source, folder)
        change(folder)
        yield folder


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def edit_tensors(file: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    if file.is_file():
        save_file({name: change(name, t).contiguous() for name, t in load_file(file).items()}, file)


def reversed_and_doubled(inputs: str, outputs: tuple[str, ...]) -> Callable[[Path], None]:
    """Every list of inputs and outputs: backwards, then once more."""

    def twice(names: tuple[str, ...]) -> Callable[[Any], Any]:
        def change(value: Any) -> Any:
            if names == ("",):
                return value[::-1] * 2
            return value | {name: value[name][::-1] * 2 for name in names}

        return change

    def apply(folder: Path) -> None:
        edit_json(folder / "inputs.json", twice((inputs,)))
        edit_json(folder / "outputs.json", twice(outputs))

    return apply


def rows_reversed(names: tuple[str, ...]) -> Callable[[Path], None]:
    """The rows of a batch backwards; outputs that do not go by rows are left out."""

    def apply(folder: Path) -> None:
        rows = load_file(folder / "inputs.safetensors")["input_ids"].shape[0]
        edit_tensors(folder / "inputs.safetensors", lambda name, t: t.flip(0) if name in names else t)
        edit_tensors(folder / "outputs.safetensors", lambda name, t: t.flip(0) if t.shape[0] == rows else t)
        (folder / "outputs.json").unlink(missing_ok=True)

    return apply


def padded_on_the_other_side(setting: tuple[str, ...]) -> Callable[[Path], None]:
    """Every row of the outputs moved to the other end of its padding."""

    def apply(folder: Path) -> None:
        def flip(meta: Any) -> Any:
            config = meta["config"]
            for key in setting[:-1]:
                config = config[key]
            config[setting[-1]] = "left" if config.get(setting[-1], "right") == "right" else "right"
            return meta

        outputs = load_file(folder / "outputs.safetensors")
        masks = [name for name in outputs if "attention_mask" in name]
        mask = outputs[masks[0]].bool()
        right = bool(mask[:, 0].all())
        shifts = [int((~row).sum()) * (1 if right else -1) for row in mask]

        def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[:2] != mask.shape or name.startswith("call"):
                return tensor
            return torch.stack([row.roll(shift, 0) for row, shift in zip(tensor, shifts, strict=True)])

        edit_json(folder / "case.json", flip)
        edit_tensors(folder / "outputs.safetensors", moved)

    return apply


def in_type(dtype: torch.dtype, files: tuple[str, ...] = ("inputs",)) -> Callable[[Path], None]:
    """Floating-point inputs (and weights) in another type; tolerances of its precision."""
    slack = {torch.float64: 0.0, torch.float16: 0.02, torch.bfloat16: 0.25}[dtype]

    def apply(folder: Path) -> None:
        for file in files:
            edit_tensors(folder / f"{file}.safetensors", lambda name, t: t.to(dtype) if t.is_floating_point() else t)
        if slack:
            wide = {"atol": slack, "rtol": slack}
            edit_json(folder / "case.json", lambda meta: meta | {"tolerance": wide})
            kept = {
                name: tensor
                for name, tensor in load_file(folder / "outputs.safetensors").items()
                if not name.startswith(("grad", "loss")) and not any(word in name for word in EXACT)
            }
            save_file(kept, folder / "outputs.safetensors")
            (folder / "outputs.json").unlink(missing_ok=True)

    return apply


def variations(system: str) -> Iterator[tuple[str, bool, str]]:
    """Name, verdict and reason of every variation."""
    changes: list[tuple[str, str, Callable[[Path], None]]] = []
    for name, (inputs, outputs) in PARALLEL.items():
        changes.append((name, "reversed and doubled", reversed_and_doubled(inputs, outputs)))
    for name, (rows, side) in BATCHES.items():
        if rows:
            changes.append((name, "rows reversed", rows_reversed(rows)))
        if side is not None:
            changes.append((name, "padded on the other side", padded_on_the_other_side(side)))
    for name in TYPES:
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            changes.append((name, str(dtype).removeprefix("torch."), in_type(dtype)))
        for dtype in (torch.float64, torch.bfloat16):
            if dtype == torch.bfloat16 and ("pooling" in name or "e2e" in name):
                continue  # PyTorch pools no bfloat16 volumes on a CPU; errors of whole random models add up
            both = in_type(dtype, ("inputs", "weights"))
            changes.append((name, f"weights of {str(dtype).removeprefix('torch.')}", both))
    for name, what, change in changes:
        if name.split("/")[0] == system:
            with varied(name, change) as folder:
                report = run_case(folder, [GOLDEN])
            yield f"{name.split('/')[1]}, {what}", report.status == "passed", report.reason


def main(systems: list[str]) -> int:
    """Check the systems; the exit status."""
    failed = total = 0
    for system in systems or proved_systems():
        for checks in (bites, variations):
            for name, holds, remark in checks(system):
                total += 1
                failed += not holds
                print(f"{'ok' if holds else 'FAILED':7} {system:16} {name}{'' if holds else f': {remark}'}", flush=True)
    print(f"{total - failed} of {total} checks hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
