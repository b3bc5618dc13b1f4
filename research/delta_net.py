"""The gated delta rule without a wavelet: compare.py trains it beside ours to see what that adds.

    ids → embedding (+ n-grams) → [ x + memory(norm(x)), x + MLP(norm(x)) ] × layers → norm → head

The memory is ours (layers/memory.py), here the only way that a block looks back.

Letters: B batch, T positions, C channels, V vocabulary.
"""

from torch import Tensor, nn

from config import Config
from layers.memory import AssociativeMemory
from model import SquaredReLU
from research.opponent import Opponent, ngram_table


class DeltaBlock(nn.Module):
    """x + memory(norm(x)), then x + MLP(norm(x)), an MLP of squared ReLU."""

    def __init__(self, config: Config, inner: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.C, bias=False)
        self.norm2 = nn.LayerNorm(config.C, bias=False)
        self.memory = AssociativeMemory(config)
        self.up = nn.Linear(config.C, inner, bias=False)
        self.activation = SquaredReLU()
        self.down = nn.Linear(inner, config.C, bias=False)
        nn.init.normal_(self.up.weight, std=config.C**-0.5)  # as large behind it as before it
        for branch in (self.memory.output, self.down):  # both add nothing at first
            nn.init.zeros_(branch.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        x = x + self.memory(self.norm1(x), self.memory.start(x.size(0), x))[0]
        return x + self.down(self.activation(self.up(self.norm2(x))))


class DeltaNet(Opponent):
    """A causal language model with the interface of ours."""

    def __init__(self, config: Config, vocab_size: int, layers: int, inner: int):
        """config: C, the memory's heads and width, and a table of n-grams if it has one."""
        super().__init__()
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.C)
        nn.init.normal_(self.token_embedding.weight, std=config.C**-0.5)  # of length 1, as ours
        self.ngrams = ngram_table(config, config.C)
        self.layers = nn.ModuleList(DeltaBlock(config, inner) for _ in range(layers))
        self.norm = nn.LayerNorm(config.C, bias=False)
        self.lm_head = nn.Linear(config.C, vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # as GPT-2's begins

    def body(self, e: Tensor) -> Tensor:
        for layer in self.layers:
            e = layer(e)
        return self.norm(e)


def build_delta_net(
    config: Config, vocab_size: int, width: int, layers: int, inner: int
) -> DeltaNet:
    """So many blocks of the width `width`, with an MLP of `inner` channels."""
    return DeltaNet(config.model_copy(update={"C": width}), vocab_size, layers, inner)
