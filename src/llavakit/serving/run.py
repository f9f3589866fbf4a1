"""`llavakit serve`: the API and the web app on one port, or vLLM on the same checkpoint."""

from __future__ import annotations

import importlib
import importlib.util
import ipaddress
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from llavakit.errors import UserError

ENGINES = ("native", "vllm")
NO_HOST = "none.invalid"  # a name that never resolves (RFC 2606), where vLLM is to fetch from nowhere


def need(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"serving needs {error.name}; install it with: pip install 'llavakit[{extra}]'") from None


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: str = "native",
    name: str | None = None,
    web: bool = True,
    interactive: bool = False,
    api_keys: tuple[str, ...] = (),
    allowed_hosts: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    media_folders: tuple[Path, ...] = (),
    media_networks: tuple[str, ...] = (),
    fetch: bool = True,
    max_batch: int = 16,
    max_queue: int = 64,
    dtype: str | None = None,
    device: str | None = None,
    extra: tuple[str, ...] = (),
    console: Console | None = None,
    **sources: Any,
) -> None:
    """Serve until interrupted.

    Args:
        model: Folder or hub id in any known layout (`engine="vllm"`: one that vLLM reads).
        name: What clients call the model; default: the folder's name.
        web: Whether the web app is served at `/`.
        interactive: Whether it has a page for editing pictures; `tools` then configures the skills that do the work.
        api_keys: Keys of which clients must send one; also read from LLAVAKIT_API_KEYS, separated by commas.
        allowed_hosts: Names by which clients call the server, besides localhost, `host`, this machine's name and
            addresses.
        media_networks: Networks that may be fetched from although they are not public, as `10.1.0.0/16`.
        extra: Further arguments for `vllm serve`.
        sources: `base`, `vision_tower`, `responder` and its options, see `llavakit.load`.

    Raises:
        UserError: If an extra is missing, the port is taken, or vLLM cannot run the model.
    """
    console = console or Console(stderr=True)
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: unknown; known: {', '.join(ENGINES)}")
    keys = (*api_keys, *filter(None, os.environ.get("LLAVAKIT_API_KEYS", "").split(",")))
    if engine == "vllm":
        given = {"--device": device, "--media-network": media_networks, "--allowed-host": allowed_hosts}
        given |= {"--interactive": interactive} | {f"--{k}": v for k, v in sources.items()}
        for option, value in given.items():
            if value:
                raise UserError(f"{option.replace('_', '-')}: belongs to --engine native; vLLM has no such option")
        arguments = ["--host", host, "--port", str(port), "--served-model-name", name or Path(model).name]
        arguments += vllm_arguments(keys, origins, media_folders, fetch, dtype)
        _serve_vllm(model, [*arguments, *extra], console)
        return
    need("uvicorn", "serve")
    need("fastapi", "serve")
    from llavakit.generation.load import load
    from llavakit.media.policy import MediaPolicy
    from llavakit.serving.access import hosts_of
    from llavakit.serving.app import Settings, create_app
    from llavakit.serving.process import http_server, run_until_stopped

    backends = _editing(web, sources.pop("tools", None)) if interactive else None
    check_port(host, port)
    names = tuple(dict.fromkeys([name or Path(model).name or "llavakit"]))
    policy = MediaPolicy(fetch=fetch, folders=media_folders, networks=tuple(map(_network, media_networks)))
    hosts = hosts_of(socket.gethostname(), host, allowed_hosts)
    settings = Settings(names=names, api_keys=keys, hosts=hosts, origins=origins, max_queue=max_queue, media=policy)
    with console.status(f"loading {model}"):
        responder = load(model, dtype=dtype, device=device, max_batch=max_batch, **sources)
    app = create_app(responder, settings)
    address = f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{port}"
    if web and importlib.util.find_spec("gradio") is None:
        console.print("web app  not installed; get it with: pip install 'llavakit[web]'")
    elif web:
        from llavakit.serving.webapp import mount

        app = mount(app, backends)
        console.print(f"web app  {address}/")
        if interactive:
            console.print(f"editing  {address}/editing")
    console.print(f"API      {address}/v1   (model {names[0]!r}, documentation at {address}/docs)")
    run_until_stopped(http_server(app, settings.connections, host=host, port=port, log_level="warning"))


def _editing(web: bool, tools: Any) -> Any:
    """Who edits pictures on the page."""
    if not web:
        raise UserError("--interactive: is a page of the web app; leave --no-web out")
    need("gradio", "web")
    from llavakit.editing.backends import backends_of
    from llavakit.tools.configuration import load_toolbox

    return backends_of(load_toolbox(tools) if tools else None)


def _network(text: str) -> Any:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise UserError(f"--media-network {text}: is not a network; write it as 10.1.0.0/16") from None


def check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"{host}:{port} cannot be used ({error.strerror}); choose another --port") from None


def vllm_arguments(
    api_keys: tuple[str, ...],
    origins: tuple[str, ...],
    media_folders: tuple[Path, ...],
    fetch: bool,
    dtype: str | None,
) -> list[str]:
    """Options of `serve` as arguments of `vllm serve`.

    Raises:
        UserError: If vLLM cannot do what an option asks for.
    """
    arguments = ["--override-generation-config", '{"temperature": 0}']  # greedy where a request does not say otherwise
    arguments.append("--interleave-mm-strings")  # else templates that take plain strings get all pictures in front
    if api_keys:
        arguments += ["--api-key", *api_keys]
    if origins:
        arguments += ["--allowed-origins", json.dumps(origins)]
    if len(media_folders) > 1:
        raise UserError("--media-folder: vLLM takes one folder; name one that holds the others")
    if media_folders:
        arguments += ["--allowed-local-media-path", str(media_folders[0].resolve())]
    if not fetch:
        arguments += ["--allowed-media-domains", NO_HOST]
    if dtype is not None:
        arguments += ["--dtype", dtype]
    return arguments


def _serve_vllm(model: str, arguments: list[str], console: Console) -> None:
    """Replace this process by `vllm serve`, which loads llavakit's plugin by its entry point."""
    from llavakit.checkpoints.prompts import VLLM_TEMPLATE
    from llavakit.serving.vllm_plugin import check

    for hint in check(model):
        console.print(hint)
    beside = Path(sys.executable).with_name("vllm")
    command = str(beside) if beside.is_file() else shutil.which("vllm")
    if command is None:
        raise UserError("vLLM is not installed here; install it in an environment of its own, see docs/serving.md")
    template = Path(model) / VLLM_TEMPLATE
    if template.is_file() and "--chat-template" not in arguments:
        arguments = ["--chat-template", str(template), *arguments]
    os.execv(command, [command, "serve", model, *arguments])
