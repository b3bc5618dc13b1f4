"""The token files of a corpus, made once and found again, and what a run keeps of them."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.command import InputError
from common.files import read_json, remove_abandoned, write_whole
from config import Config
from data.corpus import (
    SPLITS,
    Skipped,
    components,
    described,
    documents,
    file_documents,
    is_verbatim,
    source_fingerprint,
    unread,
)
from data.encoding import all_encoded
from data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer, tokenizer_choice
from data.tokens import TokenFile, write_token_file

DATA_FILE = "data.json"  # in a run's folder: what the run was trained on
# `dataset` of a checkpoint that does not say what it was trained on
UNKNOWN_DATASET = "original"


@dataclass(frozen=True)
class Corpus:
    """The prepared data of a run. `source` says where it comes from; `separator` what stands
    between two documents."""

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
    config: Config,
    say: Callable[[str], None] = print,
    tokenizer: Tokenizer | None = None,
    separate: bool = True,
    processes: int | None = None,
) -> Corpus:
    """The corpus of `config`, from `config.cache_dir` where it is whole there, else made now; `say`
    gets a line for each thing made. Several processes may prepare the same corpus at once.

    A run's own `tokenizer` is given, so that its text is encoded as it was; else it is the one that
    `config` asks for. `separate` false puts nothing between documents. As many `processes` encode
    as there are cores (None); the files do not depend on it. Raises `InputError` for a split in
    which there is nothing to predict."""
    if lost := unread(config):
        say(f"note: {lost}")
    tokenizer = tokenizer or _prepared_tokenizer(config, say)
    files = {
        split: prepare_split(config, split, tokenizer, say, separate, processes) for split in SPLITS
    }
    return Corpus(
        config.dataset,
        described(config),
        separator(config, tokenizer, separate),
        tokenizer,
        **files,
    )


def prepare_split(
    config: Config,
    split: str,
    tokenizer: Tokenizer,
    say: Callable[[str], None] = print,
    separate: bool = True,
    processes: int | None = None,
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
        skipped = Skipped()
        texts = [documents(source, split, skipped) for source in sources]
        write_token_file(path, texts, tokenizer, key, apart, processes)
        file = TokenFile(path, key)
        count = len(file.document_starts)
        said = f"{count:,} document{'s' * (count != 1)}"
        if skipped.rows:
            said += f" ({skipped.said()})"
        say(
            f"{split}: {said}, {file.n_bytes:,} bytes, {file.n_tokens:,} {tokenizer.name} tokens"
            f" -> {path}"
        )
    if file.n_tokens < 2:
        raise InputError(
            f"dataset: the {split} split of {config.dataset} is one token, which nothing predicts;"
            " give more text"
        )
    return file


def separator(config: Config, tokenizer: Tokenizer, separate: bool = True) -> str:
    """What stands between two documents of `config`, in words."""
    if not separate or is_verbatim(components(config)[0]):
        return "nothing"
    return _separator(tokenizer)


def _separator(tokenizer: Tokenizer) -> str:
    return "a blank line" if tokenizer.end_of_text is None else "an end of text"


def _cache_folder(config: Config, key: str) -> Path:
    name = re.sub(r"[^\w-]+", "-", Path(config.dataset).stem).strip("-") or "text"
    # file systems take names of 255 bytes
    folder = Path(config.cache_dir) / f"{name[:64]}-{key[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cache_dir: cannot make {folder} ({error.strerror}); give a writable folder"
        ) from None
    remove_abandoned(folder.parent)
    return folder


def _prepared_tokenizer(config: Config, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that `config` asks for. A SentencePiece is trained once and kept in the
    cache."""

    def texts() -> Iterator[str]:
        return (text for source in components(config) for _, text in documents(source, "train"))

    if tokenizer_choice(config) != "sentencepiece":
        return make_tokenizer(config, texts)
    folder = _cache_folder(
        config,
        hashlib.sha256(f"{source_fingerprint(config)} {config.vocab_size}".encode()).hexdigest(),
    )
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


