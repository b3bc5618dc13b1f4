"""What a small network's training step on a CPU does beside its products, by C++ of our own
(passes.cpp): one pass over memory where torch makes several.

Functions whose names end with `_by_library` return None where the library does not take their
inputs (for `haar_state_by_library`, `takes_haar_state` says so); what torch then makes stands with
their callers in loss.py, lags.py, memory.py and model.py. Gradients are of first order: nothing
here can be differentiated twice, or by torch.func.

Letters: B batch, T positions, N positions of all texts, P channels, K taps, J levels, Σw columns of
all scales, d width of a key, V vocabulary.
"""

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.native import NativeLibrary


def declare(library: ctypes.CDLL) -> None:
    """Gives each function its arguments' types: so many sizes, so many addresses, and maybe
    numbers."""
    counts = {
        "error_of_logits": (4, 3), "causal_filter": (4, 3), "causal_filter_backward": (4, 5),
        "gated_haar": (5, 4), "gated_haar_backward": (5, 6), "haar_state": (4, 3),
        "squared_relu": (2, 2), "squared_relu_backward": (2, 3),
        "weighted_sum": (2, 4), "weighted_sum_backward": (2, 6),
        "recall": (6, 10, 1), "recall_backward": (6, 15, 1),
    }  # fmt: skip
    for name, (sizes, addresses, *numbers) in counts.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.c_int64] * sizes + [ctypes.c_void_p] * addresses
        function.argtypes += [ctypes.c_float] * sum(numbers)
        function.restype = None


LIBRARY = NativeLibrary(Path(__file__).with_suffix(".cpp"), declare)
TYPES = (torch.float32, torch.bfloat16)  # that the library has code for


def plain(x: Tensor) -> bool:
    """Whether x has an address in this process's memory: it is no stand-in for a tensor."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"


def takes(*inputs: Tensor) -> bool:
    """Whether the library can be given these tensors: all of one type that it has code for, and
    none empty."""
    return (
        not torch.compiler.is_compiling()
        and all(map(plain, inputs))
        and inputs[0].dtype in TYPES
        and all(x.dtype == inputs[0].dtype and x.numel() > 0 for x in inputs)
        and LIBRARY.get() is not None
    )


def call(function: str, *arguments: int | float | Tensor | ctypes.Array | None) -> None:
    """Calls the library. It is given tensors' addresses, and they live until it has returned."""
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    getattr(LIBRARY.get(), function)(*given)


def addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    """An array of C's of the addresses of tensors, which must live as long as it is used."""
    return array(ctypes.c_void_p, [None if x is None else x.data_ptr() for x in tensors])


def array(kind: type, values: Sequence) -> ctypes.Array:
    """An array of C's."""
    return (kind * len(values))(*values)


# ===== The loss


def errors_by_library(logits: Tensor, targets: Tensor, want_errors: bool = True) -> Tensor | None:
    """The nats of each row of logits (N, V), (N,) in fp32, at targets (N,) int64. With want_errors
    logits become, in place, their softmax less one at each row's target: N times the gradient of
    the mean cross-entropy."""
    fits = targets.dtype == torch.int64 and targets.shape == logits.shape[:1]
    if not (takes(logits) and logits.is_contiguous() and fits and plain(targets)):
        return None
    # an index beyond the row would write to memory that is another's
    if not 0 <= int(targets.min()) <= int(targets.max()) < logits.size(1):
        raise IndexError(f"targets: they must be from 0 to {logits.size(1) - 1}")
    nats = logits.new_empty(len(logits), dtype=torch.float32)
    is_bf16 = logits.dtype == torch.bfloat16
    call("error_of_logits", is_bf16, *logits.shape, want_errors, targets.contiguous(), logits, nats)
    return nats


# ===== A causal filter


