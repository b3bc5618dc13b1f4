"""What reads the stream at fixed lags, as functions whose backward pass is written by hand: short
causal filters, and the coefficients of the fixed Haar wavelet.

Much of a small network's time goes into passes over tensors of the stream's size. Left to autograd,
each lag would add some: products of their own, and for the gradient of each slice a tensor of
zeros. Here there are as few as there can be.

Letters as in model.py: B batch, T positions, P channels, J levels, S = J + 1 scales.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import autocast_type
from layers.passes import (
    filter_by_library,
    gated_haar_by_library,
    haar_state_by_library,
    takes_haar_state,
)
from layers.state import remember


class CausalFilter(torch.autograd.Function):
    """x (B, K − 1 + T or more, P), taps (K, P) or (K, 1), the oldest position's first → Σ_i taps_i
    ⊙ x[:, i : i + T]."""

    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(x, taps)
        out = x[:, :length] * taps[0]
        for i in range(1, taps.size(0)):
            # Not in place: what forward both changes and returns has no gradient where torch 2.11
            # compiles it.
            out = out.addcmul(x[:, i : i + length], taps[i])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_out: Tensor):
        (x, taps), length = ctx.saved_tensors, of_out.size(1)
        of_x, of_taps = torch.zeros_like(x), []
        for i in range(taps.size(0)):
            of_x[:, i : i + length].addcmul_(of_out, taps[i])
            of_taps.append((x[:, i : i + length] * of_out).sum_to_size(taps[i].shape))
        return of_x, torch.stack(of_taps), None


def causal_filter(x: Tensor, taps: Tensor, length: int) -> Tensor:
    """`CausalFilter`, by C++ of our own where it can be had."""
    done = filter_by_library(x, taps) if x.size(1) == len(taps) - 1 + length else None
    return CausalFilter.apply(x, taps, length) if done is None else done


class ShortFilter(nn.Module):
    """A causal filter of `taps` positions for each of `width` channels, (B, T, width) → the same;
    at first each position passes as it is. After Allen-Zhu, "Physics of language models: part 4.1",
    2025, whose Canon layers are such filters."""

    def __init__(self, width: int, taps: int):
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(taps, width))  # the oldest position first
        self.taps.data[-1] = 1.0

    def start(self, rows: int, like: Tensor) -> Tensor:
        """What came before a text, (rows, taps − 1, width): zeros of the type of `like`."""
        return like.new_zeros(rows, self.taps.size(0) - 1, self.taps.size(1))

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, width) and the inputs before it → x filtered, and the last inputs."""
        joined, past = remember(past, x)
        return causal_filter(joined, self.taps.to(joined.dtype), x.size(1)), past


def with_lagged(u: Tensor, past: Tensor, sign: int) -> Tensor:
    """u (B, T, P) + sign · u delayed by lag positions, where `past` (B, lag, P) is what came before
    u."""
    out, lag = torch.empty_like(u), min(past.size(1), u.size(1))
    # all texts in a row: one pass, that is wrong only where a text reads the one before it
    rows = u.view(-1, u.size(2))
    torch.add(rows[lag:], rows[:-lag], alpha=sign, out=out.view_as(rows)[lag:])
    out[:, :lag] = torch.add(u[:, :lag], past[:, :lag], alpha=sign)
    return out


def haar_reconstruction(u: Tensor) -> Tensor:
    """The inverse of the fixed Haar wavelet: coefficients (S, B, T, P) → (B, T, P), by
    cur ← (cur + detail) / √2 from coarse to fine."""
    cur = u[0]
    for detail in u[1:]:
        cur = (cur + detail) / math.sqrt(2)
    return cur


class HaarCoefficients(torch.autograd.Function):
    """`Lifting.decompose` of the fixed wavelet: one buffer for all scales, no lag is joined to
    anything, and the factors of √2 are multiplied in as a coefficient is written.

    h (B, T, P), and for each level l the 2^l inputs of that level before it (B, 2^l, P) → the
    coefficients (S, B, T, P), the approximation first, then the details from coarse to fine, and
    each level's last 2^l inputs.

    Inside, u_l is the input of level l times √2^l: u_0 = h, u_(l+1) = u_l + lagged u_l, detail_l =
    (u_l − lagged u_l) / √2^(l+1). It is linear, so nothing is kept for the backward pass. Under
    autocast the coefficients have its type, for the mixers."""

    @staticmethod
    def forward(ctx, h: Tensor, *pasts: Tensor) -> tuple[Tensor, ...]:
        levels, length = len(pasts), h.size(1)
        c = h.new_empty(levels + 1, *h.shape, dtype=autocast_type(h))
        ctx.lags = [past.size(1) for past in pasts]
        u, new_pasts = h.contiguous(), []
        for level, past in enumerate(pasts):
            root = math.sqrt(2) ** level
            kept = u[:, max(0, length - past.size(1)) :] / root
            new_pasts.append(torch.cat([past[:, length:], kept], dim=1))
            past = past * root
            torch.mul(with_lagged(u, past, -1), math.sqrt(0.5) / root, out=c[levels - level])
            u = with_lagged(u, past, 1)
        torch.mul(u, math.sqrt(0.5) ** levels, out=c[0])
        return c, *new_pasts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_c: Tensor, *of_new_pasts: Tensor):
        levels, length = len(ctx.lags), of_c.size(2)
        of_u, of_pasts = of_c[0].to(of_new_pasts[0].dtype) * math.sqrt(0.5) ** levels, []
        for level in reversed(range(levels)):
            lag, root, of_new = ctx.lags[level], math.sqrt(2) ** level, of_new_pasts[level]
            of_detail, factor = of_c[levels - level], math.sqrt(0.5) / root
            of_lagged = torch.sub(of_u, of_detail, alpha=factor)
            of_u = torch.add(of_u, of_detail, alpha=factor)
            of_u[:, : max(0, length - lag)] += of_lagged[:, lag:]
            of_u[:, max(0, length - lag) :] += of_new[:, max(0, lag - length) :] / root
            of_past = of_new.new_zeros(of_new.shape)
            of_past[:, :length] = of_lagged[:, :lag] * root
            of_past[:, length:] += of_new[:, : max(0, lag - length)]
            of_pasts.append(of_past)
        return of_u, *reversed(of_pasts)


