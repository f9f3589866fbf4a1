"""KG-LLaVA's golden components."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, GPT2Config, SwinConfig

from llavakit.checkpoints.files import LazyState
from llavakit.connectors.base import Features
from llavakit.conversation.messages import from_llava
from llavakit.data.preparation import prepare
from llavakit.evaluation.benchmarks.base import write_lines
from llavakit.evaluation.metrics import reports as report_metrics
from llavakit.evaluation.metrics import text as text_metrics
from llavakit.evaluation.score import score
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.proof.entries import array, check_keys, fitting, picture, prompt_text, scored, view_processor, views_of
from llavakit.proof.golden import Case, Example, Result, examples, take
from llavakit.retrieval.entries import Entry
from llavakit.retrieval.store import Store
from llavakit.splice.scatter import IGNORE
from llavakit.systems.kg_llava import checkpoint, radgraph, reports
from llavakit.systems.kg_llava.datastore import neighbours_of_others, store_captions
from llavakit.systems.kg_llava.medclip import MedClip
from llavakit.systems.kg_llava.triplets import Caption

TEMPLATES = {"vicuna_v1": "v1"}


def conversation(case: Case) -> Result:
    """Training records of labels and triplets."""
    splits = list(case.config.get("splits_kept", ("train", "val")))
    found = _records(
        take(case.inputs["records"]),
        take(case.inputs["retrieved_triplets"]),
        triplets=case.config.get("K", 7),
        seed=case.config.get("seed", 42),
        splits=splits,
    )
    return Result(json=found)


def _records(records: Any, found: Any, **options: Any) -> list[dict[str, Any]]:
    """What `kg_conversations` writes, without the number of the question, which the original does not note."""
    with tempfile.TemporaryDirectory() as place:
        source, retrieved, output = (Path(place) / f"{name}.json" for name in ("records", "retrieved", "output"))
        source.write_text(json.dumps(records), encoding="utf-8")
        retrieved.write_text(json.dumps(found), encoding="utf-8")
        prepare("kg_conversations", source, output, retrieved=str(retrieved), **options)
        written = json.loads(output.read_text(encoding="utf-8"))
    return [{key: value for key, value in record.items() if key != "template"} for record in written]


def retrieve_training(case: Case) -> Iterator[Example]:
    """Neighbours of pictures, and the captions of others among them."""
    case.informational("config.index")
    texts, owners = case.inputs["captions"], case.inputs["caption_image_ids"]
    pictures = [str(name) for name in case.inputs["query_image_ids"]]
    captions = [Caption(text, str(owner)) for text, owner in zip(texts, owners, strict=True)]
    vectors, queries = array(case.tensors["captions"]), array(case.tensors["images"])
    searched, kept = case.config.get("k_searched", 15), case.config.get("k_kept", 7)
    place = tempfile.TemporaryDirectory()
    store = store_captions(captions, vectors, Path(place.name) / "store")

    def retrieved() -> dict[str, Any]:
        whose = [{"image": name} for name in pictures]
        found = neighbours_of_others(store, queries, whose, searched=searched, kept=kept)
        return {name: [hit.entry.text for hit in hits] for name, hits in zip(pictures, found, strict=True)}

    name = next((key for key in case.wanted.json if key.startswith("neighbours_")), f"neighbours_{searched}")
    yield Example("retrieved", retrieved, "retrieved")
    yield Example(name, lambda: store.neighbours(queries, searched)[1].tolist(), name)
    yield Example("error", lambda: None, "error")
    place.cleanup()


def retrieve_inference(case: Case) -> Result:
    """Neighbours of a picture; the vectors of an index are searched as they are."""
    found = _neighbours(case.tensors["query"], case.tensors["store"], case.config.get("k", 7), metric="dot")
    return Result(json={"indices": found[0]})


def _neighbours(queries: torch.Tensor, vectors: torch.Tensor, k: int, metric: str = "cosine") -> list[list[int]]:
    with tempfile.TemporaryDirectory() as place:
        store = Store.create(Path(place) / "store", vectors.shape[1], metric=metric)
        store.add([Entry(str(number)) for number in range(len(vectors))], array(vectors))
        return store.neighbours(array(queries), k)[1].tolist()


def prompt_pipeline(case: Case) -> Result:
    """A picture's triplets, the record that they make, and the prompt of the evaluation."""
    config = case.config
    case.informational("config.temperature")
    captions = list(case.inputs["captions"])
    indices = _neighbours(case.tensors["image"], case.tensors["store"], config.get("k", 7))[0]
    near = [captions[index] for index in indices if index >= 0]
    record = {
        "img_id": "0",
        "img_path": "-",
        "split": "train",
        "nle": "-",
        "img_labels": take(case.inputs["img_labels"]),
    }
    made = _records([record], {"0": near}, triplets=config.get("k", 7), seed=config.get("seed", 42))[0]
    asked = made["conversations"][:1]
    messages = from_llava({"image": "-", "conversations": asked})
    prompt = prompt_text(TEMPLATES.get(config["conv_mode"], config["conv_mode"]), messages, add_generation_prompt=True)
    return Result(json={"indices": indices, "human_turn": asked[0]["value"], "prompt": prompt})


