"""Encoders of pictures and texts in one space, trained contrastively; and retrieval in it.

    pair = Pair.load(folder)             # what a stage with `objective: contrastive` left
    pair.embed_images(pixels), pair.embed_texts(ids, mask)

A folder of a pair is a folder of its vision encoder, as transformers and recipes (`parts.init.vision_tower`) read it,
with the text side under `text/` and the projections in `joint.safetensors` beside it. Source of the loss: CLIP (Radford
et al. 2021); LLaVA-Rad's encoder was trained so (arXiv 2403.08002), on settings that are not published.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from llavakit.checkpoints.files import assign_state, read_file, read_folder, read_json, write_state
from llavakit.data.preparation import Left
from llavakit.data.readers import open_source
from llavakit.errors import CheckpointError, RecordError, UserError
from llavakit.model.configuration import build_config
from llavakit.vision.activations import with_lean_activations

TEXT, JOINT = "text", "joint.safetensors"
START, MOST = math.log(1 / 0.07), math.log(100)  # of the factor of the scores, CLIP's
JOINT_NAMES = ("image_projection.weight", "text_projection.weight", "logit_scale")


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor | None = None) -> Tensor:
    """Cross entropy of every picture among the texts and of every text among the pictures, their mean [pairs].

    Args:
        images, texts: Embeddings [pairs, width] of any length; row i belongs to row i.
        scale: Logarithm of the factor of the cosines; more than log 100 counts as that.
        same: True where the text of a column is that of the row too [pairs, pairs]: both are right, and share the
            target. Default: only the own one is.
    """
    scores = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * scale.clamp(max=MOST).exp()
    wanted = torch.eye(len(images), device=images.device, dtype=scores.dtype) if same is None else same.to(scores)
    wanted = wanted / wanted.sum(1, keepdim=True)
    return (F.cross_entropy(scores, wanted, reduction="none") + F.cross_entropy(scores.T, wanted, reduction="none")) / 2


@dataclass
class PairConfig:
    """Configurations of both sides, the width of the joint space, and how the text side is read.

    Attributes:
        vision, text: transformers' configurations.
        width: Of the joint space.
        pool: "first" (the state of the first token) or "mean" (of all).
    """

    vision: Any
    text: Any
    width: int
    pool: str = "first"


class Pair(nn.Module):
    """Both encoders with their projections into the joint space."""

    def __init__(self, config: PairConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = with_lean_activations(AutoModel.from_config(config.vision))
        self.text_tower = with_lean_activations(AutoModel.from_config(config.text))
        self.image_projection = nn.Linear(config.vision.hidden_size, config.width, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(START))

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """Embeddings [pictures, width], of no particular length."""
        found = self.vision_tower(pixel_values)
        pooled = getattr(found, "pooler_output", None)
        return self.image_projection(found.last_hidden_state.mean(1) if pooled is None else pooled)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings [texts, width], of no particular length."""
        states = self.text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.config.pool == "first":
            return self.text_projection(states[:, 0])
        mask = attention_mask[..., None].to(states)
        return self.text_projection((states * mask).sum(1) / mask.sum(1))

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of pictures and of texts, and the logarithm of the factor of their cosines."""
        return self.embed_images(pixel_values), self.embed_texts(input_ids, attention_mask), self.logit_scale

    @classmethod
    def load(cls, folder: Path) -> Pair:
        """What `save_pair` wrote; every tensor is checked.

        Raises:
            CheckpointError: If a file is missing or does not fit.
        """
        folder = Path(folder)
        if not (folder / JOINT).is_file():
            raise CheckpointError(f"{folder}: holds no {JOINT}; a pair of encoders is what a contrastive stage leaves")
        joint = read_file(folder / JOINT)
        for name in JOINT_NAMES:
            if name not in joint:
                raise CheckpointError(f"{folder / JOINT}: lacks {name}")
        pool = read_json(folder / TEXT / "pool.json").get("pool", "first")
        vision, text = (read_json(place / "config.json") for place in (folder, folder / TEXT))
        configs = (build_config(raw, raw["model_type"]) for raw in (vision, text))
        pair = cls(PairConfig(*configs, len(joint["image_projection.weight"]), pool))
        assign_state(pair.vision_tower, read_folder(folder), where=str(folder))
        assign_state(pair.text_tower, read_folder(folder / TEXT), where=str(folder / TEXT))
        for name in JOINT_NAMES:
            own = pair.get_parameter(name)
            if own.shape != joint[name].shape:
                raise CheckpointError(f"{folder / JOINT}: {name} has shape {list(joint[name].shape)}")
            own.data.copy_(joint[name])
        return pair


def save_pair(state: dict[str, Tensor], config: PairConfig, folder: Path) -> None:
    """Write a pair of encoders; the folder exists.

    Args:
        state: All tensors of a `Pair`, under its names.
    """
    text = folder / TEXT
    text.mkdir(exist_ok=True)
    for part, own, place in (("vision_tower.", config.vision, folder), ("text_tower.", config.text, text)):
        own.save_pretrained(place)
        write_state(place, ((n.removeprefix(part), t) for n, t in state.items() if n.startswith(part)))
    (text / "pool.json").write_text(json.dumps({"pool": config.pool}) + "\n", encoding="utf-8")
    save_file({name: state[name].detach().cpu().contiguous() for name in JOINT_NAMES}, folder / JOINT)


def text_ids(texts: Sequence[str], tokenizer: Any, longest: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [texts, longest of them], cut after `longest` ids."""
    rows = [torch.tensor(tokenizer(" ".join(text.split()))["input_ids"][:longest] or [0]) for text in texts]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0), mask


