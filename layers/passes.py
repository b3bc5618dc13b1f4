"""Passes over memory that a small network's training step on a CPU consists of, by C++ of our own
(passes.cpp): one pass where torch makes several. Each function here returns None where the library
does not take its inputs; what torch makes of them stands beside its callers in loss.py and lags.py.

Letters: B batch, T positions, N positions of all texts, P channels, J levels, Σw columns of all
scales, V vocabulary.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor, nn

from common.native import NativeLibrary


def declare(library: ctypes.CDLL) -> None:
    size, tensor, array = ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
    arguments = {
        "error_of_logits": [*[size] * 3, *[tensor] * 3],
        "causal_filter": [*[size] * 4, *[tensor] * 3],
        "causal_filter_backward": [*[size] * 4, *[tensor] * 5],
        "gated_haar": [*[size] * 5, *[array] * 2, tensor, array, tensor],
        "gated_haar_backward": [*[size] * 5, *[array] * 2, tensor, array, tensor, tensor, array],
    }
    for name, types in arguments.items():
        getattr(library, name).argtypes = types
        getattr(library, name).restype = None


LIBRARY = NativeLibrary(Path(__file__).with_suffix(".cpp"), declare)
TYPES = (torch.float32, torch.bfloat16)  # that the library has code for


def takes(*inputs: Tensor) -> bool:
    """Whether the library can be given these tensors' addresses: no stand-in for a tensor, one of
    another type or place may get there."""
    return (
        not torch.compiler.is_compiling()
        and all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in inputs)
        and inputs[0].dtype in TYPES
        and all(x.dtype == inputs[0].dtype and x.numel() > 0 for x in inputs)
        and LIBRARY.get() is not None
    )


def addresses(tensors: list[Tensor] | tuple[Tensor, ...]) -> ctypes.Array:
    """An array of C of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def integers(values: list[int] | tuple[int, ...]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


# ===== The loss


def errors_by_library(logits: Tensor, targets: Tensor) -> Tensor | None:
    """Makes of logits (N, V), in place, their softmax less one at each row's target, targets (N,)
    int64: N times the gradient of the mean cross-entropy. Returns the nats of each row, (N,) in
    fp32."""
    if not (takes(logits) and logits.is_contiguous() and targets.device.type == "cpu"):
        return None
    # an index beyond the row would write to memory that is another's
    if not 0 <= int(targets.min()) <= int(targets.max()) < logits.size(1):
        raise IndexError(f"targets: they must be from 0 to {logits.size(1) - 1}")
    targets = targets.contiguous()
    nats = logits.new_empty(len(logits), dtype=torch.float32)
    LIBRARY.get().error_of_logits(
        logits.dtype == torch.bfloat16,
        *logits.shape,
        targets.data_ptr(),
        logits.data_ptr(),
        nats.data_ptr(),
    )
    return nats


# ===== A causal filter


class FilterByLibrary(torch.autograd.Function):
    """`CausalFilter` of lags.py for taps of each channel, in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor) -> Tensor:
        x, taps = x.contiguous(), taps.contiguous()
        ctx.save_for_backward(x, taps)
        ctx.sizes = x.size(0), x.size(1) - len(taps) + 1, x.size(2), len(taps)
        out = x.new_empty(ctx.sizes[:3])
        LIBRARY.get().causal_filter(*ctx.sizes, x.data_ptr(), taps.data_ptr(), out.data_ptr())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_out: Tensor):
        x, taps = ctx.saved_tensors
        of_x, of_taps = torch.empty_like(x), taps.new_empty(len(x), *taps.shape)
        tensors = x, taps, of_out.contiguous(), of_x, of_taps
        LIBRARY.get().causal_filter_backward(*ctx.sizes, *(t.data_ptr() for t in tensors))
        return of_x, of_taps.sum(0)


def filter_by_library(x: Tensor, taps: Tensor) -> Tensor | None:
    """x (B, K − 1 + T, P), taps (K, P), the oldest position's first → Σ_i taps_i ⊙ x[:, i : i + T],
    (B, T, P)."""
    if not takes(x, taps) or x.dtype != torch.float32 or taps.size(1) != x.size(2):
        return None
    return FilterByLibrary.apply(x, taps) if x.size(1) >= len(taps) else None


# ===== The Haar wavelet of scales that have columns of their own, and the gates behind it


class GatedHaar(torch.autograd.Function):
    """`HaarOfScales` of lags.py, and its coefficients ⊙ silu(gates)."""

    @staticmethod
    def forward(ctx, both: Tensor, widths: tuple[int, ...], *pasts: Tensor) -> Tensor:
        both, *pasts = (x.contiguous() for x in (both, *pasts))
        ctx.save_for_backward(both, *pasts)
        width = sum(widths)
        ctx.sizes = both.dtype == torch.bfloat16, *both.shape[:2], len(widths), width
        ctx.arrays = integers(widths), integers([past.size(2) for past in pasts])
        out = both.new_empty(*both.shape[:2], width)
        LIBRARY.get().gated_haar(
            *ctx.sizes, *ctx.arrays, both.data_ptr(), addresses(pasts), out.data_ptr()
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_out: Tensor):
        both, *pasts = ctx.saved_tensors
        of_out = of_out.contiguous()
        of_both, of_pasts = torch.empty_like(both), [torch.empty_like(past) for past in pasts]
        LIBRARY.get().gated_haar_backward(
            *ctx.sizes,
            *ctx.arrays,
            both.data_ptr(),
            addresses(pasts),
            of_out.data_ptr(),
            of_both.data_ptr(),
            addresses(of_pasts),
        )
        return of_both, None, *of_pasts


def gated_haar_by_library(
    both: Tensor, widths: tuple[int, ...], pasts: list[Tensor]
) -> Tensor | None:
    """both (B, T, 2·Σw): the scales' columns side by side from coarse to fine, `widths` of each,
    then their gates; pasts as in `HaarOfScales` → the coefficients ⊙ silu(gates), (B, T, Σw)."""
    if both.size(2) != 2 * sum(widths) or not takes(both, *pasts):
        return None
    return GatedHaar.apply(both, widths, *pasts)
