"""Robust CLIP: golden figures, attacks and their properties, robust training, the published files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_training
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.encoders import encoder_options, read_encoder, read_projection
from llavakit.checkpoints.opening import open_checkpoint
from llavakit.data.preparation import prepare
from llavakit.errors import CheckpointError, RecipeError, UserError
from llavakit.phantom.write import write_world
from llavakit.proof.golden import find_cases, run_case
from llavakit.robustness.apgd import Judged, apgd, windows
from llavakit.robustness.autoattack import AutoAttack, autoattack
from llavakit.robustness.balls import check_eps
from llavakit.robustness.classify import open_encoder
from llavakit.robustness.embedding import Embedder
from llavakit.robustness.losses import squared_distance, targeted_dlr, unit
from llavakit.robustness.pgd import pgd, uniform_start
from llavakit.robustness.zero_shot import accuracy_among
from llavakit.system import get_system
from llavakit.systems.robust_clip.cost import cost, tower
from llavakit.training.objectives.adversarial import FARE
from llavakit.training.recipe import load_recipe, parse_recipe
from llavakit.training.run import train
from llavakit.training.scaling import scale

QUIET = Console(quiet=True)
GOLDEN = Path(__file__).parent / "golden" / "robust-clip"


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 6)).requires_grad_(False)


def loss_of(network, labels):
    def judge(points, rows):
        logits = network(points)
        loss = nn.functional.cross_entropy(logits, labels[rows], reduction="none")
        return Judged(loss, logits.argmax(-1) != labels[rows])

    return judge


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_stay_in_the_ball_and_get_better_with_more_steps(network, norm):
    clean = torch.rand(5, 3, 4, 4)
    judge = loss_of(network, network(clean).argmax(-1))
    eps, before = (8 / 255 if norm == "linf" else 0.3), -torch.inf
    for steps in (0, 1, 5, 20):
        found = apgd(judge, clean, eps=eps, steps=steps, norm=norm)
        for points in (found.best, found.last, found.broken_at):
            moved = (points - clean).flatten(1)
            reach = moved.abs().amax(-1) if norm == "linf" else moved.norm(dim=-1)
            assert reach.max() <= eps + 1e-6
            assert points.min() >= 0
            assert points.max() <= 1
        assert (found.best_loss >= judge(clean, torch.arange(5)).loss - 1e-6).all()
        if steps in (0, 20):
            assert found.best_loss.mean() >= before
            before = found.best_loss.mean()
    assert found.best_loss.mean() > judge(clean, torch.arange(5)).loss.mean()


def test_a_picture_is_attacked_alike_alone_and_in_a_batch_that_others_leave(network):
    torch.manual_seed(1)
    clean = torch.rand(6, 3, 4, 4)
    labels = network(clean).argmax(-1)
    together = apgd(loss_of(network, labels), clean, eps=16 / 255, steps=30, leave=True)
    assert together.broken.any()
    assert not together.broken.all()
    for number in range(6):
        one = slice(number, number + 1)
        alone = apgd(loss_of(network, labels[one]), clean[one], eps=16 / 255, steps=30, leave=True)
        assert torch.equal(alone.broken, together.broken[one])
        assert torch.allclose(alone.best, together.best[one], atol=1e-6)
        assert alone.steps == together.steps[one]
    assert together.steps[together.broken].max() < 31 <= together.steps[~together.broken].min() + 1


def test_pgd_without_a_radius_changes_nothing():
    clean = torch.rand(2, 3, 4, 4)
    assert torch.equal(pgd(lambda x: x.square().sum(), clean, eps=0.0, step=0.1, steps=3), clean)


def test_pgd_takes_a_gradient_that_is_not_a_number_for_zero():
    clean = torch.full((1, 1, 1, 2), 0.5)

    def loss(pixels):
        return pixels[..., 0].sum() + (pixels[..., 1] - 0.5).sqrt().mul(0).sum()  # inf times 0

    moved = pgd(loss, clean, eps=0.1, step=0.1, steps=1)
    torch.testing.assert_close(moved, torch.tensor([[[[0.6, 0.5]]]]))


def test_the_last_point_is_the_last_one_judged():
    def judge(points, rows):
        return Judged(-(points - 0.5).abs().flatten(1).sum(-1))

    found = apgd(judge, torch.full((1, 1, 1, 1), 0.4), eps=0.3, steps=1, first_step=2.0)
    assert found.best.item() == pytest.approx(0.4)  # where the window's end leads back to
    assert found.last.item() == pytest.approx(0.7)


def test_equally_likely_classes_are_told_apart_as_among_five():
    logits = torch.zeros(1, 40)
    first = logits.topk(5).indices[:, 0]
    assert accuracy_among(logits, first, 1) == 1.0
    assert accuracy_among(logits[:, :4], logits[:, :4].topk(1).indices[:, 0], 1) == 1.0


def test_windows_shrink_to_six_percent():
    found = list(windows(100))
    assert [length for _, length in found] == [22, 19, 16, 13, 10, 7, 6, 6]
    assert [end for end, _ in found][:2] == [21, 40]
    assert list(windows(1)) == [(0, 1)]


@pytest.mark.parametrize(
    ("eps", "said"), [(4, "did you mean 4/255"), (0, "above 0"), (1.5, "1.5/255"), (-1, "above 0"), (True, "above 0")]
)
def test_a_radius_is_in_pixels_of_0_to_1(eps, said):
    with pytest.raises(UserError, match=said):
        check_eps(eps)


def test_few_classes_have_no_targeted_loss(network):
    three = nn.Sequential(*network[:3], nn.Linear(24, 3)).requires_grad_(False)
    clean = torch.rand(4, 3, 4, 4)
    found = autoattack(three, clean, three(clean).argmax(-1), AutoAttack(eps=1 / 255, steps=3))
    assert found.attacks == ("apgd-ce",)
    with pytest.raises(UserError, match="needs at least 4 classes"):
        targeted_dlr(torch.rand(2, 3), torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert AutoAttack(eps=0.1).targets(6) == 5
    assert AutoAttack(eps=0.1).targets(1000) == 9
    with pytest.raises(UserError, match="did you mean 'apgd-ce'"):
        AutoAttack(eps=0.1, attacks=("apgd-c",))


def test_going_on_after_a_success_fools_the_same_pictures(network):
    torch.manual_seed(2)
    clean = torch.rand(20, 3, 4, 4)
    labels = network(clean).argmax(-1)
    settings = [AutoAttack(eps=6 / 255, steps=10, leave=leave, batch=7) for leave in (True, False)]
    quick, published = (autoattack(network, clean, labels, one) for one in settings)
    assert torch.equal(quick.robust, published.robust)
    assert 0 < quick.robust.sum() < 20
    assert torch.equal(quick.predictions == labels, quick.robust)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=12, hidden_act="quick_gelu")
    return CLIPVisionModelWithProjection(config).eval()


def test_the_class_token_alone_gives_the_whole_embedding(encoder):
    pixels = torch.rand(3, 3, 8, 8)
    embed = Embedder(encoder)
    whole = embed(pixels, encoder)
    assert torch.allclose(embed(pixels), whole, atol=1e-5)
    assert torch.allclose(Embedder(encoder, normalise=True)(pixels), unit(whole), atol=1e-5)
    assert embed.width() == 12
    at = [pixels.clone().requires_grad_() for _ in range(2)]
    embed(at[0]).square().sum().backward()
    embed(at[1], encoder).square().sum().backward()
    assert at[0].grad.abs().min() > 0
    assert torch.allclose(at[0].grad, at[1].grad, atol=1e-4)


def test_a_small_distance_keeps_every_cosine(encoder):
    first, second = Embedder(encoder)(torch.rand(2, 3, 8, 8))
    bound = min(2 / first.norm(), 2 / second.norm()) * (first - second).norm()
    texts = unit(torch.randn(100, 12))
    assert ((texts @ unit(first) - texts @ unit(second)).abs() <= bound + 1e-6).all()


# published files


def test_the_recipes_name_the_published_encoder(tmp_path):
    for file in ("recipe.yaml", "tecoa.yaml"):
        recipe = load_recipe(get_system("robust-clip").recipe.with_name(file))
        stage = recipe.stages[0]
        assert (stage.max_steps, stage.batch_size, stage.warmup, stage.learning_rate) == (20_000, 128, 1400, 1e-5)
        assert (stage.objective.eps, stage.objective.steps, stage.objective.step) == (4 / 255, 10, 1 / 255)
        assert stage.objective.normalise == (file == "tecoa.yaml")
        objective = FARE(stage)
        own = recipe.model_copy(update={"parts": recipe.parts.model_copy(update={"init": {}})})
        config, _ = objective.describe(own)
        objective.jointly, config.projection_dim = True, 768  # as the encoder's own files say
        module = objective.skeleton(config)
        assert sum(parameter.numel() for parameter in module.parameters()) == 303_966_208
    assert tower(224) == (162_025_537_536, 303_966_208)
    assert tower(336) == (381_919_789_056, 304_293_888)
    assert any(row.value == 25 for row in cost().rows)


def raw_names(layers: int, width: int, patch: int, side: int, joint: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' raw files."""
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": ((side // patch) ** 2 + 1, width),
        "proj": (width, joint),
        "conv1.weight": (width, 3, patch, patch),
    }
    shapes |= {f"ln_{where}.{kind}": (width,) for where in ("pre", "post") for kind in ("weight", "bias")}
    for number in range(layers):
        block = f"transformer.resblocks.{number}."
        shapes |= {f"{block}ln_{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        for name, out, inner in (("attn.out_proj", 1, 1), ("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4)):
            shapes |= {f"{block}{name}.weight": (out * width, inner * width), f"{block}{name}.bias": (out * width,)}
    return shapes