# ===== What a run was trained on


def run_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint, where its config, tokenizer and data.json are."""
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def run_corpus(
    config: Config,
    folder: Path,
    begun: bool,
    say: Callable[[str], None] = print,
    keeps: bool = True,
) -> Corpus:
    """The corpus of the run in `folder`, in the run's own tokenizer. A new run's tokenizer and
    digests are written there; of one that has `begun` they are compared, and `InputError` says what
    is different. A process that does not keep the run's folder writes nothing; on a machine of its
    own it may not have one.

    A run of before runs kept digests goes on with its text as it is now, and with nothing between
    the documents, as then."""
    tokenizer = load_tokenizer(folder)
    kept = read_data_file(folder)
    if begun and tokenizer is None:
        raise InputError(
            f"resume: {folder} has lost its tokenizer (tokenizer.json), which alone encodes as it"
            " did; restore it"
        )
    corpus = prepare(config, say, tokenizer, separate=kept["separated"] if kept else not begun)
    if kept and (different := differences(kept, corpus)):
        raise InputError(
            f"resume: {folder} was not trained on this: {'; '.join(different)}. Restore it, or"
            " start a new run"
        )
    if tokenizer is None and keeps:
        corpus.tokenizer.save(folder)
    if kept is None and keeps:
        if begun:
            say(
                f"note: {folder} is from before runs kept digests of their text, so nothing tells"
                " if it is still the same"
            )
        write_data_file(folder, corpus, separated=not begun)
    return corpus


def write_data_file(folder: Path, corpus: Corpus, separated: bool) -> None:
    """Keeps in a run's folder what the run is trained on: where the text comes from, sizes, and
    digests of its tokens."""
    tokenizer = {"name": corpus.tokenizer.name, "fingerprint": corpus.tokenizer.fingerprint}
    values = {
        "source": corpus.source,
        "separated": separated,
        "separator": corpus.separator,
        "tokenizer": tokenizer,
    }
    values["splits"] = {split: _summary(getattr(corpus, split)) for split in SPLITS}
    write_whole(folder / DATA_FILE, (json.dumps(values, indent=2) + "\n").encode())


def _summary(file: TokenFile) -> dict[str, int | str]:
    counts = {
        "documents": len(file.document_starts),
        "bytes": file.n_bytes,
        "words": file.n_words,
        "tokens": file.n_tokens,
    }
    return counts | {"sha256": file.digest}


def read_data_file(folder: Path) -> dict[str, Any] | None:
    """What `write_data_file` kept in `folder`; None where there is none. Raises `InputError` for a
    broken one."""
    path = folder / DATA_FILE
    if not path.exists():
        return None
    kept = read_json(path)
    try:
        for summary in (kept["splits"][split] for split in SPLITS):
            whole = isinstance(summary["bytes"], int) and isinstance(summary["sha256"], str)
            if (
                not whole
                or not isinstance(kept["separated"], bool)
                or not isinstance(kept["tokenizer"]["fingerprint"], str)
            ):
                raise TypeError
    except (KeyError, TypeError):
        raise InputError(f"{path}: is not as train.py wrote it; restore it") from None
    return kept


def differences(kept: dict[str, Any], corpus: Corpus) -> list[str]:
    """What is different between the corpus that a run's data.json tells of and `corpus`; empty if
    they are the same."""
    if kept["tokenizer"]["fingerprint"] != corpus.tokenizer.fingerprint:
        return [
            f"the tokenizer is not the one that it began with ({corpus.tokenizer.name}, was"
            f" {kept['tokenizer'].get('name')})"
        ]
    found = []
    for split in SPLITS:
        file = getattr(corpus, split)
        before = kept["splits"][split]
        if file.digest != before["sha256"]:
            same_size = file.n_bytes == before["bytes"]
            sizes = f"{file.n_bytes:,} bytes" + (
                ", but others" if same_size else f", and had {before['bytes']:,}"
            )
            found.append(f"{split} has {sizes}")
    if found and kept.get("source") != corpus.source:
        found.append(f"it is from {corpus.source}, and was from {kept.get('source')}")
    return found


# ===== What is scored


def original_text(text: str) -> str:
    """`text` as the first implementation read it: rows with their line ends, blank ones (" \\n")
    empty, joined by "\\n\\n"."""
    rows = text.split("\n")
    rows = [row + "\n" for row in rows[:-1]] + rows[-1:] * bool(rows[-1])
    return "\n\n".join("" if row == " \n" else row for row in rows)


@dataclass(frozen=True)
class Text:
    """A text to score: all its tokens (n,), bytes and words of what is scored of it, and which text
    it is."""

    tokens: np.ndarray
    size: int
    words: int
    source: str
    separator: str = "nothing"  # between two documents
    # whether it is what the run had as this split; None where nothing tells
    of_run: bool | None = None


def encoded(text: str, tokenizer: Tokenizer, source: str) -> Text:
    """One document, verbatim."""
    tokens, _, size, words = all_encoded(iter([(True, text)]), tokenizer)
    return Text(tokens, size, words, source)


def read_tokens(
    data: str,
    config: Config,
    tokenizer: Tokenizer,
    say: Callable,
    folder: Path | None = None,
    protocol: str = "run",
) -> Text:
    """The text to score that `data` names: a split of the run's own data set, or a file or folder
    of any kind that training reads, whose rows are under `config.text_column`.

    By protocol "original" it is the `original_text` of that. `folder` is the run's: with what it
    keeps of its text, protocol "run" reads a split as in training, and `say` gets a line where it
    is another text by now."""
    if data not in SPLITS:
        return _read_file(Path(data), config, tokenizer, say, protocol)
    own = components(config)[0]  # what training mixes in has no part in the other splits
    if own.dataset == UNKNOWN_DATASET:
        raise InputError(
            f"data: {data} is a split, but this checkpoint does not say of which data set; give a"
            " file of text, or a folder of them"
        )
    if protocol == "original":
        source = f"{described(own)}, {data}, with the first implementation's blank lines"
        text = "".join(text for _, text in documents(config, data))
        return encoded(original_text(text), tokenizer, source)
    kept = read_data_file(folder) if folder else None
    separate = kept is not None and kept["separated"] and protocol == "run"
    file = prepare_split(config, data, tokenizer, say, separate)
    same = None
    if kept is not None and separate == kept["separated"]:
        same = kept["splits"][data]["sha256"] == file.digest
    if same is False:
        say(
            f"note: the {data} split is not the one that this run was made with, from"
            f" {kept.get('source')}"
        )
    between = separator(config, tokenizer, separate)
    source = f"{described(own)}, {data}"
    return Text(file.tokens, file.scored_bytes, file.scored_words, source, between, same)


def _read_file(
    path: Path, config: Config, tokenizer: Tokenizer, say: Callable, protocol: str
) -> Text:
    """All text of a file or folder. Where it has several documents they are separated by protocol
    "run", as a new run's would be."""
    if not path.exists():
        raise InputError(
            f"data: {path} is neither one of {', '.join(SPLITS)} nor a file or folder of text"
        )
    skipped = Skipped()
    pieces = file_documents(path, config.text_column, skipped)
    source = str(path.absolute())
    between = "nothing"
    if protocol == "original":
        text = encoded(original_text("".join(piece for _, piece in pieces)), tokenizer, source)
    else:
        separate = protocol == "run"
        tokens, count, size, words = all_encoded(pieces, tokenizer, separate)
        if separate and count > 1:
            between = _separator(tokenizer)
        text = Text(tokens, size, words, source, between)
    if skipped.rows:
        say(f"note: {skipped.said()}")
    return text
