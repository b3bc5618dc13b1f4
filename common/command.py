"""What can go wrong outside the program, said in one line: for every command, in one place.

Bad input is an `InputError`. What the system says (a full disk, no permission, a name too long, no
memory) becomes a line in `explain`. An error that is neither is a fault of the program, and keeps
its traceback."""

import argparse
import contextlib
import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from common.cores import watch_cores
from common.heap import keep_freed_memory

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

# How torch and numpy say in a plain RuntimeError that a tensor does not fit, or has more elements
# than can be counted.
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|cannot allocate memory|bad"
    r" allocation|std::bad_alloc"
    r"|Storage size calculation overflowed|multiplication overflow|Overflow when unpacking",
    re.IGNORECASE,
)


class InputError(ValueError):
    """Bad input from the user; its message is the one line that a command prints before it exits
    with code 2."""


def first_line(error: BaseException) -> str:
    """What an error says, in its first line; of one that says nothing its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def explain(error: BaseException) -> str | None:
    """What to say of an error in place of its traceback; None where it is a fault of the
    program."""
    if isinstance(error, InputError):
        return str(error)
    words = str(error).strip().partition("\n")[0]
    if (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or _says_no_memory(error)
    ):
        reason = f" ({words})" if words else ""
        return (
            f"out of memory{reason}; take less at a time (micro_batch_size, block_size, n), or a"
            " smaller network (C, layers)"
        )
    if isinstance(error, OSError):
        names = " -> ".join(
            os.fsdecode(name)
            for name in (error.filename, error.filename2)
            if isinstance(name, str | bytes)
        )
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
    """`text` without line ends and other control characters, which are written as Python writes
    them, and not too long."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"


def run_command(main: Callable[[], None]) -> None:
    """Runs a script's `main`, with an eye on who else uses the cores. Bad input and what the system
    refuses end it with one line on stderr and exit code 2, Ctrl-C with 130, an output that nobody
    reads any more (`| head`) with 141."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show a character (cp1252, ascii) is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if hasattr(sys.stdin, "reconfigure"):
        # what is not UTF-8 is found where it is used, and named
        sys.stdin.reconfigure(errors="surrogateescape")
    keep_freed_memory()
    try:
        with watch_cores():
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
    except OSError:
        # nobody takes it: Python would try again when it ends, and then give another exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def shown(value: Any) -> str:
    """A bad value as an error's line shows it: JSON, cut where it is long."""
    # too deep, or a number of too many digits
    with contextlib.suppress(RecursionError, ValueError):
        text = json.dumps(value, default=str, ensure_ascii=False)
        return text if len(text) <= 80 else text[:80] + " …"
    return "a value that is too long to show"


class Parser(argparse.ArgumentParser):
    """A parser of a script's options whose errors are one line, as all bad input is, and that takes
    no shortened names."""

    def __init__(self, description: str, **options: Any):
        super().__init__(description=description, allow_abbrev=False, **options)
        self.hints: dict[str, str] = {}  # what to say of options that are none any more, by name

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            if hint := self.hints.get(name.removeprefix("--")):
                raise InputError(f"{name}: {hint}")
            raise InputError(
                f"unknown option {name}; " + (f"did you mean {near[0]}?" if near else "see --help")
            )
        for name, value in vars(known).items():
            # What no count or measure of ours is, nan included: kernels count in int64 and compute
            # in fp32.
            if isinstance(value, int | float) and not abs(value) < (
                2**63 if isinstance(value, int) else 1e38
            ):
                raise InputError(f"{name}: {shown(value)} is out of range")
        return known

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")
