"""The gated delta rule on a GPU, as Triton kernels: an associative memory's way through a text,
forward and back.

Per text and head, for positions t = 1 … T, with keys and values of width d (memory.py has the
source of the rule):

    S_t = α_t S_{t−1} + β_t e_t k_tᵀ,  e_t = v_t − α_t S_{t−1} k_t,  o_t = S_t q_t

A program goes along one text with a part of one head's S in registers and keeps nothing else. The
rows of S, one for each channel of the values, do not need one another, so programs share them out.

Backward, G_t is the gradient of S_t. With w_t = G_t k_t, the gradient of β_t e_t,

    of v_t = β_t w_t =: z_t          of q_t = S_tᵀ of_o_t
    of β_t = w_t·e_t                 of k_t = β_t G_tᵀ e_t − α_t S_{t−1}ᵀ z_t
    of log α_t = Σ G'_{t−1} ⊙ S_{t−1}, where G'_{t−1} = α_t (G_t − z_t k_tᵀ) is what G_{t−1} has
                                     from later positions

That sum c_{t−1} follows from the one after it: c_{t−1} = c_t + of_o_t·o_t − v_t·z_t. (Its rounding
errors add up on the way, to about 1e-6 of the largest c: where α is so small that the true sum is
below that, what is left is noise.) So no S has to be kept: one pass back over rows of G finds all
z_t, and with z_t and e_t known the columns of G and S do not need one another either; one pass back
and one forward over columns find the rest.

In the kernels names of tensors are addresses of their first elements. q and k are (B, T, heads, d)
in fp32 with steps of `row` elements from a position to the next, v the same with `v_row`. Without
gaps are log_alpha and beta (B, T, heads), o, e, z and gradients (B, T, heads, d), and matrices
(B, heads, d, d). A matrix that is gone over by rows is given with rows and columns exchanged, so
that neighbouring threads, which have neighbouring rows, read neighbouring numbers.
"""

import torch
from torch import Tensor

from common.gpu import HAS_TRITON, compiles_kernels

