"""What the last n tokens say together: a table that is read by their hash, beside the embedding (key ngram_slots).

A lookup costs next to nothing however large the table is, and spares the blocks from working out what goes with frequent
pairs of tokens. Tables of hashed n-grams beside an embedding are those of Huang et al., "Over-tokenized transformer", 2025,
and Pagnoni et al., "Byte latent transformer", 2024.
"""

import torch
import torch.nn as nn
from torch import Tensor

from config import Config
from state import BlockState, remember

PRIME = 2**31 - 1  # products of two numbers below it fit an int64
MULTIPLIER = 1_103_515_245


def ngram_slots(ids: Tensor, n: int, slots: int) -> Tensor:
    """Hash of each n ids in a row, (B, n − 1 + T) → (B, T), from 0 to slots − 1: a polynomial modulo a prime."""
    length = ids.size(1) - n + 1
    key = torch.zeros_like(ids[:, :length])
    for i in range(n):
        key = (key + ids[:, i : i + length]) * MULTIPLIER % PRIME
    return key % slots


class NgramEmbedding(nn.Module):
    """A table of ngram_slots values, of which each position reads the one that its token and the n − 1 before it hash to, and
    a map from their width to the channels, zero at first. N-grams that share a slot share its value.

    The state holds the last n − 1 ids, each plus one: a zero stands for what is before the text.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.n, self.count = config.ngram_n, config.ngram_slots
        self.values = nn.Embedding(self.count, config.ngram_width)
        self.up = nn.Linear(config.ngram_width, config.C, bias=False)
        nn.init.normal_(self.values.weight, std=0.02)
        nn.init.zeros_(self.up.weight)

    def start(self, rows: int, like: Tensor) -> BlockState:
        return {"ids": like.new_zeros(rows, self.n - 1, dtype=torch.int64)}

    def slots(self, ids: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """ids (B, T) → the slot that each position reads, (B, T), and the state after them."""
        joined, last = remember(state["ids"], ids + 1)
        return ngram_slots(joined, self.n, self.count), {"ids": last}

    def forward(self, ids: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """ids (B, T) → what joins their embedding, (B, T, C), and the state after them."""
        slots, state = self.slots(ids, state)
        return self.up(self.values(slots)), state
