"""`llavakit.load`: a checkpoint in any known layout as a responder.

The plain responder of a model is `Chat`. A system whose card names a responder of its own (a retrieval loop, a search)
gets that around it; `responder="plain"` asks for the model alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llavakit.checkpoints.causal import CausalLayout
from llavakit.checkpoints.files import read_json
from llavakit.checkpoints.layouts import published
from llavakit.checkpoints.opening import build, load_processor, local_folder, open_checkpoint
from llavakit.conversation.codecs import get_codec
from llavakit.errors import UserError
from llavakit.generation.chat import Chat
from llavakit.generation.foreign import classes_of, load_foreign, needs_own_class
from llavakit.generation.remote import APIClient, RemoteResponder
from llavakit.generation.responder import Responder
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.quantization import FORMATS, check_form
from llavakit.model.quantization import quantize as quantize_weights
from llavakit.registry import nearest, resolve
from llavakit.system import System, get_system, systems

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = "plain"
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load(
    model: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    template: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    max_batch: int = 16,
    responder: str | None = None,
    responder_options: Mapping[str, Any] | None = None,
    tools: str | Path | Mapping[str, Any] | None = None,
    api: Mapping[str, Any] | None = None,
    quantize: str | None = None,
    quantize_parts: Sequence[str] | None = None,
) -> Any:
    """Load a checkpoint: llavakit's own, the authors' layout of a known system, or transformers'.

    Args:
        model: Local folder or hub id; or the address of an OpenAI-compatible API, `http://host:8000/v1#NAME` (without
            `#NAME` the first model that it lists).
        base: The language model, for LoRA and connector-only files.
        vision_tower: The encoder, for files that do not contain it.
        template: Name of the chat template, instead of the model's own; "tokenizer" is the one in its files.
        dtype: "float32", "bfloat16" or "float16"; default float32 on a CPU, bfloat16 on a GPU.
        device: Default the first GPU if there is one.
        max_batch: Requests that are decoded together.
        responder: Slug of the system in whose way to answer, or "module:factory" of a responder, or "plain" for the
            model alone. Default: that of the system that the checkpoint belongs to, if it has one.
        responder_options: Options of that responder.
        tools: Tools that run here when the model calls them: a configuration or its file, see
            `llavakit.tools.configuration`; "" for all that can run. Systems that learned tools use them in their way.
        api: Options of the `APIClient` of an address.
        quantize: "int8" or "int4": weights of linear layers, see `llavakit.model.quantization`.
        quantize_parts: Parts whose layers are quantised; default the decoder with its head.

    Returns:
        A `Responder`; for a model alone a `Chat`, or a `TransformersResponder` where only the model's own class can run
        it: vision-language models of other families, decoders that keep other states than keys and values.

    Raises:
        UserError: One clear line if the folder is not a model or its tensors do not fit.
    """
    if quantize is not None:
        check_form(quantize)
    elif quantize_parts:
        raise UserError(f"quantize_parts {', '.join(quantize_parts)}: say quantize too, {' or '.join(FORMATS)}")
    wanted = None if responder is None else wanted_system(responder)
    factory = functools.partial(tool_factory, tools)
    if str(model).startswith(("http://", "https://")):
        local = {"base": base, "vision_tower": vision_tower, "dtype": dtype, "device": device, "quantize": quantize}
        return _remote(str(model), factory(responder, wanted, responder_options), api or {}, local, max_batch)
    if api:
        raise UserError(f"api option {next(iter(api))!r}: belongs to the address of an API, {model} is none")
    device = check_device(device)
    dtype = check_dtype(dtype, device)
    foreign = _foreign(model, base, vision_tower)
    if foreign is not None:
        folder, raw = foreign
        if quantize is not None:
            raise UserError(f"quantize: {model} runs in transformers' own class, whose layers stay as they are")
        make = factory(responder, wanted, responder_options)
        codec = get_codec(getattr(wanted, "codec", None))
        return make(
            load_foreign(folder, raw, name=str(model), dtype=dtype, device=device, max_batch=max_batch, codec=codec)
        )
    checkpoint = open_checkpoint(model, base=base, vision_tower=vision_tower, template=template)
    card = systems().get(checkpoint.config.system)
    make = factory(responder, wanted or card, responder_options)
    codec = get_codec(checkpoint.config.codec or getattr(wanted or card, "codec", None))
    processor = load_processor(checkpoint, local_folder(base) if base is not None else None)
    net = build(checkpoint, dtype=dtype, device=device)
    if quantize is not None:
        quantize_weights(net, quantize, quantize_parts)
    return make(Chat(net, processor, name=str(model), max_batch=max_batch, codec=codec))


def _foreign(
    model: str | Path, base: str | Path | None, vision_tower: str | Path | None
) -> tuple[Path, dict[str, Any]] | None:
    """Folder and configuration of a model that only transformers' own class can run; None for others."""
    if base is not None or vision_tower is not None:
        return None
    folder = local_folder(model)
    if not (folder / "config.json").is_file():
        return None
    raw = read_json(folder / "config.json")
    if raw.get("model_type") == LlavakitConfig.model_type or classes_of(raw) is None:
        return None
    plain = CausalLayout().matches(raw, folder)
    known = published(folder, raw) is not None or (plain and not needs_own_class(raw))
    return None if known else (folder, raw)


