"""Ask about a stretch of a video: python examples/video.py MODEL VIDEO QUESTION [START END]"""

import sys

import llavakit

model_path, video, question, *span = sys.argv[1:]
model = llavakit.load(model_path)
model.configure({"sampling.type": "uniform", "sampling.frames": 8})  # as many frames, evenly spread
clip = {"type": "video", "video": video}
if span:
    clip |= {"start": float(span[0]), "end": float(span[1])}  # in seconds
content = [clip, {"type": "text", "text": question}]
print(model.chat([{"role": "user", "content": content}], max_new_tokens=128))
