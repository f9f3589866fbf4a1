"""Robust CLIP's golden components: attacks, training and the tower here, text and scores in `parity_text`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from llavakit.checkpoints.files import LazyState
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.data.records import Record
from llavakit.errors import UserError
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import check_keys, published_model
from llavakit.proof.golden import Case, Example, Result
from llavakit.robustness.apgd import Judged, apgd, picture_mask, windows
from llavakit.robustness.autoattack import AutoAttack, autoattack
from llavakit.robustness.balls import project, steepest
from llavakit.robustness.embedding import Embedder
from llavakit.robustness.losses import accuracy, class_loss, dlr, squared_distance, targeted_dlr, unit
from llavakit.robustness.model_attack import TextLoss
from llavakit.robustness.pgd import pgd
from llavakit.robustness.zero_shot import (
    accuracy_among,
    average_precisions,
    classifier_of,
    mean_recall,
    zero_shot_logits,
)
from llavakit.systems.robust_clip import parity_text
from llavakit.training.dataset import PreparedSamples
from llavakit.training.lora import prepare
from llavakit.training.objectives.adversarial import FARE, TeCoA
from llavakit.training.objectives.base import Run
from llavakit.training.recipe import Recipe, parse_recipe
from llavakit.training.run import training_arguments
from llavakit.training.schedules import after_step, open_clip_cosine
from llavakit.training.trainer import StageTrainer
from llavakit.views.pixels import CLIP_MEAN, CLIP_STD
from llavakit.vision.open_clip import clip_vit

SIZES = ("image_size", "patch_size", "width", "layers", "heads", "output_dim", "mlp_ratio")


# Attacks on the cases' own small network


class SmallNetwork(nn.Module):
    """The network that the cases attack, and the points at which it was asked."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights, self.points = dict(weights), []

    def forward(self, pixels: Tensor) -> Tensor:
        """Outputs [pictures, classes or width] of pixels [pictures, 3, height, width]."""
        own = {name: tensor.to(pixels.dtype) for name, tensor in self.weights.items()}
        values = (pixels - own["mean"].view(-1, 1, 1)) / own["std"].view(-1, 1, 1)
        return F.linear(torch.tanh(F.linear(values.flatten(1), own["W1"], own["b1"])), own["W2"], own["b2"])


