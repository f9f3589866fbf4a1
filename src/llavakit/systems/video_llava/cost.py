"""What Video-LLaVA-7B costs at its published dimensions (spec section 12)."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llavakit.connectors.general import MLP
from llavakit.proof.cost import (
    CostReport,
    cache_bytes,
    count,
    language_model,
    module_flops,
    on_meta,
    parameters,
    prefill_flops,
    vision_model,
)
from llavakit.systems.video_llava.checkpoint import PUBLISHED
from llavakit.systems.video_llava.encoder import LanguageBindVideo, LanguageBindVideoConfig

HIDDEN = 4096
VICUNA_7B = {
    "hidden_size": HIDDEN,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def published(name: str) -> dict[str, object]:
    """Options of a published encoder."""
    return {key: value for key, value in PUBLISHED[name].items() if key != "model_type"}


def video_encoder(**changes: object) -> LanguageBindVideo:
    """LanguageBind's video encoder on the meta device, with attention that the counter sees."""
    config = LanguageBindVideoConfig(**published("LanguageBind/LanguageBind_Video_merge") | changes)
    config._attn_implementation = "eager"
    return on_meta(lambda: LanguageBindVideo(config))


def cost() -> CostReport:
    """Section 12 as a report."""
    report = CostReport("video-llava")
    image_config = CLIPVisionConfig(**published("LanguageBind/LanguageBind_Image"))
    image, video, still = vision_model(image_config), video_encoder(), video_encoder(temporal_attention=False)
    size, frames = image_config.image_size, video.config.num_frames
    clip = torch.empty(1, 3, frames, size, size, device="meta")
    image_flops = count(lambda: image(torch.empty(1, 3, size, size, device="meta"))).total
    video_flops, still_flops = (count(lambda net=net: net(clip)).total for net in (video, still))
    image_tokens = (size // image_config.patch_size) ** 2
    video_tokens = frames * (image_tokens + 1)

    group = "encoders"
    report.add("image encoder", parameters(image), "parameters", group=group)
    report.add("video encoder", parameters(video), "parameters", group=group)
    report.add("attention over time in it", parameters(video) - parameters(still), "parameters", group=group)
    report.add("one image", image_flops, "FLOPs", group=group)
    report.add(f"a clip of {frames} frames", video_flops, "FLOPs", group=group)
    report.add("attention over time in it", video_flops - still_flops, "FLOPs", group=group)

    mlp = on_meta(lambda: MLP(vision_width=image_config.hidden_size, hidden_size=HIDDEN))
    project = torch.nn.Module()
    project.forward = mlp.project
    config = LlamaConfig(**VICUNA_7B)
    llm = language_model(config)
    head = 2 * config.hidden_size * config.vocab_size
    group = "projector and language model"
    report.add("projector", parameters(mlp), "parameters", group=group)
    report.add("Vicuna-7B", parameters(llm), "parameters", group=group)
    for name, tokens in (("an image", image_tokens), (f"a clip of {frames} frames", video_tokens)):
        group = name
        projected = module_flops(project, (tokens, image_config.hidden_size)).total
        prefill = prefill_flops(llm, tokens, head=False).total + head
        report.add("visual tokens", tokens, "tokens", group=group)
        report.add("projector", projected, "FLOPs", group=group)
        report.add("prefill, logits of the last position", prefill, "FLOPs", group=group)
        encoder = image_flops if tokens == image_tokens else video_flops
        report.add("encoder, projector and prefill", encoder + projected + prefill, "FLOPs", group=group)
        report.add("cache, 16 bits a value", cache_bytes(config, tokens), "bytes", group=group)
    report.notes.append("Encoders are counted with all 24 layers; features are read before the last one.")
    return report
