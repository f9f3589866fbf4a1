"""Encoders of a store: texts and pictures to vectors of one space.

Any model of transformers with text and image features (CLIP, SigLIP, AltCLIP, ...) is one, and any text encoder
(BERT, E5, a sentence-transformers folder), whose token states are averaged or whose first one is taken. A system may
register another under the `model_type` of its config.json in `llavakit.registry.STORE_ENCODERS`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llavakit.errors import CheckpointError, UserError, quoted

BATCH = 32  # texts or pictures that are encoded together
POOLING = ("mean", "first")


class StoreEncoder(ABC):
    """Texts and pictures to vectors.

    Attributes:
        name: What messages call it.
        identity: Digest of its weights and settings; vectors of encoders that differ in it cannot be compared.
        dimension: Length of a vector.
    """

    name: str
    identity: str
    dimension: int

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors float32 [texts, dimension]; a text that is too long is cut at the encoder's length.

        Raises:
            UserError: If the encoder has no text side.
        """

    @abstractmethod
    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Vectors float32 [images, dimension].

        Raises:
            UserError: If the encoder has no image side.
        """

    def describe(self) -> dict[str, str]:
        """What a store notes of the encoder that made it."""
        return {"name": self.name, "identity": self.identity}


class TransformersEncoder(StoreEncoder):
    """A model of transformers.

    Args:
        folder: The model's folder.
        name: What messages call it; default the folder.
        device, dtype: As `llavakit.load` takes them.
        pooling: `mean` of the token states or the `first` one, for a text encoder; default what the folder's
            `1_Pooling/config.json` says, or `mean`.
    """

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        pooling: str | None = None,
    ) -> None:
        import torch
        from transformers import AutoModel

        from llavakit.checkpoints.identity import model_identity
        from llavakit.generation.load import check_device, check_dtype

        if pooling is not None and pooling not in POOLING:
            raise UserError(f"pooling {quoted(pooling)}: must be {' or '.join(POOLING)}")
        self.folder, self.name = folder, name or str(folder)
        self.device = check_device(device)
        self._torch = torch
        try:
            with _quiet():
                model = AutoModel.from_pretrained(
                    folder, dtype=check_dtype(dtype, self.device), trust_remote_code=False
                )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{folder}: not an encoder that transformers can load ({reason})") from None
        self._model = model.to(self.device).eval().requires_grad_(False)
        self.paired = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
        self.pooling = None if self.paired else pooling or _folder_pooling(folder)
        self._fixed_length = model.config.model_type.startswith("siglip")  # its texts are padded to full length
        self._tokenizer: Any = None
        self._processor: Any = None
        content = json.dumps([model_identity(folder), self.pooling]).encode()
        self.identity = hashlib.sha256(content).hexdigest()
        self.dimension = self.texts(["a"]).shape[1]

    def describe(self) -> dict[str, str]:
        return super().describe() | ({} if self.pooling is None else {"pooling": self.pooling})

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        tokenizer = self._get_tokenizer()

        def encode(batch: Sequence[str]) -> Any:
            padding = "max_length" if self._fixed_length else True
            inputs = tokenizer(
                list(batch), padding=padding, truncation=True, max_length=self._longest(), return_tensors="pt"
            ).to(self.device)
            if self.paired:
                return _pooled(self._model.get_text_features(**inputs))
            states = self._model(**inputs).last_hidden_state
            if self.pooling == "first":
                return states[:, 0]
            mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
            return (states * mask).sum(1) / mask.sum(1).clamp(min=1)

        return self._run(texts, encode)

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        if not self.paired:
            raise UserError(f"{self.name}: encodes texts alone; pictures need an encoder such as CLIP or SigLIP")
        processor = self._get_processor()

        def encode(batch: Sequence[Image.Image]) -> Any:
            pictures = [image.convert("RGB") for image in batch]
            inputs = processor(images=pictures, return_tensors="pt").to(self.device)
            return _pooled(self._model.get_image_features(pixel_values=inputs["pixel_values"].to(self._model.dtype)))

        return self._run(images, encode)

    def _run(self, items: Sequence[Any], encode: Any) -> np.ndarray:
        parts = []
        with self._torch.inference_mode():
            for batch in _batches(items):
                parts.append(encode(batch).float().cpu().numpy())
        return np.concatenate(parts) if parts else np.empty((0, self.dimension), np.float32)

    def _longest(self) -> int:
        config = getattr(self._model.config, "text_config", self._model.config)
        longest = min(self._tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512))
        # RoBERTa's positions begin behind its padding id.
        return longest - 2 if getattr(config, "model_type", "").endswith("roberta") and longest > 512 else longest

    def _get_tokenizer(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise CheckpointError(f"{self.folder}: its tokenizer cannot be loaded ({reason})") from None
        return self._tokenizer

    def _get_processor(self) -> Any:
        if self._processor is None:
            from transformers import AutoImageProcessor

            try:
                self._processor = AutoImageProcessor.from_pretrained(self.folder, trust_remote_code=False)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise CheckpointError(f"{self.folder}: its image processor cannot be loaded ({reason})") from None
        return self._processor


def load_encoder(model: str | Path, **options: Any) -> StoreEncoder:
    """An encoder from a folder or hub id.

    Args:
        model: The folder or hub id.
        options: `device`, `dtype`, and what the encoder takes besides (`pooling`).

    Raises:
        CheckpointError: If it is no encoder.
    """
    from llavakit.checkpoints.files import read_json
    from llavakit.checkpoints.opening import local_folder
    from llavakit.registry import STORE_ENCODERS

    folder = local_folder(model)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no config.json; an encoder is a folder in transformers' form")
    kind = read_json(path).get("model_type")
    made = STORE_ENCODERS.get(kind) if kind in STORE_ENCODERS else TransformersEncoder
    try:
        return made(folder, str(folder.resolve()) if Path(model).expanduser().is_dir() else str(model), **options)
    except TypeError as error:
        raise UserError(f"{model}: {error}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bar, which standard error of a command has no place for."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _pooled(output: Any) -> Any:
    """The features of an output of transformers, which older versions return as a tensor."""
    return getattr(output, "pooler_output", output)


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(items), BATCH):
        yield items[begin : begin + BATCH]


def _folder_pooling(folder: Path) -> str:
    """The pooling that a sentence-transformers folder names.

    Raises:
        UserError: If it is neither of `POOLING`.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    from llavakit.data.strict_json import read_json

    found: Mapping[str, Any] = read_json(path, kind=dict, error=CheckpointError)
    if found.get("pooling_mode_cls_token"):
        return "first"
    if found.get("pooling_mode_mean_tokens"):
        return "mean"
    raise CheckpointError(f"{path}: names a pooling that is neither the mean nor the first token")