def pair_features(
    source: Path, output: Path, bad: Left, *, encoder: str, images: str | None = None, batch_size: int = 32
) -> dict[str, Any]:
    """Embeddings of the pictures and texts of records, for `llavakit score report --features`.

    Args:
        source: Records with `image`, and a text as `objective: contrastive` reads it.
        output: Safetensors of `images` and `texts` [records, width], unit vectors in the order of the records.
        encoder: Folder that a contrastive stage left.
        images: Folder that image names are relative to; default: that of the source.
        batch_size: Records at a time.

    Raises:
        UserError: If no record is any good.
    """
    from llavakit.media.image import load_image
    from llavakit.training.objectives.encoder import VIEWS, ImageViews

    place = Path(encoder)
    pair, views = Pair.load(place).eval(), ImageViews(read_json(place / VIEWS))
    tokenizer = AutoTokenizer.from_pretrained(place / TEXT)
    entries, folder = open_source(source), Path(images) if images is not None else Path(source).parent
    found: dict[str, list[Tensor]] = {"images": [], "texts": []}
    waiting: list[tuple[Tensor, str]] = []

    def embed() -> None:
        pixels = torch.stack([own for own, _ in waiting])
        with torch.no_grad():
            both = pair(pixels, *text_ids([text for _, text in waiting], tokenizer, longest_text(pair.config)))[:2]
        for rows, own in zip(found.values(), both, strict=True):
            rows.append(F.normalize(own, dim=-1))
        waiting.clear()

    for number in range(len(entries)):
        try:
            raw = entries[number]
            text = record_text(raw, str(source), entries.line(number))
            name = raw.get("image")
            if not isinstance(name, str):
                raise RecordError(str(source), entries.line(number), "image", "must name the image file of the record")
            cut = views.cut(load_image(folder / name))
            if len(cut) > 1:
                raise UserError(f"{place}: its views are several per picture; retrieval needs one")
            waiting.append((cut[0], text))
        except RecordError as error:
            bad(error)
        if len(waiting) == batch_size:
            embed()
    if waiting:
        embed()
    if not found["images"]:
        raise UserError(f"{source}: has no record with a picture and a text")
    tensors = {name: torch.cat(rows).contiguous() for name, rows in found.items()}
    save_file(tensors, output)
    return {"records": len(entries), "written": len(tensors["images"])}


def longest_text(config: PairConfig, wanted: int = 256) -> int:
    """Ids that the text side reads: what is wanted, or as many as it has positions."""
    return min(wanted, getattr(config.text, "max_position_embeddings", wanted))


def record_text(raw: Any, file: str, line: int) -> str:
    """The text of a record: `text`, or the first answer of its conversation.

    Raises:
        RecordError: If there is none.
    """
    found = raw.get("text") if isinstance(raw, Mapping) else None
    turns = raw.get("conversations") if isinstance(raw, Mapping) else None
    if found is None and isinstance(turns, list):
        found = next((t.get("value") for t in turns if isinstance(t, Mapping) and t.get("from") == "gpt"), None)
    if not isinstance(found, str) or not found.strip():
        raise RecordError(file, line, "text", "is missing; a picture is learned with its text, or with an answer")
    return found
