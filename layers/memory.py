"""What the network remembers beside its blocks' own state: pairs that the text brings, and n-grams.

AssociativeMemory: a matrix per head that each text fills with pairs of keys and values; a branch
beside the MLP, (B, T, C) → (B, T, C). NgramEmbedding: a table that is read by a hash of the last
tokens, beside the embedding. The recipes configs/best-*.json use both; config.json uses neither.

Letters: B batch, T positions, C channels, d width of a key.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import Config
from layers.delta_rule import DeltaRule, has_kernels
from layers.lags import causal_filter
from layers.passes import recall_by_library
from layers.state import BlockState, remember

# ===== Associative memory: the gated delta rule

# Positions that are solved as one system. Solving 64 at a time costs a CPU more, and so does 16,
# by the T / CHUNK steps that follow each other.
CHUNK = 32


class AssociativeMemory(nn.Module):
    """Pairs of keys and values that the text itself brings, read by later queries: the gated delta
    rule (Yang et al., "Gated delta networks", 2024), per head, in fp32,

        S_t = α_t S_{t−1} + u_t k_tᵀ,  u_t = β_t (v_t − α_t S_{t−1} k_t),  o_t = S_t q_t

    A key that comes again replaces its value, and a value whose key does not come again stays, but
    for α, which leaves at most 1/e of it after recall_horizon positions. Keys and queries are of
    length 1. Both pass a causal filter of 4 taps per channel. At first query and key are the same
    projection, the query of its own position and the key of the one before, so that what followed a
    token is found when the token comes again.
    """

    TAPS = 4

    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.recall_heads
        self.width = config.recall_dim
        # Training windows hardly tell a memory that forgets a thousandth in each position from one
        # that forgets nothing; a text that is read on and on does.
        self.least = 1 / config.recall_horizon if config.recall_horizon else 0.0
        inner = self.heads * self.width
        self.query_key = nn.Linear(config.C, 2 * inner, bias=False)
        self.query_key.weight.data[inner:] = self.query_key.weight.data[:inner]
        self.value_gate = nn.Linear(config.C, 2 * inner, bias=False)
        self.forget_write = nn.Linear(config.C, 2 * self.heads)  # to log α and β
        self.output = nn.Linear(inner, config.C, bias=False)
        # of queries and of keys, the oldest position first
        self.taps = nn.Parameter(torch.zeros(2, self.TAPS, inner))
        self.taps.data[0, -1] = 1.0
        self.taps.data[1, -2] = 1.0
        nn.init.zeros_(self.forget_write.weight)
        # At first α lies between exp(−1/1024) and exp(−1/4) over the heads and β is a half:
        # memories of a thousand positions to a few.
        rates = torch.logspace(math.log10(1 / 1024), math.log10(1 / 4), self.heads)
        self.forget_write.bias.data = torch.cat([rates.expm1().log(), torch.zeros(self.heads)])

    def start(self, rows: int, like: Tensor) -> BlockState:
        keys = like.new_zeros(rows, self.TAPS - 1, 2 * self.heads * self.width)
        pairs = like.new_zeros(rows, self.heads, self.width, self.width, dtype=torch.float32)
        return {"keys": keys, "pairs": pairs}

    def forward(self, h: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        with torch.autocast(h.device.type, enabled=False):
            to_rates = self.forget_write
            rates = F.linear(h.float(), to_rates.weight.float(), to_rates.bias.float())
        projected = self.query_key(h), self.value_gate(h), rates
        read, state = recall(*projected, self.taps, state, self.least)
        return self.output(read), state


def recall(
    query_key: Tensor, value_gate: Tensor, rates: Tensor, taps: Tensor, state: BlockState,
    least: float,
) -> tuple[Tensor, BlockState]:  # fmt: skip
    """What an associative memory finds, from the projections of its input.

    query_key, value_gate (B, T, 2·heads·d), rates (B, T, 2·heads) in fp32, taps (2, TAPS, heads·d)
    → what was read, gated, (B, T, heads·d), and the new state. log α is −softplus(rate) − least.
    """
    before = state["keys"], state["pairs"]
    done = recall_by_library(query_key, value_gate, rates, taps, *before, least)
    if done is not None:
        read, pairs = done
        new_keys = remember(state["keys"], query_key[:, -state["keys"].size(1) :])[1]
        return read, {"keys": new_keys, "pairs": pairs}
    heads = rates.size(-1) // 2

    joined, new_keys = remember(state["keys"], query_key)
    both_taps = taps.transpose(0, 1).flatten(1).to(joined.dtype)  # (TAPS, 2·heads·d)
    filtered = causal_filter(joined, both_taps, query_key.size(1))  # (B, T, 2·heads·d)
    value, gate = value_gate.chunk(2, dim=-1)
    with torch.autocast(joined.device.type, enabled=False):
        q, k = unit(filtered.float().unflatten(-1, (2, heads, -1))).unbind(2)  # (B, T, heads, d)
        v = value.unflatten(-1, (heads, -1))
        log_alpha = -F.softplus(rates[..., :heads]) - least  # (B, T, heads)
        beta = rates[..., heads:].sigmoid()
        given = q, k, v, log_alpha, beta, state["pairs"]
        if q.size(1) > 1 and has_kernels(q):
            read, pairs = DeltaRule.apply(*given)
        else:
            read, pairs = delta_rule(*given)
    read = read.flatten(2)  # (B, T, heads·d)
    return read.to(gate.dtype) * F.silu(gate), {"keys": new_keys, "pairs": pairs}


def unit(x: Tensor) -> Tensor:
    """x (…, d) at length 1. The first key of a text is zero: the constant, small beside |x|², keeps
    its gradient small too."""
    return x * (x.square().sum(-1, keepdim=True) + 0.01).rsqrt()


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, pairs: Tensor
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, T, heads, d), log α and β (B, T, heads), S before them (B, heads, d, d)
    → o (B, T, heads, d), and S after them.

    Within a chunk, with γ_t the product of its α up to t and S the matrix before it, the recurrence
    unrolls to a triangular system for all u:

        u_t + β_t Σ_{s<t} γ_t/γ_s (k_t·k_s) u_s = β_t (v_t − γ_t S k_t)
    """
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))  # (B, heads, T, d)
    log_alpha, beta = log_alpha.mT, beta.mT  # (B, heads, T)
    if q.size(2) == 1:  # the recurrence itself
        pairs = log_alpha.exp()[..., None] * pairs
        pairs = pairs + (beta[..., None] * (v - k @ pairs.mT)).mT @ k
        return (q @ pairs.mT).transpose(1, 2), pairs
    length = q.size(2)
    size = min(CHUNK, length)
    filler = -length % size
    if filler:  # positions that write nothing and forget nothing
        q, k, v = (F.pad(x, (0, 0, 0, filler)) for x in (q, k, v))
        log_alpha, beta = (F.pad(x, (0, filler)) for x in (log_alpha, beta))
    # All chunks at once, (B, heads, chunks, size, ·), but for S: u = own − through Sᵀ, where own
    # and through both solve the same system.
    q, k, v = (x.unflatten(2, (-1, size)) for x in (q, k, v))
    log_gamma = log_alpha.unflatten(2, (-1, size)).cumsum(-1)
    beta = beta.unflatten(2, (-1, size))[..., None]
    gamma = log_gamma.exp()[..., None]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    differences = log_gamma[..., :, None] - log_gamma[..., None, :]
    decay = differences.masked_fill(future, -math.inf).exp()  # γ_t/γ_s, zero for s > t
    system = beta * decay * (k @ k.mT)  # only what is below its diagonal is read
    wanted = torch.cat([beta * v, beta * gamma * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    own, through = solved.chunk(2, dim=-1)
    last = gamma[..., -1:, :]
    kept = decay[..., -1, :, None] * k
    before = []  # S before each chunk
    us = []
    by_chunk = (x.unbind(2) for x in (own, through, last, kept))
    for own_c, through_c, last_c, kept_c in zip(*by_chunk, strict=True):
        before.append(pairs)
        us.append(own_c - through_c @ pairs.mT)
        pairs = last_c * pairs + us[-1].mT @ kept_c
    from_before = gamma * (q @ torch.stack(before, dim=2).mT)
    from_chunk = (decay * (q @ k.mT)) @ torch.stack(us, dim=2)
    return (from_before + from_chunk).flatten(2, 3)[:, :, :length].transpose(1, 2), pairs


# ===== Table of n-grams

PRIME = 2**31 - 1  # a number below it plus an id, times another below it, fits an int64
MULTIPLIER = 1_103_515_245  # any number of about its size that is not special


def hashed(ids: Tensor, n: int, size: int) -> Tensor:
    """Of each n ids in a row, (B, n − 1 + T) → (B, T), a number from 0 to size − 1: a polynomial
    modulo a prime."""
    length = ids.size(1) - n + 1
    key = torch.zeros_like(ids[:, :length])
    for i in range(n):
        key = (key + ids[:, i : i + length]) * MULTIPLIER % PRIME
    return key % size


def read_slots(ids: Tensor, past: Tensor, n: int, size: int) -> tuple[Tensor, Tensor]:
    """ids (B, T), and the n − 1 ids before them, each plus one, (B, n − 1).

    Returns the slot of `size` that each position reads, (B, T), and the last n − 1 ids. The one
    that is added leaves zero for what is before the text.
    """
    joined, last = remember(past, ids + 1)
    return hashed(joined, n, size), last


class NgramEmbedding(nn.Module):
    """A table of ngram_slots values, of which each position reads the one that its token and the
    n − 1 before it hash to, and a map from their width to the channels, zero at first.

    A lookup costs next to nothing however large the table is, and spares the blocks from working
    out what goes with frequent pairs of tokens. N-grams that share a slot share its value. What is
    read is a part of the embedding: with per_layer_embedding each block adds it again. Such tables
    are those of Huang et al., "Over-tokenized transformer", 2025, and Pagnoni et al., "Byte latent
    transformer", 2024.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.n = config.ngram_n
        self.size = config.ngram_slots
        self.values = nn.Embedding(self.size, config.ngram_width)
        self.up = nn.Linear(config.ngram_width, config.C, bias=False)
        nn.init.normal_(self.values.weight, std=0.02)
        nn.init.zeros_(self.up.weight)

    def start(self, rows: int, device: torch.device) -> Tensor:
        """The ids before a text: (rows, n − 1)."""
        return torch.zeros(rows, self.n - 1, dtype=torch.int64, device=device)

    def forward(self, ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T), the ids before them (B, n − 1) → what joins their embedding, (B, T, C), and
        the last n − 1 ids."""
        slots, past = read_slots(ids, past, self.n, self.size)
        return self.up(self.values(slots)), past
