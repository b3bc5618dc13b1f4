"""Which tokens a training step sees: a pure function of (seed, step)."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from common.command import InputError
from config import Config
from data.prepare import Corpus
from data.tokens import TokenFile


def evaluation_slice(tokens: TokenFile, n: int) -> torch.Tensor:
    """The first `n` tokens (fewer if there are no more), int64 (n,): the same at every call."""
    return torch.from_numpy(tokens.tokens[:n].astype(np.int64))


# ===== Training order


def permuted(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(n), given by (seed, epoch), sends `index` (int64,
    any shape).

    A Feistel network permutes 2^(2·half) ≥ n numbers, whatever its round function; a number that
    lands past n goes through again until it does not (cycle walking), which leaves a permutation of
    range(n). So nothing of size n is ever stored, and unlike numpy's generators the order will not
    change with numpy's version."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = np.frombuffer(hashlib.sha512(f"{seed} {epoch}".encode()).digest(), "<u8")  # eight rounds
    out = index.astype(np.uint64)
    walking = np.ones(out.shape, bool)
    while walking.any():
        value = out[walking]
        left, right = value >> shift, value & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        out[walking] = (left << shift) | right
        walking = out >= n
    return out.astype(np.int64)


def _mixed(value: np.ndarray) -> np.ndarray:
    """Scrambles uint64: the finalizer of SplitMix64 (Steele et al., 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _window_tensors(
    tokens: TokenFile, starts: np.ndarray, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    # (rows, block_size + 1): the targets are the ids one further
    windows = torch.from_numpy(
        tokens.tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    )
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Windows:
    """Training windows without replacement: each epoch reads every window once, in an order of its
    own.

    Windows follow each other at a stride of `block_size`. From the second epoch on they start at a
    random offset below `block_size`, so that the same token is not always first; the last window
    then moves back to end with the text. A batch that an epoch does not fill takes its other rows
    from the next epoch. With `part` (first token, end) all this is of that part of the file."""

    def __init__(
        self,
        tokens: TokenFile,
        block_size: int,
        batch_size: int,
        seed: int,
        part: tuple[int, int] | None = None,
    ):
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.first, self.end = part or (0, len(tokens))
        length = self.end - self.first
        self.n_windows = (length - 1) // block_size
        if self.n_windows < 1:
            raise InputError(
                f"block_size: a window needs {block_size + 1} tokens, but the training text has"
                f" {length}; lower block_size or give more text"
            )

    @property
    def steps_per_epoch(self) -> float:
        return self.n_windows / self.batch_size

    def starts(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The first token of each window of a batch, int64 (rows,)."""
        return self.starts_of(step * self.batch_size + np.arange(self.batch_size)[rows])

    def starts_of(self, position: np.ndarray) -> np.ndarray:
        """The first token of the windows that are drawn as number `position`, int64 of any
        shape."""
        epochs = position // self.n_windows
        starts = np.empty_like(position)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index = permuted(position[here] % self.n_windows, self.n_windows, self.seed, int(epoch))
            starts[here] = self._offset(int(epoch)) + index * self.block_size
        return np.minimum(self.first + starts, self.end - 1 - self.block_size)

    def _offset(self, epoch: int) -> int:
        digest = hashlib.sha256(f"offset {self.seed} {epoch}".encode()).digest()
        return 0 if epoch == 0 else int.from_bytes(digest[:8], "big") % self.block_size

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, targets) of step `step`, int64 (batch_size, block_size); with `rows` only these
        rows of the batch."""
        return _window_tensors(self.tokens, self.starts(step, rows), self.block_size)


class Blend:
    """Training windows from the parts of a token file in fixed shares, each part in its own order
    without replacement.

    After any number of windows each part has had its share of them, to the nearest window of what
    the parts before it left. So how often a part was drawn before any step is known without
    counting from the first one. An epoch is as many windows as all parts have together: a part
    whose weight is above its size is then read more than once, another less."""

    # shares are multiples of 1 / UNIT, so that all is exact in int64 for the first four billion
    # windows
    UNIT = 1 << 31

    def __init__(
        self,
        tokens: TokenFile,
        weights: Sequence[float],
        block_size: int,
        batch_size: int,
        seed: int,
    ):
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        ends = np.cumsum([0, *tokens.parts]).tolist()
        self.parts = [
            Windows(tokens, block_size, batch_size, seed, part) for part in itertools.pairwise(ends)
        ]
        self.n_windows = sum(part.n_windows for part in self.parts)
        exact = [Fraction(weight) for weight in weights]
        # Each part's share of the windows that the parts before it left, in units; the last one
        # takes them all.
        self._shares = [round(exact[i] / sum(exact[i:]) * self.UNIT) for i in range(len(exact))]

    @property
    def steps_per_epoch(self) -> float:
        return self.n_windows / self.batch_size

    def counts(self, windows: int) -> list[int]:
        """How many of the first `windows` windows are of each part."""
        counts = []
        for share in self._shares:
            counts.append(int(self._drawn(np.array(windows), share)))
            windows -= counts[-1]
        return counts

    def _drawn(self, windows: np.ndarray, share: int) -> np.ndarray:
        return (windows * share + self.UNIT // 2) // self.UNIT

    def starts(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The first token of each window of a batch, int64 (rows,)."""
        position = step * self.batch_size + np.arange(self.batch_size)[rows]
        starts = np.empty_like(position)
        # not of a part so far; `position` counts the windows that those parts left
        left = np.ones(position.shape, bool)
        for part, share in zip(self.parts, self._shares, strict=True):
            before = self._drawn(position, share)  # (rows,) windows of this part before
            mine = left & (self._drawn(position + 1, share) > before)
            starts[mine] = part.starts_of(before[mine])
            left &= ~mine
            position = position - before
        return starts

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, targets) of step `step`, int64 (batch_size, block_size); with `rows` only these
        rows of the batch."""
        return _window_tensors(self.tokens, self.starts(step, rows), self.block_size)


class Lanes:
    """Training windows for a state that is carried on: row b of a batch goes on where row b of the
    last batch ended.

    An epoch lays the documents' windows, in an order of documents of its own, in one row and cuts
    it into `batch_size` lanes of the same length. No window crosses a document's end, so what a
    document has past its last whole window is not read, nor are the fewer than `batch_size` windows
    that no lane of equal length holds (others in each epoch)."""

    def __init__(self, tokens: TokenFile, block_size: int, batch_size: int, seed: int):
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        starts = np.asarray(tokens.document_starts)
        counts = (np.diff(starts, append=len(tokens)) - 1) // block_size  # windows of each document
        self._starts = starts[counts > 0]
        self._counts = counts[counts > 0]
        self.n_windows = int(self._counts.sum())
        self.lane_length = self.n_windows // batch_size
        # the last used epoch's number, order, ends
        self._epoch = (-1, np.empty(0, np.int64), np.empty(0, np.int64))
        if self.lane_length < 1:
            raise InputError(
                f"block_size: the documents' {len(tokens)} tokens make {self.n_windows} windows of"
                f" {block_size + 1}, but a batch needs {batch_size}; lower block_size or"
                " micro_batch_size, or give more text"
            )

    @property
    def steps_per_epoch(self) -> float:
        return float(self.lane_length)

    def starts(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """The first token of each window, int64 (rows,), and if its lane's state starts anew there,
        bool (rows,)."""
        epoch, turn = divmod(step, self.lane_length)
        if self._epoch[0] != epoch:
            order = permuted(np.arange(len(self._counts)), len(self._counts), self.seed, epoch)
            self._epoch = (epoch, order, np.cumsum(self._counts[order]))
        _, order, ends = self._epoch
        # among the epoch's windows
        index = np.arange(self.batch_size)[rows] * self.lane_length + turn
        place = np.searchsorted(ends, index, side="right")  # among the epoch's documents
        document = order[place]
        within = index - (ends[place] - self._counts[document])
        return self._starts[document] + within * self.block_size, (within == 0) | (turn == 0)

    def batch(
        self, step: int, rows: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids, targets, fresh) of step `step`: int64 (batch_size, block_size) twice, and bool
        (batch_size,), true where the state must be reset before this window. With `rows` only these
        rows of the batch."""
        starts, fresh = self.starts(step, rows)
        return *_window_tensors(self.tokens, starts, self.block_size), torch.from_numpy(fresh)


def training_order(corpus: Corpus, config: Config, batch_size: int) -> Windows | Blend | Lanes:
    """The order in which `config` reads the training split."""
    if config.decompose_bypass_cross_window:
        return Lanes(corpus.train, config.block_size, batch_size, config.seed)
    if config.dataset_mix:
        weights = [1.0, *(weight for _, weight in config.dataset_mix)]
        order = Blend(corpus.train, weights, config.block_size, batch_size, config.seed)
        check_shares(order, config, batch_size)
        return order
    return Windows(corpus.train, config.block_size, batch_size, config.seed)


def check_shares(order: Blend, config: Config, batch_size: int) -> None:
    """Raises `InputError` where a data set has so small a share that the whole run would not read
    one window of it."""
    windows = total_steps(order, config) * batch_size
    for (name, _), count in zip(
        [(config.dataset, 1.0), *config.dataset_mix], order.counts(windows), strict=True
    ):
        if not count:
            raise InputError(
                f"dataset_mix: of the run's {windows:,} windows none would be of {name}; raise its"
                " share or make the run longer"
            )


def total_steps(order: Windows | Blend | Lanes, config: Config) -> int:
    """The optimizer steps of a run."""
    steps = math.ceil(config.epochs * order.steps_per_epoch)
    return steps if config.max_steps is None else min(steps, config.max_steps)
