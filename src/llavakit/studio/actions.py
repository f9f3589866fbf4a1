"""What the page does: makes and opens projects, starts their jobs, and says where they stand. No Gradio here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llavakit.errors import UserError
from llavakit.evaluation.processors import plain_answer
from llavakit.serving.run import check_port
from llavakit.studio.jobs import Job
from llavakit.studio.project import Project, projects

KEY = "LLAVAKIT_STUDIO_KEY"  # environment variable with the key that the studio asks served models with
_PORTS = range(8000, 9000)


@dataclass
class Studio:
    """What one page works on.

    Attributes:
        workspace: Folder in which projects are made and looked for.
        host: Address that served models listen on.
        keys: Keys that served models ask for.
        allowed_hosts: Names that served models are called by, besides those that `llavakit serve` knows.
        open: The project on the page.
    """

    workspace: Path
    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    open: Project | None = None

    def __post_init__(self) -> None:
        found = projects(self.workspace)
        if self.open is None and found:
            self.open = found[0]

    @property
    def project(self) -> Project:
        """The project that is open.

        Raises:
            UserError: If none is.
        """
        if self.open is None:
            raise UserError("make or open a project first")
        return self.open

    def names(self) -> list[str]:
        """Names of all projects, the latest first."""
        return [project.name for project in projects(self.workspace)]

    def make(self, source: str, model: str) -> None:
        """Make a project of pictures and open it; see `llavakit.projects.create.create`."""
        from llavakit.projects.create import create

        if not source.strip():
            raise UserError("name a folder of pictures, or a table of them")
        path = Path(source.strip()).expanduser()
        out = self.workspace / path.resolve().stem
        number = 2
        while out.exists():
            out, number = out.with_name(f"{path.resolve().stem}-{number}"), number + 1
        made = create(path, out, model=model.strip() or None)
        self.open = Project.open(Path(made.folder))

    def choose(self, name: str | None) -> None:
        """Open a project of the workspace."""
        self.open = self._called(name)

    def _called(self, name: str | None) -> Project:
        if not name:
            raise UserError("choose a project from the list")
        return Project.open(self.workspace / Path(name).name)

    # jobs

    def plan(self) -> None:
        """Reckon what training takes."""
        self.project.job("plan").start([*self.project.commands["train"], "--plan"])

    def train(self) -> None:
        """Start training, or go on."""
        self.project.job("train").start(self.project.commands["train"])

    def evaluate(self) -> None:
        """Answer the held-out questions with the trained model and score the answers."""
        project = self.project
        output = str(project.folder / "answers.jsonl")
        project.job("eval").start([*project.commands["eval"], "--output", output, "--json"])

    def compare(self, name: str | None) -> None:
        """Compare the answers with those of another project's model to the same questions."""
        project = self.project
        project.job("compare").start(
            [
                "compare",
                str(project.final),
                str(self._called(name).final),
                *project.commands["eval"][2:],
                "--html",
                str(project.folder / "compare.html"),
            ]
        )

    def serve(self) -> None:
        """Serve the trained model on a port that is free."""
        project = self.project
        port = next((port for port in _PORTS if _free(self.host, port)), None)
        if port is None:
            raise UserError(f"no port from {_PORTS.start} to {_PORTS.stop - 1} is free")
        command = ["serve", str(project.final), "--host", self.host, "--port", str(port)]
        command += [f"--allowed-host={name}" for name in self.allowed_hosts]
        keys = {"LLAVAKIT_API_KEYS": ",".join(self.keys)} if self.keys else {}
        project.job("serve").start(command, keys)

    def address(self) -> str | None:
        """Where the project's model is served; None before it answers."""
        import httpx

        job = self.project.job("serve")
        if job.state != "running":
            return None
        words = job.command
        host = {"0.0.0.0": "127.0.0.1", "::1": "[::1]"}.get(self.host, self.host)
        url = f"http://{host}:{words[words.index('--port') + 1]}"
        try:
            return url if httpx.get(f"{url}/health", timeout=2).is_success else None
        except httpx.HTTPError:
            return None

    def ask(self, number: int, question: str) -> str:
        """The served model's answer to a question about the media of a held-out one."""
        from llavakit.generation.remote import APIClient, RemoteResponder

        url = self.address()
        if url is None:
            raise UserError("serve the model first")
        row = self.project.questions[number - 1]
        content = [*self.project.media(row), {"type": "text", "text": question.strip() or row["text"]}]
        client = APIClient(f"{url}/v1", api_key_env=KEY, retries=0, timeout=600)
        try:
            return RemoteResponder(client).chat([{"role": "user", "content": content}], max_new_tokens=256)
        finally:
            client.close()

    # where things stand

    def running(self) -> list[Job]:
        """Jobs of all projects that are running."""
        folders = (folder for project in projects(self.workspace) for folder in project.folder.glob("jobs/*"))
        return [job for job in map(Job, folders) if job.state == "running"]

    def training(self) -> str:
        """Where training stands, in a sentence."""
        project, job = self.project, self.project.job("train")
        state = job.state
        done = [f"{name}: step {m['steps']:,} of {m['batches']:,}" for name, m in project.stages if "batches" in m]
        at = f" ({'; '.join(done)})" if done else ""
        if state == "none":
            return "Trained already." if project.final.is_dir() else "Not trained yet."
        return {
            "running": f"Training{at}.",
            "finished": "Trained.",
            "stopped": f"Stopped{at}. Training goes on from its last checkpoint.",
            "failed": f"Training ended: {job.problem}",
            "died": f"The training process is gone{at}: {job.problem}. It can go on from its last checkpoint.",
        }[state]


def same(answer: str, reply: str) -> bool:
    """Whether a reply is the answer by the rule of `exact_match`."""
    return plain_answer(answer) == plain_answer(reply)


def _free(host: str, port: int) -> bool:
    try:
        check_port(host, port)
    except UserError:
        return False
    return True


__all__ = ["KEY", "Studio", "same"]
