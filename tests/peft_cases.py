"""Adapters made by PEFT with each of its LoRA options, opened by llavakit and compared with PEFT's own logits.

python tests/peft_cases.py        prints the table
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn

from llavakit.checkpoints.convert import convert, save
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.errors import CheckpointError

TOLERANCE = 1e-5


@dataclass
class Case:
    """An adapter.

    Attributes:
        options: Of PEFT's `LoraConfig`, on top of rank 4 on `q_proj` and `v_proj`; names of nested configurations
            are those of PEFT's classes.
        decoder, connector: Parts of the base model, see `tiny`.
        refused: Part of the line with which the adapter is refused; None if it is merged.
        bare: Write the options without tensors: PEFT cannot attach them to this model.
        needs: A package that PEFT wants.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    decoder: str = "llama"
    connector: str = "mlp"
    refused: str | None = None
    bare: bool = False
    needs: str | None = None


TARGETS = ["q_proj", "v_proj"]
MIXED = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
CASES = [
    Case("r, lora_alpha", {"r": 3, "lora_alpha": 7}),
    Case("lora_dropout", {"lora_dropout": 0.5}),
    Case("target_modules: a regular expression", {"target_modules": r".*\.layers\.\d+\.mlp\.(up|down)_proj"}),
    Case("target_modules: all-linear", {"target_modules": "all-linear"}),
    Case("target_modules: convolution", {"target_modules": ["patch_embedding", "q_proj"]}),
    Case("target_modules: embeddings and head", MIXED),
    Case("target_modules: attention module", {"target_modules": ["attn", "q_proj"]}, connector="resampler"),
    Case("target_modules: tied embeddings", {"target_modules": ["embed_tokens"]}, decoder="qwen2"),
    Case("target_modules: tied head", {"target_modules": ["lm_head"]}, decoder="qwen2"),
    Case("target_modules: tied both", MIXED, decoder="qwen2"),
    Case("ensure_weight_tying", {**MIXED, "ensure_weight_tying": True}, decoder="qwen2"),
    Case("exclude_modules", {"exclude_modules": ["layers.1.self_attn.v_proj"]}),
    Case("layers_to_transform", {"layers_to_transform": [1]}),
    Case("layers_pattern", {"layers_to_transform": [0], "layers_pattern": "layers"}),
    Case("rank_pattern", {"rank_pattern": {"v_proj": 2, r"^model\.language_model\.layers\.0\.self_attn\.q_proj": 6}}),
    Case("alpha_pattern", {"alpha_pattern": {"v_proj": 31}}),
    Case(
        "rank_pattern, alpha_pattern, use_rslora",
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    ),
    Case("use_rslora", {"use_rslora": True}),
    Case("use_dora", {"use_dora": True, "target_modules": [*TARGETS, "up_proj", "patch_embedding"]}),
    Case("use_dora: embeddings", {"use_dora": True, "target_modules": ["embed_tokens"]}),
    Case("fan_in_fan_out", {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}, decoder="gpt2"),
    Case("bias: all", {"bias": "all"}, decoder="qwen2"),
    Case("bias: lora_only", {"bias": "lora_only"}, decoder="qwen2"),
    Case("lora_bias", {"lora_bias": True}, decoder="qwen2"),
    Case("lora_bias without a bias to add to", {"lora_bias": True}, refused="lora_bias"),
    Case("modules_to_save", {"modules_to_save": ["multi_modal_projector", "embed_tokens", "lm_head"]}),
    Case("modules_to_save: tied embeddings", {"modules_to_save": ["embed_tokens"]}, decoder="qwen2"),
    Case("modules_to_save: tied head", {"modules_to_save": ["lm_head"]}, decoder="qwen2"),
    Case(
        "modules_to_save, ensure_weight_tying",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        decoder="qwen2",
    ),
    Case("trainable_token_indices", {"trainable_token_indices": [3, 7, 5]}),
    Case("trainable_token_indices: by name", {"trainable_token_indices": {"embed_tokens": [4], "lm_head": [2, 9]}}),
    Case("trainable_token_indices: tied", {"trainable_token_indices": [3, 7]}, decoder="qwen2"),
    Case("target_parameters", {"target_modules": [], "target_parameters": ["up_proj.weight"]}),
    Case("target_parameters, target_modules", {"target_parameters": ["up_proj.weight", "down_proj.weight"]}),
    *(
        Case(f"init_lora_weights: {kind}", {"init_lora_weights": kind})
        for kind in (False, "gaussian", "olora", "pissa", "orthogonal", "mica", "eva", "lora_ga")
    ),
    Case(
        "init_lora_weights: loftq",
        {"init_lora_weights": "loftq", "loftq_config": "LoftQConfig"},
        refused="loftq",
        bare=True,
        needs="scipy",
    ),
    Case("init_lora_weights: pissa_niter_4", {"init_lora_weights": "pissa_niter_4"}, refused="pissa_niter_4"),
    Case("init_lora_weights: corda", {"init_lora_weights": "corda"}, refused="preprocess_corda", bare=True),
    Case("eva_config", {"init_lora_weights": "eva", "eva_config": "EvaConfig"}),
    Case("lora_ga_config", {"init_lora_weights": "lora_ga", "lora_ga_config": "LoraGAConfig"}),
    Case("corda_config", {"corda_config": "CordaConfig"}),
    Case("velora_config", {"velora_config": ("VeloraConfig", {"num_groups": 4})}),
    Case("kasa_config", {"kasa_config": "KasaConfig"}),
    Case(
        "use_bdlora",
        {
            "use_bdlora": (
                "BdLoraConfig",
                {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2},
            )
        },
    ),
    Case("monteclora_config", {"monteclora_config": "MontecloraConfig"}, refused="monteclora_config"),
    Case("alora_invocation_tokens", {"alora_invocation_tokens": [3, 4]}, refused="alora_invocation_tokens", bare=True),
    Case("use_qalora", {"use_qalora": True, "qalora_group_size": 4}, refused="use_qalora", bare=True),
    Case("arrow_config", {"arrow_config": "ArrowConfig"}, refused="arrow_config", bare=True),
    Case("layer_replication", {"layer_replication": [[0, 2], [1, 2]]}, refused="layer_replication", bare=True),
    Case("megatron_config", {"megatron_config": {"x": 1}}, refused="megatron_config", bare=True),
]
# Options that say nothing about the weights: written by PEFT, or only meant for the program that trains.
WITHOUT_EFFECT = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "megatron_core",
}


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        effect: Largest change of a logit that the adapter makes under PEFT.
        difference: Largest difference between llavakit's logits and PEFT's; None if refused.
        said: Why it was refused.
    """

    effect: float = 0.0
    difference: float | None = None
    said: str = ""


def options_of(case: Case) -> Any:
    """PEFT's configuration."""
    import peft
    from peft.tuners.lora import config as classes

    options = {"r": 4, "target_modules": TARGETS, **case.options}
    for key, value in options.items():
        name, fields = (value, {}) if isinstance(value, str) else value if isinstance(value, tuple) else ("", {})
        if name.endswith("Config"):
            options[key] = getattr(classes, name)(**fields)
    return peft.LoraConfig(**options)


