"""LLaVA-1.5's golden components: the network here, text, views and metrics in their own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoints.classic import mlp_options
from llavakit.checkpoints.layouts import rename_with
from llavakit.connectors.base import Features
from llavakit.connectors.general import MLP
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.golden import Case, Result
from llavakit.splice.layout import Run
from llavakit.splice.scatter import IGNORE, expand, scatter
from llavakit.systems.llava_1_5 import parity_eval, parity_text, parity_views
from llavakit.systems.llava_1_5.checkpoint import Classic, Hf, pinpoints_of
from llavakit.views.plan import MediaSize
from llavakit.vision.encode import encode_views
from llavakit.vision.geometry import geometry_of
from llavakit.vision.multiscale import MultiscaleConfig, MultiscaleEncoder

PLACEHOLDER = -200


def tiny_config(config: Mapping[str, Any], **fields: Any) -> LlavakitConfig:
    """The configuration of a case's tiny model; the placeholder id lies outside the vocabulary."""
    vision, text = config["vision"], config["text"]
    image = {"views": {"type": "squash", "size": vision["image_size"]}, "arrange": {"type": "flat"}}
    select = config.get("mm_vision_select_feature", "patch")
    defaults: dict[str, Any] = {
        "text_config": {"model_type": "llama", **text},
        "vision_config": {"model_type": "clip_vision_model", **vision},
        "connector": mlp_options(config.get("mm_projector_type", "mlp2x_gelu")),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full" if select == "cls_patch" else "default",
        "image_token_id": text["vocab_size"],
        "media": {"image": image},
        "system": "llava-1.5",
    }
    return LlavakitConfig(**(defaults | fields))


def build(config: LlavakitConfig, weights: Mapping[str, Tensor]) -> LlavakitForConditionalGeneration:
    """A model with the original code's weights."""
    rename = rename_with(Classic().renames_in())
    model = LlavakitForConditionalGeneration(config).eval()
    missing, extra = model.load_state_dict({rename(n): t for n, t in weights.items()}, strict=False)
    if missing or extra:
        raise ValueError(f"weights do not fit: missing {missing[:3]}, unknown {extra[:3]}")
    return model


def pad_rows(rows: Sequence[Sequence[int]], fill: int, side: str) -> Tensor:
    """Rows of ids as one tensor [rows, longest]."""
    length = max(len(row) for row in rows)
    pads = [[fill] * (length - len(row)) for row in rows]
    return torch.tensor([p + list(r) if side == "left" else list(r) + p for r, p in zip(rows, pads, strict=True)])


def expand_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    counts: Sequence[int],
    image_token_id: int,
    side: str = "right",
    max_length: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Classic ids with -200 per image to expanded ids, mask, labels, and the number of images of every row."""
    rows, targets, images = [], [], []
    remaining = iter(counts)
    for row, ids in enumerate(input_ids):
        keep = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
        own = ids[keep].tolist()
        layouts = [[Run(visual=next(remaining))] for _ in range(own.count(PLACEHOLDER))]
        if not layouts:
            next(remaining, None)  # a text-only sample comes with one unused image
        wanted = None if labels is None else labels[row][keep].tolist()
        spliced = expand(own, wanted, layouts, placeholder=PLACEHOLDER, image_token_id=image_token_id)
        rows.append(spliced.ids[:max_length])
        targets.append(spliced.labels[:max_length])
        images.append(len(layouts))
    mask = pad_rows([[1] * len(row) for row in rows], 0, side)
    return pad_rows(rows, 0, side), mask, pad_rows(targets, IGNORE, side), images


def used_images(input_ids: Tensor, attention_mask: Tensor | None = None) -> list[int]:
    """Numbers of the images that a batch shows: a text-only row comes with one image that nobody sees."""
    shown = input_ids == PLACEHOLDER
    used, start = [], 0
    for count in (shown if attention_mask is None else shown & attention_mask.bool()).sum(dim=1).tolist():
        used += range(start, start + count)
        start += max(count, 1)
    return used


def vision_encoder(case: Case) -> Result:
    """CLIP features by layer and selection."""
    case.informational("config.published", "config.published.*")
    selection = ("mm_vision_select_layer", "mm_vision_select_feature")
    config = {k: v for k, v in case.config.items() if k not in ("num_patches", "published", *selection)}
    layer, select = (case.config.get(*pair) for pair in zip(selection, (-2, "patch"), strict=True))
    inputs, outputs = case.tensors, {}
    model = LlavakitForConditionalGeneration(
        tiny_config({"vision": config, "text": {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2}})
    )
    encoder = model.model.vision_tower.eval()
    load_tower(encoder, case.weights())
    pixels = inputs["pixel_values"]
    for name in case.wanted.tensors:
        if name.startswith("features_list_"):
            number = int(name.rsplit("_", 1)[1])
            outputs[name] = _features(encoder, pixels[number : number + 1], layer, select)
        else:
            _, named, kind = name.split("_", 2)
            outputs[name] = _features(encoder, pixels, int(named.removeprefix("layer")), kind)
    return Result(tensors=outputs)


def _features(encoder: torch.nn.Module, pixels: Tensor, layer: int, select: str) -> Tensor:
    strategy = "full" if select == "cls_patch" else "default"
    with torch.no_grad():
        return encode_views(encoder, pixels, layer, strategy, geometry_of(encoder.config))


def load_tower(encoder: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Original CLIP names into a transformers encoder, whatever its release calls the inner level."""
    own = encoder.state_dict()
    state = {n if n in own else n.removeprefix("vision_model."): t for n, t in weights.items()}
    encoder.load_state_dict({n: t for n, t in state.items() if not n.endswith("position_ids")}, strict=True)


