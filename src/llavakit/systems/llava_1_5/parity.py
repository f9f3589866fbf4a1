"""LLaVA-1.5's golden components: the network here, text, views and metrics in their own files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from llavakit.checkpoints.classic import mlp_options
from llavakit.checkpoints.layouts import rename_with
from llavakit.connectors.base import Features
from llavakit.connectors.general import MLP
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.classic_batch import ClassicBatch, Entry, as_rows
from llavakit.proof.entries import TINY, check_keys, fitting, greedy, loaded, published_model
from llavakit.proof.golden import Case, Example, Result
from llavakit.systems.llava_1_5 import parity_eval, parity_text, parity_views
from llavakit.systems.llava_1_5.checkpoint import LlavaLayout, LlavaTransformersLayout
from llavakit.views.plan import MediaSize
from llavakit.vision.multiscale import MultiscaleConfig, MultiscaleEncoder

SELECTION = ("mm_vision_select_layer", "mm_vision_select_feature")


def clip_options(config: Mapping[str, Any], where: str = "config.vision") -> dict[str, Any]:
    """Options of a CLIP encoder."""
    return {"model_type": "clip_vision_model", **check_keys(config, CLIPVisionConfig().to_dict(), where)}


def model_of(case: Case, **settings: Any) -> LlavakitForConditionalGeneration:
    """The case's model, opened as a published checkpoint with further settings in its config.json."""
    config = case.config
    named = ("mm_projector_type", *SELECTION, "pad_token_id")
    raw = {key: config[key] for key in named if key in config} | settings
    raw = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", **config["text"], **raw}
    size = config["vision"]["image_size"]

    def one_view(own: LlavakitConfig) -> None:
        # an entry of one view alone is not cut into tiles
        arrange = own.media["image"]["arrange"]
        own.media["multi_image"] = {"views": {"type": "squash", "size": size}, "arrange": arrange}

    return published_model(raw, case.weights(), clip_options(config["vision"]), change=one_view)