def _remote(
    address: str, make: Callable[[Responder], Responder], api: Mapping[str, Any], local: Mapping[str, Any], batch: int
) -> Responder:
    for name, value in local.items():
        if value is not None:
            raise UserError(f"{name}: belongs to a model that runs here; {address} runs elsewhere")
    base_url, _, name = address.partition("#")
    try:
        client = APIClient(base_url, **{"concurrency": batch, **api})
    except TypeError:
        names = [one for one in inspect.signature(APIClient).parameters if one != "base_url"]
        wrong = next(one for one in api if one not in names)
        raise UserError(f"api option {wrong!r} is unknown{nearest(wrong, names)}") from None
    return make(RemoteResponder(client, name or None))


def check_device(device: str | None) -> str:
    """The device to use.

    Raises:
        UserError: If it cannot be used.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch raises one or the other
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here ({reason}); cpu always can") from None
    return device


def check_dtype(dtype: str | torch.dtype | None, device: str) -> torch.dtype:
    """The data type to use.

    Raises:
        UserError: If it is unknown.
    """
    if dtype is None:
        return torch.float32 if device == "cpu" else torch.bfloat16
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return dtype


def wanted_system(responder: str) -> System | None:
    """The system whose slug a responder's name is; None for "plain" and "module:factory".

    Raises:
        UserError: If there is none, or it answers by its model alone and has no codec either.
    """
    if responder == PLAIN or ":" in responder:
        return None
    card = get_system(responder)
    if card.responder is None and card.codec is None:
        raise UserError(f"responder {responder!r}: this system answers by its model alone, so there is none to choose")
    return card


def tool_factory(
    tools: Any, responder: str | None, card: System | None, options: Mapping[str, Any] | None
) -> Callable[[Responder], Responder]:
    """`factory` with tools: an option of the responder if it has one, else around it.

    Raises:
        UserError: See `factory`, and if the tools are wrong.
    """
    if tools is None:
        return factory(responder, card, options)
    from llavakit.tools.agent import with_tools
    from llavakit.tools.configuration import load_toolbox

    toolbox = load_toolbox(tools or None)
    plain = responder == PLAIN or (responder is not None and ":" in responder)
    own = None if plain or card is None or card.responder is None else card.load("responder")
    if own is not None and "tools" in inspect.signature(own).parameters:
        return factory(responder, card, {**(options or {}), "tools": toolbox})
    make = factory(responder, card, options)
    return lambda chat: with_tools(make(chat), toolbox)


def factory(
    responder: str | None, card: System | None, options: Mapping[str, Any] | None
) -> Callable[[Responder], Responder]:
    """What makes a model's responder the wanted one; checked before the model is read.

    Raises:
        UserError: If it cannot be imported, or does not take the options.
    """
    given = dict(options or {})
    if responder is not None and ":" in responder:
        try:
            make = resolve(responder)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"responder {responder!r} cannot be imported ({error})") from None
    elif responder == PLAIN or card is None or card.responder is None:
        if given:
            raise UserError(f"responder option {next(iter(given))!r}: a model alone has none")
        return lambda chat: chat
    else:
        make = card.load("responder")
    parameters = list(inspect.signature(make).parameters.values())[1:]
    named = {parameter.name: parameter for parameter in parameters if parameter.kind in _NAMED}
    asked = getattr(make, "options", None)  # of a responder class: options that a request may give too
    known = [*named, *(asked.model_fields if asked is not None else ())]
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for name in given:
        if name not in known and not takes_all and isinstance(make, type):
            raise UserError(f"responder option {name!r} is unknown{nearest(name, known)}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in given:
            raise UserError(f"responder option {name!r} is missing: this system needs it to answer")

    def made(chat: Responder) -> Responder:
        own = given if takes_all else {name: value for name, value in given.items() if name in named}
        found = make(chat, **own)
        if not isinstance(found, Responder):
            raise UserError(f"responder {responder or card.slug!r} is a {type(found).__name__}, not a Responder")
        found.preset(**{name: value for name, value in given.items() if name not in own})
        found.settings = own
        return found

    return made
