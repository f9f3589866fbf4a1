"""The one JSON reader: what is not meant is one line."""

from __future__ import annotations

import pytest

from llavakit.data.strict_json import MAX_DEPTH, JsonError, parse_json, read_json
from llavakit.errors import CheckpointError, quoted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"x": {"a": 1, "b": 3, "a": 2}}', "the key 'a' twice"),
        ('{"a": NaN}', "holds NaN"),
        ("[-Infinity]", "holds -Infinity"),
        ("[1e999]", "1e999, which is too large"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 99 + "]" * 99, "nested too deeply"),
        ('{"a":' * 99 + "1" + "}" * 99, "nested too deeply"),
        ("[" + "9" * 10_000 + "]", "integer of thousands of digits"),
        (b'{"a": "\xff"}', "not UTF-8 text (byte 7 is 0xff)"),
        (b"\x00\x01", "not valid JSON"),
        ('["\\ud800"]', "half a surrogate pair"),
        ('{"\\uDFFFkey": 1}', "half a surrogate pair"),
        ("", "not valid JSON"),
        ("[1] [2]", "not valid JSON (Extra data"),
    ],
)
def test_what_no_writer_means_is_one_line(text, said):
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_is_valid_is_read_as_it_is():
    assert parse_json('\ufeff{"a": [1, 2.5, null, true, "\\ud83d\\ude00 \\\\ud800"]}') == {
        "a": [1, 2.5, None, True, "\U0001f600 \\ud800"]
    }
    assert parse_json(b"\xef\xbb\xbf[1000000000000000019884624838656]") == [int(1e30)]
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json('{"a": 1, "a": NaN}', unique=False, finite=False)["a"] != 0


def test_files_are_named_and_have_the_wanted_type(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"x\.json: holds a list, it should hold one object"):
        read_json(path, kind=dict, error=CheckpointError)
    with pytest.raises(CheckpointError, match=r"x\.json: has 3 bytes, at most 2 are read"):
        read_json(path, error=CheckpointError, max_bytes=2)
    with pytest.raises(CheckpointError, match="is not a file"):
        read_json(tmp_path, error=CheckpointError)
    with pytest.raises(CheckpointError, match="no such file"):
        read_json(tmp_path / "y.json", error=CheckpointError)
    assert read_json(path, kind=list) == [1]


def test_echoed_values_are_cut():
    assert quoted("a") == "'a'"
    assert len(quoted("a" * 1000)) == 200
    assert quoted(10**5000) == "<int>"
