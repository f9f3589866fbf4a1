"""Stand-ins for the files that the systems' pages name: annotations, reports, stores, questions in published forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from files import IDS, picture, png, record
from PIL import Image, ImageDraw
from things import lines, thing

SYSTEMS = "src/llavakit/systems"


def page(system: str, *paths: str) -> tuple[str, ...]:
    return tuple(f"{SYSTEMS}/{system}/README.md#{path}" for path in paths)


@thing(*page("llava_interactive", "scene.png"))
def scene(path: Path) -> None:
    """Flat shapes, an orange square among them."""
    picture = Image.new("RGB", (128, 128), (40, 40, 40))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((91, 14, 110, 33), fill=(240, 140, 20))
    draw.ellipse((20, 70, 50, 100), fill=(30, 60, 220))
    picture.save(path)


@thing(*page("llava_next_interleave", "in_domain.json"))
def interleaved_questions(path: Path) -> None:
    rows = []
    for number, name in ((1, "Spot-the-Diff"), (2, "QBench")):
        turns = [("human", "A <image> B <image>. What changed?"), ("gpt", "The mug is gone.")]
        meta = {"dataset": name, "question_type": "open-ended" if number == 1 else "multi-choice"}
        conversation = [{"from": who, "value": text} for who, text in turns]
        record = {"sample_id": f"d-{number}", "image": ["1.png", "2.png"], "conversations": conversation}
        rows.append(record | {"metadata": meta, "choice_list": None})
    path.write_text(json.dumps(rows))


@thing(*page("llava_next_interleave", "result.jsonl"))
def interleaved_answers(path: Path) -> None:
    meta = {"question_type": "open-ended", "gt_response": "The mug is gone.", "pred_response": "No mug."}
    lines(path, *({"dataset": "Spot-the-Diff", "sample_id": str(number), **meta} for number in IDS))


@thing(*page("llava_1_5", "questions.json"))
def science_questions(path: Path) -> None:
    rows = []
    for number in IDS:
        asked = {"from": "human", "value": "Which? A. red\nB. blue"}
        rows.append({"id": str(number), "conversations": [asked, {"from": "gpt", "value": "A"}]})
    path.write_text(json.dumps(rows))


@thing(*page("llava_med", "captions.jsonl"))
def captions(path: Path) -> None:
    lines(path, *({"pair_id": f"PMC{n}", "image": f"{n}.jpg", "fig_caption": "Axial CT with a mass."} for n in IDS))


@thing(*page("llava_med", "shots.json"))
def shots(path: Path) -> None:
    row = {"pair_id": "PMC9", "fig_label": "F1", "fig_caption": "CT.", "in_text_mention": [], "domain": {}}
    path.write_text(json.dumps([row | {"conversations": [{"from": "human", "value": "What is it?"}]}]))


@thing(*page("llava_med", "Slake1.0"))
def slake(path: Path) -> None:
    (path / "imgs" / "x").mkdir(parents=True)
    (path / "imgs" / "x" / "s.jpg").write_bytes(png(1))
    common = {"img_name": "x/s.jpg", "q_lang": "en"}
    kinds = ({"question": "Organ?", "answer": "liver", "answer_type": "OPEN"},)
    kinds += ({"question": "Normal?", "answer": "Yes", "answer_type": "CLOSED"},)
    for name in ("train", "test"):
        rows = [{"qid": number, **common, **kind} for number, kind in enumerate(kinds)]
        (path / f"{name}.json").write_text(json.dumps(rows))


@thing(*page("llava_med", "VQA_RAD Dataset Public.json"))
def vqa_rad(path: Path) -> None:
    rows = []
    for number, (answer, kind) in enumerate((("left lung", "OPEN"), ("Yes", "CLOSED"))):
        row = {"qid": number, "image_name": "1.png", "question": "Where?", "answer": answer, "answer_type": kind}
        rows.append(row | {"phrase_type": "test_freeform"})
    path.write_text(json.dumps(rows))


@thing(*page("llava_med", "questions.jsonl"))
def medical_chat(path: Path) -> None:
    row = {"image": "1.png", "text": "Where?\n<image>", "fig_label": "F1", "fig_caption": "CT.", "in_text_mention": []}
    row |= {"type": "conversation", "domain": {"mri": True}, "gpt4_answer": "Left."}
    lines(path, *({"question_id": number, **row} for number in IDS))


@thing(*page("med42_v2", "medqa.jsonl"))
def multiple_choice(path: Path) -> None:
    row = {"text": "Which drug?", "options": ["A. Aspirin", "B. Insulin"], "answer": 1}
    lines(path, *({"question_id": number, **row} for number in IDS))


@thing(*page("med42_v2", "battles.jsonl"))
def battles(path: Path) -> None:
    pairs = (("a", "b", "first"), ("b", "c", "tie"), ("c", "a", "second"), ("a", "b", "second"))
    lines(path, *({"model_a": one, "model_b": two, "verdict": said} for one, two, said in pairs))


@thing("pages.jsonl", "wiki.jsonl")
def pages(path: Path) -> None:
    rows = []
    for number in range(3):
        (path.parent / f"page{number}.png").write_bytes(png(number))
        passages = [f"The bridge number {number} was {what}." for what in ("built in 1932", "painted red", "repaired")]
        title = f"Bridge {number}"
        rows.append({"id": f"page{number}", "title": title, "summary": title, "passages": passages})
        rows[-1]["image"] = str(path.parent / f"page{number}.png")
    lines(path, *rows)


@thing("notes/")
def notes(path: Path) -> None:
    path.mkdir()
    (path / "bridge.md").write_text("# The bridge\n\nThe bridge was built in 1932. It is red.\n")


@thing("google/siglip2-base-patch16-224", *page("reflectiva", "clip"), *page("robust_clip", "CLIP-FOLDER"))
def clip_encoder(path: Path) -> None:
    """A CLIP with both sides, its tokenizer and its pictures' size."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from llavakit.phantom.tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer(["The red bridge was built in 1932."], vocab_size=400)
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = side | {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
    vision = side | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(path)


@thing(*page("robust_clip", "chs20/fare4-clip"))
def robust_clip_encoder(path: Path) -> None:
    """The visual side of a CLIP, as wide as the encoder of LLaVA-1.5's stand-in."""
    from tiny_checkpoints import VISION
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION | {"projection_dim": 16})).save_pretrained(path)