class Seen:
    """A loss that remembers where it was asked and what it said."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        self.loss, self.points, self.values = loss, [], []

    def __call__(self, points: Tensor) -> Tensor:
        value = self.loss(points)
        self.points.append(points.detach().clone())
        self.values.append(value.detach().clone())
        return value

    def result(self, **tensors: Tensor) -> dict[str, Tensor]:
        if self.points:
            tensors |= {"points": torch.stack(self.points), "losses": torch.stack(self.values)}
        return tensors


def _embedding_loss(case: Case, mean: bool, normalise: bool) -> Callable[[Tensor], Tensor]:
    """The training loss of a case: `loss` l2 or ce, perhaps on embeddings of length one."""
    network, inputs, config = SmallNetwork(case.weights()), case.tensors, case.config
    wanted, text, labels = inputs.get("embedding_orig"), inputs.get("text"), inputs.get("y")
    name = config["loss"]

    def loss(points: Tensor) -> Tensor:
        embeddings = unit(network(points)) if normalise else network(points)
        if name not in ("l2", "ce"):
            raise UserError(f"config.loss: {name!r} is neither l2 nor ce")
        found = squared_distance(embeddings, wanted) if name == "l2" else class_loss(embeddings, text, labels)
        return found.mean() if mean else found

    return loss


def pgd_inner_attack(case: Case) -> Result:
    """The inner attack of training."""
    case.informational("config.eps_times_255", "config.seed")
    config = case.config
    loss = Seen(_embedding_loss(case, mean=True, normalise=config["output_normalize"]))
    clean = case.tensors["x"]
    attacked = pgd(
        loss,
        clean,
        eps=config["eps"],
        step=config["stepsize"],
        steps=config["iterations"],
        norm=config["norm"],
        start=case.tensors.get("perturbation_init"),
    )
    with torch.no_grad():
        final = loss.loss(attacked).reshape(1)
    return Result(tensors=loss.result(adv=attacked, final_loss=final))


def apgd_train(case: Case) -> Result:
    """APGD as training code has it: the first step is twice the radius, or an absolute length."""
    case.informational("config.eps_times_255", "config.seed", "config.output_normalize")  # always of length one here
    config, network = case.config, SmallNetwork(case.weights())
    loss = Seen(_embedding_loss(case, mean=False, normalise=True))
    step, labels = config.get("initial_stepsize"), case.tensors["y"]

    def judge(points: Tensor, rows: Tensor) -> Judged:
        with torch.no_grad():
            other = unit(network(points)).argmax(-1) != labels[rows]
        return Judged(loss(points), other)

    found = apgd(
        judge,
        case.tensors["x"],
        eps=config["eps"],
        steps=config["n_iter"],
        norm=config["norm"],
        first_step=step / config["eps"] if step else 2.0,
    )
    tensors = {"adv": found.broken_at, "x_best_adv": found.broken_at, "x_best": found.best, "x_last": found.last}
    return Result(tensors=loss.result(**tensors, loss_best=found.best_loss, acc=~found.broken))


def _class_losses(case: Case) -> Callable[[Tensor], Tensor]:
    """Cross entropy of every row [batch] of pictures [batch, ...]: summed over the pictures of a row."""
    network, labels = SmallNetwork(case.weights()), case.tensors["y"]

    def losses(points: Tensor) -> Tensor:
        each = points.unflatten(0, (len(points), 1)).flatten(1, -4)
        logits = network(each.flatten(0, 1))
        found = F.cross_entropy(logits, labels.repeat_interleave(each.shape[1]), reduction="none")
        return found.unflatten(0, (len(points), -1)).sum(-1)

    return losses


def apgd_vlm(case: Case) -> Result:
    """APGD of the evaluation of vision-language models."""
    case.informational("config.eps_times_255", "config.seed")
    config, clean = case.config, case.tensors["x"]
    sign, start = (-1 if config["targeted"] else 1), case.tensors.get("pert_init")
    step = config.get("initial_stepsize", 1.0)
    losses = _class_losses(case)
    loss = Seen(lambda points: sign * losses(points))
    alone = config.get("mask_out")
    found = apgd(
        lambda points, rows: Judged(loss(points)),
        clean,
        eps=config["eps"],
        steps=config["n_iter"],
        norm=config["norm"],
        first_step=2.0 if step is None else step,
        start=None if start is None else clean + start,
        mask=picture_mask(clean, None if alone in (None, "none") else alone),
    )
    return Result(tensors=loss.result(x_best=found.best, x_last=found.last, loss_best=found.best_loss))


def pgd_vlm(case: Case) -> Result:
    """Plain PGD on pictures of a prompt."""
    case.informational("config.eps_times_255", "config.seed", "config.image_space")
    config, clean = case.config, case.tensors["x"]
    losses = _class_losses(case)
    loss = Seen(lambda points: losses(points).sum())
    attacked = pgd(
        loss,
        clean,
        eps=config["eps"],
        step=config["stepsize"],
        steps=config["iterations"],
        norm=config["norm"],
        start=next((case.tensors[name] for name in ("pert_init", "perturbation_init") if name in case.tensors), None),
        descend=config["mode"] == "min",
        mask=picture_mask(clean, None if config.get("mask_out") in (None, "none") else config["mask_out"]),
    )
    last = [value.reshape(1) for value in loss.values[-1:]]
    return Result(tensors=loss.result(adv=attacked, **({"last_loss": last[0]} if last else {})))


def _autoattack(case: Case, attacks: tuple[str, ...], *, restarts: int = 1, targeted: int = 1) -> Result:
    case.informational("config.seed", "config.which", "config.eps_times_255")
    config, inputs = case.config, case.tensors
    network, scale = SmallNetwork(case.weights()), config.get("logit_scale", 1.0)
    drawn = iter(sorted(name for name in inputs if name.startswith("rand_")))
    clean, labels = inputs["x"], inputs["y"]
    settings = AutoAttack(
        eps=config["eps"],
        norm=config.get("norm", "linf").lower(),
        attacks=attacks,
        steps=config["n_iter"],
        first_step=config.get("alpha", 2.0),
        restarts=restarts,
        target_classes=config.get("n_target_classes", 9),
        target_restarts=targeted,
        batch=config.get("bs"),
        leave=False,
        noise=lambda shape: inputs[next(drawn)].reshape(tuple(shape)),
    )
    found = autoattack(lambda pixels: scale * network(pixels), clean, labels, settings)
    for name in drawn:  # drawn for a run that an attack of all pictures made needless
        case.informational(f"inputs.{name}")
    moved = (found.pictures - clean).abs().flatten(1).amax(-1) / config["eps"]
    names = {"adv": found.pictures, "pred": found.predictions, "y_adv": found.predictions, "robust": found.robust}
    return Result(tensors=names | {"linf_over_eps": moved})


def autoattack_apgd_ce(case: Case) -> Result:
    """APGD on the cross entropy, with restarts."""
    case.informational("config.n_target_classes")
    return _autoattack(case, ("apgd-ce",), restarts=case.config.get("n_restarts", 1))


def autoattack_apgd_t(case: Case) -> Result:
    """APGD on the targeted DLR loss; one run per target class, whatever the number of restarts says."""
    case.informational("config.n_restarts")
    return _autoattack(case, ("apgd-t",))


def autoattack_custom(case: Case) -> Result:
    """Several attacks in batches."""
    config = case.config
    return _autoattack(
        case,
        tuple(config["attacks_to_run"]),
        restarts=config.get("n_restarts", 5),
        targeted=config.get("n_restarts_targeted", 1),
    )


def apgd_checkpoints(case: Case) -> Result:
    """Where step lengths are looked at."""
    case.informational("config.fractions", "config.fractions.*")
    return Result(json={str(steps): [list(pair) for pair in windows(steps)] for steps in case.inputs["n_iter"]})


def losses(case: Case) -> Result:
    """Losses, projections and steepest directions."""
    config, inputs = case.config, case.tensors
    embeddings, wanted, text, labels = inputs["emb"], inputs["emb_orig"], inputs["text"], inputs["y"]
    scale, moved, logits = config["logit_scale"], inputs["pert"], inputs["logits"]
    distances, cross = squared_distance(embeddings, wanted), class_loss(unit(embeddings), text, labels, scale)
    return Result(
        tensors={
            "l2_none": distances,
            "l2_mean": distances.mean().reshape(1),
            "ce_none": cross,
            "ce_mean": cross.mean().reshape(1),
            "ce_unnormalised_mean": class_loss(embeddings, text, labels, scale).mean().reshape(1),
            "acc_percent": 100 * accuracy(logits, labels).reshape(1),
            "dlr": dlr(logits, labels),
            "dlr_targeted": targeted_dlr(logits, labels, inputs["y_target"]),
            "proj_linf": project(moved, "linf", config["eps"]),
            "proj_l2": project(moved, "l2", config["eps_l2"]),
            "normgrad_linf": steepest(moved, "linf"),
            "normgrad_l2": steepest(moved, "l2"),
        }
    )


def lr_schedule(case: Case) -> Result:
    """The rate that the schedule says, and the one that steps have."""
    case.informational("inputs.json")
    config = case.config
    peak, said = config["lr"], open_clip_cosine(config["warmup"], config["steps"])
    used, asked = after_step(said), config.get("query_steps") or case.inputs["query_steps"]
    return Result(
        json={
            "lr_after_scheduler_call": {str(step): peak * said(step) for step in asked},
            "lr_used_by_optimizer_step": {str(step): peak * used(step) for step in asked},
        }
    )


# Encoders


def _open_clip_folder(folder: Path, weights: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> Path:
    """The weights as the hub's folders hold them."""
    folder.mkdir()
    vision = {key: sizes[key] for key in ("image_size", "patch_size", "layers", "width")}
    vision["head_width"] = sizes["width"] // sizes["heads"]
    model = {"embed_dim": sizes["output_dim"], "quick_gelu": True, "vision_cfg": vision}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}), encoding="utf-8")
    named = {f"visual.{name}": tensor.contiguous() for name, tensor in weights.items()}
    save_file(named, folder / "open_clip_model.safetensors")
    return folder


