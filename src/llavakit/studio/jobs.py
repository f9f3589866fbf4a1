"""Commands of llavakit that run beside the page, and outlive it.

A job is a folder. What it does stands in its files alone, so a page that is loaded again, or a studio that is started
again, finds it as it is:

    job.json     {"command": [...], "pid"}
    lock         held by the process while it lives
    log.txt      what it told on standard error
    output.txt   what it printed
    ended.json   {"status": exit status}; not there if the process was killed
    stopped      there if it was told to stop
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llavakit.data.strict_json import read_json
from llavakit.errors import UserError

State = Literal["none", "running", "finished", "stopped", "failed", "died"]
INTERRUPTED = 130  # exit status of a command that Ctrl-C ended
TAIL = 1 << 20  # bytes that are shown
_LOCK, _STOPPED = "lock", "stopped"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor movements


@dataclass(frozen=True)
class Job:
    """One command at a time in a folder of its own.

    Attributes:
        folder: Where its files are; made when the command starts.
    """

    folder: Path

    @property
    def state(self) -> State:
        """Where it stands.

        "none" before the first start; "stopped" by `stop`; "failed" if the command said what is wrong; "died" if the
        process went without a word, as after a kill or without memory.
        """
        if not (self.folder / "job.json").is_file():
            return "none"
        if self._alive():
            return "running"
        if (self.folder / _STOPPED).exists():
            return "stopped"
        try:
            status = read_json(self.folder / "ended.json", kind=dict)["status"]
        except (UserError, KeyError):
            return "died"
        return {0: "finished", INTERRUPTED: "stopped"}.get(status, "failed")

    def _alive(self) -> bool:
        try:
            with (self.folder / _LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # several may look at once
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @property
    def command(self) -> list[str]:
        """The arguments of `llavakit`; empty before the first start."""
        path = self.folder / "job.json"
        return list(read_json(path, kind=dict)["command"]) if path.is_file() else []

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Run `llavakit` with arguments; what an earlier command left in the folder goes.

        Args:
            environment: Variables besides those of this process; they are not written down.

        Raises:
            UserError: If it is running.
        """
        if self.state == "running":
            raise UserError(f"llavakit {self.command[0]} is running; stop it first")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with contextlib.ExitStack() as files:
            lock, log, output = (
                files.enter_context((self.folder / name).open("wb")) for name in (_LOCK, "log.txt", "output.txt")
            )
            fcntl.flock(lock, fcntl.LOCK_EX)  # from here on until the process ends: it inherits the open file
            started = subprocess.Popen(
                [sys.executable, "-m", "llavakit.studio.jobs", str(self.folder), str(lock.fileno()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # Ctrl-C in the studio's terminal is not meant for it
                env={**os.environ, "COLUMNS": "110", "PYTHONUNBUFFERED": "1", **(environment or {})},
            )
            _write(self.folder / "job.json", {"command": list(command), "pid": started.pid})

    def stop(self) -> None:
        """Ctrl-C for the command and what it started; nothing happens if it does not run."""
        if self.state == "running":
            (self.folder / _STOPPED).touch()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(read_json(self.folder / "job.json", kind=dict)["pid"], signal.SIGINT)

    def output(self) -> str:
        """What it printed."""
        return self._tail("output.txt")

    def log(self) -> str:
        """The end of what it told, as a terminal would show it."""
        return self._tail("log.txt")

    def _tail(self, name: str) -> str:
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        lines = _CONTROL.sub("", text).split("\n")
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines).strip("\n")

    @property
    def problem(self) -> str:
        """What went wrong, in a line; empty if nothing did."""
        state = self.state
        if state == "died":
            return f"llavakit {self.command[0]} was killed, or ran out of memory"
        if state != "failed":
            return ""
        lines = [line for line in self.log().splitlines() if line.strip()]
        return lines[-1].removeprefix("llavakit: ") if lines else "it ended without a message"


def _write(path: Path, value: dict) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(value), encoding="utf-8")
    scratch.replace(path)


def _run(folder: Path, lock: int, command: list[str]) -> int:
    """The process of a job."""
    os.set_inheritable(lock, False)  # what the command starts does not keep it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from llavakit.cli import app

    status = 1
    try:
        status = app.run(command)
    finally:
        _write(folder / "ended.json", {"status": status})
    return status


if __name__ == "__main__":
    sys.exit(_run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
