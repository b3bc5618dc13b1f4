"""research/cuda.py makes trainers that step, on whatever device there is."""

import sys

import pytest
import torch

from common.command import run_command
from research import cuda, cuda_decoding


def test_a_trainer_of_random_tokens_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(cuda, "TOKENS", 2000)
    trainer = cuda.make_trainer(
        "configs/best-small.json", 60, tmp_path, C=16, ngram_slots=20, block_size=32
    )
    loss, norm = trainer.take_step()
    assert loss.isfinite() and norm.isfinite() and trainer.step == 1


@pytest.mark.parametrize("module", [cuda, cuda_decoding])
def test_without_a_gpu_it_says_so_in_a_line(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [module.__name__])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_command(module.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.splitlines()) == 1 and "no CUDA GPU" in error
    assert not list(tmp_path.iterdir())
