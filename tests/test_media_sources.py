"""Where media come from, in Python and on the command line: URLs, open files, arrays; and what never gets out."""

import base64
import io
import pickle
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network

import numpy as np
import pytest
from PIL import Image
from test_media import RED, png_header, refused, write_video

from llavakit.media import Limits, image_size, load_image, load_video, load_volume
from llavakit.media.image import to_8_bit
from llavakit.media.source import Attached, fetched


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 48), RED).save(path)
    return path


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def same(image):
    return (image.mode, image.size, image.getpixel((5, 5))) == ("RGB", (64, 48), RED)


def test_one_picture_from_everywhere(png):
    content = png.read_bytes()
    array = np.asarray(Image.open(png))
    with png.open("rb") as file:
        assert same(load_image(file))
    for source in (
        data_url(content),
        png.as_uri(),
        io.BytesIO(content),
        bytearray(content),
        memoryview(content),
        Attached(content, "x"),
        array,
        array.astype(np.float32) / 255,
        array.transpose(2, 0, 1),
        np.dstack([array, np.full((48, 64), 255, np.uint8)]),
        Image.open(png),
    ):
        assert same(load_image(source)), source
    assert image_size(io.BytesIO(content)) == image_size(data_url(content)) == image_size(array) == (1, 48, 64)


def test_videos_and_volumes_from_everywhere(tmp_path):
    path = write_video(tmp_path / "a.mp4", count=4)
    frames = load_video(path, {"type": "all"}).frames
    with path.open("rb") as file:
        assert load_video(file, {"type": "all"}).frames == frames
    assert load_video(data_url(path.read_bytes(), "video/mp4"), {"type": "all"}).frames == frames
    assert load_video(np.stack([np.asarray(frame) for frame in frames])).frames == frames
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", values)
    content = (tmp_path / "a.npy").read_bytes()
    for source in (values, content, io.BytesIO(content), data_url(content, "application/octet-stream")):
        assert np.array_equal(load_volume(source).values, values)


@pytest.fixture(scope="module")
def processor():
    import tiny

    from llavakit.model.processing import LlavakitProcessor
    from llavakit.phantom.tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer(["What is in this picture?"], vocab_size=600)
    return LlavakitProcessor.from_config(tiny.config(), tokenizer)


def test_every_source_in_messages(processor, png):
    """As content parts in both spellings, twice each as a conversation reads them, and for the size alone."""
    url = data_url(png.read_bytes())
    parts = [
        {"type": "image", "image": np.asarray(Image.open(png))},
        {"type": "image", "image": io.BytesIO(png.read_bytes())},
        {"type": "image", "image": url},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": url},
        {"type": "image", "path": str(png)},
    ]
    expected = processor.encode([{"role": "user", "content": [{"type": "image", "image": str(png)}]}])
    for part in parts:
        for pixels in (True, True, False):
            found = processor.encode([{"role": "user", "content": [part]}], pixels=pixels)
            assert found["input_ids"] == expected["input_ids"]
            assert found["visual_sizes"] == expected["visual_sizes"]
            if pixels:
                assert all(map(np.array_equal, found["pixel_values"], expected["pixel_values"]))


def test_parts_that_name_nothing(processor):
    for part in ({"type": "image"}, {"type": "image", "image": None}, {"type": "image", "text": "x"}):
        for pixels in (True, False):
            messages = [{"role": "user", "content": [part]}]
            refused(lambda m=messages, p=pixels: processor.encode(m, pixels=p), "names no image", '"image": ...')