def _recipe(folder: Path, sizes: Mapping[str, Any], stage: Mapping[str, Any]) -> Recipe:
    views = {"type": "square", "size": sizes["image_size"]}
    return parse_recipe(
        {
            "parts": {"init": {"vision_tower": str(folder)}, "media": {"image": {"views": views}}},
            "data": [{"path": "case.json"}],
            "stages": [{"name": "case", "train": ["all"], **stage}],
            "output": str(folder.parent / "run"),
        }
    )


def normalised(pixels: Tensor) -> Tensor:
    """Encoder inputs of pixels in 0..1."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def robust_vision_tower(case: Case) -> Result:
    """Embeddings and LLaVA's features of an open_clip tower, pixels in 0..1."""
    sizes, pixels = check_keys(case.config, SIZES, "config"), case.tensors["x"]
    with tempfile.TemporaryDirectory() as place:
        folder = _open_clip_folder(Path(place) / "tower", case.weights(), sizes)
        recipe = _recipe(folder, sizes, {"objective": {"type": "fare"}, "learning_rate": 1e-5})
        encoder, _ = FARE(recipe.stages[0]).build(recipe)
    encoder = encoder.eval().to(case.weights()["conv1.weight"].dtype)
    with torch.no_grad():
        embedding = Embedder(encoder)(pixels)
        inner = getattr(encoder, "vision_model", encoder)
        states = inner(normalised(pixels), output_hidden_states=True).hidden_states[-2]
        first = inner.post_layernorm(states[:, :1])
    return Result(
        tensors={
            "embedding": embedding,
            "embedding_unit": unit(embedding),
            "llava_all": torch.cat([first, states[:, 1:]], 1),
            "llava_patch": states[:, 1:],
        }
    )


