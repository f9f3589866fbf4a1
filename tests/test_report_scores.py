"""`llavakit score report`: files, metrics against their packages, resamples, paired tests, judges."""

from __future__ import annotations

import csv
import json
import os
import random
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_api import Failure, FakeAPI, completion
from safetensors.torch import save_file

from llavakit.cli.app import run
from llavakit.errors import RecordError, UserError
from llavakit.evaluation.metrics import condition_rules
from llavakit.evaluation.metrics import reports as measures
from llavakit.evaluation.metrics.agreement import kappa
from llavakit.evaluation.metrics.chexbert import CheXbert
from llavakit.evaluation.metrics.mentions import mentions
from llavakit.evaluation.metrics.meteor import MeteorProgram, nltk_meteor, ptb_words, wordnet
from llavakit.evaluation.metrics.overlap import OVERLAP, Overlap
from llavakit.evaluation.metrics.resampling import Sums, compare, draw, estimate, percentiles, resample
from llavakit.evaluation.reports.metrics import NAMES, Sources
from llavakit.evaluation.reports.rubric import read_rubric
from llavakit.evaluation.reports.score import score_reports
from llavakit.evaluation.score import score
from llavakit.registry import TEXT_METRICS

FIGURES = json.loads((Path(__file__).parent / "golden" / "report_metrics.json").read_text())
WORDS = [
    "No",
    "effusion",
    ".",
    "nodule",
    "is",
    "in",
    "the",
    "left",
    "lower",
    "lobe",
    ",",
    "enlarged",
    "opacities",
    "(2.3",
    "cm)",
    "small-large",
    "heart's",
    "running",
]


def corpus(count: int = 40, seed: int = 0) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(0, 30))) for _ in range(2 * count)]
    texts[:3] = ["", "no", texts[count]]
    return texts[:count], [text or "clear" for text in texts[count:]]


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def files(tmp_path: Path, count: int = 12, **more) -> tuple[Path, Path]:
    ours, theirs = corpus(count)
    records = [[{"id": n, "text": text, **more} for n, text in enumerate(side)] for side in (ours, theirs)]
    return write(tmp_path / "p.jsonl", records[0]), write(tmp_path / "r.jsonl", records[1][::-1])


# Overlap


def by_package(name: str, ours: list[str], theirs: list[str]) -> float:
    """A figure from the package itself."""
    toolkit, *rest = name.split("_")
    if toolkit == "sacrebleu":
        from sacrebleu.metrics import BLEU

        return BLEU(max_ngram_order=int(rest[0])).corpus_score(ours, [theirs]).score / 100
    if toolkit == "google":
        from rouge_score.rouge_scorer import RougeScorer

        kind = f"rouge{rest[1].upper()}"
        scorer = RougeScorer([kind], use_stemmer="stemmed" in rest)
        return float(np.mean([scorer.score(b, a)[kind].fmeasure for a, b in zip(ours, theirs, strict=True)]))
    if toolkit == "nltk":
        from nltk.translate import bleu_score

        order = int(next(part for part in rest if part.isdigit()))
        weights = (1 / order,) * order
        if "corpus" in rest:
            return bleu_score.corpus_bleu([[b.split()] for b in theirs], [a.split() for a in ours], weights)
        smoothing = bleu_score.SmoothingFunction().method1 if "smoothed" in rest else None
        pairs = zip(ours, theirs, strict=True)
        return float(np.mean([bleu_score.sentence_bleu([b.split()], a.split(), weights, smoothing) for a, b in pairs]))
    return TEXT_METRICS.get(name)(ours, [[text] for text in theirs]).value


@pytest.mark.parametrize("name", OVERLAP)
@pytest.mark.filterwarnings("ignore")
def test_sums_equal_the_packages_on_the_whole_and_on_resamples(name):
    ours, theirs = corpus()
    sums = Overlap(ours, theirs).sums(name)
    assert sums.whole == pytest.approx(by_package(name, ours, theirs), abs=1e-9)
    if name == "coco_cider":  # document frequencies stay those of all references
        return
    rows = draw(len(ours), 4)
    wanted = [by_package(name, [ours[n] for n in row], [theirs[n] for n in row]) for row in rows]
    np.testing.assert_allclose(resample([sums], rows)[0], wanted, atol=1e-9)


