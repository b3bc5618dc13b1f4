"""Files of text of every kind: what is read of them, what is skipped, and how a broken one is
named."""

import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from common.command import InputError
from config import Config
from data import corpus, readers
from data.corpus import SPLITS, Skipped, documents, source_fingerprint
from data.prepare import prepare, read_tokens
from data.readers import kind_of, read_rows, read_text, row_count, text_size
from data.tokenizer import ByteTokenizer

TEXT = "Äpfel 中 𝄞\r\n\n\ttabbed line\n" * 40  # of 31 bytes each


def pack(name: str, data: bytes) -> bytes:
    """`data` as a file of this name holds it."""
    suffix = Path(name).suffix
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".xz":
        return lzma.compress(data)
    if suffix == ".zst":
        return pyarrow.compress(data, codec="zstd", asbytes=True) if data else b""
    return data


def write_rows(path: Path, texts: list, column: str = "text") -> Path:
    """A file whose rows have these texts, of the kind that its name says."""
    if kind_of(path) == readers.TABLE:
        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(texts)), column: texts}), path)
    else:
        lines = [json.dumps({"n": n, column: text}) + "\n" for n, text in enumerate(texts)]
        path.write_bytes(pack(path.name, "".join(lines).encode()))
    return path


def config_of(path: Path, **values) -> Config:
    return Config(dataset=str(path), tokenizer="bytes", **values)


def texts_of(path: Path, split: str, **values) -> list[str]:
    return [text for _, text in documents(config_of(path, **values), split)]


PACKED = ["a.txt", "a.txt.gz", "A.TXT.XZ", "a.txt.zst"]
ROWS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"]

# ===== What is read


@pytest.mark.parametrize("name", PACKED)
def test_packed_text_is_read_as_plain_text_is(name, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READ_BYTES", 7)
    path = tmp_path / name
    data = TEXT.encode()
    path.write_bytes(pack(name.lower(), data))
    assert "".join(read_text(path)) == TEXT
    assert text_size(path) == len(data)
    assert "".join(read_text(path, 31, 62)).encode() == data[31:62]
    plain = tmp_path / "plain.txt"
    plain.write_bytes(data)
    for split in SPLITS:
        assert "".join(texts_of(path, split)) == "".join(texts_of(plain, split))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.txt.zst"])
def test_several_packed_parts_in_a_row_are_one_text(name, tmp_path):
    (tmp_path / name).write_bytes(pack(name, b"one\n") + pack(name, b"two\n"))
    assert "".join(read_text(tmp_path / name)) == "one\ntwo\n"


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_documents_and_their_splits_are_whole(name, tmp_path):
    texts = [f"row {n}\n\nwith 中 lines" for n in range(40)]
    path = write_rows(tmp_path / name, texts)
    assert row_count(path) == 40
    parts = [list(documents(config_of(path), split)) for split in SPLITS]
    assert [len(part) for part in parts] == [36, 2, 2]
    assert [text for part in parts for _, text in part] == texts
    assert all(starts for part in parts for starts, _ in part)


@pytest.mark.parametrize("rows", range(3, 12))
def test_few_rows_still_give_each_split_one(rows, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [str(n) for n in range(rows)])
    parts = [texts_of(path, split) for split in SPLITS]
    assert all(parts) and [int(text) for part in parts for text in part] == list(range(rows))


@pytest.mark.parametrize("rows", [1, 2])
def test_too_few_rows_for_a_split_are_an_error_that_says_so(rows, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["a"] * rows)
    with pytest.raises(InputError, match=r"a\.jsonl: too few rows for a \w+ split"):
        for split in SPLITS:
            texts_of(path, split)


@pytest.mark.parametrize("name", ROWS)
def test_null_and_empty_rows_are_left_out_and_counted(name, tmp_path):
    texts = [f"text {n}" for n in range(8)]
    path = write_rows(tmp_path / name, [texts[0], None, "", texts[1], None, *texts[2:]])
    skipped = Skipped()
    read = [text for split in SPLITS for _, text in documents(config_of(path), split, skipped)]
    assert read == texts and skipped.rows == 3
    said = []
    prepare(config_of(path, cache_dir=str(tmp_path / "cache")), said.append)
    assert said[0].startswith("train: 6 documents (3 null or empty rows left out), ")
    text = read_tokens(str(path), config_of(path), ByteTokenizer(), said.append)
    assert said[-1] == "note: 3 null or empty rows left out"
    assert bytes(text.tokens.tolist()).decode() == "\n\n".join(texts)
    assert text.separator == "a blank line"


def test_null_rows_of_a_data_set_in_the_hubs_layout_are_left_out_too(tmp_path):
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.parquet", ["one", None, "", "two"])
    skipped = Skipped()
    config = config_of(tmp_path)
    assert [text for _, text in documents(config, "train", skipped)] == ["one", "two"]
    assert skipped.rows == 2


def test_blank_lines_among_rows_are_empty_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n  \n{"text": "b"}')
    assert list(read_rows(tmp_path / "a.jsonl", "text")) == ["a", "", "", "b"]
    assert row_count(tmp_path / "a.jsonl") == 4


@pytest.mark.parametrize("name", ROWS)
def test_the_text_is_in_the_column_that_is_named(name, tmp_path):
    path = write_rows(tmp_path / name, ["a", "b", "c"], column="content")
    assert texts_of(path, "test", text_column="content") == ["c"]
    with pytest.raises(InputError, match=r"text_column.*content"):
        texts_of(path, "test")


def test_rows_of_several_row_groups_are_read_from_any_row(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [str(n) for n in range(100)]})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    assert list(read_rows(path, "text", 20, 50)) == [str(n) for n in range(20, 50)]


