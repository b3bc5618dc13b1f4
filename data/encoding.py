"""Text into tokens: where a long document is cut, what stands between two, and the work itself, by
all cores.

Cuts depend on the text alone, so the tokens are the same however many processes make them."""

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from common.command import InputError
from data.tokenizer import Tokenizer

ENCODE_CHARACTERS = 1 << 20  # text is encoded in pieces of at most this size
# A batch of short documents is one task of a process: below it, sending costs more than encoding.
BATCH_CHARACTERS = 1 << 20
BATCH_PIECES = 1 << 14
# Text that this process encodes before it starts others: they take about a second to start, as long
# as this takes.
ALONE_CHARACTERS = 8 << 20
# Tasks that wait for each process, so that none is idle while this one reads; they bound memory.
AHEAD = 2
# no token of ours crosses it: GPT-2's and SentencePiece's words start with the space
CUT = re.compile(r"\S(?=[ \n])")

# ===== Cutting


class Piece(NamedTuple):
    """A document, or a part of a long one, to be encoded by itself."""

    first: bool  # it begins a document
    text: str
    ends: bool  # the tokenizer's end of text follows it


def cut_documents(
    pieces: Iterator[tuple[bool, str]], separate: bool, end_of_text: int | None
) -> Iterator[Piece]:
    """Cuts documents, from (starts a document, text) in any pieces, in bounded memory.

    The cuts fall before a space or line end (unless 1,048,576 characters have none), and there the
    tokens are those of the text in one go. With `separate` a document that another one follows ends
    with `end_of_text`, or, where it is None, with a blank line."""
    first = True
    rest = ""
    over = False
    for starts, text in pieces:
        over = over or starts  # the document so far is over when the next one has any text
        if not text:
            continue
        if over and rest:
            if separate and end_of_text is None:
                # none where it ends in a blank line
                rest += "\n" * (2 - rest[len(rest.rstrip("\r\n")) :].count("\n"))
            yield Piece(first, rest, separate and end_of_text is not None)
            first = True
            rest = ""
        over = False
        rest += text
        while len(rest) > ENCODE_CHARACTERS:  # one more character, for the cut looks ahead
            end = _cut(rest)
            yield Piece(first, rest[:end], False)
            first = False
            rest = rest[end:]
    if rest:
        yield Piece(first, rest, False)


def _cut(text: str) -> int:
    """The last place at which `text` may be cut among its first ENCODE_CHARACTERS."""
    # nearly always there is one among the last characters
    for window in (1 << 12, ENCODE_CHARACTERS):
        start = ENCODE_CHARACTERS - window
        cuts = [match.end() for match in CUT.finditer(text, start, ENCODE_CHARACTERS + 1)]
        if cuts:
            return cuts[-1]
    return ENCODE_CHARACTERS


# ===== Counting


def word_count(text: str) -> int:
    """WikiText's count of words, which has line ends as words."""
    return len(text.split()) + text.count("\n")


def unscored(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, int]:
    """The bytes and words that a text which begins with `text`, `ids`, has in its first token
    alone. No model predicts that token, so they are not in what is scored. A word that goes on in
    the second token counts as scored."""
    size = len(tokenizer.decode_bytes([int(token) for token in ids[:1]]))
    # a byte's token may end inside a character
    rest = text.encode("utf-8")[size:].decode("utf-8", errors="replace")
    return size, word_count(text) - word_count(rest)


# ===== Encoding


class Encoded(NamedTuple):
    """The tokens of a batch: `ids` of all its pieces in a row, and of each piece how many tokens,
    words and bytes it has."""

    ids: np.ndarray
    tokens: list[int]
    words: list[int]
    sizes: list[int]


def encode_batch(batch: list[Piece], tokenizer: Tokenizer, dtype: np.dtype) -> Encoded:
    parts = []
    for piece in batch:
        ids = tokenizer.encode(piece.text)
        if piece.ends:
            ids = [*ids, tokenizer.end_of_text]
        parts.append(np.asarray(ids, dtype))
    return Encoded(
        np.concatenate(parts),
        [len(part) for part in parts],
        [word_count(piece.text) for piece in batch],
        [len(piece.text.encode("utf-8")) for piece in batch],
    )


def batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """The pieces in lists of about BATCH_CHARACTERS."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_PIECES:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def usable_cores() -> int:
    """The cores that this process may use; 1 in a process that may start no others."""
    if multiprocessing.current_process().daemon:
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Encoders:
    """Encodes batches by several processes, which are started when there is enough text for them.

    with Encoders(tokenizer, dtype) as encoders:
        for batch, encoded in encoders.in_order(batches(pieces)): …

    processes: None for as many as there are cores; 1 starts none."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, processes: int | None = None):
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.processes = usable_cores() if processes is None else processes
        self.alone = 0  # characters that this process has encoded itself
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def in_order(self, made: Iterator[list[Piece]]) -> Iterator[tuple[list[Piece], Encoded]]:
        """Yields each batch of `made` with its tokens, in the order of `made`."""
        waiting: deque[tuple[list[Piece], Future]] = deque()
        for batch in made:
            if self.processes == 1 or self.alone < ALONE_CHARACTERS:
                self.alone += sum(len(piece.text) for piece in batch)
                yield batch, encode_batch(batch, self.tokenizer, self.dtype)
                continue
            with _said_when_ended():
                waiting.append((batch, self._submit(batch)))
            if len(waiting) > AHEAD * self.processes:
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())

    def _submit(self, batch: list[Piece]) -> Future:
        with _no_script():  # a process may be started by this
            if self.pool is None:
                self.pool = ProcessPoolExecutor(
                    self.processes,
                    # a fork would copy locks that torch's and tqdm's threads hold
                    multiprocessing.get_context("spawn"),
                    initializer=_begin,
                    initargs=(self.tokenizer, self.dtype),
                )
            return self.pool.submit(_encode_here, batch)

    @staticmethod
    def _result(batch: list[Piece], future: Future) -> tuple[list[Piece], Encoded]:
        with _said_when_ended():
            return batch, future.result()


@contextlib.contextmanager
def _said_when_ended() -> Iterator[None]:
    """What the pool raises when one of its processes is gone, in one line for the user: a result
    that is waited for raises it, and so does the next batch that is handed in."""
    try:
        yield
    except BrokenProcessPool:
        raise InputError(
            "dataset: a process that encodes text was ended from outside, by a lack of memory"
            " perhaps; run again"
        ) from None


@contextlib.contextmanager
def _no_script() -> Iterator[None]:
    """Processes that are started within do not import the command that runs here: it would bring
    torch, which costs seconds and memory that encoding has no use for."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


_own: tuple[Tokenizer, np.dtype] | None = None  # of a process that encodes: what it encodes with


def _begin(tokenizer: Tokenizer, dtype: np.dtype) -> None:
    """The first thing that a process of `Encoders` does."""
    global _own
    _own = (tokenizer, dtype)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that it works for
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: killed, it could tell nobody."""
    parent = multiprocessing.parent_process()
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_here(batch: list[Piece]) -> Encoded:
    return encode_batch(batch, *_own)


def all_encoded(
    pieces: Iterator[tuple[bool, str]], tokenizer: Tokenizer, separate: bool = False
) -> tuple[np.ndarray, int, int, int]:
    """All tokens of `pieces`, and the documents, bytes and words of what is scored of them: all but
    the first token."""
    ids: list[np.ndarray] = [np.zeros(0, np.uint32)]
    counts = Counts(tokenizer)
    with Encoders(tokenizer, np.dtype(np.uint32)) as encoders:
        cut = cut_documents(pieces, separate, tokenizer.end_of_text)
        for batch, encoded in encoders.in_order(batches(cut)):
            ids.append(encoded.ids)
            counts.add(batch, encoded)
    return np.concatenate(ids), counts.documents, *counts.scored


class Counts:
    """What is counted of a text while it is encoded."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens = self.bytes = self.words = self.documents = 0
        self.first_token = (0, 0)  # the bytes and words that are not scored
        self.word_open = (
            False  # the text so far ends inside a word, which a hard cut may have split
        )

    @property
    def scored(self) -> tuple[int, int]:
        """The bytes and words of all but the first token."""
        return self.bytes - self.first_token[0], self.words - self.first_token[1]

    def add(self, batch: list[Piece], encoded: Encoded) -> list[int]:
        """Counts a batch; returns the places of the tokens in it that begin documents, in the whole
        text."""
        if not self.tokens and len(encoded.ids):
            ids = encoded.ids[: encoded.tokens[0]]
            self.first_token = unscored(batch[0].text, ids, self.tokenizer)
        starts = []
        places = itertools.accumulate(encoded.tokens, initial=self.tokens)
        for piece, words, place in zip(batch, encoded.words, places, strict=False):
            if piece.first:
                starts.append(place)
            # a word that a cut has split was counted before
            goes_on = not piece.first and self.word_open and not piece.text[:1].isspace()
            self.words += words - goes_on
            self.word_open = not piece.text[-1:].isspace()
        self.tokens += len(encoded.ids)
        self.bytes += sum(encoded.sizes)
        self.documents += len(starts)
        return starts
