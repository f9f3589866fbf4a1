#!/usr/bin/env bash
# Weights in 8 bits are meant to make decoding faster, which waits for memory: torchao's guides recommend
# `Int8WeightOnlyConfig` for that. On an x86 processor without AMX a linear layer in float32 gets slower by it, also for the
# one row of a decoding step, because the weights are turned to floats again in each call. PyTorch's own older 8-bit layer
# (`quantize_dynamic`) is several times faster than either.
#
# Seen with torchao 0.18.0 and torch 2.13.0 (CPU build) on an AMD EPYC with AVX2, one thread, a layer of 576 x 3072, one row:
# float32 0.20 ms, torchao 1.49 ms, quantize_dynamic 0.10 ms.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet torchao==0.18.0
cat >"$folder/check.py" <<'PYTHON'
import copy
import sys
import time
import warnings

warnings.filterwarnings("ignore")
import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig, quantize_

torch.set_num_threads(1)
torch.manual_seed(0)
plain = torch.nn.Sequential(torch.nn.Linear(576, 3072)).eval()
weight_only = copy.deepcopy(plain)
quantize_(weight_only, Int8WeightOnlyConfig())
dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {torch.nn.Linear}, torch.qint8)
row = torch.randn(1, 576)


def milliseconds(layer, rounds=200):
    best = float("inf")
    with torch.inference_mode():
        for _ in range(rounds):
            begin = time.perf_counter()
            layer(row)
            best = min(best, time.perf_counter() - begin)
    return best * 1000


found = {name: 1e9 for name in ("float32", "torchao", "quantize_dynamic")}
for _ in range(5):  # in turn, so that other work on the machine meets all of them
    for name, layer in zip(found, (plain, weight_only, dynamic)):
        found[name] = min(found[name], milliseconds(layer))
print("torchao", torchao.__version__, "torch", torch.__version__)
for name, value in found.items():
    print(f"{name:18} {value:.3f} ms")
sys.exit(not (found["torchao"] > 1.1 * found["float32"] and found["quantize_dynamic"] < found["float32"]))
PYTHON
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
