"""Ask the same about all pictures of a folder: python examples/batch.py MODEL FOLDER QUESTION OUT.jsonl"""

import json
import sys
from pathlib import Path

import llavakit
from llavakit.errors import UserError

model_path, folder, question, out = sys.argv[1:]
model = llavakit.load(model_path, max_batch=16)
pictures = sorted(path for path in Path(folder).iterdir() if path.suffix in (".png", ".jpg", ".jpeg"))
conversations = [
    [{"role": "user", "content": [{"type": "image", "image": str(path)}, {"type": "text", "text": question}]}]
    for path in pictures
]
with open(out, "w", encoding="utf-8") as file:
    for begin in range(0, len(pictures), 64):
        answers = model.answer_all(conversations[begin : begin + 64], max_new_tokens=64)
        for picture, answer in zip(pictures[begin : begin + 64], answers, strict=True):
            broken = isinstance(answer, UserError)  # a picture that cannot be read stops no other
            row = {"image": picture.name} | ({"error": str(answer)} if broken else {"answer": answer.content})
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
print(f"{len(pictures)} answers in {out}")
