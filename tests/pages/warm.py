"""A process that has imported everything, and starts each `llavakit` command of the pages as a fork of itself.

A process for each would import PyTorch and transformers for seconds, hundreds of times over. What runs is the same:
the arguments, folder, environment and files of the shell that asked, then the entry point of the command.

    python warm.py SOCKET       the process; ends when its standard input does

`ask` is the other side, in the stand-ins of `llavakit` and `python` that a page's shell finds (`client.py`), and
`Python` runs the snippets of a page one after another with the names that the earlier ones left.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any


def _recv(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, fds, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    return json.loads(data), fds


def _become(request: dict[str, Any], fds: list[int]) -> None:
    """Take on the folder, environment and files of who asked."""
    os.setpgid(0, 0)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, encoding="utf-8", closefd=False)
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _command(argv: list[str]) -> int:
    """Run `llavakit ARGUMENTS`, `python -m MODULE ARGUMENTS` or `python FILE ARGUMENTS`."""
    name, *words = argv
    try:
        if name == "llavakit":
            sys.argv = argv
            from llavakit.cli.app import main

            main()
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as leave:
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _snippets(connection: socket.socket) -> int:
    """Run snippets as they come and say of each what went wrong."""
    names: dict[str, Any] = {"__name__": "__main__"}
    sys.path.insert(0, os.getcwd())
    stream = connection.makefile("rw", encoding="utf-8")
    for line in stream:
        request = json.loads(line)
        error = None
        try:
            exec(compile(request["code"], request["where"], "exec"), names)
        except BaseException:
            error = traceback.format_exc()
        sys.stdout.flush()
        stream.write(json.dumps({"error": error}) + "\n")
        stream.flush()
    return 0


def _preload() -> None:
    import peft  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401
    import uvicorn  # noqa: F401

    import llavakit.cli.app
    import llavakit.evaluation.run
    import llavakit.generation.load
    import llavakit.robustness.run
    import llavakit.serving.app
    import llavakit.serving.run
    import llavakit.synthesis.run
    import llavakit.training.run
    import llavakit.vision.known  # noqa: F401
    from llavakit.system import systems

    systems()


class Warm:
    """The process: children by process id, each with who waits for it and the page that it belongs to."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.waiting: dict[int, socket.socket | None] = {}
        self.page: dict[int, str] = {}
        self.servers: set[int] = set()
        self.ended: dict[str, list[int]] = {}

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self.listener, sys.stdin], [], [], 0.02)
            if sys.stdin in ready:
                for page in set(self.page.values()):
                    self.stop(page)
                return
            if self.listener in ready:
                self.serve(self.listener.accept()[0])
            self.reap()

    def serve(self, connection: socket.socket) -> None:
        request, fds = _recv(connection)
        if "stop" in request:
            connection.sendall(json.dumps(self.stop(request["stop"])).encode() + b"\n")
            connection.close()
            return
        if (pid := os.fork()) == 0:
            self.listener.close()
            status = 70
            try:
                _become(request, fds)
                status = _snippets(connection) if request.get("snippets") else _command(request["argv"])
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError, ValueError):
                        stream.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        for fd in fds:
            os.close(fd)
        self.page[pid] = request["page"]
        if request.get("background"):
            self.servers.add(pid)
            connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        if request.get("background") or request.get("snippets"):
            connection.close()
            self.waiting[pid] = None
        else:
            self.waiting[pid] = connection

    def reap(self) -> None:
        """Tell who waits for a child that it has ended."""
        while self.waiting:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            page = self.page.pop(pid)
            if (connection := self.waiting.pop(pid)) is not None:
                with contextlib.suppress(OSError):
                    connection.sendall(json.dumps({"status": code}).encode() + b"\n")
                connection.close()
            elif pid in self.servers:
                self.ended.setdefault(page, []).append(code)

    def stop(self, page: str) -> list[int]:
        """End what a page left running, as a service manager would; the exit statuses of its servers."""
        for pid in [pid for pid, owner in self.page.items() if owner == page]:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while page in self.page.values():
            self.reap()
            time.sleep(0.01)
            if time.monotonic() > deadline:
                for pid in [pid for pid, owner in self.page.items() if owner == page]:
                    os.killpg(pid, signal.SIGKILL)
        return self.ended.pop(page, [])


def ask(path: str, request: dict[str, Any], fds: tuple[int, ...] = ()) -> Any:
    """Send a request and wait for its answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], list(fds) or [0, 1, 2])
        return json.loads(connection.makefile().readline() or "{}")


class Python:
    """The snippets of one page, in one process."""

    def __init__(self, path: str, request: dict[str, Any], output: int) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(path)
        null = os.open(os.devnull, os.O_RDONLY)
        line = json.dumps(request | {"snippets": True}).encode() + b"\n"
        socket.send_fds(self.connection, [line], [null, output, output])
        os.close(null)
        self.stream = self.connection.makefile("rw", encoding="utf-8")

    def run(self, code: str, where: str) -> str | None:
        """The traceback of a snippet, None if it ran."""
        self.stream.write(json.dumps({"code": code, "where": where}) + "\n")
        self.stream.flush()
        line = self.stream.readline()
        return json.loads(line)["error"] if line else "the process ended"

    def close(self) -> None:
        self.stream.close()
        self.connection.close()


if __name__ == "__main__":
    _preload()
    warm = Warm(sys.argv[1])
    print("ready", flush=True)
    warm.run()
    os._exit(0)  # nothing is left to tidy, and tidying up all that was imported takes seconds