def test_cider_of_one_report_is_not_defined_and_of_equal_ones_is_ten():
    assert np.isnan(Overlap(["a b c d"], ["a b c d"]).sums("coco_cider").whole)
    texts = ["a b c d", "e f g h"]
    assert Overlap(texts, texts).sums("coco_cider").whole == pytest.approx(10)


def test_texts_without_words_have_no_matches():
    for name in OVERLAP:
        if name != "coco_cider":
            assert Overlap([""], ["a"]).sums(name).whole == pytest.approx(0, abs=1e-9), name
            assert Overlap(["a b c d e"], ["a b c d e"]).sums(name).whole == pytest.approx(1, abs=1e-6), name


@pytest.mark.skipif("PYCOCOEVALCAP" not in os.environ, reason="PYCOCOEVALCAP names the folder of that package")
def test_java_programs_equal_recorded_figures():
    folder = Path(os.environ["PYCOCOEVALCAP"])
    ours, theirs, found = FIGURES["predictions"], FIGURES["references"], FIGURES["figures"]
    with MeteorProgram(folder / "meteor" / "meteor-1.5.jar") as program:
        sums = program.sums(ours, theirs)
        assert sums.whole == pytest.approx(found["coco_meteor"], abs=1e-9)
        np.testing.assert_allclose(sums.each, found["coco_meteor_each"], atol=1e-9)
        rows = np.array(found["resamples"])
        np.testing.assert_allclose(resample([sums], rows)[0], found["coco_meteor_resampled"], atol=1e-9)
    jar = folder / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    words = [ptb_words(side, jar) for side in (ours, theirs)]
    assert words == found["ptb_words"]
    for name, value in found["ptb"].items():
        assert Overlap(*words).sums(name).whole == pytest.approx(value, abs=1e-9), name


@pytest.mark.skipif("WORDNET" not in os.environ, reason="WORDNET names a data folder of NLTK with WordNet in it")
def test_nltk_meteor_equals_the_recorded_figure():
    words = wordnet(os.environ["WORDNET"])
    found = nltk_meteor(FIGURES["predictions"], FIGURES["references"], words)
    assert found.whole == pytest.approx(FIGURES["figures"]["nltk_meteor"], abs=1e-9)


JAVA = """#!{python}
import sys
if "edu.stanford.nlp.process.PTBTokenizer" in sys.argv:
    print(open(sys.argv[-1]).read().lower().replace(".", " ."))
    sys.exit()
assert sys.argv[-6:] == ["-", "-", "-stdio", "-l", "en", "-norm"], sys.argv
for line in sys.stdin:
    kind, *rest = line.rstrip("\\n").split(" ||| ")
    if kind == "SCORE":
        reference, text = (part.split() for part in rest)
        print(len(set(reference) & set(text)), len(text), flush=True)
    else:
        hits, words = map(float, rest[0].split())
        print(hits / words if words else 0.0, hits / words if words else 0.0, sep="\\n", flush=True)
"""


def test_meteor_is_asked_for_statistics_and_for_the_score_of_their_sums(tmp_path, monkeypatch):
    """A program that speaks METEOR's protocol stands for Java."""
    java = tmp_path / "java"
    java.write_text(JAVA.format(python=sys.executable))
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    jar = tmp_path / "any.jar"
    jar.write_text("")
    with MeteorProgram(jar) as program:
        sums = program.sums(["a b", "c ||| d\ne f"], ["a c", "c x"])
        assert sums.table.tolist() == [[1, 2], [1, 4]]
        assert sums.whole == pytest.approx(2 / 6)
        assert sums.each == pytest.approx([0.5, 0.25])
        assert resample([sums], np.array([[0, 0]]))[0] == pytest.approx([0.5])
    assert ptb_words(["A b. C", "", "d\ne"], jar) == ["a b c", "", "d e"]
    paths = files(tmp_path)
    weights = {"meteor": str(jar), "ptb": str(jar)}
    found = score("report", *paths, metrics="coco_meteor,coco_ptb_meteor,coco_ptb_bleu_1", weights=weights)["metrics"]
    assert list(found["scores"]) == ["coco_ptb_bleu_1", "coco_meteor", "coco_ptb_meteor"]
    java.write_text(f"#!{sys.executable}\n")
    with MeteorProgram(jar) as program, pytest.raises(UserError, match="gave no answer"):
        program.sums(["a"], ["a"])
    with pytest.raises(UserError, match="no such file"):
        MeteorProgram(tmp_path / "gone.jar")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="needs Java"):
        MeteorProgram(jar)


