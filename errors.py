"""What can go wrong outside the program, said in one line: for every command, in one place.

Bad input is an `InputError`. What the system says (a full disk, no permission, a name too long, no memory) becomes a line in
`explain`. An error that is neither is a fault of the program, and keeps its traceback.
"""

import contextlib
import errno
import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 1000  # of an error's line: a value of a million digits is not worth a screen

ADVICE = {  # what to do about the system's errors whose own words do not say it
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room in that quota",
    errno.EFBIG: "the limit on a file's size is reached",
    errno.EACCES: "give a place that this user may read and write",
    errno.EPERM: "give a place that this user may read and write",
    errno.EROFS: "give a place that can be written",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "give one that is there",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}

# How torch and numpy say in a plain RuntimeError that a tensor does not fit, or has more elements than can be counted.
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|cannot allocate memory|bad allocation|std::bad_alloc"
    r"|Storage size calculation overflowed|multiplication overflow|Overflow when unpacking",
    re.IGNORECASE,
)


class InputError(ValueError):
    """Bad input from the user; its message is the one line that a command prints before it exits with code 2."""


def explain(error: BaseException) -> str | None:
    """What to say of an error in place of its traceback; None where it is a fault of the program."""
    if isinstance(error, InputError):
        return str(error)
    words = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or _says_no_memory(error):
        reason = f" ({words})" if words else ""
        return f"out of memory{reason}; take less at a time (micro_batch_size, block_size, n), or a smaller network (C, layers)"
    if isinstance(error, OSError):
        names = " -> ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes))
        reason = error.strerror or words or type(error).__name__
        advice = ADVICE.get(error.errno, "")
        return (f"{names}: " if names else "") + reason + (f"; {advice}" if advice else "")
    if isinstance(error, RecursionError):  # nothing of ours recurses: a file's JSON does
        return "a file's JSON is nested too deep; no value of ours has more than two levels"
    if isinstance(error, UnicodeError):
        return f"{words}; give text and names in UTF-8"
    return None


def _says_no_memory(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def one_line(text: str) -> str:
    """`text` without line ends and other control characters, which are written as Python writes them, and not too long."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"


def run_command(main: Callable[[], None]) -> None:
    """Runs a script's `main`. Bad input and what the system refuses end it with one line on stderr and exit code 2, Ctrl-C
    with 130, an output that nobody reads any more (`| head`) with 141."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character (cp1252, ascii) is no reason to stop
            stream.reconfigure(errors="replace")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is found where it is used, and named
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError:
        _end("the reader of the output is gone", 141)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        _end(f"error: {one_line(line)}", 2)


def _end(line: str, code: int) -> None:
    print(line, file=sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # nobody takes it: Python would try again when it ends, and then give another exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def check_regular(path: Path) -> None:
    """Raises `InputError` where `path` is there but no regular file: a FIFO would be waited for, a device read for ever."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except ValueError:  # a name with a zero byte
        raise InputError(f"{path}: is no name of a file; a zero byte is in it") from None
    if not stat.S_ISREG(mode):
        kind = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}.get(stat.S_IFMT(mode), "a device")
        raise InputError(f"{path}: is {kind}; give a file")


def read_utf8(path: Path) -> str:
    """The text of a file. Raises `InputError` for what is no regular file or not UTF-8, `OSError` where it cannot be read."""
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; give a text in UTF-8") from None


def parse_json(text: str | bytes, source: str | Path) -> Any:
    """The value that JSON `text` says. Raises `InputError`, naming `source`, where it is none that can be read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}: not JSON, line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{source}: its JSON is nested too deep; no value of ours has more than two levels") from None
    except UnicodeDecodeError:
        raise InputError(f"{source}: not UTF-8; JSON must be") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise InputError(f"{source}: {error}".partition(";")[0] + "; give a smaller number") from None


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


def shown(value: Any) -> str:
    """A bad value as an error's line shows it: JSON, cut where it is long."""
    with contextlib.suppress(RecursionError, ValueError):  # too deep, or a number of too many digits
        text = json.dumps(value, default=str, ensure_ascii=False)
        return text if len(text) <= 80 else text[:80] + " …"
    return "a value that is too long to show"
