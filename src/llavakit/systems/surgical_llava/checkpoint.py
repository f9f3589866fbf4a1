"""Video-ChatGPT's published files, the layout of Surgical-LLaVA: LLaVA's first layout with clips between two tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoints.classic import ClassicLayout, unwrapped
from llavakit.checkpoints.fields import Fields
from llavakit.checkpoints.text import special_ids, tokenizer_folder
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import LlavakitConfig

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
MARKS = ("<vid_patch>", "<vid_start>", "<vid_end>")  # added to the end of the vocabulary in this order
TOKEN_KEYS = ("vid_patch_token", "vid_start_token", "vid_end_token")
CONNECTOR = "spatio_temporal"
POOLING = {"temporal_slots": 100, "precision": "float16"}
SAMPLING = {"type": "midpoints", "frames": 100}


def media_of(size: int, arrange: Mapping[str, Any]) -> dict[str, Any]:
    """`config.media` for encoder inputs of `size` pixels; an image is a clip of one frame."""
    view = {"type": "squash", "size": size, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    return {
        "image": {"views": view, "arrange": dict(arrange)},
        "video": {"views": {"type": "frames", "nearest": size, "frame": view}, "arrange": dict(arrange)},
    }


class VideoChatGPT(ClassicLayout):
    """Folders of the model type `VideoChatGPT`.

    Ids of the three tokens are in no published config.json: they are read from the tokenizer's files, or else are the
    last three of the vocabulary, where the original adds them. llavakit's exports write them, and the numbers of the
    pooling under `spatio_temporal_pooling`.
    """

    system = "surgical-llava"
    model_types = ("VideoChatGPT",)
    inert = (
        ClassicLayout.inert
        | {"sep_video_conv_front": "says how training records were written"}
        | dict.fromkeys(("mm_use_im_start_end", "image_aspect_ratio"), "concerns images of the base model, not clips")
    )

    def wraps_images(self, raw: Fields) -> bool:
        return False

    def connector(self, raw: Fields) -> dict[str, Any]:
        raw.one_of("mm_projector_type", "linear")
        own = raw.section("spatio_temporal_pooling")
        own.one_of("order", "frames_then_patches")
        found = {key: own.get(key, default) for key, default in POOLING.items()}
        own.finish({})
        return {"type": CONNECTOR, "slots": found["temporal_slots"], "precision": found["precision"], "depth": 1}

    def read_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> LlavakitConfig:
        raw = raw if isinstance(raw, Fields) else Fields(raw)
        config = super().read_config(raw, sources)
        marks = _token_ids(raw, sources)
        config.image_token_id = marks[0]
        if raw.get("mm_use_vid_start_end", True):
            arrange = {"type": "wrapped", "before": [marks[1]], "after": [marks[2]]}
            for options in config.media.values():
                options["arrange"] = dict(arrange)
        return config

    def extend_config(self, raw: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "media": media_of(encoder["image_size"], {"type": "flat"}),
            "template": "video_chatgpt_v1",
            "extras": {"processor": {"sampling": SAMPLING}},
        }

    def expresses(self, config: LlavakitConfig) -> bool:
        arrange = (config.media or {}).get("video", {}).get("arrange", {"type": "flat"})
        return (
            config.connector["type"] == CONNECTOR
            and config.connector.get("depth", 1) == 1
            and config.text_config.model_type == "llama"
            and config.language_adapter is None
            and unwrapped(arrange) == {"type": "flat"}
        )

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        arrange = config.media["video"].get("arrange", {"type": "flat"})
        own: dict[str, Any] = {
            "architectures": ["VideoChatGPTLlamaForCausalLM"],
            "mm_use_vid_start_end": arrange["type"] == "wrapped",
            "vid_patch_token": config.image_token_id,
            "spatio_temporal_pooling": {
                "temporal_slots": config.connector.get("slots", POOLING["temporal_slots"]),
                "precision": config.connector.get("precision", POOLING["precision"]),
                "order": "frames_then_patches",
            },
        }
        if arrange["type"] == "wrapped":
            own |= {"vid_start_token": arrange["before"][0], "vid_end_token": arrange["after"][0]}
        fields = super().write_config(config) | own
        fields.pop("mm_use_im_start_end")
        return fields


def _token_ids(raw: Fields, sources: Mapping[str, Path]) -> list[int]:
    """Ids of the patch token and, if clips stand between them, of the start and the end token.

    Raises:
        CheckpointError: If config.json names some of them alone.
    """
    count = len(MARKS) if raw.get("mm_use_vid_start_end", True) else 1
    given = [raw.get(key) for key in TOKEN_KEYS]
    if any(value is not None for value in given):
        for key, value in zip(TOKEN_KEYS[:count], given, strict=False):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise CheckpointError(f"{raw.where}: {key} is {quoted(value)}, it should be the id of a token")
        return given[:count]
    folders = (sources.get("folder"), sources.get("base"))
    known = special_ids(next((folder for folder in folders if tokenizer_folder(folder)), Path()))
    if all(mark in known for mark in MARKS[:count]):
        return [known[mark] for mark in MARKS[:count]]
    vocabulary = raw.get("vocab_size", 32000)
    return list(range(vocabulary - count, vocabulary))
