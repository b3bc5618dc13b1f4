"""Text is read verbatim, token files are whole or not trusted, and training order is a function of
(seed, step)."""

import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SHARED, start_child
from hypothesis import given
from hypothesis import strategies as st

from common.command import InputError
from config import Config
from data import corpus, encoding, library, readers
from data import prepare as prepare_module
from data.corpus import SPLITS, documents, source_fingerprint
from data.encoding import cut_documents
from data.order import Blend, Lanes, Windows, evaluation_slice, permuted, training_order
from data.prepare import prepare, prepare_split, run_corpus
from data.tokenizer import (
    ByteTokenizer,
    GPT2Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    text_bytes,
    train_sentencepiece,
)
from data.tokens import FORMAT, HEADER_BYTES, TokenFile, write_token_file

LINES = "Äpfel und Birnen: été 中文 𝄞\r\nsecond  line\n\n\ttabbed ▁ line\n"


def text_of(config, split):
    return "".join(text for _, text in documents(config, split))


def separated_text(config, split):
    """Of documents that end with one line end each, as token files over bytes hold them."""
    return "\n".join(text for _, text in documents(config, split))


def files_of(folder, split):
    return [path for path in folder.rglob("*") if path.is_file() and split in path.name]


@pytest.fixture
def folder(tmp_path):
    """A small corpus with three splits of several documents."""
    for split, count in (("train", 5), ("valid", 2), ("test", 1)):
        (tmp_path / "text" / split).mkdir(parents=True)
        for number in range(count):
            text = f"{split} {number}\n" + LINES * (3 + number)
            (tmp_path / "text" / split / f"{number}.txt").write_bytes(text.encode())
    return tmp_path / "text"


@pytest.fixture
def config(folder, tmp_path):
    return Config(dataset=str(folder), cache_dir=str(tmp_path / "cache"), block_size=32)


def token_file(path, lengths, tokenizer=None):
    """A token file of documents of these lengths, in which the token at position i is i mod 128."""
    total = (np.arange(sum(lengths)) % 128).astype(np.uint8).tobytes().decode("ascii")
    pieces, start = [], 0
    for length in lengths:
        pieces.append((True, total[start : start + length]))
        start += length
    write_token_file(path, [iter(pieces)], tokenizer or ByteTokenizer(), "key")
    return TokenFile(path, "key")


def encode_documents(
    pieces: Iterator[tuple[bool, str]], tokenizer: Tokenizer, separate: bool = False
) -> Iterator[tuple[bool, str, list[int]]]:
    """Yields (starts a document, text, its tokens) of what `cut_documents` makes of `pieces`; an
    end of text is a piece without text."""
    for first, text, ends in cut_documents(pieces, separate, tokenizer.end_of_text):
        yield first, text, tokenizer.encode(text)
        if ends:
            yield False, "", [tokenizer.end_of_text]


# ===== The corpus


def test_pydoc_is_the_same_every_time_and_its_splits_are_disjoint(monkeypatch):
    # every fourth file: to parse them all takes ten seconds
    some = library.library_files()[::4]
    monkeypatch.setattr(library, "library_files", lambda: some)
    config = Config(dataset="pydoc")
    seen, sizes = {}, {}
    for split in SPLITS:
        found = [text for starts, text in documents(config, split) if starts]
        sizes[split] = sum(map(len, found))
        for text in found:
            heading = text.split("\n", 1)[0]
            assert seen.setdefault(heading, split) == split, heading
    assert text_of(config, "validation") == text_of(config, "validation")
    assert sum(sizes.values()) > 700_000
    assert 0.8 < sizes["train"] / sum(sizes.values()) < 0.95
    assert source_fingerprint(config) == source_fingerprint(config)


def test_pydoc_reads_like_documentation():
    import ast

    source = """
class A(B):
    "About A."
    def f(self, x: int = 1, *, y):
        '''Does f.

        More.'''
"""
    assert (
        "".join(library._entries(ast.parse(source), "m"))
        == """\
class m.A(B)
    About A.

m.A.f(self, x: int=1, *, y)
    Does f.

    More.

"""
    )


def test_folders_of_splits_are_read_verbatim(config, folder):
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        expected = b"".join(path.read_bytes() for path in sorted((folder / name).iterdir()))
        assert text_of(config, split).encode() == expected
    assert sum(starts for starts, _ in documents(config, "train")) == 5


