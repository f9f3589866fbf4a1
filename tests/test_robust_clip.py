"""Robust CLIP: golden figures, attacks and their properties, robust training, the published files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from llavakit.errors import UserError
from llavakit.proof.golden import find_cases, run_case
from llavakit.robustness.apgd import Judged, apgd, windows
from llavakit.robustness.autoattack import AutoAttack, autoattack
from llavakit.robustness.balls import check_eps
from llavakit.robustness.embedding import Embedder
from llavakit.robustness.losses import targeted_dlr, unit
from llavakit.robustness.pgd import pgd

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
