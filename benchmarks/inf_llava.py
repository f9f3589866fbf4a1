"""INF-LLaVA's pictures: 18 views encoded together, beside the published loop of 19 passes.

    OMP_NUM_THREADS=1 python benchmarks/inf_llava.py [--width 256] [--layers 24] [--pictures 1] [--repeats 3]

Both sides start from normalised pictures of 1008 x 1008 and end with 576 projected tokens each; both have the same
weights and the same attention kernel. The loop is written from the published description: every view goes through all
layers of transformers' CLIP by itself, and layer -2 is picked from its hidden states. llavakit leaves out what nobody
reads: the whole view (it is the middle interleaved piece) and the last layer. Equal tokens are asserted, and the two
savings are also shown apart, in loops of 18 views.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModel

from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration

VIEW, PATCH, CROPS = 336, 14, 3
GRID = VIEW // PATCH


def build(width: int, layers: int) -> LlavakitForConditionalGeneration:
    """The model with random weights; its decoder is never run."""
    torch.manual_seed(0)
    heads = max(width // 64, 1)
    config = LlavakitConfig(
        text_config={"model_type": "llama", "hidden_size": 4 * width, "intermediate_size": 8, "num_hidden_layers": 1}
        | {"num_attention_heads": heads, "vocab_size": 64},
        vision_config={"model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": 4 * width}
        | {"num_hidden_layers": layers, "num_attention_heads": heads, "image_size": VIEW, "patch_size": PATCH},
        connector={"type": "dual_perspective", "crops": CROPS, "heads": 8},
        media={"image": {"views": {"type": "dual_perspective", "size": VIEW, "crops": CROPS}}},
        image_token_id=63,
    )
    return LlavakitForConditionalGeneration(config).eval()


class Published:
    """The published way from pictures to tokens, with the weights of a llavakit model.

    Args:
        whole: Whether the whole view is encoded by itself, as published.
        last: Whether the last layer is run, as published.
    """

    def __init__(self, model: LlavakitForConditionalGeneration, *, whole: bool = True, last: bool = True) -> None:
        self.connector, self.whole = model.model.multi_modal_projector, whole
        tower = model.model.vision_tower
        self.tower = CLIPVisionModel(tower.config).eval()
        self.tower.load_state_dict(tower.state_dict())
        self.layer = -2
        if not last:
            getattr(self.tower, "vision_model", self.tower).encoder.layers = tower.encoder.layers[:-1]
            self.layer = -1

    def features(self, view: Tensor) -> Tensor:
        """[pictures, rows, columns, width] of one view of every picture."""
        states = self.tower(view, output_hidden_states=True).hidden_states
        return states[self.layer][:, 1:].unflatten(1, (GRID, GRID))

    def __call__(self, pictures: Tensor) -> Tensor:
        """[pictures, tokens, hidden]."""
        big = F.interpolate(pictures.float(), size=(CROPS * VIEW, CROPS * VIEW), mode="bicubic")
        ids = [(row, col) for row in range(CROPS) for col in range(CROPS)]
        cut = [big[:, :, r * VIEW : (r + 1) * VIEW, c * VIEW : (c + 1) * VIEW] for r, c in ids]
        local = [self.features(view) for view in cut]
        sampled = [self.features(big[:, :, r::CROPS, c::CROPS]) for r, c in ids]
        middle = sampled[len(sampled) // 2]
        whole = self.features(F.interpolate(pictures, size=(VIEW, VIEW), mode="bicubic")) if self.whole else middle
        mixed = (whole + self.enhance(local, sampled)) / 2
        first, second = self.connector.linear_1, self.connector.linear_2
        return second(F.gelu(first(mixed.flatten(1, 2))))

    def enhance(self, local: list[Tensor], sampled: list[Tensor]) -> Tensor:
        """The enhancement module, group by group as published [pictures, rows, columns, width]."""
        dem, side = self.connector.dem, CROPS * GRID
        low, high = (torch.empty(len(local[0]), side, side, local[0].shape[-1]) for _ in range(2))
        for number, (block, piece) in enumerate(zip(local, sampled, strict=True)):
            row, col = divmod(number, CROPS)
            low[:, row * GRID : (row + 1) * GRID, col * GRID : (col + 1) * GRID] = block
            high[:, row::CROPS, col::CROPS] = piece
        better_low, better_high = torch.empty_like(low), torch.empty_like(high)
        for number in range(CROPS**2):
            row, col = divmod(number, CROPS)
            block = (slice(None), slice(row * GRID, (row + 1) * GRID), slice(col * GRID, (col + 1) * GRID))
            piece = (slice(None), slice(row, None, CROPS), slice(col, None, CROPS))
            for query, key, place, out in ((high, low, block, better_high), (low, high, piece, better_low)):
                groups = query[place].flatten(1, 2), key[place].flatten(1, 2)
                out[place] = dem.attention(*groups, groups[1]).unflatten(1, (GRID, GRID))
        fused = torch.cat([dem.ffn_crop(better_low), dem.ffn_stride(better_high)], dim=-1)
        fused = dem.ln_fuse(fused + better_high + better_low).movedim(-1, 1)
        return F.interpolate(fused, size=(GRID, GRID), mode="bilinear").movedim(1, -1)


def together(model: LlavakitForConditionalGeneration) -> Callable[[Tensor], Tensor]:
    """llavakit's way from the same pictures."""
    planner, side = model.model.media.route("image").planner, CROPS * VIEW

    def tokens(pictures: Tensor) -> Tensor:
        views = [torch.from_numpy(view) for picture in pictures.numpy() for view in planner.split(picture)]
        sizes = torch.tensor([[1, side, side]] * len(pictures))
        return torch.stack(model.get_image_features(views, visual_sizes=sizes).pooler_output)

    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 256, "layers": 24, "pictures": 1, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build(args.width, args.layers)
    pictures = torch.randn(args.pictures, 3, CROPS * VIEW, CROPS * VIEW, generator=torch.Generator().manual_seed(0))
    arms = {
        "loop of 19 views, all layers (as published)": Published(model),
        "loop of 18 views, all layers": Published(model, whole=False),
        "loop of 18 views, layers that are read": Published(model, whole=False, last=False),
        "18 views in parts, layers that are read (llavakit)": together(model),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    tokens: dict[str, Tensor] = {}
    with torch.no_grad():
        for arm in list(arms.values())[:3]:
            arm.features(pictures[:, :, :VIEW, :VIEW])  # warms up
        for _ in range(args.repeats):
            for name, arm in arms.items():
                start = time.process_time()
                tokens[name] = arm(pictures)
                seconds[name].append(time.process_time() - start)
    wanted, *others = tokens.values()
    difference = max(float((other - wanted).abs().max()) for other in others)
    scale = float(wanted.abs().max())
    assert difference <= 1e-4 * scale, f"tokens differ by {difference} of {scale}"
    print(
        f"CLIP {args.layers} x {args.width}, {args.pictures} picture(s) of {CROPS * VIEW} x {CROPS * VIEW}, float32, "
        f"torch {torch.__version__}, 1 thread, processor time, median of {args.repeats}; "
        f"tokens differ by {difference:.1g} of {scale:.2g}\n\n| | seconds | ratio |\n|---|---|---|"
    )
    base = statistics.median(seconds["loop of 19 views, all layers (as published)"])
    for name, own in seconds.items():
        print(f"| {name} | {statistics.median(own):.2f} | {statistics.median(own) / base:.2f} |")


if __name__ == "__main__":
    main()