def test_the_names_hold_as_many_numbers_as_published():
    assert sum(torch.Size(shape).numel() for shape in raw_names(24, 1024, 14, 224, 768).values()) == 303_966_208


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_raw_file_becomes_a_folder_and_comes_back(tmp_path, wrapped):
    torch.manual_seed(0)
    state = {name: torch.randn(shape) * 0.1 for name, shape in raw_names(3, 64, 4, 16, 24).items()}
    torch.save({"vision_encoder_state_dict": state} if wrapped else state, tmp_path / "fare_eps_4.pt")
    counts = prepare("robust_encoder", tmp_path / "fare_eps_4.pt", tmp_path / "encoder")
    assert counts["parameters"] == sum(tensor.numel() for tensor in state.values())
    options = encoder_options(tmp_path / "encoder")
    assert (options["hidden_act"], options["image_size"], options["num_attention_heads"]) == ("quick_gelu", 16, 1)
    assert torch.equal(read_projection(tmp_path / "encoder"), state["proj"].T)
    assert "post_layernorm.weight" in read_encoder(tmp_path / "encoder")
    assert Embedder(open_encoder(tmp_path / "encoder"))(torch.rand(2, 3, 16, 16)).shape == (2, 24)
    prepare("open_clip_encoder", tmp_path / "encoder", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_pixels_beyond_the_last_whole_patch_are_left_over(tmp_path):
    torch.manual_seed(0)
    state = {f"visual.{name}": torch.randn(shape) * 0.1 for name, shape in raw_names(2, 64, 4, 16, 24).items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": 18, "patch_size": 4, "width": 64, "layers": 2}
    config = {"model_cfg": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert encoder_options(tmp_path)["image_size"] == 18
    pixels = torch.rand(1, 3, 18, 18)
    other = pixels.clone()
    other[..., 16:, :] = other[..., 16:] = 0
    embed = Embedder(open_encoder(tmp_path))
    assert torch.equal(embed(pixels), embed(other))


# training


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_world("scene", folder, n=12, seed=0, size=32)
    names = [record["image"] for record in json.loads((folder / "train.json").read_text()) if "image" in record]
    rows = [{"image": name, "label": number % 3} for number, name in enumerate(dict.fromkeys(names))]
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def small(pictures, output, file="recipe.yaml", objective=None, **stage):
    """A published recipe made small, on the phantom world."""
    recipe = load_recipe(get_system("robust-clip").recipe.with_name(file))
    steps = {"max_steps": 4, "batch_size": 4, "workers": 0, "log_steps": 1, "warmup": 2, "save_steps": None}
    raw = scale(recipe, patch_size=8, image_size=16, vision_hidden=24, stages=steps | stage).model_dump()
    raw["data"] = [{"path": str(pictures / "pictures.jsonl"), "images": str(pictures)}]
    raw["stages"][0]["objective"] |= {"steps": 2} | (objective or {})
    return parse_recipe(raw | {"output": str(output)})


def test_the_small_recipe_trains_and_its_encoder_is_swapped_into_a_finished_model(pictures, tmp_path):
    result = train(small(pictures, tmp_path / "fare", learning_rate=1e-3), console=QUIET)
    log = result.stages[0].metrics["log"]
    assert all(entry["loss"] == pytest.approx(entry["loss_adversarial"], rel=1e-4) for entry in log)
    assert min(entry["loss"] for entry in log) > 0
    # the first step has the peak rate, the second two of two steps of the warm-up
    world = tiny_training.write_world(tmp_path / "world")
    raw = tiny_training.recipe(world, output=str(tmp_path / "llava"))
    raw["stages"] = raw["stages"][1:]
    finished = train(parse_recipe(raw), console=QUIET).final
    options = {"vision_tower": result.final, "exchange_vision_tower": True}
    convert(finished, tmp_path / "robust", to="llavakit", **options)
    before, after = load_file(finished / "model.safetensors"), load_file(tmp_path / "robust" / "model.safetensors")
    kept = [name for name in before if "vision_tower" not in name]
    assert len(kept) > 20
    assert all(torch.equal(before[name], after[name]) for name in kept)
    config = open_checkpoint(tmp_path / "robust").config
    assert (config.vision_config.image_size, config.media["image"]["views"]["size"]) == (16, 16)
    picture = world / "images" / "0.png"
    asked = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "what colour ?"}]
    assert isinstance(llavakit.load(tmp_path / "robust").chat([{"role": "user", "content": asked}]), str)


def test_a_tower_of_another_width_is_refused(pictures, tmp_path):
    world = tiny_training.write_world(tmp_path / "world")
    raw = tiny_training.recipe(world, output=str(tmp_path / "llava"))
    raw["stages"] = [raw["stages"][1] | {"max_steps": 1}]
    finished = train(parse_recipe(raw), console=QUIET).final
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=32, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
    ).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="features have 32 channels, the connector was trained for 24"):
        open_checkpoint(finished, vision_tower=tmp_path / "wide", exchange_vision_tower=True)