@thing(*page("robust_clip", "labels.jsonl"))
def labelled(path: Path) -> None:
    for number in IDS:
        (path.parent / f"{number}.png").write_bytes(png(number))
    lines(path, *({"image": str(path.parent / f"{number}.png"), "label": number % 2} for number in IDS))


@thing(*page("robust_clip", "names.txt"))
def class_names(path: Path) -> None:
    path.write_text("bridge\ntower\n")


@thing("intfloat/e5-small-v2")
def text_encoder(path: Path) -> None:
    from transformers import BertConfig, BertModel

    from llavakit.phantom.tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer(["The red bridge was built in 1932."], vocab_size=400)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config.intermediate_size = 32
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@thing("evqa.jsonl", *page("reflectiva", "evqa_train.jsonl", "infoseek_train.jsonl", "answers.jsonl", "gold.jsonl"))
def knowledge_questions(path: Path) -> None:
    rows = []
    for number in range(3):
        row = {"question_id": number, "image": f"page{number}.png", "text": "When was it built?", "answer": "1932"}
        (path.parent / f"page{number}.png").write_bytes(png(number))
        row |= {"question_type": "templated", "page": f"page{number}", "evidence": 0}
        rows.append(row | {"image": str(path.parent / f"page{number}.png")})
    lines(path, *rows)


