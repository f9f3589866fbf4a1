"""Zero-shot classification by a contrastive encoder, clean and under AutoAttack.

Questions are JSONL of `image` and `label` (number or name of a class).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoints.encoders import encoder_options, read_encoder, read_projection
from llavakit.checkpoints.opening import local_folder
from llavakit.errors import UserError, quoted
from llavakit.evaluation.records import read_records
from llavakit.media.image import load_image
from llavakit.model.configuration import build_config
from llavakit.robustness.autoattack import AutoAttack, autoattack, predictions
from llavakit.robustness.balls import check_eps
from llavakit.robustness.embedding import Embedder
from llavakit.robustness.losses import FEWEST_FOR_TARGETED_DLR
from llavakit.robustness.zero_shot import accuracy_among, mean_recall, zero_shot
from llavakit.views.image import Square
from llavakit.views.plan import MediaSize

TEMPLATE = "This is a photo of a {}"


def open_encoder(place: str | Path) -> torch.nn.Module:
    """A vision encoder with its projection into the joint space, from transformers' or open_clip's files.

    Raises:
        UserError: If the folder holds none.
    """
    from transformers import AutoModel, CLIPVisionModelWithProjection

    folder = local_folder(place)
    options = encoder_options(folder)
    if options is None:
        raise UserError(f"{folder}: holds no encoder; name a folder in transformers' or open_clip's files")
    projection, state = read_projection(folder), read_encoder(folder)
    config = build_config(options, options["model_type"])
    if projection is None:
        module = AutoModel.from_config(config)
        wrapped = all(name.startswith("vision_model.") for name in module.state_dict())
        module.load_state_dict({f"vision_model.{n}" if wrapped else n: state[n] for n in state})
        return module.float().eval().requires_grad_(False)
    config.projection_dim = len(projection)
    module = CLIPVisionModelWithProjection(config)
    module.load_state_dict({f"vision_model.{n}": state[n] for n in state} | {"visual_projection.weight": projection})
    return module.float().eval().requires_grad_(False)


def attack_classifier(
    model: str | Path,
    questions: str | Path,
    output: str | Path,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 100,
    text: str | None = None,
    classes: str | Path | None = None,
    images: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
) -> dict[str, Any]:
    """Clean and robust accuracy of an encoder on labelled pictures.

    Args:
        model: Folder or hub id of an encoder.
        questions: JSONL of `image` and `label`.
        text: CLIP folder with its text side, or embeddings of the classes in a .safetensors file.
        classes: File of class names, one a line.

    Returns:
        Accuracies with intervals and the attacks that made them; also in OUTPUT/result.json.
    """
    from llavakit.robustness.run import measured
    from llavakit.training.objectives.adversarial import class_embeddings

    begun = time.monotonic()
    settings = AutoAttack(eps=check_eps(eps) if norm == "linf" else eps, norm=norm, steps=steps, batch=batch_size)
    if text is None:
        raise UserError("--text: is missing; name a CLIP folder with its text side, or embeddings in .safetensors")
    names = [line.strip() for line in Path(classes).read_text(encoding="utf-8").splitlines()] if classes else []
    names = [name for name in names if name]
    encoder = open_encoder(model).to(device or "cpu")
    embed, classifier = Embedder(encoder), class_embeddings(str(text), names, TEMPLATE).T
    if classifier.shape[0] != embed.width():
        raise UserError(
            f"--text: embeddings of {classifier.shape[0]} numbers, the encoder's have {embed.width()}; they belong to "
            "another encoder"
        )
    pixels, labels, ids = _pictures(questions, images, encoder.config.image_size, names, classifier.shape[1], limit)
    pixels, labels = pixels.to(encoder.device), labels.to(encoder.device)
    classify = zero_shot(embed, classifier)
    clean = predictions(classify, pixels, batch_size)
    found = autoattack(classify, pixels, labels, settings)
    right = (clean == labels).tolist()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = zip(ids, right, found.robust.tolist(), clean.tolist(), found.predictions.tolist(), strict=True)
    keys = ("question_id", "right", "robust", "clean", "attacked")
    text_lines = "".join(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text_lines, encoding="utf-8")
    few = classifier.shape[1] < FEWEST_FOR_TARGETED_DLR
    with torch.no_grad():
        logits = torch.cat([classify(piece) for piece in pixels.split(batch_size)])
    result = {
        "model": str(model),
        "task": "zero-shot",
        "pictures": len(labels),
        "eps": f"{settings.eps * 255:g}/255" if norm == "linf" else settings.eps,
        "norm": norm,
        "steps": steps,
        "unit": f"accuracy, %, under {' and '.join(settings.possible(classifier.shape[1]))}",
        "attacks": list(settings.possible(classifier.shape[1])),
        "clean": measured([100.0 * value for value in right]),
        "attacked": measured([100.0 * value for value in found.robust.tolist()]),
        "accuracy_5": 100 * accuracy_among(logits, labels, 5),
        "mean_recall": 100 * mean_recall(clean, labels),
        "notes": ["fewer than 4 classes have no targeted loss; cross entropy alone attacked"] if few else [],
        "seconds": round(time.monotonic() - begun, 1),
        "folder": str(folder),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _pictures(
    path: str | Path, images: str | Path | None, size: int, names: list[str], classes: int, limit: int | None
) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels [pictures, 3, size, size] in 0..1, labels, and ids."""
    folder = Path(images) if images is not None else Path(path).parent
    planner = Square(size=size, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    pixels, labels, ids = [], [], []
    for record in read_records(path)[:limit]:
        label = record.data.get("label")
        if isinstance(label, str) and label in names:
            label = names.index(label)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
            raise record.error("label", f"must be a class, by name or as a number below {classes}, not {quoted(label)}")
        picture = load_image(folder / record.get("image", str))
        (view,) = planner.cut(picture, planner.plan(MediaSize(1, picture.height, picture.width)))
        pixels.append(torch.from_numpy(view))
        labels.append(label)
        ids.append(str(record.data.get("question_id", record.data["image"])))
    if not pixels:
        raise UserError(f"{path}: holds no picture")
    return torch.stack(pixels), torch.tensor(labels), ids
