"""research/cuda.py makes trainers that step, on whatever device there is."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from research import cuda


def test_a_trainer_of_random_tokens_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(cuda, "TOKENS", 2000)
    trainer = cuda.make_trainer(
        "configs/best-small.json", 60, tmp_path, C=16, ngram_slots=20, block_size=32
    )
    loss, norm = trainer.take_step()
    assert loss.isfinite() and norm.isfinite() and trainer.step == 1


@pytest.mark.parametrize("name", ["cuda", "cuda_decoding"])
def test_without_a_gpu_it_says_so_in_a_line(name, tmp_path):
    command = [sys.executable, "-m", f"research.{name}"]
    process = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "no CUDA GPU" in process.stderr and not list(tmp_path.iterdir())
