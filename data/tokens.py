"""Token files and the order in which training reads them.

`prepare(config)` turns a corpus into one token file per split, in `config.cache_dir`, and finds
them there next time. Between two documents stands the tokenizer's end of text, or where it has none
a blank line; WikiText is left as it is. A run's folder keeps the digests of what it was trained on,
which `run_corpus` compares before the run goes on. `Windows`, `Blend` and `Lanes` say which tokens
a training step sees: a pure function of (seed, step), so a resumed run goes on with the very
batches that it would have seen."""

import hashlib
import itertools
import json
import re
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.command import InputError
from common.files import written_whole
from data.tokenizer import Tokenizer

FORMAT = b"WLMTOK03"  # another layout gets another number, so that old files are rebuilt
HEADER_BYTES = 4096  # FORMAT, then JSON, padded by spaces
ENCODE_CHARACTERS = 1 << 20  # text is encoded in pieces of at most this size
# all that a token file may hold; numpy would take others from it, pointers among them
DTYPES = ("uint16", "uint32")
CHECKED_AT_A_TIME = 1 << 22  # tokens: bounds memory
# no token of ours crosses it: GPT-2's and SentencePiece's words start with the space
CUT = re.compile(r"\S(?=[ \n])")


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
            if not raw.startswith(FORMAT):
                raise ValueError
            header = json.loads(raw[len(FORMAT) :])
            self.n_tokens, self.n_bytes, self.n_words = (
                header["tokens"],
                header["bytes"],
                header["words"],
            )
            self.scored_bytes, self.scored_words = header["scored_bytes"], header["scored_words"]
            self.tokenizer, self.key, self.parts = (
                header["tokenizer"],
                header["key"],
                header["parts"],
            )
            self.vocab_size, self.digest, n_documents = (
                header["vocab_size"],
                header["sha256"],
                header["documents"],
            )
            counts = [
                self.n_tokens,
                self.n_bytes,
                self.n_words,
                self.scored_bytes,
                self.scored_words,
                self.vocab_size,
            ]
            if header["dtype"] not in DTYPES or not all(
                type(n) is int and n >= 0 for n in [*counts, n_documents, *self.parts]
            ):
                raise ValueError
            if sum(self.parts) != self.n_tokens or not self.n_tokens or not n_documents:
                raise ValueError
            dtype = np.dtype(header["dtype"])
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


def encode_documents(
    pieces: Iterator[tuple[bool, str]], tokenizer: Tokenizer, separate: bool = False
) -> Iterator[tuple[bool, str, list[int]]]:
    """Yields (starts a document, text, its tokens) in bounded memory, from (starts a document,
    text) in any pieces.

    Where a document is cut depends on its text alone, hence so do the tokens. The cuts fall before
    a space or line end (unless 1,048,576 characters have none), and there the tokens are those of
    the text in one go. With `separate` a document that another one follows ends with the
    tokenizer's end of text, or, where it has none, with a blank line."""
    first, rest, over = True, "", False
    for starts, text in pieces:
        over = over or starts  # the document so far is over when the next one has any text
        if not text:
            continue
        if over and rest:
            if separate and tokenizer.end_of_text is None:
                # none where it ends in a blank line
                rest += "\n" * (2 - rest[len(rest.rstrip("\r\n")) :].count("\n"))
            yield first, rest, tokenizer.encode(rest)
            if separate and tokenizer.end_of_text is not None:
                yield False, "", [tokenizer.end_of_text]
            first, rest = True, ""
        over = False
        rest += text
        while len(rest) > ENCODE_CHARACTERS:  # one more character, for the cut looks ahead
            end = ENCODE_CHARACTERS
            # nearly always there is a cut among the last characters
            for window in (1 << 12, ENCODE_CHARACTERS):
                cuts = [
                    match.end()
                    for match in CUT.finditer(
                        rest, ENCODE_CHARACTERS - window, ENCODE_CHARACTERS + 1
                    )
                ]
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
    """The bytes and words that a text which begins with `text`, `ids`, has in its first token
    alone. No model predicts that token, so they are not in what is scored. A word that goes on in
    the second token counts as scored."""
    size = len(tokenizer.decode_bytes(ids[:1]))
    # a byte's token may end inside a character
    rest = text.encode("utf-8")[size:].decode("utf-8", errors="replace")
    return size, word_count(text) - word_count(rest)


def write_token_file(
    path: Path,
    parts: Sequence[Iterator[tuple[bool, str]]],
    tokenizer: Tokenizer,
    key: str,
    separate: Sequence[bool] = (),
) -> None:
    """Encodes `parts`, one after the other, each what `corpus.documents` yields, into the token
    file `path`, which appears only when it is whole. `separate` says of each part if its documents
    are separated (default: none are)."""
    dtype = np.dtype(DTYPES[0] if tokenizer.vocab_size <= 1 << 16 else DTYPES[1])
    n_tokens = n_bytes = n_words = 0
    digest, first_token = hashlib.sha256(), (0, 0)
    starts, ends = array("q"), []  # of documents, of parts
    word_open = False  # the text so far ends inside a word, which a hard cut may have split
    bar = {"desc": path.stem, "unit": "B", "unit_scale": True, "leave": False}
    with (
        written_whole(path, "; cache_dir must be a writable folder") as beside,
        open(beside, "wb") as file,
        tqdm(**bar, disable=not sys.stderr.isatty()) as progress,
    ):
        file.seek(HEADER_BYTES)
        for pieces, apart in itertools.zip_longest(parts, separate, fillvalue=False):
            for first, text, ids in encode_documents(pieces, tokenizer, apart):
                if first:
                    starts.append(n_tokens)
                if not n_tokens:
                    first_token = unscored(text, ids, tokenizer)
                n_words += word_count(text) - (
                    not first and word_open and not text[:1].isspace() and text != ""
                )
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
        header |= {
            "scored_bytes": n_bytes - first_token[0],
            "scored_words": n_words - first_token[1],
        }
        header |= {
            "documents": len(starts),
            "tokenizer": tokenizer.name,
            "key": key,
            "parts": np.diff([0, *ends]).tolist(),
        }
        header |= {"vocab_size": tokenizer.vocab_size, "sha256": digest.hexdigest()}
        file.seek(0)
        file.write((FORMAT + json.dumps(header).encode()).ljust(HEADER_BYTES))
