"""The decoder's state: what a step looks back on lies on tapes, so that a step writes one entry and
copies nothing."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from layers.state import BlockState, State

# positions that a tape holds beyond its window at the least: it is copied once in so many steps
ROOM = 64


class Tape:
    """The last `length` entries of each row, (B, length, …), as a window on a longer buffer: a step
    writes one entry.

    A buffer is only ever written past its end, so earlier tapes on it stay what they were, and a
    tape that is not the newest goes on in a copy of its own. When a buffer is full the window moves
    to a new one: amortised, a step is O(1)."""

    def __init__(
        self, buffer: Tensor, length: int, end: int | None = None, filled: list[int] | None = None
    ):
        self.buffer, self.length, self.end = buffer, length, buffer.size(1) if end is None else end
        # of the buffer; one list for all tapes on it
        self.filled = [self.end] if filled is None else filled

    @property
    def window(self) -> Tensor:
        return self.buffer[:, self.end - self.length : self.end]

    def then(self, entry: Tensor | list[Tensor]) -> "Tape":
        """The tape one entry on: (B, …), or the list of its parts along the first of these
        dimensions."""
        buffer, end, filled = self.buffer, self.end, self.filled
        if filled[0] != end or end == buffer.size(1):
            room = self.length + max(ROOM, self.length)
            buffer = self.buffer.new_empty(self.buffer.size(0), room, *self.buffer.shape[2:])
            buffer[:, : self.length] = self.window
            end, filled = self.length, [self.length]
        filled[0] = end + 1
        if isinstance(entry, list):
            torch.stack(entry, dim=1, out=buffer[:, end])
        else:
            buffer[:, end] = entry
        return Tape(buffer, self.length, end + 1, filled)


class DecoderState(State):
    """A model's state, kept on tapes: `blocks` shows it as the model lays it out."""

    def __init__(
        self,
        parts: list[dict[str, Tensor | Tape]],
        lags: list[list[int]],
        embedding: BlockState,
    ):
        """parts: of each block application; lags: of each, the longest of each level."""
        self.parts = parts
        self.lags = lags
        self.embedding = embedding

    def map(self, function: Callable[[Tensor], Tensor]) -> "DecoderState":
        def mapped(part: Tensor | Tape) -> Tensor | Tape:
            if isinstance(part, Tape):
                return Tape(function(part.window), part.length)
            return function(part)

        parts = [{name: mapped(part) for name, part in block.items()} for block in self.parts]
        embedding = {name: function(t) for name, t in self.embedding.items()}
        return DecoderState(parts, self.lags, embedding)

    @property
    def blocks(self) -> list[dict[str, Tensor]]:
        return [self._shown(block, lags) for block, lags in zip(self.parts, self.lags, strict=True)]

    @staticmethod
    def _shown(block: dict[str, Tensor | Tape], lags: list[int]) -> dict[str, Tensor]:
        # Copies where a tensor may be shared, as blocks share their count: files hold each tensor
        # once.
        shown = {
            name: part.window if isinstance(part, Tape) else part.clone()
            for name, part in block.items()
        }
        if "lags" in shown:
            window = shown.pop("lags")  # (B, longest, J, P)
            shown |= {
                f"lag{level}": window[:, window.size(1) - n :, level]
                for level, n in enumerate(lags)
            }
        return shown


def plain(x: Tensor) -> Tensor:
    """x with the strides of a new tensor: a program is compiled anew for others, those of
    dimensions of size 1 too."""
    strides = [math.prod(x.shape[i + 1 :]) for i in range(x.dim())]
    return x if list(x.stride()) == strides else x.contiguous().as_strided(x.shape, strides)
