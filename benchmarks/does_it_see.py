"""`llavakit doctor --blind` on models that are known to see, to be blind, and to see badly.

    OMP_NUM_THREADS=1 python benchmarks/does_it_see.py --folder runs/does_it_see [--questions 80 500] [--only GROUP ...]

One tiny model is trained on the phantom scenes (colour and shape of one object), which takes about a minute of a core.
Then it is

- cut off from its pictures in 23 ways, each at another place between the file and the answer: the check should say
  *does not*;
- used, stored and changed in 10 ways that keep it sound: the check must not say *does not*;
- damaged in 5 ways that leave it a use of the picture: the check says how much is gained, and that it is used. These
  are no failures of the check; they show what it is not made to find.

Each is asked 80 questions three times, and 500 where 80 cannot tell, as the check itself advises. Answers are kept in
the folder, so a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from llavakit.demo.run import SIDE, text_config, vision_config
from llavakit.evaluation.blind import BLANK, CANNOT_TELL, DOES_NOT, OTHER, RIGHT, USES, check_blind
from llavakit.generation.chat import Chat
from llavakit.generation.load import load
from llavakit.generation.response import Answer
from llavakit.media.image import load_image
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.phantom.write import write_world
from llavakit.training.recipe import Recipe
from llavakit.training.run import train
from llavakit.views.pixels import CLIP_MEAN, CLIP_STD

WIDTH, BATCH, POOL, LONGEST = 64, 100, 600, 6
QUIET = Console(quiet=True)

Conversations = list[list[dict[str, Any]]]


# The model


def world(folder: Path, cases: int, seed: int) -> None:
    """Scenes of one object with a question about its colour or shape each."""
    if not folder.is_dir():
        easy = {"n": cases, "size": SIDE, "difficulty": "easy", "formats": "short", "types": "colour,shape", "most": 1}
        write_world("scene", folder, seed=seed, **easy)


def asked(folder: Path, cases: int) -> Path:
    """A question file about as many pictures that are not trained on."""
    world(folder, cases, seed=1)
    file = folder / "questions.jsonl"
    rows = [json.loads(line) for line in (folder / "heldout_questions.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in json.loads((folder / "train.json").read_text(encoding="utf-8")):
        question, answer = (turn["value"] for turn in record["conversations"][:2])
        text = question.replace("<image>\n", "")
        kind = "colour" if "colour" in text else "shape"
        rows.append(
            {"question_id": record["id"], "image": record["image"], "text": text, "answer": answer, "type": kind}
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def recipe(folder: Path, epochs: float, output: str, **stage: Any) -> Recipe:
    """Everything trained at once, or what `stage` says."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        texts = json.loads((folder / "scene" / "texts.json").read_text(encoding="utf-8"))
        tiny_tokenizer(texts, vocab_size=800).save_pretrained(tokenizer)
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]) + 1
    small = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}
    parts = {
        "text_config": text_config(vocabulary) | small,
        "vision_config": vision_config() | small,
        "connector": {"type": "mlp", "depth": 2},
        "media": {"image": {"views": {"type": "pad", "size": SIDE}, "arrange": {"type": "flat"}}},
        "image_token_id": vocabulary - 1,
        "template": "v1",
        "tokenizer": str(tokenizer),
        "init": stage.pop("init", {}),
    }
    rates = {"vision_tower": 2e-3, "multi_modal_projector": 2e-3, "language_model": 2e-3}
    one = {
        "name": output,
        "train": rates,
        "learning_rate": 2e-3,
        "epochs": epochs,
        "schedule": "cosine",
        "warmup": 0.05,
        "clip": 1.0,
        "packing": True,
        "max_length": 256,
        "batch_size": 8,
        **stage,
    }
    return Recipe.model_validate(
        {
            "system": "llava-1.5",
            "parts": parts,
            "data": [{"path": str(folder / "scene" / "train.json"), "name": "scenes"}],
            "stages": [one],
            "output": str(folder / output),
        }
    )


