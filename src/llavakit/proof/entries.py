"""The users' entries, with as little around them as a golden case needs.

An adapter holds ids, pixels and weights of a case; a user holds a checkpoint folder, messages and media. What lies
between the two is the same for every system and is written here once: a case's weights become a folder that
`open_checkpoint` reads, its texts go through `Samples` and `LlavakitProcessor.encode`, its prompts through the engine.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from llavakit.checkpoints.encoders import encoder_options, read_encoder
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.conversation.messages import is_media, normalise, split_literals
from llavakit.conversation.template import get_template
from llavakit.data.records import Record
from llavakit.errors import UserError
from llavakit.evaluation.score import score
from llavakit.generation.engine import Engine
from llavakit.generation.request import Request, SamplingParams
from llavakit.model.configuration import LlavakitConfig, build_config
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.splice.scatter import IGNORE
from llavakit.training.dataset import Samples

# Checkpoints


def published_model(
    raw: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    encoder: Mapping[str, Any] | None = None,
    *,
    encoders: Mapping[str, Mapping[str, Any]] | None = None,
    added_tokens: Mapping[str, int] | None = None,
    change: Callable[[LlavakitConfig], None] | None = None,
) -> LlavakitForConditionalGeneration:
    """The model of a published checkpoint: the files as their authors would lay them out, opened as a user opens them.

    Args:
        raw: config.json.
        weights: Tensors under their published names.
        encoder: Configuration of the encoder with its `model_type`; it goes into a folder that `raw` names.
        encoders: config.json of several encoders, by the key under which `raw` is to name each one's folder.
        added_tokens: Special tokens of the folder's tokenizer by name, where the layout asks for them.
        change: Edits llavakit's configuration before the model is built, as a user may.

    Raises:
        UserError: If the files are not in a known layout, or a tensor does not fit.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        folder.mkdir()
        raw = dict(raw)
        if encoder is not None:
            tower = Path(place) / f"{encoder['model_type'].removesuffix('_vision_model')}-tower"
            tower.mkdir()
            (tower / "config.json").write_text(json.dumps(dict(encoder)), encoding="utf-8")
            raw["mm_vision_tower"] = str(tower)
        for key, own in (encoders or {}).items():
            raw[key] = str(encoder_folder(Path(place) / key, own))
        (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        if added_tokens is not None:
            listed = [{"id": number, "content": name} for name, number in added_tokens.items()]
            (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": listed}), encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
        checkpoint = open_checkpoint(folder)
        if change is not None:
            change(checkpoint.config)
        return build(checkpoint)


def encoder_folder(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Path:
    """An encoder's folder as its authors would lay it out, with or without weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    if weights is not None:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def published_encoder(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> torch.nn.Module:
    """The encoder of a published folder, in evaluation mode and in the type of its weights.

    Args:
        config: config.json.
        weights: Tensors under their published names.

    Raises:
        CheckpointError: If a key or a tensor has no place.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = encoder_folder(Path(place) / "encoder", config, weights)
        options = encoder_options(folder)
        encoder = AutoModel.from_config(build_config(options, options["model_type"]))
        state = read_encoder(folder)
        if any(name.startswith("vision_model.") for name in encoder.state_dict()):  # some releases of transformers
            state = state.renamed(lambda name: f"vision_model.{name}")
        return loaded(encoder, {name: state[name] for name in state})


def check_keys(options: Mapping[str, Any], known: Iterable[str], where: str) -> dict[str, Any]:
    """`options` as they are.

    Raises:
        UserError: If one is not among the known ones; transformers' configurations would keep it in silence.
    """
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"{where}.{unknown[0]}: unknown; known: {', '.join(sorted(known))}")
    return dict(options)


# Parts alone


def loaded(part: Any, state: Mapping[str, Tensor]) -> Any:
    """A part with a case's weights in their stored type, in evaluation mode."""
    part.load_state_dict(dict(state), assign=True)
    types = {tensor.dtype for tensor in part.state_dict().values() if tensor.is_floating_point()}
    return part.to(next(iter(types))).eval() if len(types) == 1 else part.eval()


def fitting(x: Tensor, part: Any) -> Tensor:
    """An input in the type of a part's weights, as the model hands it over."""
    own = next((p for p in part.parameters() if p.is_floating_point()), None)
    return x if own is None else x.to(own.dtype)


# Text


TINY = {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 4}


def one_token_media() -> LlavakitConfig:
    """A configuration under which every image and every video of one frame is one visual token."""
    view = {"type": "squash", "size": 2}
    return LlavakitConfig(
        text_config={"model_type": "llama", "vocab_size": 8, **TINY},
        vision_config={"model_type": "clip_vision_model", "image_size": 2, "patch_size": 2, **TINY},
        connector={"type": "mlp"},
        media={"image": {"views": view}, "video": {"views": {"type": "frames", "frame": view}}},
    )


def text_processor(
    tokenizer: Any, template: str, config: LlavakitConfig | None = None, **options: Any
) -> LlavakitProcessor:
    """A processor for text: every media item of a message is one token."""
    return LlavakitProcessor.from_config(config or one_token_media(), tokenizer, template=template, **options)


BLANK = Image.new("RGB", (2, 2))


def with_blank_media(messages: Sequence[Mapping[str, Any]], frames: int = 1) -> list[dict[str, Any]]:
    """Messages in which every media item is an open blank picture (or a video of some); templates never look at it."""
    stand_in = {"image": BLANK, "video": [BLANK] * frames, "volume": np.zeros((2, 2, 2), np.float32)}

    def filled(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"type": part["type"], part["type"]: stand_in[part["type"]]} if is_media(part) else part

    return [{**message, "content": list(map(filled, message["content"]))} for message in messages]


def training_sample(
    processor: LlavakitProcessor, messages: Sequence[Mapping[str, Any]], *, frames: int = 1, **options: Any
) -> dict[str, Any]:
    """Ids and labels of a training sample in the original's form, with -200 at media; see `Samples`.

    Args:
        frames: Of every video.

    Training refuses a record of which nothing is left to learn; the original makes a sample of it all the same.
    """
    messages = with_blank_media(messages, frames)
    sample = processor.encode(messages, **options)
    if any(label != IGNORE for label in sample["labels"]):
        sample = Samples([Record(messages, "case", 1, {})], processor, options=options)[0]
    labels = [int(label) for label in sample["labels"]]
    return sample | {"input_ids": original_ids(processor, sample["input_ids"]), "labels": labels}


def prompt_ids(processor: LlavakitProcessor, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """Ids of a prompt in the original's form, with -200 at media."""
    return original_ids(processor, processor.encode(with_blank_media(messages), **options)["input_ids"])


def original_ids(processor: LlavakitProcessor, ids: Iterable[Any]) -> list[int]:
    """Ids with the original's placeholder at media."""
    return [IMAGE_PLACEHOLDER if int(i) == processor.image_token_id else int(i) for i in ids]


@functools.cache
def byte_tokenizer() -> Any:
    """A tokenizer of 256 bytes without a begin token: what it encodes, it decodes to the same text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def toy_tokenizer(end: str = "</s>", adds_bos: bool = True) -> Any:
    """A tokenizer of some cases: 0 pads, 1 begins a sequence, 2 is the end string, 3 + b is the byte b."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    begin, pad = "<|begin|>", "<|pad|>"
    vocabulary = {pad: 0, begin: 1, end: 2} | {letter: 3 + byte for byte, letter in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, eos_token=end, pad_token=pad)


def turns_to_messages(turns: Iterable[tuple[int, str]]) -> list[dict[str, Any]]:
    """Messages of (0 for the user or 1 for the assistant, text), with media at `<image>`."""
    messages = [{"role": ("user", "assistant")[who], "content": split_literals(text)} for who, text in turns]
    return normalise(messages) if messages else []


def prompt_text(template: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """What a prompt says, read back from the ids that `LlavakitProcessor.encode` gives."""
    # Asking needs a user turn first and an open end; the original's prompt strings exist without either.
    if not messages or messages[0]["role"] == "assistant" or not options.get("add_generation_prompt"):
        return get_template(template).render(messages, **options)[0]
    processor = text_processor(byte_tokenizer(), template)
    ids = processor.encode(with_blank_media(messages), pixels=False, **options)["input_ids"]
    return processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# Pixels


def view_processor(media: Mapping[str, Any], vision: Mapping[str, Any], **options: Any) -> LlavakitProcessor:
    """A processor that cuts views for an encoder.

    Args:
        media: `config.media`.
        vision: `image_size` and `patch_size` of the encoder.
    """
    config = LlavakitConfig(
        text_config={"model_type": "llama", "vocab_size": 8, **TINY},
        vision_config={"model_type": "clip_vision_model", **TINY, **vision},
        connector={"type": "mlp"},
        media=dict(media),
    )
    return LlavakitProcessor.from_config(config, byte_tokenizer(), template="plain", **options)


def views_of(processor: LlavakitProcessor, modality: str, item: Any) -> list[Tensor]:
    """The views of one media item, from a message that holds nothing else."""
    message = {"role": "user", "content": [{"type": modality, modality: item}]}
    return processor.encode([message], add_generation_prompt=True)["pixel_values"]


def array(values: Tensor) -> np.ndarray:
    """A tensor as NumPy has it; NumPy knows no bfloat16."""
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def picture(values: Tensor) -> Image.Image:
    """A picture of a tensor [height, width] or [height, width, 1, 3 or 4] of 8-bit values."""
    values = values.to(torch.uint8).numpy()
    return Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values)


# Replies


def greedy(
    model: LlavakitForConditionalGeneration,
    samples: Sequence[Mapping[str, Any]],
    max_new_tokens: int,
    eos: Sequence[int] = (),
    **request: Any,
) -> list[list[int]]:
    """New ids of greedy decoding, all samples decoded together by one engine, as `Chat` does.

    Args:
        samples: As `LlavakitProcessor.encode` gives them.
        request: Further fields of `Request`.
    """
    sampling = SamplingParams(max_new_tokens=max_new_tokens, eos_token_ids=tuple(eos))
    engine = Engine(model, max_batch=max(len(samples), 1))
    requests = []
    for sample in samples:
        views = list(sample["pixel_values"])
        requests.append(
            Request(
                input_ids=torch.as_tensor(sample["input_ids"]),
                pixel_values=views or None,
                visual_sizes=torch.tensor(sample["visual_sizes"]) if views else None,
                visual_modalities=torch.tensor(sample["visual_modalities"]) if views else None,
                sampling=sampling,
                **request,
            )
        )
    return [reply.token_ids for reply in engine.generate(requests)]


def engine_logits(
    model: LlavakitForConditionalGeneration,
    sample: Mapping[str, Any],
    begin: int,
    reply: Sequence[int] = (),
    **request: Any,
) -> Tensor:
    """Logits of an engine that is given a prompt and what it would have answered, from the prompt's last position on.

    Args:
        sample: As `LlavakitProcessor.encode` gives it.
        begin: Length of the prompt; the sample's further ids are the beginning of the answer.
        reply: Ids that the answer goes on with.
        request: Further fields of `Request`.

    Returns:
        [1 + ids behind the prompt, vocabulary]
    """
    ids = [int(token) for token in sample["input_ids"]]
    views = list(sample["pixel_values"])
    prompt = Request(
        input_ids=torch.tensor(ids[:begin]),
        pixel_values=views or None,
        visual_sizes=torch.tensor(sample["visual_sizes"]) if views else None,
        visual_modalities=torch.tensor(sample["visual_modalities"]) if views else None,
        visual_regions=sample.get("visual_regions") or None,
        **request,
    )
    end = [0]  # logits belong to the position in front of a token: one more shows those behind the last
    return Engine(model).reply_logits(prompt, [[*ids[begin:], *reply, *end]])[0]


# Scores


def scored(task: str, texts: Sequence[str], gold: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
    """The metrics of a benchmark, from a predictions file and a gold file as `llavakit score` reads them.

    Args:
        texts: A prediction per question.
        gold: What the benchmark's JSONL holds of every question, without its number.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "predictions.jsonl", Path(folder) / "gold.jsonl"
        rows = [{"text": text} for text in texts], gold
        for file, own in zip(files, rows, strict=True):
            lines = [json.dumps({"question_id": number, **row}) for number, row in enumerate(own)]
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return score(task, *files, **options)["metrics"]


def or_nan(value: float | None) -> float:
    """A metric as the originals' NumPy has it: what is not defined is null in llavakit's reports and NaN there."""
    return math.nan if value is None else value


def pope(answers: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """POPE under the names that its script prints; the original counts every label but "no" as yes."""
    found = scored("pope", answers, [{"label": "no" if label == "no" else "yes"} for label in labels])
    counts = {name: found[name.lower()] for name in ("TP", "FP", "TN", "FN")}
    rates = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1"}
    rates["Yes ratio"] = "yes_ratio"
    return counts | {name: found[key] / 100 for name, key in rates.items()}
