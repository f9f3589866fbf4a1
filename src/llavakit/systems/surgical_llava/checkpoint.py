"""Video-ChatGPT's published files, the layout of Surgical-LLaVA: LLaVA's first layout with clips between two tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoints.classic import ClassicLayout, unwrapped
from llavakit.checkpoints.fields import Fields
from llavakit.checkpoints.files import LazyState, read_file, read_json
from llavakit.checkpoints.text import special_ids, tokenizer_folder
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import LlavakitConfig

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
MARKS = ("<vid_patch>", "<vid_start>", "<vid_end>")  # added to the end of the vocabulary in this order
TOKEN_KEYS = ("vid_patch_token", "vid_start_token", "vid_end_token")
CONNECTOR = "spatio_temporal"
POOLING = {"temporal_slots": 100, "precision": "float16"}
EMBEDDINGS = "model.embed_tokens.weight"
PUBLISHED = {
    "model_type": "VideoChatGPT",
    "use_mm_proj": True,
    "mm_vision_tower": "openai/clip-vit-large-patch14",
    "mm_hidden_size": 1024,
    "mm_use_vid_start_end": True,
}
SAMPLING = {"type": "midpoints", "frames": 100}


def media_of(size: int, arrange: Mapping[str, Any]) -> dict[str, Any]:
    """`config.media` for encoder inputs of `size` pixels; an image is a clip of one frame."""
    view = {"type": "squash", "size": size, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    return {
        "image": {"views": view, "arrange": dict(arrange)},
        "video": {"views": {"type": "frames", "nearest": size, "frame": view}, "arrange": dict(arrange)},
    }


class VideoChatGPT(ClassicLayout):
    """Folders of the model type `VideoChatGPT`, and the authors' `video_chatgpt-7B.bin` on top of a language model.

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

    def trained_only(self, folder: Path) -> LazyState | None:
        file = _trained_file(folder)
        return super().trained_only(folder) if file is None else read_file(file)

    def implied_config(self, folder: Path, base: Path | None) -> dict[str, Any] | None:
        file = _trained_file(folder)
        if file is None:
            return None
        if base is None:
            raise CheckpointError(
                f"{folder}: holds projector and token embeddings alone ({file.name}); name the folder of the language "
                "model with --base"
            )
        below = read_json(base / "config.json")
        text = {key: value for key, value in below.items() if not key.startswith(("mm_", "vision_", "use_mm"))}
        rows = len(read_file(file)[EMBEDDINGS])
        return text | PUBLISHED | {"vocab_size": rows}

    def read(
        self, folder: Path, raw: Mapping[str, Any], sources: Mapping[str, Path]
    ) -> tuple[LlavakitConfig, LazyState]:
        """As in the base class; tokens without rows in the files get the mean of the others, as the original begins."""
        config, state = super().read(folder, raw, sources)
        if self.trained_only(folder) is not None:
            rows = config.text_config.vocab_size
            for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
                if name in state:
                    state = state.changed(name, lambda table: _grown(table, rows))
        return config, state

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


def _trained_file(folder: Path) -> Path | None:
    """The file that the authors published: projector and embeddings, `video_chatgpt-7B.bin`."""
    if (folder / "config.json").is_file():
        return None
    return next((file for suffix in ("bin", "safetensors") for file in folder.glob(f"video_chatgpt*.{suffix}")), None)


def _grown(table: Tensor, rows: int) -> Tensor:
    """A table [tokens, width] with its mean as further rows."""
    return torch.cat([table, table.mean(0, keepdim=True).expand(rows - len(table), -1)])


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