# What is broken


def tower(chat: Chat) -> nn.Module:
    return chat.model.model.vision_tower


def connector(chat: Chat) -> nn.Module:
    return chat.model.model.multi_modal_projector


def linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def patches(chat: Chat) -> nn.Module:
    return next(part for part in tower(chat).modules() if isinstance(part, nn.Conv2d))


def first_norm(chat: Chat) -> nn.Module:
    return next(part for part in tower(chat).modules() if isinstance(part, nn.LayerNorm))


def random_weights(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            fan = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan**-0.5)


def change(pick: Callable[[Chat], nn.Module], how: Callable[[nn.Module], None]) -> Callable[[Chat], None]:
    """Weights changed in place."""

    def apply(chat: Chat) -> None:
        with torch.no_grad():
            how(pick(chat))

    return apply


def scale(factor: float) -> Callable[[nn.Module], None]:
    def apply(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.mul_(factor)

    return apply


def scale_weight(factor: float) -> Callable[[nn.Module], None]:
    return lambda module: module.weight.mul_(factor)


def tokens(how: Callable[[Tensor, Chat], Tensor]) -> Callable[[Chat], None]:
    """What leaves the connector, changed; the last linear layer of the connector gives it."""

    def apply(chat: Chat) -> None:
        linears(connector(chat))[-1].register_forward_hook(lambda module, given, out: how(out, chat))

    return apply


def pixels(how: Callable[[Tensor], Tensor]) -> Callable[[Chat], None]:
    """What enters the encoder, changed."""

    def apply(chat: Chat) -> None:
        patches(chat).register_forward_pre_hook(lambda module, given: (how(given[0]), *given[1:]))

    return apply


def pictures(how: Callable[[Conversations], Conversations]) -> Callable[[Chat], None]:
    """The conversations of a batch, changed before they are read."""

    def apply(chat: Chat) -> None:
        answer = chat.answer_all
        chat.answer_all = lambda conversations, **sampling: answer(how(list(conversations)), **sampling)

    return apply


def each(how: Callable[[Any], Any]) -> Callable[[Chat], None]:
    """Every picture, changed."""

    def changed(part: Mapping[str, Any]) -> dict[str, Any]:
        return {**part, "image": how(part["image"])} if part["type"] == "image" else dict(part)

    def all_of(conversations: Conversations) -> Conversations:
        return [
            [{**message, "content": list(map(changed, message["content"]))} for message in own] for own in conversations
        ]

    return pictures(all_of)


def without(conversations: Conversations) -> Conversations:
    """Pictures dropped."""
    return [
        [{**message, "content": [part for part in message["content"] if part["type"] != "image"]} for message in own]
        for own in conversations
    ]


def image_of(conversation: Sequence[Mapping[str, Any]]) -> Any:
    return next(part["image"] for message in conversation for part in message["content"] if part["type"] == "image")


def with_images(conversations: Conversations, images: Sequence[Any]) -> Conversations:
    def swapped(part: Mapping[str, Any], image: Any) -> dict[str, Any]:
        return {**part, "image": image} if part["type"] == "image" else dict(part)

    return [
        [{**message, "content": [swapped(part, image) for part in message["content"]]} for message in own]
        for own, image in zip(conversations, images, strict=True)
    ]


def mixed(conversations: Conversations) -> Conversations:
    """Pictures of the other half of the batch."""
    images = [image_of(own) for own in conversations]
    half = len(images) // 2
    return with_images(conversations, images[half:] + images[:half])


class Late:
    """Each question gets the picture of the one before it."""

    def __init__(self) -> None:
        self.last: Any = None

    def __call__(self, conversations: Conversations) -> Conversations:
        images = [image_of(own) for own in conversations]
        before = self.last if self.last is not None else images[-1]
        self.last = images[-1]
        return with_images(conversations, [before, *images[:-1]])


class Stale(Late):
    """Each question gets the first picture that ever came."""

    def __call__(self, conversations: Conversations) -> Conversations:
        self.last = self.last if self.last is not None else image_of(conversations[0])
        return with_images(conversations, [self.last] * len(conversations))


def black(image: Any) -> Image.Image:
    return Image.new("RGB", load_image(image).size)


def clipped(image: Any) -> Image.Image:
    """A window so narrow that everything above black is white."""
    return load_image(image).point(lambda value: 255 if value > 0 else 0)


def jpeg(image: Any) -> bytes:
    file = io.BytesIO()
    load_image(image).save(file, "JPEG", quality=60)
    return file.getvalue()


def halved(image: Any) -> Image.Image:
    picture = load_image(image)
    return picture.resize((SIDE // 2, SIDE // 2)).resize(picture.size)


def renormalised(
    rescale: float, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Callable[[Tensor], Tensor]:
    """Pixels as another normalisation gives them: `rescale` times the values of 0 to 1, less mean, by std."""
    old = [torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD)]
    new = [torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std)]
    return lambda values: ((values * old[1] + old[0]) * rescale - new[0]) / new[1]


def noise(out: Tensor, chat: Chat) -> Tensor:
    return torch.randn_like(out) * out.std()


class Mean:
    """The mean of all visual tokens so far, in place of each."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None

    def __call__(self, out: Tensor, chat: Chat) -> Tensor:
        own = out.reshape(-1, out.shape[-1]).mean(0)
        self.mean = own if self.mean is None else self.mean  # that of the first pictures
        return self.mean.expand_as(out)


def placeholder(out: Tensor, chat: Chat) -> Tensor:
    """The embedding that stood at the place of the picture."""
    table = chat.model.get_input_embeddings().weight
    return table[min(chat.model.config.image_token_id, len(table) - 1)].expand_as(out)


def misread(out: Tensor, chat: Chat) -> Tensor:
    """Rows and channels read in the wrong order: a view where a transpose was meant."""
    flat = out.reshape(-1, out.shape[-1])
    return flat.reshape(flat.shape[1], flat.shape[0]).T.reshape(out.shape)


def permuted(axis: int) -> Callable[[nn.Module], None]:
    def apply(layer: nn.Module) -> None:
        order = torch.randperm(layer.weight.shape[axis], generator=torch.Generator().manual_seed(2))
        layer.weight.copy_(layer.weight.index_select(axis, order))

    return apply


def last(chat: Chat) -> nn.Linear:
    return linears(connector(chat))[-1]


def first(chat: Chat) -> nn.Linear:
    return linears(connector(chat))[0]


def shuffled_positions(module: nn.Module) -> None:
    table = next(part for name, part in module.named_parameters() if "position_embedding" in name)
    table[1:] = table[1:][torch.randperm(len(table) - 1, generator=torch.Generator().manual_seed(3))]


def rounded(module: nn.Module) -> None:
    """Weights as whole numbers of 8 bits per row, and back."""
    for layer in linears(module):
        step = layer.weight.abs().amax(1, keepdim=True) / 127
        layer.weight.copy_((layer.weight / step).round() * step)


def jittered(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std().nan_to_num() * 0.01)


def layer(number: int) -> Callable[[Chat], None]:
    def apply(chat: Chat) -> None:
        chat.model.config.vision_feature_layer = number

    return apply


BLINDED: dict[str, Callable[[Chat], None]] = {
    "the picture is dropped from the prompt": pictures(without),
    "pictures of other questions of the batch": pictures(mixed),
    "the picture of the question before": lambda chat: pictures(Late())(chat),
    "always the first picture (stale cache)": lambda chat: pictures(Stale())(chat),
    "unreadable pictures come as black ones": each(black),
    "a window that clips all to white": each(clipped),
    "wrong normalisation: not rescaled (0 to 255)": pixels(renormalised(255.0)),
    "wrong normalisation: rescaled twice": pixels(renormalised(1 / 255)),
    "encoder: weights never loaded": change(tower, random_weights),
    "encoder: patch embedding zero": change(patches, scale(0.0)),
    "encoder: gain of its first norm zero": change(first_norm, scale_weight(0.0)),
    "connector zeroed": change(connector, scale(0.0)),
    "connector never trained": change(connector, random_weights),
    "connector: weights zero, biases kept": change(last, scale_weight(0.0)),
    "connector: features shuffled on their way out": change(last, permuted(0)),
    "connector: features shuffled on their way in": change(first, permuted(1)),
    "connector: sign lost": change(last, scale(-1.0)),
    "connector: a thousand times too small": change(last, scale(1e-3)),
    "visual tokens: noise of the same size": tokens(noise),
    "visual tokens: the mean of earlier pictures": lambda chat: tokens(Mean())(chat),
    "visual tokens: the placeholder stays in place": tokens(placeholder),
    "visual tokens: rows and channels mixed up": tokens(misread),
    "decoder: weights never loaded": change(lambda chat: chat.model.model.language_model, random_weights),
}
DAMAGED: dict[str, Callable[[Chat], None]] = {
    "red and blue exchanged": pixels(lambda values: values.flip(1)),
    "another model's mean and deviation": pixels(renormalised(1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
    "half the resolution": each(halved),
    "positions of patches shuffled": change(tower, shuffled_positions),
    "features of another layer": layer(0),
}


def nothing(chat: Chat) -> None:
    """The model as it is."""


def sound(folder: Path, final: Path, questions: Path) -> dict[str, dict[str, Any]]:
    """Sound ways to use, store and change the model, and what of `model`, `change`, `questions`, ... differs."""
    from llavakit.checkpoints.convert import convert

    if not (folder / "hf").is_dir():
        convert(final, folder / "hf", to="hf")
    lora = folder / "lora"
    if not (lora / "final").is_dir():
        tuned = recipe(
            folder,
            0.5,
            "lora",
            init=dict.fromkeys(("vision_tower", "multi_modal_projector", "language_model"), str(final)),
            lora={"rank": 4, "alpha": 8},
            train={},
            learning_rate=5e-4,
        )
        train(tuned, console=QUIET)
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    parts = {}
    for kind in ("colour", "shape"):
        parts[kind] = questions.with_name(f"{kind}.jsonl")
        some = [row for row in rows if row["type"] == kind]
        parts[kind].write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    turned = questions.with_name("turned.jsonl")
    turned.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]), encoding="utf-8")
    return {
        "as trained": {},
        "questions in another order, another seed": {"questions": turned, "seed": 7},
        "questions about colours alone": {"questions": parts["colour"]},
        "questions about shapes alone": {"questions": parts["shape"]},
        "exported to transformers' layout, read again": {"model": folder / "hf"},
        "a LoRA trained and merged": {"model": lora / "final"},
        "in bfloat16": {"dtype": "bfloat16"},
        "weights rounded to 8 bits": {"change": change(lambda chat: chat.model, rounded)},
        "weights with 1 % noise": {"change": change(lambda chat: chat.model, jittered)},
        "pictures as JPEG of quality 60": {"change": each(jpeg)},
    }


# Answers


SAMPLES: dict[tuple[str, str], dict[str, Any]] = {}


def encoded(chat: Chat, conversation: list[dict[str, Any]]) -> dict[str, Any]:
    """A prompt with its picture; the same for all models, so each is made once."""
    parts = conversation[0]["content"]
    images = [part["image"] for part in parts if part["type"] == "image"]
    if images and not isinstance(images[0], (str, bytes)):
        return chat.processor.encode(conversation, add_generation_prompt=True)
    key = (" ".join(part.get("text", "") for part in parts), repr(images))
    if key not in SAMPLES:
        SAMPLES[key] = chat.processor.encode(conversation, add_generation_prompt=True)
    return SAMPLES[key]


def together(chat: Chat) -> None:
    """Answers by transformers' `generate`, a whole batch at once, which saves time where a model is so small."""
    ends = chat.eos_token_ids

    @torch.no_grad()
    def answer_all(conversations: Conversations, **sampling: Any) -> list[Answer]:
        samples = [encoded(chat, own) for own in conversations]
        longest = max(len(sample["input_ids"]) for sample in samples)
        ids = torch.full((len(samples), longest), chat.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for number, sample in enumerate(samples):
            ids[number, longest - len(sample["input_ids"]) :] = torch.tensor(sample["input_ids"])
            mask[number, longest - len(sample["input_ids"]) :] = 1
        views = [torch.as_tensor(view).to(chat.model.dtype) for sample in samples for view in sample["pixel_values"]]
        media = {"pixel_values": torch.stack(views)} if views else {}
        greedy = {"max_new_tokens": LONGEST, "do_sample": False, "eos_token_id": list(ends)}
        found = chat.model.generate(input_ids=ids, attention_mask=mask, **media, **greedy)
        texts = chat.tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
        return [Answer(content=text) for text in texts]

    chat.answer_all = answer_all


# The table


def examined(final: Path, name: str, folder: Path, limits: Sequence[int], **how: Any) -> dict[str, Any]:
    """The check of one model, with more questions as long as it cannot tell; a result that exists is taken."""
    place = folder / "checks" / "".join(letter if letter.isalnum() else "-" for letter in name)
    kept = place / "result.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    begun = time.process_time()
    chat = load(how.get("model", final), dtype=how.get("dtype"), responder="plain", max_batch=BATCH)
    together(chat)
    how.get("change", nothing)(chat)
    options = {"batch_size": BATCH, "seed": how.get("seed", 0), "console": QUIET}
    for limit in limits:
        found = check_blind(chat, "phantom", how["questions"], place, limit=limit, **options)
        if found["verdict"] != CANNOT_TELL:
            break
    found["seconds"] = time.process_time() - begun
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def row(name: str, found: Mapping[str, Any]) -> str:
    scores = " | ".join(f"{found['scores'][side]['value']:.0f}" for side in (RIGHT, BLANK, OTHER))
    gain = found["gains"][OTHER]
    spread = f"{gain['low']:+.0f} to {gain['high']:+.0f}"
    return f"| {name} | {found['n']} | {scores} | {spread} | {found['changed'][OTHER]:.0f} | {found['verdict']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/does_it_see"))
    parser.add_argument("--cases", type=int, default=1500)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--questions", type=int, nargs="+", default=[80, 500])
    parser.add_argument("--only", choices=("blinded", "sound", "damaged"), nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world(arguments.folder / "scene", arguments.cases, seed=0)
    questions = asked(arguments.folder / "asked", POOL)
    final = train(recipe(arguments.folder, arguments.epochs, "model")).final
    groups: dict[str, Callable[[], dict[str, dict[str, Any]]]] = {
        "blinded": lambda: {name: {"change": how} for name, how in BLINDED.items()},
        "sound": lambda: sound(arguments.folder, final, questions),
        "damaged": lambda: {name: {"change": how} for name, how in DAMAGED.items()},
    }
    print("| model | n | right | blank | other | right minus other, 95 % | answers changed, % | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    counts = {}
    for group, members in groups.items():
        if arguments.only and group not in arguments.only:
            continue
        print(f"| **{group}** | | | | | | | |")
        said = []
        for name, how in members().items():
            found = examined(final, name, arguments.folder, arguments.questions, **{"questions": questions, **how})
            said.append(found["verdict"])
            print(row(name, found), flush=True)
        counts[group] = {verdict: said.count(verdict) for verdict in dict.fromkeys(said)}
    print()
    for group, own in counts.items():
        wanted = DOES_NOT if group == "blinded" else USES
        print(f"{group}: {own.get(wanted, 0)} of {sum(own.values())} *{wanted}* ({own})")


if __name__ == "__main__":
    main()
