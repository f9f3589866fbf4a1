"""HyperLLaVA's golden components, which were computed from the paper's formulas."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.connectors.base import Connector, Features
from llavakit.model.configuration import NO_PLACEHOLDER, LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.classic_batch import ClassicBatch
from llavakit.proof.entries import check_keys, engine_logits, fitting, loaded
from llavakit.proof.golden import Case, Example, Result, examples
from llavakit.splice.scatter import IGNORE
from llavakit.systems.hyper_llava.checkpoint import SHARED, HyperLlavaLayout
from llavakit.systems.hyper_llava.cost import Size, golden_counts
from llavakit.systems.hyper_llava.experts import ExpertShape, GeneratedExpert
from llavakit.systems.hyper_llava.segments import Segments, find_segments

EXPERT = ("embed_dim", "hyper_hidden", "bottleneck", "activation")


def hypernetwork_expert(case: Case) -> Result:
    """One expert: embedding, generated matrices, output."""
    config = dict(case.config)
    guidance_dim = config.pop("guidance_dim")
    sizes = {name: config.pop(name) for name in ("embed_dim", "hyper_hidden")}
    expert = loaded(GeneratedExpert(ExpertShape(**config), guidance_dim=guidance_dim, **sizes), case.weights())
    guidance, x = (fitting(case.tensors[name], expert) for name in ("guidance", "x"))
    with torch.no_grad():
        down, up = expert.shape.split(expert.weights(guidance))
        out = expert(guidance, x)
        return Result(tensors={"e": expert.layer.embed(guidance), "W_down": down, "W_up": up, "out": out})


def published_connector(variant: str, widths: tuple[int, int], expert: Mapping[str, Any]) -> Connector:
    """The connector of a model whose config.json is in HyperLLaVA's layout.

    Args:
        widths: Of the encoder and of the language model.
        expert: Options as in `experts`.
    """
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    keys = {name: key for key, (name, _) in SHARED.items()}
    raw = {
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "visual_expert": variant,
        "language_expert_layers": "none",
        **{keys[name]: value for name, value in expert.items()},
        "hidden_size": widths[1],
        "vocab_size": 8,
        "head_dim": 2,  # the connector's width need not be even
        **small,
    }
    encoder = {"hidden_size": widths[0], "image_size": 4, "patch_size": 2, **small}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "clip"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **encoder}))
        config = HyperLlavaLayout().read_config(raw | {"mm_vision_tower": str(folder)}, {})
    return LlavakitForConditionalGeneration(config).model.multi_modal_projector


def visual_expert_projector(case: Case) -> Result:
    """The projector without an expert and in its three variants, and its guidance."""
    config = dict(case.config)
    widths = config.pop("d_vision"), config.pop("d_model")
    names = (("L1.", "linear_1."), ("L2.", "linear_2."), ("E1.", "expert_1."), ("E2.", "expert_2."))
    weights = case.weights()
    tensors: dict[str, Tensor] = {}
    for variant in ("plain", "first", "second", "both"):
        connector = published_connector("none" if variant == "plain" else variant, widths, config)
        own = {
            re.sub(f"^{re.escape(old)}", new, n): t for n, t in weights.items() for old, new in names if n[:3] == old
        }
        loaded(connector, {name: own[name] for name in connector.state_dict()})
        given = fitting(case.tensors["features"], connector)
        features = Features(given.flatten(0, 1), [(1, 1, given.shape[1])] * len(given), list(range(len(given))))
        seen: list[Tensor] = []
        if variant == "first":
            connector.expert_1.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            tensors[variant] = connector(features, []).values.view(*given.shape[:2], -1)
        if seen:
            tensors["guidance"] = seen[0]
    return Result(tensors=tensors)


def language_model(case: Case) -> LlavakitForConditionalGeneration:
    """The case's model, opened from a folder of llavakit's own."""
    given = dict(case.config)
    expert = {name: given.pop(name) for name in EXPERT}
    text = {
        "model_type": "llama",
        "hidden_size": given.pop("hidden"),
        "num_attention_heads": given.pop("heads"),
        "num_key_value_heads": given.pop("kv_heads"),
        "intermediate_size": given.pop("ffn"),
        "num_hidden_layers": given.pop("layers"),
        "vocab_size": given.pop("vocab"),
        "rms_norm_eps": given.pop("rms_norm_eps"),
        "rope_theta": given.pop("rope_theta"),
        "pad_token_id": None,
    }
    adapter = {"type": "language_experts", "layers": "posterior", "split": given.pop("first_expert_layer"), **expert}
    check_keys(given, (), "config")
    config = LlavakitConfig(
        text_config=text, language_adapter=adapter, media={}, image_token_id=NO_PLACEHOLDER, system="hyper-llava"
    )
    state = {published_name(name): tensor.contiguous() for name, tensor in case.weights().items()}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(state, Path(folder) / "model.safetensors")
        model = build(open_checkpoint(folder))
    return model.to(next(iter(state.values())).dtype).eval()


def published_name(name: str) -> str:
    """llavakit's name of a tensor of the cases' language model."""
    inside = {
        **{part: f"self_attn.{part}_proj.weight" for part in "qkvo"},
        **{part: f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
        "norm1": "input_layernorm.weight",
        "norm2": "post_attention_layernorm.weight",
    }
    top = {"embed": "embed_tokens.weight", "norm": "norm.weight"}
    kind, *rest = name.split(".")
    if kind == "head":
        return "lm_head.weight"
    if kind in top:
        return f"model.language_model.{top[kind]}"
    if kind == "layers":
        return f"model.language_model.layers.{rest[0]}.{inside[rest[1]]}"
    return f"model.language_adapter.{name.replace('expert.', 'experts.')}"


def segments_of(roles: str) -> Segments:
    """Segments of one row of roles."""
    return find_segments(torch.tensor([[letter == "a" for letter in roles]]))


def language_expert_model(case: Case) -> Result:
    """Logits of the language model and the guidance of its experts.

    Those of the last answer come from the engine, that decodes it behind the prompt; all others from a training sample.
    """
    case.informational("inputs.segments.*.segment_of_token", "inputs.segments.*.guidance_positions")
    model, ids = language_model(case), case.tensors["input_ids"]
    roles = [row["roles"] for row in case.inputs["segments"]]
    answers = torch.tensor([[letter == "a" for letter in row] for row in roles])
    labels = ids.masked_fill(~answers, IGNORE)
    seen: list[Tensor] = []
    first = next(iter(model.model.language_adapter.experts.values()))
    hook = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        forced = ClassicBatch(model, ids, {}, labels=labels).forward().logits
    hook.remove()
    found = [segments_of(row) for row in roles]
    guidance = [
        own[torch.arange(max(one.count for one in found)).clamp(max=len(own) - 1)]
        for own in seen[0].split([one.count for one in found])
    ]
    logits = []
    for number, (row, own) in enumerate(zip(ids, found, strict=True)):  # the last answer as it is decoded
        begin = int(own.guide_column[-1]) + 1
        sample = {"input_ids": row.tolist(), "pixel_values": []}
        decoded = engine_logits(model, sample, begin, answers=answers[number, :begin].tolist())
        logits.append(torch.cat([forced[number, : begin - 1], decoded]))
    return Result(tensors={"logits": torch.stack(logits), "guidance": torch.stack(guidance)})


def guidance_segments(case: Case) -> Iterator[Example]:
    """Segment of every token, and where guidance is read."""

    def found(roles: str) -> dict[str, Any]:
        segments = segments_of(roles)
        return {
            "roles": roles,
            "segment_of_token": segments.number.tolist(),
            "guidance_positions": segments.guide_column.tolist(),
        }

    yield from examples(found, case.inputs["roles"], "segments")


def parameter_counts(case: Case) -> Iterator[Example]:
    """Learned parameters, generated numbers and FLOPs."""

    def counts(row: Mapping[str, Any]) -> dict[str, int]:
        return golden_counts(Size(**row))

    yield from examples(counts, case.inputs["rows"], "counts")


ADAPTERS = {
    "hypernetwork_expert": hypernetwork_expert,
    "visual_expert_projector": visual_expert_projector,
    "language_expert_model": language_expert_model,
    "guidance_segments": guidance_segments,
    "parameter_counts": parameter_counts,
}
