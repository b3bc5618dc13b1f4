"""Transforms of the channels around the mixers: (..., P) → (..., P), P a power of two.

Walsh–Hadamard is the released network's. The others are its alternatives for ablations: a cosine transform, none at all, and a
butterfly that is learned, from Walsh–Hadamard on. Each has an `inverse`, which is its transpose; so a product that follows may
have it in its weights, W·transform(x) = inverse(W)·x, in training (`MixerBank`) and at inference (decode.py).
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from config import Config


def hadamard(n: int) -> Tensor:
    """The orthonormal Sylvester–Hadamard matrix (n, n), n a power of two: H_2n = [[H, H], [H, −H]] / √2, H_1 = [1]."""
    h = torch.ones(1, 1, device="cpu")  # a constant even where weights are built on the meta device
    while h.size(0) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / math.sqrt(n)


class Transform(nn.Module):
    """A linear transform of the last dimension, with an `inverse` that is its transpose."""

    def prepared(self) -> "Transform | Matrix":
        """What does the same, when several products in a row want it."""
        return self


class WalshHadamard(Transform):
    """The orthonormal Walsh–Hadamard transform of the last dimension, in natural order; its own inverse.

    H_P = H_a ⊗ H_b for P = a·b, so two small matrix products do it: 2·√P multiplications per channel in place of P, and
    on every device faster than log₂P butterfly passes over memory.
    """

    def __init__(self, width: int):
        super().__init__()
        a = 1 << (width.bit_length() - 1) // 2
        self.register_buffer("left", hadamard(a), persistent=False)
        self.register_buffer("right", hadamard(width // a), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., P)
        grid = x.reshape(-1, self.right.size(0)) @ self.right  # (N·a, b)
        return (self.left @ grid.view(-1, self.left.size(0), self.right.size(0))).view(x.shape)

    inverse = forward


class Matrix:
    """A transform by its matrix (P, P)."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.matrix.to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT.to(x.dtype)


class MatrixTransform(Transform):
    """A transform that is one matrix product; `prepared` makes the matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return self.prepared()(x)

    def inverse(self, x: Tensor) -> Tensor:
        return self.prepared().inverse(x)


class CosineTransform(MatrixTransform):
    """The orthonormal discrete cosine transform (DCT-II) of the last dimension."""

    def __init__(self, width: int):
        super().__init__()
        n = torch.arange(width, device="cpu", dtype=torch.float64)
        matrix = torch.cos(math.pi / width * (n[:, None] + 0.5) * n) * math.sqrt(2 / width)  # (position, frequency)
        matrix[:, 0] /= math.sqrt(2)
        self.register_buffer("matrix", matrix.float(), persistent=False)

    def prepared(self) -> Matrix:
        return Matrix(self.matrix)


class Butterfly(MatrixTransform):
    """A learned butterfly (Dao et al., "Learning fast algorithms for linear transforms using butterfly factorizations", 2019):
    log₂P factors, of which the i-th mixes the channels 2^i apart in pairs, each by a 2×2 matrix of its own. It starts as the
    Walsh–Hadamard transform; its "inverse" is its transpose, the true inverse while it is orthogonal, as it starts.

    Its matrix is made of the 2·P·log₂P weights and multiplied as a whole: for many positions one product is faster than log₂P
    passes over them."""

    def __init__(self, width: int):
        super().__init__()
        self.factors = nn.Parameter(torch.empty(width.bit_length() - 1, width // 2, 2, 2))
        self.factors.data.copy_(hadamard(2))

    def prepared(self) -> Matrix:
        matrix = torch.eye(2 * self.factors.size(1), device=self.factors.device)
        for i, factor in enumerate(self.factors):
            pairs = matrix.unflatten(-1, (-1, 2, 2**i))  # (P, P / 2^(i+1), 2, 2^i)
            matrix = torch.einsum("nagb,abgh->nahb", pairs, factor.view(-1, 2**i, 2, 2)).flatten(1)
        return Matrix(matrix)


class Identity(Transform):
    """No transform."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x

    inverse = forward


NO_TRANSFORM = Identity(1)


def build_transform(config: Config) -> Transform:
    """The transform that `config` asks for."""
    kinds = {"hadamard": WalshHadamard, "dct": CosineTransform, "butterfly": Butterfly, "identity": Identity}
    return kinds[config.mixer_transform](config.padded_width)
