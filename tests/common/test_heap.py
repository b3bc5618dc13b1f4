"""Memory that a process keeps: what it frees and needs again costs no page again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from common.heap import DECIDED_BY

ROOT = Path(__file__).resolve().parents[2]
# Ten pieces of 4 MiB are written and freed, twenty times; prints the pages that the system gave in
# the last ten.
SCRIPT = """
import resource
from common.heap import keep_freed_memory
print(keep_freed_memory())
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(20):
    if turn == 10:
        before = pages()
    pieces = [b"x" * 2**22 for _ in range(10)]
    del pieces
print(pages() - before)
"""
PAGES = 10 * 10 * 2**22 // 4096  # that were written in ten turns


def kept_and_pages(**variables: str) -> tuple[bool, int]:
    """Whether a process keeps what it frees, and the pages that it was given."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in DECIDED_BY} | variables,
        check=True,
        capture_output=True,
        text=True,
    )
    kept, pages = done.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not with glibc")
def test_memory_that_was_freed_is_used_again_unless_the_user_decides():
    kept, pages = kept_and_pages()
    assert kept and pages < PAGES / 20
    kept, pages = kept_and_pages(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept and pages > PAGES / 2