def report_sentences(case: Case) -> list[Example]:
    """Sections of reports, and their numbered sentences."""
    case.informational("config.spacy")
    defaults, config = reports.Headers(), case.config
    headers = reports.Headers(
        take(config.get("section_names", defaults.names)),
        take(config.get("main_sections", defaults.main)),
        take(config.get("findings_words", defaults.findings)),
    )

    def split(report: str) -> dict[str, Any]:
        found = reports.sections(report, headers)
        return {
            "sections": [section.text for section in found],
            "names": [section.name for section in found],
            "starts": [section.start for section in found],
            "sentences": reports.explanations(report, headers),
        }

    return examples(split, case.inputs)


def medclip_preprocess(case: Case) -> Iterator[Example]:
    """Every eighth row of MedCLIP's pixels, and their mean and deviation."""
    config = case.config
    case.informational("config.run_with", "config.resample", "inputs.json")  # what the tensors say too
    views = {"type": "grey_square", "size": config.get("size", 224), "crop": config.get("crop", 224)}
    views["background"] = config.get("pad_colour", 0)
    views |= {f"image_{key}": [config[key]] * 3 for key in ("mean", "std") if key in config}
    processor = view_processor({"image": {"views": views}}, {"image_size": views["crop"], "patch_size": 1})
    for key in case.tensors:
        number = key.removeprefix("image")

        def pixels(key: str = key, number: str = number) -> Result:
            grey = views_of(processor, "image", picture(case.tensors[key]))[0][:1]
            summary = torch.stack([grey.mean(), grey.std()])
            return Result(tensors={f"pixels{number}_rows": grey[:, ::8], f"pixels{number}_mean_std": summary})

        yield Example(key, pixels, tensors=(f"pixels{number}_*",))


def medclip(case: Case) -> Iterator[Example]:
    """Vectors of texts with and without a mask, and of pictures."""
    case.informational("config.published")
    kinds = {"text": BertConfig, "vision": SwinConfig}
    options = {
        side: check_keys(take(case.config[side]), kind().to_dict(), f"config.{side}") for side, kind in kinds.items()
    }
    net = MedClip(**options, projection=case.config["proj_dim"]).load(LazyState.of(case.weights()))
    ids, mask, pixels = (case.tensors.get(name) for name in ("input_ids", "attention_mask", "pixel_values"))
    pixels = None if pixels is None else fitting(pixels, net)

    def alone(row: int) -> torch.Tensor:
        shown = ids[row : row + 1] if mask is None else ids[row : row + 1, mask[row].bool()]
        return net.encode_text(shown)

    computed = {
        "text_no_mask": lambda: net.encode_text(ids),
        "text_masked": lambda: net.encode_text(ids, mask),
        "image": lambda: net.encode_image(pixels),
        "logits_per_text": lambda: net.similarity(net.encode_image(pixels), net.encode_text(ids)).T,
        "logits_per_image": lambda: net.similarity(net.encode_image(pixels), net.encode_text(ids)),
    }
    for name in case.wanted.tensors:
        found = name.removeprefix("text_row").removesuffix("_alone_no_mask")
        compute = computed.get(name) or (lambda row=found: alone(int(row)))
        yield Example(name, lambda name=name, compute=compute: Result(tensors={name: compute()}), tensors=(name,))


def prefix_mapper(case: Case) -> Result:
    """The prefix of a picture's vector, and logits and loss of GPT-2 behind it."""
    config, weights = case.config, case.weights()
    gpt2 = {"n_positions": weights["gpt.transformer.wpe.weight"].shape[0]}
    gpt2 |= check_keys(take(config["gpt2"]), GPT2Config().to_dict(), "config.gpt2")
    options = ("prefix_length", "clip_length", "num_layers", "heads", "mlp_ratio", "qkv_bias", "act")
    mapper = {name: config[name] for name in options if name in config}
    raw = {"gpt2": gpt2, "mapper": mapper, "dim_clip": config["dim_clip"], "vision": TINY_SWIN}
    width = gpt2["n_embd"]
    if config.get("dim_embedding", width) != width:
        raise ValueError(f"config.dim_embedding: is {config['dim_embedding']}, GPT-2 has {width}")
    net = LlavakitForConditionalGeneration(checkpoint.ClipCaption().read_config(raw, {})).eval()
    state = checkpoint.in_memory(LazyState.of(weights))
    left = net.load_state_dict({name: state[name] for name in state}, strict=False)
    missing = [name for name in left.missing_keys if not name.startswith(("model.vision_tower.", "lm_head."))]
    if missing or left.unexpected_keys:
        raise ValueError(f"weights: {(missing + left.unexpected_keys)[0]}")
    net.tie_weights()
    embedding, tokens, mask = (case.tensors.get(name) for name in ("embedding", "tokens", "mask"))
    with torch.no_grad():
        features = Features(fitting(embedding, net), [(1, 1, 1)] * len(embedding), list(range(len(embedding))))
        found = net.model.multi_modal_projector(features, [])
        prefix = torch.stack(found.split())
        embeds = torch.cat([prefix, net.get_input_embeddings()(tokens)], dim=1)
        ahead = torch.full(prefix.shape[:2], IGNORE)
        labels = torch.cat([ahead, tokens.masked_fill(tokens == 0, IGNORE)], dim=1)
        seen = None if mask is None else mask.long()
        visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        visual[:, : prefix.shape[1]] = True
        places = torch.arange(embeds.shape[1])[None]  # the original counts padding too
        out = net(inputs_embeds=embeds, attention_mask=seen, position_ids=places, labels=labels, visual_mask=visual)
    return Result(tensors={"prefix": prefix, "logits": out.logits}, json={"loss": float(out.loss)})


