"""Med42-v2's chat template: Llama-3's with the model card's system text.

NOT FOR CLINICAL USE: the authors ask that the model be tested for safety before any use in care. A default system text
changes nothing about that; llavakit shows this notice in the system's page and recipes.
"""

from __future__ import annotations

from dataclasses import replace

from llavakit.conversation.builtin import LLAMA_3

NOTICE = (
    "Med42-v2 is not ready for clinical use: it may produce wrong or harmful answers, and its authors ask for "
    "extensive human evaluation before any application in care."
)
CARD_SYSTEM = (
    "You are a helpful, respectful and honest medical assistant. You are a second version of Med42 developed by the AI "
    "team at M42, UAE. Always answer as helpfully as possible, while being safe. Your answers should not include any "
    "harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses are "
    "socially unbiased and positive in nature. If a question does not make any sense, or is not factually coherent, "
    "explain why instead of answering something not correct. If you don’t know the answer to a question, please don’t "
    "share false information."
)
# An empty turn is written as one, as the template of the published tokenizer does.
MED42_V2 = replace(LLAMA_3, name="med42_v2", system=CARD_SYSTEM, values={**LLAMA_3.values, "keeps_empty": True})
