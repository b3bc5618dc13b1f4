"""Files that are whole or not there at all, and files that are read with care."""

import contextlib
import json
import os
import platform
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors

from common.command import InputError, first_line

# A name that a process writes to until the file is whole: it tells the process's number and its
# machine, should a killed one leave it behind.
TEMPORARY = re.compile(r"\..+\.(\d+)@(.+)\.tmp")


@contextlib.contextmanager
def written_whole(path: Path, advice: str = "", mode: int | None = None) -> Iterator[Path]:
    """Yields a name beside `path` to write to, and renames it to `path` if all went well.

    Readers see the old file or the new one, never a part of it, whenever the process is killed.
    Raises `InputError` where the file cannot be written, with `advice` on what to do about it.
    mode: the file's; None for what the umask makes of a new one.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.tmp")
    try:
        check_regular(path)  # a device would be replaced by a file
        beside.touch()
        # safetensors' own files are for their owner alone
        mode = beside.stat().st_mode if mode is None else mode
        yield beside
        beside.chmod(mode)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the contents
        os.replace(beside, path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: cannot be written ({reason}){advice}") from None
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing is to be removed
            beside.unlink(missing_ok=True)


def cache_folder() -> Path:
    """The folder of what is made once on a machine and can be made again at any time; it need not
    exist. XDG_CACHE_HOME is where a user wants such things; a relative one says nothing, as its
    specification has it. Raises `InputError` for a user without a home."""
    wanted = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        home = wanted if wanted.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise InputError("there is no home directory for a cache; set XDG_CACHE_HOME") from None
    return home / "waveletlm"


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, whole or not at all. Raises `InputError` as `written_whole` does."""
    with written_whole(path) as beside:
        beside.write_bytes(data)


def remove_abandoned(folder: Path) -> None:
    """Deletes what killed processes of this machine left half written in folders of `folder`."""
    for path in folder.glob("*/.*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and match[2] == platform.node() and not _is_running(int(match[1])):
            with contextlib.suppress(OSError):  # another process may be faster, or it is not ours
                path.unlink()


def _is_running(process: int) -> bool:
    # os.kill would end it there; but an open file cannot be deleted there either
    if os.name == "nt":
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # someone else's
    return True


def check_regular(path: Path) -> None:
    """Raises `InputError` where `path` is there but no regular file: a FIFO would be waited for, a
    device read for ever."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except ValueError:  # a name with a zero byte
        raise InputError(f"{path}: is no name of a file; a zero byte is in it") from None
    if not stat.S_ISREG(mode):
        kind = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}.get(
            stat.S_IFMT(mode), "a device"
        )
        raise InputError(f"{path}: is {kind}; give a file")


def read_utf8(path: Path) -> str:
    """The text of a file. Raises `InputError` for what is no regular file or not UTF-8, `OSError`
    where it cannot be read."""
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; give a text in UTF-8") from None


def parse_json(text: str | bytes, source: str | Path) -> Any:
    """The value that JSON `text` says. Raises `InputError`, naming `source`, where it is none that
    can be read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # of a text of one line, which a row of a file is, its source says all
        line = f", line {error.lineno}" if error.doc.strip().count("\n") else ""
        raise InputError(f"{source}: not JSON{line}: {error.msg}") from None
    except RecursionError:
        raise InputError(
            f"{source}: its JSON is nested too deep; no value of ours has more than two levels"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{source}: not UTF-8; JSON must be") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise InputError(
            f"{source}: {error}".partition(";")[0] + "; give a smaller number"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `InputError` when there is none."""
    try:
        values = parse_json(read_utf8(path), path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold one JSON object of keys and values")
    return values
