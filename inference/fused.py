"""What lies between the products of one row, as few Triton kernels: what torch does in many small
launches, each here in one.

A step of one token reads most of its weights in the products of kernels.py. Whatever else it does
touches a few thousand numbers and costs what a launch costs. These kernels are used for one row on
a GPU with Triton (`kernels.usable`, and `MemoryReads.takes` for memories). Everywhere else
operations of torch in decode.py and folded.py compute the same, and are the place to read what it
is.

In all kernels names of tensors are addresses of their first elements, and a program (one of many
that run at once) computes BLOCK channels. Block sizes are powers of two, as Triton demands, and
masks cut off what lies beyond the real size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from inference import kernels

# `_memory_kernel` ranks keys, and pairs of keys, by comparing all with all in registers, 256² at a
# time at the most.
MOST_KEYS = 256  # of one half, in one head
MOST_PAIRS = 256  # of ranks that can be among the best

if kernels.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _ranks(score, n):
        """The rank of each score (N,), 0 for the best: how many are larger, or as large and
        earlier. n (N,): the numbers 0 … N − 1."""
        larger = score[None, :] > score[:, None]
        earlier = (score[None, :] == score[:, None]) & (n[None, :] < n[:, None])
        return tl.sum((larger | earlier).to(tl.int32), 1)

    @triton.jit
    def _chosen(hit, number):
        """For each row of hit (M, N), which is true once or nowhere, the element of number (N,)
        where it is true, or zero: (M,)."""
        return tl.sum(tl.where(hit, number[None, :], 0), 1)

    @triton.jit
    def _memory_kernel(
        scores, pairs, values, steps, x, y, side, count, top, slots, width, stride, groups, alpha,
        HEADS: tl.constexpr, SIDE: tl.constexpr, PAIRS: tl.constexpr, TOP: tl.constexpr,
        BLOCK: tl.constexpr, KIND: tl.constexpr,
    ):  # fmt: skip
        """y = x + alpha·(what a product-key memory reads), for BLOCK channels; at 4 bits for BLOCK
        pairs of channels, since a byte holds two.

        Every program chooses the slots anew: that is cheaper than another launch. scores: (heads,
        2, side); pairs (2, count): ranks in both halves, of which `top` best pairs are read; values
        (heads·slots, width); steps: their scales, or scales and offsets.
        """
        channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = channel < (width // 2 if KIND == "int4" else width)
        n, pair, best = tl.arange(0, SIDE), tl.arange(0, PAIRS), tl.arange(0, TOP)
        # The ranks of each pair's keys; −1 is the rank of no key.
        i = tl.load(pairs + pair, mask=pair < count, other=-1)
        j = tl.load(pairs + count + pair, mask=pair < count, other=-1)
        first = tl.zeros((BLOCK,), tl.float32)
        second = tl.zeros((BLOCK,), tl.float32)
        for head in range(HEADS):
            a = tl.load(scores + 2 * head * side + n, mask=n < side, other=float("-inf"))
            b = tl.load(scores + (2 * head + 1) * side + n, mask=n < side, other=float("-inf"))
            # Which key has the rank that a pair names; then the pair's score and slot.
            hit_a = _ranks(a, n)[None, :] == i[:, None]  # (PAIRS, SIDE)
            hit_b = _ranks(b, n)[None, :] == j[:, None]
            score = tl.where(pair < count, _chosen(hit_a, a) + _chosen(hit_b, b), float("-inf"))
            slot = _chosen(hit_a, n) * side + _chosen(hit_b, n)
            # The best pairs, and their shares by softmax.
            hit = _ranks(score, pair)[None, :] == best[:, None]  # (TOP, PAIRS)
            score = tl.where(best < top, _chosen(hit, score), float("-inf"))
            share = tl.exp(score - tl.max(score, 0))
            share = share / tl.sum(share, 0)
            # NaNs have no rank, so what is computed from them names no slot in particular; it must
            # lie in the table all the same.
            slot = tl.minimum(_chosen(hit, slot), slots - 1)
            row = (slot + head * slots).to(tl.int64)  # row · stride may exceed 32 bits
            mask = (best < top)[:, None] & inside[None, :]
            # (TOP, BLOCK)
            held = tl.load(values + row[:, None] * stride + channel[None, :], mask=mask, other=0)
            if KIND == "int4":
                # A group is 64 channels, 32 pairs. (q − 8)·scale + offset, with 8·scale taken off
                # the offset once.
                step = steps + 2 * (row[:, None] * groups + (channel // 32)[None, :])
                scale = tl.load(step, mask=mask, other=0.0).to(tl.float32)
                offset = tl.load(step + 1, mask=mask, other=0.0).to(tl.float32) - 8 * scale
                first += tl.sum(share[:, None] * ((held & 15).to(tl.float32) * scale + offset), 0)
                second += tl.sum(share[:, None] * ((held >> 4).to(tl.float32) * scale + offset), 0)
            else:
                if KIND == "int8":
                    share *= tl.load(steps + row, mask=best < top, other=0.0).to(tl.float32)
                first += tl.sum(share[:, None] * held.to(tl.float32), 0)
        if KIND == "int4":
            before = tl.load(x + 2 * channel, mask=inside, other=0.0)
            tl.store(y + 2 * channel, before + alpha * first, mask=inside)
            before = tl.load(x + 2 * channel + 1, mask=inside, other=0.0)
            tl.store(y + 2 * channel + 1, before + alpha * second, mask=inside)
        else:
            before = tl.load(x + channel, mask=inside, other=0.0)
            tl.store(y + channel, before + alpha * first, mask=inside)

    @triton.jit
    def _open_kernel(
        x, e, gamma, total, count, ring, position, weight, bias, x_new, mean, h, width, padded,
        window, size, eps,
        HAS_GAMMA: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_RING: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The kernel of `open_block`: one program, since a norm is over all channels."""
        c = tl.arange(0, BLOCK)
        inside = c < width
        v = tl.load(x + c, mask=inside, other=0.0)
        if HAS_MEAN:
            # the sum is fp64 where entries leave it again
            n = tl.load(count) + 1
            summed = tl.load(total + c, mask=inside, other=0.0)
            summed += v.to(summed.dtype)
            if HAS_RING:
                n = tl.minimum(n, window)
                place = ring + (tl.load(position) % size) * width + c
                summed -= tl.load(place, mask=inside, other=0.0).to(summed.dtype)
                tl.store(place, v, mask=inside)
            tl.store(total + c, summed, mask=inside)
            tl.store(mean + c, (summed / n.to(summed.dtype)).to(tl.float32), mask=inside)
        if HAS_GAMMA:
            v += tl.load(e + c, mask=inside, other=0.0) * tl.load(gamma + c, mask=inside, other=0.0)
        tl.store(x_new + c, v, mask=inside)
        # LayerNorm; channels from width to padded (C to P) become zeros
        away = tl.where(inside, v - tl.sum(v, 0) / width, 0.0)
        normed = away * tl.rsqrt(tl.sum(away * away, 0) / width + eps)
        normed = normed * tl.load(weight + c, mask=inside, other=0.0) + tl.load(
            bias + c, mask=inside, other=0.0
        )
        tl.store(h + c, normed, mask=c < padded)

    @triton.jit
    def _lags_kernel(
        ring, position, offsets, shares, bias, odd, size, width, levels,
        COUNT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The kernel of `lags_in_ring`: a program for BLOCK channels of one level."""
        level = tl.program_id(1)
        c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = c < width
        at = tl.load(position)
        total = tl.load(bias + level * width + c, mask=inside, other=0.0)
        for k in range(COUNT):
            entry = (at + tl.load(offsets + level * COUNT + k)) % size
            share = tl.load(shares + level * COUNT + k)
            total += share * tl.load(
                ring + (entry * levels + level) * width + c, mask=inside, other=0.0
            )
        tl.store(odd + level * width + c, total, mask=inside)

    @triton.jit
    def _put_kernel(ring, position, value, size, numbers, BLOCK: tl.constexpr):
        """The kernel of `put`: a program for BLOCK numbers."""
        n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = n < numbers
        tl.store(
            ring + (tl.load(position) % size) * numbers + n,
            tl.load(value + n, mask=inside),
            mask=inside,
        )

    @triton.jit
    def _join_kernel(
        c, context, gains, routing, joined, routed, scales, width, narrow,
        HAS_ROUTING: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The kernel of `join`: a program for BLOCK channels of all scales, which routing mixes."""
        s = tl.arange(0, SCALES)
        n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = (s < scales)[:, None] & (n < width)[None, :]
        at = s[:, None] * width + n[None, :]
        gain = tl.load(gains + at, mask=inside, other=0.0)
        v = tl.load(c + at, mask=inside, other=0.0)
        # (SCALES, BLOCK); the context has only C of P channels
        v += gain * tl.load(context + n, mask=n < narrow, other=0.0).to(tl.float32)[None, :]
        tl.store(joined + at, v, mask=inside)
        if HAS_ROUTING:
            both = (s < scales)[:, None] & (s < scales)[None, :]
            share = tl.load(routing + s[:, None] * scales + s[None, :], mask=both, other=0.0)
            tl.store(routed + at, tl.sum(share[:, :, None] * v[None, :, :], 1), mask=inside)


class MemoryReads:
    """What one row reads of a block's product-key memories: one product for the scores of all
    keys, then a launch for each memory.

    A key's score is k·(Q h) = (Qᵀ k)·h, so the map Q to queries is folded into the keys: a matrix
    with one row for each key.
    """

    # Of a program: with fewer channels, more programs would choose the same slots anew; with more,
    # some of the GPU's processors would have no program.
    CHANNELS = 64

    @staticmethod
    def takes(memory, device: torch.device) -> bool:
        """Whether the kernel can read this memory (a `folded.Memory`) on this device."""
        few = memory.keys_a.size(1) <= MOST_KEYS and memory.pairs.size(1) <= MOST_PAIRS
        return kernels.usable(device) and few

    @staticmethod
    def fold(query: Tensor, keys_a: Tensor, keys_b: Tensor) -> Tensor:
        """The map to queries (heads·d, C) and the keys of both halves (heads, side, d/2) → the
        matrix whose product with h is all scores, (heads·2·side, C)."""
        halves = query.float().view(keys_a.size(0), 2, keys_a.size(2), -1)  # (heads, 2, d/2, C)
        return (torch.stack([keys_a, keys_b], dim=1).float() @ halves).flatten(0, 2)

    def __init__(self, memories: Sequence, rows: Sequence[Tensor]):
        """memories: each a `folded.Memory` that `takes` accepts; rows: of each what `fold`
        gives."""
        self.memories = list(memories)
        self.scores = kernels.Stack([{"float32": torch.cat(list(rows))}])

    def __call__(self, h: Tensor, x: Tensor) -> Tensor:
        """The normed stream h (1, C) and the stream x (1, C) → x + what the memories read, (1, C)
        in fp32."""
        scores = self.scores(h)[0]  # of all memories, one after the other
        at = 0
        for memory in self.memories:
            values = memory.values
            heads, side = memory.keys_a.shape[:2]
            kind = values.kind
            # Weights that are not quantised have no steps: any tensor stands in for them.
            steps = values.tensors.get("scale", values.tensors.get("steps", values.held))
            per_byte = 2 if kind == "int4" else 1
            block = self.CHANNELS // per_byte
            y = torch.empty_like(x)
            _memory_kernel[(triton.cdiv(values.width // per_byte, block),)](
                scores[at:], memory.pairs, values.held, steps, x, y, side, memory.pairs.size(1),
                memory.top_k, memory.slots,
                values.width, values.held.stride(0), steps.size(1) if kind == "int4" else 0,
                memory.alpha,
                HEADS=heads, SIDE=triton.next_power_of_2(side),
                PAIRS=triton.next_power_of_2(memory.pairs.size(1)),
                TOP=triton.next_power_of_2(memory.top_k), BLOCK=block, KIND=kind, num_warps=8,
            )  # fmt: skip
            x = y
            at += heads * 2 * side
        return x


def open_block(
    x: Tensor,
    e: Tensor,
    gamma: Tensor | None,
    norm: tuple,
    part: dict[str, Tensor],
    window: int,
    h: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """What a block begins with, for one row: returns x + gamma·e and the running mean of x (None
    without a bypass), both (1, C), and writes the norm of the first to h (1, P).

    x, e (1, C); gamma (C,) or None; norm: what `PackedWeights.norm` gives; window: positions that a
    mean with a ring is over. The sum and the ring in `part` are changed in place, the ring at
    part["position"].
    """
    has_mean = "sum" in part
    has_ring = "ring" in part
    x_new = torch.empty_like(x)
    mean = torch.empty_like(x) if has_mean else None
    _, weight, bias, eps = norm
    width = x.size(1)
    position = part["position"]
    # Where something is missing, any tensor stands in for it: the kernel does not read it.
    _open_kernel[(1,)](
        x, e, x if gamma is None else gamma, part["sum"] if has_mean else x,
        part["count"] if has_mean else position,
        part["ring"] if has_ring else x, position, weight, bias, x_new, mean if has_mean else x_new,
        h,
        width, h.size(1), window, part["ring"].size(1) if has_ring else 1, eps,
        HAS_GAMMA=gamma is not None, HAS_MEAN=has_mean, HAS_RING=has_ring,
        BLOCK=triton.next_power_of_2(h.size(1)), num_warps=8,
    )  # fmt: skip
    return x_new, mean


def lags_in_ring(
    ring: Tensor, position: Tensor, offsets: Tensor, shares: Tensor, bias: Tensor
) -> Tensor:
    """What `FoldedLifting.lagged_in_ring` gives, plus bias (J, P), of a ring (1, size, J, P):
    (1, J, P). offsets, shares (J, k): each level's lags; position (1,)."""
    _, size, levels, width = ring.shape
    odd = ring.new_empty(1, levels, width)
    _lags_kernel[(triton.cdiv(width, 256), levels)](
        ring,
        position,
        offsets,
        shares,
        bias,
        odd,
        size,
        width,
        levels,
        COUNT=shares.size(1),
        BLOCK=256,
    )
    return odd


def put(ring: Tensor, position: Tensor, value: Tensor) -> None:
    """Writes value (1, …) to the ring (1, size, …) at `position` (1,) modulo its size."""
    numbers = value.numel()
    _put_kernel[(triton.cdiv(numbers, 1024),)](
        ring, position, value, ring.size(1), numbers, BLOCK=1024
    )


def join(
    c: Tensor, context: Tensor, gains: Tensor, routing: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """c + context·gains, (S, 1, P), and routing (S, S) times it, or None without routing.

    c, gains (S, 1, P); context (1, C), of which channels from C to P are zero.
    """
    scales, _, width = c.shape
    joined = torch.empty_like(c)
    routed = None if routing is None else torch.empty_like(c)
    _join_kernel[(triton.cdiv(width, 64),)](
        c, context, gains, c if routing is None else routing, joined,
        c if routed is None else routed,
        scales, width, context.size(1), HAS_ROUTING=routing is not None,
        SCALES=triton.next_power_of_2(scales), BLOCK=64,
    )  # fmt: skip
    return joined, routed