WIDTHS = (16, 32, 64, 128)  # of keys, that there are kernels for
# Rows or columns of S in one program, which is one warp of 32 threads: a sum is over what a few
# neighbouring threads hold, and nothing waits for another warp.
BLOCK = 32
# Positions that are read ahead: a read takes as long as some positions.
STAGES = 3

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _program(length, heads, D: tl.constexpr, BLOCK: tl.constexpr):
        """What a program works on: its head; of all positions of all texts its text's first; all D
        rows or columns of a matrix, the BLOCK other ones that are its own, and where these cross in
        the memory of the matrices, (D, BLOCK)."""
        text_and_head = tl.program_id(0)
        first = (text_and_head // heads).to(tl.int64) * length
        whole = tl.arange(0, D)
        own = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        matrix = text_and_head.to(tl.int64) * D * D + whole[:, None] * D + own[None, :]
        return text_and_head % heads, first, whole, own, matrix

    @triton.jit
    def _read_kernel(
        q, k, v, log_alpha, beta, before, o, e, after, length, heads, row, v_row,
        D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """The way forward, for BLOCK rows i of S: o, e, and the matrix after the text."""
        head, first, j, i, matrix = _program(length, heads, D, BLOCK)
        s = tl.load(before + matrix)  # Sᵀ, (D, BLOCK)
        for n in tl.range(0, length, num_stages=STAGES):
            t = first + n
            key = tl.load(k + t * row + head * D + j)
            query = tl.load(q + t * row + head * D + j)
            value = tl.load(v + t * v_row + head * D + i)
            a = tl.exp(tl.load(log_alpha + t * heads + head))
            b = tl.load(beta + t * heads + head)
            s *= a
            error = value - tl.sum(s * key[:, None], 0)
            s += key[:, None] * (b * error)[None, :]
            place = (t * heads + head) * D + i
            tl.store(e + place, error)
            tl.store(o + place, tl.sum(s * query[:, None], 0))
        tl.store(after + matrix, s)

    @triton.jit
    def _rows_back_kernel(
        q, k, v, log_alpha, beta, o, e, after, of_o, of_after, z, of_log_alpha, of_beta,
        length, heads, row, v_row, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """The way back, for BLOCK rows i of G: z, and this block's share of the gradients of log α
        and β, (B, T, heads, blocks)."""
        head, first, j, i, matrix = _program(length, heads, D, BLOCK)
        g = tl.load(of_after + matrix)  # Gᵀ, (D, BLOCK)
        c = tl.sum(g * tl.load(after + matrix), 0)  # (BLOCK,), each row's share
        for n in tl.range(0, length, num_stages=STAGES):
            t = first + length - 1 - n
            key = tl.load(k + t * row + head * D + j)
            query = tl.load(q + t * row + head * D + j)
            value = tl.load(v + t * v_row + head * D + i)
            a = tl.exp(tl.load(log_alpha + t * heads + head))
            b = tl.load(beta + t * heads + head)
            place = (t * heads + head) * D + i
            error = tl.load(e + place)
            read = tl.load(o + place)
            of_read = tl.load(of_o + place)
            g += query[:, None] * of_read[None, :]
            w = tl.sum(g * key[:, None], 0)
            c += of_read * read - b * w * value
            g = a * (g - key[:, None] * (b * w)[None, :])
            tl.store(z + place, b * w)
            share = (t * heads + head) * tl.num_programs(1) + tl.program_id(1)
            tl.store(of_beta + share, tl.sum(w * error, 0))
            tl.store(of_log_alpha + share, tl.sum(c, 0))

    @triton.jit
    def _columns_back_kernel(
        q, k, log_alpha, beta, e, z, of_o, of_after, of_k, of_before, length, heads, row,
        D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """The way back, for BLOCK columns j of G: β Gᵀ e of each position, and the gradient of the
        matrix before the text."""
        head, first, i, j, matrix = _program(length, heads, D, BLOCK)
        g = tl.load(of_after + matrix)  # (D, BLOCK)
        for n in tl.range(0, length, num_stages=STAGES):
            t = first + length - 1 - n
            key = tl.load(k + t * row + head * D + j)
            query = tl.load(q + t * row + head * D + j)
            a = tl.exp(tl.load(log_alpha + t * heads + head))
            b = tl.load(beta + t * heads + head)
            rows = (t * heads + head) * D + i
            g += tl.load(of_o + rows)[:, None] * query[None, :]
            columns = (t * heads + head) * D + j
            tl.store(of_k + columns, b * tl.sum(g * tl.load(e + rows)[:, None], 0))
            g = a * (g - tl.load(z + rows)[:, None] * key[None, :])
        tl.store(of_before + matrix, g)

    @triton.jit
    def _columns_forward_kernel(
        k, log_alpha, beta, before, e, z, of_o, of_q, of_k, length, heads, row,
        D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """The way forward once more, for BLOCK columns j of S: the gradient of q, and to that of k
        what it lacks."""
        head, first, i, j, matrix = _program(length, heads, D, BLOCK)
        s = tl.load(before + matrix)  # (D, BLOCK)
        for n in tl.range(0, length, num_stages=STAGES):
            t = first + n
            key = tl.load(k + t * row + head * D + j)
            a = tl.exp(tl.load(log_alpha + t * heads + head))
            b = tl.load(beta + t * heads + head)
            rows = (t * heads + head) * D + i
            columns = (t * heads + head) * D + j
            s *= a
            found = tl.sum(s * tl.load(z + rows)[:, None], 0)
            tl.store(of_k + columns, tl.load(of_k + columns) - found)
            s += (b * tl.load(e + rows))[:, None] * key[None, :]
            tl.store(of_q + columns, tl.sum(s * tl.load(of_o + rows)[:, None], 0))


def has_kernels(q: Tensor) -> bool:
    """Whether there are kernels for queries like q (B, T, heads, d), on their device."""
    return q.device.type == "cuda" and q.size(3) in WIDTHS and compiles_kernels()


def _laid_out(x: Tensor) -> tuple[Tensor, int]:
    """x (B, T, heads, d) in fp32 as the kernels read it, a copy only where texts, heads or channels
    do not follow each other, and the elements from a position to the next."""
    x = x.float()  # numbers of 16 bits cannot be read ahead one by one
    text, row, head, channel = x.stride()
    if (text, head, channel) == (row * x.size(1), x.size(3), 1):
        return x, row
    return x.contiguous(), x.size(2) * x.size(3)


def _laid_out_alike(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int]:
    """q and k as `_laid_out` gives them, with one step for both."""
    q, row = _laid_out(q)
    k, other = _laid_out(k)
    if row != other:
        q, row = q.contiguous(), q.size(2) * q.size(3)
        k = k.contiguous()
    return q, k, row


@torch.library.custom_op("waveletlm::delta_rule", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, pairs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As for `DeltaRule` → o and e, and S after them."""
    texts, length, heads, width = q.shape
    o = q.new_empty(q.shape)
    e = q.new_empty(q.shape)
    after = torch.empty_like(pairs, memory_format=torch.contiguous_format)  # exchanged
    block = min(BLOCK, width)
    q, k, row = _laid_out_alike(q, k)
    v, v_row = _laid_out(v)
    if texts:
        _read_kernel[(texts * heads, width // block)](
            q, k, v, log_alpha.contiguous(), beta.contiguous(), pairs.mT.contiguous(), o, e, after,
            length, heads, row, v_row, D=width, BLOCK=block, STAGES=STAGES, num_warps=1,
        )  # fmt: skip
    return o, e, after.mT.contiguous()


@_forward.register_fake
def _(q, k, v, log_alpha, beta, pairs):
    return q.new_empty(q.shape), q.new_empty(q.shape), pairs.new_empty(pairs.shape)


@torch.library.custom_op("waveletlm::delta_rule_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, pairs: Tensor,
    o: Tensor, e: Tensor, after: Tensor, of_o: Tensor, of_after: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, of log α and β (2, B, T, heads), and of S before the text, all in
    fp32."""
    texts, length, heads, width = q.shape
    log_alpha, beta, pairs = log_alpha.contiguous(), beta.contiguous(), pairs.contiguous()
    of_o, of_after = of_o.float().contiguous(), of_after.contiguous()
    of_q, of_k, z = (q.new_empty(q.shape) for _ in range(3))
    of_pairs = torch.empty_like(pairs)
    block = min(BLOCK, width)
    blocks = width // block
    shares = q.new_empty(2, *log_alpha.shape, blocks)  # of log α and of β
    grid = (texts * heads, blocks)
    how = {"D": width, "BLOCK": block, "STAGES": STAGES, "num_warps": 1}
    q, k, row = _laid_out_alike(q, k)
    v, v_row = _laid_out(v)
    _rows_back_kernel[grid](
        q, k, v, log_alpha, beta, o, e, after.mT.contiguous(), of_o, of_after.mT.contiguous(), z,
        shares[0], shares[1], length, heads, row, v_row, **how,
    )  # fmt: skip
    _columns_back_kernel[grid](
        q, k, log_alpha, beta, e, z, of_o, of_after, of_k, of_pairs, length, heads, row, **how
    )
    _columns_forward_kernel[grid](
        k, log_alpha, beta, pairs, e, z, of_o, of_q, of_k, length, heads, row, **how
    )
    return of_q, of_k, z, shares.sum(-1), of_pairs


@_backward.register_fake
def _(q, k, v, log_alpha, beta, pairs, o, e, after, of_o, of_after):
    of_q, of_k, of_v = (q.new_empty(q.shape) for _ in range(3))
    of_rates = log_alpha.new_empty(2, *log_alpha.shape)
    return of_q, of_k, of_v, of_rates, pairs.new_empty(pairs.shape)


class DeltaRule(torch.autograd.Function):
    """q, k (B, T, heads, d) in fp32, v of the same sizes in any type, log α and β (B, T, heads), S
    before them (B, heads, d, d) → o (B, T, heads, d), and S after them, in fp32.

    The kernels are in operators of their own, since torch.compile then leaves them as they are."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        o, e, after = _forward(*inputs)
        ctx.save_for_backward(*inputs, o, e, after)
        return o, after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_o: Tensor, of_after: Tensor):
        v = ctx.saved_tensors[2]
        of_q, of_k, of_v, of_rates, of_pairs = _backward(*ctx.saved_tensors, of_o, of_after)
        return of_q, of_k, of_v.to(v.dtype), of_rates[0], of_rates[1], of_pairs
