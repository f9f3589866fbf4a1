"""transformers' ProcessorTesterMixin on llavakit's processor; see scripts/transformers_mixins.sh."""

from __future__ import annotations

import unittest

import pytest

common = pytest.importorskip("transformers_tests.test_processing_common", reason="make test-transformers-mixins")

from llavakit.model.configuration import LlavakitConfig  # noqa: E402
from llavakit.model.processing import LlavakitImageProcessorPil, LlavakitProcessor, architecture_of  # noqa: E402
from llavakit.phantom.tokenizer import tiny_tokenizer  # noqa: E402


class LlavakitProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlavakitProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer(["lower newer upper older longer string", "What is shown in this image?"])

    @classmethod
    def _setup_image_processor(cls):
        config = LlavakitConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
            media={"image": {"views": {"type": "pad", "size": 16}}},
        )
        return LlavakitImageProcessorPil(architecture_of(config))

    @staticmethod
    def prepare_processor_dict():
        return {"template": "v1"}