def test_split_files_are_read_verbatim(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.txt").write_bytes(name.encode() + b"\r\nx")
    assert text_of(Config(dataset=str(tmp_path)), "validation") == "validation\r\nx"


@pytest.mark.parametrize("files", [1, 4])
def test_text_without_splits_is_cut_at_line_ends_and_nothing_is_lost(tmp_path, files):
    rng = random.Random(0)
    for number in range(files):
        lines = "".join(f"é{rng.random()}" * rng.randint(0, 5) + "\n" for _ in range(300))
        (tmp_path / f"{number}.txt").write_text(lines, encoding="utf-8", newline="")
    dataset = str(tmp_path if files > 1 else tmp_path / "0.txt")
    config = Config(dataset=dataset, split_fractions=(0.6, 0.25, 0.15))
    whole = "".join(
        (tmp_path / f"{number}.txt").read_text(encoding="utf-8") for number in range(files)
    )
    parts = [text_of(config, split) for split in SPLITS]
    assert "".join(parts) == whole
    for part, share in zip(parts, config.split_fractions, strict=True):
        assert part.endswith("\n")
        assert abs(len(part) / len(whole) - share) < 0.02


def test_pieces_never_cut_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READ_BYTES", 7)
    (tmp_path / "a.txt").write_bytes(LINES.encode() * 3)
    assert "".join(readers.read_text(tmp_path / "a.txt")) == LINES * 3


def test_the_fingerprint_changes_with_the_files(config, folder):
    before = source_fingerprint(config)
    with open(folder / "train" / "0.txt", "a") as file:
        file.write("more\n")
    assert source_fingerprint(config) != before


def test_bad_sources_are_one_clear_error(tmp_path, monkeypatch):
    def error(**values):
        with pytest.raises(InputError) as caught:
            for split in SPLITS:
                list(documents(Config(**values), split))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nothing at" in error(dataset=str(tmp_path / "none.txt"))
    assert "did you mean wikitext-103?" in error(dataset="wikitxt-103")
    assert "unknown data set xyzzy" in error(dataset="xyzzy")
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "empty.txt: is empty" in error(dataset=str(tmp_path / "empty.txt"))
    (tmp_path / "line.txt").write_bytes(b"one line without an end")
    assert "split_fractions" in error(dataset=str(tmp_path / "line.txt"))
    monkeypatch.setattr(readers, "READ_BYTES", 8)
    latin = b"good \xc3\xa9 lines\n" * 3 + b"caf\xe9 bad\n"
    (tmp_path / "latin.txt").write_bytes(latin)
    assert f"latin.txt: not UTF-8 at byte {latin.index(0xE9)};" in error(
        dataset=str(tmp_path / "latin.txt")
    )
    (tmp_path / "none").mkdir()
    assert "no files of text" in error(dataset=str(tmp_path / "none"))
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "train.txt").write_text("a\n")
    (tmp_path / "part" / "valid.txt").write_text("a\n")
    assert "has no test split; add test.txt" in error(dataset=str(tmp_path / "part"))
    (tmp_path / "part" / "test.txt").write_text("")
    assert "test split" in error(dataset=str(tmp_path / "part"))


def test_a_file_of_an_unknown_kind_is_refused(tmp_path):
    for name in ("rows.json", "page.html", "notes.md", "t.parquet.gz", "book.gz", "none"):
        (tmp_path / name).write_text('{"text": "a"}\n' * 30)
        with pytest.raises(InputError, match=rf"{name}: .*unknown kind.*\.txt"):
            text_of(Config(dataset=str(tmp_path / name)), "train")
    kinds = r"only 2 \.gz, 1 \.html, 1 \.json, 1 \.md, 1 without a suffix"
    with pytest.raises(InputError, match=rf"no files of text, {kinds};"):
        text_of(Config(dataset=str(tmp_path)), "train")


def test_files_of_a_folder_are_read_or_named(tmp_path):
    """Behind links to folders, whatever the case of their names, and once where links go in a
    circle."""
    main, elsewhere = tmp_path / "main", tmp_path / "elsewhere"
    for folder in (main / "deep", elsewhere):
        folder.mkdir(parents=True)
    files = {
        main / "a.txt": "aa\n",
        main / "deep" / "B.TXT": "bb\n",
        elsewhere / "c.Txt": "cc\n",
        main / "e.md": "ee\n",
    }
    for path, text in files.items():
        path.write_text(text * 100)
    (main / "linked").symlink_to(elsewhere)
    (main / "linked.txt").symlink_to(elsewhere / "c.Txt")
    (main / "deep" / "circle").symlink_to(main)
    config = Config(dataset=str(main), tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    assert sorted("".join(text_of(config, split) for split in SPLITS).split()) == sorted(
        ["aa", "bb", "cc", "cc"] * 100
    )
    said = []
    prepare(config, said.append)
    assert said[0] == f"note: 1 of the files in {main} are not read: 1 .md"
    assert corpus.described(config) == f"{main} (4 files, 1,200 bytes)"
    before = source_fingerprint(config)
    (elsewhere / "more.txt").write_text("more\n")
    assert source_fingerprint(config) != before


def test_splits_are_found_whatever_the_case_and_what_is_beside_them_is_named(tmp_path):
    for name in ("Train", "VALID.TXT", "test"):
        path = tmp_path / "text" / (name if name.endswith("TXT") else f"{name}/a.TXT")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n" * 3)
    (tmp_path / "text" / "more.txt").write_text("more\n")
    config = Config(dataset=str(tmp_path / "text"))
    assert [text_of(config, split).split()[0] for split in SPLITS] == ["Train", "VALID.TXT", "test"]
    assert corpus.unread(config) == f"1 of the files in {tmp_path / 'text'} are not read: 1 .txt"


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "text" / "closed").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text("a\n" * 50)
    config = Config(dataset=str(tmp_path / "text"))
    for name in ("b.txt", "linked"):
        (tmp_path / "text" / name).symlink_to(tmp_path / "gone")
        for read in (source_fingerprint, corpus.described, lambda config: text_of(config, "train")):
            with pytest.raises(InputError, match=rf"{name}: links to .*gone, where nothing is"):
                read(config)
        (tmp_path / "text" / name).unlink()
    os.mkfifo(tmp_path / "text" / "pipe.txt")
    with pytest.raises(InputError, match=r"pipe\.txt: is a FIFO; give a file"):
        text_of(config, "train")
    (tmp_path / "text" / "pipe.txt").unlink()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match=r"closed: cannot be read \(Permission denied\)"):
        text_of(config, "train")


# ===== Data sets in the hub's layout


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that writes parquet files in the hub's layout; the data set library works in a
    folder of its own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    # where it was imported before
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    import pyarrow
    import pyarrow.parquet

    def write(column="text", **splits):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            path = tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(pyarrow.table({column: rows}), path)
        return str(tmp_path / "hub")

    return write


def test_parquet_splits_are_read_verbatim(hub):
    path = hub(train=["a\r\n", "", "b "], validation=["v"], test=["t\n"])
    config = Config(dataset="tinystories", dataset_path=path)
    assert [text_of(config, split) for split in SPLITS] == ["a\r\nb ", "v", "t\n"]


