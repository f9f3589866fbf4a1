"""Two ways to cut a map into n x n pieces, and back (INF-LLaVA section 3, "dual-perspective cropping").

A *block* is contiguous: sharp detail of one place. An *interleaved* piece takes every n-th row and column: a coarse
picture of everything. Pieces are numbered row by row; cutting and merging are inverse to each other. Cutting works on
torch tensors and NumPy arrays alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def blocks(images: Any, n: int) -> list[Any]:
    """The n * n contiguous pieces of [..., height, width]."""
    height, width = (side // n for side in images.shape[-2:])
    return [
        images[..., row * height : (row + 1) * height, col * width : (col + 1) * width]
        for row in range(n)
        for col in range(n)
    ]


def interleaved(images: Any, n: int) -> list[Any]:
    """The n * n pieces of [..., height, width] that take every n-th row and column."""
    return [images[..., row::n, col::n] for row in range(n) for col in range(n)]


def merge_blocks(pieces: Tensor, n: int) -> Tensor:
    """[batch, n * n, rows, columns, width] to [batch, n * rows, n * columns, width]."""
    grid = pieces.unflatten(1, (n, n))  # [batch, n, n, rows, columns, width]
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def merge_interleaved(pieces: Tensor, n: int) -> Tensor:
    """The same for interleaved pieces."""
    grid = pieces.unflatten(1, (n, n))  # [batch, n, n, rows, columns, width]
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)


def split_blocks(maps: Tensor, n: int) -> Tensor:
    """Inverse of `merge_blocks`."""
    return torch.stack(blocks(maps.movedim(-1, 1), n), dim=1).movedim(2, -1)


def split_interleaved(maps: Tensor, n: int) -> Tensor:
    """Inverse of `merge_interleaved`."""
    return torch.stack(interleaved(maps.movedim(-1, 1), n), dim=1).movedim(2, -1)
