"""Where text comes from: Python's own documentation, local files, or a data set of the Hugging Face
hub.

`documents(config, split)` yields a split's text verbatim, in a fixed order. What a text of several
documents gets between them is `data.encoding`'s to add. `config.dataset` says what is read:

- `pydoc`: reference topics and docstrings of the running Python's standard library. Works offline,
  split by file.
- a name in `HUB`, or any hub id `owner/name`, by parquet. `config.dataset_path` overrides the id:
  another one, `owner/name@revision`, or a local folder in the hub's layout. (Write ./pg19 for a
  local folder called pg19.)
- a local folder with no text but parquet files: the hub's layout too, and so is one whose parquet
  files are named after splits, whatever lies beside them (`is_hub_layout`).
- a folder with train, validation (or valid) and test, each a folder of files or one file: these
  splits.
- a file of a kind that `data.readers` reads, or a folder of them in any mixture: of the files in
  sorted order the texts are one long text, cut by `config.split_fractions` at the line ends that
  follow, and the rows of the others one long list, cut by the same shares. So a split has whole
  files, but for those where the cuts fall.

A text file is a document, of .jsonl and .parquet each row is one; a row that is null or empty is
left out and counted. Folders are read with all below them, through links too. What cannot be read
is an error, what is of another kind is named by `unread`: nothing is passed over in silence.

`config.dataset_mix` names more data sets, from whose train splits too windows are drawn;
`components` lists them all."""

import difflib
import hashlib
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.command import InputError, first_line
from config import Config
from data.library import library_documents, library_files, unit
from data.readers import (
    ADVICE,
    TABLE,
    bare_name,
    check_readable,
    has_rows,
    kind_of,
    line_end,
    names_a_file,
    read_rows,
    read_text,
    row_count,
    text_size,
)

SPLITS = ("train", "validation", "test")
# of reading and splitting: another number where they change, so that old token files are not used
RULES = "2"

# name -> hub id, configuration; all are parquet, for `datasets` runs no loading scripts any more
HUB = {
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "pg19": ("fla-hub/pg19", ""),
    "openwebtext": ("Skylion007/openwebtext", ""),
    "tinystories": ("roneneldan/TinyStories", ""),
    "bookcorpusopen": ("lucadiliello/bookcorpusopen", ""),
    "pile-arxiv": ("timaeus/pile-arxiv", ""),
}
WIKITEXT = ("wikitext-103", "wikitext-2")
# how a split is named in a path of the hub's layout
SPLIT_NAME = re.compile(
    r"(?:^|[-._ 0-9/])(?:train|training|valid|validation|dev|val|test|testing|eval|evaluation)"
    r"(?:[-._ 0-9/]|$)"
)


class Skipped:
    """Counts the rows without text that are left out of a split."""

    def __init__(self):
        self.rows = 0

    def without_empty(self, texts: Iterator[str | None]) -> Iterator[str]:
        """`texts` without those that are null or empty, which are counted."""
        for text in texts:
            if text:
                yield text
            else:
                self.rows += 1

    def said(self) -> str:
        return f"{self.rows:,} null or empty row{'s' * (self.rows != 1)} left out"


def documents(
    config: Config, split: str, skipped: Skipped | None = None
) -> Iterator[tuple[bool, str]]:
    """Yields (starts a document, text). A long document comes in several pieces, of which only the
    first starts it; the split is all texts in a row. `skipped` counts the rows without text. Raises
    `InputError` for a source or split that is missing, empty or not UTF-8."""
    kind = source_kind(config)
    skipped = skipped or Skipped()
    if kind == "pydoc":
        pieces = library_documents(split)
    elif kind == "hub":
        pieces = _hub_documents(config, split, skipped)
    else:
        parts = _file_parts(Path(config.dataset), config.split_fractions, split)
        pieces = _read_parts(parts, config.text_column, skipped)
    empty = True
    for starts, text in pieces:
        empty = empty and not text
        yield starts, text
    if empty:
        raise InputError(
            f"dataset: the {split} split of {config.dataset} is empty; it needs text with line ends"
        )


def file_documents(path: Path, column: str, skipped: Skipped) -> Iterator[tuple[bool, str]]:
    """Yields (starts a document, text) of all of a file, or of all files of a folder in sorted
    order."""
    return _read_parts([Part(file, 0, None) for file in readable_files(path)], column, skipped)


