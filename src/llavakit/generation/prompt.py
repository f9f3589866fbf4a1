"""A request's prompt on its way into the decoder: media to visual vectors (each computed once), ids to embeddings.

Visual vectors are kept by the content of the media item, so that a picture that is asked about twice is encoded once. A
connector that reads the prompt gives other vectors for every prompt; then the encoder's features are kept instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llavakit.connectors.base import tokens_in
from llavakit.errors import UserError
from llavakit.generation.cache import ByteBounded, content_digest, prompt_keys
from llavakit.generation.request import Request
from llavakit.language.adapter import PrefixKeys
from llavakit.model.prompt import PromptInfo
from llavakit.model.routes import MODALITIES
from llavakit.model.visuals import gather_media, run_encoders, view_jobs
from llavakit.splice.scatter import scatter


@dataclass
class MediaItem:
    """One media item of a request: modality, plan, views, and a digest of its content."""

    modality: str
    plan: Any
    views: list[Tensor]
    size: Tensor | None
    regions: Tensor | None
    digest: bytes
    tokens: int


@dataclass
class Prompt:
    """A prompt before the decoder.

    Attributes:
        ids: Expanded ids; empty if the request gave embeddings only.
        length: Positions.
        keys: Content keys [length] for prefix reuse, None if its states belong to this prompt alone.
        media: The media, in prompt order.
        embeds: The whole embedded prompt [1, length, hidden] if it had to be computed or was given, else None.
        visual: With `embeds`: True at visual positions [1, length], or None.
        info: What connectors and adapters may know beside ids and media.
        prefix: Keys and more of an adapter whose states depend on more than what lies in front of them.
    """

    ids: list[int]
    length: int
    keys: np.ndarray | None
    media: list[MediaItem]
    embeds: Tensor | None = None
    visual: Tensor | None = None
    info: PromptInfo | None = None
    prefix: PrefixKeys | None = None

    def keys_with(self, reply: Sequence[int]) -> np.ndarray:
        """Keys of the prompt and of reply tokens behind it."""
        ids = np.array(reply, dtype=np.int64)
        return np.concatenate([self.keys, ids]) if self.prefix is None else self.prefix.with_reply(ids)

    def resume(self, known: int) -> int:
        """Where computing begins if the states of the first `known` positions are there."""
        return known if self.prefix is None else int(self.prefix.resume[known])


class PromptReader:
    """Reads requests for one model.

    Args:
        core: The `LlavakitModel`.
        feature_bytes: Most bytes of visual vectors to keep.
    """

    def __init__(self, core: Any, feature_bytes: int) -> None:
        self.core = core
        self.features = ByteBounded(feature_bytes)
        self.encoded = 0  # media that went through an encoder, as opposed to those that were remembered

    def read(self, request: Request) -> Prompt:
        """The prompt of a request; encoders run only if a connector has to see the prompt.

        Raises:
            UserError: If ids and media do not fit together.
        """
        answers = None
        if request.answers is not None:
            answers = torch.as_tensor(request.answers, device=self.core.device)[None].bool()
        prompt = self._read(request, answers)
        prompt.info = PromptInfo(answers, prompt.length - request.generated)
        adapter = self.core.language_adapter
        if adapter is not None and prompt.keys is not None:
            own = np.zeros(prompt.length, dtype=bool)
            if answers is not None:
                own[: answers.shape[1]] = answers[0].cpu().numpy()
            own[prompt.info.length :] = True
            prompt.prefix = adapter.prefix_keys(prompt.keys, own)
            prompt.keys = None if prompt.prefix is None else prompt.prefix.keys
        return prompt

    def _read(self, request: Request, answers: Tensor | None) -> Prompt:
        core, device = self.core, self.core.device
        ids = request.ids()
        image_token = core.config.image_token_id
        if request.inputs_embeds is not None:
            embeds = request.inputs_embeds.to(device, core.dtype).unsqueeze(0)
            visual = torch.tensor([ids], device=device) == image_token if ids else None
            return Prompt(ids, embeds.shape[1], None, [], embeds, visual)
        media = self._media(request)
        if not media and not core.reads_blank_image:
            return Prompt(ids, len(ids), np.array(ids, dtype=np.int64), [])
        placeholders, tokens = ids.count(image_token), sum(item.tokens for item in media)
        if placeholders != tokens:
            raise UserError(
                f"request: input_ids hold {placeholders} visual positions (id {image_token}), "
                f"but the {len(media)} media need {tokens}"
            )
        keys = prompt_keys(ids, image_token, [(item.tokens, item.digest) for item in media])
        if not core.reads_prompt:
            return Prompt(ids, len(ids), keys, media)
        input_ids = torch.tensor([ids], device=device)
        prompt = core.read_prompt(
            input_ids,
            info=PromptInfo(answers, len(ids) - request.generated),
            digests=[item.digest for item in media],
            memory=self.features,
        )
        visuals = self._visuals(media) if media else None
        embeds, visual, _ = core.embed(input_ids, visuals=visuals, prompt=prompt)
        if prompt.changed is None:
            return Prompt(ids, len(ids), None, media, embeds, visual)
        # an embedding that a connector changed depends on every media item, also on those that come later
        changed = prompt.changed[0].cpu().numpy()
        salt = int.from_bytes(hashlib.blake2b(b"".join(prompt.digests), digest_size=7).digest(), "little")
        keys[changed] = -1 - (salt ^ keys[changed])
        return Prompt(ids, len(ids), keys, media, embeds, visual)

    def embed(self, prompt: Prompt, start: int = 0) -> Tensor:
        """Embeddings from a position on, [1, length - start, hidden]; encodes what these positions need."""
        if prompt.embeds is not None:
            return prompt.embeds[:, start:]
        ids = torch.tensor([prompt.ids[start:]], device=self.core.device)
        embeds = self.core.embed_ids(ids)
        if not prompt.media:
            return embeds
        mask = ids == self.core.config.image_token_id
        wanted = int(mask.sum())
        if not wanted:
            return embeds
        vectors = torch.cat(self.vectors(prompt.media))
        return scatter(embeds, mask, vectors[len(vectors) - wanted :])

    def vectors(self, media: list[MediaItem]) -> list[Tensor]:
        """Visual vectors of every media item, [visual tokens, hidden] each."""
        held = {item.digest: self.features.get(item.digest) for item in media}
        missing = {item.digest: item for item in media if held[item.digest] is None}
        if missing:
            fresh = list(missing.values())
            vectors, _ = self.core.connect(self._encode(fresh))
            for item, own in zip(fresh, vectors, strict=True):
                held[item.digest] = own
                self.features.put(item.digest, own, own.numel() * own.element_size())
        return [held[item.digest] for item in media]

    def _visuals(self, media: list[MediaItem]) -> Any:
        """Encoder features of the media; those that memory cannot hold are left to the connector's own pace."""
        core = self.core
        if sum(map(self._values, media)) * core.dtype.itemsize > self.features.limit:
            return self._encode(media)
        tensors = [tensor for item in media for tensor in self._features(item)]
        return gather_media(core.media, [one.modality for one in media], [one.plan for one in media], tensors)

    def _values(self, item: MediaItem) -> int:
        """Number of values in the encoder features of a media item."""
        route = self.core.media.route(item.modality)
        grids = route.feature_grids(item.plan)
        widths = [route.widths[view.encoder] for view in item.plan.views]
        return sum(tokens_in(grid) * width for grid, width in zip(grids, widths, strict=True))

    def _features(self, item: MediaItem) -> list[Tensor]:
        """Encoder features of every view of a media item, see `llavakit.model.visuals.run_encoders`."""
        tensors = self.features.get(item.digest)
        if tensors is None:
            self.encoded += 1
            jobs = view_jobs(self.core.media, [item.modality], [item.plan])
            tensors = run_encoders(self.core, item.views, jobs)
            self.features.put(item.digest, tensors, sum(t.numel() * t.element_size() for t in tensors))
        return tensors

    def _encode(self, media: list[MediaItem]) -> Any:
        self.encoded += len(media)
        views = [view for item in media for view in item.views]
        pixels = torch.stack(views) if len({view.shape for view in views}) == 1 else views
        sizes = None if media[0].size is None else torch.stack([item.size for item in media])
        modalities = torch.tensor([MODALITIES.index(item.modality) for item in media])
        return self.core.encode_media(pixels, sizes, modalities, [item.regions for item in media])

    def _media(self, request: Request) -> list[MediaItem]:
        if request.pixel_values is None or not len(request.pixel_values):
            return []
        given = (request.visual_sizes, request.visual_modalities, request.visual_regions)
        modalities, plans = self.core.plan_media(request.pixel_values, *given)
        views = list(request.pixel_values)
        needed = sum(len(plan.views) for plan in plans)
        if needed != len(views):
            raise UserError(f"request: pixel_values hold {len(views)} views, but the media need {needed}")
        media, start = [], 0
        for number, (modality, plan) in enumerate(zip(modalities, plans, strict=True)):
            own = views[start : start + len(plan.views)]
            start += len(plan.views)
            size = None if request.visual_sizes is None else request.visual_sizes[number]
            regions = None if request.visual_regions is None else request.visual_regions[number]
            digest = content_digest(modality, () if size is None else size.tolist(), own, regions)
            tokens = sum(run.visual for run in self.core.media.route(modality).layout(plan))
            media.append(MediaItem(modality, plan, own, size, regions, digest, tokens))
        return media


__all__ = ["MediaItem", "Prompt", "PromptReader"]
