"""Robust CLIP: FARE and TeCoA encoders that attacks on pictures hardly move, as drop-in towers for any LLaVA."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="robust-clip",
    title="Robust CLIP (FARE)",
    paper="2402.12336",
    summary="Measure how far invisible changes of a picture move a model's answers, and swap in an encoder that holds.",
    claims=(
        Claim(
            "An encoder that FARE fine-tunes without labels takes the place of CLIP in a finished model without "
            "retraining: clean answers stay, attacked ones hold far better.",
            "section 4, tables 1 and 2",
        ),
        Claim("TeCoA, which learns from class labels, loses what its labels do not name.", "section 3.2, table 4"),
    ),
    checkpoints=(
        *("chs20/fare2-clip", "chs20/fare4-clip", "chs20/tecoa2-clip", "chs20/tecoa4-clip"),
        "chs20/FARE4-ViT-B-32-laion2B-s34B-b79K",
    ),
    parts={
        "templates": {"open_flamingo": ".open_flamingo:OPEN_FLAMINGO"},
        "label_policies": {"after_last_colon": ".open_flamingo:AfterLastColon"},
        "benchmarks": {"robust_vqa": ".benchmarks:RobustVQA"},
        "preparations": {
            "robust_encoder": ".weights:robust_encoder",
            "open_clip_encoder": ".weights:open_clip_encoder",
        },
    },
)
