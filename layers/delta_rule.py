"""The gated delta rule on a CPU, by C++ of our own (delta_rule.cpp): position after position, the
memory's matrix in the nearest cache, a quarter of the time that torch takes for the chunked form in
memory.py.

Letters: B batch, T positions, d width of a key.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from common.native import NativeLibrary

WIDTHS = (16, 32, 64)  # of keys, that the library has code for
# Positions from one matrix that is kept for the backward pass to the next. 8, 16 and 32 took the
# same time; kept matrices take d/16 times the memory of the keys.
PIECE = 16


def declare(library: ctypes.CDLL) -> None:
    sizes, tensors = [ctypes.c_int64] * 4, ctypes.c_void_p
    library.delta_rule.argtypes = [*sizes, *[tensors] * 9]
    library.delta_rule_backward.argtypes = [*sizes, *[tensors] * 14]
    library.delta_rule.restype = library.delta_rule_backward.restype = None


LIBRARY = NativeLibrary(Path(__file__).with_suffix(".cpp"), declare)


def takes(*inputs: Tensor) -> bool:
    """Whether `DeltaRule` can be had for such inputs. The library is given addresses, so they are
    looked at here: no stand-in for a tensor, nor another type or size, may get there."""
    q = inputs[0]
    width = q.size(-1)
    # of q, k, v, log α, β and the matrix before them
    sizes = [q.shape] * 3 + [q.shape[:3]] * 2 + [(*q.shape[:2], width, width)]
    return (
        not torch.compiler.is_compiling()
        and all(type(x) is Tensor and x.device.type == "cpu" for x in inputs)
        and all(x.dtype == torch.float32 for x in inputs)
        and all(x.shape == size for x, size in zip(inputs, sizes, strict=True))
        and width in WIDTHS
        and q.size(2) > 0
        and LIBRARY.get() is not None
    )


def addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


class DeltaRule(torch.autograd.Function):
    """`delta_rule` of memory.py: q, k, v (B, heads, T, d), log α and β (B, heads, T), the matrix
    before them (B, heads, d, d) → o (B, heads, T, d), and the matrix after them; all in fp32."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        inputs = tuple(x.contiguous() for x in inputs)
        q, pairs = inputs[0], inputs[-1]
        length, width = q.shape[2:]
        ctx.sizes = width, q.size(0) * q.size(1), length, PIECE
        out = torch.empty_like(q)
        after = torch.empty_like(pairs)
        marks = None  # the matrices that are kept, (B · heads, T / PIECE, d, d)
        if any(ctx.needs_input_grad):
            marks = q.new_empty(ctx.sizes[1], -(-length // PIECE), width, width)
        kept = None if marks is None else marks.data_ptr()
        LIBRARY.get().delta_rule(*ctx.sizes, *addresses(*inputs, out, after), kept)
        ctx.save_for_backward(*inputs[:-1], marks)
        return out, after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_out: Tensor, of_after: Tensor):
        *inputs, marks = ctx.saved_tensors
        of_out, of_after = of_out.contiguous(), of_after.contiguous()
        of_inputs = [torch.empty_like(x) for x in (*inputs, of_after)]
        LIBRARY.get().delta_rule_backward(
            *ctx.sizes, *addresses(*inputs, marks, of_out, of_after, *of_inputs)
        )
        return tuple(of_inputs)


def by_library(*inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """`delta_rule` of memory.py where the library takes its inputs, or None."""
    return DeltaRule.apply(*inputs) if takes(*inputs) else None
