#!/usr/bin/env bash
# PEFT's LoRA layer for nn.MultiheadAttention changes the frozen weights a little in every forward pass, without gradients
# too: it adds the adapter to the weights before the pass and subtracts it afterwards, and both round. In bfloat16 a
# thousand passes with one fixed adapter change the answer of the same input. Expected: frozen weights stay as they are.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import peft
import torch

print("torch", torch.__version__, "peft", peft.__version__)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


drift = {}
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["attn"], init_lora_weights=False)
    model = peft.get_peft_model(Net().to(dtype), config).eval()
    frozen = model.base_model.model.attn.base_layer.in_proj_weight.detach().clone()
    x = torch.randn(2, 5, 64, dtype=dtype)
    with torch.no_grad():
        first = model(x)
        for _ in range(1000):
            last = model(x)
    now = model.base_model.model.attn.base_layer.in_proj_weight.detach()
    drift[dtype] = ((now - frozen).float().norm() / frozen.float().norm()).item()
    changed = ((last - first).float().norm() / first.float().norm()).item()
    print(f"{dtype}: frozen weights changed by {drift[dtype]:.1e} of their size, the answer by {changed:.1e}")
if drift[torch.bfloat16] < 1e-4:
    raise SystemExit("the behaviour has changed")
print("confirmed: frozen weights drift")
PYTHON
