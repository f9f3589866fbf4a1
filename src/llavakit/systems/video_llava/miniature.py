"""Video-LLaVA's claim, small: encoders that are aligned before projection let one projector serve both modalities.

Pictures of 12 x 12 pixels show one of six shapes in one of four colours on noise, clips of three frames the same in
motion. An image encoder and an embedder of captions learn to agree. Two encoders of clips, with attention over time,
then learn from the same clips in as many steps: one to agree with the frozen captions of the pictures (`aligned`), one
with captions of its own (`unaligned`). All encoders are frozen, and a shared MLP with a reader of one layer learns to
name shape and colour: from pictures alone, from 150 clips alone, or from both. Spec section 11.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llavakit.proof.miniature import Comparison, Verdict, run_seeds
from llavakit.systems.video_llava.encoder import LanguageBindVideo, LanguageBindVideoConfig
from llavakit.vision.encode import encode_views
from llavakit.vision.geometry import geometry_of

SIDE, PATCH, FRAMES, THING, WIDTH, SPACE = 12, 4, 3, 5, 32, 24
CLIPS, PICTURES = 150, 1500  # that readers learn from
VIT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_act": "gelu",
}
DRAWN = (
    ("#####", "#####", "#####", "#####", "#####"),
    ("#####", "#...#", "#...#", "#...#", "#####"),
    ("..#..", "..#..", "#####", "..#..", "..#.."),
    ("#...#", ".#.#.", "..#..", ".#.#.", "#...#"),
    (".....", ".....", "#####", "#####", "....."),
    ("..##.", "..##.", "..##.", "..##.", "..##."),
)
COLOURS = ((1.0, -0.5, -0.5), (-0.5, 1.0, -0.5), (-0.5, -0.5, 1.0), (1.0, 1.0, -0.5))
SHAPES, HUES = len(DRAWN), len(COLOURS)
CAPTIONS = SHAPES * HUES


@functools.cache
def placed() -> Tensor:
    """Every shape at every place [shapes, tops, lefts, side, side]."""
    free = SIDE - THING + 1
    masks = torch.tensor([[[float(cell == "#") for cell in row] for row in shape] for shape in DRAWN])
    found = torch.zeros(SHAPES, free, free, SIDE, SIDE)
    for top in range(free):
        for left in range(free):
            found[:, top, left, top : top + THING, left : left + THING] = masks
    return found


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips [count, 3, frames, side, side] and the number of each one's caption [count]."""
    captions = torch.randint(0, CAPTIONS, (count,), generator=generator)
    noise = 0.5 * torch.randn(count, 3, FRAMES, SIDE, SIDE, generator=generator)
    begins = torch.randint(0, SIDE - THING + 1, (count, 1, 2), generator=generator)
    steps = torch.randint(-2, 3, (count, 1, 2), generator=generator)
    places = (begins + torch.arange(FRAMES)[None, :, None] * steps).clamp(0, SIDE - THING)
    things = placed()[captions[:, None] // HUES, places[..., 0], places[..., 1]]  # [count, frames, side, side]
    colours = torch.tensor(COLOURS)[captions % HUES]
    return noise + colours[:, :, None, None, None] * things[:, None], captions


class Tower(nn.Module):
    """An encoder of pictures or of clips, with the projection to the space that it shares with captions."""

    def __init__(self, video: bool) -> None:
        super().__init__()
        config = LanguageBindVideoConfig(**VIT, num_frames=FRAMES) if video else CLIPVisionConfig(**VIT)
        self.encoder = LanguageBindVideo(config) if video else CLIPVisionModel(config)
        self.project = nn.Linear(WIDTH, SPACE)
        self.video, self.geometry = video, geometry_of(config)

    def forward(self, clips: Tensor) -> Tensor:
        """Tokens in the shared space [clips, tokens, space]; an encoder of pictures sees the middle frame."""
        pixels = clips if self.video else clips[:, :, FRAMES // 2]
        return self.project(encode_views(self.encoder, pixels, -1, "default", self.geometry))


class Captions(nn.Module):
    """Embeddings of all captions [captions, space]: a shape and a colour through an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.hue = nn.Embedding(SHAPES, SPACE), nn.Embedding(HUES, SPACE)
        self.mix = nn.Sequential(nn.Linear(SPACE, 2 * SPACE), nn.GELU(), nn.Linear(2 * SPACE, SPACE))

    def forward(self) -> Tensor:
        numbers = torch.arange(CAPTIONS)
        return self.mix(self.shape(numbers // HUES) + self.hue(numbers % HUES))


def similarity(tokens: Tensor, captions: Tensor) -> Tensor:
    """Cosines of media and captions over the temperature [media, captions]."""
    return F.normalize(tokens.mean(1), dim=-1) @ F.normalize(captions, dim=-1).T / 0.07


def align(tower: Tower, captions: Captions, seed: int, steps: int, batch: int = 64) -> Tower:
    """Contrast media with captions; captions that are frozen stay where they are."""
    generator = torch.Generator().manual_seed(100 + seed)
    parameters = [p for p in (*tower.parameters(), *captions.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        clips, numbers = draw(batch, generator)
        loss = F.cross_entropy(similarity(tower(clips), captions()), numbers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def caption_accuracy(tower: Tower, captions: Captions, seed: int, count: int) -> float:
    """How often an encoder's own captions are told apart on fresh media: how good it is, whatever its space."""
    clips, numbers = draw(count, torch.Generator().manual_seed(8_000 + seed))
    return float((similarity(tower(clips), captions()).argmax(-1) == numbers).float().mean())


class Reader(nn.Module):
    """The shared projector, and one layer with a token that asks for the shape or for the colour."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(SPACE, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.questions = nn.Parameter(0.1 * torch.randn(2, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, SHAPES + HUES)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of shapes [media, 6] and of colours [media, 4]."""
        tokens = self.projector(tokens)
        asked = [torch.cat([tokens, question.expand(len(tokens), 1, -1)], 1) for question in self.questions]
        shape, hue = (self.head(self.layer(sequence)[:, -1]) for sequence in asked)
        return shape[:, :SHAPES], hue[:, SHAPES:]


Data = tuple[Tensor, Tensor]  # tokens, captions


def learn(data: Sequence[Data], seed: int, steps: int, batch: int = 32) -> Reader:
    """Train a reader on the features of one or two kinds of media, half a batch each."""
    torch.manual_seed(seed)
    reader, generator = Reader(), torch.Generator().manual_seed(200 + seed)
    optimiser = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        losses = []
        for tokens, captions in data:
            chosen = torch.randint(0, len(tokens), (batch // len(data),), generator=generator)
            shape, hue = reader(tokens[chosen])
            wanted = captions[chosen]
            losses.append(F.cross_entropy(shape, wanted // HUES) + F.cross_entropy(hue, wanted % HUES))
        optimiser.zero_grad()
        sum(losses).backward()
        optimiser.step()
        schedule.step()
    return reader.eval()


@torch.no_grad()
def accuracy(reader: Reader, data: Data) -> float:
    """Mean of the shares of right shapes and right colours; chance is 0.21."""
    tokens, captions = data
    shape, hue = reader(tokens)
    right = (shape.argmax(-1) == captions // HUES).float().mean() + (hue.argmax(-1) == captions % HUES).float().mean()
    return float(right) / 2


@torch.no_grad()
def features(tower: Tower, count: int, seed: int) -> Data:
    """Features of fresh media."""
    clips, captions = draw(count, torch.Generator().manual_seed(seed))
    return tower(clips), captions


def one_seed(seed: int, align_steps: int = 300, steps: int = 250, held_out: int = 1000) -> dict[str, float]:
    """All arms under one seed."""
    torch.manual_seed(seed)
    image, captions = Tower(video=False), Captions()
    align(image, captions, seed, align_steps)
    captions.requires_grad_(False)
    pictures = features(image, PICTURES, 1_000 + seed)
    fresh = features(image, held_out, 2_000 + seed)
    results = {"quality image": caption_accuracy(image, captions, seed, held_out)}
    for arm in ("aligned", "unaligned"):
        torch.manual_seed(10 + seed)
        video, own = Tower(video=True), captions if arm == "aligned" else Captions()
        align(video, own, seed, align_steps)
        results[f"quality {arm}"] = caption_accuracy(video, own, seed, held_out)
        clips = features(video, CLIPS, 3_000 + seed)
        moving = features(video, held_out, 4_000 + seed)
        for name, data in (("pictures", [pictures]), ("clips", [clips]), ("both", [pictures, clips])):
            reader = learn(data, seed, steps)
            results[f"{arm}, {name} to clips"] = accuracy(reader, moving)
            results[f"{arm}, {name} to pictures"] = accuracy(reader, fresh)
    return results


def run(seeds: Sequence[int] = (0, 1, 2), progress: Callable[[str], None] | None = None, **budget: int) -> Verdict:
    """Train every arm under every seed.

    Args:
        budget: Other numbers of steps and of held-out media, see `one_seed`.
    """
    measured = run_seeds(functools.partial(one_seed, **budget), seeds, progress)

    def compare(learned: str, asked: str, threshold: float) -> Comparison:
        name = f"{learned} to {asked}"
        return Comparison(
            metric=f"accuracy, learned on {learned}, asked about {asked}",
            idea=measured.arm(f"aligned, {name}", "video encoder aligned with the captions of pictures"),
            baseline=measured.arm(f"unaligned, {name}", "aligned with captions of its own"),
            threshold=threshold,
        )

    mean = {name: measured.arm(name).mean for name in measured.values}
    return Verdict(
        system="video-llava",
        claim="Encoders that are aligned before projection let one projector answer about a modality it never saw.",
        paper="LanguageBind ahead of an unaligned image encoder on every benchmark; joint training ahead of one alone",
        comparisons=(compare("pictures", "clips", 0.2), compare("clips", "pictures", 0.2)),
        seeds=tuple(seeds),
        seconds=measured.seconds,
        notes=(
            "Chance is 0.21. The encoders of clips are equally good: their own captions are told apart in "
            f"{mean['quality aligned']:.2f} (aligned) and {mean['quality unaligned']:.2f} of all cases. The paper "
            f"compares joint training. Asked about clips: aligned {mean['aligned, both to clips']:.2f}, unaligned "
            f"{mean['unaligned, both to clips']:.2f}, from clips alone {mean['aligned, clips to clips']:.2f}; about "
            f"pictures: {mean['aligned, both to pictures']:.2f}, {mean['unaligned, both to pictures']:.2f}, from "
            f"pictures alone {mean['aligned, pictures to pictures']:.2f}."
        ),
    )
