"""How threads wait for each other beside other programs: as short as can be there, as ever where
the process is alone or the user has decided, and with the same results."""

import json
import os
import subprocess
import sys
import threading

import pytest
from helpers import ROOT

from common import cores
from common.command import run_command

# A fresh process: libgomp's threads, once started, would slow the other tests down.
MEASURE = """
import json, time
import torch
from common.cores import IdleThreads

torch.set_num_threads(2)
x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))

def measured():
    began = time.process_time()
    for _ in range(30):
        total = x.sum()
        time.sleep(0.004)  # the second thread waits for the next sum meanwhile
    return time.process_time() - began, total.item()

idle = IdleThreads()
alone = measured()
started = idle.start()
shared = measured()
idle.stop()
time.sleep(0.1)  # their teams end after them
print(json.dumps([started, alone, shared, measured()]))
"""


@pytest.fixture
def undecided(monkeypatch):
    """An environment in which the user has set nothing about threads."""
    for name in list(os.environ):
        if name.startswith(cores.DECIDED_BY):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="one core, or no Linux"
)
def test_idle_threads_let_waiting_threads_sleep_until_they_end_and_change_no_sum(undecided):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True,
    )  # fmt: skip
    started, alone, shared, again = json.loads(done.stdout)
    if not started:
        pytest.skip("this torch has another OpenMP")
    assert shared[0] < alone[0] / 2 and shared[0] < again[0] / 2
    assert alone[1] == shared[1] == again[1]


class Looks:
    """Stands in for `ended`, and for the process: its thread has waited these shares of the time,
    look by look."""

    def __init__(self, shares):
        self.shares = iter(shares)
        self.total = 0

    def wait(self, seconds):
        share = next(self.shares, None)
        self.total += int((share or 0) * seconds * 1e9)
        return share is None

    def waited(self):
        return {"1": self.total, "2": 0}


class Recorded:
    """Stands in for IdleThreads: what was asked of it."""

    done: list[str]

    def __init__(self):
        self.release = None

    def start(self):
        self.release = "held"
        self.done.append("start")
        return True

    def stop(self):
        if self.release is not None:
            self.done.append("stop")
        self.release = None


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.0] * 9, []),
        ([0.0, 0.9, 0.0, 0.9, 0.0], []),  # something started, something ended
        ([0.5] * 9, ["start", "say", "stop"]),
        ([0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.5], ["start", "say", "stop"]),
        (
            [*[0.5] * 3, *[0.0] * 6, *[0.5] * 3],
            ["start", "say", "stop", "start", "stop"],  # told once
        ),
    ],
)
def test_threads_sleep_while_cores_are_shared_and_it_is_said_once(monkeypatch, shares, expected):
    looks = Looks(shares)
    done = []
    monkeypatch.setattr(cores, "waited", looks.waited)
    monkeypatch.setattr(cores, "IdleThreads", type("Recorded", (Recorded,), {"done": done}))
    cores.look_on(looks, lambda line: done.append("say"))
    assert done == expected


def watched_threads() -> list[str]:
    """Names of the threads that run while a command's `main` does."""
    names = []
    run_command(lambda: names.extend(thread.name for thread in threading.enumerate()))
    return names


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
def test_a_command_watches_its_cores_until_it_ends(undecided):
    assert cores.WATCHER in watched_threads()
    assert cores.WATCHER not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GOMP_SPINCOUNT", "1000"),
        ("OMP_WAIT_POLICY", "active"),
        ("OMP_NUM_THREADS", "2"),
        ("KMP_BLOCKTIME", "0"),
    ],
)
def test_a_command_leaves_threads_to_who_has_decided_about_them(undecided, name, value):
    undecided.setenv(name, value)
    assert cores.WATCHER not in watched_threads()
    assert os.environ[name] == value