@thing("data/all/train_multiturn_mix.json")
def visual_instructions(path: Path) -> None:
    path.write_text(json.dumps([record(number, str(path.parent / f"{number}.png")) for number in range(3)]))


@thing(*page("report_error_checking", "reports.jsonl"), "docs/data.md#reports.jsonl")
def reports(path: Path) -> None:
    """Findings of two subjects in each split."""
    names, rows = ("effusion", "pneumothorax", "consolidation", "nodule"), []
    for number in range(24):
        text = f"The lungs are clear. There is a {('small', 'large')[number % 2]} left {names[number % 4]}."
        text += f" There is a moderate right {names[(number // 4 + 1) % 4]} in zone {number}."
        row = {"report_id": f"r{number}", "subject_id": f"p{number // 2}", "image": f"{number % 8}.png"}
        rows.append(row | {"split": "train" if number < 16 else "test", "findings": text})
    lines(path, *rows)


@thing(*page("report_error_checking", "radiologist.jsonl"))
def reader(path: Path) -> None:
    """Answers about every draft that `reports` can become."""
    names = [f"r{number}_{kind}" for number in range(16, 24) for kind in ("damaged", "original", "type")]
    lines(path, *({"question_id": name, "text": "A" if name.endswith("type") else "Y"} for name in names))


@thing(*page("llava_rad", "raw.jsonl"))
def raw_reports(path: Path) -> None:
    first = "FINDINGS: There is a new small left pleural effusion. No pneumothorax. IMPRESSION: Effusion."
    rows = ({"id": f"s{number}", "report": text} for number, text in enumerate((first, "Lungs are clear.")))
    lines(path, *(row | {"image": "1.png", "view": "PA"} for row in rows))


@thing(
    *page("llava_rad", "chat_train_MIMIC_CXR_all_gpt4extract_rulebased_v1.json"),
    *page("llava_rad", "chat_test_MIMIC_CXR_all_gpt4extract_rulebased_v1.json"),
)
def findings(path: Path) -> None:
    turns = [("human", "<image>\nDescribe the findings."), ("gpt", "Clear lungs.")]
    row = {"image": "1.png", "generate_method": "rule-based", "reason": "cough", "view": "PA"}
    conversation = [{"from": who, "value": text} for who, text in turns]
    path.write_text(json.dumps([{"id": str(number), **row, "conversations": conversation} for number in IDS]))


@thing(*page("llava_plus", "annotations.json"))
def detections(path: Path) -> None:
    row = {"question": "Where is the kite?", "grounding_dino_input": "kite", "answer": "In the sky."}
    row |= {"grounding_dino_output": {"boxes": [[0.1, 0.2, 0.4, 0.5]], "logits": [0.9], "phrases": ["kite"]}}
    row |= {"image_id": 1, "image_file_name": "1.png"}
    path.write_text(json.dumps([{"unique_id": str(number), **row} for number in IDS]))


@thing(*page("mg_llava", "boxes.jsonl"))
def boxes(path: Path) -> None:
    names = [*(str(number) for number in range(9)), "street"]
    lines(path, *({"id": name, "boxes": [[2, 2, 20, 20]], "scores": [0.8], "labels": ["car"]} for name in names))


@thing("tools.yaml")
def tools(path: Path) -> None:
    path.write_text("skills:\n  segment: {}\n  detect_shapes: {}\n")


@thing(*page("kg_llava", "medclip"))
def medclip(path: Path) -> None:
    """MedCLIP with few layers, in the form in which `llavakit prepare medclip` writes the published one."""
    from tiny_training import write_tokenizer

    from llavakit.systems.kg_llava.medclip import MedClip, write_medclip

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    vision = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    path.mkdir()
    write_tokenizer(path)
    write_medclip(MedClip({"vocab_size": 80, "hidden_size": 16} | sizes, vision | {"window_size": 2}, 8), path)


