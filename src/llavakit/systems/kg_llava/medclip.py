"""MedCLIP: the medical encoder of texts and pictures by which triplets are found, and its picture side as an encoder.

The published file is one `pytorch_model.bin` without a configuration; `llavakit prepare medclip` makes a folder of it
that stores and recipes name. Vectors of texts are the mean over tokens of three hidden states; the original's mean
takes padding in, and KG-LLaVA passes no attention mask either (`mask=False`), so that a vector depends on its batch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedConfig, PreTrainedModel, SwinConfig, SwinModel

from llavakit.checkpoints.encoder_names import encoder_to_disk, encoder_to_memory
from llavakit.checkpoints.files import LazyState, read_file, read_folder, read_json
from llavakit.checkpoints.identity import model_identity
from llavakit.data.preparation import Left
from llavakit.errors import CheckpointError, UserError, quoted
from llavakit.generation.load import check_device, check_dtype
from llavakit.retrieval.encoder import StoreEncoder
from llavakit.views.image import ImagePlanner
from llavakit.views.pixels import centre_crop
from llavakit.views.plan import MediaSize, Plan, View

MEAN, STD = 0.5862785803043838, 0.27950088968644304
WIDTH = 512
LONGEST = 77  # tokens of a caption
STATES = (1, 2, -1)  # hidden states whose means are averaged
TEXT = {"vocab_size": 28996}  # Bio_ClinicalBERT is BERT-base with the cased vocabulary
VISION = {"image_size": 224, "patch_size": 4, "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
VISION |= {"window_size": 7}
_DEAD = re.compile(r"embeddings\.position_ids$|relative_position_index$|attn_mask$")
_SIDES = ("text_model.model.", "vision_model.model.")
BATCH = 64


class GreySquare(ImagePlanner):
    """A grey picture in the middle of a black square of at least the encoder's side, scaled to that side.

    Args:
        crop: Side of the middle square that is kept, `size` if None.
        background: Grey value around the picture.
    """

    def __init__(
        self,
        *,
        size: int = 224,
        crop: int | None = None,
        background: int = 0,
        image_mean: Sequence[float] = (MEAN,) * 3,
        image_std: Sequence[float] = (STD,) * 3,
        **options: Any,
    ) -> None:
        super().__init__(size=size, image_mean=image_mean, image_std=image_std, **options)
        self.crop, self.background = size if crop is None else crop, background

    def plan(self, size: MediaSize) -> Plan:
        return Plan("image", size, (View(self.crop, self.crop),))

    def render(self, image: Image.Image, plan: Plan) -> list[Image.Image]:
        side = max(self.size, *image.size)
        square = Image.new("L", (side, side), self.background)
        square.paste(image.convert("L"), ((side - image.width) // 2, (side - image.height) // 2))
        square = square.resize((self.size, self.size), self.resample).convert("RGB")
        return [centre_crop(square, self.crop, self.crop)]


class _Side(nn.Module):
    """A model with its projection, under the published names."""

    def __init__(self, model: nn.Module, width: int, projection: int) -> None:
        super().__init__()
        self.model = model
        self.projection_head = nn.Linear(width, projection, bias=False)


class MedClip(nn.Module):
    """Both sides; vectors have unit length.

    Args:
        text, vision: Options of BERT and Swin.
        projection: Length of a vector.
    """

    def __init__(self, text: dict[str, Any], vision: dict[str, Any], projection: int = WIDTH) -> None:
        super().__init__()
        self.text_config, self.vision_config = BertConfig(**text), SwinConfig(**vision)
        self.text_model = _Side(BertModel(self.text_config), self.text_config.hidden_size, projection)
        self.vision_model = _Side(SwinModel(self.vision_config), self.vision_config.hidden_size, projection)
        self.logit_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))

    def load(self, state: LazyState) -> MedClip:
        """Take the tensors of the published file.

        Raises:
            CheckpointError: If one is missing, left over, or has another shape.
        """
        state = state.renamed(lambda name: None if _DEAD.search(name) else name)
        state = encoder_to_memory(self.vision_config, state, _SIDES[1])
        own = {name: tensor for name, tensor in self.state_dict().items() if not _DEAD.search(name)}
        wrong = sorted(set(own) ^ set(state))
        if wrong:
            where = "missing" if wrong[0] in own else "has no place"
            raise CheckpointError(f"MedCLIP: tensor {quoted(wrong[0])} {where}")
        tensors = {name: state[name] for name in own}
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                shapes = f"{list(tensor.shape)}, it should be {list(own[name].shape)}"
                raise CheckpointError(f"MedCLIP: tensor {quoted(name)} has the shape {shapes}")
        self.load_state_dict(tensors, strict=False, assign=True)
        return self.eval().requires_grad_(False)

    def published_state(self) -> dict[str, Tensor]:
        """Tensors under their published names."""
        state = {name: tensor for name, tensor in self.state_dict().items() if not _DEAD.search(name)}
        return encoder_to_disk(self.vision_config, state, _SIDES[1])

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, mask: bool = False) -> Tensor:
        """Unit vectors [texts, width] of ids [texts, length].

        Args:
            attention_mask: What the tokens may look at; None for everything, padding included.
            mask: Average over the tokens that the mask shows only, instead of over all.
        """
        states = self.text_model.model(
            input_ids, attention_mask=attention_mask, output_hidden_states=True
        ).hidden_states
        chosen = torch.stack([states[number] for number in STATES])  # [states, texts, length, width]
        if mask and attention_mask is not None:
            shown = attention_mask.to(chosen.dtype)[None, :, :, None]
            means = (chosen * shown).sum(2) / shown.sum(2).clamp(min=1)
        else:
            means = chosen.mean(2)
        return _unit(self.text_model.projection_head(means.mean(0)))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Unit vectors [pictures, width] of pixels [pictures, 1 or 3, height, width]; one channel counts as three."""
        if pixel_values.shape[1] == 1:
            pixel_values = pixel_values.expand(-1, 3, -1, -1)
        return _unit(self.vision_model.projection_head(self.vision_model.model(pixel_values).pooler_output))

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosines [pictures, texts] of unit vectors."""
        return self.logit_scale.exp() * images @ texts.T


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def read_medclip(folder: Path) -> MedClip:
    """MedCLIP of a folder that `llavakit prepare medclip` wrote.

    Raises:
        CheckpointError: If it is none.
    """
    raw = read_json(folder / "config.json")
    for key in ("text_config", "vision_config"):
        if not isinstance(raw.get(key), dict):
            raise CheckpointError(f"{folder / 'config.json'}: {key} is {quoted(raw.get(key))}, it should be an object")
    net = MedClip(raw["text_config"], raw["vision_config"], raw.get("projection_dim", WIDTH))
    return net.load(read_folder(folder))


class MedClipEncoder(StoreEncoder):
    """MedCLIP for stores.

    Args:
        folder: From `llavakit prepare medclip`.
        mask: See `kg_datastore`.
    """

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        mask: bool = True,
    ) -> None:
        from transformers import AutoTokenizer

        self.name, self.mask, self.device = name or str(folder), mask, check_device(device)
        self.net = read_medclip(folder).to(self.device, check_dtype(dtype, self.device))
        self.dimension = self.net.text_model.projection_head.out_features
        self.identity = hashlib.sha256(f"{model_identity(folder)} {mask}".encode()).hexdigest()
        self._views = GreySquare(size=self.net.vision_config.image_size)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{folder}: its tokenizer cannot be loaded ({reason})") from None

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        longest = min(LONGEST, self.net.text_config.max_position_embeddings)
        parts = []
        for begin in range(0, len(texts), 256):  # the batch decides unmasked vectors, so it is the original's
            some = list(texts[begin : begin + 256])
            encoded = self._tokenizer(some, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            shown = encoded["attention_mask"].to(self.device) if self.mask else None
            with torch.inference_mode():
                vectors = self.net.encode_text(encoded["input_ids"].to(self.device), shown, mask=self.mask)
            parts.append(vectors.float().cpu().numpy())
        return np.concatenate(parts) if parts else np.empty((0, self.dimension), np.float32)

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        parts = []
        for begin in range(0, len(images), BATCH):
            views = [self._pixels(image) for image in images[begin : begin + BATCH]]
            with torch.inference_mode():
                vectors = self.net.encode_image(
                    torch.from_numpy(np.stack(views)).to(self.device, self.net.logit_scale.dtype)
                )
            parts.append(vectors.float().cpu().numpy())
        return np.concatenate(parts) if parts else np.empty((0, self.dimension), np.float32)

    def _pixels(self, image: Image.Image) -> np.ndarray:
        plan = self._views.plan(MediaSize(1, image.height, image.width))
        return self._views.cut(image, plan)[0][:1]


@strict
class MedClipVisionConfig(PreTrainedConfig):
    """Configuration of `MedClipVision`.

    Args:
        swin: Options of Swin.
        projection_dim: Length of the projected vector.
        pooled: Whether the one feature of a picture is the projected vector; otherwise the tokens of the last layer.
    """

    model_type = "medclip_vision"

    swin: dict | None = None
    projection_dim: int = WIDTH
    pooled: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.swin = dict(VISION) if self.swin is None else self.swin
        super().__post_init__(**kwargs)

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return self.swin.get("image_size", 224)

    @property
    def feature_stride(self) -> tuple[int, int, int]:
        """Pixels per feature."""
        if self.pooled:
            return (1, self.image_size, self.image_size)
        stride = self.swin.get("patch_size", 4) * 2 ** (len(self.swin.get("depths", VISION["depths"])) - 1)
        return (1, stride, stride)

    prefix_tokens = 0

    @property
    def feature_width(self) -> int:
        """Channels of a feature."""
        return self.projection_dim if self.pooled else SwinConfig(**self.swin).hidden_size


class MedClipVision(PreTrainedModel):
    """MedCLIP's picture side as an encoder: one vector of unit length per picture, or the tokens of Swin."""

    config_class = MedClipVisionConfig
    base_model_prefix = "medclip_vision"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: MedClipVisionConfig) -> None:
        super().__init__(config)
        self.model = SwinModel(SwinConfig(**config.swin))
        self.projection_head = nn.Linear(self.model.config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    def features(self, pixel_values: Tensor, layer: int | Sequence[int], strategy: str = "default") -> Tensor:
        """[views, 1, projection] or [views, cells, width]; both sit above the last layer, which is the only one."""
        found = self.model(pixel_values)
        if not self.config.pooled:
            return found.last_hidden_state
        return _unit(self.projection_head(found.pooler_output))[:, None]

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """The features."""
        return self.features(pixel_values, -1)


def medclip(source: Path, output: Path, bad: Left, *, tokenizer: str) -> dict[str, Any]:
    """A folder of MedCLIP's published `pytorch_model.bin` (the ViT one), with a tokenizer and a configuration.

    Args:
        tokenizer: Folder of Bio_ClinicalBERT's tokenizer.
    """
    from transformers import AutoTokenizer

    file = source / "pytorch_model.bin" if source.is_dir() else source
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; MedCLIP is published as pytorch_model.bin")
    if output.exists():
        raise UserError(f"{output}: exists already; name a new folder")
    net = MedClip(TEXT, VISION).load(read_file(file))
    loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    output.mkdir(parents=True)
    loaded.save_pretrained(output)
    return {"tensors": write_medclip(net, output)}


def write_medclip(net: MedClip, folder: Path) -> int:
    """Configuration and tensors of MedCLIP; returns how many tensors."""
    state = {name: tensor.contiguous() for name, tensor in net.published_state().items()}
    save_file(state, folder / "model.safetensors")
    config = {"model_type": "medclip", "projection_dim": net.text_model.projection_head.out_features}
    config |= {"text_config": _options(net.text_config), "vision_config": _options(net.vision_config)}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return len(state)


def _options(config: PreTrainedConfig) -> dict[str, Any]:
    return config.to_diff_dict()
