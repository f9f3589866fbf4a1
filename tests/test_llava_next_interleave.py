"""LLaVA-NeXT-Interleave: golden figures, prompts, the published files, records, the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavakit.conversation.encode import IMAGE_PLACEHOLDER, encode
from llavakit.conversation.messages import from_llava
from llavakit.errors import UserError
from llavakit.media.frame_sampling import choose
from llavakit.proof.golden import find_cases, run_case

GOLDEN = Path(__file__).parent / "golden" / "llava-next-interleave"


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda path: path.name)
def test_golden(path):
    report = run_case(path)
    assert report.status == "passed", report.reason


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "interleave_eval_prompt" / "tokenizer.json"),
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def published_ids(tokenizer, turns):
    """The rule of the authors' script (spec, section 4), piece by piece."""

    def ids(text):
        return tokenizer(text).input_ids

    newline = ids("\n")
    found = ids("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    for who, value in turns:
        found += ids(f"<|im_start|>{who}") + newline
        pieces = value.split("<image>")
        for number, piece in enumerate(pieces):
            found += ids(piece)
            if number + 1 < len(pieces):
                found += [IMAGE_PLACEHOLDER, *newline]
        found += ids("<|im_end|>") + newline
    return found + ids("<|im_start|>assistant") + newline


@pytest.mark.parametrize(
    "value",
    ["\n<image>\n\nthe end", "<image><image>", " <image> \n<image>\n", "a\n\n", "\n", "the <image>the", "\n\n<image>"],
)
def test_published_prompts_are_pieces(tokenizer, value):
    pictures = value.count("<image>")
    record = {"conversations": [{"from": "human", "value": value}]} | ({"image": ["-"] * pictures} if pictures else {})
    messages = from_llava(record)
    again = [*messages, {"role": "assistant", "content": "\nthe answer"}, {"role": "user", "content": "\nmore"}]
    for conversation, turns in ((messages, [("user", value)]), (again, None)):
        turns = turns or [("user", value), ("assistant", "\nthe answer"), ("user", "\nmore")]
        found = encode(conversation, "qwen_1_5_pieces", tokenizer, add_generation_prompt=True)
        assert found.ids == published_ids(tokenizer, turns)
    first = [{"role": "assistant", "content": "I begin."}, *messages]
    found = encode(first, "qwen_1_5_pieces", tokenizer, add_generation_prompt=True)
    assert found.ids == published_ids(tokenizer, [("user", value)])
    assert "left out" in found.notes[0]


def test_turns_are_read_back_as_they_were_generated(tokenizer):
    def asked(template, ids, text):
        turns = [
            {"role": "user", "content": "A"},
            {"role": "assistant", "content": text, "token_ids": ids},
            {"role": "user", "content": "B"},
        ]
        return encode(turns, template, tokenizer, add_generation_prompt=True)

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    letters = [tokenizer(letter).input_ids[0] for letter in "the"]
    assert tokenizer("the").input_ids != letters  # the tokenizer would have merged them
    plain = asked("qwen_1_5", letters, "the").ids
    assert plain == asked("qwen_1_5", [*letters, end], "the").ids
    place = next(n for n in range(len(plain)) if plain[n : n + 4] == [*letters, end])
    assert (
        plain[:place]
        == encode([{"role": "user", "content": "A"}], "qwen_1_5", tokenizer, add_generation_prompt=True).ids
    )
    cut = asked("qwen_1_5_pieces_restarting", letters, "the").ids
    whole = asked("qwen_1_5_pieces_restarting", [*letters, end], "the").ids
    block = published_ids(tokenizer, [("user", "A")]), published_ids(tokenizer, [("user", "B")])
    assert cut == [*block[0], *letters, *block[1]]
    assert whole == [*block[0], *letters, end, *block[1]]
    for wrong in ([-1], "the", [True]):
        with pytest.raises(UserError, match=r"messages\.1\.token_ids"):
            asked("qwen_1_5", wrong, "the")


def test_pictures_stay_where_the_text_has_them(tokenizer):
    content = [{"type": "text", "text": "A"}, {"type": "image", "image": "x.png"}, {"type": "text", "text": "B"}]
    text = encode(
        [{"role": "user", "content": content}], "qwen_1_5_interleaved", tokenizer, add_generation_prompt=True
    ).text
    assert "user\nA<image>B<|im_end|>" in text


def test_strided_frames():
    def frames(total, wanted):
        return choose({"type": "strided", "frames": wanted}, total=total, average_rate=1, timestamps=range(total))

    assert len(frames(100, 16)) == 17
    assert frames(5, 16) == [0, 1, 2, 3, 4]
    assert frames(7, 2) == [0, 3, 6]
