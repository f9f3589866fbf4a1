"""LLaVA-NeXT-Interleave: golden figures, prompts, the published files, records, the benchmark."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import llavakit
from llavakit.checkpoints.convert import convert
from llavakit.checkpoints.opening import build, open_checkpoint
from llavakit.checkpoints.siglip_qwen import SIGLIP
from llavakit.conversation.encode import IMAGE_PLACEHOLDER, encode
from llavakit.conversation.messages import from_llava, media_of, text_of
from llavakit.data.edits import build_edits
from llavakit.data.mixture import Mixture
from llavakit.errors import CheckpointError, RecordError, UserError
from llavakit.evaluation.run import block_of, evaluate
from llavakit.evaluation.score import benchmark, score
from llavakit.media.frame_sampling import choose
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.routes import MediaSpec
from llavakit.proof.golden import find_cases, run_case
from llavakit.system import get_system
from llavakit.systems.llava_next_interleave.checkpoint import InterleaveLayout
from llavakit.training.build import build_meta
from llavakit.training.recipe import load_recipe
from llavakit.views.plan import MediaSize

pytestmark = pytest.mark.usefixtures("measures_give_the_metrics")

GOLDEN = Path(__file__).parent / "golden" / "llava-next-interleave"
TINY = json.loads((GOLDEN / "e2e_logits" / "case.json").read_text())["config"]
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
# what the hub's config.json said first and says now
EARLIER = {
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": PINPOINTS,
    "num_key_value_heads": 4,
}


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
    for answer in (None, "\nthe answer", ""):
        turns, conversation = [("user", value)], messages
        if answer is not None:
            turns = [*turns, ("assistant", answer), ("user", "\nmore")]
            conversation = [*messages, *({"role": role, "content": text} for role, text in turns[1:])]
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


PARTS = [("text", "A"), ("image", "x.png"), ("text", "B"), ("image", "y.png"), ("text", "which?")]


def test_the_order_of_parts_holds_in_the_saved_chat_template_and_on_vllm(tokenizer):
    from llavakit.conversation.encode import chat_template_for
    from llavakit.serving.run import vllm_arguments

    asked = [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in PARTS]}]
    found = encode(asked, "qwen_1_5_interleaved", tokenizer, add_generation_prompt=True)
    assert "user\nA<image>B<image>which?<|im_end|>" in found.text
    jinja = chat_template_for("qwen_1_5_interleaved", tokenizer)
    saved = tokenizer.apply_chat_template(asked, chat_template=jinja, add_generation_prompt=True, tokenize=False)
    assert saved == found.text
    assert "--interleave-mm-strings" in vllm_arguments((), (), (), True, None)


def test_strided_frames():
    def frames(total, wanted):
        return choose({"type": "strided", "frames": wanted}, total=total, average_rate=1, timestamps=range(total))

    assert len(frames(100, 16)) == 17
    assert frames(5, 16) == [0, 1, 2, 3, 4]
    assert frames(7, 2) == [0, 3, 6]


# The published files


def write_classic(folder: Path, **fields) -> Path:
    """A tiny checkpoint in the authors' layout, with the weights and settings of the golden end-to-end case."""
    folder.mkdir()
    encoder = folder.parent / "siglip-tiny"
    encoder.mkdir(exist_ok=True)
    (encoder / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model", **TINY["vision"]}))
    raw = {"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"], **TINY["model_config"]}
    raw |= {"mm_vision_tower": str(encoder), "eos_token_id": 266, **fields}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    shutil.copy(GOLDEN / "e2e_logits" / "weights.safetensors", folder / "model.safetensors")
    shutil.copy(GOLDEN / "interleave_eval_prompt" / "tokenizer.json", folder)
    specials = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    more = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **specials, **more})
    )
    return folder


@pytest.fixture(scope="module")
def classic(tmp_path_factory):
    return write_classic(tmp_path_factory.mktemp("interleave") / "classic", mm_spatial_pool_mode=None)


@pytest.fixture(scope="module")
def chat(classic):
    return llavakit.load(classic)


