"""Plain networks that compare.py trains beside ours: in a block an MLP and one way of mixing.

    ids → embedding (+ n-grams) → [ x + mixing(norm(x)), x + MLP(norm(x)) ] × layers → norm → head

The mixing is attention, which makes it a Transformer, or the gated delta rule of ours
(layers/memory.py) without a wavelet beside it. They are written out because the library's
Transformers spend a tenth of a small step on norms that torch has no single kernel for there.

Letters: B batch, T positions, C channels, V vocabulary, d width of a head.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from layers.loss import linear_cross_entropy
from layers.memory import AssociativeMemory, NgramEmbedding
from model import SquaredReLU

BASE = 10_000  # of the wave lengths of rotary positions (Su et al., "RoFormer", 2021)


def matrix(inputs: int, outputs: int, std: float) -> nn.Linear:
    """A map without a bias; std 0 where a branch is to add nothing at first."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=std)
    return linear


class Attention(nn.Module):
    """Causal attention with rotary positions. Queries and keys have length √d ("QK norm", Henry et
    al., 2020), so that a high learning rate does not let single positions win for good."""

    def __init__(self, width: int, heads: int, block_size: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (
            matrix(width, width, 1 / math.sqrt(width)) for _ in range(3)
        )
        self.output = matrix(width, width, 0.0)
        half = width // heads // 2
        rates = BASE ** (-torch.arange(half) / half)
        angles = torch.arange(block_size)[:, None, None] * rates  # (T, 1, d/2)
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def placed(self, x: Tensor) -> Tensor:
        """Queries or keys (B, T, heads, d) at length √d, turned by their positions."""
        length = x.size(1)
        x = F.rms_norm(x, x.shape[-1:])
        a, b = x.chunk(2, dim=-1)
        cosines = self.cosines[:length]
        sines = self.sines[:length]
        return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        projections = (self.query, self.key, self.value)
        q, k, v = (project(h).unflatten(-1, (self.heads, -1)) for project in projections)
        by_head = (x.transpose(1, 2) for x in (self.placed(q), self.placed(k), v))
        read = F.scaled_dot_product_attention(*by_head, is_causal=True)  # (B, heads, T, d)
        return self.output(read.transpose(1, 2).flatten(2))


class DeltaRule(nn.Module):
    """Our associative memory as the only way that a block looks back."""

    def __init__(self, config: Config):
        super().__init__()
        self.memory = AssociativeMemory(config)
        nn.init.zeros_(self.memory.output.weight)

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        return self.memory(h, self.memory.start(h.size(0), h))[0]


class PlainBlock(nn.Module):
    """x + mixing(norm(x)), then x + MLP(norm(x)), an MLP of squared ReLU."""

    def __init__(self, width: int, inner: int, mixing: nn.Module):
        super().__init__()
        self.mixing = mixing
        # LayerNorm: on a CPU torch has one kernel for it, and several for RMSNorm.
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(
            matrix(width, inner, 1 / math.sqrt(width)), SquaredReLU(), matrix(inner, width, 0.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        x = x + self.mixing(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainNetwork(nn.Module):
    """A causal language model with the interface of ours: forward → (logits, state), loss →
    (loss, state)."""

    def __init__(self, config: Config, vocab_size: int, layers: int, inner: int, mixing: Callable):
        """config: C, and a table of n-grams if it has one; mixing: makes a block's."""
        super().__init__()
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.C)
        nn.init.normal_(self.token_embedding.weight, std=1 / math.sqrt(config.C))
        self.ngrams = NgramEmbedding(config) if config.ngram_slots else None
        self.layers = nn.ModuleList(PlainBlock(config.C, inner, mixing()) for _ in range(layers))
        self.norm = nn.LayerNorm(config.C, bias=False)
        self.lm_head = matrix(config.C, vocab_size, 0.02)  # as GPT-2's begins

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) → what the head reads, (B, T, C)."""
        x = self.token_embedding(ids)
        if self.ngrams is not None:
            x = x + self.ngrams(ids, self.ngrams.start(ids.size(0), ids.device))[0]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, ids: Tensor, state: None = None) -> tuple[Tensor, None]:
        """ids (B, T) → logits (B, T, V), and no state."""
        return self.lm_head(self.hidden(ids)), None

    def loss(self, ids: Tensor, targets: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Mean nats per token of targets (B, T) after ids (B, T), and no state."""
        return linear_cross_entropy(self.hidden(ids), self.lm_head.weight, targets), None


def build_transformer(
    config: Config, vocab_size: int, width: int, layers: int, inner: int
) -> PlainNetwork:
    """Attention by heads of 32 channels."""
    config = config.model_copy(update={"C": width})
    return PlainNetwork(
        config, vocab_size, layers, inner, lambda: Attention(width, width // 32, config.block_size)
    )


def build_delta_net(
    config: Config, vocab_size: int, width: int, layers: int, inner: int
) -> PlainNetwork:
    """The gated delta rule by heads of 32 channels, as many as the config's recall_heads."""
    config = config.model_copy(update={"C": width})
    return PlainNetwork(config, vocab_size, layers, inner, lambda: DeltaRule(config))
