"""Memory for media: counted by decoded size before anything is decoded, for a request and for the server."""

from __future__ import annotations

import io
import pickle
import time

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
import httpx
from PIL import Image
from tiny_server import Running, ask, data_url, png, small_chat

from llavakit.media import load_image, load_volume
from llavakit.media.policy import Refused
from llavakit.media.source import Limits
from llavakit.serving.app import Settings
from llavakit.serving.memory import Account, MemoryBudget, MemoryPolicy, claim


class Stop(Exception):
    """Nothing may be decoded after this."""


def npy(shape, dtype):
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype))
    return file.getvalue()


def nifti(shape, dtype):
    import nibabel

    return nibabel.Nifti1Image(np.zeros(shape, dtype), np.eye(4)).to_bytes()


def picture(mode, kind, size=(50, 40)):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


MEDIA = {
    "png": (load_image, lambda: picture("RGB", "PNG"), 50 * 40 * 4),
    "16-bit png": (load_image, lambda: picture("I;16", "PNG"), 50 * 40 * 4),
    "jpeg": (load_image, lambda: picture("L", "JPEG"), 50 * 40 * 4),
    "webp": (load_image, lambda: picture("RGBA", "WEBP"), 50 * 40 * 4),
    "npy": (load_volume, lambda: npy((3, 4, 5), np.uint8), 3 * 4 * 5 * 4),
    "nifti": (load_volume, lambda: nifti((3, 4, 5), np.int16), 3 * 4 * 5 * 4),
}


@pytest.mark.parametrize("kind", MEDIA)
def test_every_reader_claims_before_it_decodes(kind, monkeypatch):
    if kind == "nifti":
        pytest.importorskip("nibabel")
    load, make, size = MEDIA[kind]
    claimed, content = [], make()
    load(content, limits=Limits(claim=lambda name, bytes: claimed.append(bytes)))
    assert claimed == [size]

    def refuse(name, size):
        raise Refused("no", 413)

    monkeypatch.setattr(Image.Image, "load", lambda *args: pytest.fail("decoded"))
    monkeypatch.setattr(np, "empty", lambda *args, **options: pytest.fail("allocated"))
    with pytest.raises(Refused):
        load(content, limits=Limits(claim=refuse))


def test_videos_claim_their_frames(tmp_path):
    av = pytest.importorskip("av")
    from llavakit.media import load_video

    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = 48, 32
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8))))
        container.mux(stream.encode())
    claimed = []
    load_video(path, {"type": "uniform", "frames": 4}, limits=Limits(claim=lambda name, size: claimed.append(size)))
    assert claimed == [4 * 48 * 32 * 4]


def test_limits_cross_processes():
    assert pickle.loads(pickle.dumps(Limits())) == Limits()


def test_an_account():
    budget = MemoryBudget(MemoryPolicy(request_bytes=100, total_bytes=150))
    first, second = Account(budget), Account(budget)
    with first.counting():
        claim("a", 60)
        first.keep(0)
        claim("b", 40)
        with pytest.raises(
            Refused, match="may take 100 bytes when they are decoded; with this one they take 101"
        ) as big:
            claim("c", 1)
        assert big.value.status == 413
        first.keep(10)
    assert budget.held == 10
    claim("nobody's", 10**12)
    with second.counting():
        claim("a", 100)
        with first.counting(), pytest.raises(Refused):
            claim("d", 1)
    third = Account(budget)
    with third.counting(), pytest.raises(Refused, match="try again") as full:
        claim("a", 41)
    assert full.value.status == 503
    for account in (first, second, third):
        account.close()
        account.close()
    assert budget.held == 0


@pytest.fixture(scope="module")
def running():
    memory = MemoryPolicy(request_bytes=40_000, total_bytes=60_000)
    started = Running(small_chat(), Settings(names=("tiny",), memory=memory, default_tokens=2))
    yield started
    started.stop()


def post(running, *pictures, **fields):
    messages = [message for content in pictures for message in ask(url=data_url(content))]
    body = {"model": "tiny", "messages": messages, **fields}
    return httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=30)


def test_a_request_is_refused_by_the_decoded_size_of_its_media(running):
    small, large = png(size=(50, 40)), png(size=(150, 100))
    budget = running.app.state.service.memory
    assert post(running, *[small] * 4).status_code == 200
    assert budget.held == 0
    for pictures in ([large], [small] * 6):
        refused = post(running, *pictures)
        assert refused.status_code == 413
        assert "40,000 bytes when they are decoded" in refused.json()["error"]["message"]
        assert budget.held == 0


def test_the_server_refuses_what_it_has_no_room_for(running):
    budget = running.app.state.service.memory
    budget.take(55_000)
    try:
        refused = post(running, png(size=(50, 40)))
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
    finally:
        budget.give(55_000)
    assert post(running, png(size=(50, 40))).status_code == 200


def test_views_count_until_the_request_ends(running, monkeypatch):
    service = running.app.state.service
    step = service.responder.engine.step
    monkeypatch.setattr(service.responder.engine, "step", lambda: (time.sleep(0.05), step())[1])
    message = {"role": "user", "content": [{"type": "image", "image": png()}]}
    views = service.responder.processor.encode([message])["pixel_values"]
    body = {"model": "tiny", "messages": ask(url=data_url(png())), "stream": True, "max_tokens": 300, "stop": "§§"}
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()  # whose end would close the connection
        next(lines)
        assert 0 < service.memory.held == sum(view.nbytes for view in views)
    deadline = time.time() + 10
    while service.active and time.time() < deadline:
        time.sleep(0.02)
    assert service.memory.held == 0
