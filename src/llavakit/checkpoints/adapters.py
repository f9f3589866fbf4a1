"""LoRA adapters in PEFT's files: which weights of a model they change, and the changed weights.

PEFT itself computes: every adapted layer is put alone into a model of that one layer, PEFT attaches, loads and merges
the adapter there, and the result is a weight that is read lazily like any other. So the memory is that of one layer,
and each variant (DoRA, PiSSA, patterns of ranks, ...) is PEFT's own. This module adds strictness: every option and
every tensor of the adapter is understood, or the adapter is refused by its name.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.checkpoints.files import LazyState
from llavakit.errors import CheckpointError, UserError
from llavakit.registry import nearest

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_BIASES = ("bias", "in_proj_bias")
_TOKENS = ".token_adapter.trainable_tokens_delta"
# Options without an equivalent in plain weights, or which change the architecture.
_UNMERGEABLE = {
    "alora_invocation_tokens": "adapts only what follows an invocation text",
    "arrow_config": "routes between several adapters",
    "layer_replication": "repeats layers of the base model",
    "megatron_config": "is for Megatron's layers",
    "monteclora_config": "comes with the state of a sampler that only training reads",
    "use_qalora": "is for GPTQ weights",
}

# Ways to start an adapter that change the base model so that it cannot be had again.
_LOST_BASES = {
    "pissa_niter": "took a random part out of the base model, which cannot be restored; save the adapter with "
    "PEFT's path_initial_model_for_weight_conversion",
    "loftq": "replaced the base model by a quantised one, which PEFT makes again on CUDA alone; merge the adapter with "
    "PEFT there",
}

Naming = Callable[[str], str | None]


def strip_trainable_prefix(name: str) -> str:
    """Names in `mm_projector.bin` and `non_lora_trainables.bin` without what training wrapped around them."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def peft() -> Any:
    """The package.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import peft as package
    except ImportError:
        raise UserError("LoRA adapters need the package peft; pip install 'llavakit[train]'") from None
    return package


def adapter_options(raw: Mapping[str, Any], where: str) -> Any:
    """PEFT's `LoraConfig` of an `adapter_config.json`, all of whose options can be honoured.

    Raises:
        CheckpointError: Naming the first option that cannot.
    """
    package = peft()
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type {kind!r} is not supported; adapters of type 'LORA' are")
    known = {field.name for field in dataclasses.fields(package.LoraConfig) if field.init} - {"runtime_config"}
    for key, value in raw.items():
        if key not in known and value not in (None, False, [], {}):
            hint = nearest(key, sorted(known)) if not known.isdisjoint(raw) else ""
            raise CheckpointError(
                f"{where}: option {key!r} is unknown to the installed PEFT {package.__version__}{hint}"
            )
        if key in _UNMERGEABLE and value not in (None, False, [], {}):
            raise CheckpointError(f"{where}: {key} {_UNMERGEABLE[key]}, so the adapter cannot become plain weights")
    style = str(raw.get("init_lora_weights"))
    for start, what in _LOST_BASES.items():
        if style.startswith(start):
            raise CheckpointError(f"{where}: init_lora_weights {style!r} {what}")
    options = {key: value for key, value in raw.items() if key in known}
    # what wraps a whole class is of no use for single layers, and inference draws nothing
    options |= {"peft_type": "LORA", "task_type": None, "auto_mapping": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return package.LoraConfig(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise CheckpointError(f"{where}: {' '.join(str(error).split())}") from None


def merge(
    base: LazyState,
    adapter: LazyState,
    options: Any,
    skeleton: nn.Module,
    where: str,
    *,
    namings: Iterable[Naming] = (),
    optional: Callable[[str], bool] = lambda name: False,
) -> LazyState:
    """The base's tensors as the adapter changes them.

    A model whose head is tied to its embeddings gets `lm_head.weight` as a tensor of its own where the adapter treats
    the two differently; see `untied`.

    Args:
        base: Tensors of the base model under llavakit's names.
        adapter: Tensors of the adapter under PEFT's names.
        options: See `adapter_options`.
        skeleton: The base model on meta tensors: which layers it has.
        where: Folder of the adapter, for messages.
        namings: From llavakit's name of a tensor to the one it had in the model that was adapted, one function per
            class of models that this may have been; llavakit's own and transformers' are always tried.
        optional: Whether a layer (by the adapted model's name) may lack tensors although the options select it.

    Raises:
        CheckpointError: Naming the first tensor or option that does not fit.
    """
    return _Merge(base, adapter, options, skeleton, where, namings, optional).state()


def untied(config: Any, state: LazyState) -> Any:
    """The configuration of a merged model: its head is tied no longer if the adapter gave it weights of its own."""
    if not config.tie_word_embeddings or "lm_head.weight" not in state:
        return config
    config = copy.deepcopy(config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    return config


def _native(name: str) -> str:
    return name


def _wrapped_encoder(name: str) -> str:
    return name.replace("_tower.", "_tower.vision_model.", 1)


def _older_transformers(name: str) -> str:
    """Names inside transformers' LLaVA classes before release 4.52."""
    for old, new in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return _wrapped_encoder(name).removeprefix("model.")


def _language_model_alone(name: str) -> str | None:
    """Names inside a causal language model that became a part of this one."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name if name.startswith("lm_head.") else None


class _Merge:
    """One adapter on one base model; checks in the constructor, tensors on demand."""

    def __init__(
        self,
        base: LazyState,
        adapter: LazyState,
        options: Any,
        skeleton: nn.Module,
        where: str,
        namings: Iterable[Naming],
        optional: Callable[[str], bool],
    ) -> None:
        self.options, self.where, self.optional = options, where, optional
        self.layerwise = copy.deepcopy(options)  # what PEFT does to single layers; the rest is done here
        self.layerwise.modules_to_save = self.layerwise.trainable_token_indices = None
        self.layerwise.ensure_weight_tying = False
        self.adapter = _plain_names(adapter)
        self.table = next((n for n in base if n.endswith(("embed_tokens.weight", "wte.weight"))), "")
        self.tied = "lm_head.weight" not in base and "lm_head.weight" in skeleton.state_dict()
        self.base = base.joined(LazyState({"lm_head.weight": lambda: base[self.table]}, {})) if self.tied else base
        self.own = self._names([*namings, _native, _wrapped_encoder, _older_transformers, _language_model_alone])
        wrapped = any("_tower.vision_model." in name for name, _ in skeleton.named_parameters())
        in_memory = {(_wrapped_encoder(own) if wrapped else own): own for own in self.own.values()}
        published = {own: name for name, own in self.own.items()}
        self.tree = _tree(skeleton, {memory: published[own] for memory, own in in_memory.items()})
        self.layers = self._layers()
        self.rows = self._rows()
        self.whole = self._whole()

    def _names(self, namings: list[Naming]) -> dict[str, str]:
        """The adapted model's names of the base's tensors -> llavakit's, by the naming that knows the adapter's."""
        best: tuple[int, dict[str, str], str] | None = None
        for naming in namings:
            names = {new: name for name in self.base if (new := naming(name)) is not None}
            modules = {path for name in names for path in _ancestors(name)}
            strange = [name for name in self.adapter if name not in names and _module_of(name) not in modules]
            if best is None or len(strange) < best[0]:
                best = (len(strange), names, strange[0] if strange else "")
        strangers, names, first = best
        if strangers:
            target = _module_of(first) or first
            raise CheckpointError(f"{self.where}: the adapter changes {target!r}, which the base model does not have")
        return names

    def _layers(self) -> dict[str, list[str]]:
        """Adapted layers and the adapter's tensors of each, which are exactly those that PEFT expects."""
        found: dict[str, list[str]] = {}
        for name in self.adapter:
            if not name.endswith(_TOKENS) and (module := _module_of(name)) is not None:
                found.setdefault(module, []).append(name)
        if not found and not self.options.target_modules and not self.options.target_parameters:
            return {}
        model = self._attached(copy.deepcopy(self.tree), low_cpu_mem_usage=True)
        expected = _adapter_state(model)
        if self.tied and self.options.ensure_weight_tying:
            self._drop_tied_head(found)
        for name, tensor in expected.items():
            module = _module_of(name)
            if name not in self.adapter:
                if module in found or not self.optional(module):
                    raise CheckpointError(f"{self.where}: tensor {name!r} is missing; {CONFIG} calls for it")
                continue
            _check(self.where, name, self.adapter[name], tensor.shape)
        for module, names in found.items():
            if self.options.lora_bias and not any(f"{module}.{bias}" in self.own for bias in _BIASES):
                raise CheckpointError(
                    f"{self.where}/{CONFIG}: lora_bias adds to the bias of {module!r}, which has none"
                )
            strange = [name for name in names if name not in expected and ".base_layer." not in name]
            if strange:
                raise CheckpointError(f"{self.where}: tensor {strange[0]!r} is unknown to {CONFIG}; it is not merged")
        return found

    def _drop_tied_head(self, found: dict[str, list[str]]) -> None:
        """The adapter of a head that is tied to the embeddings' adapter says the same once more."""
        published = {own: name for name, own in self.own.items()}
        head, table = _parent(published["lm_head.weight"]), _parent(published[self.table])
        if head not in found or table not in found:
            return
        for mine, other in (("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A")):
            tensor, twin = (self.adapter.get(f"{module}.{end}") for module, end in ((head, mine), (table, other)))
            if tensor is None or twin is None or not torch.equal(tensor, twin.T):
                raise CheckpointError(f"{self.where}: {head}.{mine} differs from the adapter that it is tied to")
        del found[head]

    def _rows(self) -> dict[str, tuple[str, Tensor]]:
        """llavakit's name of an embedding -> the adapter's tensor of its trained rows, and their numbers."""
        wanted = self.options.trainable_token_indices
        if wanted is not None and not isinstance(wanted, dict):
            wanted = {_parent(next(name for name, own in self.own.items() if own == self.table)): wanted}
        rows: dict[str, tuple[str, Tensor]] = {}
        for target, numbers in (wanted or {}).items():
            match = [
                name
                for name in self.adapter
                if name.endswith(_TOKENS) and f".{name.removesuffix(_TOKENS)}".endswith(f".{target}")
            ]
            if not match:
                raise CheckpointError(f"{self.where}: trained rows of {target!r} are missing; {CONFIG} calls for them")
            for name in match:
                weight = f"{name.removesuffix(_TOKENS)}.weight"
                _check(self.where, name, self.adapter[name], (len(numbers), *self.tree.get_parameter(weight).shape[1:]))
                rows[self.own[weight]] = (name, torch.tensor(numbers))
        known = {name for name, _ in rows.values()}
        strange = [name for name in self.adapter if name.endswith(_TOKENS) and name not in known]
        if strange:
            raise CheckpointError(f"{self.where}: tensor {strange[0]!r} is unknown to {CONFIG}; it is not merged")
        return rows

    def _whole(self) -> dict[str, str]:
        """llavakit's name -> the adapter's tensor that replaces the base's."""
        whole = {self.own[name]: name for name in self.adapter if name in self.own}
        for own, name in whole.items():
            _check(self.where, name, self.adapter[name], self.tree.get_parameter(name).shape)
            if own.endswith(".bias") and self.options.bias == "none" and not self._is_saved(name):
                raise CheckpointError(f"{self.where}: tensor {name!r} is unknown to {CONFIG}, whose bias is 'none'")
        for name, own in self.own.items():
            tied_head = self.tied and own == "lm_head.weight"
            if name not in self.adapter and self._is_saved(name) and not self.optional(name) and not tied_head:
                raise CheckpointError(f"{self.where}: tensor {name!r} is missing; modules_to_save calls for it")
        return whole

    def _is_saved(self, name: str) -> bool:
        """Whether a tensor belongs to a module that was trained as a whole; PEFT compares the ends of names."""
        targets = tuple(self.options.modules_to_save or ())
        return bool(targets) and any(path.endswith(targets) for path in _ancestors(name))

    def state(self) -> LazyState:
        """All tensors, lazily."""
        readers: dict[str, Callable[[], Tensor]] = {}
        origin: dict[str, str] = {}
        for own, name in self.whole.items():
            readers[own] = lambda own=own, name=name: self.adapter[name].to(self.base[own].dtype)
            origin[own] = self.adapter.origin.get(name, "")
        for own, (name, numbers) in self.rows.items():
            readers[own] = lambda own=own, name=name, numbers=numbers: self._with_rows(own, name, numbers)
            origin[own] = self.adapter.origin.get(name, "")
        for layer, names in self.layers.items():
            for weight in self._changed(layer):
                own = self.own[weight]
                readers[own] = lambda layer=layer, weight=weight: self._merged(layer)[weight]
                origin[own] = self.adapter.origin.get(names[0], "")
        if self.tied:
            self._head(readers)
        return LazyState(self.base._readers | readers, self.base.origin | origin)

    def _head(self, readers: dict[str, Callable[[], Tensor]]) -> None:
        """A tied head stays tied only where the adapter does the same to it as to the embeddings."""
        apart = {"lm_head.weight", self.table} & set(readers)
        together = self.table in self.rows or (self.options.ensure_weight_tying and self.table in readers)
        if not apart or together:
            readers.pop("lm_head.weight", None)
            del self.base._readers["lm_head.weight"]

    def _changed(self, layer: str) -> list[str]:
        """The base's tensors that adapting a layer may change."""
        inside = [name for name in self.own if name.startswith(f"{layer}.")]
        return [
            name
            for name in inside
            if not name.endswith("bias") or self.options.lora_bias or self.options.bias != "none"
        ]

    def _with_rows(self, own: str, name: str, numbers: Tensor) -> Tensor:
        weight = self.base[own].clone()
        weight[numbers] = self.adapter[name].to(weight.dtype)
        return weight

    def _merged(self, layer: str) -> dict[str, Tensor]:
        """A layer's tensors with its adapter merged, computed by PEFT."""
        package = peft()
        alone = _only(self.tree, layer)
        for name, _ in list(alone.named_parameters()):
            module, _, attribute = name.rpartition(".")
            tensor = self.base[self.own[name]]
            dtype = tensor.dtype
            own = tensor.to(torch.float32, copy=True)  # PEFT merges in place; the base must stay as it is
            alone.get_submodule(module)._parameters[attribute] = nn.Parameter(own, requires_grad=False)
        model = self._attached(alone)
        given = {f"{_PREFIX}{name}": self.adapter[name].float() for name in self.layers[layer]}
        expected = set(_adapter_state(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = package.set_peft_model_state_dict(model, given)
            if result.unexpected_keys or not expected <= set(self.layers[layer]):
                raise CheckpointError(f"{self.where}: layer {layer!r} could not be merged; its tensors do not fit")
            merged = model.merge_and_unload()
        return {name: parameter.detach().to(dtype) for name, parameter in merged.named_parameters()}

    def _attached(self, model: nn.Module, **how: Any) -> Any:
        """A model with PEFT's adapter layers."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return peft().PeftModel(model, copy.deepcopy(self.layerwise), **how).eval()
        except (ValueError, TypeError, ImportError, NotImplementedError, AttributeError) as error:
            raise CheckpointError(f"{self.where}/{CONFIG}: PEFT refuses it: {' '.join(str(error).split())}") from None


def _plain_names(adapter: LazyState) -> LazyState:
    """Names without PEFT's prefix and without the name of the adapter, which some trainers leave in."""

    def rename(name: str) -> str:
        return name.removeprefix(_PREFIX).replace(".default.", ".").removesuffix(".default")

    return adapter.renamed(rename)


def _module_of(name: str) -> str | None:
    """The layer that a tensor of an adapter belongs to; None if it is a tensor of the base model."""
    if name.endswith(_TOKENS):
        return name.removesuffix(_TOKENS)
    ends = [place for mark in (".lora_", ".base_layer.") if (place := name.find(mark)) >= 0]
    return name[: min(ends)] if ends else None


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _ancestors(name: str) -> list[str]:
    """Paths of the modules around a parameter, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _tree(skeleton: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """The layers of a model, on meta tensors, as another model has them.

    Args:
        names: Parameter of `skeleton` -> where it is in the new tree; other parameters are left out.
    """
    root = nn.Module()
    layers: dict[str, nn.Module] = dict(skeleton.named_modules())
    for name, new in names.items():
        source = layers[_parent(name)]
        node = root
        path = new.split(".")
        for depth, part in enumerate(path[:-1]):
            if part not in node._modules:
                node.add_module(part, _shell(source) if depth == len(path) - 2 else nn.Module())
            elif depth == len(path) - 2 and type(node._modules[part]) is nn.Module:
                node._modules[part] = _shell(source, node._modules[part]._modules)
            node = node._modules[part]
        attribute = name.rpartition(".")[2]
        node._parameters[attribute] = nn.Parameter(source._parameters[attribute].detach(), requires_grad=False)
    return root


def _shell(module: nn.Module, children: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """A module of the same kind without parameters; those without a value stay, so that all attributes exist."""
    shell = copy.copy(module)
    shell._parameters = dict.fromkeys((name for name, own in module._parameters.items() if own is None), None)
    shell._modules = dict(children or {})
    return shell


def _only(tree: nn.Module, layer: str) -> nn.Module:
    """The same tree with one layer alone."""
    root = node = nn.Module()
    *path, last = layer.split(".")
    for part in path:
        node.add_module(part, nn.Module())
        node = node._modules[part]
    node.add_module(last, copy.deepcopy(tree.get_submodule(layer)))
    return root


def _adapter_state(model: Any) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = peft().get_peft_model_state_dict(model)
    return {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in state.items()
        if ".base_layer." not in name or ".lora_" in name
    }


def _check(where: str, name: str, tensor: Tensor, shape: Iterable[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            f"{where}: tensor {name!r} has shape {list(tensor.shape)}, {CONFIG} and the base call for {list(shape)}"
        )
