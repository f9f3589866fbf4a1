"""Ask a model about a picture and go on talking: python examples/chat.py MODEL PICTURE QUESTION [QUESTION]..."""

import sys

import llavakit

model_path, picture, *questions = sys.argv[1:]
model = llavakit.load(model_path)
messages = []
for number, question in enumerate(questions):
    parts = [{"type": "text", "text": question}]
    if number == 0:
        parts.insert(0, {"type": "image", "image": picture})
    messages.append({"role": "user", "content": parts})
    print(f"> {question}")
    reply = ""
    for piece in model.stream(messages, max_new_tokens=128):
        print(piece, end="", flush=True)
        reply += piece
    print()
    messages.append({"role": "assistant", "content": reply})
