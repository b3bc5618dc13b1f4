"""Files of text: which kinds there are, their text in pieces and their rows one by one.

    .txt      plain text in UTF-8, one document
    .jsonl    a JSON object a line, whose key `text_column` is the text: each row a document
    .parquet  a table, whose column `text_column` is the text: each row a document

.txt and .jsonl may be packed: .gz, .xz or .zst follows the name. What is broken is an `InputError`
that names the file and the row, or the byte, at which it breaks."""

import codecs
import contextlib
import functools
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.command import InputError, first_line
from common.files import check_regular, parse_json

TEXT, LINES, TABLE = ".txt", ".jsonl", ".parquet"
PACKINGS = (".gz", ".xz", ".zst")
ADVICE = (
    "text is read from .txt, .jsonl and .parquet files, .txt and .jsonl also with .gz, .xz, .zst"
)
READ_BYTES = 1 << 20
ROWS_AT_A_TIME = 256  # of a table: bounds memory where rows are whole books
# What the readers of packed files raise for damage. pyarrow's errors are of the last two kinds.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError)

# ===== Kinds


def kind_of(path: Path) -> str | None:
    """TEXT, LINES or TABLE, packed or not; None for a file of any other kind."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last in PACKINGS:
        return before if before in (TEXT, LINES) else None
    return last if last in (TEXT, LINES, TABLE) else None


def has_rows(path: Path) -> bool:
    """Whether the documents of `path` are its rows."""
    return kind_of(path) in (LINES, TABLE)


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in PACKINGS


def bare_name(path: Path) -> str:
    """The name without what tells the kind: "train" of train.jsonl.gz."""
    return Path(path.stem).stem if is_packed(path) else path.stem


def names_a_file(name: str) -> bool:
    """Whether `name` is that of a file which would be read, if it were there."""
    return kind_of(Path(name)) is not None


def check_readable(path: Path) -> None:
    """Raises `InputError` where `path` is no regular file, or of no kind that is read: markup would
    be taken for text."""
    check_regular(path)
    if kind_of(path) is None:
        kind = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
        raise InputError(f"{path}: {kind} is of an unknown kind; {ADVICE}")


# ===== Bytes


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked, to be read from the start on."""
    packing = path.suffix.lower()
    if packing == ".gz":
        with gzip.open(path, "rb") as file:
            yield file
    elif packing == ".xz":
        with lzma.open(path, "rb") as file:
            yield file
    elif packing == ".zst":
        import pyarrow  # comes with `datasets`; half a second to import, and only needed here

        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            yield io.BufferedReader(stream, READ_BYTES)
    else:
        with open(path, "rb") as file:
            yield file


def skip_bytes(file: BinaryIO, count: int) -> None:
    """Goes on by `count` bytes, or to the end. A packed file is read for that, in bounded
    memory."""
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        file.seek(count, io.SEEK_CUR)
        return
    while count > 0 and (data := file.read(min(count, READ_BYTES))):
        count -= len(data)


def broken(path: Path, place: str, error: BaseException) -> InputError:
    """The error that says where a file cannot be read on, and why."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return InputError(f"{path}: cannot be read {place} ({reason}); give a whole file")


@functools.lru_cache(maxsize=4096)
def _measured(path: Path, rows: bool, _version: tuple[int, int]) -> int:
    """The unpacked bytes or the lines of a file, by reading all of it."""
    size = lines = 0
    last = b"\n"
    try:
        with open_bytes(path) as file:
            while data := file.read(READ_BYTES):
                size += len(data)
                lines += data.count(b"\n")
                last = data[-1:]
    except InputError:
        raise
    except DAMAGE as error:
        place = f"after row {lines}" if rows else f"after byte {size} of its text"
        raise broken(path, place, error) from None
    return lines + (last != b"\n") if rows else size


def _measure(path: Path, rows: bool) -> int:
    status = path.stat()
    # kept by size and time: each split asks for it
    return _measured(path.absolute(), rows, (status.st_size, status.st_mtime_ns))


def text_size(path: Path) -> int:
    """The bytes of a file's text. A packed file is read for that, once."""
    return _measure(path, rows=False) if is_packed(path) else path.stat().st_size


def line_end(path: Path, position: int) -> int | None:
    """The first place after a line end at or after byte `position` of a file's text; None where
    none follows."""
    try:
        with open_bytes(path) as file:
            skip_bytes(file, position)
            while data := file.read(READ_BYTES):
                if (found := data.find(b"\n")) >= 0:
                    return position + found + 1
                position += len(data)
    except DAMAGE as error:
        raise broken(path, f"after byte {position} of its text", error) from None
    return None