def test_bertscore_matches_greedily(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizer

    from llavakit.evaluation.metrics.bertscore import BertScore

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt"), model_max_length=16).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=11, max_position_embeddings=16, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="say which with --bertscore-layer"):
        BertScore(str(tmp_path))
    with pytest.raises(UserError, match="layers 0 to 2, layer 3"):
        BertScore(str(tmp_path), 3)
    with pytest.raises(UserError, match="cannot be loaded as an encoder"):
        BertScore(str(tmp_path / "gone"), 1)
    model = BertScore(str(tmp_path), 1)
    texts, references = ["a b c", "a b c d e f " * 9, "", "f"], ["a b c", "b", "a", "a b"]
    found, turned = model.score(texts, references), model.score(references, texts)
    np.testing.assert_allclose(found.precision, turned.recall, atol=1e-6)
    assert found.f1[0] == pytest.approx(1, abs=1e-5)
    assert found.f1[2] == 0
    alone = [model.score([a], [b]).f1[0] for a, b in zip(texts, references, strict=True)]
    np.testing.assert_allclose(found.f1, alone, atol=1e-6)  # padding changes nothing


# Labels


@pytest.mark.parametrize(
    ("report", "effusion", "nodule"),
    [
        ("Pleura: No effusion.", "denied", None),
        ("No change in the nodule", None, "found"),
        ("effusion is not seen", "denied", None),
        ("no effusion; nodule in the left lower lobe", "denied", "found"),
        ("There is no\npleural effusion.", "denied", None),
        ("There is\nno effusion\nNodule in the left lobe", "denied", "found"),
        ("No significant interval change in the effusion, no nodule.", "found", "denied"),
        ("The effusion is not changed.", "found", None),
        ("No nodule is seen, and the effusion is small.", "found", "denied"),
        ("Effusion and nodule are no longer seen.", "denied", "denied"),
        ("No consolidation, effusion, or nodule.", "denied", "denied"),
        ("No effusion but a nodule.", "denied", "found"),
        ("Effusion: none.", "denied", None),
        ("The effusion has resolved; possible nodule.", "denied", "open"),
        ("Effusion cannot be excluded.", "open", None),
        ("There is an effusion without nodule.", "found", "denied"),
        ("EFFUSION. NO NODULE.", "found", "denied"),
        ("The lungs are clear.", None, None),
        ("", None, None),
    ],
)
def test_mentions_are_found_denied_or_open(report, effusion, nodule):
    lexicon = {"effusion": "(?:pleural )?effusions?", "nodule": "nodules?"}
    found = {mention.name: mention.polarity for mention in mentions(report, lexicon)}
    assert (found.get("effusion"), found.get("nodule")) == (effusion, nodule)


def test_conditions_by_rules():
    def classes(report):
        return {name: own for name, own in zip(measures.CONDITIONS, condition_rules.label(report), strict=True) if own}

    assert classes("The heart is not enlarged. A pacemaker is in place.") == {
        "Cardiomegaly": measures.NEGATIVE,
        "Support Devices": measures.POSITIVE,
        "No Finding": measures.POSITIVE,
    }
    assert classes("Small effusion. No effusion on the left.")["Pleural Effusion"] == measures.POSITIVE
    assert classes("Possible pneumonia.") == {"Pneumonia": measures.UNCERTAIN}
    assert classes("  ") == {}
    assert condition_rules.labels([]).shape == (14, 0)


def two_classes(rows: list[list[int]]) -> np.ndarray:
    classes = np.zeros((14, len(rows[0])), int)
    classes[: len(rows)] = rows
    return classes


def test_f1_of_labels_equals_the_report_and_says_what_absent_conditions_do():
    rng = np.random.default_rng(0)
    found, wanted = rng.integers(0, 4, (2, 14, 30))
    wanted[3] = found[3] = measures.NEGATIVE  # never found by either
    for five in (False, True):
        for uncertain in (False, True):
            whole = measures.chexbert_f1(found, wanted, five=five, uncertain=uncertain)
            for average in ("micro", "macro"):
                sums = measures.f1_sums(found, wanted, average, five=five, uncertain=uncertain)
                assert sums.whole == pytest.approx(whole[f"{average} avg"]["f1-score"], abs=1e-12)
    macro, present = (measures.f1_sums(found, wanted, average).whole for average in ("macro", "present"))
    assert present == pytest.approx(macro * 14 / 13)
    none = measures.f1_sums(two_classes([[1, 0]]), two_classes([[0, 0]]), "present")
    assert np.isnan(none.whole)
    assert measures.f1_sums(two_classes([[1, 0]]), two_classes([[0, 0]]), "micro").whole == 0


def test_reports_without_a_label_change_no_f1_and_unscorable_resamples_are_counted():
    one = measures.f1_sums(two_classes([[1]]), two_classes([[1]]), "present")
    more = measures.f1_sums(two_classes([[1, 0, 0]]), two_classes([[1, 0, 0]]), "present")
    assert one.whole == more.whole == 1
    rows = draw(3)
    found = estimate(more, rows)
    assert found.unscored == int((rows != 0).all(1).sum()) > 100
    assert (found.median, found.low, found.high) == (1, 1, 1)
    never = estimate(Sums.mean([None, None]), draw(2))
    assert never.unscored == 500
    assert np.isnan([never.value, never.median, never.low]).all()


def test_kappa_uses_the_whole_scale():
    assert kappa([0, 1, 1, 0], [1, 0, 0, 1]) == -1  # below chance
    assert kappa([0, 1], [0, 1]) == 1
    assert np.isnan(kappa([2, 2], [2, 2]))
    few, scale = ([0, 3, 0, 3], [3, 3, 0, 0]), (0, 1, 2, 3)
    assert kappa(*few, scale, "linear") == pytest.approx(0)
    ratings = ([0, 1, 3, 3], [0, 3, 3, 1])  # nobody said 2: its place still counts
    assert kappa(*ratings, scale, "quadratic") != pytest.approx(kappa(*ratings, weights="quadratic"))
    with pytest.raises(UserError, match="4 is not on the scale"):
        kappa([4], [0], scale)
    rng = np.random.default_rng(1)
    found, wanted = rng.integers(0, 4, (2, 14, 25))
    found[5] = wanted[5] = 0  # no kappa
    each = [kappa(a, b) for a, b in zip(found.tolist(), wanted.tolist(), strict=True)]
    sums = measures.kappa_sums(found, wanted)
    assert sums.whole == pytest.approx(np.nanmean(each), abs=1e-12)
    assert sums.low == -1
    opposite = two_classes([[1, 2, 1, 2]] * 14)
    assert measures.kappa_sums(opposite, 3 - opposite).whole == -1


def test_chexbert_labels_through_weights(tmp_path):
    from transformers import BertConfig

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "effusion", "clear"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 32}
    model = CheXbert(BertConfig(vocab_size=len(words), **sizes))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "chexbert.pth")
    paths = files(tmp_path, 2)
    chosen = "chexbert_f1_micro_14,chexbert_kappa_14"
    found = score("report", *paths, metrics=chosen, weights={"chexbert": str(tmp_path)})["metrics"]
    assert list(found["scores"]) == chosen.split(",")
    assert not found["not_computed"]
    state.pop("module.linear_heads.13.bias")
    torch.save({"state_dict": state}, tmp_path / "chexbert.pth")
    with pytest.raises(UserError, match=r"lacks linear_heads.13.bias"):
        score("report", *paths, metrics=chosen, weights={"chexbert": str(tmp_path)})
    (tmp_path / "chexbert.pth").unlink()
    with pytest.raises(UserError, match=r"chexbert.pth: no such file"):
        score("report", *paths, metrics=chosen, weights={"chexbert": str(tmp_path)})


