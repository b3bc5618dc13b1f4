"""The decoder's state: what a step looks back on lies on tapes, so that a step writes one entry and
copies nothing else."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from layers.state import BlockState, State

# Entries that a tape has room for beyond its window, at the least. When they are used up, the
# window is copied to a new buffer: for short windows once in 64 steps.
ROOM = 64


class Tape:
    """The last `length` entries of each text, (B, length, …), as a window on a longer buffer: a
    step writes one entry.

    A buffer is only ever written behind its last entry, so earlier tapes on the same buffer stay
    what they were. A tape that is no longer the newest on its buffer goes on in a copy of its own.
    When a buffer is full, the window moves to a new one of twice its size or more: on average a
    step costs the same however long the window is.
    """

    def __init__(
        self, buffer: Tensor, length: int, end: int | None = None, filled: list[int] | None = None
    ):
        """buffer: (B, size, …); end: where the window ends in it, by default at its end; filled:
        from another tape on the same buffer."""
        self.buffer = buffer
        self.length = length
        self.end = buffer.size(1) if end is None else end
        # How many entries the buffer has: a list of one number, which all tapes on the buffer share
        # and so see each other change.
        self.filled = [self.end] if filled is None else filled

    @property
    def window(self) -> Tensor:
        """The entries from old to new, (B, length, …): a view of the buffer."""
        return self.buffer[:, self.end - self.length : self.end]

    def longer(self) -> "Tape":
        """The tape with one more entry, which is still to be written, and without its oldest."""
        buffer = self.buffer
        end = self.end
        filled = self.filled
        is_newest = filled[0] == end
        if not is_newest or end == buffer.size(1):
            size = self.length + max(ROOM, self.length)
            buffer = self.buffer.new_empty(self.buffer.size(0), size, *self.buffer.shape[2:])
            buffer[:, : self.length] = self.window
            end = self.length
            filled = [end]
        filled[0] = end + 1
        return Tape(buffer, self.length, end + 1, filled)

    def before(self) -> "Tape":
        """What `longer` was called of: the tape without its last entry."""
        return Tape(self.buffer, self.length, self.end - 1, self.filled)

    def write(self, entry: Tensor | list[Tensor]) -> None:
        """Fills the last entry: (B, …), or the list of its parts, (B, ·) each, which are stacked as
        dimension 1."""
        if isinstance(entry, list):
            torch.stack(entry, dim=1, out=self.buffer[:, self.end - 1])  # straight to its place
        else:
            self.buffer[:, self.end - 1] = entry

    def then(self, entry: Tensor | list[Tensor]) -> "Tape":
        """The tape with one more entry, and without its oldest one. entry: as in `write`."""
        tape = self.longer()
        tape.write(entry)
        return tape


class DecoderState(State):
    """A model's state, kept on tapes. `blocks` shows it as the model lays it out."""

    def __init__(
        self,
        parts: list[dict[str, Tensor | Tape]],
        lags: list[list[int]],
        embedding: BlockState,
        layout_of: dict | None = None,
    ):
        """parts: the state of each application of a block, by name; lags: for each of these the
        longest lag of every level, where lags are on a tape; embedding: what the embedding
        remembers; layout_of: the layouts of the decoder whose step made it, if one did."""
        self.parts = parts
        self.lags = lags
        self.embedding = embedding
        self.layout_of = layout_of

    @property
    def rows(self) -> int:
        """How many texts it is of."""
        first = next(iter(self.parts[0].values()))
        return (first.buffer if isinstance(first, Tape) else first).size(0)

    def layout(self) -> list[dict[str, tuple]]:
        """Of each block's tensors the sizes for one text, and the type."""

        def of(part: Tensor | Tape) -> tuple:
            whole = part.window if isinstance(part, Tape) else part
            return (*whole.shape[1:], whole.dtype)

        return [{name: of(part) for name, part in block.items()} for block in self.parts]

    def map(self, function: Callable[[Tensor], Tensor]) -> "DecoderState":
        """A state of what `function` makes of each tensor, and of each tape's window."""

        def mapped(part: Tensor | Tape) -> Tensor | Tape:
            if isinstance(part, Tape):
                return Tape(function(part.window), part.length)
            return function(part)

        parts = [{name: mapped(part) for name, part in block.items()} for block in self.parts]
        embedding = {name: function(t) for name, t in self.embedding.items()}
        return DecoderState(parts, self.lags, embedding)

    @property
    def blocks(self) -> list[dict[str, Tensor]]:
        """The state of each application of a block, as in the model's `State`."""
        return [self._shown(block, lags) for block, lags in zip(self.parts, self.lags, strict=True)]

    @staticmethod
    def _shown(block: dict[str, Tensor | Tape], lags: list[int]) -> dict[str, Tensor]:
        # Blocks share tensors such as their count, and a file holds each tensor once: so copies.
        shown = {
            name: part.window if isinstance(part, Tape) else part.clone()
            for name, part in block.items()
        }
        if "lags" in shown:
            window = shown.pop("lags")  # (B, longest lag of all levels, J, P)
            for level, n in enumerate(lags):
                shown[f"lag{level}"] = window[:, window.size(1) - n :, level]  # (B, n, P)
        return shown


def with_fresh_strides(x: Tensor) -> Tensor:
    """x, with the strides that a new tensor of its shape would have; a copy only where its numbers
    lie in another order.

    torch.compile makes another program for other strides, even if they differ in a dimension of
    size 1, where a stride means nothing and where a view may have any.
    """
    strides = [math.prod(x.shape[i + 1 :]) for i in range(x.dim())]
    return x if list(x.stride()) == strides else x.contiguous().as_strided(x.shape, strides)
