"""Token files: a split's tokens on disk, whole and checked, or not trusted."""

import hashlib
import itertools
import json
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.command import InputError
from common.files import written_whole
from data.encoding import Counts, Encoders, batches, cut_documents
from data.tokenizer import Tokenizer

FORMAT = b"WLMTOK03"  # another layout gets another number, so that old files are rebuilt
HEADER_BYTES = 4096  # FORMAT, then JSON, padded by spaces
# all that a token file may hold; numpy would take others from it, pointers among them
DTYPES = ("uint16", "uint32")
CHECKED_AT_A_TIME = 1 << 22  # tokens: bounds memory


class TokenFile:
    """A split's tokens, memory-mapped. The file: header, tokens (uint16 or uint32), padding to 8
    bytes, then the offsets of the documents' first tokens (int64).

    Attributes: `tokens` (n_tokens,); `document_starts` (documents,); `n_tokens`; `n_bytes`, of
    UTF-8; `n_words`, WikiText's count, which has line ends as words: len(text.split()) +
    text.count("\\n"); `scored_bytes` and `scored_words`, those after the first token, which nothing
    predicts; `tokenizer`, its name; `vocab_size`; `parts`, the number of tokens of each data set in
    it; `digest`, SHA-256 of tokens and offsets, so that of all that training can see of the text.
    """

    def __init__(self, path: Path, key: str | None = None):
        """Opens `path`. Raises `InputError` where it is not whole, is not what was written, or was
        made for another `key` (None = any). All of it is read for that, about a second per
        gigabyte."""
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                raw = file.read(HEADER_BYTES)
            size = self.path.stat().st_size
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); prepare the data again"
            ) from None
        try:
            dtype, n_documents = self._take_header(raw)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"{path}: is no token file of this version; prepare the data again"
            ) from None
        starts_at = _aligned(HEADER_BYTES + self.n_tokens * dtype.itemsize)
        if size != starts_at + 8 * n_documents:
            raise InputError(
                f"{path}: has {size} bytes, not {starts_at + 8 * n_documents}; prepare the data"
                " again"
            )
        if key is not None and key != self.key:
            raise InputError(
                f"{path}: was made from another text or tokenizer; prepare the data again"
            )
        self.tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (self.n_tokens,))
        self.document_starts = np.memmap(path, np.int64, "r", starts_at, (n_documents,))
        self._check()

    def _take_header(self, raw: bytes) -> tuple[np.dtype, int]:
        """Takes over what the header says; returns the tokens' type and the number of documents.
        Raises ValueError, KeyError or TypeError where it is not one that `write_token_file`
        writes."""
        if not raw.startswith(FORMAT):
            raise ValueError
        header = json.loads(raw[len(FORMAT) :])
        self.n_tokens = header["tokens"]
        self.n_bytes = header["bytes"]
        self.n_words = header["words"]
        self.scored_bytes = header["scored_bytes"]
        self.scored_words = header["scored_words"]
        self.tokenizer = header["tokenizer"]
        self.vocab_size = header["vocab_size"]
        self.key = header["key"]
        self.parts = header["parts"]
        self.digest = header["sha256"]
        n_documents = header["documents"]
        counts = [self.n_tokens, self.n_bytes, self.n_words, self.scored_bytes, self.scored_words]
        counts += [self.vocab_size, n_documents, *self.parts]
        if header["dtype"] not in DTYPES or not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError
        if sum(self.parts) != self.n_tokens or not self.n_tokens or not n_documents:
            raise ValueError
        return np.dtype(header["dtype"]), n_documents

    def _check(self) -> None:
        """Raises `InputError` where tokens or offsets are not those that were written, or are
        none."""
        digest = hashlib.sha256()
        for start in range(0, self.n_tokens, CHECKED_AT_A_TIME):
            tokens = self.tokens[start : start + CHECKED_AT_A_TIME]
            digest.update(tokens)
            if tokens.max() >= self.vocab_size:
                raise InputError(
                    f"{self.path}: has token {tokens.max()} of {self.vocab_size}; prepare the data"
                    " again"
                )
        digest.update(self.document_starts)
        if digest.hexdigest() != self.digest:
            raise InputError(
                f"{self.path}: is damaged, its checksum is another; prepare the data again"
            )
        edges = np.concatenate([self.document_starts, [self.n_tokens]])
        if edges[0] != 0 or (np.diff(edges) <= 0).any():
            raise InputError(
                f"{self.path}: its documents' offsets are out of order; prepare the data again"
            )

    def __len__(self) -> int:
        return self.n_tokens


def _aligned(position: int) -> int:
    return -(-position // 8) * 8


def write_token_file(
    path: Path,
    parts: Sequence[Iterator[tuple[bool, str]]],
    tokenizer: Tokenizer,
    key: str,
    separate: Sequence[bool] = (),
    processes: int | None = None,
) -> None:
    """Encodes `parts`, one after the other, each what `corpus.documents` yields, into the token
    file `path`, which appears only when it is whole. `separate` says of each part if its documents
    are separated (default: none are). The file is the same for any number of `processes`; None is
    as many as there are cores."""
    dtype = np.dtype(DTYPES[0] if tokenizer.vocab_size <= 1 << 16 else DTYPES[1])
    counts = Counts(tokenizer)
    digest = hashlib.sha256()
    starts = array("q")  # of documents
    ends = []  # of parts
    bar = {"desc": path.stem, "unit": "B", "unit_scale": True, "leave": False}
    with (
        written_whole(path, "; cache_dir must be a writable folder") as beside,
        open(beside, "wb") as file,
        tqdm(**bar, disable=not sys.stderr.isatty()) as progress,
        Encoders(tokenizer, dtype, processes) as encoders,
    ):
        file.seek(HEADER_BYTES)
        for pieces, apart in itertools.zip_longest(parts, separate, fillvalue=False):
            cut = cut_documents(pieces, apart, tokenizer.end_of_text)
            for batch, encoded in encoders.in_order(batches(cut)):
                starts.extend(counts.add(batch, encoded))
                data = encoded.ids.tobytes()
                file.write(data)
                digest.update(data)
                progress.update(sum(encoded.sizes))
            ends.append(counts.tokens)
        file.write(bytes(_aligned(file.tell()) - file.tell()))
        file.write(starts.tobytes())
        digest.update(starts.tobytes())
        scored_bytes, scored_words = counts.scored
        header = {
            "dtype": dtype.name,
            "tokens": counts.tokens,
            "bytes": counts.bytes,
            "words": counts.words,
            "scored_bytes": scored_bytes,
            "scored_words": scored_words,
            "documents": counts.documents,
            "tokenizer": tokenizer.name,
            "key": key,
            "parts": np.diff([0, *ends]).tolist(),
            "vocab_size": tokenizer.vocab_size,
            "sha256": digest.hexdigest(),
        }
        file.seek(0)
        file.write((FORMAT + json.dumps(header).encode()).ljust(HEADER_BYTES))
