"""LLaVA-Med's golden components of the network, its files and its pictures."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from llavakit.checkpoints.classic import grows
from llavakit.checkpoints.files import LazyState
from llavakit.connectors.base import Features
from llavakit.connectors.general import MLP
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import check_keys, fitting, greedy, picture, published_model, view_processor, views_of
from llavakit.proof.golden import Case, Example, Result
from llavakit.proof.timm import FIXED, published_vit
from llavakit.registry import PLANNERS
from llavakit.splice.scatter import IGNORE
from llavakit.systems.llava_med.checkpoint import WRITTEN_IDS
from llavakit.systems.llava_med.parity_text import tiled_views
from llavakit.views.plan import MediaSize
from llavakit.vision.encode import encode_views
from llavakit.vision.geometry import geometry_of

TOWER = "model.vision_tower.vision_tower.vision_model."
PATCH = 2  # pixels of the encoder that stands for the tower of v1.0, whose features the case brings
SQUARE_SEEDS, PIXEL_SEED, GREY_SEED = (0, 1, 2), 5, 6


# Whole models


def patches_in_place(case: Case) -> Iterator[Example]:
    """v1.0: logits and loss where visual tokens replace patch tokens."""
    config, inputs = case.config, case.tensors
    case.informational("config.projector", "config.published", "config.published.*")
    tokens = {name: config[f"im_{name}_token"] for name in ("patch", "start", "end")}
    count, width = config["tokens_per_image"], config["mm_hidden_size"]
    raw = {"model_type": "llava", "mm_hidden_size": width, **WRITTEN_IDS, **config["text"]}
    encoder = {"hidden_size": width, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    encoder |= {"image_size": PATCH, "patch_size": PATCH}
    blank = CLIPVisionModel(CLIPVisionConfig(**encoder)).state_dict()
    weights = case.weights() | {TOWER + name.removeprefix("vision_model."): t for name, t in blank.items()}
    features = inputs["hidden_states_minus_2"][:, 1:]

    def model(mode: str) -> LlavakitForConditionalGeneration:
        def cut(own: LlavakitConfig) -> None:
            image = own.media["image"]
            image["views"] = tiled_views(count)
            if mode != "start_end":
                image["arrange"] = {"type": "flat"}

        return published_model(
            raw | {"mm_use_im_start_end": True, "mm_projector_type": "linear"},
            weights,
            {"model_type": "clip_vision_model", **encoder},
            added_tokens={"<im_start>": tokens["start"], "<im_end>": tokens["end"]},
            change=cut,
        )

    def run(mode: str) -> Result:
        ids, mask = inputs[f"{mode}/input_ids"], inputs[f"{mode}/attention_mask"].bool()
        rows, slots = collapsed([row[own].tolist() for row, own in zip(ids, mask, strict=True)], mode, count, tokens)
        entries = [Entry(views=list(features[slot].unsqueeze(1))) for slot in slots]
        batch = ClassicBatch(model(mode), rows, {IMAGE_PLACEHOLDER: entries}, spare=False, features=True)
        real, labels = batch.attention.bool(), torch.full_like(batch.ids, IGNORE)
        labels[real] = ids[mask]
        with torch.no_grad():
            out = batch.forward(labels=labels)
        logits = out.logits.new_zeros(*ids.shape, out.logits.shape[-1])
        logits[mask] = out.logits[real]
        found = {f"{mode}/logits": logits, f"{mode}/loss": out.loss.reshape(1)}
        return Result(tensors=found, mask={f"{mode}/logits": mask.unsqueeze(-1)})

    for name in inputs:
        if name.endswith("/input_ids"):
            mode = name.removesuffix("/input_ids")
            yield Example(mode, partial(run, mode), tensors=(f"{mode}/*",))


def collapsed(
    rows: Sequence[Sequence[int]], mode: str, count: int, tokens: Mapping[str, int]
) -> tuple[list[list[int]], list[int]]:
    """Rows with one placeholder where an image's tokens stand, and the slot of the features that each one takes.

    The original shows only the last of several images of a row between marks; without marks it shows every row the
    first slot.
    """
    found, slots, used = [], [], 0
    for row in map(list, rows):
        if tokens["patch"] in row and mode == "start_end":
            starts = [place for place, token in enumerate(row) if token == tokens["start"]]
            used += len(starts)
            slots.append(used - 1)
            row[starts[-1] : starts[-1] + count + 2] = [IMAGE_PLACEHOLDER]
        elif tokens["patch"] in row:
            slots.append(0)
            first = row.index(tokens["patch"])
            row[first : first + count] = [IMAGE_PLACEHOLDER]
        found.append(row)
    return found, slots


def end_to_end(case: Case) -> Iterator[Example]:
    """v1.5: logits, loss and greedy replies of a whole model in the published layout."""
    config, inputs = case.config, case.tensors
    case.informational("config.attention", "config.tokens_per_image")
    raw = {
        "model_type": "llava_mistral",
        "image_aspect_ratio": "pad",
        "mm_projector_type": config.get("mm_projector_type", "mlp2x_gelu"),
        "mm_vision_select_layer": config.get("select_layer", -2),
        **config["text"],
    }
    encoder = check_keys(config["vision"], CLIPVisionConfig().to_dict(), "config.vision")
    model = published_model(raw, case.weights(), {"model_type": "clip_vision_model", **encoder})

    def entries(count: int) -> dict[int, list[Entry]]:
        return {IMAGE_PLACEHOLDER: [Entry(views=[view]) for view in inputs["pixel_values"][:count]]}

    given = {name: inputs.get(name) for name in ("attention_mask", "labels")}
    batch = ClassicBatch(model, inputs["input_ids"], entries(len(inputs["pixel_values"])), **given)
    yield from batch.examples("expanded")
    if "generate" in case.wanted.json:
        prompts = [list(row) for row in case.inputs["generate_prompts"]]
        lengths = [len(row) for row in case.wanted.json["generate"]]

        def replies() -> list[list[int]]:
            new = greedy(model, ClassicBatch(model, prompts, entries(len(prompts))).samples, max(lengths))
            return [row[:length] for row, length in zip(new, lengths, strict=True)]

        yield Example("generate", replies, "generate")


# Parts


def connector_start(case: Case) -> Result:
    """The connector where every visual token is the mean embedding."""
    width, hidden = case.config["mm_hidden_size"], case.config["hidden_size"]
    table, x = case.tensors["embed_tokens.weight"], case.tensors["x"]
    net = MLP(vision_width=width, hidden_size=hidden).to(table.dtype)
    net.start_at(table.mean(0))
    rows = fitting(x, net).reshape(-1, width)
    with torch.no_grad():
        out = net(Features(rows, [(1, 1, len(rows))], [0]), [])
    projected = out.values.reshape(*x.shape[:-1], hidden)
    last = {f"mm_projector.2.{kind}": getattr(net.linear_2, kind).detach() for kind in ("weight", "bias")}
    return Result(tensors=last | {"projected": projected})


def biomedclip(case: Case) -> Result:
    """Features of BiomedCLIP's trunk from one of its last three blocks."""
    case.informational(*(f"config.{name}" for name in FIXED))
    sizes = {name: value for name, value in case.config.items() if name != "select_layer"}
    layer = case.config.get("select_layer", -2)
    encoder = published_vit(sizes, case.weights()).model.vision_tower
    pixels = fitting(case.tensors["pixel_values"], encoder)
    with torch.no_grad():
        layer = layer if layer < 0 else layer - 3
        return Result(
            tensors={"features": encode_views(encoder, pixels, layer, "default", geometry_of(encoder.config))}
        )