def test_tecoa_learns_classes_of_a_clip_encoder_with_its_projection(pictures, tmp_path, encoder):
    encoder.save_pretrained(tmp_path / "clip")
    save_file({"text": torch.randn(3, 12)}, tmp_path / "text.safetensors")
    recipe = small(
        pictures,
        tmp_path / "run",
        "tecoa.yaml",
        {"text": str(tmp_path / "text.safetensors"), "classes": None},
        learning_rate=1e-3,
    )
    raw = recipe.model_dump()
    raw["parts"] |= {"vision_config": None, "init": {"vision_tower": str(tmp_path / "clip")}}
    raw["parts"]["media"]["image"]["views"]["size"] = 8
    result = train(parse_recipe(raw), console=QUIET)
    saved = load_file(result.final / "model.safetensors")
    assert saved["visual_projection.weight"].shape == (12, 16)
    assert not torch.equal(saved["visual_projection.weight"], encoder.visual_projection.weight)
    assert Embedder(open_encoder(result.final))(torch.rand(1, 3, 8, 8)).shape == (1, 12)

    def failing(rows, said, **objective):
        own = json.loads(json.dumps(raw, default=str))
        own["stages"][0]["objective"] |= objective
        own |= {"output": str(tmp_path / "none")}
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            own["data"] = [{"path": str(tmp_path / "rows.jsonl"), "images": str(pictures)}]
        with pytest.raises(UserError, match=said) as caught:
            train(parse_recipe(own), console=QUIET)
        assert "\n" not in str(caught.value)

    image = json.loads((pictures / "pictures.jsonl").read_text().splitlines()[0])["image"]
    failing([{"image": image}], "rows.jsonl:1: label: must be the number or the name of a class, not None")
    failing([{"image": image, "label": -1}], "label: -1 is no class")
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    failing([{"image": image, "label": "cow"}], "'cow' is no class", classes=str(tmp_path / "names.txt"))
    failing(None, "objective.text: the loss 'ce' needs embeddings of the classes", text=None)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            {"type": "fare", "eps": 4},
            "eps: must be above 0 and at most 1, pixels of 0..1, not 4.0; did you mean 4/255?",
        ),
        ({"type": "fare", "stps": 4}, "objective.stps: unknown key; did you mean 'steps'?"),
        ({"type": "fare", "norm": "l1"}, "objective.norm: 'l1' is not possible"),
        ({"type": "fare", "step": "1/0"}, "objective.step"),
    ],
)
def test_options_of_a_robust_stage_are_checked(objective, said):
    stage = {"name": "a", "train": ["all"], "learning_rate": 1e-5, "objective": objective}
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"parts": {}, "data": ["x.json"], "stages": [stage]})
    assert said in str(caught.value)


def test_without_an_attack_the_loss_starts_at_zero(encoder):
    pixels = torch.rand(4, 3, 8, 8)
    embed = Embedder(encoder)
    wanted = embed(pixels).detach()
    value = squared_distance(embed(pixels), wanted).mean()
    assert value == 0
    (gradient,) = torch.autograd.grad(value, encoder.visual_projection.weight)
    assert gradient.abs().max() == 0
    start = uniform_start(pixels, 8 / 255)
    assert start.abs().max() <= 8 / 255
    attacked = pgd(
        lambda x: squared_distance(embed(x), wanted).mean(), pixels, eps=8 / 255, step=2 / 255, steps=5, start=start
    )
    assert squared_distance(embed(attacked), wanted).mean() > squared_distance(embed(pixels + start), wanted).mean()