def components(config: Config) -> list[Config]:
    """A config for each data set that training reads: `dataset`, then those of `dataset_mix`."""
    own = config.model_copy(update={"dataset_mix": ()})
    elsewhere = {"dataset_path": "", "dataset_name": ""}
    return [
        own,
        *(own.model_copy(update={"dataset": name} | elsewhere) for name, _ in config.dataset_mix),
    ]


def check_source(config: Config) -> None:
    """Raises `InputError` where a data set of `config` is unknown or is not there, as far as that
    is seen at once."""
    for component in components(config):
        described(component)


def source_kind(config: Config) -> str:
    """What `config.dataset` is: "pydoc", "hub" or "files". Raises `InputError` for none of
    these."""
    name = config.dataset
    if config.dataset_path or name in HUB:
        return "hub"
    if name == "pydoc":
        return "pydoc"
    if Path(name).exists():
        return "hub" if is_hub_layout(Path(name)) else "files"
    if (
        names_a_file(name)
        or name.startswith((".", "~", os.sep))
        or name.count("/") > 1
        or "\\" in name
    ):
        raise InputError(
            f"dataset: there is nothing at {name}; give a file of text, or a folder of them"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return "hub"
    known = ["pydoc", *HUB]
    near = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else f"known are {', '.join(known)}, a path, and hub ids owner/name"
    )
    raise InputError(f"dataset: unknown data set {name}; {hint}")


def is_hub_layout(folder: Path) -> bool:
    """Whether `datasets` is to find the splits of `folder`: where all that is read in it are
    parquet files, or where these are named after splits, as in a data set of the hub that has its
    license beside them in a .txt. A folder that has train, validation and test itself, of other
    kinds too, is no such."""
    if not folder.is_dir():
        return False
    files = [path for path in files_below(folder) if kind_of(path) is not None]
    tables = [path for path in files if kind_of(path) == TABLE]
    if not tables or len(tables) == len(files):
        return bool(tables)
    named = all(SPLIT_NAME.search(path.relative_to(folder).as_posix()) for path in tables)
    return named and len(_given_files(folder)) < len(SPLITS)


def located(config: Config) -> Config:
    """`config` with the full paths of the files and folders that it names, so that it means the
    same from any folder."""

    def full(name: str) -> str:
        return os.path.abspath(name) if name and Path(name).exists() else name

    # then no path, see `source_kind`
    named = config.dataset_path or config.dataset in HUB or config.dataset == "pydoc"
    return config.model_copy(
        update={
            "dataset": config.dataset if named else full(config.dataset),
            "dataset_path": full(config.dataset_path),
            "dataset_mix": tuple(
                (n if n in HUB or n == "pydoc" else full(n), weight)
                for n, weight in config.dataset_mix
            ),
            "tokenizer": (
                full(config.tokenizer) if config.tokenizer.endswith(".model") else config.tokenizer
            ),
        }
    )


def described(config: Config) -> str:
    """Where the text of `config` comes from and how much it is, in words that tell it from
    another."""
    if config.dataset_mix:
        return " + ".join(described(component) for component in components(config))
    kind = source_kind(config)
    if kind == "pydoc":
        return f"pydoc of Python {platform.python_version()} ({len(library_files()):,} files)"
    if kind == "files":
        return f"{os.path.abspath(config.dataset)} ({_amount(_files_read(Path(config.dataset)))})"
    identity, name, revision = _hub_source(config)
    if Path(identity).exists():
        tables = _local_tables(identity)
        return f"{os.path.abspath(identity)} ({_amount(tables)})"
    return identity + (f"@{revision}" if revision else "") + (f" ({name})" if name else "")


def is_verbatim(config: Config) -> bool:
    """Whether nothing may be put between the documents of `config`: WikiText's published figures
    are of its text as it is."""
    return config.dataset in WIKITEXT or (
        source_kind(config) == "hub" and _hub_source(config)[0] == HUB[WIKITEXT[0]][0]
    )


