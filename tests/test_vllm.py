"""Greedy replies of vLLM and of llavakit's own engine; `make test-vllm` makes the environment.

LLaVA-1.5 and LLaVA-OneVision run in vLLM's own classes after `--to hf`, LLaVA-UHD in its Transformers back end by
llavakit's plugin. Every engine is a process of its own that takes most of a minute to start.
"""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
from PIL import Image

import llavakit
from llavakit import LlavakitConfig, LlavakitForConditionalGeneration, LlavakitProcessor
from llavakit.checkpoints.convert import convert, save
from llavakit.checkpoints.prompts import VLLM_TEMPLATE
from llavakit.errors import UserError
from llavakit.serving.vllm_plugin import check
from llavakit.systems.llava_onevision.checkpoint import media_of

pytestmark = pytest.mark.vllm
vllm = pytest.importorskip("vllm")

GOLDEN = Path(__file__).parent / "golden"
SENTENCEPIECE = GOLDEN / "llava-1.5" / "tokenizer-sp" / "tokenizer_nonlegacy.json"
QWEN = GOLDEN / "llava-onevision" / "preprocess" / "tokenizer.json"
SIDE, PATCH, NEW = 56, 14, 8
# Where there is a torchvision, transformers resizes with it, which differs from Pillow by a grey level.
PILLOW = {"use_fast": False}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "DO_NOT_TRACK": "1"}
SIZES = [(40, 70), (150, 90), (56, 56), (300, 40), (330, 290)]  # width and height of the images that are asked about

WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}  # kernels want heads of 32 channels
TEXT = {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048, **WIDTHS}
VISION = {"num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH, **WIDTHS}


def tokenizer_of(file: Path, **specials: str):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(file), **specials)