def vision_encoder(case: Case) -> Iterator[Example]:
    """CLIP features by layer and selection; a list of images is encoded one by one."""
    case.informational("config.published", "config.published.*", "config.num_patches")
    own = {key: value for key, value in case.config.items() if key not in ("num_patches", "published", *SELECTION)}
    default = (case.config.get(SELECTION[0], -2), case.config.get(SELECTION[1], "patch"))
    pixels = case.tensors["pixel_values"]

    def features(images: Tensor, layer: int, select: str) -> Tensor:
        if select not in ("patch", "cls_patch"):
            raise ValueError(f"Unexpected select feature: {select}")
        config = LlavakitConfig(
            text_config={"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2},
            vision_config=clip_options(own, "config"),
            vision_feature_layer=layer,
            vision_feature_select_strategy="full" if select == "cls_patch" else "default",
            media={"image": {"views": {"type": "squash", "size": own["image_size"]}}},
        )
        model = LlavakitForConditionalGeneration(config).eval()
        load_tower(model.model.vision_tower, case.weights())
        with torch.no_grad():
            return model.get_image_features(images).last_hidden_state.to(images.dtype)

    for name in case.wanted.tensors:
        if name.startswith("features_list_"):
            number = int(name.rsplit("_", 1)[1])
            wanted = (pixels[number : number + 1], *default)
        elif name.startswith("features_layer"):
            _, named, select = name.split("_", 2)
            wanted = (pixels, int(named.removeprefix("layer")), select)
        else:
            wanted = (pixels, *default)
        yield Example(name, lambda name=name, wanted=wanted: {name: features(*wanted)}, tensors=(name,))


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
        rename = rename_with(LlavaLayout().renames_in())
        prefix, own = f"{name}/", {}
        for key, tensor in case.weights().items():
            if key.startswith(prefix):
                own[rename("model." + key.removeprefix(prefix)).removeprefix("model.multi_modal_projector.")] = tensor
        net = loaded(net, own)
        batch, tokens, _ = x.shape
        with torch.no_grad():
            rows = fitting(x, net).flatten(0, 1)
            out = net(Features(rows, [(1, 1, tokens)] * batch, list(range(batch))), [])
        outputs[name] = out.values.unflatten(0, (batch, tokens))
    return Result(tensors=outputs)


def placeholder(case: Case) -> int:
    """The id that stands for an image."""
    return case.config.get("image_token_index", IMAGE_PLACEHOLDER)


def splice(case: Case) -> Iterator[Example]:
    """Ids with placeholders and ready visual vectors to embeddings, mask and labels."""
    reported = [f"config.runs.*.{name}_returned" for name in ("position_ids", "attention_mask", "labels")]
    case.informational(*reported, "config.tokens_per_image", "inputs.*/position_ids")
    token, ignore = placeholder(case), case.config.get("ignore_index", -100)
    table = case.weights()["model.embed_tokens.weight"]
    inputs, side = case.tensors, case.config.get("default_padding_side", "right")
    model = LlavakitForConditionalGeneration(
        LlavakitConfig(
            text_config={"model_type": "llama", "vocab_size": table.shape[0], **TINY, "hidden_size": table.shape[1]},
            vision_config={"model_type": "clip_vision_model", "image_size": 2, "patch_size": 2, **TINY},
            media={"image": {"views": {"type": "squash", "size": 2}}},
            image_token_id=table.shape[0],
        )
    ).to(table.dtype)
    model.get_input_embeddings().weight.data = table

    def run(name: str, options: Mapping[str, Any]) -> Result:
        settings = check_keys(options["config"], ("tokenizer_padding_side", "tokenizer_model_max_length"), name)
        labels = inputs.get(f"{name}/labels")
        batch = ClassicBatch(
            model,
            inputs[f"{name}/input_ids"],
            {token: [Entry(vectors=vectors) for vectors in inputs["image_features"][: options["n_images"]]]},
            attention_mask=inputs.get(f"{name}/attention_mask"),
            labels=labels,
            max_length=settings.get("tokenizer_model_max_length"),
            padding_side=settings.get("tokenizer_padding_side", side),
        )
        with torch.no_grad():
            embeds = batch.embeds()
        found = {"inputs_embeds": embeds * batch.meaningful(), "attention_mask": batch.attention}
        found["labels"] = batch.targets.masked_fill(batch.targets == -100, ignore)
        return Result(tensors={f"{name}/{key}": tensor for key, tensor in found.items()})

    for name, options in case.config["runs"].items():
        yield Example(name, lambda name=name, options=options: run(name, options), tensors=(f"{name}/*",))


def classic_batch(
    case: Case, model: LlavakitForConditionalGeneration, entries: Sequence[Entry], **options: Any
) -> ClassicBatch:
    """The case's batch with its images."""
    inputs = case.tensors
    given = {"attention_mask": inputs.get("attention_mask"), "labels": inputs.get("labels")}
    rows = inputs["input_ids"]
    token = case.config.get("image_token_index", IMAGE_PLACEHOLDER)
    return ClassicBatch(
        model, rows, {token: entries}, pad_token_id=case.config.get("pad_token_id") or 0, **given | options
    )


def whole_images(pixels: Sequence[Tensor]) -> list[Entry]:
    """Images of one view."""
    return [Entry("image", MediaSize(1, *view.shape[-2:]), [view]) for view in pixels]


def end_to_end(case: Case) -> Iterator[Example]:
    """Logits, loss, gradients and greedy tokens of a tiny model, right and left padded."""
    case.informational("config.attention", "config.bos", "config.tokens_per_image")
    inputs = case.tensors
    model = model_of(case)
    rename = rename_with(LlavaLayout().renames_in())

    def forward(side: str, suffix: str) -> Result:
        batch = classic_batch(case, model, whole_images(inputs["pixel_values"]), padding_side=side)
        model.zero_grad()
        out = batch.forward()
        tensors = {f"logits{suffix}": out.logits}
        if out.loss is not None:
            out.loss.backward()
            tensors[f"loss{suffix}"] = out.loss.reshape(1)
        short = suffix.removesuffix("_padded")
        tensors |= {f"expanded_attention_mask{short}": batch.attention, f"expanded_labels{short}": batch.targets}
        if side == "right":
            parameters = dict(model.named_parameters())
            for key in case.wanted.tensors:
                if key.startswith("grad/"):
                    tensors[key] = parameters[rename(key.removeprefix("grad/"))].grad
        return Result(tensors=tensors, mask={f"logits{suffix}": batch.meaningful()})

    def features() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"image_features": torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)}

    left = ("logits_left_padded", "loss_left_padded", "expanded_attention_mask_left", "expanded_labels_left")
    yield Example("left padded", lambda: forward("left", "_left_padded"), tensors=left)
    right = ("logits", "loss", "expanded_attention_mask", "expanded_labels", "grad/*")
    yield Example("right padded", lambda: forward("right", ""), tensors=right)
    yield Example("image_features", features, tensors=("image_features",))
    yield from _generations(case, model)


