"""LLaVA-o1: golden figures, stages as a codec, searches on a model that runs here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_server import small_chat

from llavakit.conversation.turns import TraceEvent
from llavakit.errors import UserError
from llavakit.generation.request import Request, SamplingParams
from llavakit.generation.search import Branch
from llavakit.proof.golden import find_cases, run_case
from llavakit.system import get_system
from llavakit.systems.llava_o1 import teaching
from llavakit.systems.llava_o1.judging import Judge, shown_text
from llavakit.systems.llava_o1.responder import StagedSearch
from llavakit.systems.llava_o1.searching import SAMPLING, Retracing, by_stage, knock_out, swires
from llavakit.systems.llava_o1.stages import NAMES, end_of, stages_codec
from llavakit.training.build import build_meta
from llavakit.training.recipe import load_recipe

GOLDEN = Path(__file__).parent / "golden" / "llava-o1"
QUESTION = [{"role": "user", "content": "What is this?"}]
REPLY = "<SUMMARY> s </SUMMARY>\n\n<CAPTION> c </CAPTION>\n\n<REASONING> r </REASONING>\n\n<CONCLUSION> B </CONCLUSION>"


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    declined = path.name in ("stopping_rules", "training_dialogs")
    assert report.status == ("declined" if declined else "passed"), report.reason


# Stages


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        (REPLY, "s\n\nc\n\nr", "B"),
        ("(Here begins the CONCLUSION stage) **6** (Here ends the CONCLUSION stage)", "", "**6**"),
        ("<SUMMARY> s </SUMMARY>\n<CONCLUSION> if x < y then <b>B</b> </CONCLUSION>", "s", "if x < y then <b>B</b>"),
        ("plain answer", "", "plain answer"),
    ],
)
def test_both_spellings_are_read_whole_and_in_pieces(text, reasoning, content):
    turn = stages_codec().parse(text)
    assert (turn.reasoning, turn.content) == (reasoning, content)
    parser, events = stages_codec().parser(), []
    for letter in text:
        events += parser.feed(letter)
    events += parser.finish()
    said = "".join(event.text for event in events if type(event).__name__ == "TextDelta")
    assert said == content


def test_a_candidate_without_its_stage_loses_without_a_call():
    def ask(text, image):
        raise AssertionError("the judge is not needed")

    judge = Judge(ask, "q")
    with_stage = "<SUMMARY> a </SUMMARY>"
    assert judge("SUMMARY", "no tags", with_stage) == 1
    assert judge("SUMMARY", with_stage, "no tags") == 0
    assert judge("REASONING", with_stage, with_stage) == 0  # neither has come that far
    assert shown_text("SENTENCE", "no point") == ("no point", None)


# Searches


def scripted(words):
    """`expand` of a model whose candidates are known, and the numbers of candidates it was asked for."""
    asked = []

    def expand(branches, sampling):
        (branch,) = branches
        stage = next(name for name in NAMES if end_of(name) not in branch.text)
        asked.append((stage, sampling.n))
        texts = words(stage, sampling.n)
        return [[Branch(branch.request, text=f"{branch.text}<{stage}> {word} {end_of(stage)}") for word in texts]]

    return expand, asked


ROOT = Branch(Request(input_ids=[0]))


def test_a_judge_that_is_right_gives_the_best_of_every_stage():
    expand, asked = scripted(lambda stage, n: [f"{stage} {number}" for number in range(n)])
    draws = np.random.RandomState(3)
    compared = []

    def compare(kind, first, second):
        compared.append(kind)
        return int(second > first)

    sampling = SamplingParams(n=4, temperature=0.6)
    *_, reply = by_stage(expand, ROOT, sampling, compare, lambda n: int(draws.randint(n)))
    assert reply.text == "".join(f"<{name}> {name} 3 {end_of(name)}" for name in NAMES)
    assert asked == [(name, 4) for name in NAMES]
    assert compared == [name for name in NAMES for _ in range(3)]
    assert knock_out([7], lambda a, b: 1 / 0, lambda n: 1 / 0) == 7


@pytest.mark.parametrize(("cutoff", "rounds"), [(float("inf"), 5), (float("-inf"), 1)])
def test_retracing_goes_back_until_reasonings_are_good_enough(cutoff, rounds):
    expand, asked = scripted(lambda stage, n: [f"{stage} {number}" for number in range(n)])
    *_, reply = swires(expand, ROOT, SAMPLING, lambda prompt, texts: [0.0] * len(texts), "q", Retracing(cutoff=cutoff))
    stages = [stage for stage, _ in asked]
    assert [stages.count(name) for name in NAMES] == [1, rounds, 4 * rounds, 3]
    assert reply.text.endswith("</CONCLUSION>")


@pytest.mark.parametrize("search", ["stage", "sentence", "best-of-n"])
def test_a_model_that_runs_here_searches(search):
    chat = small_chat()
    searcher = StagedSearch(chat, search=search, candidates=3)
    answers = [searcher.submit(QUESTION, SamplingParams(seed=1, max_new_tokens=6)).result() for _ in range(2)]
    assert answers[0].content == answers[1].content
    trace = dict(answers[0].traces)["search"]
    assert trace["candidates"] == 3
    assert trace["generated"] % 3 == 0
    assert trace["generated"] > 0
    other = searcher.submit(QUESTION, SamplingParams(seed=1, max_new_tokens=6), search="none").result()
    assert other.content == chat.submit(QUESTION, SamplingParams(seed=1, max_new_tokens=6)).result().content


def test_what_cannot_search_says_so():
    searcher = StagedSearch(small_chat(), search="swires")
    with pytest.raises(Exception, match="swires needs a reward"):
        searcher.submit(QUESTION, SamplingParams(seed=1, max_new_tokens=4)).result()
    with pytest.raises(Exception, match="cannot continue a reply"):
        StagedSearch(StagedSearch(small_chat()), search="stage").submit(QUESTION).result()


# Recipe


def test_published_scale():
    recipe = load_recipe(get_system("llava-o1").recipe)
    model = build_meta(recipe)
    (stage,) = recipe.stages
    assert (
        sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel() == 8_030_261_248
    )
    assert (stage.learning_rate, stage.epochs, stage.global_batch, stage.seed) == (1e-5, 3, 32, 42)
    assert (stage.schedule, stage.schedule_options, stage.clip) == ("step", {"gamma": 0.85, "parts": 3}, None)


# Data


def test_refused_questions_are_left_out_and_noted():
    records = [
        {"id": n, "image": "a.jpg", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "yes"}]}
        for n in range(3)
    ]
    replies = iter(["no tags", REPLY, REPLY, REPLY])
    verdicts = iter(["valid", "invalid", "Invalid."])
    made, refused = teaching.staged_records(
        records,
        lambda image, texts: next(replies),
        lambda image, texts: next(verdicts),
        has_image=lambda name: True,
        refused=[2],
    )
    assert [record["id"] for record in made] == [0]
    assert made[0]["conversations"][1]["value"] == REPLY
    assert refused == [2, 1]


def test_events_of_a_search_keep_channels_apart():
    events = list(_events(REPLY))
    assert not any(isinstance(event, TraceEvent) for event in events)


def _events(text):
    parser = stages_codec().parser()
    yield from parser.feed(text)
    yield from parser.finish()


def test_option_given_twice(monkeypatch):
    from llavakit.cli.common import responder_choice

    with pytest.raises(UserError, match="--search: --responder-option search= says it too"):
        responder_choice("llava-o1", ["search=stage"], search="stage")
    assert responder_choice("llava-o1", None, search="stage") == {
        "responder": "llava-o1",
        "responder_options": {"search": "stage"},
    }