def delta_weights(case: Case) -> Result:
    """Differences of a model to its base, and the model again."""
    case.informational("config.extra_vocab_rows", "config.dtype")
    states: dict[str, dict[str, Tensor]] = {"base": {}, "target": {}}
    for name, tensor in case.tensors.items():
        side, _, key = name.partition("/")
        states[side][key] = tensor
    base, target = (LazyState.of(states[side]) for side in ("base", "target"))
    delta = target.subtracted(base, grows)
    restored = delta.added(base, grows)
    both = {"delta": delta, "restored": restored}
    return Result(tensors={f"{side}/{name}": state[name] for side, state in both.items() for name in state})


# Pictures


def image_preprocessing(case: Case) -> Iterator[Example]:
    """Squares and pixels with the offset that the original draws."""
    case.informational("config.resample", "config.random")
    config = case.config
    views = {
        "type": "drawn_pad",
        "size": config["size"],
        "crop": config.get("crop"),
        "background": list(config["background_rgb"]),
        "grey_background": config["background_gray"],
    }
    processor = view_processor(
        {"image": {"views": views}}, {"image_size": views["crop"] or views["size"], "patch_size": 1}
    )
    pictures = {kind: [picture(case.tensors[name]) for name in ordered(case, f"{kind}_")] for kind in ("image", "gray")}

    def squares(seed: int) -> dict[str, Tensor]:
        random.seed(seed)
        found = {}
        for number, image in enumerate(pictures["image"]):
            side = max(image.size)
            planner = PLANNERS.build({**views, "size": side, "crop": side})
            plan = planner.plan(MediaSize(1, image.height, image.width))
            found[f"seed{seed}/square_{number}"] = torch.from_numpy(np.array(planner.render(image, plan)[0]))
        return found

    def pixels(kind: str, name: str, seed: int) -> dict[str, Tensor]:
        random.seed(seed)
        return {name: torch.stack([views_of(processor, "image", image)[0] for image in pictures[kind]])}

    for seed in SQUARE_SEEDS:
        yield Example(f"seed{seed}", partial(squares, seed), tensors=(f"seed{seed}/*",))
    for kind, name, seed in (("image", "pixel_values", PIXEL_SEED), ("gray", "pixel_values_gray", GREY_SEED)):
        if pictures[kind]:
            yield Example(name, partial(pixels, kind, name, seed), tensors=(name,))


def ordered(case: Case, prefix: str) -> list[str]:
    """Names of the pictures that begin with a prefix, by number."""
    names = [name for name in case.tensors if name.startswith(prefix)]
    return sorted(names, key=lambda name: int(name.removeprefix(prefix)))


ADAPTERS = {
    "end_to_end_v1_0_in_place_patch_tokens": patches_in_place,
    "end_to_end_v1_5_mistral": end_to_end,
    "connector_initialisation_v1_5": connector_start,
    "vision_encoder_biomedclip_option_of_v1_0": biomedclip,
    "checkpoint_conversion_v1_0_delta": delta_weights,
    "image_preprocessing_v1_5": image_preprocessing,
}
