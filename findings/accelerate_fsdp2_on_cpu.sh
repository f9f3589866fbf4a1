#!/usr/bin/env bash
# accelerate drops an FSDP plugin on CPU processes without a warning: two gloo processes with
# Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)) get DistributedDataParallel with whole
# parameters, although PyTorch's fully_shard works there. Expected: DTensor parameters, or an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import accelerate
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
model = torch.nn.Linear(8, 8)
model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
theirs = {type(parameter.data).__name__ for parameter in model.parameters()}
own = torch.nn.Linear(8, 8)
fully_shard(own, mesh=init_device_mesh("cpu", (accelerator.num_processes,)))
direct = {type(parameter.data).__name__ for parameter in own.parameters()}
if accelerator.is_main_process:
    print("torch", torch.__version__, "accelerate", accelerate.__version__)
    print("through accelerate:", type(model).__name__, sorted(theirs), accelerator.distributed_type)
    print("by fully_shard:    ", type(own).__name__, sorted(direct))
    if type(model).__name__ != "DistributedDataParallel" or direct != {"DTensor"}:
        raise SystemExit("the behaviour has changed")
    print("confirmed: the plugin is dropped, the model is copied")
PYTHON
"$folder/venv/bin/torchrun" --nproc-per-node 2 --master-port "$((20000 + RANDOM % 20000))" "$folder/run.py" 2> "$folder/log" \
  || { cat "$folder/log" >&2; exit 1; }