TINY_SWIN = {"image_size": 8, "patch_size": 4, "embed_dim": 4, "depths": [1], "num_heads": [1], "window_size": 2}


def radgraph_output(case: Case) -> Iterator[Example]:
    """Observations, what they suggest, F1 of graphs, tokens of reports, entities of spans."""
    case.informational("config.licence")
    graphs = [take(annotation["0"]) for annotation in case.inputs.get("annotations", ())]
    entities = [graph["entities"] for graph in graphs]

    def suggested(graph: Mapping[str, Any]) -> list[str]:
        return [text for found in radgraph.observations(graph) for text in found["suggestive_of"] or ()]

    def rewards(pair: Any) -> list[float]:
        names = [f"radgraph_lower_{level}" for level in report_metrics.LEVELS]
        with tempfile.TemporaryDirectory() as place:
            files = Path(place) / "prediction.jsonl", Path(place) / "reference.jsonl"
            for file, number in zip(files, pair, strict=True):
                write_lines(file, [{"id": 0, "text": "", "graph": entities[number]}])
            found = score("report", *files, metrics=names, empty="score")["metrics"]["scores"]
        return [found[name]["value"] / 100 for name in names]

    def spans(item: Any) -> Any:
        return radgraph.entities_of(*take(item))

    yield from examples(radgraph.observations, graphs, "processed")
    yield from examples(suggested, graphs, "suggestive_triplets")
    yield from examples(rewards, case.inputs.get("pairs", ()), "rewards_simple_partial_complete")
    yield from examples(radgraph.tokenised, case.inputs.get("texts", ()), "tokenised_reports")
    yield from examples(spans, case.inputs.get("ner_relations_tokens", ()), "entities")


def caption_metrics(case: Case) -> Iterator[Example]:
    """Metrics of the COCO caption code over a corpus, and of every sentence."""
    case.informational("config.tokenisation")
    config = case.config
    beta, order, sigma = (config.get(*own) for own in (("rouge_beta", 1.2), ("cider_n", 4), ("cider_sigma", 6.0)))
    texts, wanted = list(case.inputs["hypotheses"]), [list(own) for own in case.inputs["references"]]
    rouge = partial(text_metrics.coco_rouge_l, texts, wanted, beta=beta)
    consensus = partial(text_metrics.coco_cider, texts, wanted, order=order, sigma=sigma)
    bleu = [text_metrics.coco_bleu_1, text_metrics.coco_bleu_2, text_metrics.coco_bleu_3, text_metrics.coco_bleu_4]
    usual = (beta, order, sigma) == (1.2, 4, 6.0)

    def benchmark(*names: str) -> list[float]:
        found = scored("text_overlap", texts, [{"text": "-", "answers": own} for own in wanted], metrics=names)
        return [found[name] / 100 for name in names]

    yield Example("bleu", lambda: benchmark(*(f"coco_bleu_{n}" for n in (1, 2, 3, 4))), "bleu")
    yield Example("bleu_per_sample", lambda: [list(metric(texts, wanted).each) for metric in bleu], "bleu_per_sample")
    for name, metric in (("rouge_l", rouge), ("cider", consensus)):
        whole = partial(benchmark, f"coco_{name}")
        value = (lambda whole=whole: whole()[0]) if usual else (lambda metric=metric: metric().value)
        yield Example(name, value, name)
        yield Example(f"{name}_per_sample", lambda metric=metric: list(metric().each), f"{name}_per_sample")


ADAPTERS: dict[str, Any] = {
    "conversation": conversation,
    "retrieve_training": retrieve_training,
    "retrieve_inference": retrieve_inference,
    "prompt_pipeline": prompt_pipeline,
    "report_sentences": report_sentences,
    "medclip_preprocess": medclip_preprocess,
    "medclip": medclip,
    "prefix_mapper": prefix_mapper,
    "radgraph": radgraph_output,
    "caption_metrics": caption_metrics,
}
