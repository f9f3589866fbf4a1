"""transformers' Auto classes know llavakit's model after `import llavakit`, however the two were imported."""

import subprocess
import sys

import pytest

KNOWN = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = AutoConfig.for_model("llavakit")
assert type(config).__name__ == "LlavakitConfig"
assert AutoModelForImageTextToText._model_mapping[type(config)].__name__ == "LlavakitForConditionalGeneration"
assert AutoModel._model_mapping[type(config)].__name__ == "LlavakitModel"
assert PROCESSOR_MAPPING[type(config)].__name__ == "LlavakitProcessor"
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "llavakit.hf"]
spec = sys.modules["transformers.modeling_utils"].__spec__
assert type(spec.loader).__module__ != "llavakit.hf"
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "before",
    [
        "import llavakit, sys; assert 'transformers' not in sys.modules;"
        "from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING as known;"
        "from llavakit import LlavakitConfig; assert LlavakitConfig in known",
        "import llavakit.model.modeling",
        pytest.param("import transformers, llavakit", marks=pytest.mark.slow),
        pytest.param("from transformers import AutoModel, AutoProcessor; import llavakit", marks=pytest.mark.slow),
        pytest.param("import llavakit; from transformers import Trainer", marks=pytest.mark.slow),
    ],
)
def test_auto_classes_know_the_model(before):
    run(before + KNOWN)


def test_a_failure_to_register_leaves_transformers_usable():
    run("""
import sys, types, warnings
import llavakit
broken = types.ModuleType("llavakit.model.registration")
def fail(): raise RuntimeError("too old")
broken.register_config = broken.register_models = broken.register_processors = fail
sys.modules["llavakit.model"] = types.ModuleType("llavakit.model")
sys.modules["llavakit.model.registration"] = broken
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import AutoConfig
    assert AutoConfig.for_model("llama").model_type == "llama"
assert any("too old" in str(warning.message) for warning in caught)
""")