def multiscale(case: Case) -> Result:
    """S2 features."""
    case.informational("config.image_processor_size.*", "config.crop.*", "config.hidden_size_out")
    config = dict(case.config)
    named = config["s2_scales"]
    scales = [int(scale) for scale in (named.split(",") if isinstance(named, str) else named)]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    vision = {k: config[k] for k in (*names, "projection_dim", "hidden_act") if k in config}
    encoder = MultiscaleEncoder(
        MultiscaleConfig(encoder_config={"model_type": "clip_vision_model", **vision}, scales=scales)
    ).eval()
    load_tower(encoder.encoder, case.weights())
    with torch.no_grad():
        features = encoder.features(case.tensors["pixel_values"], config.get("mm_vision_select_layer", -2))
    return Result(tensors={"features": features})


def connector(case: Case) -> Result:
    """Every connector type by its classic name."""
    x = case.tensors["x"]
    outputs = {}
    for name in case.config["types"]:
        options = {k: v for k, v in mlp_options(name).items() if k != "type"}
        width = case.config["mm_hidden_size"]
        hidden = width if name == "identity" else case.config["hidden_size"]
        net = MLP(vision_width=width, hidden_size=hidden, **options)
        rename = rename_with(Classic().renames_in())
        prefix, own = f"{name}/", {}
        for key, tensor in case.weights().items():
            if key.startswith(prefix):
                own[rename("model." + key.removeprefix(prefix)).removeprefix("model.multi_modal_projector.")] = tensor
        net.load_state_dict(own)
        batch, tokens, _ = x.shape
        with torch.no_grad():
            out = net(Features(x.flatten(0, 1), [(1, 1, tokens)] * batch, list(range(batch))), [])
        outputs[name] = out.values.unflatten(0, (batch, tokens))
    return Result(tensors=outputs)


def splice(case: Case) -> Result:
    """Ids with placeholders and ready visual vectors to embeddings, mask and labels."""
    case.informational("config.runs.*", "config.image_token_index", "config.ignore_index", "config.tokens_per_image")
    inputs = case.tensors
    table = case.weights()["model.embed_tokens.weight"]
    token = table.shape[0]
    outputs = {}
    for run, options in case.config["runs"].items():
        features = inputs["image_features"][: options["n_images"]]
        ids, mask, labels, images = expand_batch(
            inputs[f"{run}/input_ids"],
            inputs.get(f"{run}/attention_mask"),
            inputs.get(f"{run}/labels"),
            [len(vectors) for vectors in features],
            token,
            options["config"].get("tokenizer_padding_side", case.config.get("default_padding_side", "right")),
            options["config"].get("tokenizer_model_max_length"),
        )
        visual = ids == token
        embeds = table[ids.masked_fill(visual, 0)] * mask.unsqueeze(-1)
        taken = [vectors for row, n in _vectors_by_row(features, images) for vectors in row[:n]]
        flat = torch.cat(_cut(taken, visual, images)) if bool(visual.any()) else embeds.new_zeros(0, embeds.shape[-1])
        outputs[f"{run}/inputs_embeds"] = scatter(embeds, visual, flat)
        outputs[f"{run}/attention_mask"] = mask
        outputs[f"{run}/labels"] = labels
    return Result(tensors={name: tensor for name, tensor in outputs.items() if name in case.wanted.tensors})


