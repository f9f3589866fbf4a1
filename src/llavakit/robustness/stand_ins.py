"""A small world and small encoders to compare with: CLIP-like, and what FARE and TeCoA make of it.

A picture is one of four shapes in one of six colours in one of four quadrants of grey noise. The text side embeds
triples of these attributes, each left out in a quarter of the texts. Everything comes from a seed in seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from llavakit.robustness.embedding import Embedder
from llavakit.robustness.losses import class_loss, squared_distance, unit
from llavakit.robustness.pgd import pgd, uniform_start

SIDE, PATCH = 24, 6
SHAPES = ("square", "disc", "triangle", "cross")
COLOURS = {
    "red": (0.85, 0.2, 0.2),
    "green": (0.2, 0.75, 0.25),
    "blue": (0.2, 0.3, 0.85),
    "yellow": (0.85, 0.8, 0.2),
    "purple": (0.65, 0.25, 0.75),
    "white": (0.9, 0.9, 0.9),
}
QUADRANTS = 4
SIZES = (len(SHAPES), len(COLOURS), QUADRANTS)
LEFT_OUT = 0.25  # how often a text leaves an attribute out
EMBEDDING = 32


@dataclass
class Pictures:
    """A batch.

    Attributes:
        pixels: [pictures, 3, SIDE, SIDE] in 0..1.
        shape, colour, quadrant: [pictures].
    """

    pixels: Tensor
    shape: Tensor
    colour: Tensor
    quadrant: Tensor

    @property
    def attributes(self) -> Tensor:
        """[pictures, 3]."""
        return torch.stack([self.shape, self.colour, self.quadrant], dim=1)


def _masks() -> Tensor:
    """Where each shape is, on a quadrant [shapes, 12, 12]."""
    side = SIDE // 2
    line = torch.arange(side) - (side - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    square = (x.abs() < 4) & (y.abs() < 4)
    disc = x.square() + y.square() < 4.7**2
    triangle = (y < 4) & (y > -4.5) & (x.abs() < (y + 4.5) / 1.7)
    cross = ((x.abs() < 1.6) & (y.abs() < 5)) | ((y.abs() < 1.6) & (x.abs() < 5))
    return torch.stack([square, disc, triangle, cross]).float()


def draw(count: int, generator: torch.Generator) -> Pictures:
    """A batch of pictures."""
    shape, colour, quadrant = (torch.randint(size, (count,), generator=generator) for size in SIZES)
    pixels = 0.45 + 0.12 * torch.randn(count, 1, SIDE, SIDE, generator=generator).expand(-1, 3, -1, -1).clone()
    masks = _masks()[shape][:, None]
    paint = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None]
    half = SIDE // 2
    for place in range(QUADRANTS):
        rows, top, left = (quadrant == place).nonzero().flatten(), half * (place // 2), half * (place % 2)
        inner = pixels[rows, :, top : top + half, left : left + half]
        pixels[rows, :, top : top + half, left : left + half] = inner * (1 - masks[rows]) + paint[rows] * masks[rows]
    return Pictures(pixels.clamp(0, 1), shape, colour, quadrant)


def new_encoder(seed: int) -> CLIPVisionModelWithProjection:
    """An untrained encoder of three layers, 64 channels, 4 x 4 patches."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPVisionConfig(
        **sizes, image_size=SIDE, patch_size=PATCH, projection_dim=EMBEDDING, hidden_act="quick_gelu"
    )
    return CLIPVisionModelWithProjection(config)