def vicuna():
    return tokenizer_of(SENTENCEPIECE, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")


def write(folder: Path, tokenizer, *, rows: int = 0, **fields) -> Path:
    """A tiny random checkpoint in llavakit's layout, with weights large enough that mistakes change its replies."""
    torch.manual_seed(0)
    text = TEXT | {"vocab_size": rows or len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    fields["text_config"] = text | fields.get("text_config", {"model_type": "llama"})
    fields.setdefault("vision_config", {"model_type": "clip_vision_model", "projection_dim": 16, **VISION})
    fields.setdefault("media", {"image": {"views": {"type": "pad", "size": SIDE}, "arrange": {"type": "flat"}}})
    fields.setdefault("image_token_id", len(tokenizer))
    config = LlavakitConfig(**({"template": "v1"} | fields))
    model = LlavakitForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    save(model.state_dict(), config, LlavakitProcessor.from_config(config, tokenizer), folder)
    return folder


def write_uhd(folder: Path) -> Path:
    views = {"type": "native_slices", "size": SIDE, "patch": PATCH, "max_slices": 6}
    schema = {"type": "spatial_schema", "column_separator": 11, "row_separator": 13}
    return write(
        folder,
        vicuna(),
        connector={"type": "spatial_resampler", "queries": 4, "heads": 2},
        media={"image": {"views": views, "arrange": schema}},
        system="llava-uhd",
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def conversations() -> list[list[dict]]:
    """OpenAI-style messages: one image each, then one without."""
    question = {"type": "text", "text": "What is this?"}
    asked = [
        [{"type": "image_url", "image_url": {"url": data_url(picture(*size, seed))}}, question]
        for seed, size in enumerate(SIZES)
    ]
    return [[{"role": "user", "content": parts}] for parts in [*asked, [question]]]


def native(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Prompt and greedy reply by llavakit's own engine."""
    chat = llavakit.load(folder)
    requests = []
    for number, messages in enumerate(conversations()):
        parts = list(messages[0]["content"])
        if number < len(SIZES):
            parts[0] = {"type": "image", "image": picture(*SIZES[number], number)}
        requests.append(chat.request([{"role": "user", "content": parts}], max_new_tokens=NEW, temperature=0.0))
    handles = [chat.engine.submit(request) for request in requests]
    return [
        (request.input_ids.tolist(), list(handle.result().token_ids))
        for request, handle in zip(requests, handles, strict=True)
    ]


def in_vllm(folder: Path, monkeypatch, **options) -> list[tuple[list[int], list[int]]]:
    """The same by vLLM's chat, which renders the checkpoint's own template."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    engine = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=2048, max_num_seqs=4, **options)
    settings = vllm.SamplingParams(temperature=0, max_tokens=NEW)
    template = folder / VLLM_TEMPLATE  # what `llavakit serve --engine vllm` names
    template = template.read_text() if template.is_file() else None
    answers = engine.chat(conversations(), settings, use_tqdm=False, chat_template=template)
    engine.llm_engine.engine_core.shutdown()
    return [(list(answer.prompt_token_ids), list(answer.outputs[0].token_ids)) for answer in answers]


def test_llava_1_5_in_vllms_own_class(tmp_path, monkeypatch):
    tokenizer = vicuna()
    write(tmp_path / "own", tokenizer, connector={"type": "mlp", "depth": 2}, system="llava-1.5")
    convert(tmp_path / "own", tmp_path / "hf", to="hf")
    assert check(tmp_path / "hf") == []
    assert in_vllm(tmp_path / "hf", monkeypatch, mm_processor_kwargs=PILLOW) == native(tmp_path / "own")


def test_onevision_in_vllms_own_class(tmp_path, monkeypatch):
    tokenizer = tokenizer_of(QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    published = {
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
    }
    write(
        tmp_path / "own",
        tokenizer,
        rows=len(tokenizer) + 2,
        connector={"type": "mlp", "depth": 2},
        text_config={"model_type": "qwen2"},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        media=media_of(published, SIDE, rounding="hf"),
        template="qwen_1_5",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        system="llava-onevision",
    )
    convert(tmp_path / "own", tmp_path / "hf", to="hf")
    assert in_vllm(tmp_path / "hf", monkeypatch, mm_processor_kwargs=PILLOW) == native(tmp_path / "own")


def test_uhd_in_the_transformers_back_end(tmp_path, monkeypatch):
    folder = write_uhd(tmp_path / "uhd")
    wanted = native(folder)
    assert len({len(prompt) for prompt, _ in wanted}) > 2  # images of several numbers of slices
    assert in_vllm(folder, monkeypatch) == wanted


def refused(tmp_path: Path, system: str) -> tuple[Path, str]:
    """A checkpoint that vLLM cannot run, and what it says of it."""
    if system == "llava-mini":
        parts = {"connector": {"type": "compressor_prefusion", "compressor_size": 1, "prefusion_layer_num": 1}}
        reason = "connector 'compressor_prefusion' reads the prompt"
    else:
        parts = {"language_adapter": {"type": "dynamic_sparsification", "sparse_layer": 1, "d_model": 16, "nhead": 2}}
        reason = "language adapter 'dynamic_sparsification' runs the decoder in its own way"
    return write(tmp_path / system, vicuna(), system=system, **parts), reason


@pytest.mark.parametrize("system", ["llava-mini", "dynamic-llava"])
def test_what_the_back_end_cannot_express_is_refused(tmp_path, system):
    folder, reason = refused(tmp_path, system)
    for command in (["llavakit", "serve", str(folder), "--engine", "vllm"], ["vllm", "serve", str(folder)]):
        command[0] = str(Path(sys.executable).with_name(command[0]))
        told = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert told.returncode != 0
        line = told.stderr.strip().splitlines()[-1]
        assert reason in line
        assert line.endswith("serve it with llavakit serve --engine native")


def test_layouts_that_vllm_does_not_read_are_answered_with_the_command_that_converts_them(tmp_path):
    own = write(tmp_path / "own", vicuna(), connector={"type": "mlp", "depth": 2}, system="llava-1.5")
    assert f"llavakit convert {own} NEW --to hf" in check(own)[0]
    convert(own, tmp_path / "hf", to="hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps(raw | {"model_type": "llava_onevision", "vision_aspect_ratio": "anyres_max_4"})
    )
    with pytest.raises(UserError, match=r"anyres_max_9.*llavakit convert .*hf NEW --to llavakit"):
        check(tmp_path / "hf")
    convert(own, tmp_path / "classic", to="original")
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    raw = json.loads((own / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(raw["vision_config"]))
    written = tmp_path / "classic" / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"mm_vision_tower": str(encoder)}))
    with pytest.raises(UserError, match=f"llavakit convert {tmp_path / 'classic'} NEW --to hf"):
        check(tmp_path / "classic")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(folder: Path, *arguments: str):
    """`llavakit serve FOLDER --engine vllm` as a process; gives its address once it answers."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "llavakit", "serve", str(folder), "--engine", "vllm", "--port", str(port)]
    command += ["--dtype", "float32", "--extra=--enforce-eager", "--extra=--max-model-len=2048", *arguments]
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (URLError, OSError):
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def post(address: str, body: dict, key: str) -> dict:
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_serve_with_vllm_answers_about_an_image(tmp_path):
    folder = write_uhd(tmp_path / "uhd")
    with served(folder, "--api-key", "secret", "--no-fetch") as address:
        for messages, (prompt, reply) in zip(conversations(), native(folder), strict=True):
            body = {"model": "uhd", "messages": messages, "max_tokens": NEW, "return_token_ids": True}
            answer = post(address, body, "secret")
            assert (answer["prompt_token_ids"], answer["choices"][0]["token_ids"]) == (prompt, reply)
        with pytest.raises(HTTPError, match="401"):
            post(address, {"model": "uhd", "messages": conversations()[-1]}, "wrong")
        elsewhere = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}]
        with pytest.raises(HTTPError, match="40"):
            post(address, {"model": "uhd", "messages": [{"role": "user", "content": elsewhere}]}, "secret")
