"""Stand-ins for files: pictures, clips, volumes, records, questions, answers."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from things import lines, thing

ANSWERS = ("red", "green", "blue")


def png(number: int, size: tuple[int, int] = (48, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (40 * number % 256, (200 - 30 * number) % 256, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(number: int) -> str:
    return "data:image/png;base64," + base64.b64encode(png(number)).decode()


@thing("photo.jpg", "chart.png", "bridge.jpg", "street.jpg", "scene.png", "kite.jpg", "before.jpg", "after.jpg")
@thing("ct.png", "kitchen.png", "film.png", "scan.png")
def picture(path: Path) -> None:
    from llavakit.phantom.write import build_world

    item = build_world("scene", size=96).sample(seed=0, index=len(path.name)).items[0]
    Image.fromarray(item.media[0]).convert("RGB").save(path)


@thing("clip.mp4")
def clip(path: Path) -> None:
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 48
        stream.pix_fmt = "yuv420p"
        for number in range(16):
            pixels = np.full((48, 48, 3), 10 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


@thing("scan.nii.gz")
def volume(path: Path) -> None:
    import nibabel

    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    nibabel.save(
        nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(32, 32, 16)).astype(np.float32), affine), path
    )


@thing("study.dcm", "film.dcm")
def dicom(path: Path) -> None:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = generate_uid(), ExplicitVRLittleEndian
    found = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    found.SOPClassUID, found.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    found.Modality, found.Rows, found.Columns, found.SamplesPerPixel = "CR", 32, 32, 1
    found.BitsAllocated = found.BitsStored = 16
    found.HighBit, found.PixelRepresentation, found.PhotometricInterpretation = 15, 0, "MONOCHROME2"
    found.PixelData = np.arange(32 * 32, dtype=np.uint16).tobytes()
    found.save_as(path)


@thing("pictures", "photos", "val2014", "images", "docs/data.md#photos", "mm-vet", "MIMIC-CXR-JPG")
def pictures(path: Path) -> None:
    path.mkdir()
    for number in range(95 if path.name == "photos" else 8):
        if number != 90:
            (path / f"{number}.png").write_bytes(png(number))


def record(number: int, image: str) -> dict[str, object]:
    turns = [("human", "<image>\nWhat colour is it?"), ("gpt", ANSWERS[number % 3])]
    return {"id": str(number), "image": image, "conversations": [{"from": who, "value": text} for who, text in turns]}


@thing("mine.json", "asked.json", "mix665k.json", "mix.json")
def own_records(path: Path) -> None:
    """Records whose pictures lie in a folder that the page names."""
    path.write_text(json.dumps([record(number, f"{number}.png") for number in range(6)]))


@thing("my.json")
def records_with_pictures(path: Path) -> None:
    path.write_text(json.dumps([record(number, data_url(number)) for number in range(6)]))


@thing("docs/data.md#own.jsonl")
def broken_records(path: Path) -> None:
    """A hundred records of which the page shows what is wrong with two."""
    rows = [record(number, f"{number % 80}.png") for number in range(1, 95)]
    rows[16]["conversations"][1]["value"] = ""
    rows[89]["image"] = "90.png"
    lines(path, *rows)


@thing(".venv/bin/activate")
def activate(path: Path) -> None:
    path.write_text("")


IDS = range(1, 7)


@thing("answers.jsonl", "predictions.jsonl", "ours.jsonl", "theirs.jsonl", "reports.jsonl", "mine.jsonl")
@thing("a.jsonl", "b.jsonl", "c.jsonl")
def answers(path: Path) -> None:
    """Answers to `questions`; theirs are other ones."""
    first = path.name not in ("theirs.jsonl", "b.jsonl")
    texts = ("A", "The heart is enlarged.") if first else ("B", "No effusion is seen.")
    lines(path, *({"question_id": n, "text": texts[n % 2], "report_id": str(n)} for n in IDS))


@thing("gold.jsonl", "scienceqa_gold.jsonl", "people.jsonl")
def gold(path: Path) -> None:
    """What is right, for benchmarks that want different fields."""
    reports = ("The heart is large.", "There is no effusion.")
    common = {"has_image": False, "answers": ["A"], "type": "colour", "text": reports[0]}
    lines(path, *({"question_id": n, "answer": "AB"[n % 2], **common, "reference": reports[n % 2]} for n in IDS))


@thing("references.jsonl")
def references(path: Path) -> None:
    lines(path, *({"question_id": n, "reference": "The heart is large, no effusion."} for n in IDS))


@thing("docs/evaluation.md#gold.csv")
def gold_csv(path: Path) -> None:
    rows = [f'{number},"The heart is large, no effusion."' for number in IDS]
    path.write_text("\n".join(["question_id,reference", *rows]) + "\n")


@thing("coco_pope_random.json")
def pope(path: Path) -> None:
    asked = "Is there a disc in the image?"
    lines(path, *({"question_id": n, "image": f"{n}.png", "text": asked, "label": ("yes", "no")[n % 2]} for n in IDS))


@thing("questions.jsonl", "q.jsonl", "captions.jsonl")
def questions(path: Path) -> None:
    """Questions about pictures, with all that judges and scores ask for; names of pictures are whole paths."""
    if not (path.parent / "pictures").exists():
        pictures(path.parent / "pictures")
    more = {"text": "What colour is it?", "type": "colour", "category": "llava_bench_conv"}
    more |= {"answers": ["red", "A red ring."]}
    names = {n: str(path.parent / "pictures" / f"{n}.png") for n in IDS}
    lines(path, *({"question_id": n, "image": names[n], "answer": ANSWERS[n % 3]} | more for n in IDS))


@thing("prompts.jsonl")
def prompts(path: Path) -> None:
    """Prompts with and without a picture."""
    seen = [{"type": "image", "image": data_url(1)}, {"type": "text", "text": "What is this?"}]
    lines(path, *({"id": n, "messages": [{"role": "user", "content": seen if n % 2 else "Hello"}]} for n in IDS))


@thing("pets.csv", "docs/first-hour.md#scans.csv")
def table(path: Path) -> None:
    """Pictures with their classes, beside the pictures."""
    if path.name == "scans.csv":
        rows = ["scan_file,finding,mrn", *(f"scans/{n}.png,{('normal', 'nodule')[n % 2]},p{n // 2}" for n in range(12))]
    else:
        rows = ["image,answer", *(f"pets/{n}.png,{('cat', 'dog')[n % 2]}" for n in range(12))]
    path.write_text("\n".join(rows) + "\n")


@thing("pets", "docs/first-hour.md#scans")
def animals(path: Path) -> None:
    path.mkdir()
    for number in range(12):
        (path / f"{number}.png").write_bytes(png(number))


@thing("docs/evaluation.md#heldout.jsonl")
def phantom_questions(path: Path) -> None:
    row = {"text": "What colour is it?", "type": "colour", "format": "short"}
    lines(path, *({"question_id": n, "image": data_url(n), "answer": ANSWERS[n % 3], **row} for n in IDS))


@thing("context.jsonl")
def context(path: Path) -> None:
    folder = path.parents[1] / "questions" / "pictures"  # as `questions` names them
    lines(path, *({"id": n, "image": str(folder / f"{n}.png"), "caption": "A red ring."} for n in IDS))


@thing("answers_gpt4.jsonl")
def reference_answers(path: Path) -> None:
    lines(path, *({"question_id": n, "text": "It is red."} for n in IDS))


@thing("rule.json")
def rule(path: Path) -> None:
    text = {"prompt": "Score both from 1 to 10.", "role": "Assistant"}
    path.write_text(json.dumps({"default": text, "llava_bench_conv": text}))


@thing("mm-vet.json")
def mm_vet(path: Path) -> None:
    row = {"imagename": "1.png", "question": "What colour?", "answer": "red", "capability": ["rec"]}
    path.write_text(json.dumps({f"v1_{number}": row for number in IDS}))


@thing("reviews.jsonl")
def reviews(path: Path) -> None:
    text = "8 7\nBoth are right."
    lines(path, *({"question_id": n, "category": "conv", "content": text, "tuple": [8.0, 7.0]} for n in IDS))


@thing("figures.jsonl")
def figures(path: Path) -> None:
    row = {
        "fig_label": "F1",
        "fig_caption": "Axial CT of the abdomen with a mass.",
        "in_text_mention": [],
        "domain": {},
    }
    lines(path, *({"pair_id": f"PMC{number}", **row} for number in IDS))