class ShortFilterPass(torch.autograd.Function):
    """`CausalFilter` of lags.py for taps of each channel, in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor) -> Tensor:
        x, taps = x.contiguous(), taps.contiguous()
        ctx.save_for_backward(x, taps)
        ctx.sizes = x.size(0), x.size(1) - len(taps) + 1, x.size(2), len(taps)
        out = x.new_empty(ctx.sizes[:3])
        call("causal_filter", *ctx.sizes, x, taps, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_out: Tensor):
        x, taps = ctx.saved_tensors
        of_x, of_taps = torch.empty_like(x), taps.new_empty(len(x), *taps.shape)
        call("causal_filter_backward", *ctx.sizes, x, taps, of_out.contiguous(), of_x, of_taps)
        return of_x, of_taps.sum(0)


def filter_by_library(x: Tensor, taps: Tensor) -> Tensor | None:
    """x (B, K − 1 + T, P), taps (K, P), the oldest position's first → Σ_i taps_i ⊙ x[:, i : i + T],
    (B, T, P)."""
    if not takes(x, taps) or x.dtype != torch.float32 or taps.size(1) != x.size(2):
        return None
    return ShortFilterPass.apply(x, taps) if x.size(1) >= len(taps) else None


# ===== The Haar wavelet of scales that have columns of their own, and the gates behind it


class GatedHaar(torch.autograd.Function):
    """`HaarOfScales` of lags.py, and its coefficients ⊙ silu(gates)."""

    @staticmethod
    def forward(ctx, both: Tensor, before: Tensor, widths: tuple[int, ...]) -> Tensor:
        both, before = both.contiguous(), before.contiguous()
        ctx.save_for_backward(both, before)
        ctx.sizes = both.dtype == torch.bfloat16, *both.shape[:2], len(widths), sum(widths)
        ctx.widths = array(ctypes.c_int64, widths)
        out = both.new_empty(*both.shape[:2], sum(widths))
        call("gated_haar", *ctx.sizes, ctx.widths, both, before, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_out: Tensor):
        both, before = ctx.saved_tensors
        of_both, of_before = torch.empty_like(both), torch.empty_like(before)
        tensors = both, before, of_out.contiguous(), of_both, of_before
        call("gated_haar_backward", *ctx.sizes, ctx.widths, *tensors)
        return of_both, of_before, None


def gated_haar_by_library(both: Tensor, before: Tensor, widths: tuple[int, ...]) -> Tensor | None:
    """`gated_haar` of lags.py with silu."""
    texts, _, columns = both.shape
    width = sum(widths)
    fits = columns == 2 * width and before.shape == (texts, 2 ** (len(widths) - 1) - 1, width)
    return GatedHaar.apply(both, before, widths) if fits and takes(both, before) else None


def takes_haar_state(h: Tensor, before: Tensor, levels: int) -> bool:
    """Whether `haar_state_by_library` can be called."""
    size = (len(h), 2**levels - 1, h.size(2))
    return takes(h, before) and h.dtype == torch.float32 and before.shape == size


def haar_state_by_library(h: Tensor, before: Tensor, levels: int) -> Tensor:
    """What a fixed wavelet of so many levels remembers after h (B, T, P), level by level, (B,
    2^J − 1, P), from the same before h."""
    after = torch.empty_like(before, memory_format=torch.contiguous_format)
    sizes = *h.shape[:2], levels, h.size(2)
    call("haar_state", *sizes, h.contiguous(), before.contiguous(), after)
    return after


# ===== Squared ReLU, and sums of the residual stream


class SquaredReLUPass(torch.autograd.Function):
    """max(0, x)² of x (…)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.sizes = x.dtype == torch.bfloat16, x.numel()
        out = torch.empty_like(x)
        call("squared_relu", *ctx.sizes, x, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_out: Tensor):
        (x,) = ctx.saved_tensors
        of_x = torch.empty_like(x)
        call("squared_relu_backward", *ctx.sizes, x, of_out.contiguous(), of_x)
        return of_x


def squared_relu_by_library(x: Tensor) -> Tensor | None:
    """max(0, x)² of x (…)."""
    return SquaredReLUPass.apply(x) if takes(x) else None


