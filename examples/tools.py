"""Give a model a tool that runs here: python examples/tools.py MODEL PICTURE QUESTION"""

import sys

import numpy as np

import llavakit
from llavakit.conversation.turns import TextDelta, TraceEvent
from llavakit.tools import Outcome, Skill, Toolbox
from llavakit.tools.agent import ToolAgent
from llavakit.tools.skill import parameters, picture


def brightness(image):
    return Outcome(data={"mean": round(float(np.asarray(image.convert("L")).mean()), 1)})


skill = Skill(
    name="brightness",
    description="Mean brightness of the picture, 0 (black) to 255 (white).",
    parameters=parameters(image=picture()),
    function=brightness,
)
model_path, path, question = sys.argv[1:]
agent = ToolAgent(llavakit.load(model_path, responder="plain"), tools=Toolbox([skill]))
content = [{"type": "image", "image": path}, {"type": "text", "text": question}]
for event in agent.respond([{"role": "user", "content": content}], max_new_tokens=128):
    if isinstance(event, TextDelta):
        print(event.text, end="", flush=True)
    elif isinstance(event, TraceEvent):  # the calls and what they gave
        print(f"\n[{event.name}: {event.data}]")
print()