def _vectors_by_row(features: Sequence[Tensor], images: Sequence[int]) -> list[tuple[list[Tensor], int]]:
    rows, start = [], 0
    for count in images:
        taken = max(count, 1)  # a text-only row uses up one image
        rows.append((list(features[start : start + taken]), count))
        start += taken
    return rows


def _cut(vectors: Sequence[Tensor], visual: Tensor, images: Sequence[int]) -> list[Tensor]:
    """Visual vectors as far as truncation left their positions."""
    kept, start = [], 0
    for row, count in enumerate(images):
        left = int(visual[row].sum())
        for tensor in vectors[start : start + count]:
            kept.append(tensor[:left])
            left -= len(kept[-1])
        start += count
    return kept


def end_to_end(case: Case) -> Result:
    """Logits, loss, gradients and greedy tokens of a tiny model, right and left padded."""
    case.informational("config.attention", "config.bos", "config.image_token_index")
    inputs, expected = case.tensors, case.wanted.tensors
    config = tiny_config(case.config)
    model = build(config, case.weights())
    counts = [case.config["tokens_per_image"]] * len(inputs["pixel_values"])
    pixels = inputs["pixel_values"][used_images(inputs["input_ids"], inputs["attention_mask"])]
    token = config.image_token_id
    outputs: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for side, suffix in (("right", ""), ("left", "_left")):
        ids, mask, labels, _ = expand_batch(
            inputs["input_ids"], inputs["attention_mask"], inputs["labels"], counts, token, side
        )
        out = model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels if len(pixels) else None)
        name = "logits" if side == "right" else "logits_left_padded"
        outputs[name], masks[name] = out.logits, mask.bool().unsqueeze(-1)
        outputs[f"expanded_attention_mask{suffix}"] = mask
        if side == "right":
            outputs["expanded_labels"] = labels
            outputs["loss"] = out.loss.reshape(1)
            model.zero_grad()
            out.loss.backward()
            rename = rename_with(Classic().renames_in())
            parameters = dict(model.named_parameters())
            for key in expected:
                if key.startswith("grad/"):
                    outputs[key] = parameters[rename(key.removeprefix("grad/"))].grad
        else:
            outputs["loss_left_padded"] = out.loss.reshape(1)
    with torch.no_grad():
        vectors = model.get_image_features(inputs["pixel_values"]).pooler_output
    outputs["image_features"] = torch.stack(vectors)
    return Result(json=_generations(case, model, inputs["pixel_values"]), tensors=outputs, mask=masks)


def _generations(case: Case, model: LlavakitForConditionalGeneration, pixels: Tensor) -> dict[str, Any]:
    request = case.inputs
    prompts, new = request["generate_prompts"], request["max_new_tokens"]
    eos, pad = case.config.get("eos", 2), case.config.get("pad_token_id", 0)
    counts, token = [case.config["tokens_per_image"]], model.config.image_token_id

    def greedy(order: Sequence[int]) -> list[list[int]]:
        rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompts[n]) for n in order], batch_first=True)
        lengths = torch.tensor([len(prompts[n]) for n in order])
        mask = torch.arange(rows.shape[1]) < lengths[:, None]
        ids, expanded, _, _ = expand_batch(rows, mask, None, counts * len(pixels), token, "left")
        shown = [number for n in order for number in images[n]]
        out = model.generate(
            input_ids=ids,
            attention_mask=expanded,
            **({"pixel_values": pixels[shown]} if shown else {}),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=pad,
        )
        answers = out[:, ids.shape[1] :].tolist()
        return [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in answers]

    images, start = [], 0  # numbers of every prompt's images
    for prompt in prompts:
        images.append(range(start, start + prompt.count(PLACEHOLDER)))
        start += max(len(images[-1]), 1)
    results = {}
    for name in case.wanted.json:
        if name == "generate_single":
            results[name] = [greedy([n])[0] for n in range(len(prompts))]
        elif name.startswith("generate_batch_left_order_"):
            results[name] = greedy([int(n) for n in name.removeprefix("generate_batch_left_order_").split("_")])
    return results