class _Watch(TrainerCallback):
    """The rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


class _Records(list):
    """Records in their order."""

    def order(self, seed: int, epoch: int) -> list[int]:
        return list(range(len(self)))


ARGUMENTS = (
    *("output_normalize", "attack", "inner_loss", "norm", "eps", "iterations_adv", "stepsize_adv", "loss"),
    *("loss_clean", "clean_weight", "trades", "lr", "wd", "warmup", "steps"),
    *("eval_freq", "log_freq", "save_checkpoints", "start_step"),
)


def training_steps(case: Case) -> Result:
    """The published training loop, by the stage's trainer: attacked pictures, losses, rates and final weights."""
    case.informational("config.args.eval_freq", "config.args.log_freq", "config.args.save_checkpoints")
    case.informational("config.args.start_step", "config.seed")
    config, inputs = case.config, case.tensors
    given = check_keys({key: config["args"].get(key) for key in config["args"]}, ARGUMENTS, "config.args")
    if given.get("attack", "pgd") != "pgd":
        raise UserError(
            f"config.args.attack: {given['attack']!r} trains on what no loss means; pgd is what is reproduced"
        )
    weight = given.get("clean_weight") or 0.0
    if weight and given.get("loss_clean") != "l2":
        raise UserError("config.args.loss_clean: with a clean_weight the clean loss is l2")
    sizes = {key: config[key] for key in SIZES}
    recorded: dict[str, list[Tensor]] = {"adv": [], "loss": []}
    batches, records = [], _Records()
    for number in range(config["n_batches"]):
        rows = zip(*(inputs[f"{name}_{number}"] for name in ("x", "y", "noise")), strict=True)
        start = len(records)
        for picture, label, noise in rows:
            raw = {"image": picture, "label": int(label), "start": noise}
            records.append(Record([], "case", len(records) + 1, raw))
        batches.append(list(range(start, len(records))))
    classes = given["loss"] == "ce" or given["inner_loss"] == "ce"
    base = TeCoA if classes else FARE

    class Recorded(base):
        """The objective, and what it saw."""

        def attack(self, *arguments: Any) -> Tensor:
            recorded["adv"].append(super().attack(*arguments))
            return recorded["adv"][-1]

        def loss(self, *arguments: Any) -> Any:
            found = super().loss(*arguments)
            names = ("loss_clean", "loss_adversarial") if weight else ("loss_adversarial",)
            recorded["loss"] += [found.logged[name].reshape(()) for name in names]
            return found

    with tempfile.TemporaryDirectory() as place:
        folder = _open_clip_folder(Path(place) / "tower", case.weights(), sizes)
        objective = {
            "type": "tecoa" if classes else "fare",
            "eps": given["eps"],
            "norm": given["norm"],
            "steps": given["iterations_adv"],
            "step": given["stepsize_adv"],
            "loss": given["loss"],
            "inner_loss": given["inner_loss"],
            "normalise": given["output_normalize"],
            "clean_weight": weight,
            "trades": bool(given.get("trades")),
        }
        if classes:
            save_file({"text": inputs["text"].T.contiguous()}, Path(place) / "text.safetensors")
            objective["text"] = str(Path(place) / "text.safetensors")
        else:
            case.informational("inputs.text")
        stage = {
            "objective": objective,
            "learning_rate": given["lr"],
            "weight_decay": given["wd"],
            "decay_everything": True,
            "schedule": "cosine_set_after_step",
            "schedule_options": {"steps": given["steps"]},
            "warmup": given["warmup"],
            "batch_size": max(map(len, batches), default=1),
        }
        recipe = _recipe(folder, sizes, stage)
        own, watch = Recorded(recipe.stages[0]), _Watch()
        module, processor = own.build(recipe)
        own.bind(module.config, processor)
        model = prepare(module.train(), recipe.stages[0], None)
        samples = PreparedSamples(records, own)
        run = Run(
            recipe=recipe,
            stage=recipe.stages[0],
            seed=0,
            folder=Path(place),
            cache=Path(place),
            module=module,
            wrapped=model,
            processor=processor,
            samples=samples,
            start=lambda: own.build(recipe),
            console=Console(quiet=True),
            world=1,
        )
        own.begin(run)
        trainer = StageTrainer(
            model,
            training_arguments(recipe, recipe.stages[0], Path(place) / "run", 0),
            stage=recipe.stages[0],
            objective=own,
            samples=samples,
            batches=batches,
            collator=own.collator(run),
            processor=processor,
        )
        trainer.add_callback(watch)
        trainer.train()
    own_state = LazyState.of({name: tensor.detach() for name, tensor in module.state_dict().items()})
    tensors = {f"final.{name}": tensor for name, tensor in clip_vit(own_state).items()}
    with torch.no_grad():
        tensors["embedding_after"] = Embedder(module)(inputs["x_0"])
    tensors["lr"] = torch.tensor(watch.rates, dtype=torch.float64)
    tensors["loss"] = torch.stack(recorded["loss"])
    same = len({len(batch) for batch in batches}) == 1
    tensors["adv"] = torch.stack(recorded["adv"]) if same else torch.cat(recorded["adv"])
    # softmax takes no notice of the keys' biases, so their gradients are zero and rounding alone moves them
    keys = torch.ones(3, sizes["width"], dtype=torch.bool)
    keys[1] = False
    mask = {name: keys.flatten() for name in tensors if name.endswith("attn.in_proj_bias")}
    return Result(tensors=tensors, mask=mask)


