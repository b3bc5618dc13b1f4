"""Token files and the order in which training reads them.

`prepare(config)` turns a corpus into one token file per split, in `config.cache_dir`, and finds them there next time.
Between two documents stands the tokenizer's end of text, or where it has none a blank line; WikiText is left as it is. A
run's folder keeps the digests of what it was trained on, which `run_corpus` compares before the run goes on.
`Windows`, `Blend` and `Lanes` say which tokens a training step sees: a pure function of (seed, step), so a resumed run goes
on with the very batches that it would have seen.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from config import Config, InputError, read_json
from corpus import SPLITS, components, described, documents, is_verbatim, source_fingerprint, unread
from tokenizer import TEMPORARY, Tokenizer, beside, load_tokenizer, make_tokenizer, tokenizer_choice, write_whole

FORMAT = b"WLMTOK03"  # another layout gets another number, so that old files are rebuilt
HEADER_BYTES = 4096  # FORMAT, then JSON, padded by spaces
ENCODE_CHARACTERS = 1 << 20  # text is encoded in pieces of at most this size
DTYPES = ("uint16", "uint32")  # all that a token file may hold; numpy would take others from it, pointers among them
CHECKED_AT_A_TIME = 1 << 22  # tokens: bounds memory
DATA_FILE = "data.json"  # in a run's folder: what the run was trained on
CUT = re.compile(r"\S(?=[ \n])")  # no token of ours crosses it: GPT-2's and SentencePiece's words start with the space


class TokenFile:
    """A split's tokens, memory-mapped. The file: header, tokens (uint16 or uint32), padding to 8 bytes, then the
    offsets of the documents' first tokens (int64).

    Attributes: `tokens` (n_tokens,); `document_starts` (documents,); `n_tokens`; `n_bytes`, of UTF-8; `n_words`,
    WikiText's count, which has line ends as words: len(text.split()) + text.count("\\n"); `scored_bytes` and `scored_words`,
    those after the first token, which nothing predicts; `tokenizer`, its name; `vocab_size`; `parts`, the number of tokens
    of each data set in it; `digest`, SHA-256 of tokens and offsets, so that of all that training can see of the text.
    """

    def __init__(self, path: Path, key: str | None = None):
        """Opens `path`. Raises `InputError` where it is not whole, is not what was written, or was made for another `key`
        (None = any). All of it is read for that, about a second per gigabyte."""
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
            self.scored_bytes, self.scored_words = header["scored_bytes"], header["scored_words"]
            self.tokenizer, self.key, self.parts = header["tokenizer"], header["key"], header["parts"]
            self.vocab_size, self.digest, n_documents = header["vocab_size"], header["sha256"], header["documents"]
            counts = [self.n_tokens, self.n_bytes, self.n_words, self.scored_bytes, self.scored_words, self.vocab_size]
            if header["dtype"] not in DTYPES or not all(type(n) is int and n >= 0 for n in [*counts, n_documents, *self.parts]):
                raise ValueError
            if sum(self.parts) != self.n_tokens or not self.n_tokens or not n_documents:
                raise ValueError
            dtype = np.dtype(header["dtype"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{path}: is no token file of this version; prepare the data again") from None
        starts_at = _aligned(HEADER_BYTES + self.n_tokens * dtype.itemsize)
        if size != starts_at + 8 * n_documents:
            raise InputError(f"{path}: has {size} bytes, not {starts_at + 8 * n_documents}; prepare the data again")
        if key is not None and key != self.key:
            raise InputError(f"{path}: was made from another text or tokenizer; prepare the data again")
        self.tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (self.n_tokens,))
        self.document_starts = np.memmap(path, np.int64, "r", starts_at, (n_documents,))
        self._check()

    def _check(self) -> None:
        """Raises `InputError` where tokens or offsets are not those that were written, or are none."""
        digest = hashlib.sha256()
        for start in range(0, self.n_tokens, CHECKED_AT_A_TIME):
            tokens = self.tokens[start : start + CHECKED_AT_A_TIME]
            digest.update(tokens)
            if tokens.max() >= self.vocab_size:
                raise InputError(f"{self.path}: has token {tokens.max()} of {self.vocab_size}; prepare the data again")
        digest.update(self.document_starts)
        if digest.hexdigest() != self.digest:
            raise InputError(f"{self.path}: is damaged, its checksum is another; prepare the data again")
        edges = np.concatenate([self.document_starts, [self.n_tokens]])
        if edges[0] != 0 or (np.diff(edges) <= 0).any():
            raise InputError(f"{self.path}: its documents' offsets are out of order; prepare the data again")

    def __len__(self) -> int:
        return self.n_tokens


def _aligned(position: int) -> int:
    return -(-position // 8) * 8


def encode_documents(
    pieces: Iterator[tuple[bool, str]], tokenizer: Tokenizer, separate: bool = False
) -> Iterator[tuple[bool, str, list[int]]]:
    """Yields (starts a document, text, its tokens) in bounded memory, from (starts a document, text) in any pieces.

    Where a document is cut depends on its text alone, hence so do the tokens. The cuts fall before a space or line end
    (unless 1,048,576 characters have none), and there the tokens are those of the text in one go. With `separate` a
    document that another one follows ends with the tokenizer's end of text, or, where it has none, with a blank line.
    """
    first, rest, over = True, "", False
    for starts, text in pieces:
        over = over or starts  # the document so far is over when the next one has any text
        if not text:
            continue
        if over and rest:
            if separate and tokenizer.end_of_text is None:
                rest += "\n" * (2 - rest[len(rest.rstrip("\r\n")) :].count("\n"))  # none where it ends in a blank line
            yield first, rest, tokenizer.encode(rest)
            if separate and tokenizer.end_of_text is not None:
                yield False, "", [tokenizer.end_of_text]
            first, rest = True, ""
        over = False
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


def word_count(text: str) -> int:
    """WikiText's count of words, which has line ends as words."""
    return len(text.split()) + text.count("\n")


