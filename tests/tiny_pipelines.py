"""Small synthesis pipelines for tests; importable, because processes of their own run them."""

from __future__ import annotations

import time

from llavakit.registry import PIPELINES
from llavakit.synthesis.pipeline import Pipeline, Refused


class Rounds(Pipeline):
    """Two rounds with a teacher; replies that say "no" refuse the item."""

    def __init__(self, rounds: int = 2) -> None:
        self.rounds = rounds

    def work(self, item, teacher):
        messages, replies = [], []
        for number in range(self.rounds):
            messages.append({"role": "user", "content": f"{item['text']} {number}"})
            replies.append(teacher.ask(messages, attempt=number))
            messages.append({"role": "assistant", "content": replies[-1]})
            if replies[-1] == "no":
                raise Refused(f"round {number} said no")
        for number, reply in enumerate(replies):
            yield {"id": f"{item['id']}-{number}", "text": reply}


class Ranks(Pipeline):
    """No teacher: the rank of a number among all, so that every item must be seen first."""

    asks = False
    surveys = True

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause

    def survey(self, number, item):
        return item["value"]

    def gather(self, found, folder):
        (folder / "values.txt").write_text("\n".join(map(str, sorted(found))))

    def open(self, folder):
        self.values = [int(line) for line in (folder / "values.txt").read_text().split()]

    def work(self, item, teacher):
        time.sleep(self.pause)
        if item["value"] % 7 == 0:
            raise Refused(f"{item['value']} is divisible by seven")
        yield from ({"id": item["id"], "rank": self.values.index(item["value"])} for _ in range(item["value"] % 3))


def register() -> None:
    """Make them known; does nothing a second time."""
    PIPELINES.add("rounds", Rounds)
    PIPELINES.add("ranks", Ranks)


if __name__ == "__main__":
    from llavakit.cli.app import main

    register()
    main()
