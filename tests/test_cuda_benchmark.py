"""benchmarks/cuda.py makes trainers that step, on whatever device there is."""

import importlib.util
from pathlib import Path

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
