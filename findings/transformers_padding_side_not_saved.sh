#!/usr/bin/env bash
# tokenizer.padding_side = "left" is not saved: save_pretrained writes the arguments of the constructor, so the folder says
# nothing and from_pretrained gives "right" again. Decoder-only models then generate from padded prompts in batches, with a
# warning at most. Setting tokenizer.init_kwargs["padding_side"] as well does save it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print("transformers", transformers.__version__)
backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
found = []
for also_in_arguments in (False, True):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.padding_side = "left"
    if also_in_arguments:
        tokenizer.init_kwargs["padding_side"] = "left"
    place = f"{sys.argv[1]}/{also_in_arguments}"
    tokenizer.save_pretrained(place)
    found.append(AutoTokenizer.from_pretrained(place).padding_side)
print("attribute alone, saved and loaded:        ", found[0])
print("attribute and init_kwargs, saved and loaded:", found[1])
if found != ["right", "left"]:
    raise SystemExit("the behaviour has changed")
print("confirmed: the attribute alone is lost")
PYTHON
