"""`llavakit new`: pictures become records, held-out questions and a recipe; what is wrong with them is one line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_server import small_chat

from llavakit.checkpoints.convert import save
from llavakit.cli import app as cli
from llavakit.errors import UserError
from llavakit.projects.create import create
from llavakit.projects.fitting import fit_to, steps_of
from llavakit.system import systems
from llavakit.training.recipe import load_recipe

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


def picture(path: Path, seed: int, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 12, (8, 8, 3))
    Image.fromarray((np.array(COLOURS[colour]) + noise).astype(np.uint8)).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Twenty pictures and a table that calls its columns as people do."""
    rows = ["File Name;Label;Patient ID"]
    for number in range(20):
        colour = list(COLOURS)[number % 4]
        picture(tmp_path / "pets" / f"{number}.png", number, colour)
        rows.append(f"pets/{number}.png;{colour};p{number // 2}")
    table = tmp_path / "pets.csv"
    table.write_bytes(("\r\n".join(rows) + "\r\n").encode("utf-8-sig"))
    return table


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    chat = small_chat()
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(chat.model.state_dict(), chat.model.config, chat.processor, folder)
    return folder


def test_from_a_table_to_an_evaluated_model_with_the_commands_that_it_prints(pets, model, tmp_path, capsys):
    out = tmp_path / "project"
    assert cli.run(["new", str(pets), "--model", str(model), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "separated by semicolons" in printed
    assert "split by subject" in printed
    commands = [line.split() for line in printed.splitlines() if line.startswith("  llavakit ")]
    assert [words[1] for words in commands] == ["train", "eval", "chat"]
    facts = json.loads((out / "project.json").read_text(encoding="utf-8"))
    assert [line.split() for line in facts["commands"]] == commands
    assert cli.run([*commands[0][1:], "stages.tune.max_steps=2"]) == 0
    predictions = tmp_path / "answers.jsonl"
    capsys.readouterr()
    assert cli.run([*commands[1][1:], "--output", str(predictions), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["count"] == len(lines(out / "heldout.jsonl"))


def test_a_column_of_names_without_endings_is_not_taken_for_another_of_pictures(tmp_path):
    rows = ["image,label,mask"]
    for number in range(6):
        picture(tmp_path / f"a{number}.png", number)
        picture(tmp_path / "masks" / f"a{number}_mask.png", number + 9)
        rows.append(f"a{number},{'dog' if number % 2 else 'cat'},masks/a{number}_mask.png")
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    made = create(tmp_path / "t.csv", tmp_path / "p")
    assert any("image is the column 'image'" in line for line in made.said)
    assert lines(tmp_path / "p" / "train.jsonl")[0]["image"] == "a0.png"


@pytest.mark.parametrize("row", ['b.png,"cat', '"b.png\n"'])
def test_an_open_quote_or_a_line_break_is_told_with_its_line(tmp_path, row):
    for name in "abcd":
        picture(tmp_path / f"{name}.png", ord(name))
    text = f"image,label\na.png,dog\n{row}\nc.png,cat\nd.png,dog\n"
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.csv.*3"):
        create(tmp_path / "t.csv", tmp_path / "p")


def test_conversations_without_pictures_hold_out_questions_without_pictures(tmp_path):
    rows = [
        {"id": str(n), "conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": str(n % 2)}]}
        for n in range(10)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    create(tmp_path / "t.jsonl", tmp_path / "p")
    assert not any("image" in question for question in lines(tmp_path / "p" / "heldout.jsonl"))


def test_subjects_are_never_split_and_every_answer_is_in_both_parts(pets, tmp_path):
    create(pets, tmp_path / "p")
    train, heldout = lines(tmp_path / "p" / "train.jsonl"), lines(tmp_path / "p" / "heldout.jsonl")
    assert len(train) + len(heldout) == 20
    assert len(heldout) == 4
    assert {r["subject"] for r in train}.isdisjoint(q["subject"] for q in heldout)
    assert {q["answer"] for q in heldout} <= {r["conversations"][1]["value"] for r in train}
    assert "It is one of: blue, green, red, white." in heldout[0]["text"]
    recipe = load_recipe(tmp_path / "p" / "recipe.yaml")
    assert recipe.stages[0].lora.rank == 64
    assert recipe.stages[0].save_steps


def test_equal_pictures_under_two_names_stay_together(tmp_path):
    for number in range(10):
        for copy in "ab":
            picture(tmp_path / "in" / ("cat" if number % 2 else "dog") / f"{number}{copy}.png", number)
    create(tmp_path / "in", tmp_path / "p")
    number = lambda row: Path(row["image"]).name[0]  # noqa: E731
    held = {number(row) for row in lines(tmp_path / "p" / "heldout.jsonl")}
    assert held
    assert held.isdisjoint(map(number, lines(tmp_path / "p" / "train.jsonl")))


def test_folders_or_names_of_pictures_hold_the_answers(tmp_path):
    for number in range(6):
        picture(tmp_path / "folders" / ("a_cat" if number % 2 else "dog") / f"{number}.jpg", number)
        picture(tmp_path / "names" / f"{'red_disc' if number % 2 else 'cross'}_{number:02}.png", number)
    for source, answers in (("folders", {"a cat", "dog"}), ("names", {"red disc", "cross"})):
        create(tmp_path / source, tmp_path / "p" / source)
        rows = lines(tmp_path / "p" / source / "train.jsonl")
        assert {row["conversations"][1]["value"] for row in rows} == answers


def test_rows_of_json_and_conversations_are_taken(pets, tmp_path):
    folder = pets.parent
    turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "red"}]
    rows = [
        {"image": f"pets/{n}.png", "prompt": "Which?", "caption": f"a long text about number {n}"} for n in range(9)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = [dict(turn, value=turn["value"].replace("red", "blue")) for turn in turns]
    records = [{"image": f"pets/{n}.png", "conversations": turns if n % 2 else said} for n in range(9)]
    (folder / "records.json").write_text(json.dumps(records))
    assert create(folder / "rows.jsonl", tmp_path / "a").task == "text_overlap"
    assert create(folder / "records.json", tmp_path / "b").task == "exact_match"
    assert lines(tmp_path / "b" / "train.jsonl")[0] in records
    assert lines(tmp_path / "b" / "heldout.jsonl")[0]["text"] == "Which colour?"


def test_the_first_line_may_be_a_row_and_names_may_lack_their_folder_or_suffix(tmp_path):
    for number in range(6):
        picture(tmp_path / "deep" / "er" / f"x{number}.png", number)
    rows = [f"x{n}.png\twhat is it?\t{'cat' if n % 2 else 'dog'}" for n in range(6)]
    (tmp_path / "t.tsv").write_text("\n".join(rows))
    made = create(tmp_path / "t.tsv", tmp_path / "p")
    assert any("no header" in line for line in made.said)
    (tmp_path / "stems.csv").write_text("scan,finding\n" + "\n".join(f"x{n},{n % 2}" for n in range(6)))
    create(tmp_path / "stems.csv", tmp_path / "q")
    assert lines(tmp_path / "q" / "train.jsonl")[0]["image"].startswith("deep/er/x")


def replaced(line: int, text: str):
    def change(table: Path) -> None:
        rows = table.read_text(encoding="utf-8-sig").split("\n")
        rows[line - 1] = text
        table.write_text("\n".join(rows))

    return change


def damaged(table: Path) -> None:
    path = table.parent / "pets" / "3.png"
    path.write_bytes(path.read_bytes()[:60])


def of_one_class(table: Path) -> None:
    text = table.read_text(encoding="utf-8-sig")
    for colour in COLOURS:
        text = text.replace(f";{colour};", ";cat;")
    table.write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (replaced(1, "A;B;C"), ""),  # the column of pictures is known by its cells, but not that of the answers
        (replaced(5, "pets/none.png;red;p1"), "pets.csv:5: File Name: there is no file 'pets/none.png'"),
        (
            replaced(5, "pets/3.png,red,p1"),
            "pets.csv:5: row: has 1 cell, the header has 3; the file is separated by semi",
        ),
        (
            replaced(5, "pets/3.png;red;or;p1"),
            "pets.csv:5: row: has 4 cells, the header has 3; put text that holds ';'",
        ),
        (replaced(5, "pets/3.png;;p1"), "pets.csv:5: Label: is empty"),
        (damaged, "pets.csv:5: image: "),
        (of_one_class, "all 20 answers are 'cat', so there is nothing to tell apart"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(pets, tmp_path, capsys, damage, said):
    damage(pets)
    assert cli.run(["new", str(pets), "--out", str(tmp_path / "p")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (said or "no column holds the answers; its columns are A, B, C") in error
    assert not (tmp_path / "p").exists()


def test_broken_rows_are_left_out_and_named_if_that_is_wanted(pets, tmp_path, capsys):
    replaced(5, "pets/none.png;red;p1")(pets)
    (pets.parent / "pets" / "9.png").write_bytes(b"no picture")
    assert cli.run(["new", str(pets), "--out", str(tmp_path / "p"), "--on-bad-record", "skip"]) == 0
    error = capsys.readouterr().err
    assert "pets.csv:5: " in error
    assert "pets.csv:11: " in error
    assert error.count("left out") == 2
    assert len(lines(tmp_path / "p" / "train.jsonl")) + len(lines(tmp_path / "p" / "heldout.jsonl")) == 18


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,answer\nrex,dog\nminka,cat", "no column names pictures; its columns are name, answer"),
        ("just words\nand more", "its first line has one column"),
        ("image,answer\n", "holds no rows"),
        ("image,answer,answer\na.png,b,c", "two columns are called 'answer'"),
        ("", "its first line has one column"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        create(tmp_path / "t.csv", tmp_path / "p")


def test_other_sources_are_refused(pets, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="exists, and nothing is written over"):
        create(pets, tmp_path / "taken")
    with pytest.raises(UserError, match="holds neither pictures nor a table"):
        create(tmp_path / "empty", tmp_path / "p")
    with pytest.raises(UserError, match="no such file or folder"):
        create(tmp_path / "gone.csv", tmp_path / "p")
    with pytest.raises(UserError, match="unknown meaning 'imag'; did you mean 'image'"):
        create(pets, tmp_path / "p", columns={"imag": "a"})
    with pytest.raises(UserError, match="has no such column; it has File Name, Label, Patient ID"):
        create(pets, tmp_path / "p", columns={"image": "a"})
    (tmp_path / "pets.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"holds 2 tables \(pets.csv, pets.jsonl\)"):
        create(tmp_path, tmp_path / "p")


def test_a_hundred_thousand_rows_are_fast(tmp_path):
    for number in range(50):
        picture(tmp_path / f"{number}.png", number)
    with (tmp_path / "t.csv").open("w") as stream:
        stream.write("image,question,answer\n")
        stream.writelines(f"{n % 50}.png,question {n},answer {n % 7}\n" for n in range(100_000))
    begin = time.process_time()
    made = create(tmp_path / "t.csv", tmp_path / "p")
    assert time.process_time() - begin < 10
    assert made.train + made.heldout == 100_000
    assert load_recipe(tmp_path / "p" / "recipe.yaml").stages[0].epochs == 1


def test_small_sets_make_some_hundred_steps():
    for records in (8, 20, 48, 100, 500, 2000):
        batch, epochs, steps = steps_of(records)
        assert batch <= records
        assert steps >= (100 if records >= 16 else 60)
        assert epochs <= 30
    assert steps_of(100_000)[1] == 1


def test_every_system_starts_from_published_weights_or_says_why_not():
    refused = set()
    for slug in systems():
        try:
            assert fit_to(slug, None).model
        except UserError:
            refused.add(slug)
    none_published = {"hyper-llava", "kg-llava", "llava-interactive", "report-error-checking"}
    assert refused & {*systems()} >= none_published | {"med42-v2", "robust-clip"}
    assert len(refused) < 8