def mixture(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("line\n" * 100)
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"packed\n" * 100))
    write_rows(folder / "c.jsonl", [f"json {n}" for n in range(20)])
    write_rows(folder / "d.parquet", [f"table {n}" for n in range(20)])
    return folder


def test_a_folder_of_a_mixture_is_read_whole_and_split_once(tmp_path):
    folder = mixture(tmp_path / "mixed")
    read = "\n".join(text for split in SPLITS for text in texts_of(folder, split))
    for word, count in (("line", 100), ("packed", 100), ("json", 20), ("table", 20)):
        assert read.count(word) == count
    assert corpus.unread(config_of(folder)) == ""


def test_splits_of_a_folder_may_be_mixtures_or_files_of_any_kind(tmp_path):
    root = tmp_path / "given"
    mixture(root / "train")
    write_rows(root / "valid.jsonl.zst", ["v"])
    write_rows(root / "test.parquet", ["t"])
    assert texts_of(root, "validation") == ["v"] and texts_of(root, "test") == ["t"]
    assert "".join(texts_of(root, "train")).count("table") == 20
    assert not corpus.is_hub_layout(root)


def test_a_license_beside_the_tables_of_a_data_set_leaves_it_one(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [split])
    (tmp_path / "LICENSE.txt").write_text("Do as you like.\n")
    assert corpus.is_hub_layout(tmp_path)
    assert corpus.unread(config_of(tmp_path)).endswith("are not read: 1 .txt")


