"""A Transformer written out with what helps a small one: compare.py trains it beside ours.

    ids → embedding (+ n-grams)
        → [ x + attention(norm(x)), x + MLP(filter(norm(x))) ] × layers → norm → head

Heads with rotary positions (Su et al., "RoFormer", 2021), queries and keys of one length (Henry et
al., "Query-key normalization", 2020), an MLP of squared ReLU. A step of it takes less of a CPU than
one of `transformers`' Llama.

Letters: B batch, T positions, C channels, h heads, d width of a head, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from research.opponent import BlockOpponent, OpponentBlock

HEAD = 64  # channels of a head: with 32 attention costs a CPU up to 2.8 times as much


def rotations(length: int) -> Tensor:
    """Cosines and sines of the angles of each position, (2, length, HEAD / 2)."""
    frequencies = 10_000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, (B, h, T, d) of each → (B, h, T, d).

    On a CPU in 16 bits written out: torch's own then takes 2.8 times as long at 256 positions. It
    keeps scores in fp32, where here they are rounded; beside the rounding of what goes in, that is
    little. In fp32 both take the same time, and torch's needs less memory."""
    if query.dtype.itemsize > 2 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    length = query.size(2)
    future = query.new_full((length, length), -math.inf).triu(1)
    scores = torch.baddbmm(
        future, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=query.size(-1) ** -0.5
    )  # (B·h, T, T)
    return (scores.softmax(-1) @ value.flatten(0, 1)).unflatten(0, query.shape[:2])


class Attention(nn.Module):
    """(B, T, C) → (B, T, C)."""

    def __init__(self, width: int, length: int):
        """length: of the longest text."""
        super().__init__()
        self.query_key = nn.Linear(width, 2 * width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        # what a head's scores are multiplied by: queries and keys are √d long, and a score is their
        # product over √d, so √d = 8 at the most at first
        self.scale = nn.Parameter(torch.ones(width // HEAD))
        self.register_buffer("rotation", rotations(length), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        heads = len(self.scale)
        # (B, 2h, T, d): queries of all heads, then keys
        query_key = self.query_key(h).unflatten(-1, (2 * heads, HEAD)).transpose(1, 2)
        query_key = F.rms_norm(query_key, (HEAD,))
        even, odd = query_key.chunk(2, dim=-1)
        cos, sin = self.rotation[:, : h.size(1)].to(query_key.dtype)
        query_key = torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        query, key = query_key.chunk(2, dim=1)
        query = query * self.scale.to(query.dtype)[:, None, None]
        value = self.value(h).unflatten(-1, (heads, HEAD)).transpose(1, 2)  # (B, h, T, d)
        return self.output(attend(query, key, value).transpose(1, 2).flatten(2))


def build_transformer(
    config: Config, vocab_size: int, width: int, layers: int, inner: int, taps: int
) -> BlockOpponent:
    """So many blocks of the width `width`, with an MLP of `inner` channels; config: the longest
    text, and a table of n-grams if it has one."""
    config = config.model_copy(update={"C": width})

    def block() -> OpponentBlock:
        return OpponentBlock(width, inner, taps, Attention(width, config.block_size))

    network = BlockOpponent(config, vocab_size, layers, block)
    network.longest = config.block_size
    return network
