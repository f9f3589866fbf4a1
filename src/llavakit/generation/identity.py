"""What a responder is, by content: weights, prompts and media reading, never the path that it was loaded from.

A model that was retrained in place is another one, and a model under another path is the same. Every byte of the
weights counts: training may change a few rows of one table only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.checkpoints.identity import file_identity, without_cosmetics
from llavakit.conversation.template import template_for
from llavakit.model.processing import LlavakitProcessor

_THREADS = min(8, os.cpu_count() or 1)


def identity_of(responder: Any) -> dict[str, Any]:
    """What decides the answers of a responder, as JSON: digests and settings by name.

    A responder with a network gives `weights`, `dtype`, `configuration`, `tokenizer`, `template`, `media` (how media
    are read), `ends` (ids that end an answer) and `codec`; one composed of others their identities and its `settings`,
    of which files are known by their content; any other the name that it calls itself (its address and model, for one
    behind an API).
    """
    kind = f"{type(responder).__module__}.{type(responder).__qualname__}"
    network = getattr(responder, "model", None)
    if isinstance(network, nn.Module):
        return {"responder": kind, **_network(responder, network)}
    parts = [identity_of(part) for part in getattr(responder, "parts", ())]
    found: dict[str, Any] = {"responder": kind, "options": _plain(getattr(responder, "_preset", {}))}
    settings = getattr(responder, "settings", None) or {}
    if settings:
        found["settings"] = {name: _setting(value) for name, value in settings.items()}
    if parts:
        return found | {"parts": parts}
    own = getattr(responder, "identity", None)
    return found | {"name": own if isinstance(own, str) else getattr(responder, "name", None)}


def _setting(value: Any) -> Any:
    """A value by content, if it is the path of a file or folder."""
    place = Path(value) if isinstance(value, (str, os.PathLike)) and len(str(value)) < 4096 else None
    if place is None or not place.exists():
        return _plain(value)
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    return digest_of([[str(path.relative_to(place)), file_identity(path)] for path in files])


def digest_of(value: Any) -> str:
    """Sixteen hexadecimal digits of a JSON value's content."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    return json.loads(json.dumps(value, sort_keys=True, default=repr))


def _network(responder: Any, network: nn.Module) -> dict[str, Any]:
    config = getattr(network, "config", None)
    processor = getattr(responder, "processor", None)
    found: dict[str, Any] = {
        "weights": weights_digest(network),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in network.parameters()})),
        "configuration": digest_of(without_cosmetics(config.to_dict()) if hasattr(config, "to_dict") else repr(config)),
        "tokenizer": _tokenizer_digest(getattr(responder, "tokenizer", None)),
        "ends": _plain(getattr(responder, "eos_token_ids", None)),
        "codec": type(getattr(responder, "codec", None)).__qualname__,
    }
    if isinstance(processor, LlavakitProcessor):
        template = template_for(processor.template, processor.tokenizer)
        cut = [template.breaks, template.as_generated] if template.breaks else []
        found["template"] = digest_of([template.source, template.stop, template.placement, template.bos, *cut])
        media = [processor.image_processor.architecture, processor.sampling, processor.reading]
        if processor.time_instruction is not None:
            media.append(processor.time_instruction)
        found["media"] = digest_of([without_cosmetics(media[0]), *map(_plain, media[1:])])
    elif processor is not None:  # transformers' own, a tokenizer where the model takes text alone
        found["template"] = digest_of(processor.chat_template)
        parts = [getattr(processor, f"{kind}_processor", None) for kind in ("image", "video")]
        found["media"] = digest_of([without_cosmetics(part.to_dict()) for part in parts if part is not None])
    return found


def weights_digest(network: nn.Module) -> str:
    """Digest of the names, shapes, types and values of all tensors, under the names that files give them."""
    state = network.state_dict()
    names = {name.replace("_tower.vision_model.", "_tower."): name for name in state}
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the interpreter's lock
        parts = pool.map(lambda name: _tensor_digest(name, state[names[name]]), sorted(names))
        whole = hashlib.sha256(b"".join(parts))
    return whole.hexdigest()[:16]


def _tensor_digest(name: str, tensor: Any) -> bytes:
    if not isinstance(tensor, Tensor):  # extra state of quantised layers
        return hashlib.sha256(repr((name, tensor)).encode()).digest()
    digest = hashlib.sha256(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    for piece in _pieces(tensor.detach()):
        digest.update(piece.cpu().numpy().data)
    return digest.digest()


def _pieces(tensor: Tensor, size: int = 1 << 26) -> Iterator[Tensor]:
    """The bytes of a tensor, in pieces, so that no copy of a large one is made."""
    if tensor.numel():
        yield from tensor.contiguous().reshape(-1).view(torch.uint8).split(size)


def _tokenizer_digest(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if hasattr(backend, "to_str") else sorted(tokenizer.get_vocab().items())
    return digest_of(content)