def test_the_column_counts_for_the_cache_where_there_are_rows_only(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    path = write_rows(tmp_path / "a.jsonl", ["a"])
    prints = [source_fingerprint(config_of(path, text_column=name)) for name in ("text", "body")]
    assert prints[0] != prints[1]
    prints = [
        source_fingerprint(config_of(tmp_path / "a.txt", text_column=name))
        for name in ("text", "body")
    ]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("name", [*PACKED, *ROWS])
def test_evaluation_reads_what_training_reads(name, tmp_path):
    if name in ROWS:
        path = write_rows(tmp_path / name, ["one", "two"])
    else:
        path = tmp_path / name
        path.write_bytes(pack(name.lower(), b"one\n\ntwo"))
    for data in (path, tmp_path):  # a folder too
        text = read_tokens(str(data), config_of(path), ByteTokenizer(), print)
        assert bytes(text.tokens.tolist()) == b"one\n\ntwo"
        assert (text.size, text.words) == (7, 4)
    verbatim = read_tokens(str(path), config_of(path), ByteTokenizer(), print, protocol="verbatim")
    assert bytes(verbatim.tokens.tolist()) == (b"onetwo" if name in ROWS else b"one\n\ntwo")
    assert verbatim.separator == "nothing"


# ===== What is refused


def error_of(path: Path, **values) -> str:
    with pytest.raises(InputError) as caught:
        for split in SPLITS:
            texts_of(path, split, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_broken_row_is_named_by_file_and_row(tmp_path):
    good = b'{"text": "a"}\n'
    for row, reason in {
        b'{"text": "a"\n': "not JSON: ",
        b'["a"]\n': "is no JSON object",
        b'{"txt": "a", "b": 1}\n': "has no key text (text_column); its keys are b, txt",
        b'{"text": 3}\n': "text_column text holds int",
        b'{"text": "\xe9"}\n': "not UTF-8",
        b'{"text": "\\ud800"}\n': "holds half a surrogate pair",
        b'{"text": ' + b"[" * 100_000 + b"\n": "nested too deep",
    }.items():
        for name in ("a.jsonl", "a.jsonl.gz"):
            path = tmp_path / name
            path.write_bytes(pack(name, good * 5 + row + good * 5))
            line = error_of(path)
            assert line.startswith(f"{path}: row 6: ") and reason in line


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_a_packed_file_cut_short_is_named_with_the_place(name, packing, tmp_path):
    rows = b"".join(b'{"text": "%s"}\n' % os.urandom(20).hex().encode() for _ in range(5000))
    path = tmp_path / (name + packing)
    path.write_bytes(pack(path.name, rows)[:-40])
    line = error_of(path)
    assert line.startswith(f"{path}: cannot be read after {'row' if 'json' in name else 'byte'} ")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.xz", "a.txt.zst", "a.parquet"])
def test_what_is_not_what_its_name_says_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"this is something else altogether\n" * 9)
    assert error_of(tmp_path / name).startswith(f"{tmp_path / name}: cannot be read ")


def damaged_table(path: Path) -> Path:
    table = pyarrow.table({"text": [os.urandom(50).hex() for _ in range(2000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=500, use_dictionary=False)
    whole = bytearray(path.read_bytes())
    middle = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    whole[middle : middle + 40] = b"\xff" * 40  # the head of a page
    path.write_bytes(whole)
    return path


def test_a_damaged_table_is_named_with_the_row(tmp_path):
    path = damaged_table(tmp_path / "a.parquet")
    assert error_of(path).startswith(f"{path}: cannot be read after row 1000 (")


def test_a_damaged_table_of_a_data_set_is_named_too(tmp_path):
    path = damaged_table(tmp_path / "train-00000-of-00001.parquet")
    assert error_of(tmp_path).startswith(f"{path}: cannot be read after row 1000 (")


def test_a_column_of_numbers_is_no_text(tmp_path):
    path = write_rows(tmp_path / "a.parquet", ["a", "b", "c"])
    assert error_of(path, text_column="n").startswith(f"{path}: row 1: text_column n holds int")


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    for name in ("pipe", "pipe.txt", "pipe.jsonl.gz"):
        os.mkfifo(tmp_path / name)
        assert error_of(tmp_path / name) == f"{tmp_path / name}: is a FIFO; give a file"
        with pytest.raises(InputError, match="is a FIFO; give a file"):
            read_tokens(str(tmp_path / name), Config(), ByteTokenizer(), print)
    assert error_of(Path("/dev/zero")) == "/dev/zero: is a device; give a file"


def test_a_pipe_among_the_tables_of_a_data_set_is_refused(tmp_path):
    write_rows(tmp_path / "train.parquet", ["a"])
    os.mkfifo(tmp_path / "test.parquet")
    assert error_of(tmp_path).endswith("test.parquet: is a FIFO; give a file")


def test_a_file_that_is_not_there_is_no_name_of_a_data_set():
    for name in ("a.jsonl", "a.txt.gz", "some/a.parquet"):
        with pytest.raises(InputError, match=f"there is nothing at {name}"):
            list(documents(Config(dataset=name), "train"))