def test_wikitext_from_a_local_copy_has_its_blank_lines(hub):
    rows = ["", " = One = \n", "", " a . \n", "", " = Two = \n", " b \n"]
    config = Config(
        dataset="wikitext-103", dataset_path=hub(train=rows, validation=rows, test=rows)
    )
    pieces = list(documents(config, "test"))
    assert "".join(text for _, text in pieces) == " \n = One = \n \n a . \n \n = Two = \n b \n"
    assert [text for starts, text in pieces if starts] == [" \n", " = Two = \n"]


def test_a_folder_of_parquet_files_is_a_data_set(hub):
    path = hub(train=["a\n"], validation=["v\n"], test=["t\n"])
    assert text_of(Config(dataset=path), "test") == "t\n"


def test_a_mix_adds_its_train_splits_and_leaves_the_others(hub, folder, tmp_path):
    path = hub(train=["hub text\n"], validation=["v\n"], test=["t\n"])
    config = Config(
        dataset=str(folder),
        dataset_mix={path: 0.5},
        tokenizer="bytes",
        cache_dir=str(tmp_path / "cache"),
    )
    corpus = prepare(config, lambda line: None)
    alone = prepare(config.model_copy(update={"dataset_mix": ()}), lambda line: None)
    assert bytes(corpus.train.tokens.tolist()) == bytes(alone.train.tokens.tolist()) + b"hub text\n"
    assert corpus.train.parts == [len(alone.train), 9]
    assert np.array_equal(corpus.test.tokens, alone.test.tokens)


def test_missing_hub_splits_are_cut_from_train_by_row(hub):
    rows = [f"row {number}\n" for number in range(400)]
    config = Config(
        dataset="openwebtext", dataset_path=hub(train=rows), split_fractions=(0.8, 0.1, 0.1)
    )
    parts = [text_of(config, split).splitlines(True) for split in SPLITS]
    assert sorted(line for part in parts for line in part) == sorted(rows)
    assert all(20 < len(part) < 70 for part in parts[1:])
    hub(validation=["given"])
    assert text_of(config, "validation") == "given"
    train, test = (text_of(config, split).splitlines(True) for split in ("train", "test"))
    assert sorted(train + test) == sorted(rows)


