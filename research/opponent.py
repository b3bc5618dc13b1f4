"""What the networks that compare.py trains beside ours have in common.

Letters: B batch, T positions, C channels, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from config import Config
from layers.lags import ShortFilter
from layers.loss import linear_cross_entropy
from layers.memory import NgramEmbedding
from model import SquaredReLU


def ngram_table(config: Config, width: int) -> NgramEmbedding | None:
    """The table beside an embedding of that width, where the config has one."""
    return NgramEmbedding(config.model_copy(update={"C": width})) if config.ngram_slots else None


class Opponent(nn.Module, ABC):
    """A causal language model with the interface of ours: forward → (logits, state), loss → (loss,
    state). It has `token_embedding`, `lm_head`, and `ngrams`, a table beside its embedding or
    None."""

    longest: int | None = None  # tokens of the longest text that it reads; None: any text

    @abstractmethod
    def body(self, e: Tensor) -> Tensor:
        """The embedded tokens (B, T, C) → what the head reads, (B, T, C)."""

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) → what the head reads, (B, T, C)."""
        e = self.token_embedding(ids)
        if self.ngrams is not None:
            e = e + self.ngrams(ids, self.ngrams.start(ids.size(0), ids.device))[0]
        return self.body(e)

    def forward(self, ids: Tensor, state: None = None) -> tuple[Tensor, None]:
        """ids (B, T) → logits (B, T, V), and no state."""
        return self.lm_head(self.hidden(ids)), None

    def loss(self, ids: Tensor, targets: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Mean nats per token of targets (B, T) after ids (B, T), and no state.

        By the same function as ours: with torch's own a small Transformer's step takes a fifth
        more."""
        return linear_cross_entropy(self.hidden(ids), self.lm_head.weight, targets), None


class OpponentBlock(nn.Module):
    """x + mixing(norm(x)), then x + MLP(filter(norm(x))), a short causal filter as ours has before
    an MLP of squared ReLU."""

    def __init__(self, width: int, inner: int, taps: int, mixing: nn.Module):
        """mixing: how the block looks back, (B, T, C) → (B, T, C); its last map is `output`. taps:
        positions that the filter reads."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mixing = mixing
        self.filter = ShortFilter(width, taps)
        self.up = nn.Linear(width, inner, bias=False)
        self.activation = SquaredReLU()
        self.down = nn.Linear(inner, width, bias=False)
        nn.init.normal_(self.up.weight, std=width**-0.5)  # as large behind it as before it
        for last in (mixing.output, self.down):  # both branches add nothing at first
            nn.init.zeros_(last.weight)

    def mix(self, h: Tensor) -> Tensor:
        return self.mixing(h)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        x = x + self.mix(self.norm1(x))
        h = self.norm2(x)
        h, _ = self.filter(h, self.filter.start(h.size(0), h))
        return x + self.down(self.activation(self.up(h)))


class BlockOpponent(Opponent):
    """Embedding (+ n-grams) → blocks → norm → head."""

    def __init__(
        self, config: Config, vocab_size: int, layers: int, block: Callable[[], nn.Module]
    ):
        """config: C, and a table of n-grams if it has one; block: makes one of the blocks."""
        super().__init__()
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.C)
        nn.init.normal_(self.token_embedding.weight, std=config.C**-0.5)  # of length 1, as ours
        self.ngrams = ngram_table(config, config.C)
        self.layers = nn.ModuleList(block() for _ in range(layers))
        self.norm = nn.LayerNorm(config.C, bias=False)
        self.lm_head = nn.Linear(config.C, vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # as GPT-2's begins

    def body(self, e: Tensor) -> Tensor:
        for layer in self.layers:
            e = layer(e)
        return self.norm(e)