def test_published_files_round_trip(classic, tmp_path):
    checkpoint = open_checkpoint(classic)
    assert checkpoint.config.system == "llava-next-interleave"
    assert checkpoint.config.template == "qwen_1_5_interleaved"
    convert(classic, tmp_path / "native", to="llavakit")
    convert(tmp_path / "native", tmp_path / "again", to="original")
    source, written = load_file(classic / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(written) == set(source) - {"model.image_newline"}
    assert all(torch.equal(written[name], source[name]) for name in written)
    back = open_checkpoint(tmp_path / "again")
    assert back.config.media == checkpoint.config.media
    one, other = (dict(build(c).named_parameters()) for c in (checkpoint, back))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_files_become_those_of_transformers_class(classic, tmp_path):
    from transformers import LlavaForConditionalGeneration

    convert(classic, tmp_path / "hf", to="hf")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert not any("newline" in name for name, _ in theirs.named_parameters())
    back = open_checkpoint(tmp_path / "hf").config
    assert back.system == "llava-next-interleave"
    assert MediaSpec(back).count("video", MediaSize(3, 30, 20)) == 3 * 16
    assert back.extras["processor"]["sampling"] == {"type": "strided", "frames": 16}
    pooled = write_classic(tmp_path / "pooled", mm_spatial_pool_mode="bilinear")
    with pytest.raises(UserError, match=r"media\.video: transformers' class takes images alone"):
        convert(pooled, tmp_path / "hf-pooled", to="hf")


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({}, {"image": 16, "multi_image": 16, "video": 16 * 3}),
        ({"mm_spatial_pool_mode": None}, {"image": 16, "multi_image": 16, "video": 16 * 3}),
        ({"mm_spatial_pool_mode": "average"}, {"image": 16, "multi_image": 16, "video": 4 * 3}),
        (EARLIER, {"image": 16 + 8 * 9, "multi_image": 17, "video": 4 * 3 + 1}),
    ],
)
def test_settings_mean_what_the_files_say(tmp_path, fields, counts):
    given = {"mm_spatial_pool_mode": None} | fields if fields != EARLIER else fields
    raw = TINY["model_config"] | given
    layout = InterleaveLayout()
    kept = {key: value for key, value in raw.items() if value is not None}
    media = layout.media(kept, 16)
    encoder = {"model_type": "siglip_vision_model", **TINY["vision"]}
    assert layout.settings(media).items() <= {"mm_spatial_pool_mode": "bilinear", **kept}.items()
    folder = write_classic(tmp_path / "files", **given)
    if fields == EARLIER:  # the case's weights have grouped heads
        config = open_checkpoint_config(folder, kept, encoder)
    else:
        config = open_checkpoint(folder).config
    assert config.system == "llava-next-interleave"
    spec = MediaSpec(config)
    sizes = {"image": MediaSize(1, 32, 32), "multi_image": MediaSize(1, 32, 32), "video": MediaSize(3, 16, 16)}
    assert {name: spec.count(name, size) for name, size in sizes.items()} == counts


def open_checkpoint_config(folder, raw, encoder):
    """The configuration alone."""
    full = json.loads((folder / "config.json").read_text())
    assert InterleaveLayout().matches(full, folder)
    return InterleaveLayout().read_config(full, {"encoder": Path(full["mm_vision_tower"])})


def test_other_systems_files_are_not_taken(classic):
    layout = InterleaveLayout()
    raw = json.loads((classic / "config.json").read_text())
    assert layout.matches(raw, classic)
    onevision = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres_max_9"}
    grouped = EARLIER | {"num_key_value_heads": 2}
    for other in (onevision, grouped, {"image_aspect_ratio": "square"}, {"mm_vision_tower": "openai/clip-vit-large"}):
        assert not layout.matches(raw | other, classic)
    with pytest.raises(CheckpointError, match="add_faster_video"):
        layout.read_config(raw | {"add_faster_video": True}, {})


