"""`llavakit serve --engine vllm` beside `vllm serve`, the same checkpoint, in turns.

    PYTHONPATH=scripts/vllm_cpu .venv-vllm/bin/python benchmarks/vllm_serving.py [--repeats 15] [--requests 32]

`llavakit serve --engine vllm` replaces its own process by `vllm serve`, so there is nothing of llavakit between client
and engine; this measures that it stays so. A third server has the checkpoint in llavakit's own layout, which runs in
vLLM's Transformers back end instead of vLLM's own class. All three are up while they are asked in turns, in rotating
order; every request is a picture of its own with 32 new tokens, from 8 clients at once. Requests per second of wall
time and of processor time of the server and its children. Without vLLM the script says so and ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

CLIENTS, NEW = 8, 32
OPTIONS = ["--enforce-eager", "--max-model-len=1024", "--max-num-seqs=8"]
# each server's engine computes in one thread; VLLM_CPU_KVCACHE_SPACE is in GiB
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@contextmanager
def running(command: list[str], port: int):
    """A server; gives its address and its process, once it answers."""
    quiet = ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.Popen(command, env=os.environ | quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 600
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"did not start: {' '.join(command)}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def seconds(process: psutil.Process) -> float:
    """Processor time of a server and its children so far."""
    times = [member.cpu_times() for member in [process, *process.children(recursive=True)]]
    return sum(own.user + own.system for own in times)


def ask(address: str, seed: int) -> list[int]:
    """The reply's tokens to a question about a picture that nobody has seen."""
    from serving import body, picture

    asked = body(picture(seed), "m", NEW, temperature=0, min_tokens=NEW, return_token_ids=True)
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    given = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here; make test-vllm makes an environment that has it")
        return
    from serving import write_models

    beside = Path(sys.executable).with_name
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        own, hf = write_models(Path(scratch), given.layers, given.width)
        servers = {}
        for name, command, folder in (
            ("vllm serve", [str(beside("vllm")), "serve", str(hf)], hf),
            ("llavakit serve --engine vllm", [str(beside("llavakit")), "serve", str(hf), "--engine", "vllm"], hf),
            ("the same, llavakit's layout", [str(beside("llavakit")), "serve", str(own), "--engine", "vllm"], own),
        ):
            port = free_port()
            if "llavakit" in name:
                command += ["--name", "m", "--dtype", "float32", *(f"--extra={option}" for option in OPTIONS)]
            else:
                command += ["--served-model-name", "m", "--dtype", "float32", *OPTIONS]
            servers[name] = stack.enter_context(running([*command, "--port", str(port)], port))
            print(f"{name}: process {' '.join(servers[name][1].cmdline()[1:4])} ... for {folder.name}", flush=True)
        wall: dict[str, list[float]] = {name: [] for name in servers}
        busy: dict[str, list[float]] = {name: [] for name in servers}
        order = list(servers.items())
        with ThreadPoolExecutor(CLIENTS) as clients:
            for turn in range(given.repeats + 1):
                seeds = range(turn * given.requests, (turn + 1) * given.requests)
                replies = {}
                for name, (address, process) in order[turn % 3 :] + order[: turn % 3]:
                    start, used = time.perf_counter(), seconds(process)
                    replies[name] = list(clients.map(ask, [address] * given.requests, seeds))
                    if turn:  # the first turn warms up
                        wall[name].append(given.requests / (time.perf_counter() - start))
                        busy[name].append(given.requests / (seconds(process) - used))
                assert replies["vllm serve"] == replies["llavakit serve --engine vllm"]
        for label, rates in (("wall", wall), ("processor", busy)):
            for name, own_rates in rates.items():
                ratios = [ours / theirs for ours, theirs in zip(own_rates, rates["vllm serve"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                print(
                    f"{name}: {statistics.median(own_rates):.2f} requests per second of {label} time, "
                    f"ratio {middle:.2f} (quartiles {low:.2f}, {high:.2f})"
                )


if __name__ == "__main__":
    main()
