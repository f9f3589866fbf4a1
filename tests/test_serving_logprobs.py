"""Log probabilities: the bytes of all tokens give the text of the reply, whatever the tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
from tiny_server import Running, ask, small_chat

from llavakit.generation import Engine
from llavakit.generation.request import TokenLogprob
from llavakit.serving.app import Settings
from llavakit.serving.logprobs import Spelling, TokenLog

TEXTS = [
    "What is in this picture? A red square and a blue disc.",
    "größer und 日本語 \U0001f600, two  blanks\nand lines",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return tokenizer


def sentencepiece(decoder):
    vocab = {
        piece: number for number, piece in enumerate(["<unk>", *BYTES, "▁", *"abcdehinoprstuqWA?.,▁", "▁re", "▁d"])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if decoder == "sequence":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return tokenizer


def wordpiece():
    """A decoder that is not spelled from its pieces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"]))
    return tokenizer


KINDS = {
    "byte level": (byte_level, True),
    "sentencepiece": (lambda: sentencepiece("sequence"), True),
    "metaspace": (lambda: sentencepiece("metaspace"), None),
    "wordpiece": (wordpiece, False),
}


@pytest.fixture(params=KINDS)
def spelling(request):
    make, exact = KINDS[request.param]
    fast = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token=AddedToken("</s>", special=True))
    found = Spelling(fast)
    assert exact is None or found.exact is exact
    return found


def entries(ids):
    return [TokenLogprob(token, -0.5, ((token, -0.5), (ids[0], -2.0))) for token in ids]


@pytest.mark.parametrize("text", TEXTS)
def test_joined_bytes_give_the_text(spelling, text):
    ids = spelling.tokenizer(text, add_special_tokens=False)["input_ids"] + [spelling.tokenizer.eos_token_id]
    whole = spelling.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    log = TokenLog(spelling, trimmed=False)
    log.push(entries(ids))
    found = log.release(whole, last=True)
    assert bytes(byte for entry in found for byte in entry["bytes"]).decode() == whole
    assert len(found) == len(ids)
    assert found[-1]["token"] == "</s>"
    assert all(len(entry["top_logprobs"]) == 2 for entry in found)
    if spelling.exact:
        assert [entry["bytes"] for entry in found] == [entry["top_logprobs"][0]["bytes"] for entry in found]


def test_parts_of_a_character_have_their_own_bytes():
    spelling = Spelling(PreTrainedTokenizerFast(tokenizer_object=sentencepiece("sequence")))
    ids = spelling.tokenizer("a 日", add_special_tokens=False)["input_ids"]
    log = TokenLog(spelling)
    log.push(entries(ids))
    found = log.release("a 日", last=True)
    assert [bytes(entry["bytes"]) for entry in found] == [b"", b"a", b" ", b"\xe6", b"\x97", b"\xa5"]


def test_what_is_cut_from_a_reply_has_no_bytes(spelling):
    """White space at both ends, and a stop string; the entries stay."""
    if not spelling.exact:
        pytest.skip("needs blanks")
    ids = spelling.tokenizer("  a red disc. ", add_special_tokens=False)["input_ids"]
    log = TokenLog(spelling)
    streamed = []
    for number, entry in enumerate(entries(ids)):
        log.push([entry])
        streamed += log.release("a red" if number == len(ids) - 2 else "")
    streamed += log.release("", last=True)
    assert bytes(byte for entry in streamed for byte in entry["bytes"]) == b"a red"
    assert len(streamed) == len(ids)


@pytest.fixture(scope="module")
def running():
    """A server whose model speaks in whole characters, as one that was trained does."""
    chat = small_chat()
    spelling = Spelling(chat.processor.tokenizer)
    parts = [token for token in range(len(chat.processor.tokenizer)) if not _decodes(spelling.bytes_of(token, False))]
    chat.model.generation_config.suppress_tokens = parts
    chat.engine = Engine(chat.model, chat.processor.tokenizer, max_batch=8)
    started = Running(chat, Settings(names=("tiny",)))
    yield started
    started.stop()


def _decodes(content):
    try:
        return content.decode().isprintable() or not content.strip()
    except UnicodeDecodeError:
        return False


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("options", [{}, {"tools": [TOOL]}, {"stop": "e"}, {"n": 2, "seed": 1, "temperature": 1.0}])
def test_streamed_or_whole_the_entries_are_the_same(running, options):
    client = running.client()
    for question in ("blue", "A red square", "What is in this picture?", "and a disc"):
        body = {"model": "tiny", "messages": ask(question), "max_tokens": 16, "logprobs": True, "top_logprobs": 2}
        body |= options
        whole = client.chat.completions.create(**body)
        streamed = {choice.index: [] for choice in whole.choices}
        for chunk in client.chat.completions.create(**body, stream=True):
            for choice in chunk.choices:
                if choice.logprobs is not None:
                    streamed[choice.index] += choice.logprobs.content
        tokens = 0
        for choice in whole.choices:
            content, other = choice.logprobs.content, streamed[choice.index]
            assert [(entry.token, entry.bytes) for entry in content] == [(entry.token, entry.bytes) for entry in other]
            assert [entry.logprob for entry in content] == pytest.approx([entry.logprob for entry in other], abs=1e-3)
            tokens += len(content)
            joined = bytes(byte for entry in content for byte in entry.bytes)
            assert joined.decode() == choice.message.content
        assert tokens == whole.usage.completion_tokens
