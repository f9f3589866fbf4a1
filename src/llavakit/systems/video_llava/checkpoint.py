"""Video-LLaVA's published files: the classic layout with an encoder of pictures and one of video."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.checkpoints.classic import ClassicLayout, wrapped
from llavakit.checkpoints.encoders import encoder_options
from llavakit.checkpoints.fields import Fields, check_known
from llavakit.checkpoints.readback import part_values
from llavakit.errors import CheckpointError, quoted
from llavakit.model.configuration import LlavakitConfig, build_config
from llavakit.registry import PLANNERS
from llavakit.systems.video_llava.encoder_files import CLIP
from llavakit.vision.geometry import geometry_of

IMAGE_TOWER, VIDEO_TOWER = "vision_tower", "video_tower"
VIDEO_MARKS = ("<vid_start>", "<vid_end>")
VIDEO = "languagebind_video"
MEDIA = "llavakit_media"  # key of config.json in llavakit's exports alone
_VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "gelu",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "LanguageBind/LanguageBind_Image": {"model_type": "clip_vision_model", **_VIT_L},
    "LanguageBind/LanguageBind_Video_merge": {
        "model_type": VIDEO,
        **_VIT_L,
        "num_frames": 8,
        "temporal_attention": True,
    },
}


def image_views(size: int, pad: bool) -> dict[str, Any]:
    """Planner of pictures."""
    return {"type": "float_square", "size": size, "mode": "bicubic", "pad": pad}


def video_views(size: int, frames: int | None) -> dict[str, Any]:
    """Planner of clips."""
    frame = {"type": "float_square", "size": size, "mode": "bilinear", "ratio": True}
    return {"type": "clip", "frames": frames, "frame": frame}


class Published(ClassicLayout):
    """`LanguageBind/Video-LLaVA-7B`, and the projector alone (`LanguageBind/Video-LLaVA-Pretrain-7B`).

    The encoders' configurations are in repositories of their own, which config.json names; those of the published ones
    are known. Weights are taken from the checkpoint itself where it has them, as the published one does. How pictures
    and frames are cut is a literal of the authors' code; models that cut otherwise (from transformers' files) have
    it under `llavakit_media` in llavakit's exports.
    """

    system = "video-llava"
    model_types = ("llava",)
    tower_prefixes = {
        IMAGE_TOWER: "model.image_tower.image_tower.",
        VIDEO_TOWER: "model.video_tower.video_tower.",
    }
    own_names = {IMAGE_TOWER: "image_tower", VIDEO_TOWER: "video_tower"}  # folders of encoders that nobody published
    config_keys = {IMAGE_TOWER: "mm_image_tower", VIDEO_TOWER: "mm_video_tower"}

    def matches(self, raw: Mapping[str, Any], folder: Path) -> bool:
        own = "mm_image_tower" in raw or "mm_video_tower" in raw
        return raw.get("model_type") in ("llava", "llava_llama") and "text_config" not in raw and own

    # reading

    def _options(self, tower: str, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> dict[str, Any]:
        """Configuration of an encoder: from a given or named folder, else that of a published one."""
        key = self.config_keys[tower]
        named = raw.get(key)
        if not isinstance(named, str) or not named:
            raise CheckpointError(f"config.json: {key} is {quoted(named)}; llavakit reads models with both encoders")
        for folder in (self.given_folder(tower, sources), sources.get("folder", Path()) / named, Path(named)):
            options = encoder_options(folder) if folder is not None else None
            if options is not None:
                kind = options["model_type"]
                if tower == VIDEO_TOWER and kind != VIDEO:
                    raise CheckpointError(f"{folder}: is a {quoted(kind)}, {key} should name a LanguageBindVideo")
                return options
        if named in PUBLISHED:
            return dict(PUBLISHED[named])
        raise CheckpointError(
            f"config.json: {key} {quoted(named)} is neither a local folder nor a published encoder; name a folder that "
            f"holds both encoders' folders with --vision-tower; published: {', '.join(PUBLISHED)}"
        )

    def encoder_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> dict[str, Any]:
        if raw.get("mm_vision_tower") is not None:
            raise CheckpointError(
                f"config.json: mm_vision_tower is {quoted(raw['mm_vision_tower'])} beside mm_image_tower; "
                "Video-LLaVA's code reads the latter"
            )
        return self._options(IMAGE_TOWER, raw, sources)

    def extend_config(self, raw: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
        pad = raw.one_of("image_aspect_ratio", "pad", "square") == "pad"
        return {"media": {"image": {"views": image_views(encoder["image_size"], pad)}}, "template": "video_llava"}

    def read_config(self, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> LlavakitConfig:
        raw = raw if isinstance(raw, Fields) else Fields(raw)
        config = super().read_config(raw, sources)
        options = self._options(VIDEO_TOWER, raw, sources)
        encoder = build_config(options, VIDEO)
        check_known(encoder, options, f"configuration of the encoder {quoted(raw['mm_video_tower'])}")
        widths = [geometry_of(own).width for own in (config.vision_config, encoder)]
        if len(set(widths)) > 1:
            raise CheckpointError(
                f"config.json: the encoders' features have {widths[0]} and {widths[1]} channels, and one projector"
            )
        frames = encoder.num_frames if encoder.temporal_attention else None
        video: dict[str, Any] = {"encoder": VIDEO_TOWER, "views": video_views(encoder.image_size, frames)}
        if raw.get("mm_use_im_start_end"):
            video["arrange"] = wrapped(None, sources.get("folder"), sources.get("base"), marks=VIDEO_MARKS)
        config.media = self._own_media(raw, {**config.media, "video": video})
        config.extra_encoders = {
            VIDEO_TOWER: {"config": encoder.to_dict(), "layer": config.vision_feature_layer, "strategy": "full"}
        }
        config.extras = {"processor": {"sampling": {"type": "uniform", "frames": encoder.num_frames}}}
        return config

    @staticmethod
    def _own_media(raw: Fields, media: dict[str, Any]) -> dict[str, Any]:
        """The planners of an export that cuts otherwise than the authors' code."""
        own = raw.section(MEDIA)
        views = {name: own.section(name) for name in media if name in own}
        own.finish({})
        return {
            name: section | ({"views": dict(views[name])} if name in views else {}) for name, section in media.items()
        }

    def given_folder(self, tower: str, sources: Mapping[str, Path]) -> Path | None:
        """The folder that is named with --vision-tower, if it is this encoder's, or the one in it."""
        given = sources.get("encoder")
        if given is None:
            return None
        inside = given / self._published_name(tower)
        if inside.is_dir():
            return inside
        options = encoder_options(given)
        fits = options is not None and (options["model_type"] == VIDEO) == (tower == VIDEO_TOWER)
        return given if fits else None

    @staticmethod
    def _published_name(tower: str) -> str:
        return next(name for name, own in PUBLISHED.items() if (own["model_type"] == VIDEO) == (tower == VIDEO_TOWER))[
            len("LanguageBind/") :
        ]

    def tower_folder(self, tower: str, raw: Mapping[str, Any], sources: Mapping[str, Path]) -> Path:
        return self.given_folder(tower, sources) or Path(str(raw[self.config_keys[tower]]))

    # writing

    def expresses(self, config: LlavakitConfig) -> bool:
        return not self.objections(config)

    def objections(self, config: LlavakitConfig) -> list[str]:
        """What Video-LLaVA's files have no place for."""
        found = []
        if config.connector["type"] != "mlp" or config.extra_connectors:
            found.append("connector: Video-LLaVA's files hold one mlp for both encoders")
        if config.text_config.model_type != "llama" or config.language_adapter is not None:
            found.append("text_config: Video-LLaVA's files hold a llama")
        video = config.extra_encoders.get(VIDEO_TOWER)
        if list(config.extra_encoders) != [VIDEO_TOWER] or (video.get("config") or {}).get("model_type") != VIDEO:
            return [*found, f"extra_encoders: Video-LLaVA's files hold one {VIDEO} called {VIDEO_TOWER}"]
        if getattr(config.vision_config, "model_type", None) != "clip_vision_model":
            return [*found, "vision_config: Video-LLaVA's files hold a clip_vision_model"]
        if video.get("strategy") != "full" or video.get("layer", -2) != config.vision_feature_layer:
            found.append(f"extra_encoders.{VIDEO_TOWER}: its features are of the pictures' layer, with class tokens")
        if set(config.media) != {"image", "video"}:
            found.append("media: Video-LLaVA's files are of models for images and videos")
        elif config.media["video"].get("views", {}).get("type") != "clip":
            found.append("media.video.views: Video-LLaVA's files are of models that read clips")
        return found

    def _names(self, config: LlavakitConfig) -> dict[str, str]:
        """What config.json calls each encoder: a published name, or a folder beside it."""
        found = {}
        for tower, own_name in self.own_names.items():
            own = config.encoder_config(tower)[0].to_dict()
            same = (name for name, known in PUBLISHED.items() if all(own.get(key) == known[key] for key in known))
            found[tower] = next(same, own_name)
        return found

    def write_config(self, config: LlavakitConfig) -> dict[str, Any]:
        names, video = self._names(config), config.encoder_config(VIDEO_TOWER)[0]
        raw = super().write_config(config)
        raw.pop("mm_vision_tower")
        pad = bool(config.media["image"]["views"].get("pad"))
        usual = {
            "image": image_views(config.vision_config.image_size, pad),
            "video": video_views(video.image_size, video.num_frames if video.temporal_attention else None),
        }
        views = {name: section["views"] for name, section in config.media.items()}
        other = {name: own for name, own in views.items() if self._works(own) != self._works(usual[name])}
        return raw | {
            "mm_image_tower": names[IMAGE_TOWER],
            "mm_video_tower": names[VIDEO_TOWER],
            "image_aspect_ratio": "pad" if pad else "square",
            **({MEDIA: other} if other else {}),
        }

    @staticmethod
    def _works(views: Mapping[str, Any]) -> Any:
        """What a planner works with, however its options are spelt."""
        return part_values(PLANNERS.build(dict(views)))

    def write_parts(self, config: LlavakitConfig, folder: Path) -> None:
        """Configurations of encoders that nobody published, in LanguageBind's form, in folders of their own."""
        for tower, name in self._names(config).items():
            if name != self.own_names[tower]:
                continue
            own = config.encoder_config(tower)[0].to_dict()
            vision = {key: own[key] for key in CLIP if own.get(key) is not None}
            vision |= {"add_time_attn": bool(own.get("temporal_attention", False)), "lora_r": 0}
            vision["num_frames"] = own.get("num_frames", 1)
            kind = "LanguageBindVideo" if tower == VIDEO_TOWER else "LanguageBindImage"
            (folder / name).mkdir()
            text = json.dumps({"model_type": kind, "vision_config": vision}, indent=2)
            (folder / name / "config.json").write_text(text + "\n", encoding="utf-8")