# A whole model

LLAVA = (*SIZES, "hidden", "inter", "lm_layers", "lm_heads", "vocab", "apgd")


def _whole_model(case: Case, config: Mapping[str, Any]) -> LlavakitForConditionalGeneration:
    weights, prefix = case.weights(), "model.vision_tower.vision_tower."
    tower = {n.removeprefix(prefix).removeprefix("model."): t for n, t in weights.items() if n.startswith(prefix)}
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    raw = {
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1,  # the last block is not in the files
        "hidden_size": config["hidden"],
        "intermediate_size": config["inter"],
        "num_hidden_layers": config["lm_layers"],
        "num_attention_heads": config["lm_heads"],
        "vocab_size": config["vocab"],
        "rms_norm_eps": 1e-6,
        "image_aspect_ratio": "pad",
    }
    with tempfile.TemporaryDirectory() as place:
        folder = _open_clip_folder(Path(place) / "clip-tower", tower, config)
        return published_model({**raw, "mm_vision_tower": str(folder)}, rest)


def llava_attack_loss(case: Case) -> Iterator[Example | Result]:
    """Loss, gradient at the pixels and course of an attack through a whole model."""
    config, inputs = check_keys({k: case.config[k] for k in case.config}, LLAVA, "config"), case.tensors
    model, pixels = _whole_model(case, config), inputs["x"]
    entries = [Entry(views=[view]) for view in normalised(pixels)]
    batch = ClassicBatch(model, inputs["input_ids"], {IMAGE_PLACEHOLDER: entries}, labels=inputs["labels"])
    text_loss = TextLoss.of_views(model, batch.samples, CLIP_MEAN, CLIP_STD, pool=True)

    def loss() -> Result:
        at = pixels.clone().requires_grad_()
        value = text_loss(at)
        (gradient,) = torch.autograd.grad(value, at)
        return Result(tensors={"loss": value.detach().reshape(1), "grad": gradient})

    def logits() -> Result:
        with torch.no_grad():
            found = text_loss.outputs(pixels)
        return Result(
            tensors={"logits": found.logits, "image_features": text_loss.features(pixels)},
            mask={"logits": batch.meaningful()},
        )

    yield Example("loss", loss, tensors=("loss", "grad"))
    yield Example("forward pass", logits, tensors=("logits", "image_features"))

    def as_a_stage_learns() -> Result:
        with torch.no_grad():
            found = batch.forward()
        return Result(
            tensors={"logits": found.logits, "loss": found.loss.reshape(1)}, mask={"logits": batch.meaningful()}
        )

    yield Example("through a stage's batch", as_a_stage_learns, tensors=("logits", "loss"))
    yield from batch.through_engine()
    if config.get("apgd"):
        options = check_keys(
            {k: config["apgd"][k] for k in config["apgd"]}, ("targeted", "eps", "n_iter"), "config.apgd"
        )
        yield Example(
            "attack", lambda: _attacked(text_loss, pixels, **options), tensors=("x_best", "points", "apgd_losses")
        )