def unscored(text: str, ids: list[int], tokenizer: Tokenizer) -> tuple[int, int]:
    """The bytes and words that a text which begins with `text`, `ids`, has in its first token alone. No model predicts that
    token, so they are not in what is scored. A word that goes on in the second token counts as scored."""
    size = len(tokenizer.decode_bytes(ids[:1]))
    rest = text.encode("utf-8")[size:].decode("utf-8", errors="replace")  # a byte's token may end inside a character
    return size, word_count(text) - word_count(rest)


def write_token_file(
    path: Path, parts: Sequence[Iterator[tuple[bool, str]]], tokenizer: Tokenizer, key: str, separate: Sequence[bool] = ()
) -> None:
    """Encodes `parts`, one after the other, each what `corpus.documents` yields, into the token file `path`, which appears
    only when it is whole. `separate` says of each part if its documents are separated (default: none are)."""
    dtype = np.dtype(DTYPES[0] if tokenizer.vocab_size <= 1 << 16 else DTYPES[1])
    n_tokens = n_bytes = n_words = 0
    digest, first_token = hashlib.sha256(), (0, 0)
    starts, ends = array("q"), []  # of documents, of parts
    word_open = False  # the text so far ends inside a word, which a hard cut may have split
    temporary = beside(path)
    try:
        with (
            open(temporary, "wb") as file,
            tqdm(desc=path.stem, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as progress,
        ):
            file.seek(HEADER_BYTES)
            for pieces, apart in itertools.zip_longest(parts, separate, fillvalue=False):
                for first, text, ids in encode_documents(pieces, tokenizer, apart):
                    if first:
                        starts.append(n_tokens)
                    if not n_tokens:
                        first_token = unscored(text, ids, tokenizer)
                    n_words += word_count(text) - (not first and word_open and not text[:1].isspace() and text != "")
                    word_open = not text[-1:].isspace()
                    n_tokens += len(ids)
                    size = len(text.encode("utf-8"))
                    n_bytes += size
                    file.write(data := np.asarray(ids, dtype).tobytes())
                    digest.update(data)
                    progress.update(size)
                ends.append(n_tokens)
            file.write(bytes(_aligned(file.tell()) - file.tell()))
            file.write(starts.tobytes())
            digest.update(starts.tobytes())
            header = {"dtype": dtype.name, "tokens": n_tokens, "bytes": n_bytes, "words": n_words}
            header |= {"scored_bytes": n_bytes - first_token[0], "scored_words": n_words - first_token[1]}
            header |= {"documents": len(starts), "tokenizer": tokenizer.name, "key": key, "parts": np.diff([0, *ends]).tolist()}
            header |= {"vocab_size": tokenizer.vocab_size, "sha256": digest.hexdigest()}
            file.seek(0)
            file.write((FORMAT + json.dumps(header).encode()).ljust(HEADER_BYTES))
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the tokens
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); cache_dir must be a writable folder") from None
    finally:
        with contextlib.suppress(OSError):  # the error above, if any, has said what there is to say
            temporary.unlink(missing_ok=True)


