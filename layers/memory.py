"""What the network can look things up in: learned tables of values, and what it has read.

ProductKeyMemory: a huge table of values, of which each position reads a few. FastWeightMemory: such
a table that each sequence rewrites at inference. AssociativeMemory: a matrix per head that each
sequence fills with pairs of keys and values. All are branches beside the MLP, (B, T, C) → (B, T,
C). The last two carry state; its size is that of their tables."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import Config
from layers.lags import CausalFilter
from layers.state import BlockState, remember


class ProductKeyMemory(nn.Module):
    """K = k² values per head, found by two codebooks of k keys each (Lample et al., "Large memory
    layers with product keys", 2019): a query's halves are scored against them, the score of a slot
    is the sum of its two keys' scores."""

    def __init__(self, config: Config, keys: int, top_k: int, heads: int):
        super().__init__()
        self.heads, self.slots = heads, keys
        side, half = math.isqrt(keys), config.C // heads // 2
        self.best_per_half = min(top_k, side)
        self.top_k = min(top_k, self.best_per_half**2)
        self.query_proj = nn.Linear(config.C, config.C, bias=False)
        self.keys_a = nn.Parameter(0.02 * torch.randn(heads, side, half))
        self.keys_b = nn.Parameter(0.02 * torch.randn(heads, side, half))
        self.values = nn.EmbeddingBag(heads * keys, config.C, mode="sum")
        nn.init.normal_(self.values.weight, std=0.02)
        # Of the pairs of the i-th and j-th best halves, (i+1)(j+1) score at least as high: only
        # pairs with (i+1)(j+1) ≤ top_k can be among the best top_k. For top_k = 32 that leaves 119
        # sums of 1,024.
        best = range(self.best_per_half)
        pairs = [(i, j) for i in best for j in best if (i + 1) * (j + 1) <= self.top_k]
        # (2, pairs)
        self.register_buffer(
            "pairs", torch.tensor(pairs, device="cpu").T.contiguous(), persistent=False
        )

    def lookup(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h (N, C) → the rows of `values` that it reads and their softmax weights, both (N,
        heads·top_k)."""
        # (N, heads, d/2)
        query_a, query_b = self.query_proj(h).view(h.size(0), self.heads, 2, -1).unbind(2)
        score_a, index_a = torch.einsum("nhd,hkd->nhk", query_a, self.keys_a).topk(
            self.best_per_half
        )
        score_b, index_b = torch.einsum("nhd,hkd->nhk", query_b, self.keys_b).topk(
            self.best_per_half
        )
        i, j = self.pairs
        score, best = (score_a[..., i] + score_b[..., j]).topk(self.top_k)
        slot = (index_a[..., i] * self.keys_b.size(1) + index_b[..., j]).gather(-1, best)
        slot = slot + self.slots * torch.arange(self.heads, device=h.device)[:, None]
        return slot.flatten(1), score.float().softmax(-1).flatten(1)

    def forward(self, h: Tensor) -> Tensor:  # (B, T, C)
        slot, weight = self.lookup(h.flatten(0, 1))
        read = F.embedding_bag(
            slot,
            self.values.weight,
            mode="sum",
            per_sample_weights=weight.to(self.values.weight.dtype),
        )
        return read.view_as(h)


class FastWeightMemory(ProductKeyMemory):
    """A product-key memory whose values v_i + Δ_i each sequence rewrites at inference, if
    fwpkm_inference_updates asks: after each chunk of n tokens one gradient step on Δ towards
    predicting the next hidden state, Δ ← Δ − lr·∇_Δ MSE(lookup(h[:-1]), h[1:])."""

    def __init__(self, config: Config):
        super().__init__(config, config.fwpkm_num_keys, config.fwpkm_top_k, config.fwpkm_heads)
        self.writes, self.lr, self.chunk = (
            config.fwpkm_inference_updates,
            config.fwpkm_update_lr,
            config.fwpkm_chunk_size,
        )

    def start(self, rows: int, like: Tensor) -> BlockState:
        if self.training or not self.writes:
            return {}
        slots, width = self.values.weight.shape
        buffer = {
            "unwritten": like.new_zeros(rows, self.chunk, width),
            "held": like.new_zeros(rows, dtype=torch.int64),
        }
        return {"delta": like.new_zeros(rows, slots, width)} | buffer

    def read(self, h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, t, C) → what it reads of each row's own v + Δ, the rows of the flattened Δ that it
        reads, their weights."""
        slot, weight = self.lookup(h.flatten(0, 1))
        row = torch.arange(h.size(0), device=h.device).repeat_interleave(h.size(1))
        own = slot + delta.size(1) * row[:, None]
        weight = weight.to(delta.dtype)
        read = F.embedding_bag(slot, self.values.weight, mode="sum", per_sample_weights=weight)
        read = read + F.embedding_bag(
            own, delta.flatten(0, 1), mode="sum", per_sample_weights=weight
        )
        return read.view_as(h), own, weight

    def write(self, h: Tensor, delta: Tensor) -> Tensor:
        read, own, weight = self.read(h[:, :-1], delta)
        # of each row's mean squared error by `read`
        gradient = 2 * (read - h[:, 1:]) / h[:, 1:][0].numel()
        change = -self.lr * weight[..., None] * gradient.flatten(0, 1)[:, None]  # (B·t, reads, C)
        return delta.flatten(0, 1).index_add(0, own.flatten(), change.flatten(0, 1)).view_as(delta)

    def forward(self, h: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        if self.training or not self.writes:
            return super().forward(h), {
                name: state[name] for name in ("delta", "unwritten", "held") if name in state
            }
        delta, unwritten, held, reads = state["delta"], state["unwritten"], state["held"], []
        # up to the place where the first row's chunk is full; rows may have begun at different
        # times
        while h.size(1):
            piece, h = h.tensor_split([min(self.chunk - int(held.max()), h.size(1))], dim=1)
            reads.append(self.read(piece, delta)[0])
            place = held[:, None] + torch.arange(piece.size(1), device=h.device)
            unwritten = unwritten.scatter(1, place[..., None].expand_as(piece), piece)
            full = held + piece.size(1) == self.chunk
            if full.any():
                delta = torch.where(full[:, None, None], self.write(unwritten, delta), delta)
            held = (held + piece.size(1)).masked_fill(full, 0)
        return torch.cat(reads, dim=1), {"delta": delta, "unwritten": unwritten, "held": held}


class AssociativeMemory(nn.Module):
    """Pairs of keys and values that the text itself brings, read by later queries: the gated delta
    rule (Yang et al., "Gated delta networks", 2024), per head, in fp32,

        S_t = α_t S_{t−1} + u_t k_tᵀ,  u_t = β_t (v_t − α_t S_{t−1} k_t),  o_t = S_t q_t

    so a key that comes again replaces its value, and one that does not stays. Keys and queries are
    of length 1. Both pass a causal filter of 4 taps per channel. At first both are the same
    projection, a query of its own position and a key of the one before, so what followed a token is
    found when the token comes again."""

    TAPS = 4
    # positions solved as one system: solving 64 costs a CPU more, 16 too, by its T / CHUNK steps in
    # a row
    CHUNK = 32

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.width = config.recall_heads, config.recall_dim
        inner = self.heads * self.width
        self.query_key = nn.Linear(config.C, 2 * inner, bias=False)
        self.query_key.weight.data[inner:] = self.query_key.weight.data[:inner]
        self.value_gate = nn.Linear(config.C, 2 * inner, bias=False)
        self.forget_write = nn.Linear(config.C, 2 * self.heads)
        self.output = nn.Linear(inner, config.C, bias=False)
        # of queries and keys, the oldest position first
        self.taps = nn.Parameter(torch.zeros(2, self.TAPS, inner))
        self.taps.data[0, -1] = self.taps.data[1, -2] = 1.0
        nn.init.zeros_(self.forget_write.weight)
        # α between exp(−1/1024) and exp(−1/4) over the heads at first, β a half: memories of a
        # thousand positions to a few.
        rates = torch.logspace(math.log10(1 / 1024), math.log10(1 / 4), self.heads)
        self.forget_write.bias.data = torch.cat([rates.expm1().log(), torch.zeros(self.heads)])

    def start(self, rows: int, like: Tensor) -> BlockState:
        keys = like.new_zeros(rows, self.TAPS - 1, 2 * self.heads * self.width)
        pairs = like.new_zeros(rows, self.heads, self.width, self.width, dtype=torch.float32)
        return {"keys": keys, "pairs": pairs}

    def unit(self, x: Tensor) -> Tensor:
        """x at length 1. The first key of a text is zero: the constant, small beside |x|², keeps
        its gradient small too."""
        return x * (x.square().sum(-1, keepdim=True) + 0.01).rsqrt()

    def split(self, x: Tensor) -> Tensor:  # (…, T, heads·d) → (…, heads, T, d)
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, h: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        with torch.autocast(h.device.type, enabled=False):
            rates = F.linear(h.float(), self.forget_write.weight, self.forget_write.bias)
        read, state = self.read(self.query_key(h), self.value_gate(h), rates, state)
        return self.output(read), state

    def read(
        self, query_key: Tensor, value_gate: Tensor, rates: Tensor, state: BlockState
    ) -> tuple[Tensor, BlockState]:
        """What the projections of h, (B, T, 2·heads·d) twice and (B, T, 2·heads) in fp32, find: (B,
        T, heads·d), gated."""
        joined, new_keys = remember(state["keys"], query_key)
        taps = self.taps.transpose(0, 1).flatten(1).to(joined.dtype)  # (TAPS, 2·heads·d)
        filtered = CausalFilter.apply(joined, taps, query_key.size(1))
        value, gate = value_gate.chunk(2, dim=-1)
        with torch.autocast(joined.device.type, enabled=False):
            q, k = self.unit(self.split(filtered.float().unflatten(-1, (2, -1)).movedim(2, 0)))
            log_alpha, beta = (
                -F.softplus(rates[..., : self.heads].mT),
                rates[..., self.heads :].mT.sigmoid(),
            )
            read, pairs = self.scan(
                q, k, self.split(value).float(), log_alpha, beta, state["pairs"]
            )
        read = read.transpose(1, 2).flatten(2).to(gate.dtype) * F.silu(gate)
        return read, {"keys": new_keys, "pairs": pairs}

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q, k, v (B, heads, T, d), log α and β (B, heads, T), S before them (B, heads, d, d) → o
        (B, heads, T, d), S after.

        Within a chunk, with γ_t the product of its α up to t and S the matrix before it, the
        recurrence unrolls to a triangular system for all u: u_t + β_t Σ_{s<t} γ_t/γ_s (k_t·k_s) u_s
        = β_t (v_t − γ_t S k_t)."""
        if q.size(2) == 1:  # the recurrence itself
            pairs = log_alpha.exp()[..., None] * pairs
            pairs = pairs + (beta[..., None] * (v - k @ pairs.mT)).mT @ k
            return q @ pairs.mT, pairs
        length, size = q.size(2), min(self.CHUNK, q.size(2))
        filler = -length % size
        if filler:  # positions that write nothing and forget nothing
            q, k, v = (F.pad(x, (0, 0, 0, filler)) for x in (q, k, v))
            log_alpha, beta = F.pad(log_alpha, (0, filler)), F.pad(beta, (0, filler))
        # All chunks at once, (B, heads, chunks, size, ·), but for S: u = own − through Sᵀ, where
        # both solve the same system.
        q, k, v = (x.unflatten(2, (-1, size)) for x in (q, k, v))
        log_gamma, beta = (
            log_alpha.unflatten(2, (-1, size)).cumsum(-1),
            beta.unflatten(2, (-1, size))[..., None],
        )
        gamma = log_gamma.exp()[..., None]
        future = torch.ones(2 * [size], dtype=torch.bool, device=q.device).triu(1)
        decay = (
            (log_gamma[..., :, None] - log_gamma[..., None, :]).masked_fill(future, -math.inf).exp()
        )
        system = beta * decay * (k @ k.mT)  # only what is below its diagonal is read
        wanted = torch.cat([beta * v, beta * gamma * k], dim=-1)
        solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        own, through = solved.chunk(2, dim=-1)
        last, kept = gamma[..., -1:, :], decay[..., -1, :, None] * k
        before, us = [], []
        for own_c, through_c, last_c, kept_c in zip(
            *(x.unbind(2) for x in (own, through, last, kept)), strict=True
        ):
            before.append(pairs)
            us.append(own_c - through_c @ pairs.mT)
            pairs = last_c * pairs + us[-1].mT @ kept_c
        read = gamma * (q @ torch.stack(before, dim=2).mT) + (decay * (q @ k.mT)) @ torch.stack(
            us, dim=2
        )
        return read.flatten(2, 3)[:, :, :length], pairs
