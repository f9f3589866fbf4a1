"""Video-LLaVA's templates: Vicuna's, with media where the text has them."""

from dataclasses import replace

from llavakit.conversation.builtin import CURIOUS_HUMAN, VICUNA_V1

# a curious user, while it was trained
TRAINING = replace(VICUNA_V1, name="video_llava_training", placement="keep", most_images=16)
INFERENCE = replace(TRAINING, name="video_llava", system=CURIOUS_HUMAN)