def anyres_merge(case: Case) -> Result:
    """Tiles merged flat, spatially, and spatially with unpadding and newlines."""
    case.informational("config.image_aspect_ratio", "config.views", "config.expanded_lengths")
    inputs, expected = case.tensors, case.wanted.tensors
    sizes = [MediaSize(1, height, width) for width, height in case.config["image_sizes_wh"]]
    pixels = torch.cat([inputs[f"views_{n}"] for n in range(len(sizes))])
    size = case.config["vision"]["image_size"]
    views = {"type": "anyres", "size": size, "pinpoints": pinpoints_of(case.config["image_grid_pinpoints"])}
    outputs: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for merge in ("flat", "spatial", "spatial_unpad"):
        config = tiny_config(case.config, media={"image": {"views": views, "arrange": {"type": merge}}})
        weights = case.weights()
        if merge != "spatial_unpad":
            weights.pop("model.image_newline", None)
        model = build(config, weights)
        counts = [sum(run.visual for run in model.model.media.layout("image", size)) for size in sizes]
        ids, mask, labels, _ = expand_batch(
            inputs["input_ids"], inputs["attention_mask"], inputs["labels"], counts, config.image_token_id
        )
        media = {"pixel_values": pixels, "visual_sizes": torch.tensor(sizes)}
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, labels=labels, **media)
            embeds, _, _ = model.model.embed(ids, attention_mask=mask, **media)
        outputs |= {
            f"{merge}/logits": out.logits,
            f"{merge}/loss": out.loss.reshape(1),
            f"{merge}/attention_mask": mask,
            f"{merge}/inputs_embeds": embeds * mask.unsqueeze(-1),
        }
        masks[f"{merge}/logits"] = mask.bool().unsqueeze(-1)
    if any(name.startswith("single_view/") for name in expected):
        outputs |= _single_view(case, inputs)
    return Result(tensors={n: t for n, t in outputs.items() if n in expected}, mask=masks)


def _single_view(case: Case, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One view under a merge type with unpadding: its tokens, then one newline."""
    size = case.config["vision"]["image_size"]
    media = {"image": {"views": {"type": "squash", "size": size}, "arrange": {"type": "spatial_unpad"}}}
    config = tiny_config(case.config, media=media)
    model = build(config, case.weights())
    view = inputs["views_0"][:1]
    count = sum(run.visual for run in model.model.media.layout("image", MediaSize(1, size, size)))
    length = case.wanted.tensors["single_view/logits"].shape[1]  # says which prompt of the batch was run
    texts = inputs["attention_mask"].sum(dim=1) - 1
    row = int((texts + count == length).nonzero()[0])
    ids, mask, _, _ = expand_batch(
        inputs["input_ids"][row : row + 1],
        inputs["attention_mask"][row : row + 1],
        None,
        [count],
        config.image_token_id,
    )
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, pixel_values=view)
    return {"single_view/logits": out.logits}


def checkpoint_conversion(case: Case) -> Result:
    """Key names of the classic, the hub and the transformers layout, from the layouts' own renames."""
    case.informational("config.*", "inputs.safetensors")
    names = list(case.wanted.json["classic_to_llava_hf_hub"])
    to_native = rename_with(Classic().renames_in())
    native = {name: to_native(name) for name in names}
    config = tiny_config({"vision": {"image_size": 8, "patch_size": 4}, "text": {"vocab_size": 1}})
    written = Hf().write_state(config, {name: torch.zeros(1, 1) for name in native.values()})
    hub = dict(zip(names, (name for name, _ in written), strict=True))
    return Result(json={"classic_to_llava_hf_hub": hub, "classic_to_transformers_5_23": native})


ADAPTERS = {
    "vision_encoder": vision_encoder,
    "vision_encoder_s2_multi_scale": multiscale,
    "connector": connector,
    "splice": splice,
    "end_to_end": end_to_end,
    "end_to_end_anyres_merge": anyres_merge,
    "checkpoint_conversion": checkpoint_conversion,
    **parity_text.ADAPTERS,
    **parity_views.ADAPTERS,
    **parity_eval.ADAPTERS,
}
