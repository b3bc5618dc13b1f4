"""What the networks that compare.py trains beside ours have in common."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from config import Config
from layers.loss import linear_cross_entropy
from layers.memory import NgramEmbedding


def ngram_table(config: Config, width: int) -> NgramEmbedding | None:
    """The table beside an embedding of that width, where the config has one."""
    return NgramEmbedding(config.model_copy(update={"C": width})) if config.ngram_slots else None


class Opponent(nn.Module, ABC):
    """A causal language model with the interface of ours: forward → (logits, state), loss → (loss,
    state). It has `token_embedding`, `lm_head`, and `ngrams`, a table beside its embedding or
    None."""

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