def logits(net: nn.Module, base: Any) -> Tensor:
    """Of a prompt with two images."""
    with torch.no_grad():
        return net(**tiny.prompt(base, "tttItttItt")).logits


@dataclass
class Base:
    """A base model, on disk and in memory, and its logits."""

    folder: Path
    net: Any
    plain: Tensor


def base_of(case: Case, folder: Path) -> Base:
    """The base model of a case; written once into `folder`."""
    own = folder / f"{case.decoder}-{case.connector}"
    net = tiny.model(decoder=case.decoder, connector=case.connector)
    if not own.exists():
        save(net.state_dict(), net.config, None, own)
    return Base(own, net, logits(net, net))


def make(case: Case, base: Base, folder: Path) -> Tensor:
    """Write an adapter with random values into `folder`; returns PEFT's logits once it has loaded it."""
    import peft

    options = options_of(case)
    if case.bare:
        options.save_pretrained(folder)
        (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        return base.plain
    model = peft.get_peft_model(copy.deepcopy(base.net), options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or ".lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.net), folder).eval()
    return logits(loaded, base.net)


def run(case: Case, folder: Path, bases: Path, *, to_disk: bool = True) -> Outcome:
    """Make the adapter, convert it with its base, and compare.

    Args:
        bases: Where base models are kept.
        to_disk: Convert and open again; otherwise only open.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = base_of(case, bases)
        wanted = make(case, base, folder / "adapter")
    effect = (wanted - base.plain).abs().max().item()
    try:
        if to_disk:
            convert(folder / "adapter", folder / "merged", to="llavakit", base=base.folder)
            checkpoint = open_checkpoint(folder / "merged")
        else:
            checkpoint = open_checkpoint(folder / "adapter", base=base.folder)
        merged = build(checkpoint)
    except CheckpointError as error:
        return Outcome(effect, None, str(error).replace(str(folder), ""))
    return Outcome(effect, (logits(merged, merged) - wanted).abs().max().item())


def main() -> int:
    """Print the table; 1 if an adapter is neither refused nor equal."""
    wrong = 0
    print(f"{'option':44}  {'effect':>9}  difference from PEFT")
    kept = tempfile.TemporaryDirectory()
    for case in CASES:
        if case.needs and importlib.util.find_spec(case.needs) is None:
            print(f"{case.name:44}  left out: needs {case.needs}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = run(case, Path(folder), Path(kept.name))
            except Exception as error:
                print(f"{case.name:44}  FAILED {type(error).__name__}: {error}")
                wrong += 1
                continue
        fits = outcome.difference is not None and outcome.difference <= TOLERANCE
        wrong += not (fits or outcome.difference is None)
        result = f"{outcome.difference:.1e}" if outcome.difference is not None else f"refused: {outcome.said}"
        print(f"{case.name:44}  {outcome.effect:9.1e}  {result}{'' if fits or outcome.said else '  WRONG'}")
    print(f"{len(CASES)} adapters, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