# Resamples and tests


def test_intervals_are_scipys_and_stay_in_the_range():
    from scipy import stats

    values = np.array([0.0, 1.0, 1.0, 0.5, 0.25])
    found = estimate(Sums.mean(values), draw(len(values)))
    other = stats.bootstrap(
        (values,), np.mean, n_resamples=500, method="percentile", random_state=np.random.RandomState(3)
    )
    assert (found.low, found.high) == pytest.approx(tuple(other.confidence_interval), abs=1e-12)
    assert 0 <= found.low <= found.median <= found.high <= 1
    perfect = estimate(Sums.mean([1.0] * 7), draw(7))
    assert perfect == (1.0, 1.0, 1.0, 1.0, 0)
    with pytest.raises(UserError, match="at least 2 cases, there is 1"):
        draw(1)
    assert percentiles(np.array([np.nan, 1.0]))[3] == 1


def test_equal_systems_have_p_one_and_the_test_is_symmetric():
    ours, theirs = corpus(30)
    sums = [Overlap(ours, theirs).sums(name) for name in OVERLAP]
    again = [Overlap(list(ours), theirs).sums(name) for name in OVERLAP]
    for found in compare(sums, again, draw(30), swaps=300):
        assert found == (0, 0, 0, 1, 0)
    other = [Overlap(ours[::-1], theirs).sums(name) for name in OVERLAP]
    for one, back in zip(compare(sums, other, draw(30)), compare(other, sums, draw(30)), strict=True):
        assert one.value == pytest.approx(-back.value)
        assert one.p == pytest.approx(back.p)
        assert (one.low, one.high) == pytest.approx((-back.high, -back.low))