def test_refused_sources(png, tmp_path):
    with png.open("rb") as file:
        assert same(load_image(file))
        assert same(load_image(file))
        file.read()
        refused(lambda: load_image(file), "a.png", "seek to its beginning")
    (tmp_path / "a.txt").write_text("hello")
    with (tmp_path / "a.txt").open() as file:
        refused(lambda: load_image(file), "open as text", "'rb'")
    refused(lambda: load_image(io.BytesIO(png.read_bytes()), limits=Limits(file_bytes=50)), "the limit is 50")
    refused(lambda: load_image(data_url(b"0" * 100), limits=Limits(file_bytes=50)), "larger than 50 bytes")
    refused(lambda: load_image(np.zeros((7, 5, 6))), "shape (7, 5, 6)", "1, 3 or 4 channels")
    refused(lambda: load_image(np.zeros((4, 5), complex)), "complex")
    refused(lambda: load_image(np.zeros((0, 5), np.uint8)), "5 x 0")
    refused(lambda: load_image(np.array([["a"]])), "real numbers")
    refused(lambda: load_image(object()), "<object>", "is no file")
    refused(lambda: load_image("file:///no/such.png"), "no such file")
    refused(lambda: load_image("/dev/null"), "is a device or pipe")
    refused(lambda: load_image({"url": "x"}), "<dict>", "is no file")


def test_arrays_of_all_types():
    line = np.arange(256)
    for dtype, values, expected in (
        (np.uint8, line, line),
        (bool, line > 100, (line > 100) * 255),
        (np.uint16, line * 257, line),
        (np.int32, line * 16, np.rint(line * 16 * 255 / 4095)),
        (np.float64, line / 255, line),
        (np.float16, line, line),
    ):
        found = np.asarray(load_image(values.astype(dtype)[None]))[0, :, 0]
        assert np.array_equal(found, expected), dtype
    large = np.random.default_rng(0).integers(0, 60000, (1500, 1000)).astype(np.uint16)
    scaled = np.rint(large.astype(np.float64) * (255 / 65535)).astype(np.uint8)  # converted in bands
    assert np.array_equal(to_8_bit(large), scaled)
    assert np.array_equal(np.asarray(load_image(large))[..., 1], scaled)


def test_attached_content_crosses_processes():
    content = pickle.loads(pickle.dumps(Attached(b"12", "messages.0")))
    assert (content, content.name) == (b"12", "messages.0")


def test_heic_has_its_own_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brand in (b"heic", b"mif1"):
        content = b"\0\0\0\x18ftyp" + brand + bytes(16)
        for call in (load_image, image_size):
            refused(lambda call=call, content=content: call(content), "HEIC", "pip install 'llavakit[heic]'", "JPEG")


def test_heic_is_read_with_its_extra(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), RED)).save(tmp_path / "a.heic", quality=90)
    found = load_image(tmp_path / "a.heic").getpixel((5, 5))
    assert max(abs(a - b) for a, b in zip(found, RED, strict=True)) <= 3
    assert image_size(tmp_path / "a.heic") == (1, 48, 64)


# Sizes


def chunks(content):
    position = 8
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "big") + 12
        yield content[position : position + length]
        position += length


