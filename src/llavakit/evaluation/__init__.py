"""Evaluation: answer processors, metrics, benchmarks in their published file formats, judges, runs and scores.

    processors      text of an answer -> what is compared
    metrics/        answers and references -> numbers
    benchmarks/     questions, prompts, submissions and scores of each benchmark
    score           `score(task, predictions, gold)`: a finished predictions file -> metrics
    run             `evaluate(model, task, questions)`: a model -> predictions file -> metrics
    judges          a language model as judge, over an OpenAI-compatible API

Importing this package registers the benchmarks by name and loads nothing heavy.
"""

from llavakit.registry import BENCHMARKS

_BENCHMARKS = {
    "vqav2": "vqa:VQAv2",
    "vizwiz": "vqa:VizWiz",
    "gqa": "gqa:GQA",
    "textvqa": "textvqa:TextVQA",
    "scienceqa": "scienceqa:ScienceQA",
    "pope": "pope:POPE",
    "mmbench": "mmbench:MMBench",
    "mmbench-cn": "mmbench:MMBenchChinese",
    "seed": "seed:SEEDBench",
    "mme": "mme:MME",
    "mmvet": "mmvet:MMVet",
    "llava-bench": "judged:LLaVABench",
    "video_qa": "video_qa:VideoQA",
    "mvbench": "choices:MVBench",
    "mlvu": "choices:MLVU",
    "egoschema": "choices:EgoSchema",
    "referring": "referring:Referring",
    "exact_match": "generic:ExactMatch",
    "phantom": "generic:Phantom",
    "anls": "generic:ANLS",
    "relaxed_accuracy": "generic:RelaxedAccuracy",
    "text_overlap": "overlap:TextOverlap",
    "report": "report:ReportScores",
    "agreement": "agreement:Agreement",
    "likelihood": "likelihood:LikelihoodChoice",
    "arena": "arena:Arena",
    "verdict_agreement": "agreement:VerdictAgreement",
    "classes": "classes:Classes",
    "five_aspects": "five_aspects:FiveAspects",
    "video_chatgpt_qa": "video_chatgpt_qa:VideoChatGPTQA",
}

for _name, _target in _BENCHMARKS.items():
    BENCHMARKS.add(_name, f"llavakit.evaluation.benchmarks.{_target}")
