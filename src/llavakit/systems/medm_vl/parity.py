"""MedM-VL's golden components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, SiglipVisionConfig

from llavakit.checkpoints.classic import mlp_options
from llavakit.checkpoints.layouts import rename_with
from llavakit.connectors.base import Features
from llavakit.connectors.general import MLP, Pooling
from llavakit.evaluation import processors
from llavakit.evaluation.metrics import answers as metrics
from llavakit.evaluation.metrics import text as text_metrics
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import array, check_keys, fitting, loaded, published_model, scored
from llavakit.proof.golden import Case, Example, Result
from llavakit.systems.medm_vl.connector import AttentionPooling
from llavakit.systems.medm_vl.encoders import M3DClipConfig, M3DClipVision, MedMClipConfig, MedMClipVision
from llavakit.systems.medm_vl.parity_text import batch_collator, conversation
from llavakit.systems.medm_vl.volumes import Box, Slices, windowed
from llavakit.views.plan import MediaSize

IMAGE, VOLUME = -200, -201
STEPS = {"second": 2, "third": 3, "fourth": 4, "eighth": 8}


def _connector(cls: type[MLP], case: Case, **options: Any) -> MLP:
    config = case.config
    depth = mlp_options(config["connector_name"])["depth"]
    net = cls(vision_width=config["input_dim"], hidden_size=config["output_dim"], depth=depth, **options).eval()
    rules = tuple((rf"^connector\.{2 * n}\.", f"linear_{n + 1}.") for n in range(6))
    rename = rename_with(rules)
    return loaded(net, {rename(name): tensor for name, tensor in case.weights().items()})


def _run(net: MLP, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    batch = len(x)
    features = Features(fitting(x, net).flatten(0, 1), [grid] * batch, list(range(batch)))
    with torch.no_grad():
        return net(features, [None] * batch).values.unflatten(0, (batch, -1))


def connector_mlp(case: Case) -> Result:
    """Per-token MLP."""
    case.informational("config.connector_type", "config.image_size", "config.patch_size")
    x = case.tensors["x"]
    return Result(tensors={"y": _run(_connector(MLP, case), x, (1, 1, x.shape[1]))})


def connector_spatial_pooling(case: Case) -> Result:
    """2 x 2 x 2 average pooling, then the MLP."""
    case.informational("config.connector_type", "config.image_size", "config.patch_size")
    size, patch = case.config["image_size"], case.config["patch_size"]
    grid = tuple(s // p for s, p in zip(size, patch, strict=True))
    return Result(tensors={"y": _run(_connector(Pooling, case, stride=[2, 2, 2]), case.tensors["x"], grid)})


def connector_attn_pooling(case: Case) -> Result:
    """Learned queries, then the MLP."""
    case.informational("config.connector_type", "config.image_size", "config.patch_size")
    queries = case.weights()["query"].shape[0]
    x = case.tensors["x"]
    return Result(tensors={"y": _run(_connector(AttentionPooling, case, queries=queries), x, (1, 1, x.shape[1]))})


def _m3d(config: Mapping[str, Any]) -> M3DClipConfig:
    return M3DClipConfig(
        image_size=list(config["img_size"]),
        patch_size=list(config["patch_size"]),
        num_channels=config.get("in_channels", 1),
        hidden_size=config["hidden_size"],
        intermediate_size=config["mlp_dim"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"],
        layer_norm_eps=config.get("layer_norm_eps", 1e-5),
        qkv_bias=config.get("qkv_bias", False),
    )


def _medm(config: Mapping[str, Any]) -> MedMClipConfig:
    return MedMClipConfig(
        image_size=[config["frames"], config["image_size"], config["image_size"]],
        patch_size=[config["frame_patch_size"], config["image_patch_size"], config["image_patch_size"]],
        num_channels=config.get("channels", 1),
        hidden_size=config["dim"],
        intermediate_size=config["mlp_dim"],
        num_hidden_layers=config["depth"],
        num_attention_heads=config["heads"],
    )


VOLUMETRIC = {"m3dclip": _m3d, "medmclip": _medm}


def m3d_clip(case: Case) -> Result:
    """Outputs of every block of M3D-CLIP."""
    encoder = loaded(M3DClipVision(_m3d(case.config)), case.weights())
    volume = fitting(case.tensors["volume"], encoder)
    with torch.no_grad():
        blocks = encoder.block_outputs(volume)
        tensors = {f"block_output.{n}": block for n, block in enumerate(blocks)}
        tensors["medmvl_features"] = encoder.features(volume, -1, "default")
        tensors["normed_last"] = encoder.norm(blocks[-1])
    return Result(tensors=tensors)


def medm_clip(case: Case) -> Result:
    """Outputs of every layer of MedM-CLIP, and its contrastive head."""
    case.informational("config.norm", "config.activation")
    encoder = loaded(MedMClipVision(_medm(case.config)), case.weights())
    volume = fitting(case.tensors["volume"], encoder)
    with torch.no_grad():
        tensors = {f"layer_output.{n}": layer for n, layer in enumerate(encoder.block_outputs(volume))}
        tensors["medmvl_features"] = encoder.features(volume, -1, "default")
        tensors["clip_head"] = encoder.image_embedding(volume)
    return Result(tensors=tensors)


def volume_preprocess(case: Case) -> Result:
    """Volumes in Hounsfield units for each encoder."""
    case.informational("config.monai")
    window, tensors = case.config["hu_window"], {}
    for number, item in enumerate(case.config["items"]):
        volume = array(case.tensors[f"volume.{number}"])
        tensors[f"windowed.{number}"] = torch.from_numpy(windowed(volume, window))
        size = MediaSize(*volume.shape)
        if item["encoder"] == "siglip":
            planner = Slices(size=item["image_size"], slices=item["output"][1], window=window)
            values = np.stack(planner.cut(volume, planner.plan(size)), axis=1)
            # what is sampled of the result is written in words in the case: "channel 0, every second slice"
            step = next((n for word, n in STEPS.items() if word in item.get("sampled", "")), 1)
            tensors[f"sampled.{number}"] = torch.from_numpy(values[:1, ::step])
        else:
            kind = "standard" if item["encoder"] == "medmclip" else "minmax"
            planner = Box(size=item["output"][1:], intensity=kind, window=window)
            values = planner.cut(volume, planner.plan(size))[0]
            rows = item["height_and_width_rows"]
            tensors[f"sampled.{number}"] = torch.from_numpy(values[:, item["depth_rows"]][:, :, rows][..., rows])
        tensors[f"mean_std.{number}"] = torch.tensor(
            [values.mean(dtype=np.float64), values.std(dtype=np.float64, ddof=1)]
        )
    return Result(tensors=tensors)


def volume_preprocess_paper(case: Case) -> Result:
    """Stored grey volumes as slices."""
    volume = array(case.tensors["volume"][0])
    planner = Slices(size=case.config["image_size"], stored="grey")
    views = planner.cut(volume, planner.plan(MediaSize(*volume.shape)))
    return Result(tensors={"pixel_values": torch.from_numpy(np.stack(views, axis=1))})


def encoder_options(encoder: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The encoder's configuration of an end-to-end case, as config.json holds it."""
    own = {key: value for key, value in encoder.items() if key != "type"}
    if encoder["type"] in VOLUMETRIC:
        return VOLUMETRIC[encoder["type"]](own).to_dict()
    known = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}[encoder["type"]]().to_dict()
    check_keys(own, known, "config.encoder")
    if encoder["type"] == "siglip":
        own["vision_use_head"] = any(".head." in name for name in weights)
    return own


