"""LLaVA-Critic: LLaVA-OneVision taught to judge answers, with reasons; rewards for preference training."""

from llavakit.system import Claim, System

SYSTEM = System(
    package=__name__,
    slug="llava-critic",
    title="LLaVA-Critic",
    paper="2410.02712",
    summary="Score an answer about a picture, or say which of two is better, with the reasons in writing.",
    claims=(
        Claim(
            "Rewards from an open judge that sees every pair of answers in both orders improve a policy by DPO.",
            "section 5.2, table 5",
        ),
        Claim("A model trained on judgements agrees with GPT-4o's scores far better than its base.", "section 5.1"),
    ),
    checkpoints=("lmms-lab/llava-critic-7b", "lmms-lab/llava-critic-72b"),
    parts={
        "templates": {"qwen_1_5_preference": ".templates:QWEN_PREFERENCE"},
        "comparisons": {"critic": ".prompts:CriticComparison"},
        "label_policies": {"turn_marks": ".templates:TurnMarks"},
        "benchmarks": {
            "critic-pointwise": ".benchmarks:CriticScore",
            "critic-pairwise": ".benchmarks:CriticPairs",
            "llava-wilder": ".benchmarks:Wilder",
            "wildvision": ".benchmarks:WildVision",
            "vl-rewardbench": ".benchmarks:RewardBench",
            "video-captions": ".benchmarks:VideoCaptions",
        },
    },
)