class Texts(nn.Module):
    """Text embeddings of attribute triples; -1 stands for an attribute that is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(size, EMBEDDING) for size in SIZES])

    def forward(self, attributes: Tensor) -> Tensor:
        """Unit embeddings [texts, EMBEDDING]."""
        found = 0
        for place, table in enumerate(self.tables):
            own = attributes[:, place]
            found = found + table(own.clamp(min=0)) * (own >= 0)[:, None]
        return unit(found)

    def classes(self, place: int) -> Tensor:
        """Embeddings [EMBEDDING, values] of texts that name one attribute alone."""
        size = SIZES[place]
        attributes = torch.full((size, len(SIZES)), -1)
        attributes[:, place] = torch.arange(size)
        return self(attributes).detach().T


def train_clip(seed: int, steps: int = 300, batch: int = 96) -> tuple[CLIPVisionModelWithProjection, Texts]:
    """Encoder and texts by a contrastive loss in which every picture that a text is true of is a positive."""
    encoder = new_encoder(seed)
    texts, generator = Texts(), torch.Generator().manual_seed(1_000 + seed)
    embed = Embedder(encoder, normalise=True)
    parameters = [*encoder.parameters(), *texts.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        pictures = draw(batch, generator)
        said = pictures.attributes
        dropped = torch.rand(said.shape, generator=generator) < LEFT_OUT
        said = said.masked_fill(dropped, -1)
        logits = 14.0 * embed(pictures.pixels) @ texts(said).T
        true = ((said[None] == pictures.attributes[:, None]) | (said[None] < 0)).all(-1)
        rows = logits.log_softmax(1).masked_fill(~true, -torch.inf).logsumexp(1)
        columns = logits.log_softmax(0).masked_fill(~true, -torch.inf).logsumexp(0)
        loss = -(rows.mean() + columns.mean()) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return encoder.eval().requires_grad_(False), texts.requires_grad_(False)


def harden(
    encoder: CLIPVisionModelWithProjection,
    kind: str,
    seed: int,
    *,
    texts: Texts | None = None,
    steps: int = 110,
    batch: int = 64,
    eps: float = 5 / 255,
    inner: int = 5,
    rate: float = 1e-3,
) -> CLIPVisionModelWithProjection:
    """What FARE (no labels) or TeCoA (labels are shapes) make of an encoder; the same budget for both.

    Args:
        kind: "fare" or "tecoa".
        texts: For TeCoA.
    """
    own, generator = copy.deepcopy(encoder), torch.Generator().manual_seed(2_000 + seed)
    normalise = kind == "tecoa"
    original, embed = Embedder(encoder), Embedder(own, normalise=normalise)
    classes = texts.classes(0) if kind == "tecoa" and texts is not None else None
    optimiser = torch.optim.AdamW(own.requires_grad_(True).parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        pictures = draw(batch, generator)
        with torch.no_grad():
            wanted = original(pictures.pixels)

        def loss(points: Tensor, wanted: Tensor = wanted, pictures: Pictures = pictures) -> Tensor:
            found = embed(points)
            if classes is None:
                return squared_distance(found, wanted).mean()
            return class_loss(found, classes, pictures.shape, 14.0).mean()

        own.requires_grad_(False)
        start = uniform_start(pictures.pixels, eps, generator=generator)
        attacked = pgd(loss, pictures.pixels, eps=eps, step=eps / 3, steps=inner, start=start)
        own.requires_grad_(True)
        value = loss(attacked)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
    return own.eval().requires_grad_(False)


def patch_features(encoder: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    """What a LLaVA reads: patch tokens of the last but one layer [pictures, patches, channels]."""
    mean, std = Embedder(encoder).mean, Embedder(encoder).std
    states = encoder.vision_model((pixels - mean) / std, output_hidden_states=True).hidden_states
    return states[-2][:, 1:]


class Head(nn.Module):
    """Attention pooling and an MLP on patch tokens: stands for the connector and the language model."""

    def __init__(self, answers: int, width: int = 64) -> None:
        super().__init__()
        self.norm, self.score = nn.LayerNorm(width), nn.Linear(width, 4)
        self.mlp = nn.Sequential(nn.Linear(4 * width, 96), nn.GELU(), nn.Linear(96, answers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the answers [pictures, answers]."""
        tokens = self.norm(tokens)
        weights = self.score(tokens).softmax(1)
        return self.mlp((weights.transpose(1, 2) @ tokens).flatten(1))


def train_head(
    encoder: CLIPVisionModelWithProjection,
    place: int,
    seed: int,
    steps: int = 200,
    features: Callable[[CLIPVisionModelWithProjection, Tensor], Tensor] = patch_features,
) -> Head:
    """A head that answers for one attribute on top of the frozen encoder."""
    torch.manual_seed(3_000 + seed)
    head, generator = Head(SIZES[place]), torch.Generator().manual_seed(4_000 + seed + place)
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        pictures = draw(64, generator)
        with torch.no_grad():
            tokens = features(encoder, pictures.pixels)
        loss = F.cross_entropy(head(tokens), pictures.attributes[:, place])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return head.eval().requires_grad_(False)
