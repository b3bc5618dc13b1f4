"""C++ of our own, compiled when it is first needed and kept in the user's cache.

Where it cannot be made (no C++ compiler, another system than Linux, a CPU without AVX2) torch does
the same, slower, and `NativeLibrary.missing` says why, which generate.py and train.py print.
WAVELETLM_KERNELS=torch asks for that.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from common.command import InputError
from common.files import cache_folder, written_whole

# No -march=native: the file may be kept in a home that several machines share. No -ffast-math,
# which would let the compiler change the order of sums.
FLAGS = ["-O3", "-mavx2", "-mfma", "-std=c++17", "-fopenmp", "-fPIC"]
# Besides, where torch finds AVX-512, which is all of these (not with ATEN_CPU_CAPABILITY=avx2).
WIDE_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
SWITCH = "WAVELETLM_KERNELS"  # an environment variable: "torch" for torch's kernels alone


class Unavailable(Exception):
    """A library cannot be had here; the message says why."""


def flags_here() -> list[str]:
    """The compiler's flags for this CPU."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return FLAGS
    return [*FLAGS, *WIDE_FLAGS, *["-mavx512vnni"] * torch.cpu._is_vnni_supported()]


def check_ours(path: Path) -> None:
    """Raises `Unavailable` where others could have put their code: what is loaded is executed."""
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(f"{path} is another user's, or others may write it")


def compiled(source: Path) -> Path:
    """The library of a C++ file, compiled now unless an earlier process did it. Raises
    `Unavailable`."""
    try:
        compiler = shlex.split(os.environ.get("CXX") or "g++")
    except ValueError:
        compiler = []
    if not compiler or shutil.which(compiler[0]) is None:
        raise Unavailable(f"there is no C++ compiler {os.environ.get('CXX') or 'g++'}")
    flags = flags_here()
    # A home may be shared by machines whose C libraries differ.
    parts = " ".join([*compiler, *flags, *platform.libc_ver()])
    key = hashlib.sha256(parts.encode() + source.read_bytes()).hexdigest()
    path = cache_folder() / f"{source.stem}-{key[:16]}.so"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_ours(path.parent)
    if path.exists():
        check_ours(path)
        return path
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made.o")
        linked = Path(folder, "made.so")
        # Linked without OpenMP's library, whose functions are then those that torch has loaded: a
        # second one would have threads of its own, which would wait against torch's.
        for step in ([*flags, "-c", source, "-o", made], ["-shared", made, "-o", linked]):
            command = [*compiler, *map(str, step)]
            # in any language and encoding
            done = subprocess.run(command, check=False, capture_output=True, errors="replace")
            if done.returncode:
                line = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
                raise Unavailable(f"{compiler[0]} cannot compile {source.name}: {line}")
        # for this user alone, whatever the umask
        with written_whole(path, mode=0o700) as beside:
            beside.write_bytes(linked.read_bytes())
    return path


class NativeLibrary:
    """The functions of a C++ file, loaded at the first use."""

    def __init__(self, source: Path, declare: Callable[[ctypes.CDLL], None]):
        """declare: gives the loaded library's functions their arguments' types."""
        self.source = source
        self.declare = declare
        # Two threads would compile at once, and declare twice.
        self.loading = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Has the next use look again whether it can be had."""
        self.found: tuple[ctypes.CDLL | None, str] | None = None

    def get(self) -> ctypes.CDLL | None:
        """The library, or None where it cannot be had."""
        return self._found()[0]

    def missing(self) -> str:
        """Why it cannot be had here; empty where it can."""
        return self._found()[1]

    def _found(self) -> tuple[ctypes.CDLL | None, str]:
        with self.loading:
            if self.found is None:
                self.found = self._load()
            return self.found

    def _load(self) -> tuple[ctypes.CDLL | None, str]:
        if os.environ.get(SWITCH) == "torch":
            return None, f"{SWITCH} is torch"
        try:
            has_avx2 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
            if sys.platform != "linux" or platform.machine() != "x86_64" or not has_avx2:
                raise Unavailable("they are for Linux on x86-64 with AVX2")
            if not torch.backends.openmp.is_available():
                raise Unavailable("this torch is without OpenMP")
            library = ctypes.CDLL(str(compiled(self.source)))
        except (Unavailable, InputError) as error:
            return None, str(error)
        except OSError as error:  # no room for the file, or one that the loader refuses
            return None, f"the library cannot be made or loaded ({error})"
        self.declare(library)
        return library, ""
