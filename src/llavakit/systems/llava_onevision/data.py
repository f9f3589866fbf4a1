"""What LLaVA-OneVision's training did to records before they were encoded: placement, cleaning, times of frames."""

from __future__ import annotations

from collections.abc import Sequence

from llavakit.conversation.messages import Message, Part, is_media, text_of
from llavakit.media.frame_sampling import step

NOISE = "QA_GT_caption_based_noisy"  # a left-over of VideoInstruct-100K


def lead_with_media(messages: Sequence[Message]) -> list[Message]:
    """Messages in which the only media item of a turn stands in front; turns that begin with it, or have several, stay.

    The template `qwen_1_5` does the same while it renders.
    """
    moved = []
    for message in messages:
        media = [part for part in message["content"] if is_media(part)]
        if len(media) == 1 and not is_media(message["content"][0]):
            text = text_of(message).strip()
            content: list[Part] = [media[0], {"type": "text", "text": f"\n{text}" if text else ""}]
            message = message | {"content": content}
        moved.append(message)
    return moved


def without_noise(messages: Sequence[Message]) -> list[Message]:
    """Messages without the marker text that VideoInstruct-100K left in its answers."""

    def clean(part: Part) -> Part:
        return part | {"text": part["text"].replace(NOISE, "")} if part["type"] == "text" else part

    return [message | {"content": [clean(part) for part in message["content"]]} for message in messages]


def sampled_times(
    total: int, average_rate: float, fps: float = 1.0, max_frames: int = 0, force: bool = False
) -> tuple[list[int], list[float]]:
    """Frames that training read from a video, and the times it gave them in seconds.

    Frames that were counted off are timed as if one step were one second, also where `fps` is not 1 or the rate is
    not a whole number; frames spread over the video are timed by its rate (spec section 4, golden `video_sampling`).

    Args:
        total: Frames of the video.
        average_rate: Frames per second.
        fps, max_frames, force: See `llavakit.media.frame_sampling.step`.
    """
    indices = step(total, average_rate, fps, max_frames, force)
    stride = max(round(average_rate / fps), 1)
    spread = bool(max_frames) and (force or len(range(0, total, stride)) > max_frames)
    return indices, [index / (average_rate if spread else stride) for index in indices]


def listed_times(times: Sequence[float]) -> str:
    """Times as the instruction lists them: `0.00s,1.00s`."""
    return ",".join(f"{time:.2f}s" for time in times)


def time_instruction(duration: float, times: Sequence[float]) -> str:
    """The sentence about a video's length and the times of its frames, as LLaVA-Video was trained with it.

    There is no space after the list of times, as published.

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
    """Messages whose first turn begins with its video and the time instruction; the rest of its text follows."""
    first, *others = messages
    video = next(part for part in first["content"] if is_media(part))
    text = f"\n{time_instruction(duration, times)}\n{text_of(first)}"
    return [first | {"content": [video, {"type": "text", "text": text}]}, *others]
