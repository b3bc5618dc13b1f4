"""The training loss: cross-entropy of a linear head that never holds all logits, the largest tensor
of a training step."""

import math

import torch
from torch import Tensor

from common.device import autocast_type
from layers.passes import errors_by_library

# Numbers of logits that are made at a time. On a CPU as many as a cache holds, 16 MB in fp32; where
# these are fewer than CPU_ROWS rows, of which products take longer, up to four times as many.
# On a GPU, whose caches hold no piece worth its launches, 1 GiB of them, which is all of a batch of
# 5,000 tokens and 50,000 words.
CPU_LOGITS, GPU_LOGITS = 2**22, 2**28
CPU_ROWS = 256
# whose gradients are converted and added at a time, while a cache still holds them
CPU_WORDS = 2**12


def rows_at_a_time(device: torch.device, vocab_size: int) -> int:
    """Rows of logits that are made at a time."""
    if device.type == "cpu":
        rows = max(CPU_ROWS, CPU_LOGITS // vocab_size)
        return max(1, min(rows, 4 * CPU_LOGITS // vocab_size))
    return max(1, GPU_LOGITS // vocab_size)


def rows_filled_up(weight: Tensor, kind: torch.dtype) -> Tensor:
    """`weight` (V, C) as `kind`, with rows of zeros after it up to a multiple of 64: a GPU's matrix
    units are fed by addresses that are multiples of 16 bytes, and GPT-2's 50,257 words leave them
    at a third of their rate."""
    filled = weight.new_zeros(-(-weight.size(0) // 64) * 64, weight.size(1), dtype=kind)
    filled[: weight.size(0)] = weight
    return filled


def errors(
    logits: Tensor, targets: Tensor, vocab_size: int, want_errors: bool
) -> tuple[Tensor | None, Tensor]:
    """Of logits (N, V or more), which may be overwritten, and targets (N,): softmax less one at
    each target, in their type, or None if that is not wanted, and the nats of each row, (N,) in
    fp32. Columns from vocab_size on are no words."""
    if logits.size(1) == vocab_size:
        nats = errors_by_library(logits, targets, want_errors)
        if nats is not None:
            return logits, nats
    target, kind = targets[:, None], logits.dtype
    logits = logits.float()
    logits[:, vocab_size:] = -math.inf
    wanted, highest = logits.gather(1, target), logits.amax(1, keepdim=True)
    # in place, as all that follows: every pass is over the largest tensor
    softmax = logits.sub_(highest).exp_()
    sums = softmax.sum(1, keepdim=True)
    nats = (sums.log() + (highest - wanted)).squeeze(1)
    if not want_errors:
        return None, nats
    error = softmax.div_(sums).scatter_add_(1, target, sums.new_full(target.shape, -1.0))
    return error.to(kind), nats


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear head, in nats, that never holds more than `rows` rows of
    logits.

    The gradients of a chunk, softmax − one-hot, are used where its logits are made, so that no
    logit is computed twice. Products are in the autocast type, softmax and sums in fp32."""

    @staticmethod
    def forward(
        ctx, h: Tensor, weight: Tensor, targets: Tensor, rows: int, want_gradient: bool
    ) -> Tensor:
        kind = autocast_type(h)
        on_cpu, vocab_size = h.device.type == "cpu", weight.size(0)
        words = CPU_WORDS if on_cpu else vocab_size
        h_low, w_low = h.to(kind), weight.to(kind) if on_cpu else rows_filled_up(weight, kind)
        total = h.new_zeros((), dtype=torch.float32)
        grad_h, grad_w = (
            (torch.empty_like(h), torch.zeros_like(weight)) if want_gradient else (None, None)
        )
        for start in range(0, h.size(0), rows):
            part = h_low[start : start + rows]
            logits = part @ w_low.T
            error, nats = errors(logits, targets[start : start + rows], vocab_size, want_gradient)
            total += nats.sum()
            if want_gradient:
                grad_h[start : start + rows] = error @ w_low
                if kind == grad_w.dtype:
                    grad_w.addmm_(
                        error[:, :vocab_size].T, part
                    )  # in place: a product of its own would be as large as the weight
                else:
                    for grad, wrong in zip(
                        grad_w.split(words), error[:, :vocab_size].split(words, dim=1), strict=True
                    ):
                        grad.add_(wrong.T @ part)
        ctx.save_for_backward(grad_h, grad_w)
        ctx.tokens = h.size(0)
        return total / h.size(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        (grad_h, grad_w), scale = ctx.saved_tensors, gradient / ctx.tokens
        # in place: a copy would be as large as the weight
        return grad_h.mul_(scale), grad_w.mul_(scale), None, None, None


def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits h Wᵀ: h (B, T, C), weight (V, C), targets (B, T)
    int64."""
    rows = rows_at_a_time(h.device, weight.size(0))
    return LinearCrossEntropy.apply(
        h.flatten(0, 1), weight, targets.flatten(), rows, torch.is_grad_enabled()
    )
