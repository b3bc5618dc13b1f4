"""What pytest needs before any test: threads, seeds, and fixtures of several files."""

import functools
import os
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, at their import

# Choices by timing would differ from run to run; tests of routes.py set it as they need it.
os.environ["WAVELETLM_ROUTES"] = "fixed"

from helpers import SHARED, write_settings, write_text


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the tensors are tiny: more threads only get in each other's way
    hypothesis.settings.register_profile(
        "repeatable", derandomize=True, deadline=None, database=None
    )
    hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """The folder of data and fixtures beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


@pytest.fixture
def text(tmp_path):
    """A file of a few thousand words with some regularity in it."""
    return write_text(tmp_path)


@pytest.fixture
def settings(text, tmp_path):
    """Writes a config for train.py, of `text` and with these keys changed."""
    return functools.partial(write_settings, tmp_path)


@pytest.fixture
def interpreted_triton(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of a test of Triton's kernels, "cpu" where they are interpreted; skips the test
    where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    # The interpreter turns arrays of one number into an int in a way that NumPy 2.4 no longer has.
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor

    def patched(tensor, *scope):  # with a scope from Triton 3.6 on
        before(tensor, *scope)
        put = scope[0].set_attr if scope else setattr
        put(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    return "cpu"