@thing(*page("kg_llava", "mimic_nle_kg_suggestive.json", "mimic_nle_dataset.json"))
def explanations(path: Path) -> None:
    """Explanations of twelve films in MIMIC-NLE's form, with the triplets of their reports."""
    rows = []
    for number in range(12):
        row = {"img_id": str(number), "img_path": f"{number % 8}.png", "split": "train", "study_id": number // 2}
        row |= {"img_labels": [[1, 0, 0]] * 9 + [[0, 0, 1]], "nle": "The fissure is displaced."}
        rows.append(row | {"triplets": f"{'mild ' * number}opacity suggestive_of atelectasis"})
    path.write_text(json.dumps(rows))


@thing(*page("surgical_llava", "cholec80"))
def cholec80(path: Path) -> None:
    """A minute of an operation whose phases have neither 25 rows a second nor one."""
    path.mkdir()
    rows = [f"{row}\tPreparation" for row in range(799)]
    (path / "video01-phase.txt").write_text("\n".join(["Frame\tPhase", *rows]) + "\n")
    cells = [f"{25 * second}\t1\t0" for second in range(60)]
    (path / "video01-tool.txt").write_text("\n".join(["Frame\tGrasper\tHook", *cells]) + "\n")


@thing(*page("surgical_llava", "Cholec80-VQA"))
def cholec(path: Path) -> None:
    for frame in (100, 150):
        (path / "Classification" / "5").mkdir(parents=True, exist_ok=True)
        (path / f"Classification/5/{frame}_QA.txt").write_text("phase?|preparation\ntools?|1\n")
        (path / "cropped_image" / "5").mkdir(parents=True, exist_ok=True)
        (path / f"cropped_image/5/{frame}.png").write_bytes(png(frame))


@thing(*page("video_llava", "MSVD_Zero_Shot_QA"))
def msvd(path: Path) -> None:
    from files import clip

    (path / "videos").mkdir(parents=True)
    clip(path / "videos" / "v_a1.mp4")
    asked = {"video_name": "a1", "question": "who is it?", "question_id": "a1_0"}
    (path / "test_q.json").write_text(json.dumps([asked]))
    (path / "test_a.json").write_text(json.dumps([{"answer": "a man"}]))


@thing(*page("llava_critic", "judge.jsonl"))
def judged(path: Path) -> None:
    lines(path, *({"question_id": n, "score": float(s)} for n, s in zip(IDS, np.arange(6) % 4, strict=True)))


@thing(*page("llava_critic", "mine.verdicts.jsonl"))
def verdicts(path: Path) -> None:
    lines(path, *({"question_id": n, "verdict": ("first", "second", "tie")[n % 3]} for n in IDS))


@thing(*page("llava_critic", "people.jsonl"))
def people(path: Path) -> None:
    lines(path, *({"question_id": n, "score": n % 3, "verdict": ("first", "tie", "second")[n % 3]} for n in IDS))


@thing(*page("llava_plus", "llava-plus-v1-117k-tool-merge.json"))
def tool_records(path: Path) -> None:
    """Records in the published form, of phantom scenes."""
    from tiny_recipes import small_world

    from llavakit.data.preparation import prepare

    prepare("llava_plus_scenes", small_world(path.parent, "pictures"), path, read=False)


@thing(*page("llava_o1", "questions.json"))
def questions_with_answers(path: Path) -> None:
    path.write_text(json.dumps([record(number, f"{number}.png") for number in range(3)]))


@thing(*page("llava_o1", "AI2D_TEST.tsv"))
def table_of_questions(path: Path) -> None:
    picture(path.parent / "0.png")
    path.write_text("index\tquestion\tA\tB\timage\tanswer\n0\tWhich?\tcat\tdog\t0.png\tA\n")


for _path in (*page("llava_o1", "scene-0-0000000.png"), *page("reflectiva", "images/red-tower-3.png")):
    thing(_path)(picture)
