"""Skills with the user's weights, on tiny random models of the real classes."""

from __future__ import annotations

import json

import numpy as np
import transformers
from PIL import Image

from llavakit.tools import Artefacts, Toolbox
from llavakit.tools.configuration import build_skill

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "dog", "cat", "a"]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def call(name, folder, **arguments):
    return Toolbox([build_skill(name, {"model": str(folder)})]).call(name, arguments, Artefacts(IMAGE))


def assert_detections(found):
    assert found.error is None
    assert len(found.data["boxes"]) == len(found.data["logits"]) == len(found.data["phrases"]) > 0
    assert found.data["size"] == [48, 64]
    assert np.asarray(found.data["boxes"]).shape[1] == 4


def test_sam_cuts_out_boxes_and_points(tmp_path):
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    vision |= {"output_channels": 16, "mlp_dim": 32, "window_size": 2, "global_attn_indexes": [0], "num_pos_feats": 8}
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    }
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    transformers.SamModel(config).save_pretrained(tmp_path)
    sides = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    sides |= {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    transformers.SamProcessor(transformers.SamImageProcessor(**sides)).save_pretrained(tmp_path)
    boxes = call("sam", tmp_path, boxes=[[0.1, 0.1, 0.5, 0.5], [0, 0, 1, 1]])
    assert [mask.shape for mask in boxes.masks] == [(48, 64)] * 2
    points = call("sam", tmp_path, points=[[0.5, 0.5], [0.1, 0.2]], point_labels=[1, 0])
    assert [mask.shape for mask in points.masks] == [(48, 64)]
    assert "give boxes or points" in call("sam", tmp_path).error
    assert "1 point_labels for 2 points" in call("sam", tmp_path, points=[[0, 0], [1, 1]], point_labels=[1]).error


def test_owlv2_finds_what_phrases_name(tmp_path):
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<|startoftext|>", "<|endoftext|>", *letters])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(vocabulary), "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Owlv2Config(
        text_config=text, vision_config=sizes | {"image_size": 64, "patch_size": 16}, projection_dim=16
    )
    transformers.Owlv2ForObjectDetection(config).save_pretrained(tmp_path)
    images = transformers.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    transformers.Owlv2Processor(images, tokenizer).save_pretrained(tmp_path)
    found = call("owlv2", tmp_path, caption="a dog . cat", box_threshold=0.0)
    assert_detections(found)
    assert set(found.data["phrases"]) <= {"a dog", "cat"}
    assert "names nothing" in call("owlv2", tmp_path, caption=" . ").error


def test_grounding_dino_finds_what_a_caption_names(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    swin = transformers.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    bert = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=10,
        max_text_len=32,
    )
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(tmp_path)
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 100})
    transformers.GroundingDinoProcessor(images, tokenizer).save_pretrained(tmp_path)
    assert_detections(call("grounding_dino", tmp_path, caption="a dog . cat", box_threshold=0.0, text_threshold=0.0))


def test_blip2_describes_a_picture(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<image>", "a", "dog", "cat", "<unk>"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<image>"], **special
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "model_type": "opt",
        "vocab_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 16,
    }
    text |= {
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.Blip2Config(
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        qformer_config=sizes | {"encoder_hidden_size": 16, "vocab_size": 10},
        text_config=text,
        num_query_tokens=4,
        image_token_index=3,
    )
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(tmp_path)
    found = call("blip2", tmp_path)
    assert found.error is None
    assert set(found.data["caption"].split()) <= {"a", "dog", "cat", "<unk>"}


def test_folders_of_something_else_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "cannot be loaded as SamModel" in call("sam", tmp_path, boxes=[[0, 0, 1, 1]]).error
