"""Cores that other programs use too.

torch's threads wait for each other many times in a step. GNU's OpenMP (libgomp, in pip's torch for
Linux) lets a thread that waits turn in a loop for some milliseconds before it sleeps: the fastest
way while each thread has a core to itself. Where another program holds the core of one thread, the
others keep theirs busy for nothing, and a step takes twenty times as long.

libgomp itself shortens the loop to 100 turns while a process has more OpenMP threads than there are
cores (its manual, under GOMP_SPINCOUNT). `watch_cores` sees that other programs take time from this
one, and has idle threads started until there are that many; they end when it is alone again. How
many threads compute stays the same, and so does every bit of what they compute: sums would be
taken in another order by fewer of them.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

# How the variables begin by which users decide how threads wait, or how many there are:
# GOMP_SPINCOUNT, OMP_WAIT_POLICY, OMP_NUM_THREADS, KMP_BLOCKTIME.
DECIDED_BY = ("GOMP_", "OMP_", "KMP_")
PROCESS = Path("/proc/self")  # what Linux tells a process of itself
WATCHER = "cores"  # name of the thread that looks
SECONDS = 1.0  # from one look to the next
# Shares of the time in which a thread could have gone on, and had to wait for a core. The two
# threads of a process that is alone were measured to wait 0.05 together, beside one busy program
# 0.7 where they turn and 0.5 where they sleep.
SHARED = 0.15
ALONE = 0.05
SHARED_LINE = (
    "other processes use these cores too: threads that wait for each other sleep while they do"
    " (GOMP_SPINCOUNT, where it is set, decides how long they wait awake)"
)
# Looks in a row that must agree: a program that starts or ends uses a core for a moment too. More
# of them for being alone, as the way back and forth costs more than the loop does.
SHARED_LOOKS = 2
ALONE_LOOKS = 5


def left_to_us() -> bool:
    """Whether `watch_cores` does anything: on Linux, where the user has not decided."""
    return sys.platform == "linux" and not any(name.startswith(DECIDED_BY) for name in os.environ)


def waited() -> dict[str, int]:
    """Nanoseconds that each thread of this process has waited for a core, by its number."""
    result = {}
    for task in (PROCESS / "task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # of three numbers the second: in a queue for a core
            result[task.name] = int((task / "schedstat").read_text(encoding="ascii").split()[1])
    return result


class IdleThreads:
    """While `start`ed, this process has more OpenMP threads than there are cores."""

    def __init__(self):
        self.release: threading.Event | None = None  # None: there are none
        self.held: list[threading.Thread] = []

    def start(self) -> bool:
        """Starts them. False where that would change nothing: torch computes on one thread, or
        with another OpenMP."""
        import torch  # not at the top: nothing is slower to import, and errors need none of it

        computing = torch.get_num_threads()
        if computing < 2 or "libgomp" not in (PROCESS / "maps").read_text(encoding="utf-8"):
            return False
        release = threading.Event()
        # Each thread that computes in parallel gets a team of its own, of `computing` with itself;
        # as many as it takes to have one more OpenMP thread than there are cores.
        teams = (len(os.sched_getaffinity(0)) - computing) // (computing - 1) + 1
        ready = threading.Barrier(teams + 1)

        def hold() -> None:
            torch.zeros(2**16).add_(1)  # from 2¹⁵ numbers on, torch computes in parallel
            ready.wait()
            release.wait()

        self.held = [threading.Thread(target=hold, daemon=True) for _ in range(teams)]
        for thread in self.held:
            thread.start()
        ready.wait()
        self.release = release
        return True

    def stop(self) -> None:
        """Ends them, and with each its team."""
        if self.release is not None:
            self.release.set()
            for thread in self.held:
                thread.join()
        self.release = None


def look_on(ended: threading.Event, say: Callable[[str], None]) -> None:
    """Looks at how long this process waits for cores until `ended`, and acts on it. say: takes a
    line, at the first time that cores are shared."""
    idle = IdleThreads()
    shared_looks = 0
    alone_looks = 0
    told = False
    before = waited()
    while not ended.wait(SECONDS):
        now = waited()
        # The slowest thread counts, since the others wait for it.
        longest = max((now[task] - before.get(task, now[task]) for task in now), default=0)
        share = longest / 1e9 / SECONDS
        before = now
        shared_looks = shared_looks + 1 if share > SHARED else 0
        alone_looks = alone_looks + 1 if share < ALONE else 0
        if shared_looks >= SHARED_LOOKS and idle.release is None and idle.start() and not told:
            told = True
            say(SHARED_LINE)
        if alone_looks >= ALONE_LOOKS:
            idle.stop()
    idle.stop()


@contextlib.contextmanager
def watch_cores() -> Iterator[None]:
    """Within it, threads that wait for each other do so in the way that is fastest on these cores;
    a line on stderr says when others use them."""
    if not left_to_us():
        yield
        return
    ended = threading.Event()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    watcher = threading.Thread(target=look_on, args=(ended, say), name=WATCHER, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