def source_fingerprint(config: Config) -> str:
    """A short hash that changes when the source does: of names, sizes and times for files, of the
    Python version and file names for pydoc, of id, revision, configuration and column for the hub
    (needs no network). It tells which token files may be of use; what a run was trained on is told
    by the digest of its tokens, which a touched file does not change."""
    if config.dataset_mix:
        parts = [source_fingerprint(component) for component in components(config)]
        return hashlib.sha256("\0".join([RULES, "mix", *parts]).encode()).hexdigest()[:16]
    kind = source_kind(config)
    if kind == "pydoc":
        parts = [platform.python_version(), *(path.as_posix() for path in library_files())]
    else:
        parts = [*map(str, config.split_fractions)]
        if kind == "hub":
            identity, name, revision = _hub_source(config)
            parts += [config.dataset, identity, name, revision, config.text_column]
            files = files_below(Path(identity)) if Path(identity).exists() else []
        else:
            files = _files_read(Path(config.dataset))
            if any(has_rows(path) for path in files):
                parts.append(config.text_column)
        for path in files:
            status = path.stat()
            parts += [str(path.resolve()), str(status.st_size), str(status.st_mtime_ns)]
    return hashlib.sha256("\0".join([RULES, kind, *parts]).encode()).hexdigest()[:16]


def unread(config: Config) -> str:
    """What lies in the local folders of `config` and is not read, in one line; "" where there is no
    such thing."""
    parts = []
    for component in components(config):
        kind = source_kind(component)
        root = Path(component.dataset if kind == "files" else _hub_source(component)[0])
        if kind == "pydoc" or not root.is_dir():
            continue
        read = (
            set(_files_read(root))
            if kind == "files"
            else {path for path in files_below(root) if kind_of(path) == TABLE}
        )
        if rest := [path for path in files_below(root) if path not in read]:
            parts.append(f"{len(rest)} of the files in {root} are not read: {_kinds(rest)}")
    return "; ".join(parts)


# ===== Local files


def files_below(root: Path) -> list[Path]:
    """The files in the folder `root` and all folders below it, through links too, sorted; a file is
    itself. A folder that several links lead to is read once, so links in a circle do no harm.
    Raises `InputError` for what cannot be read."""

    def stop(error: OSError) -> None:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}); make it readable, or move it"
            " away"
        )

    if not root.is_dir():
        return [root]
    found = []
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=stop):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        # os.walk goes into them in this order, so which of several links counts does not depend on
        # the disk
        folders.sort()
        found += [Path(folder, name) for name in names]
    for path in found:
        if path.is_symlink() and not path.exists():
            raise InputError(
                f"{path}: links to {os.readlink(path)}, where nothing is; restore that, or remove"
                " the link"
            )
    return sorted(found, key=lambda path: path.as_posix())


def _amount(files: list[Path]) -> str:
    return (
        f"{len(files):,} file{'s' * (len(files) != 1)},"
        f" {sum(path.stat().st_size for path in files):,} bytes"
    )


def _kinds(files: list[Path]) -> str:
    """How many files there are of each kind: "3 .json, 1 without a suffix"."""
    kinds = Counter(path.suffix.lower() or "without a suffix" for path in files)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


class Part(NamedTuple):
    """A part of a file: its text from byte `start` to `stop`, or, of a file of rows, these rows; to
    the end where `stop` is None."""

    path: Path
    start: int
    stop: int | None


def _read_parts(parts: list[Part], column: str, skipped: Skipped) -> Iterator[tuple[bool, str]]:
    for part in parts:
        if has_rows(part.path):
            rows = read_rows(part.path, column, part.start, part.stop)
            for text in skipped.without_empty(rows):
                yield True, text
            continue
        first = True
        for text in read_text(part.path, part.start, part.stop):
            yield first, text
            first = False


def _file_parts(root: Path, fractions: tuple[float, ...], split: str) -> list[Part]:
    """What a split of the file or folder `root` has of its files."""
    if given := _given_splits(root):
        return [Part(path, 0, None) for path in given[split]]
    files = readable_files(root)
    texts = [path for path in files if not has_rows(path)]
    tables = [path for path in files if has_rows(path)]
    parts = _shares(texts, [text_size(path) for path in texts], fractions, split, _text_cut)
    parts += _shares(tables, [row_count(path) for path in tables], fractions, split, _row_cut)
    if not parts:
        if not any(path.stat().st_size for path in files):
            raise InputError(f"{root}: is empty; give a file with text")
        what = (
            ("rows" if tables else "line ends") if not (tables and texts) else "line ends or rows"
        )
        raise InputError(
            f"{root}: too few {what} for a {split} split by split_fractions; give more text"
        )
    place = {path: index for index, path in enumerate(files)}
    return sorted(parts, key=lambda part: place[part.path])