# ===== Text


def read_text(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Yields the text of bytes `start` to `stop` of a UTF-8 file's text, verbatim (\\r\\n stays),
    about 1 MiB at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = start
    try:
        with open_bytes(path) as file:
            if stop is None and not is_packed(path):
                stop = os.fstat(file.fileno()).st_size
            skip_bytes(file, start)
            over = False
            while not over and (stop is None or position < stop):
                wanted = READ_BYTES if stop is None else min(READ_BYTES, stop - position)
                data = file.read(wanted)
                # the first bytes of a character that the last read cut
                pending = len(decoder.getstate()[0])
                position += len(data)
                if not data and stop is not None:
                    raise InputError(f"{path}: became shorter while it was read; run again")
                over = not data or position == stop
                text = decoder.decode(data, final=over)
                if text:
                    yield text
    except UnicodeDecodeError as error:
        offset = position - len(data) - pending + error.start
        raise InputError(f"{path}: not UTF-8 at byte {offset}; convert the file to UTF-8") from None
    except InputError:
        raise
    except DAMAGE as error:
        raise broken(path, f"after byte {position} of its text", error) from None


# ===== Rows


def row_count(path: Path) -> int:
    """The rows of a file, empty ones too."""
    if kind_of(path) == LINES:
        return _measure(path, rows=True)
    with _table(path) as table:
        return table.metadata.num_rows


def read_rows(path: Path, column: str, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Yields the texts of rows `start` to `stop` of a file, of which the first is 0; "" for a row
    whose text is null or empty. In errors the first row is 1."""
    if kind_of(path) == LINES:
        yield from _json_rows(path, column, start, stop)
    else:
        yield from _table_rows(path, column, start, stop)


def _json_rows(path: Path, column: str, start: int, stop: int | None) -> Iterator[str]:
    index = 0
    try:
        with open_bytes(path) as file:
            for line in file:
                if stop is not None and index >= stop:
                    return
                if index >= start:
                    yield _json_text(line, path, index + 1, column)
                index += 1
    except InputError:
        raise
    except DAMAGE as error:
        raise broken(path, f"after row {index}", error) from None


def _json_text(line: bytes, path: Path, number: int, column: str) -> str:
    """The text of the row that is number `number` of the file `path`."""
    row = f"{path}: row {number}"
    if not line.strip():
        return ""
    values = parse_json(line, row)
    if not isinstance(values, dict):
        raise InputError(f"{row}: is no JSON object; give a line like {{{column!r}: …}}")
    if column not in values:
        keys = ", ".join(sorted(values)) or "none"
        raise InputError(f"{row}: has no key {column} (text_column); its keys are {keys}")
    return checked_text(values[column], row, column)


def checked_text(text: Any, row: str, column: str) -> str:
    """The text that a row has; "" for none. Raises `InputError`, which `row` begins, where it is
    not text that UTF-8 can write."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"{row}: text_column {column} holds {type(text).__name__}; name one that holds text"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{row}: {column} holds half a surrogate pair; UTF-8 has none") from None
    return text


@contextlib.contextmanager
def _table(path: Path) -> Iterator[Any]:
    """The pyarrow ParquetFile of `path`."""
    import pyarrow.parquet  # comes with `datasets`; half a second to import, and only needed here

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except DAMAGE as error:
        raise broken(path, "as a table, row 1 on", error) from None
    with table:
        yield table


def _table_rows(path: Path, column: str, start: int, stop: int | None) -> Iterator[str]:
    with _table(path) as table:
        columns = table.schema_arrow.names
        if column not in columns:
            raise InputError(
                f"text_column: {path} has no column {column}; it has {', '.join(columns)}"
            )
        index = 0
        try:
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if index + rows <= start:  # nothing of it is wanted, so it is not read
                    index += rows
                    continue
                for batch in table.iter_batches(
                    ROWS_AT_A_TIME, row_groups=[group], columns=[column]
                ):
                    for value in batch.column(0):
                        if stop is not None and index >= stop:
                            return
                        if index >= start:
                            yield checked_text(value.as_py(), f"{path}: row {index + 1}", column)
                        index += 1
        except InputError:
            raise
        except DAMAGE as error:
            raise broken(path, f"after row {index}", error) from None