def tiny_model(case: Case, slices: int) -> LlavakitForConditionalGeneration:
    """The model of an end-to-end case, opened as a published checkpoint.

    Args:
        slices: Slices of a volume that goes through a 2D encoder.
    """
    config, weights = case.config, case.weights()
    kind = config["encoder"]["type"]
    slot = "image3d" if kind in VOLUMETRIC else "image"
    llm = {key: value for key, value in config["llm"].items() if key not in ("type", "qkv_bias")}
    llm.setdefault("pad_token_id", None)  # that of a type (Phi-3's) may lie outside of a tiny vocabulary
    raw = {
        "model_type": "lvlm",
        "llm_type": config["llm"]["type"],
        "llm_config": llm,
        f"encoder_{slot}_type": kind,
        f"encoder_{slot}_config": encoder_options(config["encoder"], weights),
        f"encoder_{slot}_select_layer": config["select_layer"],
        f"encoder_{slot}_select_feature": config["select_feature"],
        f"connector_{slot}_type": config["connector_type"],
        f"connector_{slot}_name": config["connector_name"],
    }
    queries = [tensor.shape[0] for name, tensor in weights.items() if name.endswith(".query")]

    def sized(own: LlavakitConfig) -> None:
        if kind not in VOLUMETRIC:
            own.media["volume"]["views"]["slices"] = slices
        if queries:
            own.connector["queries"] = queries[0]

    case.informational("config.llm.qkv_bias")  # a property of the language model's type
    return published_model(raw, weights, change=sized)