def _shares(
    files: list[Path],
    sizes: list[int],
    fractions: tuple[float, ...],
    split: str,
    cut: Callable[[list[Path], list[int], float, int], int],
) -> list[Part]:
    """The split's share of `files` in a row, of these sizes in bytes or rows; `cut` finds the place
    of a share."""
    if sum(sizes) == 0:
        return []
    shares = (fractions[0], fractions[0] + fractions[1])
    cuts = [0, *(cut(files, sizes, share, i) for i, share in enumerate(shares)), sum(sizes)]
    index = SPLITS.index(split)
    parts = []
    before = 0
    for path, size in zip(files, sizes, strict=True):
        start = max(cuts[index] - before, 0)
        stop = min(cuts[index + 1] - before, size)
        if start < stop:
            parts.append(Part(path, start, stop))
        before += size
    return parts


def _given_files(root: Path) -> dict[str, list[Path]]:
    """The folder, or the files, of each split that the folder `root` has by name, in any case."""
    inside = sorted(root.iterdir()) if root.is_dir() else []
    given = {}
    for split in SPLITS:
        for name in (split, "valid") if split == "validation" else (split,):
            folders = [path for path in inside if path.name.lower() == name and path.is_dir()]
            files = [
                path
                for path in inside
                if kind_of(path) is not None and bare_name(path).lower() == name
            ]
            # two folders that differ in case are as good as one
            if found := folders[-1:] or files:
                given.setdefault(split, found)
    return given


def _given_splits(root: Path) -> dict[str, list[Path]]:
    """The files of each split where the folder `root` has train, validation (or valid) and test, in
    any case; else {}."""
    given = {
        split: [file for path in paths for file in readable_files(path)]
        for split, paths in _given_files(root).items()
    }
    if given and (missing := [split for split in SPLITS if split not in given]):
        raise InputError(
            f"{root}: has no {missing[0]} split; add {missing[0]}.txt, say, or a folder"
            f" {missing[0]}"
        )
    return given


def _files_read(root: Path) -> list[Path]:
    """All files of all splits."""
    given = _given_splits(root)
    return [path for split in SPLITS for path in given[split]] if given else readable_files(root)


def readable_files(root: Path) -> list[Path]:
    """The files of text of the folder `root`, sorted; a file is itself. Raises `InputError` where
    there is none, or one that is no regular file."""
    files = files_below(root)
    if root.is_dir():
        others = files
        files = [path for path in files if kind_of(path) is not None]
        if not files:
            only = f", only {_kinds(others)}" if others else ""
            raise InputError(f"{root}: has no files of text{only}; {ADVICE}")
    for path in files:
        check_readable(path)
    return files


def _text_cut(files: list[Path], sizes: list[int], share: float, _index: int) -> int:
    """The first line end (or end of a file) at or after `share` of all bytes, as an offset into the
    joined files."""
    target = round(share * sum(sizes))
    before = 0
    for path, size in zip(files, sizes, strict=True):
        if target < before + size:
            # the byte before: a target at a line end stays there
            end = line_end(path, max(target - before - 1, 0))
            return before + (size if end is None else end)
        before += size
    return before


def _row_cut(_files: list[Path], sizes: list[int], share: float, index: int) -> int:
    """The row at which the split after number `index` begins. Where there are three rows or more
    each split has one."""
    rows = sum(sizes)
    return min(max(round(share * rows), index + 1), max(rows - len(SPLITS) + index + 1, 0))


# ===== The Hugging Face hub


def _hub_source(config: Config) -> tuple[str, str, str]:
    """Hub id or local folder, configuration and revision ("" = the default one)."""
    identity, name = HUB.get(config.dataset, (config.dataset, ""))
    if config.dataset_path:
        identity = config.dataset_path
        name = ""
    revision = ""
    if not Path(identity).exists():
        identity, _, revision = identity.partition("@")
    return identity, config.dataset_name or name, revision


