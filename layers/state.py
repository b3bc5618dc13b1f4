"""What the network keeps of the text so far: tensors of a fixed size for each block, whatever came
before."""

from collections.abc import Sequence

import torch
from torch import Tensor

BlockState = dict[str, Tensor]


def remember(past: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Puts the remembered inputs `past` (B, n, ·) before `x` (B, T, ·): returns both joined, and
    the last n of them."""
    joined = torch.cat([past, x], dim=1)
    # a copy: a view would keep the whole chunk in memory
    return joined, joined[:, x.size(1) :].clone()


class State:
    """What the network keeps of the text so far: for each block application a dict of tensors,
    batch rows first.

    Its size does not depend on how much text went before. `detach` cuts the gradient (truncated
    BPTT), `select` forks or reorders rows, `reset` starts some rows anew; checkpoint.py saves it.
    """

    def __init__(self, blocks: list[BlockState]):
        self.blocks = blocks

    def _map(self, function) -> "State":
        return State(
            [{name: function(tensor) for name, tensor in block.items()} for block in self.blocks]
        )

    def select(self, rows: Tensor | Sequence[int]) -> "State":
        """The state of `rows` (indices into the batch, in any order and number)."""
        return self._map(lambda tensor: tensor[torch.as_tensor(rows, device=tensor.device)])

    def detach(self) -> "State":
        return self._map(Tensor.detach)

    def clone(self) -> "State":
        return self._map(Tensor.clone)

    def reset(self, rows: Tensor) -> "State":
        """A state in which the rows where `rows` (B,) is True are at the start of a text; every
        start is all zeros."""
        return self._map(
            lambda t: t.masked_fill(rows.to(t.device).view(-1, *[1] * (t.dim() - 1)), 0)
        )

    def to(self, device) -> "State":
        return self._map(lambda tensor: tensor.to(device))

    @property
    def rows(self) -> int:
        return next(iter(self.blocks[0].values())).size(0)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for block in self.blocks for tensor in block.values())
