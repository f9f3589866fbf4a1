"""A tiny tokenizer with Llama's conventions, trained within a second on the sentences of a phantom world.

It behaves like the tokenizer of Llama-2 and Vicuna in all that matters to templates and label masks: ids 0, 1, 2 are
`<unk>`, `<s>`, `</s>`; a space is part of the following word; text after a special token starts a new word; `<s>` is
prepended; unknown characters are spelled in bytes, so any text survives the round trip.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llavakit.errors import UserError
from llavakit.phantom.words import shared_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS, IMAGE = "<unk>", "<s>", "</s>", "<image>"
_BLANK = "▁"
_BYTES = [f"<0x{value:02X}>" for value in range(256)]


def tiny_tokenizer(
    texts: Iterable[str] = (),
    vocab_size: int = 1200,
    *,
    specials: tuple[str, ...] = (IMAGE,),
    byte_fallback: bool = True,
) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer whose frequent words are single tokens.

    The same texts give the same tokenizer, in every process. The sentences that all worlds share (the system
    sentence, the response formats) are always part of the training text.

    Args:
        texts: Sentences, such as `World.texts()` or the contents of `texts.txt`.
        vocab_size: Upper limit of the number of ids, special tokens included.
        specials: Tokens added at the end of the vocabulary that are never split (media placeholders).
        byte_fallback: Spell unknown characters in 256 byte tokens instead of mapping them to `<unk>`.

    Raises:
        UserError: If the vocabulary is too small for the characters alone.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def frame(model: models.BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)])
        return tokenizer

    # Training units are words; punctuation and line breaks are separate.
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_BLANK, "merged_with_next"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    reserved = [UNK, BOS, EOS, *(_BYTES if byte_fallback else [])]
    trainee = frame(models.BPE())
    trainee.pre_tokenizer = split
    # The trainer prefers frequent words; each shared sentence counts as often as a common question.
    corpus = [*texts]
    # A question follows a placeholder and a line break, so each first word occurs without a space too.
    corpus += [f"\n{text}" for text in corpus]
    corpus += shared_texts() * max(4, len(corpus) // 100)
    alphabet = sorted(set("".join(corpus).replace(" ", _BLANK)) | {_BLANK, "\n", *map(chr, range(33, 127))})
    budget = vocab_size - len(reserved) - len(specials)
    if budget < len(alphabet):
        raise UserError(f"vocab_size: {vocab_size} is too small; {vocab_size - budget + len(alphabet)} is the least")
    trainer = trainers.BpeTrainer(vocab_size=budget, initial_alphabet=alphabet, show_progress=False)
    trainee.train_from_iterator(corpus, trainer)
    learned = json.loads(trainee.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {piece: index for index, piece in enumerate([*reserved, *pieces])}
    tokenizer = frame(
        models.BPE(
            vocab=vocabulary,
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_BLANK, " "),
            *([decoders.ByteFallback()] if byte_fallback else []),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (UNK, BOS, EOS, *specials)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=UNK,
        additional_special_tokens=list(specials),
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