def test_the_size_never_takes_decoding(tmp_path, monkeypatch):
    """EXIF behind the pixels of a PNG counts, and damaged pixels do not matter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", exif=exif)
    parts = list(chunks((tmp_path / "a.png").read_bytes()))
    late = sorted(parts, key=lambda part: (part[4:8] == b"eXIf") + 2 * (part[4:8] == b"IEND"))
    late = b"\x89PNG\r\n\x1a\n" + b"".join(late)
    assert late.index(b"eXIf") > late.index(b"IDAT")
    assert load_image(late).size == (48, 64)
    assert image_size(late) == (1, 64, 48)
    assert image_size(late, exif_transpose=False) == (1, 48, 64)
    damaged = bytearray(late)
    damaged[late.index(b"IDAT") + 100 : late.index(b"IDAT") + 140] = bytes(40)
    refused(lambda: load_image(bytes(damaged)), "damaged")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    for source in (bytes(damaged), late[: late.index(b"IDAT") + 200], png_header(3000, 20)):
        assert image_size(source)[1:] in ((64, 48), (48, 64), (20, 3000))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_picture_agree_about_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (20, 10), RED).save(tmp_path / f"a.{suffix}", exif=exif)
    for upright in (True, False):
        image = load_image(tmp_path / f"a.{suffix}", exif_transpose=upright)
        assert image_size(tmp_path / f"a.{suffix}", exif_transpose=upright) == (1, image.height, image.width)
    assert load_image(tmp_path / f"a.{suffix}").size == ((10, 20) if orientation > 4 else (20, 10))


def test_frames_and_pages_by_number(tmp_path):
    pages = [Image.new("RGB", (8 + page, 6), (page * 9, 0, 0)) for page in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    for page in range(3):
        image = load_image(tmp_path / "a.tif", frame=page)
        assert (image.size, image.getpixel((0, 0))[0]) == ((8 + page, 6), page * 9)
        assert image_size(tmp_path / "a.tif", frame=page) == (1, 6, 8 + page)
    refused(lambda: load_image(tmp_path / "a.tif", frame=3), "no frame 3", "holds 3")
    refused(lambda: image_size(tmp_path / "a.tif", frame="1"), "frame", "whole number")


def test_decoders_that_need_more_memory_take_smaller_pictures(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.webp")
    Image.new("RGB", (100, 100)).save(tmp_path / "a.jpg", progressive=True)
    Image.new("RGB", (100, 100)).save(tmp_path / "b.jpg")
    limits = Limits(pixels=10_000)
    for name, kind in (("a.webp", "WEBP"), ("a.jpg", "progressive JPEG")):
        refused(lambda name=name: load_image(tmp_path / name, limits=limits), kind, "bytes per pixel", "convert it")
        refused(lambda name=name: image_size(tmp_path / name, limits=limits), kind)
    assert load_image(tmp_path / "b.jpg", limits=limits).size == (100, 100)


def test_transparency_and_grey_in_bands(tmp_path):
    """Pictures of more than one band come out as they did in one piece."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (1100, 1200, 4), dtype=np.uint8))
    rgba.save(tmp_path / "a.png", compress_level=0)
    canvas = Image.new("RGB", rgba.size, (255, 255, 255))
    canvas.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    assert load_image(tmp_path / "a.png") == canvas
    grey = rng.integers(0, 4096, (1100, 1200)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "g.png", compress_level=0)
    assert np.array_equal(np.asarray(load_image(tmp_path / "g.png"))[..., 0], to_8_bit(grey))


# The net


class Pictures(BaseHTTPRequestHandler):
    content, asked = b"", 0

    def do_GET(self):
        type(self).asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(png, monkeypatch):
    """A picture on loopback, which the default policy of this test allows."""
    pytest.importorskip("httpcore")
    from llavakit.media import fetch

    Pictures.content, Pictures.asked = png.read_bytes(), 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fetch, "DEFAULT", fetch.MediaPolicy(networks=(ip_network("127.0.0.0/8"),)))
    yield f"http://127.0.0.1:{server.server_port}/a.png"
    server.shutdown()


def test_urls_are_fetched_under_the_media_policy(served, monkeypatch):
    assert same(load_image(served))
    assert image_size(served) == (1, 48, 64)
    content = fetched(served)
    assert content.name == served
    asked = Pictures.asked
    assert same(load_image(content))
    assert Pictures.asked == asked
    monkeypatch.undo()
    refused(lambda: load_image(served), served, "not a public address")
    refused(lambda: load_video(served), "not a public address")
    refused(lambda: load_volume(served), "not a public address")


def test_urls_inside_a_running_event_loop(served):
    import asyncio

    async def read():
        return load_image(served)

    assert same(asyncio.run(read()))


def test_the_package_that_fetches_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpcore", None)
    monkeypatch.delitem(sys.modules, "llavakit.media.fetch", raising=False)
    refused(lambda: load_image("http://example.org/a.png"), "httpcore", "pip install 'llavakit[serve]'")


def test_attachments_of_the_command_line(served, png):
    from llavakit.cli.terminal import attachment

    part = attachment("image", served)
    asked = Pictures.asked
    assert same(load_image(part["image"]))
    assert same(load_image(part["image"]))  # every turn of a conversation reads it again
    assert Pictures.asked == asked == 1
    assert same(load_image(attachment("image", data_url(png.read_bytes()))["image"]))
    assert attachment("image", str(png)) == {"type": "image", "image": str(png)}
    refused(lambda: attachment("image", "no.png"), "no.png: no such image file")


def test_broken_data_urls_are_one_line():
    bad = "data:image/png;base64," + base64.b64encode(zlib.compress(b"x" * 10_000)).decode()
    message = refused(lambda: load_image(bad), "data:image/png", "is not an image")
    assert len(message) < 300