class WeightedSum(torch.autograd.Function):
    """Σ_i weights_i · parts_i, in fp32."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        """inputs: parts of one shape, then as many weights, each a number."""
        terms = len(inputs) // 2
        parts, weights = [x.contiguous() for x in inputs[:terms]], inputs[terms:]
        # a part is of use to the gradient of its weight alone
        learned = ctx.needs_input_grad[terms:]
        kept = [part if wanted else None for part, wanted in zip(parts, learned, strict=True)]
        ctx.save_for_backward(*kept, *weights)
        ctx.likes = [(part.shape, part.dtype) for part in parts]
        ctx.sizes = parts[0].numel(), terms
        ctx.kinds = array(ctypes.c_int64, [part.dtype == torch.bfloat16 for part in parts])
        out = torch.empty_like(parts[0], dtype=torch.float32)
        call("weighted_sum", *ctx.sizes, ctx.kinds, addresses(weights), addresses(parts), out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_out: Tensor):
        terms, saved = ctx.sizes[1], ctx.saved_tensors
        parts, weights = saved[:terms], saved[terms:]
        of_parts = [of_out.new_empty(shape, dtype=kind) for shape, kind in ctx.likes]
        of_weights = of_out.new_empty(terms)
        given = ctx.kinds, addresses(weights), addresses(parts), of_out.contiguous()
        call("weighted_sum_backward", *ctx.sizes, *given, addresses(of_parts), of_weights)
        return *of_parts, *of_weights.unbind()


def weighted_sum_by_library(terms: Sequence[tuple[Tensor | float, Tensor]]) -> Tensor | None:
    """Σ weight · x, in fp32: x (…) of one shape, the first of them in fp32, a weight a number or a
    tensor of one in fp32."""
    parts = [x for _, x in terms]
    first = parts[0]
    if first.dtype != torch.float32 or not all(takes(x) and x.shape == first.shape for x in parts):
        return None
    weights = [w if isinstance(w, Tensor) else first.new_tensor(w) for w, _ in terms]
    if not takes(first, *weights) or any(w.dim() for w in weights):
        return None
    return WeightedSum.apply(*parts, *weights)


# ===== The associative memory

WIDTHS = (16, 32, 64)  # of keys, that the library has code for
# Positions from one matrix that is kept for the backward pass to the next. 8, 16 and 32 took the
# same time; kept matrices take d/16 times the memory of the keys.
PIECE = 16


class Recall(torch.autograd.Function):
    """`recall` of memory.py without the keys that it remembers."""

    @staticmethod
    def forward(ctx, goes_back: bool, most: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """goes_back: whether gradients may be asked for, and what they need is to be kept. most: of
        what a memory holds, that it keeps from one position to the next."""
        inputs = tuple(x.contiguous() for x in inputs)
        query_key, *_, pairs = inputs
        texts, length, inner = query_key.size(0), query_key.size(1), query_key.size(2) // 2
        heads, width = pairs.shape[1:3]
        ctx.sizes = query_key.dtype == torch.bfloat16, width, texts, heads, length, PIECE
        out = query_key.new_empty(texts, length, inner)
        after = torch.empty_like(pairs)
        kept = [None, None]  # what was read, and matrices on the way
        if goes_back:
            pieces = -(-length // PIECE)
            kept = [
                pairs.new_empty(texts, length, inner),
                pairs.new_empty(texts, heads, pieces, width, width),
            ]
        ctx.most = most
        call("recall", *ctx.sizes, *inputs, out, after, *kept, most)
        ctx.save_for_backward(*inputs[:-1], *kept)
        return out, after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_out: Tensor, of_after: Tensor):
        *inputs, reads, marks = ctx.saved_tensors
        query_key, value_gate, rates, taps, keys = inputs
        of_taps = taps.new_empty(len(query_key), *taps.shape)  # of each text
        of_inputs = [torch.empty_like(x) for x in (query_key, value_gate, rates)]
        of_inputs += [of_taps, torch.empty_like(keys), torch.empty_like(of_after)]
        of_results = of_out.contiguous(), of_after.contiguous()
        given = *inputs, reads, marks, *of_results
        call("recall_backward", *ctx.sizes, *given, *of_inputs, ctx.most)
        of_inputs[3] = of_taps.sum(0)
        return None, None, *of_inputs


def recall_by_library(
    query_key: Tensor, value_gate: Tensor, rates: Tensor, taps: Tensor, keys: Tensor, pairs: Tensor,
    least: float,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """`recall` of memory.py, from query_key, value_gate (B, T, 2·heads·d), rates (B, T, 2·heads),
    taps (2, 4, heads·d), and of the text before the last keys (B, 3, 2·heads·d) and the matrix (B,
    heads, d, d) → what was read, gated, (B, T, heads·d), and the matrix after the text. All tensors
    but the first two are in fp32. least: as `recall` has it."""
    if pairs.size(-1) not in WIDTHS or rates.dtype != torch.float32:
        return None
    if not (takes(query_key, value_gate) and takes(rates, taps, keys, pairs)):
        return None
    texts, length, _ = query_key.shape
    heads, width = pairs.size(1), pairs.size(2)
    inner = heads * width
    sizes = {
        query_key: (texts, length, 2 * inner), value_gate: (texts, length, 2 * inner),
        rates: (texts, length, 2 * heads), taps: (2, 4, inner), keys: (texts, 3, 2 * inner),
        pairs: (texts, heads, width, width),
    }  # fmt: skip
    if any(tensor.shape != size for tensor, size in sizes.items()):
        return None
    goes_back = torch.is_grad_enabled()
    most = math.exp(-least)
    return Recall.apply(goes_back, most, query_key, value_gate, rates, taps, keys, pairs)
