"""benchmarks/cuda.py makes trainers that step, on whatever device there is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[1] / "benchmarks" / "cuda.py"


def load():
    spec = importlib.util.spec_from_file_location("cuda_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_trainer_of_random_tokens_steps(tmp_path, monkeypatch):
    benchmark = load()
    monkeypatch.setattr(benchmark, "DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(benchmark, "TOKENS", 2000)
    trainer = benchmark.make_trainer("configs/best-small.json", 60, tmp_path, C=16, ngram_slots=20, block_size=32)
    loss, norm = trainer.take_step()
    assert loss.isfinite() and norm.isfinite() and trainer.step == 1


@pytest.mark.parametrize("name", ["cuda", "cuda_decoding"])
def test_without_a_gpu_it_says_so_in_a_line(name, tmp_path):
    command = [sys.executable, FILE.with_name(f"{name}.py")]
    process = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "no CUDA GPU" in process.stderr and not list(tmp_path.iterdir())
