"""transformers' ModelTesterMixin and ConfigTester on llavakit's model; see scripts/transformers_mixins.sh."""

from __future__ import annotations

import unittest

import pytest
import torch

common = pytest.importorskip("transformers_tests.test_modeling_common", reason="make test-transformers-mixins")
configuration = pytest.importorskip("transformers_tests.test_configuration_common")

from llavakit.model.configuration import LlavakitConfig  # noqa: E402
from llavakit.model.modeling import LlavakitForConditionalGeneration, LlavakitModel  # noqa: E402

TOKEN = 0  # the mixin clamps ids from above when it shrinks the vocabulary


class Sizes:
    """Sizes and inputs of a tiny model, in the form that the mixin asks for."""

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.batch_size, self.num_channels, self.image_size = 3, 3, 16
        self.text_config = {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 99,
            "max_position_embeddings": 128,
            "pad_token_id": 1,
        }
        self.vision_config = {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": self.image_size,
            "patch_size": 8,
            "projection_dim": 32,
        }
        self.num_image_tokens = (self.image_size // 8) ** 2
        self.seq_length = 7 + self.num_image_tokens
        self.encoder_seq_length = self.seq_length
        self.hidden_size = self.text_config["hidden_size"]
        self.num_hidden_layers = self.text_config["num_hidden_layers"]
        self.num_attention_heads = self.text_config["num_attention_heads"]
        self.vocab_size = self.text_config["vocab_size"]
        self.pad_token_id = 1
        self.is_training = True

    def get_config(self) -> LlavakitConfig:
        return LlavakitConfig(
            text_config=dict(self.text_config),
            vision_config=dict(self.vision_config),
            image_token_id=TOKEN,
            vision_feature_layer=-1,
            media={"image": {"views": {"type": "squash", "size": self.image_size}}},
        )

    def prepare_config_and_inputs(self):
        pixels = common.floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), pixels

    def prepare_config_and_inputs_for_common(self):
        config, pixels = self.prepare_config_and_inputs()
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 2) + 2
        ids[:, : self.num_image_tokens] = TOKEN
        return config, {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


class LlavakitModelTest(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (LlavakitModel, LlavakitForConditionalGeneration)
    test_resize_embeddings = True
    test_all_params_have_gradient = False  # post_layernorm has none: features are read in front of it
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = Sizes(self)
        self.config_tester = configuration.ConfigTester(
            self, config_class=LlavakitConfig, has_text_modality=False, common_properties=["image_token_id"]
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        # the mixin prepares labels only for class names in transformers' own tables
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=False)
        if return_labels and model_class is LlavakitForConditionalGeneration:
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs

    def _only_with_head(self, test, *args, **kwargs) -> None:
        # the base model has no loss to train; the mixin knows that only of names in transformers' own tables
        classes, self.all_model_classes = self.all_model_classes, (LlavakitForConditionalGeneration,)
        try:
            test(*args, **kwargs)
        finally:
            self.all_model_classes = classes

    def test_training(self) -> None:
        self._only_with_head(super().test_training)

    def check_training_gradient_checkpointing(self, *args, **kwargs) -> None:
        self._only_with_head(super().check_training_gradient_checkpointing, *args, **kwargs)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_mismatching_num_image_tokens(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = LlavakitForConditionalGeneration(config).eval()
        model(**inputs)
        one_less = {**inputs, "pixel_values": inputs["pixel_values"][:-1]}
        with pytest.raises(ValueError, match="do not match"):
            model(**one_less)