@pytest.mark.parametrize(
    ("size", "parameters"),
    [((1024, 2816, 24, 16, 151936, True), 463_987_712), ((4096, 11008, 32, 32, 151936, False), 7_721_324_544)],
)
def test_published_shapes(size, parameters):
    hidden, inner, layers, heads, rows, tied = size
    raw = {
        "model_type": "llava_qwen",
        "architectures": ["LlavaQwenForCausalLM"],
        "mm_vision_tower": SIGLIP,
        "mm_hidden_size": 1152,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    }
    layout = InterleaveLayout()
    config = layout.read_config(raw, {})
    with torch.device("meta"):
        net = LlavakitForConditionalGeneration(config)
    head = 0 if tied else net.lm_head.weight.numel()
    assert sum(p.numel() for p in net.model.language_model.parameters()) + head == parameters
    assert sum(p.numel() for p in net.model.vision_tower.parameters()) == 397_747_744
    shapes = {name: tuple(t.shape) for name, t in layout.write_state(config, net.state_dict())}
    assert ("lm_head.weight" in shapes) is not tied
    assert shapes["model.mm_projector.2.weight"] == (hidden, hidden)
    last = "model.vision_tower.vision_tower.vision_model.encoder.layers.25.mlp.fc2.weight"
    assert shapes[last] == (1152, 4304)
    assert not any("layers.26." in name and "vision" in name for name in shapes)
    written = layout.write_config(config)
    assert layout.read_config(written, {}).media == config.media
    assert (written["mm_vision_tower"], written["mm_patch_merge_type"]) == (SIGLIP, "flat")


def test_the_recipe_is_the_published_model():
    recipe = load_recipe(get_system("llava-next-interleave").recipe)
    net = build_meta(recipe)
    assert sum(p.numel() for p in net.model.multi_modal_projector.parameters()) == 21_504_000
    assert net.model.image_newline is None
    for modality in ("image", "multi_image"):
        assert net.model.media.count(modality, MediaSize(1, 1200, 900)) == 729
    assert [stage.name for stage in recipe.stages] == ["alignment", "single-image", "interleaved"]


# Records


RECORD = {
    "sample_id": "d3-17",
    "image": ["a.png", "b.png"],
    "conversations": [
        {"from": "human", "value": "A <image> B <image> C"},
        {"from": "gpt", "value": "The mug is gone."},
    ],
    "metadata": {"dataset": "Spot-the-Diff", "question_type": "open-ended"},
    "choice_list": None,
}