def remove_abandoned(cache: Path) -> None:
    """Deletes what killed processes of this machine left half written below the folder `cache`."""
    for path in cache.glob("*/.*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and match[2] == platform.node() and not _is_running(int(match[1])):
            with contextlib.suppress(OSError):  # another process may be faster, or the folder not ours to write
                path.unlink()


def _is_running(process: int) -> bool:
    if os.name == "nt":  # os.kill would end it there; but an open file cannot be deleted there either
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # someone else's
    return True


@dataclass(frozen=True)
class Corpus:
    """The prepared data of a run. `source` says where it comes from; `separator` what stands between two documents."""

    name: str
    source: str
    separator: str
    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile
    test: TokenFile

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size


def prepare(
    config: Config, say: Callable[[str], None] = print, tokenizer: Tokenizer | None = None, separate: bool = True
) -> Corpus:
    """The corpus of `config`, from `config.cache_dir` where it is whole there, else made now; `say` gets a line for
    each thing made. Several processes may prepare the same corpus at once.

    A run's own `tokenizer` is given, so that its text is encoded as it was; else it is the one that `config` asks for.
    `separate` false puts nothing between documents. Raises `InputError` for a split in which there is nothing to predict.
    """
    if lost := unread(config):
        say(f"note: {lost}")
    tokenizer = tokenizer or _prepared_tokenizer(config, say)
    files = {split: prepare_split(config, split, tokenizer, say, separate) for split in SPLITS}
    return Corpus(config.dataset, described(config), separator(config, tokenizer, separate), tokenizer, **files)


def prepare_split(
    config: Config, split: str, tokenizer: Tokenizer, say: Callable[[str], None] = print, separate: bool = True
) -> TokenFile:
    """One split of what `prepare` makes. Only training reads `config.dataset_mix`."""
    sources = components(config) if split == "train" else components(config)[:1]
    apart = [separate and not is_verbatim(source) for source in sources]
    source = source_fingerprint(config if split == "train" else sources[0])
    key = hashlib.sha256(f"{source} {tokenizer.fingerprint} {apart}".encode()).hexdigest()
    path = _cache_folder(config, key) / f"{split}.tokens"
    file = None
    if path.exists():
        try:
            file = TokenFile(path, key)
        except InputError as error:
            say(f"rebuilding: {error}")
    if file is None:
        write_token_file(path, [documents(source, split) for source in sources], tokenizer, key, apart)
        file = TokenFile(path, key)
        documents_read = f"{len(file.document_starts):,} document" + "s" * (len(file.document_starts) != 1)
        say(f"{split}: {documents_read}, {file.n_bytes:,} bytes, {file.n_tokens:,} {tokenizer.name} tokens -> {path}")
    if file.n_tokens < 2:
        raise InputError(f"dataset: the {split} split of {config.dataset} is one token, which nothing predicts; give more text")
    return file


def separator(config: Config, tokenizer: Tokenizer, separate: bool = True) -> str:
    """What stands between two documents of `config`, in words."""
    if not separate or is_verbatim(components(config)[0]):
        return "nothing"
    return "a blank line" if tokenizer.end_of_text is None else "an end of text"


def _cache_folder(config: Config, key: str) -> Path:
    name = re.sub(r"[^\w-]+", "-", Path(config.dataset).stem).strip("-") or "text"
    folder = Path(config.cache_dir) / f"{name[:64]}-{key[:12]}"  # file systems take names of 255 bytes
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache_dir: cannot make {folder} ({error.strerror}); give a writable folder") from None
    remove_abandoned(folder.parent)
    return folder


def _prepared_tokenizer(config: Config, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that `config` asks for. A SentencePiece is trained once and kept in the cache."""

    def texts() -> Iterator[str]:
        return (text for source in components(config) for _, text in documents(source, "train"))

    if tokenizer_choice(config) != "sentencepiece":
        return make_tokenizer(config, texts)
    folder = _cache_folder(config, hashlib.sha256(f"{source_fingerprint(config)} {config.vocab_size}".encode()).hexdigest())
    try:
        tokenizer = load_tokenizer(folder)
        if tokenizer is not None:
            return tokenizer
    except InputError as error:
        say(f"training again: {error}")
    say(f"training a SentencePiece of {config.vocab_size:,} tokens")
    tokenizer = make_tokenizer(config, texts)
    tokenizer.save(folder)
    return tokenizer


# What a run was trained on


def run_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint, where its config, tokenizer and data.json are."""
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def run_corpus(config: Config, folder: Path, begun: bool, say: Callable[[str], None] = print, keeps: bool = True) -> Corpus:
    """The corpus of the run in `folder`, in the run's own tokenizer. A new run's tokenizer and digests are written there; of
    one that has `begun` they are compared, and `InputError` says what is different. A process that does not keep the run's
    folder writes nothing; on a machine of its own it may not have one.

    A run of before runs kept digests goes on with its text as it is now, and with nothing between the documents, as then.
    """
    tokenizer, kept = load_tokenizer(folder), read_data_file(folder)
    if begun and tokenizer is None:
        raise InputError(f"resume: {folder} has lost its tokenizer (tokenizer.json), which alone encodes as it did; restore it")
    corpus = prepare(config, say, tokenizer, separate=kept["separated"] if kept else not begun)
    if kept and (different := differences(kept, corpus)):
        raise InputError(f"resume: {folder} was not trained on this: {'; '.join(different)}. Restore it, or start a new run")
    if tokenizer is None and keeps:
        corpus.tokenizer.save(folder)
    if kept is None and keeps:
        if begun:
            say(f"note: {folder} is from before runs kept digests of their text, so nothing tells if it is still the same")
        write_data_file(folder, corpus, separated=not begun)
    return corpus


def write_data_file(folder: Path, corpus: Corpus, separated: bool) -> None:
    """Keeps in a run's folder what the run is trained on: where the text comes from, sizes, and digests of its tokens."""
    tokenizer = {"name": corpus.tokenizer.name, "fingerprint": corpus.tokenizer.fingerprint}
    values = {"source": corpus.source, "separated": separated, "separator": corpus.separator, "tokenizer": tokenizer}
    values["splits"] = {split: _summary(getattr(corpus, split)) for split in SPLITS}
    write_whole(folder / DATA_FILE, (json.dumps(values, indent=2) + "\n").encode())


def _summary(file: TokenFile) -> dict[str, int | str]:
    counts = {"documents": len(file.document_starts), "bytes": file.n_bytes, "words": file.n_words, "tokens": file.n_tokens}
    return counts | {"sha256": file.digest}


def read_data_file(folder: Path) -> dict[str, Any] | None:
    """What `write_data_file` kept in `folder`; None where there is none. Raises `InputError` for a broken one."""
    path = folder / DATA_FILE
    if not path.exists():
        return None
    kept = read_json(path)
    try:
        for summary in (kept["splits"][split] for split in SPLITS):
            whole = isinstance(summary["bytes"], int) and isinstance(summary["sha256"], str)
            if not whole or not isinstance(kept["separated"], bool) or not isinstance(kept["tokenizer"]["fingerprint"], str):
                raise TypeError
    except (KeyError, TypeError):
        raise InputError(f"{path}: is not as train.py wrote it; restore it") from None
    return kept


def differences(kept: dict[str, Any], corpus: Corpus) -> list[str]:
    """What is different between the corpus that a run's data.json tells of and `corpus`; empty if they are the same."""
    if kept["tokenizer"]["fingerprint"] != corpus.tokenizer.fingerprint:
        return [
            f"the tokenizer is not the one that it began with ({corpus.tokenizer.name}, was {kept['tokenizer'].get('name')})"
        ]
    found = []
    for split in SPLITS:
        file, before = getattr(corpus, split), kept["splits"][split]
        if file.digest != before["sha256"]:
            same_size = file.n_bytes == before["bytes"]
            sizes = f"{file.n_bytes:,} bytes" + (", but others" if same_size else f", and had {before['bytes']:,}")
            found.append(f"{split} has {sizes}")
    if found and kept.get("source") != corpus.source:
        found.append(f"it is from {corpus.source}, and was from {kept.get('source')}")
    return found


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

    After any number of windows each part has had its share of them, to the nearest window of what the parts before it left.
    So how often a part was drawn before any step is known without counting from the first one. An epoch is as many windows
    as all parts have together: a part whose weight is above its size is then read more than once, another less.
    """

    UNIT = 1 << 31  # shares are multiples of 1 / UNIT, so that all is exact in int64 for the first four billion windows

    def __init__(self, tokens: TokenFile, weights: Sequence[float], block_size: int, batch_size: int, seed: int):
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        ends = np.cumsum([0, *tokens.parts]).tolist()
        self.parts = [Windows(tokens, block_size, batch_size, seed, part) for part in itertools.pairwise(ends)]
        self.n_windows = sum(part.n_windows for part in self.parts)
        exact = [Fraction(weight) for weight in weights]
        # Each part's share of the windows that the parts before it left, in units; the last one takes them all.
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
        left = np.ones(position.shape, bool)  # not of a part so far; `position` counts the windows that those parts left
        for part, share in zip(self.parts, self._shares, strict=True):
            before = self._drawn(position, share)  # (rows,) windows of this part before
            mine = left & (self._drawn(position + 1, share) > before)
            starts[mine] = part.starts_of(before[mine])
            left &= ~mine
            position = position - before
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
        order = Blend(corpus.train, weights, config.block_size, batch_size, config.seed)
        check_shares(order, config, batch_size)
        return order
    return Windows(corpus.train, config.block_size, batch_size, config.seed)


def check_shares(order: Blend, config: Config, batch_size: int) -> None:
    """Raises `InputError` where a data set has so small a share that the whole run would not read one window of it."""
    windows = total_steps(order, config) * batch_size
    for (name, _), count in zip([(config.dataset, 1.0), *config.dataset_mix], order.counts(windows), strict=True):
        if not count:
            raise InputError(
                f"dataset_mix: of the run's {windows:,} windows none would be of {name}; raise its share or make the run longer"
            )


def total_steps(order: Windows | Blend | Lanes, config: Config) -> int:
    """The optimizer steps of a run."""
    steps = math.ceil(config.epochs * order.steps_per_epoch)
    return steps if config.max_steps is None else min(steps, config.max_steps)