def test_p_is_small_for_a_better_system_and_uniform_for_equal_ones():
    rng = np.random.default_rng(0)
    base = rng.normal(size=40)
    better = compare([Sums.mean(base + 0.5, -9, 9)], [Sums.mean(base + rng.normal(size=40) * 0.1, -9, 9)], draw(40))[0]
    assert better.p < 0.001
    assert better.low > 0
    chances = []
    for _ in range(60):
        a, b = rng.normal(size=(2, 30))
        chances.append(compare([Sums.mean(a, -9, 9)], [Sums.mean(b, -9, 9)], draw(30, 20), swaps=200)[0].p)
    assert 0.3 < np.mean(chances) < 0.7


# Files


def test_order_does_not_matter_and_formats_are_the_same(tmp_path):
    ours, theirs = files(tmp_path)
    wanted = score_reports(ours, theirs, metrics=["sacrebleu_4"])["scores"]
    records = [json.loads(line) for line in ours.read_text().splitlines()]
    (tmp_path / "p.json").write_text(json.dumps(records))
    (tmp_path / "q.json").write_text(json.dumps({str(record["id"]): record["text"] for record in records}))
    with (tmp_path / "p.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["study_id", "findings"])
        table.writeheader()
        table.writerows({"study_id": record["id"], "findings": record["text"]} for record in records)
    write(
        tmp_path / "rad.jsonl",
        [{"id": r["id"], "query": "q", "reference": "x", "prediction": r["text"]} for r in records],
    )
    for name in ("p.json", "q.json", "p.csv", "rad.jsonl"):
        assert score_reports(tmp_path / name, theirs, metrics=["sacrebleu_4"])["scores"] == wanted, name


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([{"id": 1, "text": "a"}], [{"id": 2, "text": "a"}], "p.jsonl: has no report '2', which .*r.jsonl has"),
        ([{"id": 1, "text": "a"}, {"id": 2, "text": "a"}], [{"id": 1, "text": "a"}], "r.jsonl: has no report '2'"),
        ([{"id": 1, "text": "a"}, {"id": "1", "text": "b"}], [{"id": 1, "text": "a"}], "p.jsonl:2: id: '1' is the id"),
        ([{"id": 1, "text": "a"}], [{"id": 1, "text": " "}], "r.jsonl:1: text: report '1' has no findings"),
        ([{"id": 1}], [{"id": 1, "text": "a"}], "p.jsonl:1: text: is missing"),
        ([{"text": "a"}], [{"id": 1, "text": "a"}], "p.jsonl:1: id: is missing"),
        ([{"id": 1, "text": None}], [{"id": 1, "text": "a"}], "p.jsonl:1: text: must be a string"),
        ([{"id": " ", "text": "a"}], [{"id": 1, "text": "a"}], "p.jsonl:1: id: is empty"),
        ([{"id": 1, "text": "a", "report": "b"}], [{"id": 1, "text": "a"}], "text_field|--text-field"),
        ([], [{"id": 1, "text": "a"}], "p.jsonl: has no reports"),
        ([{"id": 1, "text": "a", "labels": {}}], [{"id": 1, "text": "a"}], "labels: need a coding"),
        (
            [{"id": 1, "text": "a", "graph": {"1": {"tokens": "a"}}}],
            [{"id": 1, "text": "a"}],
            "graph.1: must have tokens",
        ),
        (
            [{"id": 1, "text": "a", "graph": {"1": {"tokens": "a", "label": "b", "relations": [["modify", "2"]]}}}],
            [{"id": 1, "text": "a"}],
            "graph.1.relations: .* is no pair",
        ),
        (
            [{"id": 1, "text": "a", "graph": {}}],
            [{"id": 1, "text": "a"}],
            "r.jsonl: report '1' has no graph, others have",
        ),
    ],
)
def test_files_that_do_not_fit_are_one_line(tmp_path, ours, theirs, message):
    paths = write(tmp_path / "p.jsonl", ours), write(tmp_path / "r.jsonl", theirs)
    with pytest.raises(UserError, match=message) as caught:
        score_reports(*paths)
    assert "\n" not in str(caught.value)


