"""`make demo`: from nothing to a vision-language model that answers questions about pictures it has never seen.

Phantom patients and scenes are written, two stand-ins for pretrained parts are made (an encoder that learnt what lies
in each patch, a decoder that learnt to caption), and then LLaVA-1.5's own two stages run on them: alignment of the
connector with everything else frozen, and instruction tuning. The model is asked about held-out pictures beside a
baseline that was trained on the same questions without pictures. What is finished is found again and kept.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from llavakit.checkpoints.files import atomic_folder
from llavakit.model.configuration import LlavakitConfig
from llavakit.phantom.base import Box, cell_labels
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.phantom.write import write_world
from llavakit.training.recipe import Recipe
from llavakit.training.run import TrainResult, publish, train
from llavakit.vision.encode import encode_views
from llavakit.vision.geometry import geometry_of

SIDE, PATCH, WIDTH = 48, 16, 96
WORLDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "scene": ("scene", 0, {"types": "colour,shape", "most": 1}),
    "thorax": ("thorax", 0, {"types": "presence,side"}),
    "crowded": ("scene", 1, {"types": "colour,shape", "most": 6}),
}
"""Folder to world, seed and options."""
ASKED = ("scene", "thorax")
CAPTIONED = ("crowded", "thorax")
"""Many objects in a picture teach encoder and decoder more in the same time."""
SEEN = (
    *("square", "disc", "triangle", "cross", "ring", "star", "diamond"),
    *("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white", "grey", "pink"),
    *("cardiomegaly", "consolidation", "effusion", "pneumothorax"),
)


@dataclass(frozen=True)
class Budget:
    """Sizes of a run; the defaults are the demo's.

    Attributes:
        cases: Cases per world, a tenth of them held out.
        tower_steps: Steps of the encoder's stand-in pretraining.
        caption_epochs, tune_epochs: Passes over captions and conversations.
        align_share, blind_share: Share of the captions and of the conversations that alignment and the baseline
            without pictures see, once; a whole pass did not make the baseline guess better (benchmarks/RESULTS.md).
        questions: Held-out questions that are asked.
        seed: Of the stages; worlds and encoder are always the same.
    """

    cases: int = 3000
    tower_steps: int = 1000
    caption_epochs: float = 2.0
    align_share: float = 0.5
    tune_epochs: float = 2.0
    blind_share: float = 0.5
    questions: int = 600
    seed: int = 0


def vision_config() -> dict[str, Any]:
    """The tiny encoder: nine patches per picture."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }


def text_config(vocabulary: int) -> dict[str, Any]:
    """The tiny decoder."""
    return {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.1,  # WIDTH ** -0.5; the usual 0.02 is meant for models forty times as wide
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }


class Demo:
    """One run of the demo in a folder.

    Args:
        out: Where everything goes.
        budget: Sizes.
        console: Where progress is shown.
    """

    def __init__(self, out: Path, budget: Budget | None = None, console: Console | None = None) -> None:
        self.out, self.budget = out, budget or Budget()
        self.console = console or Console(stderr=True)

    def run(self) -> dict[str, Any]:
        """Everything, or what is left of it; returns the contents of `metrics.json`."""
        began = time.perf_counter()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as beside:
            worlds = beside.submit(_write_world, self.out, self.budget, "thorax")
            self._write("scene")
            self._write("crowded")
            worlds.result()
            self._blind_data()
            self._tokenizer()
            self._tower()
            parts = self._train("parts", self._parts_recipe())
            self._share_features()
            baseline = beside.submit(_train_blind, self.out, self.budget, parts.final)
            tuned = self._train("llava", self._llava_recipe(parts.final))
            baseline.result()
        blind = self._blind(parts.final)
        answers = self._ask(tuned.final, "with pictures")
        guesses = self._ask(blind.final, "text only")
        publish(tuned.final, self.out / "final")
        metrics = self._metrics(answers, guesses, [*parts.stages, *tuned.stages, *blind.stages], began)
        (self.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        from llavakit.demo.report import write_report

        write_report(self.out / "report.html", metrics, answers, guesses, self.out)
        self._show(metrics, answers)
        return metrics

    # data and stand-ins for pretrained parts

    def _world(self, name: str) -> Path:
        return self.out / "data" / name

    def _write(self, name: str) -> None:
        world, seed, options = WORLDS[name]
        easy = {"n": self.budget.cases, "size": SIDE, "difficulty": "easy", "formats": "short,sentence"}
        write_world(world, self._world(name), seed=seed, **easy, **options)

    def _blind_data(self) -> None:
        """The dialogues without their pictures."""
        blind = self.out / "data" / "blind"
        if blind.is_dir():
            return
        with atomic_folder(blind) as scratch:
            for name in ASKED:
                records = json.loads((self._world(name) / "train.json").read_text(encoding="utf-8"))
                for record in records:
                    record.pop("image")
                    first = record["conversations"][0]
                    first["value"] = first["value"].replace("<image>\n", "")
                (scratch / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")

    def _tokenizer(self) -> None:
        folder = self.out / "tokenizer"
        if folder.is_dir():
            return
        texts = []
        for name in ASKED:
            texts += json.loads((self._world(name) / "texts.json").read_text(encoding="utf-8"))
        with atomic_folder(folder) as scratch:
            tiny_tokenizer(texts, vocab_size=800).save_pretrained(scratch)

    def _pictures(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised training pictures [n, 3, side, side] and what their patches show [n, patches, names]."""
        from llavakit.views.pixels import CLIP_MEAN, CLIP_STD, Normaliser

        normalise = Normaliser(CLIP_MEAN, CLIP_STD)
        items = json.loads((self._world(name) / "boxes.json").read_text(encoding="utf-8"))
        side = SIDE // PATCH
        pixels, labels = [], []
        for line in (self._world(name) / "cases.jsonl").open(encoding="utf-8"):
            case = json.loads(line)
            if case["split"] != "train":
                continue
            for item, files in case["items"].items():
                boxes = items.get(item, {}).get("boxes", [])
                pixels.append(normalise(Image.open(self._world(name) / files["image"]).convert("RGB")))
                found = [Box(b["label"], b["description"], tuple(b["xyxy"])) for b in boxes]
                labels.append(cell_labels(found, side, side, SEEN))
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(labels)).flatten(1, 2)

    def _tower(self) -> None:
        """Train the encoder to tell what lies in each patch; it stands in for years of CLIP."""
        folder = self.out / "encoder"
        if folder.is_dir():
            return
        from transformers import CLIPVisionConfig, CLIPVisionModel

        torch.manual_seed(0)
        config = CLIPVisionConfig(**{k: v for k, v in vision_config().items() if k != "model_type"})
        encoder, head = CLIPVisionModel(config), nn.Linear(WIDTH, len(SEEN))
        pixels, labels = map(torch.cat, zip(*map(self._pictures, CAPTIONED), strict=True))
        steps = self.budget.tower_steps
        trained = [*encoder.parameters(), *head.parameters()]
        optimiser = torch.optim.AdamW(trained, 2e-3, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
        generator, geometry = torch.Generator().manual_seed(0), geometry_of(config)
        with Progress(console=self.console) as progress:
            for _ in progress.track(range(steps), description="encoder: what lies in each patch"):
                chosen = torch.randint(0, len(pixels), (64,), generator=generator)
                features = encode_views(encoder, pixels[chosen], -2, "default", geometry)
                loss = F.binary_cross_entropy_with_logits(head(features), labels[chosen])
                loss = loss + 1e-3 * features.square().mean()  # of a size that a young connector can work with
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        with atomic_folder(folder) as scratch:
            encoder.save_pretrained(scratch)

    def _share_features(self) -> None:
        """Let the second run read what the first one's encoder, which is its own, said of the same pictures."""
        cache = self.out / "llava" / "cache"
        if not cache.exists():
            cache.parent.mkdir(exist_ok=True)
            cache.symlink_to(Path("..", "parts", "cache"), target_is_directory=True)

    # recipes

    def _recipe(self, name: str, init: dict[str, str], data: list[dict[str, Any]], stages: list[dict]) -> Recipe:
        tokenizer = self.out / "tokenizer"
        vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]) + 1
        config = LlavakitConfig(text_config=text_config(vocabulary), vision_config=vision_config())
        return Recipe.model_validate(
            {
                "system": "llava-1.5",
                "parts": {
                    "text_config": text_config(vocabulary),
                    "vision_config": vision_config(),
                    "connector": {"type": "mlp", "depth": 2},
                    "media": {"image": {"views": {"type": "pad", "size": SIDE}, "arrange": {"type": "flat"}}},
                    "image_token_id": config.text_config.vocab_size - 1,
                    "template": "v1",
                    "tokenizer": str(tokenizer),
                    "init": init,
                },
                "data": data,
                "stages": stages,
                "seed": self.budget.seed,
                "output": str(self.out / name),
            }
        )

    def _captions(self, share: float = 1.0) -> list[dict[str, Any]]:
        files = {f"{name}-captions": self._world(name) / "captions.json" for name in CAPTIONED}
        return [{"path": str(path), "name": name, "subset": _subset(share)} for name, path in files.items()]

    def _dialogues(self) -> list[dict[str, Any]]:
        return [{"path": str(self._world(name) / "train.json"), "name": f"{name}-dialogues"} for name in ASKED]

    def _stage(self, name: str, rates: dict[str, float], epochs: float, **options: Any) -> dict[str, Any]:
        return {
            "name": name,
            "train": rates,
            "learning_rate": max(rates.values()),
            "epochs": epochs,
            "schedule": "cosine",
            "warmup": 0.05,
            "clip": 1.0,
            "packing": True,
            "max_length": 256,
            "batch_size": 8,
            "log_steps": 10,
            "save_steps": 200,
            **options,
        }

    def _parts_recipe(self) -> Recipe:
        rates = {"multi_modal_projector": 3e-3, "language_model": 3e-3}
        stage = self._stage("caption", rates, self.budget.caption_epochs, template="plain", cache_features=True)
        return self._recipe("parts", {"vision_tower": str(self.out / "encoder")}, self._captions(), [stage])

    def _llava_recipe(self, parts: Path) -> Recipe:
        init = {"vision_tower": str(parts), "language_model": str(parts)}
        captions = self._captions(self.budget.align_share)
        stages = [
            self._stage(
                "align",
                {"multi_modal_projector": 3e-3},
                1.0,
                data=[source["name"] for source in captions],
                template="plain",
                cache_features=True,
            ),
            self._stage(
                "tune",
                {"multi_modal_projector": 2e-3, "language_model": 2e-3},
                self.budget.tune_epochs,
                data=[source["name"] for source in self._dialogues()],
                cache_features=True,
            ),
        ]
        return self._recipe("llava", init, [*captions, *self._dialogues()], stages)

    def _blind_recipe(self, parts: Path) -> Recipe:
        init = {"vision_tower": str(parts), "language_model": str(parts)}
        files = {f"{name}-blind": self.out / "data" / "blind" / f"{name}.json" for name in ASKED}
        part = _subset(self.budget.blind_share)
        data = [{"path": str(path), "name": name, "subset": part} for name, path in files.items()]
        return self._recipe("text-only", init, data, [self._stage("tune", {"language_model": 2e-3}, 1.0)])

    def _blind(self, parts: Path) -> TrainResult:
        return self._train("text-only", self._blind_recipe(parts))

    def _train(self, name: str, recipe: Recipe) -> TrainResult:
        self.console.rule(name)
        return train(recipe, console=self.console)

    # questions

    def _questions(self) -> list[dict[str, Any]]:
        """Held-out questions of both worlds in equal parts, mixed, with the folder that their pictures are in."""
        each = self.budget.questions // len(ASKED)
        chosen = []
        for name in ASKED:
            lines = (self._world(name) / "heldout_questions.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            step = max(len(rows) / each, 1)
            picked = [rows[int(number * step)] for number in range(min(each, len(rows)))]
            chosen += [{**row, "world": name, "path": f"data/{name}/{row['image']}"} for row in picked]
        random.Random(0).shuffle(chosen)
        return chosen

    def _ask(self, model: Path, name: str) -> list[dict[str, Any]]:
        """Answers to the held-out questions; without pictures if the model never saw any."""
        from llavakit.generation.load import load

        chat = load(model)
        rows, blind = self._questions(), name == "text only"
        answers = []
        with Progress(console=self.console) as progress:
            for start in progress.track(range(0, len(rows), 16), description=f"asking: {name}"):
                batch = rows[start : start + 16]
                conversations = [_conversation(row, None if blind else self.out) for row in batch]
                replies = chat.chat_batch(conversations, max_new_tokens=24)
                answers += [{**row, "reply": reply} for row, reply in zip(batch, replies, strict=True)]
        for row in answers:
            row["right"] = _plain(row["reply"]) == _plain(row["answer"])
        return answers

    def _metrics(
        self, answers: Sequence[dict], guesses: Sequence[dict], stages: Sequence[Any], began: float
    ) -> dict[str, Any]:
        def accuracy(rows: Sequence[dict]) -> float:
            return round(100 * sum(row["right"] for row in rows) / max(len(rows), 1), 2)

        kinds = sorted({(row["world"], row["type"]) for row in answers})
        by_type = [
            {
                "world": world,
                "type": kind,
                "questions": sum((r["world"], r["type"]) == (world, kind) for r in answers),
                "accuracy": accuracy([r for r in answers if (r["world"], r["type"]) == (world, kind)]),
                "text_only": accuracy([r for r in guesses if (r["world"], r["type"]) == (world, kind)]),
            }
            for world, kind in kinds
        ]
        return {
            "accuracy": accuracy(answers),
            "text_only": accuracy(guesses),
            "questions": len(answers),
            "by_type": by_type,
            "stages": [{"name": f"{s.folder.parent.name}/{s.name}", "log": s.metrics.get("log", [])} for s in stages],
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _show(self, metrics: dict[str, Any], answers: Sequence[dict]) -> None:
        table = Table(title="held-out patients and scenes, exact match in %")
        for column in ("questions about", "n", "LLaVA-1.5, tiny", "text only"):
            table.add_column(column, justify="left" if column == "questions about" else "right")
        for row in metrics["by_type"]:
            cells = (
                f"{row['world']}: {row['type']}",
                str(row["questions"]),
                f"{row['accuracy']}",
                f"{row['text_only']}",
            )
            table.add_row(*cells)
        table.add_section()
        table.add_row("all", str(metrics["questions"]), f"{metrics['accuracy']}", f"{metrics['text_only']}")
        self.console.print(table)
        for row in answers[:: max(len(answers) // 6, 1)][:6]:
            question = row["text"].splitlines()[0]
            self.console.print(f"{row['path']}: {question} [bold]{row['reply']}[/bold] (truth: {row['answer']})")
        self.console.print(f"report: {self.out / 'report.html'}   checkpoint: {self.out / 'final'}")


def _subset(share: float) -> str:
    """The part of a source that a share of its records is, as recipes spell it."""
    return "all" if share == 1.0 else f"random:{100 * share:g}%"


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


# What runs in a process beside the demo, without progress that would garble the demo's own.


def _write_world(out: Path, budget: Budget, name: str) -> None:
    Demo(out, budget, Console(quiet=True))._write(name)


def _train_blind(out: Path, budget: Budget, parts: Path) -> None:
    Demo(out, budget, Console(quiet=True))._blind(parts)


def _conversation(row: dict[str, Any], root: Path | None) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": row["text"].replace("<image>\n", "")}]
    if root is not None:
        content.insert(0, {"type": "image", "image": str(root / row["path"])})
    return [{"role": "user", "content": content}]


def main() -> None:
    """Run the demo in `runs/demo`."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--cases", type=int, default=Budget.cases, help="cases per world")
    parser.add_argument("--tune-epochs", type=float, default=Budget.tune_epochs)
    parser.add_argument("--seed", type=int, default=Budget.seed, help="of the stages")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are too small for more to help
    torch.manual_seed(0)
    budget = Budget(cases=arguments.cases, tune_epochs=arguments.tune_epochs, seed=arguments.seed)
    Demo(arguments.out, budget).run()