def _hub_documents(config: Config, split: str, skipped: Skipped) -> Iterator[tuple[bool, str]]:
    """Streams a split as `datasets` reads it."""
    from datasets.utils.logging import CRITICAL, set_verbosity

    set_verbosity(CRITICAL)  # what it logs of a file that it cannot read it raises too
    identity, _, _ = _hub_source(config)
    for path in _local_tables(identity):
        check_readable(path)  # a FIFO would be waited for
    try:
        rows = _hub_rows(config, split)
        if is_verbatim(config):
            yield from _wikitext_articles(text or "" for text in rows)
        else:
            for text in skipped.without_empty(rows):
                yield True, text
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise _hub_error(config, error) from error


def _hub_rows(config: Config, split: str) -> Iterator[str | None]:
    """The texts of a split's rows, None where there is none. A split that the data set lacks is cut
    from its train split: a row belongs to it by a hash of the row's number, with the probability in
    `config.split_fractions`."""
    from datasets import load_dataset  # seconds to import, and only needed here

    identity, name, revision = _hub_source(config)
    parts = load_dataset(identity, name or None, revision=revision or None, streaming=True)
    if "train" not in parts:
        raise InputError(
            f"dataset: {identity} has no train split, only {', '.join(parts)}; name another"
            " data set"
        )
    if parts["train"].info.builder_name == "text":
        raise InputError(
            f"dataset: {identity} holds .txt files; download them and give the folder as dataset"
        )
    held_out = {}  # split cut from train -> its range of hashes
    edge = 0.0
    for other, fraction in zip(SPLITS[1:], config.split_fractions[1:], strict=True):
        if other not in parts:
            held_out[other] = (edge, edge + fraction)
            edge += fraction
    low, high = held_out.get(split, (edge, 1.0))
    stream = parts["train" if split in held_out else split]
    columns = stream.column_names
    if columns is not None and config.text_column not in columns:
        raise InputError(
            f"text_column: {identity} has no column {config.text_column}; it has"
            f" {', '.join(columns)}"
        )
    rows = _column(stream, config.text_column, identity)
    if held_out and (split == "train" or split in held_out):
        return (text for index, text in enumerate(rows) if low <= unit(f"row {index}") < high)
    return rows


def _local_tables(identity: str) -> list[Path]:
    """The parquet files of a data set in a local folder; none of one that is not there."""
    if not Path(identity).exists():
        return []
    return [path for path in files_below(Path(identity)) if kind_of(path) == TABLE]


def _hub_error(config: Config, error: Exception) -> InputError:
    """What to say of a data set that `datasets` cannot read. Where a local file is broken, it is
    looked for, since `datasets` does not name it."""
    identity, _, _ = _hub_source(config)
    reason = first_line(error)
    if Path(identity).exists():
        right = "give whole .parquet ones"
        if config.dataset_name:
            right += ", and a dataset_name that they have"
        else:
            for path in _local_tables(identity):
                try:
                    for _ in read_rows(path, config.text_column):
                        pass
                except InputError as found:
                    return found
        return InputError(f"dataset: cannot read the files of {identity} ({reason}); {right}")
    named = config.dataset_path or config.dataset in HUB
    local = "" if named else f"; no local file or folder is called {config.dataset} either"
    return InputError(
        f"dataset: cannot read {identity} from the Hugging Face hub ({reason}){local}; check"
        " the id, dataset_name, network and access, or give a local parquet folder as"
        " dataset_path"
    )


def _column(stream, column: str, identity: str) -> Iterator[str | None]:
    for number, row in enumerate(stream, 1):
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise InputError(
                f"text_column: column {column} of {identity} holds {kind} in row {number}; name a"
                " column of text"
            )
        yield text


def _wikitext_articles(rows: Iterator[str]) -> Iterator[tuple[bool, str]]:
    """WikiText's rows are lines that carry their line end; an article starts at a title, ` = Title
    = `, after a blank line. The hub stores the original's blank lines, ` \\n`, as empty rows: they
    are put back, so that the text is byte for byte the published one (raw WikiText-103 test:
    1,290,590 bytes, 245,569 words with line ends)."""
    first = True
    blank = True
    title_seen = False
    for text in rows:
        title = blank and re.fullmatch(r" = [^=].*[^=] = \n| = [^=] = \n", text) is not None
        # the blank line before the first title is its article's
        yield first or (title and title_seen), text or " \n"
        title_seen = title_seen or title
        first = False
        blank = not text.strip()