def test_labels_have_two_codings(tmp_path):
    words = {"chexbert": [1, 2, 3, 0], "chexpert": [1, 0, -1, None]}
    found = {}
    for coding, values in words.items():
        records = [{"id": n, "text": "a", "labels": {"Edema": value}} for n, value in enumerate(values)]
        own, other = write(tmp_path / "p.jsonl", records), write(tmp_path / "r.jsonl", records)
        result = score("report", own, other, coding=coding)["metrics"]["scores"]
        found[coding] = {name: row for name, row in result.items() if name.startswith("chexbert")}
    assert found["chexbert"] == found["chexpert"]
    assert found["chexbert"]["chexbert_f1_micro_14"]["value"] == 100
    with pytest.raises(RecordError, match=r"labels.Edema: is -1; the classes of chexbert are 0, 1, 2, 3"):
        score("report", own, other, coding="chexbert")
    table = tmp_path / "p.csv"
    table.write_text("id,text,Edema,Fracture\n0,a,1.0,\n1,a,0.0,\n2,a,-1.0,\n3,a,,\n")
    assert score("report", table, other, coding="chexpert")["metrics"]["scores"]["chexbert_f1_micro_14"]["value"] == 100
    table.write_text("id,text,Edema\n0,a\n")
    with pytest.raises(RecordError, match=r"p.csv:2: .*has 2 cells, the header has 3"):
        score("report", table, other, coding="chexpert")


def test_graphs_features_and_notes(tmp_path):
    graph = {"1": {"tokens": "Edema", "label": "OBS-DP", "relations": []}}
    records = [{"id": n, "text": "edema", "graph": graph if n else {}} for n in range(4)]
    own, other = write(tmp_path / "p.jsonl", records), write(tmp_path / "r.jsonl", records)
    save_file({"images": torch.eye(4) * 3, "texts": torch.eye(4)[[0, 1, 3, 2]]}, tmp_path / "f.safetensors")
    found = score("report", own, other, features=tmp_path / "f.safetensors")["metrics"]
    assert found["scores"]["radgraph_partial"]["value"] == 75
    shouted = {"1": graph["1"] | {"tokens": "EDEMA"}}
    loud = write(tmp_path / "loud.jsonl", [record | {"graph": shouted if record["id"] else {}} for record in records])
    told = score("report", loud, other, metrics=["radgraph_simple", "radgraph_lower_simple"])["metrics"]["scores"]
    assert [told[name]["value"] for name in ("radgraph_simple", "radgraph_lower_simple")] == [0, 75]
    assert "radgraph: 1 references have no entities; their F1 is 0" in found["notes"]
    assert found["scores"]["image_to_text_R@1"]["value"] == 50
    assert found["scores"]["text_to_image_R@5"]["value"] == 100
    assert set(NAMES) | {"rubric"} == set(found["scores"]) | set(found["not_computed"])
    save_file({"images": torch.eye(3), "texts": torch.eye(3)}, tmp_path / "f.safetensors")
    with pytest.raises(UserError, match=r"hold 3 pairs, .*r.jsonl has 4 reports"):
        score("report", own, other, features=tmp_path / "f.safetensors")
    save_file({"images": torch.eye(3)}, tmp_path / "f.safetensors")
    with pytest.raises(UserError, match="holds no texts"):
        score("report", own, other, features=tmp_path / "f.safetensors")


