"""Transforms of the channels around the mixers: (..., P) → (..., P), P a power of two.

Walsh–Hadamard is the released network's, none at all its alternative for ablations. Both are
symmetric and undo themselves, H = Hᵀ = H⁻¹, so the transform back is the transform itself, and a
product that follows may have it in its weights, W·(H x) = (H W)·x with H applied to the rows of W:
in training (`MixerBank`) and at inference (decode.py)."""

import math

import torch
import torch.nn as nn
from torch import Tensor

from config import Config


def hadamard(n: int) -> Tensor:
    """The orthonormal Sylvester–Hadamard matrix (n, n), n a power of two: H_2n = [[H, H], [H, −H]]
    / √2, H_1 = [1]."""
    h = torch.ones(1, 1, device="cpu")  # a constant even where weights are built on the meta device
    while h.size(0) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / math.sqrt(n)


class WalshHadamard(nn.Module):
    """The orthonormal Walsh–Hadamard transform of the last dimension, in natural order; its own
    inverse.

    H_P = H_a ⊗ H_b for P = a·b, so two small matrix products do it: 2·√P multiplications per
    channel in place of P, and on every device faster than log₂P butterfly passes over memory."""

    def __init__(self, width: int):
        super().__init__()
        a = 1 << (width.bit_length() - 1) // 2
        self.register_buffer("left", hadamard(a), persistent=False)
        self.register_buffer("right", hadamard(width // a), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., P)
        grid = x.reshape(-1, self.right.size(0)) @ self.right  # (N·a, b)
        return (self.left @ grid.view(-1, self.left.size(0), self.right.size(0))).view(x.shape)


NO_TRANSFORM = nn.Identity()


def build_transform(config: Config) -> nn.Module:
    """The transform that `config` asks for."""
    return (
        WalshHadamard(config.padded_width)
        if config.mixer_transform == "hadamard"
        else nn.Identity()
    )
