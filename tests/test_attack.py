"""`llavakit attack`: pixels to loss through real preprocessing, tasks, runs that go on, reports, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_training
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llavakit
from llavakit.cli.app import app, run
from llavakit.errors import UserError
from llavakit.generation.chat import Chat
from llavakit.media.source import MediaSize
from llavakit.registry import PLANNERS
from llavakit.robustness.model_attack import TextLoss
from llavakit.robustness.questions import AttackSettings, ModelAttack, whole_levels
from llavakit.robustness.run import attack_task
from llavakit.robustness.tasks import HARMLESS_TARGETS, caption_words, open_task, refuses
from llavakit.system import systems
from llavakit.training.recipe import parse_recipe
from llavakit.training.run import train
from llavakit.views.differentiable import PixelPicture, cut

QUIET = Console(quiet=True)
COLOURS = list(tiny_training.COLOURS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack")
    tiny_training.write_tokenizer(folder / "tokenizer")
    tiny_training.write_records(folder, count=200)
    raw = tiny_training.recipe(folder)
    raw["stages"] = [{**raw["stages"][1], "train": ["all"], "max_steps": 160, "batch_size": 12, "learning_rate": 3e-3}]
    train(parse_recipe(raw), console=QUIET)
    rng, rows = np.random.default_rng(5), []
    for number in range(5):
        colour, shape = COLOURS[number % 4], (24, 24) if number % 2 else (30, 40)
        pixels = np.full((*shape, 3), tiny_training.COLOURS[colour]) + rng.integers(0, 12, (*shape, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"t{number}.png")
        rows.append({"question_id": number, "image": f"t{number}.png", "text": "what colour is the square ?"})
        rows[-1]["answer"] = f"the square is {colour}"
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    captions = [{**row, "answers": [row["answer"], f"{row['answer']} here", "a square there"]} for row in rows]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    return folder


@pytest.fixture(scope="module")
def chat(world):
    return llavakit.load(world / "run" / "final")


# from pixels to encoder inputs


def noisy(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels_of(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


VIEWS = [
    {"type": "square", "size": 28},
    {"type": "pad", "size": 28},
    {"type": "pad", "size": 28, "resample": "nearest"},
    {"type": "pad", "size": 28, "resample": "lanczos"},
    {"type": "squash", "size": 28, "resample": "bilinear"},
    {"type": "anyres", "size": 28, "pinpoints": "(1x1),...,(3x3)"},
    {"type": "native_slices"},
    {"type": "dual_perspective", "size": 28},
    {"type": "low_and_high", "size": 56, "low_size": 28},
    {"type": "grid_and_whole", "view": {"type": "pad", "size": 28}},
    {"type": "float_square", "size": 28, "pad": True},
]


@pytest.mark.parametrize("options", VIEWS, ids=lambda options: options["type"])
@pytest.mark.parametrize("size", [(120, 90), (50, 130), (64, 64)])
def test_differentiable_views_are_those_of_the_planner(options, size):
    systems()
    planner, picture = PLANNERS.build(dict(options)), noisy(*size)
    plan = planner.plan(MediaSize(1, size[1], size[0]))
    at = pixels_of(picture)[None].requires_grad_()
    views = cut(planner, plan, at)
    for ours, real in zip(views, planner.cut(picture, plan), strict=True):
        grey = (ours.detach() - torch.as_tensor(np.asarray(real))).abs() * 0.26 * 255
        assert grey.max() < 2
        assert grey.mean() < 0.5
    (gradient,) = torch.autograd.grad(sum(view.sum() for view in views), at)
    assert gradient.abs().sum() > 0
    if options.get("resample") != "nearest" and options["type"] not in ("square", "float_square"):
        assert (gradient != 0).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["frames", "clip"])
def test_frames_are_differentiable(kind):
    systems()
    frame = {"type": "pad" if kind == "frames" else "float_square", "size": 28}
    planner, pictures = PLANNERS.build({"type": kind, "frame": frame}), [noisy(60, 40) for _ in range(4)]
    plan = planner.plan(MediaSize(4, 40, 60))
    at = torch.stack([pixels_of(picture) for picture in pictures]).requires_grad_()
    views = cut(planner, plan, at)
    for ours, real in zip(views, planner.cut(pictures, plan), strict=True):
        assert (ours.detach() - torch.as_tensor(np.asarray(real))).abs().max() * 66 < 2
    (gradient,) = torch.autograd.grad(sum(view.square().sum() for view in views), at)
    assert (gradient.abs().flatten(1).sum(1) > 0).all()


def test_views_that_have_no_gradient_say_so_in_one_line():
    systems()
    planner = PLANNERS.build({"type": "volume_slices"})
    plan = planner.plan(MediaSize(2, 8, 8))
    with pytest.raises(UserError, match="not differentiable from pixels; attack the encoder's inputs"):
        cut(planner, plan, torch.rand(2, 3, 8, 8))


def test_pasting_and_cropping_leave_the_picture_as_pillow_does():
    picture = noisy(20, 10)
    ours, theirs = PixelPicture(pixels_of(picture) * 255), picture
    box = (-3, -2, 15, 14)
    assert torch.equal(ours.crop(box).values / 255, pixels_of(theirs.crop(box)))
    sheet, other = ours.canvas((12, 12), (1, 2, 3)), Image.new("RGB", (12, 12), (1, 2, 3))
    for canvas, inner in ((sheet, ours), (other, theirs)):
        canvas.paste(inner, (-4, 5))
    assert torch.equal(sheet.values / 255, pixels_of(other))


# from encoder inputs to the loss


def test_states_in_front_of_pictures_are_reused_without_a_difference(chat, world):
    questions = list(open_task("exact_match", world / "questions.jsonl").questions.values())
    attack = ModelAttack(chat, AttackSettings())
    rows = [attack.row(question, "the square is red") for question in questions[:2]]
    clean = [row.clean for row in rows]
    losses, gradients = [], []
    for reuse in (True, False):
        loss = TextLoss(
            chat.model, [row.sample for row in rows], lambda pixels, n: attack.views(rows[n], pixels), reuse=reuse
        )
        assert (loss.begin > 5) == reuse
        at = [pixels.clone().requires_grad_() for pixels in clean]
        value = loss(at)
        value.sum().backward()
        losses.append(value.detach())
        gradients.append(torch.cat([pixels.grad.flatten() for pixels in at]))
    assert torch.allclose(losses[0], losses[1], atol=1e-5)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)
    assert gradients[0].abs().sum() > 0


def test_pictures_of_several_sizes_are_attacked_together_as_alone(chat, world):
    questions = list(open_task("exact_match", world / "questions.jsonl").questions.values())[:3]
    attack = ModelAttack(chat, AttackSettings(eps=64 / 255, steps=6))
    rows = [attack.row(question, "the square is red") for question in questions]
    assert len({row.clean.shape for row in rows}) == 2
    together = attack.attack(rows, towards=False)
    for row, (pixels, figures) in zip(rows, together, strict=True):
        ((alone, own),) = attack.attack([row], towards=False)
        assert pixels.shape == row.clean.shape
        assert (pixels - alone).abs().mean() < 1 / 255
        assert figures["loss"] == pytest.approx(own["loss"], abs=1e-4)
        assert figures["loss"] >= figures["loss_start"]
        assert figures["largest_change"] <= 64


def test_rounding_to_grey_levels_stays_in_the_ball():
    clean = (torch.rand(1, 3, 4, 4) * 255).round() / 255
    point = clean + 2.5 / 255 * torch.sign(torch.randn(1, 3, 4, 4))
    rounded = whole_levels(point.clamp(0, 1), clean, 2.5 / 255)
    assert ((rounded - clean).abs() * 255).max() < 2.001
    assert torch.allclose(rounded * 255, (rounded * 255).round(), atol=1e-4)


# whole runs


def test_an_untargeted_run_lowers_the_score_and_goes_on_after_a_kill(chat, world, tmp_path, monkeypatch):
    task = open_task("captions", world / "captions.jsonl")
    settings = AttackSettings(eps=120 / 255, steps=8)
    result = attack_task(chat, task, tmp_path / "whole", settings, console=QUIET, batch_size=2)
    assert result["clean"]["mean"] > result["attacked"]["mean"]
    assert result["after_stage"][0] == pytest.approx(result["clean"]["mean"], abs=1e-3)
    assert result["after_stage"][-1] == pytest.approx(result["attacked"]["mean"], abs=1e-3)
    assert "in torch.float32, published in half precision" in result["notes"][0]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "answers.jsonl").read_text().splitlines()]
    assert max(line.get("largest_change", 0) for line in lines) == pytest.approx(120, abs=1e-3)
    attacked = next(line for line in lines if "picture" in line)
    stored = tmp_path / "whole" / "pictures" / attacked["picture"]
    pixels = load_file(next((tmp_path / "whole" / "pictures").glob(f"{stored.stem[:-2]}.safetensors")))
    height, width = pixels["pixels"].shape[-2:]
    assert torch.allclose(pixels_of(Image.open(stored)), pixels["pixels"][0, :, :height, :width], atol=1e-6)
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "difference x" in page
    assert "http" not in page.replace("http-equiv", "")

    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    attack = ModelAttack.attack
    calls = []

    def some(self, *args, **kwargs):
        calls.append(1)
        return attack(self, *args, **kwargs) if len(calls) < 3 else stop(self)

    monkeypatch.setattr(ModelAttack, "attack", some)
    with pytest.raises(KeyboardInterrupt):
        attack_task(chat, task, tmp_path / "cut", settings, console=QUIET, batch_size=2)
    with (tmp_path / "cut" / "answers.jsonl").open("a") as file:
        file.write('{"question_id": "4", "sta')  # a line that the kill cut short
    monkeypatch.setattr(ModelAttack, "attack", attack)
    again = attack_task(chat, task, tmp_path / "cut", settings, console=QUIET, batch_size=2)
    assert again["attacked"] == result["attacked"]
    rest = [json.loads(line) for line in (tmp_path / "cut" / "answers.jsonl").read_text().splitlines()]
    assert sorted(line["question_id"] + str(line["stage"]) for line in rest) == sorted(
        line["question_id"] + str(line["stage"]) for line in lines
    )
    with pytest.raises(UserError, match="holds a run with another eps; name another folder with --output"):
        attack_task(chat, task, tmp_path / "cut", AttackSettings(eps=0.1, steps=8), console=QUIET)


def test_a_targeted_run_leads_answers_to_the_target(chat, world, tmp_path):
    task = open_task("captions", world / "captions.jsonl", needs_references=False)
    settings = AttackSettings(eps=160 / 255, steps=40, targets=("the square is white",))
    result = attack_task(chat, task, tmp_path, settings, console=QUIET)
    assert result["unit"] == "answers that say the target, %"
    assert result["attacked"]["mean"] > result["clean"]["mean"]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert all(line["target"] == "the square is white" for line in lines if line["stage"] == 1)
    assert min(line["gradients"] for line in lines if line["stage"] == 1) < 40  # one that is sure leaves


def test_encoder_inputs_are_attacked_as_published(chat, world, tmp_path):
    task = open_task("exact_match", world / "questions.jsonl")
    settings = AttackSettings(eps=120 / 255, steps=10, at="views")
    result = attack_task(chat, task, tmp_path, settings, console=QUIET)
    assert result["attacked"]["mean"] < result["clean"]["mean"] == 100
    (stored, *_) = sorted((tmp_path / "pictures").glob("*stage1.safetensors"))
    moved = load_file(stored)
    assert moved["pixels"].shape[-2:] == (24, 24)
    assert (moved["pixels"] - moved["clean"]).abs().max() * 255 == pytest.approx(120, abs=1e-3)


def test_a_jailbreak_set_of_the_user_counts_refusals(chat, world, tmp_path):
    rows = [{"question_id": n, "image": f"t{n}.png", "text": "what colour ?"} for n in range(2)]
    rows[1]["target"] = "the square is blue"
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = open_task("jailbreak", tmp_path / "set.jsonl", images=world, needs_references=False)
    assert list(task.targets.values()) == [HARMLESS_TARGETS[0], "the square is blue"]
    result = attack_task(chat, task, tmp_path / "run", AttackSettings(eps=0.3, steps=4), console=QUIET)
    assert result["not_refused"]["clean"]["mean"] == 100
    assert refuses("I\u2019m sorry, but that is private.")
    assert not refuses("the square is blue")


def test_captions_are_counted_without_marks():
    assert caption_words("A dog's ball, on (grass)...") == "a dog s ball on grass"


def test_the_command_prints_both_scores(world, tmp_path):
    options = ["--task", "exact_match", "--questions", str(world / "questions.jsonl"), "--steps", "3", "--limit", "2"]
    model = str(world / "run" / "final")
    found = CliRunner().invoke(app, ["attack", model, *options, "--output", str(tmp_path / "run"), "--json"])
    result = json.loads(found.stdout)
    assert result["pictures"] == 2
    assert result["eps"] == "4/255"
    assert set(result["clean"]) == {"mean", "interval"}


# bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--eps", "4"], "eps: must be above 0 and at most 1, pixels of 0..1, not 4.0; did you mean 4/255?"),
        (["--eps", "0"], "eps: must be above 0"),
        (["--eps", "x"], "eps: must be a number or a fraction as 4/255"),
        (["--task", "poep"], "--task: unknown task 'poep'; did you mean 'pope'?"),
        (["--target", " "], "--target: is empty"),
        (["--target", "red " * 400], "shorten the target"),
        (["--task", "vqav2"], "give --gold"),
    ],
)
def test_a_mistake_is_one_line(world, tmp_path, capsys, options, said):
    given = {"--task": "exact_match", "--questions": str(world / "questions.jsonl"), "--output": str(tmp_path / "run")}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    arguments = [part for pair in given.items() for part in pair]
    assert run(["attack", str(world / "run" / "final"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_questions_without_answers_or_pictures_are_refused(world, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "image": "t0.png", "text": "what ?"}\n')
    with pytest.raises(UserError, match="has no answer, which an untargeted attack leads away from"):
        open_task("exact_match", tmp_path / "q.jsonl", images=world)
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "what ?", "answer": "red"}\n')
    with pytest.raises(UserError, match="has no picture"):
        open_task("exact_match", tmp_path / "q.jsonl")


def test_only_models_whose_weights_are_here_are_attacked(chat):
    class Service:
        name = "http://host/v1#model"

    with pytest.raises(UserError, match="attacks need a model whose weights are here"):
        ModelAttack(Service(), AttackSettings())
    assert isinstance(chat, Chat)


def test_zero_shot_accuracy_under_autoattack(tmp_path, world):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from llavakit.robustness.classify import attack_classifier

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=8)
    ).save_pretrained(tmp_path / "encoder")
    save_file({"text": torch.randn(4, 8)}, tmp_path / "text.safetensors")
    rows = [{"image": f"t{n}.png", "label": n % 4} for n in range(5)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"text": str(tmp_path / "text.safetensors"), "images": world, "eps": 8 / 255, "steps": 3}
    result = attack_classifier(tmp_path / "encoder", tmp_path / "labels.jsonl", tmp_path / "run", **options)
    assert result["attacks"] == ["apgd-ce", "apgd-t"]
    assert result["attacked"]["mean"] <= result["clean"]["mean"]
    save_file({"text": torch.randn(4, 9)}, tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="embeddings of 9 numbers, the encoder's have 8"):
        attack_classifier(tmp_path / "encoder", tmp_path / "labels.jsonl", tmp_path / "run", **options)
    (tmp_path / "labels.jsonl").write_text('{"image": "t0.png"}\n')
    save_file({"text": torch.randn(4, 8)}, tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="label"):
        attack_classifier(tmp_path / "encoder", tmp_path / "labels.jsonl", tmp_path / "run", **options)