def test_graphs_by_the_package(tmp_path, monkeypatch, capsys):
    """A module that answers as the package radgraph stands for it."""
    import types

    class RadGraph:
        def __init__(self, model_type, model_cache_dir, cuda):
            print("Using device: cpu")
            assert (model_type, model_cache_dir, cuda) == ("radgraph-xl", str(tmp_path), -1)

        def __call__(self, texts):
            entity = {"label": "OBS-DP", "relations": []}
            words = [{str(n): entity | {"tokens": word} for n, word in enumerate(text.split())} for text in texts]
            return {str(n): {"text": text, "entities": words[n]} for n, text in enumerate(texts)}

    own = write(tmp_path / "p.jsonl", [{"id": n, "text": text} for n, text in enumerate(("", "a b", "a"))])
    other = write(tmp_path / "r.jsonl", [{"id": n, "text": text} for n, text in enumerate(("a", "a c", "a"))])
    options = {"weights": {"radgraph": str(tmp_path)}, "metrics": "radgraph_simple"}
    monkeypatch.setitem(sys.modules, "radgraph", None)
    found = score("report", own, other, **options)["metrics"]
    assert "needs the package radgraph" in found["not_computed"]["radgraph_simple"]
    monkeypatch.setitem(sys.modules, "radgraph", types.SimpleNamespace(RadGraph=RadGraph))
    with pytest.raises(UserError, match=r"holds no radgraph/weights.th"):
        score("report", own, other, **options)
    (tmp_path / "radgraph-xl").mkdir()
    (tmp_path / "radgraph-xl" / "weights.th").write_text("")
    found = score("report", own, other, **options)["metrics"]["scores"]
    assert found["radgraph_simple"]["value"] == pytest.approx(50)
    assert capsys.readouterr().out == ""


def test_one_report_has_values_but_no_interval(tmp_path):
    one = write(tmp_path / "p.jsonl", [{"id": 1, "text": "a b c d"}])
    found = score("report", one, one, against=one)["metrics"]
    row = found["scores"]["google_rouge_l"]
    assert (row["value"], row["median"], row["low"], row["unscored"]) == (100, 100, None, 0)
    assert (found["scores"]["coco_cider"]["value"], found["scores"]["coco_cider"]["unscored"]) == (None, 500)
    assert found["difference"]["google_rouge_l"]["difference"] == 0
    assert "one report: there is nothing to resample, so nothing has an interval" in found["notes"]
    json.dumps(found, allow_nan=False)


def test_unknown_options_are_named():
    with pytest.raises(UserError, match="there is no 'sacrebleu_5'; did you mean"):
        score_reports(__file__, __file__, metrics=["sacrebleu_5"])
    with pytest.raises(UserError, match="seed=-1: must be from 0"):
        score_reports(__file__, __file__, seed=-1)
    with pytest.raises(UserError, match="'chexbret' is nothing that a metric needs; did you mean 'chexbert'"):
        Sources({"chexbret": "x"})


# Judges


def reply(errors: int) -> str:
    counts = ", ".join(f"({letter}, {errors if letter == 'A' else 0})" for letter in "ABCDEF")
    rubric = read_rubric("chexprompt")
    return "\n".join(f"{heading} [{counts}]" for heading in rubric.severities.values())


def test_a_judge_counts_errors_and_what_it_does_not_say_is_left_out(tmp_path):
    ours = write(tmp_path / "p.jsonl", [{"id": n, "text": f"candidate {n}"} for n in range(6)])
    theirs = write(tmp_path / "r.jsonl", [{"id": n, "text": "reference"} for n in range(6)])
    asked: dict[str, int] = {}

    def answer(body):
        prompt = body["messages"][-1]["content"]
        number = prompt.rpartition("candidate ")[2][0]
        asked[number] = asked.get(number, 0) + 1
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0, 0.9, 128)
        assert body["messages"][0]["role"] == "system"
        if number == "5":
            return Failure(400)
        if number == "4" or (number == "3" and asked[number] == 1):
            return completion("I would say: " + reply(1).replace(": [", ":["))
        return completion(reply(int(number)))

    with FakeAPI(answer) as api:
        options = {"judge": "m", "base_url": api.url, "metrics": "google_rouge_l", "rubric": "chexprompt"}
        found = score("report", ours, theirs, **options)["metrics"]
    scores = found["scores"]
    assert scores["chexprompt_significant"]["value"] == pytest.approx(1.5)  # 0, 1, 2 and, asked again, 3
    assert scores["chexprompt_errors"]["value"] == pytest.approx(3)
    assert scores["chexprompt_error_free"]["value"] == pytest.approx(25)
    assert scores["chexprompt_significant_omission_finding"]["value"] == 0
    assert (found["judge"]["unreadable"], found["judge"]["failed_calls"]) == (1, 1)
    assert (found["judge"]["model"], asked["4"], asked["0"]) == ("m", 2, 1)