def test_hub_errors_are_one_clear_line(hub, tmp_path):
    def error(**values):
        with pytest.raises(InputError) as caught:
            list(documents(Config(**values), "train"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path = hub(train=["a"], column="content")
    assert (
        "text_column: " in (line := error(dataset="mine", dataset_path=path)) and "content" in line
    )
    assert "dataset_name" in error(dataset="mine", dataset_path=path, dataset_name="none")
    numbers = hub(train=[1, 2], column="text")
    assert "holds int" in error(dataset="mine", dataset_path=numbers)
    (tmp_path / "nothing").mkdir()
    assert "parquet" in error(dataset="mine", dataset_path=str(tmp_path / "nothing"))


def test_wikitext_rows_become_the_published_text_and_articles():
    path = SHARED / "data" / "wikitext" / "test.txt"
    if not path.exists():
        pytest.skip("no WikiText-103 test split beside the repository")
    published = path.read_text(encoding="utf-8")
    # as the hub has them
    rows = ["" if not line.strip() else line for line in published.splitlines(True)]
    assert "".join(rows) != published
    pieces = list(corpus._wikitext_articles(iter(rows)))
    assert "".join(text for _, text in pieces) == published
    assert sum(starts for starts, _ in pieces) == 60


# ===== Token files


def test_wikitext_test_has_its_published_number_of_words(tmp_path):
    path = SHARED / "data" / "wikitext" / "test.txt"
    if not path.exists():
        pytest.skip("no WikiText-103 test split beside the repository")
    pieces = ((index == 0, text) for index, text in enumerate(readers.read_text(path)))
    write_token_file(tmp_path / "t", [pieces], ByteTokenizer(), "key")
    assert TokenFile(tmp_path / "t").n_words == 245_569
    assert TokenFile(tmp_path / "t").n_bytes == path.stat().st_size


def trained():
    return SentencePieceTokenizer(train_sentencepiece(iter([LINES * 50]), 330))


def gpt2():
    if not os.environ.get("TIKTOKEN_CACHE_DIR") and (SHARED / "tiktoken").is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken")
    try:
        return GPT2Tokenizer()
    except InputError:
        pytest.skip("GPT-2's merges are not cached and there is no network")


@pytest.mark.parametrize("make", [ByteTokenizer, trained, gpt2])
def test_a_token_file_gives_back_text_counts_and_documents(make, tmp_path):
    tokenizer = make()
    texts = [LINES, "", "one 中 word", LINES * 3]
    write_token_file(tmp_path / "t", [iter([(True, text) for text in texts])], tokenizer, "key")
    file = TokenFile(tmp_path / "t", "key")
    whole = "".join(texts)
    assert tokenizer.decode_bytes(file.tokens.tolist()) == whole.encode()
    assert len(file) == file.n_tokens == len(file.tokens)
    assert file.n_bytes == len(whole.encode()) and file.tokenizer == tokenizer.name
    assert file.n_words == sum(len(text.split()) + text.count("\n") for text in texts)
    edges = [*file.document_starts.tolist(), len(file)]
    found = [tokenizer.decode(file.tokens[a:b].tolist()) for a, b in itertools.pairwise(edges)]
    assert found == [text for text in texts if text]
    assert file.tokens.dtype == np.uint16


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    class Large(ByteTokenizer):
        vocab_size = 70_000

        def encode(self, text):
            return [69_999 - value for value in text.encode()]

        def decode_bytes(self, ids):
            return bytes([69_999 - value for value in ids])

    file = token_file(tmp_path / "t", [10], Large())
    assert file.tokens.dtype == np.uint32 and file.tokens[0] == 69_999


@pytest.mark.parametrize("make", [ByteTokenizer, trained, gpt2])
def test_tokens_depend_on_the_text_alone_and_cuts_change_none(make, monkeypatch):
    tokenizer = make()
    rng = random.Random(1)
    vocabulary = [
        "the",
        " ",
        "  ",
        "\n",
        "\n\n",
        " \n",
        "\t",
        "é",
        "中",
        "▁",
        "don't",
        "123",
        "...",
        "\r\n",
        "\u3000",
    ]
    text = "".join(rng.choice(vocabulary) for _ in range(5000))
    whole = tokenizer.encode(text)
    monkeypatch.setattr(encoding, "ENCODE_CHARACTERS", 500)

    def tokens(sizes):
        pieces, start = [], 0
        while start < len(text):
            size = sizes()
            pieces.append((start == 0, text[start : start + size]))
            start += size
        return [token for _, _, ids in encode_documents(iter(pieces), tokenizer) for token in ids]

    assert (
        tokens(lambda: 10**9) == tokens(lambda: 1) == tokens(lambda: rng.randint(1, 2000)) == whole
    )


def test_words_are_counted_once_where_a_long_one_is_cut(monkeypatch, tmp_path):
    monkeypatch.setattr(encoding, "ENCODE_CHARACTERS", 10)
    text = "a" * 35 + " " + "b" * 25 + "\n" + "中" * 40
    write_token_file(tmp_path / "t", [iter([(True, text), (True, "c")])], ByteTokenizer(), "key")
    assert TokenFile(tmp_path / "t").n_words == 5


def test_preparing_again_reuses_the_files(config, tmp_path):
    said = []
    first = prepare(config, said.append)
    assert len(said) == 3
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.tokens")}
    assert len(files) == 3
    said.clear()
    second = prepare(config, said.append)
    assert said == [] and {path: path.stat().st_mtime_ns for path in files} == files
    assert np.array_equal(first.train.tokens, second.train.tokens)
    assert second.vocab_size == 256 and second.tokenizer.name == "bytes"
    assert second.tokenizer.decode_bytes(second.test.tokens.tolist()).decode() == separated_text(
        config, "test"
    )


def test_a_trained_tokenizer_is_reused_and_a_broken_one_trained_again(config, tmp_path):
    config = config.model_copy(update={"tokenizer": "sentencepiece", "vocab_size": 330})
    first, said = prepare(config, lambda line: None), []
    assert (
        prepare(config, said.append).tokenizer.fingerprint == first.tokenizer.fingerprint
        and said == []
    )
    (path,) = (tmp_path / "cache").rglob("tokenizer.model")
    path.write_bytes(b"rubbish")
    assert prepare(config, said.append).tokenizer.fingerprint == first.tokenizer.fingerprint
    assert said[0].startswith("training again")


def test_changed_text_and_other_tokenizers_get_files_of_their_own(config, folder):
    first = prepare(config, lambda line: None)
    (folder / "train" / "0.txt").write_bytes(b"something else\n" * 9)
    second = prepare(config, lambda line: None)
    assert second.train.path != first.train.path and second.train.n_bytes != first.train.n_bytes


@pytest.mark.parametrize("damage", ["truncate", "extend", "magic", "header", "other", "empty"])
def test_a_damaged_file_is_rebuilt_and_said_so(config, damage):
    path = prepare(config, lambda line: None).train.path
    whole = path.read_bytes()
    other = whole.replace(b'"key": "', b'"key": "0', 1)
    damaged = {
        "truncate": whole[:-8],
        "extend": whole + b"\0",
        "magic": b"X" + whole[1:],
        "header": whole[:8] + b"[" + whole[9:],
        "other": other[:4096] + whole[4096:],
        "empty": b"",
    }[damage]
    path.write_bytes(damaged)
    said = []
    prepare(config, said.append)
    assert path.read_bytes() == whole
    assert len(said) == 2 and said[0].startswith("rebuilding") and str(path) in said[0]


def test_an_error_in_the_middle_leaves_no_file(config, tmp_path, monkeypatch):
    def broken(config, split, skipped):
        yield True, LINES
        raise InputError("stop")

    monkeypatch.setattr(prepare_module, "documents", broken)
    with pytest.raises(InputError, match="stop"):
        prepare(config, lambda line: None)
    assert files_of(tmp_path / "cache", "tokens") == []


def test_a_killed_prepare_leaves_nothing_that_is_trusted(config, tmp_path):
    def killed():
        def read_and_die(config, split, skipped=None):
            yield from documents(config, split, skipped)
            if split == "validation":
                os.kill(os.getpid(), signal.SIGKILL)

        prepare_module.documents = read_and_die
        prepare(config, lambda line: None)

    process = start_child(killed)
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "cache").rglob("*.tokens")] == ["train.tokens"]
    assert files_of(tmp_path / "cache", ".tmp"), "nothing was half written, so nothing was tested"
    corpus = prepare(config, lambda line: None)
    for split in SPLITS:
        assert bytes(getattr(corpus, split).tokens.astype(np.uint8)).decode() == separated_text(
            config, split
        )
    assert not files_of(tmp_path / "cache", ".tmp")


def test_concurrent_prepares_do_not_break_each_other(config, tmp_path):
    pieces = config.model_copy(update={"tokenizer": "sentencepiece", "vocab_size": 330})
    # so that they start at once
    begin = multiprocessing.get_context("fork").Barrier(3)

    def prepared(number):
        begin.wait(timeout=60)
        corpus = prepare(pieces, lambda line: None)
        made = f"{corpus.tokenizer.fingerprint} {int(corpus.train.tokens.astype(np.int64).sum())}"
        (tmp_path / f"made by {number}").write_text(made)

    running = [start_child(functools.partial(prepared, number)) for number in range(3)]
    for process in running:
        process.join(timeout=120)
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert len({(tmp_path / f"made by {number}").read_text() for number in range(3)}) == 1


# Prints by how much preparing the text in the folder raises the most memory that a process had.
PEAK = """
import resource
import sys

from config import Config
from data.prepare import prepare


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


before = peak()
prepare(Config(dataset=sys.argv[1], cache_dir=sys.argv[2]), lambda line: None)
print(peak() - before)
"""


