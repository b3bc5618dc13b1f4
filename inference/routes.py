"""Which of several ways to compute the same thing is the fastest here: measured, not guessed.

A way that is the fastest on one CPU takes three times as long as another on the next one. So the
candidates are timed for some milliseconds where they are first needed, for each kind of weights and
each class of shapes and of rows, and what was found is kept: in this process, and in a file for
this CPU, torch and number of threads, so that a later process takes the same ways. All ways of a
product are the same numbers but for rounding.

WAVELETLM_ROUTES=fixed takes the first candidate always, and measures nothing.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.command import InputError
from common.device import cpu_name
from common.files import cache_folder, read_json, write_whole

SWITCH = "WAVELETLM_ROUTES"  # an environment variable: "fixed" measures nothing
SECONDS = 0.1  # that a choice may take, after each way was called once to warm up
ROUNDS = 5  # times that each way is timed at the most
CACHES = 64 * 2**20  # bytes: what is read after so many others comes from memory on most CPUs


def shape_class(*sizes: int) -> str:
    """Sizes as powers of two, rounded up: shapes of one class share what was measured."""
    return "x".join(str(1 << max(0, size - 1).bit_length()) for size in sizes)


class Choices:
    """What was chosen for one CPU, torch, our own kernels and number of threads, by key."""

    def __init__(self, path: Path | None):
        """path: the file to read them from, if it is there, and to write them to at the end of the
        process, if any were added; None: they are kept in this process alone."""
        self.path = path
        self.changed = False
        self.ways = {} if path is None else self.read(path)

    @staticmethod
    def read(path: Path) -> dict[str, str]:
        """What the file has; nothing where it is not there, or not what this module wrote."""
        try:
            known = read_json(path) if path.exists() else {}
        except (InputError, OSError):
            known = {}
        return {key: way for key, way in known.items() if isinstance(way, str)}

    def add(self, key: str, way: str) -> None:
        """Keeps a choice."""
        self.ways[key] = way
        if not self.changed:
            self.changed = True
            atexit.register(self.save)

    def save(self) -> None:
        """Writes the file. Where that is refused the next process measures again, no more."""
        if self.path is None:
            return
        with contextlib.suppress(InputError, OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # with what other processes have found meanwhile
            text = json.dumps(self.read(self.path) | self.ways, indent=1, sort_keys=True)
            write_whole(self.path, text.encode("utf-8"))


@functools.cache
def choices(threads: int) -> Choices:
    """The choices for products by so many threads."""
    # Our own kernels are among what was chosen from: others may be faster or slower.
    kernels = hashlib.sha256(Path(__file__).with_name("cpu_kernels.cpp").read_bytes()).hexdigest()
    here = f"{cpu_name()} {torch.__version__} {threads} {kernels}"
    name = f"routes-{hashlib.sha256(here.encode()).hexdigest()[:16]}.json"
    try:
        return Choices(cache_folder() / name)
    except InputError:  # no home: nothing to keep them in
        return Choices(None)


def seconds_of(calls: dict[str, Callable[[], object]], cold: bool) -> dict[str, float]:
    """The least seconds of each call, all in turn, so that what else the machine does is fair to
    all. cold: as in `fastest`."""
    others = torch.ones(CACHES // 4 if cold else 0)
    for call in calls.values():
        call()
    least = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + SECONDS
    for _ in range(ROUNDS):
        for name, call in calls.items():
            others.sum()
            began = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - began)
        if time.perf_counter() > end:
            break
    return least


def fastest(key: str, calls: dict[str, Callable[[], object]], cold: bool = False) -> str:
    """The name of the fastest of `calls`, which all compute what `key` names.

    key: kind, shapes and rows; what has one key is measured once. cold: what the calls read comes
    from memory when it counts, and not from a cache in which the call before has left it.
    """
    if len(calls) == 1 or os.environ.get(SWITCH) == "fixed":
        return next(iter(calls))
    # The candidates belong to the key: where one of them is missing, as our own kernels may be,
    # another choice is made, and neither replaces the other in the file.
    key = f"{key}, of {' '.join(calls)}"
    known = choices(torch.get_num_threads())
    if key not in known.ways:
        seconds = seconds_of(calls, cold)
        known.add(key, min(seconds, key=seconds.__getitem__))
    return known.ways[key]
