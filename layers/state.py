"""What the network keeps of the text so far: tensors of a fixed size, whatever came before."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BlockState = dict[str, Tensor]  # by name, batch rows first


def remember(past: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Puts the remembered inputs `past` (B, n, ·) before `x` (B, T, ·).

    Returns both joined, (B, n + T, ·), and the last n of them, to be remembered next.
    """
    joined = torch.cat([past, x], dim=1)
    last = joined[:, x.size(1) :].clone()  # a copy: a view would keep the whole chunk in memory
    return joined, last


def start_of_lags(longest: Sequence[int], width: int, rows: int, like: Tensor) -> BlockState:
    """What a wavelet remembers at the start of `rows` texts: of each level the inputs that its
    longest lag reaches back to, as zeros of the type of `like`."""
    lags = enumerate(longest)
    return {f"lag{level}": like.new_zeros(rows, n, width) for level, n in lags}


class State:
    """What the network keeps of the text so far.

    `blocks` has a dict of tensors for each application of a block, `embedding` what the embedding
    remembers. The size of all this does not depend on how much text went before. `detach` cuts the
    gradient (truncated BPTT), `select` forks or reorders rows, `reset` starts some rows anew;
    checkpoint.py saves it.
    """

    def __init__(self, blocks: list[BlockState], embedding: BlockState | None = None):
        self.blocks = blocks
        self.embedding = {} if embedding is None else embedding

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """A state of what `function` makes of each tensor."""
        blocks = [{name: function(t) for name, t in block.items()} for block in self.blocks]
        return State(blocks, {name: function(t) for name, t in self.embedding.items()})

    def select(self, rows: Tensor | Sequence[int]) -> "State":
        """The state of `rows` (indices into the batch, in any order and number)."""
        return self.map(lambda t: t[torch.as_tensor(rows, device=t.device)])

    def detach(self) -> "State":
        return self.map(Tensor.detach)

    def clone(self) -> "State":
        return self.map(Tensor.clone)

    def reset(self, rows: Tensor) -> "State":
        """A state in which the rows where `rows` (B,) is True are at the start of a text."""

        def zeroed(t: Tensor) -> Tensor:  # every start is all zeros
            return t.masked_fill(rows.to(t.device).view(-1, *[1] * (t.dim() - 1)), 0)

        return self.map(zeroed)

    def to(self, device: torch.device | str) -> "State":
        return self.map(lambda t: t.to(device))

    def saved(self) -> list[BlockState]:
        """The state as files hold it: a dict for each block, and the embedding's as the last."""
        return [*self.blocks, self.embedding] if self.embedding else list(self.blocks)

    @classmethod
    def of_saved(cls, parts: Sequence[BlockState]) -> "State":
        """The state that `saved` gave, or that of a file in which the first block of each network
        holds the ids that its embedding remembers."""
        blocks = [dict(part) for part in parts]
        embedding: BlockState = {}
        if blocks and blocks[-1] and all(name.endswith("ids") for name in blocks[-1]):
            embedding = blocks.pop()
        for block in blocks:
            if "ids" in block:
                embedding[ids_name(len(embedding))] = block.pop("ids")
        return cls(blocks, embedding)

    @property
    def rows(self) -> int:
        return next(iter(self.blocks[0].values())).size(0)

    @property
    def nbytes(self) -> int:
        parts = [*self.blocks, self.embedding]
        return sum(tensor.nbytes for part in parts for tensor in part.values())


def ids_name(cell: int) -> str:
    """The name in `State.embedding` of the ids that the embedding of the cell-th network keeps."""
    return "ids" if cell == 0 else f"cell{cell}.ids"
