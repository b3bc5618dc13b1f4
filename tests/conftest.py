"""What pytest needs before any test: threads, seeds, and fixtures of several files."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, at their import

import json

from helpers import SHARED, SMALL


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
    lines = [
        f"The {i} bears of valley {i % 7} met the fox, who owed them {i * i % 13} pears.\n"
        for i in range(300)
    ]
    (tmp_path / "tale.txt").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "tale.txt"


@pytest.fixture
def settings(text, tmp_path):
    def make(**overrides):
        values = SMALL | {
            "dataset": str(text),
            "out_dir": str(tmp_path / "logs"),
            "cache_dir": str(tmp_path / "cache"),
        }
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values | overrides), encoding="utf-8")
        return path

    return make