def test_preparing_a_long_text_takes_bounded_memory(tmp_path):
    line = "some words of a line that is neither long nor short, and so on " * 12 + "\n"
    for name in ("train", "validation", "test"):
        (tmp_path / "text" / name).mkdir(parents=True)
        (tmp_path / "text" / name / "a.txt").write_text(line * (40_000 if name == "train" else 10))
    # a process of its own, whose peak is of nothing else
    arguments = [sys.executable, "-c", PEAK, str(tmp_path / "text"), str(tmp_path / "cache")]
    output = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (tmp_path / "text" / "train" / "a.txt").stat().st_size > 30_000_000
    assert int(output.stdout) * unit < 64 << 20


def with_header(whole, **changes):
    """A token file's bytes with other values in its header."""
    header = json.loads(whole[len(FORMAT) : HEADER_BYTES]) | changes
    return (FORMAT + json.dumps(header).encode()).ljust(HEADER_BYTES) + whole[HEADER_BYTES:]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "O"}, {"dtype": "int16"}, {"dtype": ["uint16"]},
        {"tokens": -5}, {"tokens": 1e3}, {"tokens": 10**30}, {"tokens": True},
        {"documents": -1}, {"documents": 0}, {"documents": None}, {"parts": [-1, 156]},
        {"parts": "all"}, {"parts": []},
        {"vocab_size": 90}, {"vocab_size": "256"}, {"sha256": "0"}, {"bytes": "many"},
        {"words": None}, {"scored_bytes": 0.5},
    ],
)  # fmt: skip
def test_a_header_that_no_writer_writes_is_one_clear_error(tmp_path, changes):
    whole = token_file(tmp_path / "t", [100, 55]).path.read_bytes()
    (tmp_path / "t").write_bytes(with_header(whole))
    TokenFile(tmp_path / "t", "key")
    (tmp_path / "t").write_bytes(with_header(whole, **changes))
    with pytest.raises(InputError, match="prepare the data again") as caught:
        TokenFile(tmp_path / "t", "key")
    assert "\n" not in str(caught.value)


