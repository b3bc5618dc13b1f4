"""The gated delta rule without a wavelet: compare.py trains it beside ours to see what that adds.

    ids → embedding (+ n-grams)
        → [ x + memory(norm(x)), x + MLP(filter(norm(x))) ] × layers → norm → head

The memory is ours (layers/memory.py), here the only way that a block looks back.

Letters: B batch, T positions, C channels, V vocabulary.
"""

from torch import Tensor

from config import Config
from layers.memory import AssociativeMemory
from research.opponent import BlockOpponent, OpponentBlock


class DeltaBlock(OpponentBlock):
    """A block whose mixing is an associative memory."""

    def mix(self, h: Tensor) -> Tensor:
        return self.mixing(h, self.mixing.start(h.size(0), h))[0]


def build_delta_net(
    config: Config, vocab_size: int, width: int, layers: int, inner: int, taps: int
) -> BlockOpponent:
    """So many blocks of the width `width`, with an MLP of `inner` channels; config: the memory's
    heads and width, and a table of n-grams if it has one."""
    config = config.model_copy(update={"C": width})

    def block() -> DeltaBlock:
        return DeltaBlock(width, inner, taps, AssociativeMemory(config))

    return BlockOpponent(config, vocab_size, layers, block)
