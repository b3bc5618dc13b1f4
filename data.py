"""Token files and the order in which training reads them.

`prepare(config)` turns a corpus into one token file per split, in `config.cache_dir`, and finds them there next time.
`Windows`, `Blend` and `Lanes` say which tokens a training step sees: a pure function of (seed, step), so a resumed run goes
on with the very batches that it would have seen.
"""

import hashlib
import itertools
import json
import os
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import Config, InputError
from corpus import SPLITS, components, documents, source_fingerprint
from tokenizer import Tokenizer, load_tokenizer, make_tokenizer, tokenizer_choice

FORMAT = b"WLMTOK02"  # another layout gets another number, so that old files are rebuilt
HEADER_BYTES = 4096  # FORMAT, then JSON, padded by spaces
ENCODE_CHARACTERS = 1 << 20  # text is encoded in pieces of at most this size
CUT = re.compile(r"\S(?=[ \n])")  # no token of ours crosses it: GPT-2's and SentencePiece's words start with the space


class TokenFile:
    """A split's tokens, memory-mapped. The file: header, tokens (uint16 or uint32), padding to 8 bytes, then the
    offsets of the documents' first tokens (int64).

    Attributes: `tokens` (n_tokens,); `document_starts` (documents,); `n_tokens`; `n_bytes`, of UTF-8; `n_words`,
    WikiText's count, which has line ends as words: len(text.split()) + text.count("\\n"); `tokenizer`, its name; `parts`,
    the number of tokens of each data set in it.
    """

    def __init__(self, path: Path, key: str | None = None):
        """Opens `path`. Raises `InputError` where it is not whole, or was made for another `key` (None = any)."""
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                raw = file.read(HEADER_BYTES)
            size = self.path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); prepare the data again") from None
        try:
            if not raw.startswith(FORMAT):
                raise ValueError
            header = json.loads(raw[len(FORMAT) :])
            self.n_tokens, self.n_bytes, self.n_words = header["tokens"], header["bytes"], header["words"]
            self.tokenizer, self.key, self.parts = header["tokenizer"], header["key"], header["parts"]
            dtype, n_documents = np.dtype(header["dtype"]), header["documents"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: is no token file of this version; prepare the data again") from None
        starts_at = _aligned(HEADER_BYTES + self.n_tokens * dtype.itemsize)
        if size != starts_at + 8 * n_documents:
            raise InputError(f"{path}: has {size} bytes, not {starts_at + 8 * n_documents}; prepare the data again")
        if key is not None and key != self.key:
            raise InputError(f"{path}: was made from another text or tokenizer; prepare the data again")
        self.tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (self.n_tokens,))
        self.document_starts = np.memmap(path, np.int64, "r", starts_at, (n_documents,))

    def __len__(self) -> int:
        return self.n_tokens


