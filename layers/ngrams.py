"""What the last n tokens say together: a table that is read by their hash, beside the embedding
(key ngram_slots).

A lookup costs next to nothing however large the table is, and spares the blocks from working out
what goes with frequent pairs of tokens. Tables of hashed n-grams beside an embedding are those of
Huang et al., "Over-tokenized transformer", 2025, and Pagnoni et al., "Byte latent transformer",
2024."""

import torch
import torch.nn as nn
from torch import Tensor

from config import Config
from layers.state import BlockState, remember

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


def read_slots(ids: Tensor, state: BlockState, n: int, size: int) -> tuple[Tensor, BlockState]:
    """ids (B, T) → the slot of `size` that each position reads, (B, T), and the state after them:
    the last n − 1 ids, each plus one, so that a zero stands for what is before the text."""
    joined, last = remember(state["ids"], ids + 1)
    return hashed(joined, n, size), {"ids": last}


class NgramEmbedding(nn.Module):
    """A table of ngram_slots values, of which each position reads the one that its token and the n
    − 1 before it hash to, and a map from their width to the channels, zero at first. N-grams that
    share a slot share its value. What is read is a part of the embedding: with per_layer_embedding
    each block adds it again."""

    def __init__(self, config: Config):
        super().__init__()
        self.n, self.size = config.ngram_n, config.ngram_slots
        self.values = nn.Embedding(self.size, config.ngram_width)
        self.up = nn.Linear(config.ngram_width, config.C, bias=False)
        nn.init.normal_(self.values.weight, std=0.02)
        nn.init.zeros_(self.up.weight)

    def start(self, rows: int, like: Tensor) -> BlockState:
        return {"ids": like.new_zeros(rows, self.n - 1, dtype=torch.int64)}

    def forward(self, ids: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """ids (B, T) → what joins their embedding, (B, T, C), and the state after them."""
        slots, state = read_slots(ids, state, self.n, self.size)
        return self.up(self.values(slots)), state