@pytest.fixture
def m4(tmp_path):
    """Writes records in the M4 format beside two pictures, and returns the file."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (20, 12), colour).save(tmp_path / name)

    def write(*records, name="m4.json"):
        (tmp_path / name).write_text(json.dumps(list(records)))
        return tmp_path / name

    return write


def read(file, *edits):
    return Mixture([{"path": file, "edits": list(edits)}])[0].messages


def test_all_in_front_is_a_choice_of_the_data(m4, tokenizer):
    plain, front = read(m4(RECORD)), read(m4(RECORD), "media_in_front")
    assert media_of(plain) == media_of(front)
    texts = [encode(m, "qwen_1_5_interleaved", tokenizer).text for m in (plain, front)]
    assert "user\nA <image> B <image> C<|im_end|>" in texts[0]
    assert "user\n<image><image>A [image] B [image] C<|im_end|>" in texts[1]
    later = [*RECORD["conversations"], {"from": "human", "value": "And <image>?"}, {"from": "gpt", "value": "Yes."}]
    third = RECORD | {"conversations": later, "image": ["a.png", "b.png", "a.png"]}
    moved = read(m4(third), {"type": "media_in_front", "mark": "(picture)"})
    assert [len(media_of([message])) for message in moved] == [3, 0, 0, 0]
    assert text_of(moved[2]) == "And (picture)?"
    alone = RECORD | {"image": "a.png", "conversations": [{"from": "human", "value": "What <image>?"}, later[1]]}
    assert read(m4(alone), "media_in_front") == read(m4(alone))


def test_mixed_placement_halves_the_data_the_same_way_every_time(m4):
    def record(n):
        turns = [{"from": "human", "value": f"<image>{n}<image>"}, {"from": "gpt", "value": "x"}]
        return RECORD | {"conversations": turns}

    file = m4(*map(record, range(400)))

    def in_front(**options):
        mixture = Mixture([{"path": file, "edits": [{"type": "media_in_front", **options}]}])
        return ["[image]" in text_of(record.messages[0]) for record in mixture]

    half = in_front(share=0.5)
    assert 160 < sum(half) < 240
    assert half == in_front(share=0.5) != in_front(share=0.5, seed=1)
    assert not any(in_front(share=0))
    assert all(in_front())


@pytest.mark.parametrize(
    ("edits", "problem"),
    [
        (["media_infront"], "did you mean 'media_in_front'"),
        ([{"type": "media_in_front", "share": 2}], "share must be a number from 0 to 1"),
        ([{"type": "media_in_front", "part": 2}], "has no option 'part'"),
        ([{"type": "remove_text", "texts": "x"}], "texts must be a list"),
        ("media_in_front", "must be a list"),
    ],
)
def test_edits_that_do_not_exist_are_one_line(edits, problem):
    with pytest.raises(UserError, match=problem):
        build_edits(edits)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"image": ["a.png"]}, "conversations: 2 <image> in the text, but 1 media in the record"),
        ({"image": ["a.png", "b.png", "a.png"]}, "conversations: 2 <image> in the text, but 3 media in the record"),
        ({"image": ["a.png", "c.png"]}, "image: there is no file"),
    ],
)
def test_records_that_do_not_add_up_name_file_record_and_field(m4, fields, problem):
    file = m4(RECORD, RECORD | fields)
    with pytest.raises(RecordError) as error:
        Mixture([file])[1]
    assert str(error.value).startswith(f"{file}:2: {problem}")


def test_frames_beyond_the_context_name_the_field(classic, m4, tmp_path):
    from llavakit.training.dataset import Conversations

    processor = llavakit.load(classic).processor
    turns = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "Nothing."}]
    frames = tmp_path / "clip"
    frames.mkdir()
    for number in range(16):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(frames / f"{number}.png")
    (record,) = Mixture([m4({"video": "clip", "conversations": turns}, name="clips.json")])
    for options, problem in (
        ({"max_length": 200}, "max_length is 200, and the cut would go through its media, which take 256 of them"),
        ({"positions": 200}, "the model has 200 positions; shorten it, or set max_length"),
    ):
        maker = Conversations(processor, **options)
        with pytest.raises(RecordError) as error:
            maker.check(maker.encode(record), record)
        assert str(error.value).startswith(f"{record.file}:1: video: takes ")
        assert problem in str(error.value)


# The benchmark


def test_benchmark_asks_every_turn_and_scores_the_last(chat, m4, tmp_path):
    several = RECORD | {
        "sample_id": 2,
        "conversations": [
            {"from": "human", "value": "<image>\nFirst?"},
            {"from": "gpt", "value": "never shown"},
            {"from": "human", "value": "And <image>?"},
            {"from": "gpt", "value": "B"},
        ],
        "metadata": {"dataset": "QBench", "question_type": "multi-choice"},
    }
    file = m4(RECORD, several)
    asked: list = []
    real = chat.answer_all

    class Listening:
        def __getattr__(self, name):
            return getattr(chat, name)

        def answer_all(self, conversations, **options):
            asked.extend(conversations)
            return real(conversations, **options)

    result = evaluate(Listening(), "interleave_bench", file, tmp_path / "p.jsonl", max_new_tokens=3, batch_size=2)
    assert [len(conversation) for conversation in asked] == [1, 1, 3]
    assert [part.get("text", "image") for part in asked[2][2]["content"]] == ["And ", "image", "", "?"]
    assert len(asked[2][1]["token_ids"]) <= 3
    assert set(result["metrics"]["datasets"]) == {"Spot-the-Diff", "QBench"}
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["Spot-the-Diff/d3-17", "QBench/2"]
    assert "never shown" not in str(asked)
    part = evaluate(Listening(), "interleave_bench", file, tmp_path / "q.jsonl", max_new_tokens=1, shard="2/2")
    assert (part["asked"], part["metrics"]) == (1, None)
    for wrong in ("3/2", "0/2", "x"):
        with pytest.raises(UserError, match="must be K/N"):
            evaluate(Listening(), "interleave_bench", file, tmp_path / "r.jsonl", shard=wrong)


def test_blocks_are_those_of_the_published_split():
    assert [list(block_of(range(5), k, 4)) for k in (1, 2, 3, 4)] == [[0, 1], [2, 3], [4], []]
    assert list(block_of([], 1, 3)) == []


def results(tmp_path, *rows):
    names = ("dataset", "question_type", "sample_id", "gt_response", "pred_response")
    file = tmp_path / "result.jsonl"
    file.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return file


def test_scores_name_the_variant_they_come_from(tmp_path):
    file = results(
        tmp_path,
        ("RAVEN", "multi-choice", 0, "A", "a man walks"),
        ("VIST", "open-ended", 1, "", "anything"),
        ("VIST", "open-ended", 2, "One two. Three four.", "one two three four"),
        ("Unknown", "multi-choice", 3, "B", "A: no B: b"),
    )
    found = score("interleave_bench", file)["metrics"]
    assert found["datasets"]["RAVEN"] == {"Accuracy": 0, "count": 1}
    assert found["datasets"]["VIST"]["count"] == 1
    assert found["datasets"]["VIST"]["Rouge-L f"] == pytest.approx(100, abs=1e-5)
    assert found["datasets"]["Unknown"]["Accuracy"] == 100
    assert set(found["categories"]) == {"puzzle", "visual_story_telling"}
    assert found["in_domain"] is None
    harness = score("interleave_bench", file, variant="harness")["metrics"]
    assert harness["datasets"]["RAVEN"]["score"] == 100  # the article is taken for the letter
    empty = results(tmp_path, ("VIST", "open-ended", 1, "", "anything"))
    assert score("interleave_bench", empty)["metrics"]["datasets"]["VIST"]["Rouge-L f"] is None
    rows = ("nlrv2", "yes-no", 0, "A", "A"), ("VIST", "open-ended", 1, "a", "a"), ("VIST", "other", None, "b", "b")
    found = score("interleave_bench", results(tmp_path, *rows))["metrics"]["datasets"]
    assert (found["nlrv2"]["Accuracy"], found["VIST"]["count"]) == (100, 2)
    with pytest.raises(RecordError, match=r"result\.jsonl:3: question_type"):
        score("interleave_bench", results(tmp_path, rows[1], rows[1], rows[2]), variant="harness")
    assert score("interleave_bench", results(tmp_path))["metrics"]["count"] == 0
    with pytest.raises(UserError, match="variant=other: must be published or harness"):
        score("interleave_bench", file, variant="other")
    with pytest.raises(RecordError, match="question_type: must be open-ended or multi-choice"):
        score("interleave_bench", results(tmp_path, ("VIST", "essay", 1, "", "")))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"metadata": None}, "metadata: must be an object"),
        ({"metadata": {"dataset": "VIST"}}, "metadata.question_type: is missing"),
        ({"image": ["a.png"]}, "conversations: 2 <image> in the text, but 1 media"),
        ({"sample_id": None}, "sample_id: must be a string or an integer"),
        ({"conversations": [{"from": "gpt", "value": "Hi"}], "image": None}, "holds no turn of the user"),
    ],
)
def test_broken_questions_are_one_line(m4, fields, problem):
    file = m4(RECORD, RECORD | fields)
    with pytest.raises(RecordError) as error:
        benchmark("interleave_bench").questions(file)
    assert str(error.value).startswith(f"{file}:2: ")
    assert problem in str(error.value)


def test_questions_keep_pictures_in_their_places(m4):
    (question,) = benchmark("interleave_bench").questions(m4(RECORD))
    (message,) = question.turns()
    assert [part["type"] for part in message["content"]] == ["text", "image", "text", "image", "text"]


def test_miniature_measures_every_arm():
    from llavakit.systems.llava_next_interleave.miniature import IN_FRONT, INTERLEAVED, MARK, PICTURE, layout, run

    assert layout(INTERLEAVED) == (-2, PICTURE, -3, PICTURE, -4, PICTURE)
    assert layout(IN_FRONT) == (PICTURE, PICTURE, PICTURE, -2, MARK, -3, MARK, -4, MARK)
    verdict = run(seeds=(0,), steps=2, held_out=16, workers=1)
    assert len(verdict.comparisons) == 3
    assert all(0 <= value <= 1 for c in verdict.comparisons for side in (c.idea, c.baseline) for value in side.values)