def _aligned(position: int) -> int:
    return -(-position // 8) * 8


def encode_documents(pieces: Iterator[tuple[bool, str]], tokenizer: Tokenizer) -> Iterator[tuple[bool, str, list[int]]]:
    """Yields (starts a document, text, its tokens) in bounded memory, from (starts a document, text) in any pieces.

    Where a document is cut depends on its text alone, hence so do the tokens. The cuts fall before a space or line end
    (unless 1,048,576 characters have none), and there the tokens are those of the text in one go.
    """
    first, rest = True, ""
    for starts, text in pieces:
        if starts and rest:
            yield first, rest, tokenizer.encode(rest)
            first, rest = True, ""
        elif starts:
            first = True
        rest += text
        while len(rest) > ENCODE_CHARACTERS:  # one more character, for the cut looks ahead
            end = ENCODE_CHARACTERS
            for window in (1 << 12, ENCODE_CHARACTERS):  # nearly always there is a cut among the last characters
                cuts = [match.end() for match in CUT.finditer(rest, ENCODE_CHARACTERS - window, ENCODE_CHARACTERS + 1)]
                if cuts:
                    end = cuts[-1]
                    break
            yield first, rest[:end], tokenizer.encode(rest[:end])
            first, rest = False, rest[end:]
    if rest:
        yield first, rest, tokenizer.encode(rest)


def write_token_file(path: Path, parts: Sequence[Iterator[tuple[bool, str]]], tokenizer: Tokenizer, key: str) -> None:
    """Encodes `parts`, one after the other, each what `corpus.documents` yields, into the token file `path`, which appears
    only when it is whole."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    n_tokens = n_bytes = n_words = 0
    starts, ends = array("q"), []  # of documents, of parts
    word_open = False  # the text so far ends inside a word, which a hard cut may have split
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with (
            open(temporary, "wb") as file,
            tqdm(desc=path.stem, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as progress,
        ):
            file.seek(HEADER_BYTES)
            for pieces in parts:
                for first, text, ids in encode_documents(pieces, tokenizer):
                    if first:
                        starts.append(n_tokens)
                    n_words += len(text.split()) + text.count("\n") - (not first and word_open and not text[0].isspace())
                    word_open = not text[-1].isspace()
                    n_tokens += len(ids)
                    size = len(text.encode("utf-8"))
                    n_bytes += size
                    np.asarray(ids, dtype).tofile(file)
                    progress.update(size)
                ends.append(n_tokens)
            file.write(bytes(_aligned(file.tell()) - file.tell()))
            starts.tofile(file)
            header = {"dtype": dtype.name, "tokens": n_tokens, "bytes": n_bytes, "words": n_words}
            header |= {"documents": len(starts), "tokenizer": tokenizer.name, "key": key, "parts": np.diff([0, *ends]).tolist()}
            file.seek(0)
            file.write((FORMAT + json.dumps(header).encode()).ljust(HEADER_BYTES))
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the tokens
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Corpus:
    """The prepared data of a run."""

    name: str
    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile
    test: TokenFile

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size


def prepare(config: Config, say: Callable[[str], None] = print) -> Corpus:
    """The corpus of `config`, from `config.cache_dir` where it is whole there, else made now; `say` gets a line for
    each thing made. Several processes may prepare the same corpus at once."""
    source = source_fingerprint(config)
    choice = tokenizer_choice(config)
    about = f"{source} {choice} {config.vocab_size if choice == 'sentencepiece' else ''}"
    digest = hashlib.sha256(about.encode()).hexdigest()[:12]
    name = re.sub(r"[^\w-]+", "-", Path(config.dataset).stem).strip("-") or "text"
    folder = Path(config.cache_dir) / f"{name}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache_dir: cannot make {folder} ({error.strerror}); give a writable folder") from None
    tokenizer = _prepared_tokenizer(config, choice, folder, say)
    key = hashlib.sha256(f"{source} {tokenizer.fingerprint}".encode()).hexdigest()
    files = {}
    for split in SPLITS:
        path = folder / f"{split}.tokens"
        if path.exists():
            try:
                files[split] = TokenFile(path, key)
                continue
            except InputError as error:
                say(f"rebuilding: {error}")
        sources = components(config) if split == "train" else [config]
        write_token_file(path, [documents(source, split) for source in sources], tokenizer, key)
        files[split] = TokenFile(path, key)
        say(f"{split}: {files[split].n_tokens:,} {tokenizer.name} tokens, {files[split].n_bytes:,} bytes -> {path}")
    return Corpus(config.dataset, tokenizer, **files)


def _prepared_tokenizer(config: Config, choice: str, folder: Path, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer from the cache folder; made and saved there first where it is missing or broken."""
    if choice == "sentencepiece":  # the others are cheap to make, and a .model file may have changed
        try:
            tokenizer = load_tokenizer(folder)
            if tokenizer is not None:
                return tokenizer
        except InputError as error:
            say(f"training again: {error}")
        say(f"training a SentencePiece of {config.vocab_size:,} tokens")
    tokenizer = make_tokenizer(config, lambda: (text for c in components(config) for _, text in documents(c, "train")))
    tokenizer.save(folder)
    return tokenizer


def evaluation_slice(tokens: TokenFile, n: int) -> torch.Tensor:
    """The first `n` tokens (fewer if there are no more), int64 (n,): the same at every call."""
    return torch.from_numpy(tokens.tokens[:n].astype(np.int64))


# Training order


def permuted(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(n), given by (seed, epoch), sends `index` (int64, any shape).

    A Feistel network permutes 2^(2·half) ≥ n numbers, whatever its round function; a number that lands past n goes
    through again until it does not (cycle walking), which leaves a permutation of range(n). So nothing of size n is
    ever stored, and unlike numpy's generators the order will not change with numpy's version.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
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


def _window_tensors(tokens: TokenFile, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    # (rows, block_size + 1): the targets are the ids one further
    windows = torch.from_numpy(tokens.tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Windows:
    """Training windows without replacement: each epoch reads every window once, in an order of its own.

    Windows follow each other at a stride of `block_size`. From the second epoch on they start at a random offset below
    `block_size`, so that the same token is not always first; the last window then moves back to end with the text.
    A batch that an epoch does not fill takes its other rows from the next epoch. With `part` (first token, end) all this is
    of that part of the file.
    """

    def __init__(self, tokens: TokenFile, block_size: int, batch_size: int, seed: int, part: tuple[int, int] | None = None):
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        self.first, self.end = part or (0, len(tokens))
        length = self.end - self.first
        self.n_windows = (length - 1) // block_size
        if self.n_windows < 1:
            raise InputError(
                f"block_size: a window needs {block_size + 1} tokens, but the training text has {length}; "
                "lower block_size or give more text"
            )

    @property
    def steps_per_epoch(self) -> float:
        return self.n_windows / self.batch_size

    def starts(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The first token of each window of a batch, int64 (rows,)."""
        return self.starts_of(step * self.batch_size + np.arange(self.batch_size)[rows])

    def starts_of(self, position: np.ndarray) -> np.ndarray:
        """The first token of the windows that are drawn as number `position`, int64 of any shape."""
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
        """(ids, targets) of step `step`, int64 (batch_size, block_size); with `rows` only these rows of the batch."""
        return _window_tensors(self.tokens, self.starts(step, rows), self.block_size)


class Blend:
    """Training windows from the parts of a token file in fixed shares, each part in its own order without replacement.

    Of every `CYCLE` windows in a row each part has its share, to the nearest window, in an order that (seed, cycle) gives.
    So how often a part was drawn before any step is known without counting from the first one. An epoch is as many windows
    as all parts have together: a part whose weight is above its size is then read more than once, another less.
    """

    CYCLE = 1000

    def __init__(self, tokens: TokenFile, weights: Sequence[float], block_size: int, batch_size: int, seed: int):
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        ends = np.cumsum([0, *tokens.parts]).tolist()
        self.parts = [Windows(tokens, block_size, batch_size, seed, part) for part in itertools.pairwise(ends)]
        self.n_windows = sum(part.n_windows for part in self.parts)
        edges = np.rint(np.cumsum([0, *weights]) / sum(weights) * self.CYCLE).astype(int)
        self.shares = np.diff(edges)  # windows of each part in a cycle
        self._slots = np.repeat(np.arange(len(weights)), self.shares)

    @property
    def steps_per_epoch(self) -> float:
        return self.n_windows / self.batch_size

    def starts(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The first token of each window of a batch, int64 (rows,)."""
        position = step * self.batch_size + np.arange(self.batch_size)[rows]
        starts = np.empty_like(position)
        for cycle in np.unique(position // self.CYCLE):
            drawn = self._slots[permuted(np.arange(self.CYCLE), self.CYCLE, self.seed, int(cycle))]  # (CYCLE,) parts
            here = position // self.CYCLE == cycle
            for index, part in enumerate(self.parts):
                before = cycle * self.shares[index] + np.cumsum(drawn == index) - 1  # (CYCLE,) draws of this part
                mine = here & (drawn[position % self.CYCLE] == index)
                starts[mine] = part.starts_of(before[position[mine] % self.CYCLE])
        return starts

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, targets) of step `step`, int64 (batch_size, block_size); with `rows` only these rows of the batch."""
        return _window_tensors(self.tokens, self.starts(step, rows), self.block_size)


class Lanes:
    """Training windows for a state that is carried on: row b of a batch goes on where row b of the last batch ended.

    An epoch lays the documents' windows, in an order of documents of its own, in one row and cuts it into `batch_size`
    lanes of the same length. No window crosses a document's end, so what a document has past its last whole window is
    not read, nor are the fewer than `batch_size` windows that no lane of equal length holds (others in each epoch).
    """

    def __init__(self, tokens: TokenFile, block_size: int, batch_size: int, seed: int):
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        starts = np.asarray(tokens.document_starts)
        counts = (np.diff(starts, append=len(tokens)) - 1) // block_size  # windows of each document
        self._starts, self._counts = starts[counts > 0], counts[counts > 0]
        self.n_windows = int(self._counts.sum())
        self.lane_length = self.n_windows // batch_size
        self._epoch = (-1, np.empty(0, np.int64), np.empty(0, np.int64))  # the last used epoch's number, order, ends
        if self.lane_length < 1:
            raise InputError(
                f"block_size: the documents' {len(tokens)} tokens make {self.n_windows} windows of {block_size + 1}, "
                f"but a batch needs {batch_size}; lower block_size or micro_batch_size, or give more text"
            )

    @property
    def steps_per_epoch(self) -> float:
        return float(self.lane_length)

    def starts(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """The first token of each window, int64 (rows,), and if its lane's state starts anew there, bool (rows,)."""
        epoch, turn = divmod(step, self.lane_length)
        if self._epoch[0] != epoch:
            order = permuted(np.arange(len(self._counts)), len(self._counts), self.seed, epoch)
            self._epoch = (epoch, order, np.cumsum(self._counts[order]))
        _, order, ends = self._epoch
        index = np.arange(self.batch_size)[rows] * self.lane_length + turn  # among the epoch's windows
        place = np.searchsorted(ends, index, side="right")  # among the epoch's documents
        document = order[place]
        within = index - (ends[place] - self._counts[document])
        return self._starts[document] + within * self.block_size, (within == 0) | (turn == 0)

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids, targets, fresh) of step `step`: int64 (batch_size, block_size) twice, and bool (batch_size,), true
        where the state must be reset before this window. With `rows` only these rows of the batch."""
        starts, fresh = self.starts(step, rows)
        return *_window_tensors(self.tokens, starts, self.block_size), torch.from_numpy(fresh)


def training_order(corpus: Corpus, config: Config, batch_size: int) -> Windows | Blend | Lanes:
    """The order in which `config` reads the training split."""
    if config.decompose_bypass_cross_window:
        return Lanes(corpus.train, config.block_size, batch_size, config.seed)
    if config.dataset_mix:
        weights = [1.0, *(weight for _, weight in config.dataset_mix)]
        return Blend(corpus.train, weights, config.block_size, batch_size, config.seed)
    return Windows(corpus.train, config.block_size, batch_size, config.seed)
