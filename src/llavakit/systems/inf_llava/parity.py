"""INF-LLaVA's golden components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from llavakit.conversation.encode import IMAGE_PLACEHOLDER
from llavakit.conversation.messages import from_llava
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.classic_batch import ClassicBatch, Entry
from llavakit.proof.entries import (
    check_keys,
    fitting,
    loaded,
    picture,
    prompt_text,
    published_model,
    text_processor,
    training_sample,
    turns_to_messages,
    view_processor,
    views_of,
)
from llavakit.proof.golden import Case, Example, Result, examples
from llavakit.systems.inf_llava.connector import CrossAttention, DualEnhancement
from llavakit.systems.inf_llava.cost import golden_flops
from llavakit.systems.inf_llava.cropping import blocks, interleaved, merge_blocks, merge_interleaved
from llavakit.views.plan import MediaSize

CROPS = 3  # a literal of the original model code
TEMPLATES = {"llama3": "inf_llama_3", "plain": "plain"}
LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>")
FIRST_SPECIAL = 300  # id of the first of them in the cases' tokenizer


def crop(case: Case) -> Result:
    """Both croppings."""
    tensors: dict[str, Tensor] = {}
    for name, n in case.config["grids"].items():
        tensors[f"{name}_local"] = torch.stack(blocks(case.tensors[name], n))
        tensors[f"{name}_global"] = torch.stack(interleaved(case.tensors[name], n))
    return Result(tensors=tensors)


def merge(case: Case) -> Result:
    """Their inverses, on maps of features."""
    tensors: dict[str, Tensor] = {}
    for name, n in case.config["grids"].items():
        pieces = case.tensors[name].transpose(0, 1)
        tensors[f"{name}_as_local"] = merge_blocks(pieces, n)
        tensors[f"{name}_as_global"] = merge_interleaved(pieces, n)
    return Result(tensors=tensors)


def attention(case: Case) -> Result:
    """The attention block and its weights."""
    net = loaded(CrossAttention(case.config["dim"], case.config["heads"]).eval(), case.weights())
    inputs = {name: fitting(tensor, net) for name, tensor in case.tensors.items()}
    query, key, value, mask = (inputs.get(name) for name in ("q", "k", "v", "mask"))
    with torch.no_grad():
        return Result(tensors={"out": net(query, key, value, mask), "attn": net.weights(query, key, mask)})


def enhancement(case: Case) -> Result:
    """The whole enhancement module."""
    config = case.config
    case.informational("config.view", "config.batch")
    net = loaded(DualEnhancement(config["channel"], config["n"]).eval(), case.weights())
    features = fitting(case.tensors["feats"], net).transpose(0, 1).unflatten(2, (config["grid"], -1))
    local, sampled = features.chunk(2, dim=1)
    with torch.no_grad():
        return Result(tensors={"out": net(local, sampled).flatten(1, 2)})


def model_of(case: Case) -> LlavakitForConditionalGeneration:
    """The case's model, opened as a released checkpoint."""
    config = case.config
    case.informational("config.grid")
    clip = check_keys(config["clip"], CLIPVisionConfig().to_dict(), "config.clip")
    raw = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", **config["llama"]}
    encoder = {"model_type": "clip_vision_model", **clip, "image_size": config["view"]}
    return published_model(raw, case.weights(), encoder)


def entries(model: LlavakitForConditionalGeneration, images: Tensor) -> list[Entry]:
    """Normalised square pictures as the model's views."""
    planner = model.model.media.route("image").planner
    size = MediaSize(1, *images.shape[-2:])
    return [
        Entry("image", size, [torch.from_numpy(view) for view in planner.split(image.float().numpy())])
        for image in images
    ]


def encode_images(case: Case) -> Iterator[Example]:
    """Normalised pictures of any size to projected tokens."""
    model = model_of(case)

    def tokens(images: Tensor) -> Tensor:
        found = entries(model, images)
        sizes = torch.tensor([entry.size for entry in found])
        with torch.no_grad():
            views = [view for entry in found for view in entry.views]
            return torch.stack(model.get_image_features(views, visual_sizes=sizes).pooler_output)

    for name, images in case.tensors.items():
        yield Example(name, lambda name=name, images=images: {name: tokens(images)}, tensors=(name,))


def end_to_end(case: Case) -> Iterator[Example]:
    """Spliced embeddings, labels, mask, logits and loss."""
    inputs, model = case.tensors, model_of(case)
    batch = ClassicBatch(
        model,
        inputs["input_ids"],
        {IMAGE_PLACEHOLDER: entries(model, inputs["images"])},
        attention_mask=inputs.get("attention_mask"),
        labels=inputs.get("labels"),
    )
    yield from batch.examples()


def preprocess(case: Case) -> Result:
    """The picture that both croppings are made from."""
    config = case.config
    views = {"type": config.get("image_aspect_ratio") or "square", "size": config["side"]}
    views |= {name: config[name] for name in ("image_mean", "image_std") if config.get(name) is not None}
    processor = view_processor({"image": {"views": views}}, {"image_size": config["side"], "patch_size": 1})
    (pixels,) = views_of(processor, "image", picture(case.tensors["image"]).convert("RGB"))
    return Result(tensors={"pixel_values": pixels})


def llama_3_bytes() -> Any:
    """The cases' tokenizer: bytes, Llama-3's special tokens, and a begin token in front of every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocabulary |= {token: FIRST_SPECIAL + number for number, token in enumerate(LLAMA_3_TOKENS)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    begin = LLAMA_3_TOKENS[0]
    backend.post_processor = processors.TemplateProcessing(f"{begin} $A", None, [(begin, FIRST_SPECIAL)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        additional_special_tokens=list(LLAMA_3_TOKENS[1:3]),
    )


def label_mask(case: Case) -> Iterator[Example]:
    """Ids and labels of training samples."""
    tokenizer = llama_3_bytes()

    def sample(given: Mapping[str, Any]) -> Result:
        turns = given["conversations"]
        images = sum(turn["value"].count("<image>") for turn in turns) if given["has_image"] else 0
        record = {"conversations": turns, **({"image": ["-"] * images} if images else {})}
        processor = text_processor(tokenizer, TEMPLATES[given["template"]])
        found = training_sample(processor, from_llava(record), placement="keep")
        return Result(json={name: found[name] for name in ("input_ids", "labels")})

    yield from examples(sample, case.inputs["samples"], "samples")


def prompts(case: Case) -> Iterator[Example]:
    """Conversation strings."""

    def written(dialog: Mapping[str, Any]) -> Result:
        turns = [(who, text or "") for who, text in dialog["messages"]]
        opened = turns[-1:] == [(1, "")]
        messages = turns_to_messages(turns[:-1] if opened else turns)
        template = TEMPLATES[dialog["template"]]
        prompt = prompt_text(template, messages, placement="keep", add_generation_prompt=opened)
        reason = "a field of the original's template object; the prompt shows it"
        return Result(
            json={"prompt": prompt}, ignored={f"dialogs.*.{key}": reason for key in ("roles", "sep", "system")}
        )

    yield from examples(written, case.inputs["dialogs"], "dialogs")


def flops(case: Case) -> Result:
    """Section 12."""
    return Result(json=golden_flops(), ignored={"convention": "words"})


ADAPTERS = {
    "dual_perspective_crop": crop,
    "dual_perspective_merge": merge,
    "dem_attention": attention,
    "dem": enhancement,
    "encode_images": encode_images,
    "end_to_end": end_to_end,
    "preprocess": preprocess,
    "label_mask": label_mask,
    "prompts": prompts,
    "flops": flops,
}