class HaarOfScales(torch.autograd.Function):
    """`HaarCoefficients` where each scale has an input of its own: of the columns v_s of scale s
    only the coefficient s is made.

    v (B, T, Σw), the scales' columns side by side from coarse to fine, widths of each, and for each
    level l the 2^l inputs of that level before it, of the columns that get so far, (B, 2^l, ·)
    → the coefficients (B, T, Σw).

    Level by level all columns but the finest scale's become the sum with the lagged ones, these the
    difference, and are done: fewer passes than `HaarCoefficients` makes, over what is narrower.
    Sums are in fp32 at least, rounded once to v's type."""

    @staticmethod
    def forward(ctx, v: Tensor, widths: tuple[int, ...], *pasts: Tensor) -> Tensor:
        ctx.widths = widths
        c = v.to(torch.promote_types(v.dtype, torch.float32), copy=True)
        for (_, kept, columns), past in zip(levels_of(widths), pasts, strict=True):
            u = c[..., :columns]  # what gets to this level
            lagged = torch.cat([past, u], dim=1)[:, : u.size(1)]
            u[..., :kept] += lagged[..., :kept]
            u[..., kept:] -= lagged[..., kept:]
            u *= math.sqrt(0.5)
        # A copy even of the same type: what forward both changes and returns has no gradient where
        # torch 2.11 compiles it.
        return c.to(v.dtype, copy=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_c: Tensor):
        of_v = of_c.to(torch.promote_types(of_c.dtype, torch.float32), copy=True)
        of_pasts = []
        length = of_v.size(1)
        for lag, kept, columns in reversed(list(levels_of(ctx.widths))):
            u = of_v[..., :columns]
            u *= math.sqrt(0.5)
            of_lagged = u.clone()
            of_lagged[..., kept:].neg_()
            u[:, : max(0, length - lag)] += of_lagged[:, lag:]
            of_past = u.new_zeros(u.size(0), lag, columns)
            of_past[:, :length] = of_lagged[:, :lag]
            of_pasts.append(of_past.to(of_c.dtype))
        return of_v.to(of_c.dtype), None, *reversed(of_pasts)


def levels_of(widths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Of each level of scales as wide as `widths`, from coarse to fine: its lag, how many columns
    go on to the next level, and how many get to it."""
    columns = sum(widths)
    for level, width in enumerate(reversed(widths[1:])):
        yield 2**level, columns - width, columns
        columns -= width


def gated_haar(
    both: Tensor, before: Tensor, widths: tuple[int, ...], activation: Callable
) -> Tensor:
    """`haar_of_scales` of the first half of both (B, T, 2·Σw), ⊙ activation(the other half)."""
    done = gated_haar_by_library(both, before, widths) if activation is F.silu else None
    if done is not None:
        return done
    values, gates = both.chunk(2, dim=-1)
    return haar_of_scales(values, before, widths) * activation(gates)


def haar_of_scales(v: Tensor, before: Tensor, widths: tuple[int, ...]) -> Tensor:
    """`HaarOfScales` of v (B, T, Σw) with what came before in one tensor: of each level the 2^l
    inputs of that level, one level after the other, (B, 2^J − 1, Σw)."""
    pasts = [
        before[:, lag - 1 : 2 * lag - 1, :columns].to(v.dtype)
        for lag, _, columns in levels_of(widths)
    ]
    return HaarOfScales.apply(v, widths, *pasts)


class HaarState(torch.autograd.Function):
    """`haar_state` by C++ of our own."""

    @staticmethod
    def forward(ctx, h: Tensor, before: Tensor, levels: int) -> Tensor:
        ctx.levels = levels
        ctx.shapes = h.shape, before.shape
        return haar_state_by_library(h, before, levels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_after: Tensor):
        # linear: the gradients are those of any inputs; and rare, for a state is detached
        with torch.enable_grad():
            given = [of_after.new_zeros(shape, requires_grad=True) for shape in ctx.shapes]
            after = torch_haar_state(*given, ctx.levels)
            return *torch.autograd.grad(after, given, of_after), None


def haar_state(h: Tensor, before: Tensor, levels: int) -> Tensor:
    """What a fixed wavelet remembers after h (B, T, P): of each level l the last 2^l inputs of that
    level, one level after the other, (B, 2^J − 1, P), where `before` is the same before h."""
    # What the next positions need of the past are sums of so many positions at the most.
    h = h[:, 1 - 2**levels :]
    if takes_haar_state(h, before, levels):
        return HaarState.apply(h, before, levels)
    return torch_haar_state(h, before, levels)


def torch_haar_state(h: Tensor, before: Tensor, levels: int) -> Tensor:
    """`haar_state` by torch."""
    pasts = before.split([2**level for level in range(levels)], dim=1)
    return torch.cat(HaarCoefficients.apply(h, *pasts)[1:], dim=1)