@given(st.data())
def test_no_changed_byte_of_a_token_file_goes_unnoticed(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        expected = token_file(path, [40, 15]).tokens.tolist()
        whole = path.read_bytes()
        place = data.draw(st.one_of(st.integers(HEADER_BYTES, len(whole) - 1), st.integers(0, 400)))
        path.write_bytes(
            whole[:place]
            + bytes([whole[place] ^ data.draw(st.integers(1, 255))])
            + whole[place + 1 :]
        )
        try:
            changed = TokenFile(path, "key")
        except InputError as error:
            assert "\n" not in str(error)
        else:
            # in what the header says of words and bytes, or in the padding: the tokens are those
            # that were written
            assert changed.tokens.tolist() == expected and changed.document_starts.tolist() == [
                0,
                40,
            ]


def test_a_header_nested_without_end_is_no_token_file(tmp_path):
    (tmp_path / "t").write_bytes((FORMAT + b"[" * 4000).ljust(HEADER_BYTES))
    with pytest.raises(InputError, match="no token file"):
        TokenFile(tmp_path / "t")


def test_offsets_and_tokens_are_checked_even_where_the_checksum_is_right(tmp_path):
    token_file(tmp_path / "t", [20, 10])
    whole = (tmp_path / "t").read_bytes()
    starts = HEADER_BYTES + 64
    for body in (
        whole[HEADER_BYTES:starts] + np.array([0, 40]).tobytes(),
        whole[HEADER_BYTES:starts] + np.array([5, 20]).tobytes(),
        np.array([256] * 32, np.uint16).tobytes() + whole[starts:],
    ):
        digest = hashlib.sha256(body[:60] + body[64:]).hexdigest()
        (tmp_path / "t").write_bytes(with_header(whole[:HEADER_BYTES] + body, sha256=digest))
        with pytest.raises(InputError, match="prepare the data again"):
            TokenFile(tmp_path / "t", "key")


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_of_one_token_is_an_error_before_any_step(tmp_path, split):
    for name in SPLITS:
        (tmp_path / f"{name}.txt").write_text("x" if name == split else "some text\n" * 9)
    with pytest.raises(InputError, match=f"the {split} split of .* is one token"):
        prepare(
            Config(dataset=str(tmp_path), tokenizer="bytes", cache_dir=str(tmp_path / "cache")),
            lambda line: None,
        )


def test_only_what_the_dead_left_behind_is_removed(config, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = tmp_path / "cache" / "other-0123"
    folder.mkdir(parents=True)
    here = platform.node()
    names = {
        f".train.tokens.{gone.pid}@{here}.tmp": False,
        f".tokenizer.model.{10**30}@{here}.tmp": False,
    }
    names |= {
        f".train.tokens.{os.getppid()}@{here}.tmp": True,
        f".train.tokens.{gone.pid}@elsewhere.tmp": True,
    }
    names |= {".mine.tmp": True, "train.tokens": True}
    for name in names:
        (folder / name).write_text("")
    prepare(config, lambda line: None)
    assert {name for name, stays in names.items() if stays} == {
        path.name for path in folder.iterdir()
    }


# ===== Between documents


@pytest.mark.parametrize("make", [ByteTokenizer, trained])
def test_a_blank_line_ends_every_document_but_the_last(make):
    texts = ["ever after.", "Once\n", "", "upon\n\n", "a\r\n\r\n", "time\n\n\n", "\n", "end"]
    tokenizer, pieces = make(), [(True, text) for text in texts]
    encoded = list(encode_documents(iter(pieces), tokenizer, separate=True))
    assert (
        "".join(text for _, text, _ in encoded)
        == "ever after.\n\nOnce\n\nupon\n\na\r\n\r\ntime\n\n\n\n\nend"
    )
    assert all(tokenizer.decode(ids) == text and first for first, text, ids in encoded)
    assert "".join(text for _, text, _ in encode_documents(iter(pieces), tokenizer)) == "".join(
        texts
    )


def test_an_end_of_text_ends_every_document_but_the_last_where_there_is_one(tmp_path):
    tokenizer = gpt2()
    pieces = [
        (True, "ever"),
        (False, " after."),
        (True, ""),
        (True, "Once upon"),
        (True, " a time"),
    ]
    encoded = list(encode_documents(iter(pieces), tokenizer, separate=True))
    assert [ids for _, text, ids in encoded if not text] == [[50256], [50256]]
    assert [text for _, text, _ in encoded] == ["ever after.", "", "Once upon", "", " a time"]
    write_token_file(tmp_path / "t", [iter(pieces)], tokenizer, "key", [True])
    file = TokenFile(tmp_path / "t")
    assert (file.n_bytes, file.n_words, file.scored_bytes, file.scored_words) == (27, 6, 23, 5)
    assert text_bytes(tokenizer, file.tokens.tolist()) == 27
    assert file.tokens[file.document_starts[1:] - 1].tolist() == [50256, 50256]


def test_a_sentencepiece_with_an_end_of_text_uses_it():
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([LINES * 50]), model_writer=model, vocab_size=330, model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        minloglevel=2,
        allow_whitespace_only_pieces=True, user_defined_symbols=["\n"],
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer(model.getvalue())
    encoded = list(encode_documents(iter([(True, "a"), (True, "b")]), tokenizer, separate=True))
    assert (
        encoded[1] == (False, "", [tokenizer.end_of_text])
        and tokenizer.decode_bytes([tokenizer.end_of_text]) == b""
    )
    assert trained().end_of_text is None


def test_one_document_and_wikitext_are_left_as_they_are(hub, tmp_path):
    rows = [" = One = \n", " a . \n", "", " = Two = \n", " b \n"]
    wikitext = Config(
        dataset="wikitext-103",
        dataset_path=hub(train=rows, validation=rows, test=rows),
        tokenizer="bytes",
    )
    other = wikitext.model_copy(update={"dataset": "tinystories"})
    (tmp_path / "one").mkdir()
    for name in SPLITS:
        (tmp_path / "one" / f"{name}.txt").write_text("no line end")
    one = Config(dataset=str(tmp_path / "one"), tokenizer="bytes")
    texts = []
    for config in (wikitext, other, one):
        prepared = prepare(
            config.model_copy(update={"cache_dir": str(tmp_path / "cache")}), lambda line: None
        )
        texts.append((bytes(prepared.test.tokens.tolist()).decode(), prepared.separator))
    assert texts[0] == (" = One = \n a . \n \n = Two = \n b \n", "nothing")
    assert texts[1] == (" = One = \n\n a . \n\n = Two = \n\n b \n", "a blank line")
    assert texts[2] == ("no line end", "a blank line")


# ===== What is scored


@pytest.mark.parametrize("make", [ByteTokenizer, trained, gpt2])
@given(text=st.text("ab é\n中\u3000", min_size=1, max_size=12))
def test_the_first_token_is_in_no_count_of_what_is_scored(make, text):
    tokenizer = cached_tokenizer(make)
    with tempfile.TemporaryDirectory() as folder:
        write_token_file(Path(folder) / "t", [iter([(True, text)])], tokenizer, "key")
        file = TokenFile(Path(folder) / "t")
        rest = tokenizer.decode_bytes(file.tokens[1:].tolist())
        assert file.scored_bytes == len(rest) == text_bytes(tokenizer, file.tokens[1:].tolist())
        assert file.scored_words == encoding.word_count(rest.decode("utf-8", errors="replace"))


@functools.cache
def cached_tokenizer(make):
    return make()


# ===== What a run was trained on


@pytest.fixture
def begun(config, tmp_path):
    """A run with a SentencePiece of its own text: its config and folder."""
    config = config.model_copy(update={"tokenizer": "sentencepiece", "vocab_size": 330})
    (tmp_path / "run").mkdir()
    run_corpus(config, tmp_path / "run", False, lambda line: None)
    return config, tmp_path / "run"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_goes_on_with_its_text_wherever_the_clock_the_cache_and_the_folder_are(
    begun, folder, tmp_path, monkeypatch
):
    config, run = begun
    before = contents(run)
    first = run_corpus(config, run, True, lambda line: None)
    for path in folder.rglob("*.txt"):
        os.utime(path, (1, 1))
    shutil.rmtree(config.cache_dir)
    moved = folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    again = run_corpus(
        config.model_copy(update={"dataset": moved.name}), run, True, lambda line: None
    )
    assert contents(run) == before and again.train.digest == first.train.digest


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_run_whose_text_was_edited_does_not_go_on_and_is_left_alone(begun, folder, split):
    config, run = begun
    before = contents(run)
    path = folder / split / "0.txt"
    path.write_bytes(path.read_bytes().replace(b"second", b"SECOND"))
    name = "validation" if split == "valid" else split
    with pytest.raises(
        InputError, match=rf"resume: .*{name} has [\d,]+ bytes, but others"
    ) as caught:
        run_corpus(config, run, True, lambda line: None)
    assert "\n" not in str(caught.value) and contents(run) == before
    path.write_bytes(path.read_bytes() + b"more\n")
    with pytest.raises(
        InputError,
        match=rf"{name} has [\d,]+ bytes, and had [\d,]+; it is from .* bytes\), and was from",
    ):
        run_corpus(config, run, True, lambda line: None)


def test_a_run_whose_tokenizer_is_another_or_gone_does_not_go_on(begun, config):
    own, run = begun
    ByteTokenizer().save(run)
    with pytest.raises(
        InputError, match="resume: .*the tokenizer is not the one that it began with"
    ):
        run_corpus(own, run, True, lambda line: None)
    (run / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has lost its tokenizer"):
        run_corpus(own, run, True, lambda line: None)


def test_a_runs_own_tokenizer_encodes_whatever_another_training_would_give(
    begun, folder, tmp_path, monkeypatch
):
    config, run = begun
    shutil.rmtree(config.cache_dir)
    monkeypatch.setattr(
        prepare_module, "make_tokenizer", lambda *_: pytest.fail("a tokenizer was made")
    )
    own = load_tokenizer(run)
    assert run_corpus(config, run, True, lambda line: None).tokenizer.fingerprint == own.fingerprint
    (folder / "test" / "0.txt").write_text("An edited test text.\n" * 5)
    file = prepare_split(config, "test", own, lambda line: None)
    assert own.decode(file.tokens.tolist()) == "An edited test text.\n" * 5


def test_a_run_of_before_digests_goes_on_without_separators_and_is_bound_from_then_on(
    begun, folder, config
):
    own, run = begun
    (run / "data.json").unlink()
    said = []
    corpus = run_corpus(own, run, True, said.append)
    assert corpus.separator == "nothing" and "nothing tells" in said[-1]
    assert corpus.tokenizer.decode(corpus.train.tokens.tolist()) == text_of(own, "train")
    run_corpus(own, run, True, lambda line: None)
    (folder / "test" / "0.txt").write_text("edited\n")
    with pytest.raises(InputError, match="test has 7 bytes"):
        run_corpus(own, run, True, lambda line: None)


@pytest.mark.parametrize(
    "damage", ["{", "[]", "{}", '{"splits": {"train": 1}}', '{"splits": null, "separated": true}']
)
def test_a_damaged_data_file_is_one_line_that_names_it(begun, damage):
    config, run = begun
    (run / "data.json").write_text(damage)
    with pytest.raises(InputError, match=r"data\.json") as caught:
        run_corpus(config, run, True, lambda line: None)
    assert "\n" not in str(caught.value)


def test_paths_of_a_located_config_mean_the_same_from_anywhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(
        dataset="text",
        dataset_mix={"./text/train": 1.0, "pydoc": 1.0, "wikitext-2": 1.0},
        tokenizer="some.model",
    )
    (tmp_path / "some.model").write_bytes(b"")
    (tmp_path / "wikitext-2").mkdir()  # a data set's name is not a path, whatever lies there
    found = corpus.located(config)
    assert (found.dataset, found.tokenizer) == (str(folder), str(tmp_path / "some.model"))
    assert [name for name, _ in found.dataset_mix] == [str(folder / "train"), "pydoc", "wikitext-2"]
    assert corpus.located(Config(dataset="pg19", dataset_path="text")).dataset_path == str(folder)
    assert corpus.located(Config(dataset="owner/name")).dataset == "owner/name"


def test_an_unwritable_cache_is_one_clear_error(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cache_dir: cannot make"):
        prepare(config.model_copy(update={"cache_dir": str(tmp_path / "file")}))


def test_the_evaluation_slice_is_the_first_tokens(tmp_path):
    file = token_file(tmp_path / "t", [100])
    assert torch.equal(evaluation_slice(file, 10), torch.arange(10))
    assert (
        evaluation_slice(file, 1000).shape == (100,)
        and evaluation_slice(file, 10).dtype == torch.int64
    )


# ===== Training order


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 65, 1000, 4097])
def test_the_permutation_is_one_and_differs_by_seed_and_epoch(n):
    orders = [permuted(np.arange(n), n, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(n))
    if n >= 10:
        assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
        assert permuted(np.array([n // 2]), n, 0, 1)[0] == orders[1][n // 2]


def test_the_permutation_leaves_no_trace_of_the_order():
    n, trials = 50, 2000
    # (trials, n)
    first = np.array([permuted(np.arange(n), n, seed, 0) for seed in range(trials)])
    # where an index goes is uniform: chi² with 49 degrees of freedom, p = 1e-4 at 94
    for column in (0, 7, 49):
        counts = np.bincount(first[:, column], minlength=n)
        assert ((counts - trials / n) ** 2 / (trials / n)).sum() < 94
    assert abs(np.mean([np.corrcoef(row, np.arange(n))[0, 1] for row in first])) < 0.02
    assert abs((np.diff(first, axis=1) > 0).mean() - 0.5) < 0.02


def test_each_epoch_reads_every_window_once(tmp_path):
    windows = Windows(token_file(tmp_path / "t", [1000, 43]), 16, 7, seed=3)
    assert windows.n_windows == 1042 // 16 == 65 and windows.steps_per_epoch == 65 / 7
    starts = np.concatenate([windows.starts(step) for step in range(65)])  # 7 epochs of 65 windows
    for epoch, read in enumerate(starts.reshape(7, 65)):
        read = np.sort(read)
        assert read[0] < 16 and read[-1] + 16 < 1043
        assert (np.diff(read)[:-1] == 16).all() and 0 < read[-1] - read[-2] <= 16
        if epoch == 0:
            assert read[0] == 0 and (np.diff(read) == 16).all()


@pytest.mark.parametrize("order", [Windows, Lanes])
def test_a_batch_is_a_function_of_seed_and_step_alone(order, tmp_path):
    file = token_file(tmp_path / "t", [300, 20, 500, 90, 7])
    one, other = order(file, 8, 5, seed=1), order(file, 8, 5, seed=1)
    expected = [one.batch(step) for step in range(50)]
    for step in random.Random(0).sample(range(50), 50):
        for left, right in zip(expected[step], other.batch(step), strict=True):
            assert torch.equal(left, right)
    changed = order(file, 8, 5, seed=2)
    assert any(not torch.equal(expected[step][0], changed.batch(step)[0]) for step in range(3))


@pytest.mark.parametrize("order", [Windows, Lanes])
def test_targets_are_the_next_tokens_and_rows_are_parts_of_the_batch(order, tmp_path):
    windows = order(token_file(tmp_path / "t", [300, 200]), 8, 6, seed=1)
    for step in (0, 5, 30):
        batch = windows.batch(step)
        ids, targets = batch[:2]
        assert ids.shape == targets.shape == (6, 8) and ids.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, (ids + 1) % 128)
        for rows in (slice(0, 2), slice(2, 6), slice(1, None, 2)):
            for whole, part in zip(batch, windows.batch(step, rows=rows), strict=True):
                assert torch.equal(whole[rows], part)


def blend(tmp_path, weights=(1.0, 0.5), sizes=(16_000, 4_000), batch=16):
    """Windows of 15 tokens from parts whose bytes are 0, 1, …."""
    parts = [iter([(True, chr(index) * size)]) for index, size in enumerate(sizes)]
    write_token_file(tmp_path / "t", parts, ByteTokenizer(), "key")
    return Blend(TokenFile(tmp_path / "t", "key"), weights, 15, batch, seed=5)


def test_a_blend_draws_its_parts_in_their_shares(tmp_path):
    order = blend(tmp_path, weights=(1.0, 0.5, 0.5), sizes=(900, 400, 2_000))
    drawn = np.concatenate([order.batch(step)[0].numpy() for step in range(125)])  # two cycles
    assert (drawn == drawn[:, :1]).all(), "a window crosses two parts"
    assert np.bincount(drawn[:, 0]).tolist() == order.counts(2000) == [1000, 500, 500]
    for n in (8, 100, 777):
        assert (
            np.abs(np.bincount(drawn[:n, 0], minlength=3) - n * np.array([0.5, 0.25, 0.25])).max()
            <= 1
        )


@pytest.mark.parametrize("weight", [0.0005, 0.3, 1.0, 2000.0])
def test_no_weight_is_rounded_away(tmp_path, weight):
    order = blend(tmp_path, weights=(1.0, weight), batch=1000)
    drawn = np.concatenate([order.starts(step) for step in range(10)]) >= 16_000
    assert abs(drawn.sum() - 10_000 * weight / (1 + weight)) <= 0.5
    assert order.counts(10_000) == [10_000 - drawn.sum(), drawn.sum()] and 0 < drawn.sum() < 10_000


def test_a_share_without_a_window_in_the_whole_run_is_an_error(config, folder, tmp_path):
    (tmp_path / "other.txt").write_text("Other text.\n" * 400)
    mix = ((str(tmp_path / "other.txt"), 0.0005),)
    config = config.model_copy(update={"dataset_mix": mix, "max_steps": 400, "epochs": 1e4})
    corpus = prepare(config, lambda line: None)
    with pytest.raises(
        InputError, match=r"dataset_mix: of the run's 800 windows none would be of .*other\.txt"
    ):
        training_order(corpus, config, 2)
    training_order(corpus, config.model_copy(update={"max_steps": 2000}), 2)


def test_a_blend_reads_each_part_without_replacement(tmp_path):
    order = blend(tmp_path)
    starts = np.concatenate([order.starts(step) for step in range(round(order.steps_per_epoch))])
    large, small = starts[starts < 16_000], starts[starts >= 16_000]
    assert len(np.unique(large)) == len(large)
    first_epoch = small[: order.parts[1].n_windows]
    assert np.array_equal(np.sort(first_epoch), 16_000 + 15 * np.arange(order.parts[1].n_windows))


def test_a_blend_is_a_function_of_seed_and_step_alone(tmp_path):
    order, again = blend(tmp_path), blend(tmp_path)
    for step in (200, 3, 61, 62):
        assert np.array_equal(order.starts(step), again.starts(step))
        assert np.array_equal(order.starts(step)[4:9], again.starts(step, slice(4, 9)))


def test_lanes_go_on_where_they_ended_unless_fresh_and_never_cross_a_document(tmp_path):
    lengths = [300, 20, 5, 500, 90, 8, 9, 17]
    file = token_file(tmp_path / "t", lengths)
    lanes = Lanes(file, 8, 4, seed=0)
    per_document = [(length - 1) // 8 for length in lengths]
    assert lanes.n_windows == sum(per_document) and lanes.steps_per_epoch == sum(per_document) // 4
    edges = np.append(file.document_starts, len(file))
    firsts = set(file.document_starts.tolist())
    for epoch in range(3):
        seen, last = [], None
        for turn in range(lanes.lane_length):
            starts, fresh = lanes.starts(epoch * lanes.lane_length + turn)
            document = np.searchsorted(edges, starts, side="right") - 1
            # the last target is still in the document
            assert (starts + 8 < edges[document + 1]).all()
            for row in range(4):
                if turn == 0 or starts[row] in firsts:
                    assert fresh[row]
                else:
                    assert not fresh[row] and starts[row] == last[row] + 8
            last = starts
            seen += starts.tolist()
        assert len(set(seen)) == len(seen) > lanes.n_windows - 4


def test_one_long_document_fills_all_lanes(tmp_path):
    lanes = Lanes(token_file(tmp_path / "t", [10_000]), 8, 4, seed=0)
    assert lanes.starts(0)[0].tolist() == [lane * lanes.lane_length * 8 for lane in range(4)]
    assert lanes.starts(0)[1].all() and not lanes.starts(1)[1].any()


def test_a_text_too_short_for_a_block_names_block_size_and_its_tokens(tmp_path):
    file = token_file(tmp_path / "t", [20, 12])
    Windows(file, 31, 4, 0)
    with pytest.raises(
        InputError, match="block_size: a window needs 33 tokens, but the training text has 32"
    ):
        Windows(file, 32, 4, 0)
    with pytest.raises(
        InputError, match="block_size: the documents' 32 tokens make 1 windows of 17"
    ):
        Lanes(file, 16, 2, 0)


def test_a_batch_of_a_long_text_is_quick_to_find(tmp_path):
    windows = Windows(token_file(tmp_path / "t", [2_000_000]), 64, 32, seed=0)
    started = time.perf_counter()
    for step in range(100):
        windows.batch(step * 31)
    assert time.perf_counter() - started < 3
