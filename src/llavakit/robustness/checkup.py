"""A quick look at a tower: how far 20 phantom pictures' embeddings move when the pictures are changed invisibly.

The unit is the model's own: the squared distance that an attack makes, over the mean squared distance of two different
pictures. 0 is a tower that nothing moves; at 1 an attacked picture is as far from itself as from another one. Beside it
stand two small encoders trained on the spot, one by contrast as CLIP and the same one hardened by FARE, attacked alike.
It finds towers that are obviously not robust, and proves nothing about others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.errors import UserError
from llavakit.robustness.apgd import Judged, apgd
from llavakit.robustness.balls import check_eps

PICTURES, STEPS = 20, 10


def examine(model: str, *, eps: float = 4 / 255, pictures: int = PICTURES, steps: int = STEPS) -> dict[str, Any]:
    """The check-up of a model's main tower, or of an encoder's folder.

    Args:
        model: Folder or hub id of a model or of an encoder.
        eps: Radius of the changes, in pixels of 0..1.

    Returns:
        `rows` of the tower and both stand-ins: `name`, `moved` (mean of the unit above), `worst`, and `seconds`.

    Raises:
        UserError: If the model has no vision side.
    """
    check_eps(eps)
    begun = time.monotonic()
    features, size, mean, std = _tower(model)
    own = _phantoms(pictures, size)
    rows = [{"name": model, **_moved(_normalising(features, mean, std), own, eps, steps)}]
    rows += [{"name": name, **row} for name, row in _stand_ins(eps, pictures, steps).items()]
    return {
        "eps": f"{eps * 255:g}/255",
        "pictures": pictures,
        "rows": rows,
        "seconds": round(time.monotonic() - begun, 1),
    }


def _tower(model: str) -> tuple[Callable[[Tensor], Tensor], int, Any, Any]:
    """Features of the main encoder as the connector reads them, the side of its pictures, and their normalisation."""
    import llavakit
    from llavakit.checkpoints.encoders import encoder_options
    from llavakit.checkpoints.opening import local_folder
    from llavakit.robustness.classify import open_encoder
    from llavakit.robustness.embedding import Embedder
    from llavakit.views.pixels import CLIP_MEAN, CLIP_STD
    from llavakit.vision.encode import encode_views
    from llavakit.vision.geometry import geometry_of

    folder = local_folder(model)
    options = encoder_options(folder) or {}
    raw = _raw(folder)
    alone = "text_config" not in raw or raw.get("model_type") in ("clip", "siglip")  # towers of pictures and texts
    if str(options.get("model_type", "")).endswith("_vision_model") and alone:
        encoder = open_encoder(folder)
        embed = Embedder(encoder, (0.0,) * 3, (1.0,) * 3)
        return embed, encoder.config.image_size, CLIP_MEAN, CLIP_STD
    chat = llavakit.load(model, responder="plain", dtype="float32", device="cpu")
    net = getattr(chat, "model", None)
    if net is None or getattr(getattr(net, "config", None), "vision_config", None) is None:
        raise UserError(f"{model}: has no vision tower that could be looked at")
    net.eval().requires_grad_(False)
    config, layer, strategy = net.config.encoder_config("vision_tower")
    planner = chat.processor.spec.route(next(iter(chat.processor.spec.routes))).planner
    mean, std = (
        getattr(planner, name, default) for name, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
    )
    geometry = geometry_of(config)
    side = getattr(config, "image_size", None) or 336

    def features(values: Tensor) -> Tensor:
        return encode_views(net.model.vision_tower, values, layer, strategy, geometry).flatten(1)

    return features, side, mean, std


def _raw(folder: Path) -> dict[str, Any]:
    from llavakit.checkpoints.files import read_json

    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _normalising(features: Callable[[Tensor], Tensor], mean: Any, std: Any) -> Callable[[Tensor], Tensor]:
    shift, scale = (torch.tensor(tuple(values)).view(3, 1, 1) for values in (mean, std))
    return lambda pixels: features((pixels - shift) / scale)


def _phantoms(count: int, side: int) -> Tensor:
    """Phantom scenes [pictures, 3, side, side] in 0..1."""
    import json

    from llavakit.media.image import load_image
    from llavakit.phantom.write import write_world
    from llavakit.views.image import Square
    from llavakit.views.plan import MediaSize

    planner = Square(size=side, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    with tempfile.TemporaryDirectory() as place:
        write_world("scene", Path(place), n=count, seed=0, size=max(min(side, 96), 48))
        records = json.loads((Path(place) / "train.json").read_text())
        names = list(dict.fromkeys(record["image"] for record in records if isinstance(record.get("image"), str)))
        found = []
        for name in names[:count]:
            picture = load_image(Path(place) / name)
            (view,) = planner.cut(picture, planner.plan(MediaSize(1, picture.height, picture.width)))
            found.append(torch.from_numpy(view))
    return torch.stack(found)


def _moved(features: Callable[[Tensor], Tensor], pixels: Tensor, eps: float, steps: int) -> dict[str, float]:
    """How far attacked features are, in mean distances of two pictures."""
    with torch.no_grad():
        clean = features(pixels)
    apart = torch.cdist(clean[None], clean[None])[0].square()
    unit = apart.sum() / (len(clean) * (len(clean) - 1))

    def judge(points: Tensor, rows: Tensor) -> Judged:
        return Judged((features(points) - clean[rows]).square().sum(-1))

    # the distance has no slope at the clean picture
    start = pixels + eps * (2 * torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0)) - 1)
    found = apgd(judge, pixels, eps=eps, steps=steps, start=start).best_loss / unit
    return {"moved": round(float(found.mean()), 4), "worst": round(float(found.max()), 4)}


def _stand_ins(eps: float, count: int, steps: int) -> dict[str, dict[str, float]]:
    from llavakit.robustness.embedding import Embedder
    from llavakit.robustness.stand_ins import draw, harden, train_clip

    plain, _ = train_clip(0, steps=120)
    robust = harden(plain, "fare", 0, steps=40)
    pixels = draw(count, torch.Generator().manual_seed(1)).pixels
    named = {"small CLIP-like encoder": plain, "the same after FARE": robust}
    return {name: _moved(Embedder(encoder), pixels, eps, steps) for name, encoder in named.items()}


def table(report: dict[str, Any]) -> Any:
    """The check-up for a terminal."""
    from rich.table import Table

    note = "1: an attacked picture is as far from itself as from another picture. A quick look, no proof."
    found = Table("tower", title=f"{report['pictures']} phantom pictures, eps {report['eps']}", caption=note)
    found.add_column("moved, mean", justify="right")
    found.add_column("worst", justify="right")
    for row in report["rows"]:
        found.add_row(str(row["name"]), f"{row['moved']:.3f}", f"{row['worst']:.3f}")
    return found
