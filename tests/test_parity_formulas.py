"""Adapters on inputs that no golden case has, against the formulas that define the components."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_variations import Given, against_expected, with_setting
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from llavakit.conversation.template import get_template
from llavakit.proof.entries import prompt_text, turns_to_messages
from llavakit.proof.golden import run_case
from llavakit.system import systems

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
Turns = Sequence[tuple[int, str]]


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., None]:
    """Writes a case and runs it; it must pass."""

    def run(system: str, component: str, config: Any, tolerance: float = 1e-6, **files: Any) -> None:
        folder = tmp_path / system / "case"
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"system": system, "component": component, "config": config}
        meta["tolerance"] = {"atol": tolerance, "rtol": tolerance}
        (folder / "case.json").write_text(json.dumps(meta))
        for name, content in files.items():
            if isinstance(next(iter(content.values()), None), Tensor):
                save_file({key: tensor.contiguous() for key, tensor in content.items()}, folder / f"{name}.safetensors")
            else:
                (folder / f"{name}.json").write_text(json.dumps(content))
        report = run_case(folder)
        assert report.status == "passed", report.reason

    return run


# Prompts


def two_separators(turns: Turns) -> str:
    text = VICUNA + " "
    for number, (who, said) in enumerate(turns):
        role = ("USER", "ASSISTANT")[who]
        text += f"{role}: {said}{(' ', '</s>')[number % 2]}" if said else f"{role}:"
    return text


def chatml(system: str, *, line: str) -> Callable[[Turns], str]:
    def write(turns: Turns) -> str:
        text = f"<|im_start|>system\n{system}<|im_end|>{line}"
        for who, said in turns:
            text += f"<|im_start|>{('user', 'assistant')[who]}\n" + (f"{said}<|im_end|>{line}" if said else "")
        return text

    return write


def llama_2(turns: Turns) -> str:
    text = ""
    for number, (_, said) in enumerate(turns):
        said = f"<<SYS>>\n{HELPFUL}\n<</SYS>>\n\n{said}" if number == 0 else said
        if said:
            text += f" {said} </s>" if number % 2 else f"<s>[INST] {said} [/INST]"
    return text.lstrip("<s>")


PROMPTS = {
    "v1": two_separators,
    "chatml_direct": chatml("Answer the questions.", line=""),
    "qwen_1_5": chatml("You are a helpful assistant.", line="\n"),
    "llava_llama_2": llama_2,
}
TEXTS = (
    *("<image>\nWhat?", "  lead", "trail  ", "a\n\nb", "<image>", "x<image>y", "<image><image> two", "</s>", "\n"),
    *("### Human: q", "ASSISTANT: no", "ünï 🙂", "{{ jinja }}", "[INST]", "<image>\n\nx", "q <image>\n<image> z", " "),
)


@pytest.mark.parametrize("template", PROMPTS)
def test_prompts_of_any_text(template):
    systems()  # registers the templates
    draw = random.Random(0)
    for _ in range(40):
        turns = [(number % 2, draw.choice(TEXTS)) for number in range(draw.randrange(1, 6))]
        opened = len(turns) % 2 == 0 and draw.random() < 0.5
        turns = [*turns[:-1], (1, "")] if opened else turns
        messages = turns_to_messages(turns[:-1] if opened else turns)
        written = prompt_text(template, messages, placement="keep", add_generation_prompt=opened)
        assert written == PROMPTS[template](turns)


# Plans


def native_size(width: float, height: float, side: int, patch: int, enlarge: bool) -> list[int]:
    if width * height > side * side or enlarge:
        ratio = width / height
        height = int(side / math.sqrt(ratio))
        width = int(height * ratio)
    return [max(math.floor(length / patch) * patch, patch) for length in (width, height)]


def partition(width: int, height: int, side: int, patch: int, most: int, split: bool) -> dict[str, Any]:
    count = min(math.ceil(width * height / side**2), most)
    facts: dict[str, Any] = {"size": [width, height], "n_slices": 0, "separators": ""}
    facts |= dict.fromkeys(("grid_cols_rows", "slice", "slice_patches_hw"))
    if count <= 1 or not split:
        overview = native_size(width, height, side, patch, True)
    else:
        numbers = [n for n in (count - 1, count, count + 1) if n != 1 and n <= most]
        grids = [(cols, n // cols) for n in numbers for cols in range(1, n + 1) if n % cols == 0]
        cols, rows = min(grids, key=lambda grid: abs(math.log(width / height) - math.log(grid[0] / grid[1])))
        overview = native_size(width, height, side, patch, False)
        refined = (max(width // cols * cols, cols) / cols, max(height // rows * rows, rows) / rows)
        one = native_size(*refined, side, patch, True)
        facts |= {"grid_cols_rows": [cols, rows], "n_slices": cols * rows, "slice": one}
        facts |= {"slice_patches_hw": [one[1] // patch, one[0] // patch]}
        facts["separators"] = ("," * (cols - 1) + "\n") * rows
    return facts | {"overview": overview, "overview_patches_hw": [overview[1] // patch, overview[0] // patch]}


@pytest.mark.parametrize(
    ("side", "patch", "most", "split"), [(336, 14, 7, True), (112, 7, 6, True), (100, 10, 9, True), (56, 14, 4, False)]
)
def test_native_slices_of_any_size(check, side, patch, most, split):
    lengths = (1, 7, 30, 99, 336, 500, 1024, 3000)
    sizes = [(width, height) for width in lengths for height in (1, 9, 50, 337, 2000)]
    config = {"scale_resolution": side, "patch_size": patch, "max_slice_nums": most, "never_split": not split}
    plans = [partition(*size, side, patch, most, split) for size in sizes]
    check("llava-uhd", "planner", config, inputs={"sizes": sizes}, outputs={"plans": plans})


def test_unpadding_of_any_size(check):
    calls, kept = [], []
    for width, height, rows, cols in ((100, 50, 24, 24), (3, 1000, 10, 7), (1, 1, 5, 5), (333, 334, 13, 29)):
        cells = torch.arange(rows * cols).reshape(rows, cols)
        if width / height > cols / rows:
            edge = (rows - int(height * (cols / width))) // 2
            cells = cells[edge : rows - edge]
        else:
            edge = (cols - int(width * (rows / height))) // 2
            cells = cells[:, edge : cols - edge]
        calls.append({"size_wh": [width, height], "grid_hw": [rows, cols]})
        kept.append(cells.tolist())
    check("llava-1.5", "feature_unpadding", {}, inputs={"calls": calls}, outputs={"kept": kept})


@pytest.mark.parametrize("crops", [1, 2, 3])
def test_croppings_of_any_number(check, crops):
    images = torch.randn(2, 3, 4 * crops, 6 * crops)
    places = [(row, col) for row in range(crops) for col in range(crops)]
    local = [images[:, :, 4 * row : 4 * row + 4, 6 * col : 6 * col + 6] for row, col in places]
    sampled = [images[:, :, row::crops, col::crops] for row, col in places]
    outputs = {"q_local": torch.stack(local), "q_global": torch.stack(sampled)}
    check("inf-llava", "dual_perspective_crop", {"grids": {"q": crops}}, inputs={"q": images}, outputs=outputs)


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_masked_softmax_in_any_type(check, dtype):
    scores, policy = torch.randn(3, 2, 5, 5).to(dtype), (torch.rand(3, 5, 1) > 0.5).to(dtype)
    visible = torch.maximum(policy.float()[:, None, None, :, 0], torch.eye(5))
    weights = (scores.float() - scores.float().amax(-1, keepdim=True)).exp() * visible
    wanted = (weights + 1e-6 / 5) / (weights.sum(-1, keepdim=True) + 1e-6)
    inputs = {"scores": scores, "policy": policy}
    tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
    check("dynamic-llava", "masked_softmax", {"eps": None}, tolerance, inputs=inputs, outputs={"probs": wanted})


def test_keep_rate_penalty_with_short_and_empty_answers(check):
    config = {"vision_keep_rate": 0.35, "output_text_keep_rate": 0.4, "instruct_keep_rate": 0.6}
    config |= {"output_text_len_for_training": 3, "instruct_len_for_training": 2, "mask_loss_weight": 7.0}
    masks = {"image_masks": [[1, 0, 0], [1, 1, 1, 1]], "answer_masks": [[1, 0, 1], [1, 0], []]}
    masks |= {"instruct_masks": [[0], [1, 0]]}
    image = ((0.35 - 1 / 3) ** 2 + (0.35 - 1) ** 2) / 2
    penalty = 7 * (image + (0.4 - 2 / 3) ** 2 / 3 + (0.6 - 1 / 2) ** 2 / 2)
    check("dynamic-llava", "keep_rate_regulariser", config, inputs=masks, outputs={"penalty": penalty})


@pytest.mark.parametrize(
    ("system", "component", "texts"), [("llava-mini", "pope_metrics", "texts"), ("llava-uhd", "metric_pope", "answers")]
)
def test_pope_of_odd_answers(check, system, component, texts):
    answers = ["", "Yes", "no.", "No, it is not", "NO", "nothing. no", "Yes\nno", "not,", "  no", "yes no"]
    says_no = [False, False, True, True, False, False, False, True, True, True]
    labels = ["yes", "yes", "no", "no", "yes", "no", "maybe", "no", "no", "yes"]
    pairs = [(not no, label != "no") for no, label in zip(says_no, labels, strict=True)]
    counts = {"TP": (True, True), "FP": (True, False), "TN": (False, False), "FN": (False, True)}
    found: dict[str, float] = {name: pairs.count(pair) for name, pair in counts.items()}
    precision, recall = found["TP"] / (found["TP"] + found["FP"]), found["TP"] / (found["TP"] + found["FN"])
    found |= {"Accuracy": (found["TP"] + found["TN"]) / 10, "Precision": precision, "Recall": recall}
    found |= {"F1 score": 2 * precision * recall / (precision + recall), "Yes ratio": says_no.count(False) / 10}
    check(system, component, {}, inputs={texts: answers, "labels": labels}, outputs=found)


# LLaVA-OneVision


def test_a_sample_with_an_empty_reply_closes_it():
    sample = get_template("qwen_1_5").render(turns_to_messages([(0, "Q"), (1, "")]), training=True)[0]
    assert sample.endswith("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n")
    prompt = get_template("qwen_1_5").render(turns_to_messages([(0, "Q"), (1, "")]))[0]
    assert prompt.endswith("<|im_start|>assistant\n")


def test_an_image_too_thin_for_every_canvas_gets_the_smallest(check):
    queries = [{"size": [1, 10000], "possible": [[768, 384], [384, 384]]}]
    check("llava-onevision", "select_best_resolution", {}, inputs={"queries": queries}, outputs={"best": [[384, 384]]})


def test_a_stacked_video_is_so_many_images(check):
    config = {
        "side": 2,
        "tower_image_size": 384,
        "model_config": {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "pad"},
    }
    request = {"input_ids": [[-200]], "views": {"stacked": 1}, "image_sizes": [[9, 9]], "modalities": ["video"]}
    rows = torch.tensor([[1.0, 0, row, col] for row in range(2) for col in range(2)])
    check("llava-onevision", "token_layout", config, inputs={"video": request}, outputs={"video": rows[None]})


# LLaVA-Mini


def test_a_whole_dialogue_ends_with_the_header_of_the_tokenizers_template(check):
    golden = Path(__file__).parent / "golden" / "llava-mini" / "prompts"
    inputs = json.loads((golden / "inputs.json").read_text())
    opened = json.loads((golden / "outputs.json").read_text())["prompts"][0]
    header, end = "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"
    tokens = {token["content"]: token["id"] for token in inputs["tokenizer_json"]["added_tokens"]}
    place = len(opened["input_ids"]) - 1 - opened["input_ids"][::-1].index(tokens["<|start_header_id|>"])
    letter = inputs["tokenizer_json"]["model"]["vocab"]["B"]
    dialogue = {"template": opened["template"], "messages": [opened["messages"][0], "B"]}
    ids = [*opened["input_ids"], letter, tokens[end], *opened["input_ids"][place:]]
    found = {**dialogue, "prompt": f"{opened['prompt']}B{end}{header}", "input_ids": ids}
    asked = inputs | {"conversations": [dialogue]}
    check("llava-mini", "prompt_strings", {}, inputs=asked, outputs={"prompts": [found]})


# LLaVA-UHD


def test_positions_of_a_square_view_of_another_size_are_resized(check):
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"image_size": 8, "patch_size": 4}
    weights = CLIPVisionModel(CLIPVisionConfig(**config)).state_dict()
    name = next(name for name in weights if name.endswith("position_embedding.weight"))
    table = weights[name]
    grid = table[1:].T.reshape(1, 8, 2, 2)
    larger = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic").flatten(2)[0].T
    outputs = {"view_pos": torch.cat([table[:1], larger])[None]}
    kept = {key: tensor for key, tensor in weights.items() if tensor.is_floating_point()}
    inputs = {"view": torch.zeros(1, 3, 16, 16)}
    check("llava-uhd", "clip_native_aspect", config, inputs=inputs, weights=kept, outputs=outputs)


# Keys of config.json


@pytest.mark.parametrize(("key", "said"), [("mm_projector_lr", ""), ("mm_vision_magic", "is not understood")])
def test_a_case_may_hold_what_a_checkpoint_may_hold(key, said):
    given = Given(Path(__file__).parent / "golden" / "llava-uhd" / "end_to_end")
    files = {"case.json": with_setting(given.meta, ("llama", key), 0.001)}
    found = against_expected(given, files)
    assert said in found
    assert bool(said) == bool(found)


def test_groups_of_a_frozen_part_are_empty(check):
    meta = json.loads((Path(__file__).parent / "golden" / "llava-onevision" / "param_groups" / "case.json").read_text())
    run = {"mm_tunable_parts": "mm_mlp_adapter", "learning_rate": 0.1, "weight_decay": 0.2, "mm_projector_lr": 0.3}
    names = [[f"model.mm_projector.{layer}.{kind}" for layer in (0, 2)] for kind in ("weight", "bias")]
    groups = [(0.1, 0.2, []), (0.1, 0.0, []), (0.3, 0.2, names[0]), (0.3, 0.0, names[1])]
    wanted = [{"lr": rate, "weight_decay": decay, "params": params} for rate, decay, params in groups]
    check("llava-onevision", "param_groups", meta["config"], inputs={"run": run}, outputs={"run": wanted})
    with pytest.raises(AssertionError):  # none may be left out to suit what is expected
        check("llava-onevision", "param_groups", meta["config"], inputs={"run": run}, outputs={"run": wanted[2:]})
