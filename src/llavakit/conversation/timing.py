"""The sentence about a video's length and the times of its frames, as LLaVA-Video was trained with it."""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.conversation.messages import Message, is_media, text_of


def listed_times(times: Sequence[float]) -> str:
    """Times as the instruction lists them: `0.00s,1.00s`."""
    return ",".join(f"{time:.2f}s" for time in times)


def time_instruction(duration: float, times: Sequence[float]) -> str:
    """The sentence. There is no space after the list of times, as published.

    Args:
        duration: Seconds of the whole video.
        times: Seconds from the start, per frame.
    """
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly sampled from it. "
        f"These frames are located at {listed_times(times)}."
        "Please answer the following questions related to this video."
    )


def with_time_instruction(messages: Sequence[Message], duration: float, times: Sequence[float]) -> list[Message]:
    """Messages in which the turn with the video begins with it and the time instruction, and goes on with its text."""
    place = next(n for n, message in enumerate(messages) if any(map(is_media, message["content"])))
    turn = messages[place]
    video = next(part for part in turn["content"] if is_media(part))
    text = f"\n{time_instruction(duration, times)}\n{text_of(turn)}"
    timed = turn | {"content": [video, {"type": "text", "text": text}]}
    return [*messages[:place], timed, *messages[place + 1 :]]