def end_to_end(case: Case) -> Iterator[Example]:
    """Spliced embeddings, labels, mask, logits and loss of a tiny model."""
    inputs, config = case.tensors, case.config
    through_2d = config["encoder"]["type"] not in VOLUMETRIC
    volumes, images = inputs.get("image3d", ()), inputs.get("image", ())
    slices = volumes.shape[2] if len(volumes) and through_2d else 1

    def volume(item: Tensor) -> Entry:
        views = list(item.unbind(1)) if through_2d else [item]
        return Entry("volume", MediaSize(*item.shape[-3:]), views)

    batch = ClassicBatch(
        tiny_model(case, slices),
        inputs["input_ids"],
        {
            IMAGE: [Entry("image", MediaSize(1, *item.shape[-2:]), [item]) for item in images],
            VOLUME: list(map(volume, volumes)),
        },
        attention_mask=inputs.get("attention_mask"),
        labels=inputs.get("labels"),
        max_length=config.get("llm_max_length"),
        padding_side=config.get("llm_padding_side") or "right",
        spare=False,
    )
    yield from batch.examples("spliced")


def ct_rate_accuracy(case: Case) -> Result:
    """Multiple choice by the letter in brackets."""
    case.informational("inputs.answers.*.id")
    inputs, items = case.inputs, []
    for row, reply in zip(inputs["answers"], inputs["predictions"], strict=True):
        found = metrics.choice_in_reply(reply, row["answer"])
        if found is not None:
            items.append({"id": row["id"], "answer": found[0], "predict": reply.strip(), "correct": found[1]})
    accuracy = 0.0  # the benchmark refuses files without multiple choice, for which the original prints 0
    if items:
        gold = [{"answer": row["answer"]} for row in inputs["answers"]]
        accuracy = scored("ct_rate", inputs["predictions"], gold)["accuracy"] / 100
    return Result(json={"per_item": items, "average": {"correct": accuracy}})


def box_iou(case: Case) -> Result:
    """Boxes of referring expressions."""
    inputs, resolution = case.inputs, case.config.get("coordinate_resolution") or 100

    def score(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        gold = [{"bbox": row["bbox_xywh"], "image_size": row["image_size"]} for row in rows]
        return scored("referring", [row["prediction"] for row in rows], gold, resolution=resolution)

    rows = inputs.get("refer") or []
    pairs = inputs.get("box_pairs") or []
    json: dict[str, Any] = {
        "iou": [metrics.box_iou(a, b, inclusive=True) for a, b in pairs],
        "refer_iou": [score([row])["mean_iou"] / 100 for row in rows],
    }
    if rows:
        found = score(rows)
        json |= {"miou": found["mean_iou"] / 100, "accuracy_at_0.5": found["accuracy_at_0.5"] / 100}
    return Result(json=json)


def text_scores(case: Case) -> Result:
    """Normalisation, token F1, accuracy and BLEU-1 of answers."""
    case.informational("config.nltk")
    pairs = case.inputs
    normal = [[processors.medical_answer(a), processors.medical_answer(b)] for a, b in pairs]

    def f1(rows: list[list[str]]) -> list[float]:
        return [metrics.token_scores(a, b)["f1"] for a, b in rows]

    def bleu(rows: list[list[str]], weights: tuple[float, ...] = (1.0,)) -> float:
        weights = weights + (0.0,) * (4 - len(weights))
        values = [text_metrics.sentence_bleu(a.split(), [b.split()], weights, epsilon=0.1) for a, b in rows]
        return sum(values) / len(values)

    raw_f1, normal_f1 = f1(pairs), f1(normal)
    return Result(
        json={
            "normalized": normal,
            "f1_norm": normal_f1,
            "f1_no_norm": raw_f1,
            "mean_f1": {"no_norm": sum(raw_f1) / len(raw_f1), "norm": sum(normal_f1) / len(normal_f1)},
            "equal_accuracy": scored(
                "exact_match", [a for a, _ in pairs], [{"answer": b} for _, b in pairs], process="medical"
            )["accuracy"]
            / 100,
            "containment_accuracy": sum(b in a for a, b in normal) / len(normal),
            "bleu1": {
                "nltk_no_norm": bleu(pairs),
                "nltk_sm_no_norm": bleu(pairs),
                "nltk_norm": bleu(normal),
                "nltk_sm_norm": bleu(normal),
            },
            "bleu4_smoothed_norm": bleu(normal, (0.25,) * 4),
        }
    )


ADAPTERS = {
    "batch_collator": batch_collator,
    "conversation": conversation,
    "connector_attn_pooling": connector_attn_pooling,
    "connector_mlp": connector_mlp,
    "connector_spatial_pooling": connector_spatial_pooling,
    "ct_rate_accuracy": ct_rate_accuracy,
    "end_to_end": end_to_end,
    "volume_preprocess_paper": volume_preprocess_paper,
    "volume_preprocess": volume_preprocess,
    "box_iou": box_iou,
    "m3d_clip": m3d_clip,
    "medm_clip": medm_clip,
    "text_metrics": text_scores,
}