def test_a_rubric_of_ones_own_in_json(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nprompt: 'Count errors of {candidate} against {reference}; {\"x\": 1}'\n"
        "errors: {side: wrong_side, size: wrong_size}\nseverities: {any: ''}\nformat: json\n"
    )
    rubric = read_rubric(tmp_path / "mine.yaml")
    assert rubric.messages("R", "C{reference}") == [
        {"role": "user", "content": 'Count errors of C{reference} against R; {"x": 1}'}
    ]
    assert rubric.counts('Here: {"any": {"side": 1, "wrong_size": 2}}') == [{"wrong_side": 1, "wrong_size": 2}]
    broken = ("3", '{"side": 1}', '{"side": -1, "size": 0}', '{"side": true, "size": 0}', '{"side": 1.5, "size": 0}')
    for malformed in ("", "{", '{"all": {}}', "{" * 5000 + "}", *(f'{{"any": {value}}}' for value in broken)):
        assert rubric.counts(malformed) is None, malformed
    paths = files(tmp_path, 3)
    with FakeAPI(lambda body: completion("no idea")) as api:
        message = "mine: no reply of m has the form; the first is 'no idea'"
        with pytest.raises(UserError, match=message):
            score("report", *paths, metrics="pypi_rouge_l", rubric=tmp_path / "mine.yaml", judge="m", base_url=api.url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "x {candidate}"}, r"prompt: must contain \{reference\}"),
        ({"format": "xml"}, "format: is 'xml'; it must be lists or json"),
        ({"errors": {"A": "two words"}}, "errors: 'two words' must be a word"),
        ({"errors": {"A": "x", "B": "x"}}, "errors: two letters have the same type"),
        ({"errors": {}}, "errors: is missing"),
        ({"severities": {"a": "Same:", "b": "Same:"}}, "severities: each needs a heading"),
        ({"sampling": {"temprature": 0}}, "sampling: unknown option 'temprature'; did you mean 'temperature'"),
        ({"sampling": {"max_tokens": 1.5}}, "sampling.max_tokens: is 1.5"),
        ({"promt": "x"}, "unknown field 'promt'; did you mean 'prompt'"),
        ({"name": 3}, "name: is 3; it must be a text"),
    ],
)
def test_broken_rubrics_are_one_line(tmp_path, change, message):
    whole = {"name": "a", "prompt": "{candidate} {reference}", "errors": {"A": "x"}, "severities": {"a": "Errors:"}}
    (tmp_path / "r.yaml").write_text(json.dumps(whole | change))
    with pytest.raises(UserError, match=message):
        read_rubric(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="no rubric of that name and no such file; did you mean 'chexprompt'"):
        read_rubric("chexpromt")


# The command


def test_the_command_prints_all_and_compares_two(tmp_path, capsys):
    ours, theirs = files(tmp_path)
    other = write(tmp_path / "o.jsonl", [{"id": n, "text": "no"} for n in range(12)])
    arguments = ["score", "report", "--predictions", str(ours), "--references", str(theirs), "--swaps", "100"]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "12 reports, 500 resamples, seed 3" in printed
    for name in NAMES:
        assert name in printed
    assert "needs --weights chexbert=PATH" in printed
    assert "1 of 12 predictions are empty" in printed
    assert run([*arguments, "--predictions", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["difference"]["sacrebleu_1"]) == {"difference", "low", "high", "p", "unscored"}
    assert run([*arguments, "--predictions", str(other)]) == 0
    assert "difference" in capsys.readouterr().out
    assert run([*arguments, "--predictions", str(other), "--predictions", str(other)]) == 2
    assert run(["score", "report", "--predictions", str(ours)]) == 2
    assert "give --predictions FILE and --references FILE" in capsys.readouterr().err


def test_benchmarks_are_scored_beside_it(tmp_path, capsys):
    gold = write(tmp_path / "gold.jsonl", [{"question_id": 1, "text": "?", "answer": "yes"}])
    own = write(tmp_path / "own.jsonl", [{"question_id": 1, "text": "yes"}])
    for arguments in (["exact_match", "--predictions", str(own)], ["--predictions", str(own), "exact_match"]):
        assert run(["score", *arguments, "--gold", str(gold), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["metrics"]["accuracy"] == 100
    assert run(["score", "--help"]) == 0
    assert "report" in capsys.readouterr().out