def _generations(case: Case, model: LlavakitForConditionalGeneration) -> Iterator[Example]:
    prompts, new = as_rows(case.inputs["generate_prompts"]), case.inputs["max_new_tokens"]
    eos = case.config.get("eos")
    images = whole_images(case.tensors["pixel_values"])
    samples = ClassicBatch(model, prompts, {placeholder(case): images}).samples

    def together(order: Sequence[int]) -> list[list[int]]:
        return greedy(model, [samples[n] for n in order], new, () if eos is None else (eos,))

    for name in case.wanted.json:
        if name == "generate_single":
            yield Example(name, lambda: [together([n])[0] for n in range(len(prompts))], name)
        else:
            order = [int(n) for n in name.removeprefix("generate_batch_left_order_").split("_")]
            yield Example(name, lambda order=order: together(order), name)


def anyres_merge(case: Case) -> Iterator[Example]:
    """Tiles merged flat, spatially, and spatially with unpadding and newlines."""
    case.informational("config.views", "config.expanded_lengths", "config.expanded_lengths.*")
    inputs, config = case.tensors, case.config
    sizes = [MediaSize(1, height, width) for width, height in config["image_sizes_wh"]]
    tiled = {"image_aspect_ratio": config.get("image_aspect_ratio", "anyres")}
    tiled["image_grid_pinpoints"] = config["image_grid_pinpoints"]

    def entry(number: int, size: MediaSize) -> Entry:
        views = inputs[f"views_{number}"]
        views = views if views.dim() == 4 else views[None]
        return Entry("image" if len(views) > 1 else "multi_image", size, list(views))

    def run(merge: str) -> Result:
        model = model_of(case, mm_patch_merge_type=merge, **tiled)
        batch = classic_batch(case, model, [entry(number, size) for number, size in enumerate(sizes)])
        with torch.no_grad():
            out, embeds = batch.forward(), batch.embeds()
        found = {"logits": out.logits, "attention_mask": batch.attention, "labels": batch.targets}
        found["inputs_embeds"] = embeds * batch.meaningful()
        if out.loss is not None:
            found["loss"] = out.loss.reshape(1)
        tensors = {f"{merge}/{name}": tensor for name, tensor in found.items()}
        return Result(tensors=tensors, mask={f"{merge}/logits": batch.meaningful()})

    def single_view() -> Result:
        """View 0 of image 0, in the prompt of the batch whose length fits."""
        model = model_of(case, mm_patch_merge_type="spatial_unpad", **tiled)
        entries = [Entry("multi_image", sizes[0], [inputs["views_0"][0]])] * len(inputs["input_ids"])
        batch = classic_batch(case, model, entries, labels=None)
        row = batch.lengths.index(case.wanted.tensors["single_view/logits"].shape[1])
        batch.samples = [batch.samples[row]]
        with torch.no_grad():
            return Result(tensors={"single_view/logits": batch.forward().logits})

    for merge in sorted({name.split("/")[0] for name in case.wanted.tensors}):
        compute = single_view if merge == "single_view" else lambda merge=merge: run(merge)
        yield Example(merge, compute, tensors=(f"{merge}/*",))


def checkpoint_conversion(case: Case) -> Result:
    """Key names of the classic, the hub and the transformers layout, from the layouts' own renames."""
    case.informational("config.*", "inputs.safetensors")
    names = list(case.wanted.json["classic_to_llava_hf_hub"])
    to_native = rename_with(LlavaLayout().renames_in())
    native = {name: to_native(name) for name in names}
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
    config = LlavakitConfig(text_config={"model_type": "llama", "vocab_size": 1}, vision_config=vision)
    written = LlavaTransformersLayout().write_state(config, {name: torch.zeros(1, 1) for name in native.values()})
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
