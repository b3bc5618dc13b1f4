"""Encoding by several processes: the same bytes as by one, in bounded memory, and nothing left
behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers import ROOT

from common.command import InputError
from data import encoding
from data.encoding import Encoders, Piece, all_encoded, batches, cut_documents, encode_batch
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from data.tokens import TokenFile, write_token_file

LINE = "Some words of a line, été 中 ▁, that is\tneither long nor short.\r\n"


def tale() -> list[tuple[bool, str]]:
    """A long document in pieces, short ones, empty ones and one without any place to cut."""
    pieces = [(n == 0, LINE * 50) for n in range(40)]
    pieces += [(True, LINE * (n % 4)) for n in range(300)]
    return [*pieces, (True, "x" * 9000), (True, "end")]


@pytest.fixture
def small(monkeypatch):
    """Processes are started for a text of kilobytes."""
    monkeypatch.setattr(encoding, "ENCODE_CHARACTERS", 4096)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 4096)
    monkeypatch.setattr(encoding, "ALONE_CHARACTERS", 20_000)


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_sentencepiece(iter([LINE * 200]), 330))


class Ending(ByteTokenizer):
    """Bytes, and an end of text."""

    vocab_size = 257
    end_of_text = 256

    def decode_bytes(self, ids):
        return bytes(token for token in ids if token < 256)


def test_the_file_is_the_same_by_one_process_and_by_several(small, trained, tmp_path):
    """Of all kinds of tokenizers that are there without a network."""
    for tokenizer in (trained, ByteTokenizer()):
        for processes in (1, 2):
            parts = [iter(tale()), iter(tale()[::-1])]
            path = tmp_path / str(processes)
            write_token_file(path, parts, tokenizer, "key", [True, False], processes)
        assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert TokenFile(tmp_path / "1").parts[0] > TokenFile(tmp_path / "1").parts[1]


def test_processes_are_started_only_where_there_is_text_for_them():
    with Encoders(ByteTokenizer(), np.dtype(np.uint16), 2) as encoders:
        list(encoders.in_order(batches(cut_documents(iter(tale()), False, None))))
        assert encoders.pool is None


def test_only_so_much_is_read_ahead(small, monkeypatch):
    """Whatever the text's length: memory is bounded."""
    read = []

    def made():
        for n in range(100):
            read.append(n)
            yield [Piece(True, "a" * 4096, False)]

    monkeypatch.setattr(encoding, "ALONE_CHARACTERS", 0)
    with Encoders(ByteTokenizer(), np.dtype(np.uint16), 2) as encoders:
        for done, _ in enumerate(encoders.in_order(made())):
            assert len(read) - done <= 2 * encoding.AHEAD + 1


def test_an_end_of_text_follows_the_documents_it_ends():
    pieces = [Piece(True, "ab", True), Piece(True, "c", False)]
    encoded = encode_batch(pieces, Ending(), np.dtype(np.uint16))
    assert encoded.ids.tolist() == [97, 98, 256, 99] and encoded.tokens == [3, 1]
    ids, documents, size, words = all_encoded(iter([(True, "ab"), (True, "c")]), Ending(), True)
    assert ids.tolist() == [97, 98, 256, 99] and (documents, size, words) == (2, 2, 2)


@pytest.mark.parametrize("noticed", [False, True])
def test_a_process_that_is_killed_is_an_error_in_one_line(small, monkeypatch, noticed):
    """Whether it is noticed while a result is waited for, or when the next batch is handed in."""
    monkeypatch.setattr(encoding, "ALONE_CHARACTERS", 0)
    with Encoders(ByteTokenizer(), np.dtype(np.uint16), 1) as encoders:
        encoders.processes = 2
        results = encoders.in_order(batches(iter([Piece(True, "a" * 5000, False)] * 50)))
        next(results)
        processes = list(encoders.pool._processes.values())

        def kill():
            for process in processes:
                os.kill(process.pid, signal.SIGKILL)

        if noticed:
            kill()
            while not encoders.pool._broken:
                time.sleep(0.01)
        else:
            for process in processes:
                os.kill(process.pid, signal.SIGSTOP)  # what is handed in now is never done
            threading.Timer(0.3, kill).start()
        with pytest.raises(InputError, match="was ended from outside"):
            list(results)


def test_processes_end_with_the_one_that_started_them_and_import_no_torch(tmp_path):
    script = (
        "import numpy as np, time\n"
        "from data import encoding\n"
        "from data.encoding import *\n"
        "from data.tokenizer import ByteTokenizer\n"
        "encoding.ALONE_CHARACTERS = 0\n"
        "with Encoders(ByteTokenizer(), np.dtype(np.uint16), 2) as encoders:\n"
        "    made = ([Piece(True, 'a' * 5000, False)] for _ in range(10))\n"
        "    for _ in encoders.in_order(made): pass\n"
        "    print(*[p.pid for p in encoders.pool._processes.values()], flush=True)\n"
        "    time.sleep(60)\n"
    )
    # A file, as a command is. What imports it, as processes do by themselves, does all this again.
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    workers = [int(word) for word in process.stdout.readline().split()]
    assert workers
    for worker in workers:
        with open(f"/proc/{worker}/maps") as maps:
            assert "libtorch" not in maps.read()
    process.kill()
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.05)
