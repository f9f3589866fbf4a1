"""The chat templates of the LLaVA family: system texts, end markers and label rules by name."""

from __future__ import annotations

from dataclasses import replace

from llavakit.conversation.template import Marks, Rounds, Template
from llavakit.registry import TEMPLATES


def _register(template: Template, *aliases: str) -> None:
    for name in (template.name, *aliases):
        TEMPLATES.add(name, template)


# Vicuna v1: SYSTEM USER: ... ASSISTANT: ...</s>USER: ...

CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CURIOUS_HUMAN = CURIOUS_USER.replace("curious user", "curious human").replace("the user's", "the human's")
SEES_THE_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language."
)
# The original joins the two sentences without a space.
MMTAG = SEES_THE_USER + (
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)

VICUNA_V1 = Template(
    "vicuna_v1",
    "vicuna",
    CURIOUS_USER,
    stop=("</s>",),
    values={"end": "</s>"},
    rounds=Rounds(end="</s>", answer=" ASSISTANT: ", answer_offset=-2, later_offset=-1),
)
_register(VICUNA_V1, "v1")
_register(replace(VICUNA_V1, name="llava_v1", system=CURIOUS_HUMAN))
IMAGE_TAGS = {"before": "<Image>", "after": "</Image>"}
_register(replace(VICUNA_V1, name="v1_mmtag", system=MMTAG, values={"end": "</s>", **IMAGE_TAGS}))

# Captions without roles: the media, then the caption

PLAIN = Template("plain", "plain", stop=("\n",), values={"end": "\n"}, placement="keep", training="plain_training")
_register(PLAIN, "v0_plain")

# Llama 2 and Mistral: [INST] ... [/INST] ... </s>

SEES = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
HARMLESS = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)

LLAMA_2 = Template(
    "llama_2",
    "llama_2",
    HARMLESS,
    stop=("</s>",),
    values={"begin": "<s>"},
    rounds=Rounds(end="</s>", answer="[/INST] ", answer_offset=-2),
)
_register(LLAMA_2)
_register(replace(LLAMA_2, name="llava_llama_2", system=SEES))
_register(replace(LLAMA_2, name="mistral_instruct", system="", values={"begin": ""}))

# ChatML without a newline between turns (MPT, Yi-34B) and with one (Qwen)

ASSISTANT_HEADER = "<|im_start|>assistant\n"
MPT = Template(
    "mpt",
    "chatml",
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.",
    stop=("<|im_end|>",),
    values={"between": "", "opens_empty": True},
    rounds=Rounds(end="<|im_end|>", answer="<|im_end|>" + ASSISTANT_HEADER, grouped=2, begin=0, counts_end=True),
)
_register(MPT)
_register(replace(MPT, name="chatml_direct", system="Answer the questions."), "mistral_direct")

QWEN = Template(
    "qwen_1_5",
    "chatml",
    "You are a helpful assistant.",
    stop=("<|im_end|>",),
    values={"between": "\n"},
    training_values={"keeps_empty": True},  # a reply without text is open in a prompt and closed in a sample
    placement="lead",
    labels="marks",
    marks=Marks(header=ASSISTANT_HEADER, after="\n", everywhere=("\n", "<|im_start|>", "<|im_end|>")),
)
_register(QWEN, "qwen_2")
_register(replace(QWEN, name="qwen_2_5", system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."))

# Gemma

_register(Template("gemma_instruct", "gemma", stop=("<end_of_turn>",)))

# Llama 3

LLAMA_3 = Template("llama_3", "llama_3", stop=("<|eot_id|>",), values={"trims": True}, bos="once")
_register(LLAMA_3)
_register(replace(LLAMA_3, name="llava_llama_3", system=SEES, values={"trims": False}, bos="double"))

# The first LLaVA: ###Human: ... ###Assistant: ...

_EXAMPLE_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_EXAMPLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of"
    " time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the "
    "other hand, are finite and will eventually be depleted, such as coal, oil, and natural gas. Here are"
    " some key differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy "
    "sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and "
    "other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have"
    " lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
    "locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
    "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social instability.\n"
)

LLAVA_V0 = Template(
    "llava_v0",
    "hashes",
    CURIOUS_HUMAN,
    stop=("###",),
    values={"preset": []},
    keeps_first_answer=True,
    training="hashes_training",
)
_register(LLAVA_V0)
_register(replace(LLAVA_V0, name="v0_mmtag", system=MMTAG, values={"preset": [], **IMAGE_TAGS}))
_register(
    replace(
        LLAVA_V0,
        name="v0",
        values={"preset": [["Human", _EXAMPLE_QUESTION], ["Assistant", _EXAMPLE_ANSWER]]},
    ),
    "default",
)
