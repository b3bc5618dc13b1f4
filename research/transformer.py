"""A Transformer written out with what helps a small one: compare.py trains it beside ours.

    ids → embedding (+ n-grams)
        → [ x + attention(norm(x)), x + MLP(norm(x)) ] × layers → norm → head

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
from model import SquaredReLU
from research.opponent import Opponent, ngram_table

HEAD = 64  # channels of a head: with 32 attention costs a CPU up to 2.8 times as much


def rotations(length: int) -> Tensor:
    """Cosines and sines of the angles of each position, (2, length, HEAD / 2)."""
    frequencies = 10_000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, (B, h, T, d) of each → (B, h, T, d).

    In 16 bits written out: on a CPU torch's own then takes 2.8 times as long at 256 positions. It
    keeps scores in fp32, where here they are rounded; beside the rounding of what goes in, that is
    little. In fp32 both take the same time, and torch's needs less memory."""
    if query.dtype.itemsize > 2:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    length = query.size(2)
    future = query.new_full((length, length), -math.inf).triu(1)
    scores = torch.baddbmm(
        future, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=query.size(-1) ** -0.5
    )  # (B·h, T, T)
    return (scores.softmax(-1) @ value.flatten(0, 1)).unflatten(0, query.shape[:2])


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.query_key = nn.Linear(width, 2 * width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        # what a head's scores are multiplied by: queries and keys are √d long, and a score is their
        # product over √d, so √d = 8 at the most at first
        self.scale = nn.Parameter(torch.ones(width // HEAD))
        self.up = nn.Linear(width, inner, bias=False)
        self.activation = SquaredReLU()
        self.down = nn.Linear(inner, width, bias=False)
        nn.init.normal_(self.up.weight, std=width**-0.5)  # as large behind it as before it
        for branch in (self.out, self.down):  # both add nothing at first
            nn.init.zeros_(branch.weight)

    def attention(self, h: Tensor, rotation: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        heads = len(self.scale)
        # (B, 2h, T, d): queries of all heads, then keys
        query_key = self.query_key(h).unflatten(-1, (2 * heads, HEAD)).transpose(1, 2)
        query_key = F.rms_norm(query_key, (HEAD,))
        even, odd = query_key.chunk(2, dim=-1)
        cos, sin = rotation.to(query_key.dtype)
        query_key = torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        query, key = query_key.chunk(2, dim=1)
        query = query * self.scale.to(query.dtype)[:, None, None]
        value = self.value(h).unflatten(-1, (heads, HEAD)).transpose(1, 2)  # (B, h, T, d)
        return self.out(attend(query, key, value).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), rotation)
        return x + self.down(self.activation(self.up(self.norm2(x))))


class Transformer(Opponent):
    """A causal language model with the interface of ours."""

    def __init__(self, config: Config, vocab_size: int, width: int, layers: int, inner: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=width**-0.5)  # of length 1, as ours
        self.ngrams = ngram_table(config, width)
        self.layers = nn.ModuleList(TransformerBlock(width, inner) for _ in range(layers))
        self.register_buffer("rotation", rotations(config.block_size), persistent=False)
        self.norm = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # as GPT-2's begins

    def body(self, e: Tensor) -> Tensor:
        rotation = self.rotation[:, : e.size(1)]
        for layer in self.layers:
            e = layer(e, rotation)
        return self.norm(e)