def _attacked(text_loss: TextLoss, pixels: Tensor, targeted: bool, eps: float, n_iter: int) -> Result:
    sign = -1 if targeted else 1
    # the published loss is one number for the batch, so the batch is one row
    loss = Seen(lambda points: sign * text_loss(points.squeeze(0)).reshape(1))
    found = apgd(lambda points, rows: Judged(loss(points)), pixels[None], eps=eps, steps=n_iter)
    seen = loss.result()
    points = seen["points"].squeeze(1)
    return Result(tensors={"x_best": found.best.squeeze(0), "points": points, "apgd_losses": seen["losses"]})


def zeroshot_classification(case: Case) -> Result:
    """A classifier of text embeddings, its logits and figures."""
    case.informational("config.classes", "config.templates")
    inputs, labels = case.tensors, case.tensors["target"].long()
    classifier = classifier_of(inputs["text_raw"], case.config["n_templates"])
    if classifier.shape[1] != case.config["n_classes"]:
        raise UserError(f"config.n_classes: {case.config['n_classes']}, the embeddings are of {classifier.shape[1]}")
    logits = zero_shot_logits(inputs["image_raw"], classifier)
    truth = F.one_hot(labels, logits.shape[1])

    def number(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

    return Result(
        tensors={
            "classifier": classifier,
            "logits": logits,
            "acc1": number(accuracy_among(logits, labels, 1)),
            "acc5": number(accuracy_among(logits, labels, 5)),
            "mean_per_class_recall": number(mean_recall(logits.argmax(-1), labels)),
            "average_precision": average_precisions(logits, truth),
        }
    )


ADAPTERS = {
    "pgd_inner_attack_fare": pgd_inner_attack,
    "pgd_inner_attack_tecoa": pgd_inner_attack,
    "apgd_train": apgd_train,
    "apgd_vlm": apgd_vlm,
    "pgd_vlm": pgd_vlm,
    "autoattack_apgd_ce": autoattack_apgd_ce,
    "autoattack_apgd_t": autoattack_apgd_t,
    "autoattack_custom": autoattack_custom,
    "apgd_checkpoints": apgd_checkpoints,
    "lr_schedule": lr_schedule,
    "losses": losses,
    "robust_vision_tower": robust_vision_tower,
    "training_steps_fare": training_steps,
    "training_steps_tecoa": training_steps,
    "llava_attack_loss": llava_attack_loss,
    "zeroshot_classification": zeroshot_classification,
    **parity_text.ADAPTERS,
}
