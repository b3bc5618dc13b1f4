"""Which device --device means, and what is said where there is none."""

import pytest
import torch

from common.command import InputError
from common.device import chosen_device


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are so many CUDA GPUs; keeps which one was made the current one."""

    def pretend(count: int) -> list[int]:
        current: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return pretend


def test_without_a_gpu_auto_is_the_cpu_and_others_are_refused(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert chosen_device("auto") == chosen_device("cpu") == "cpu"
    for name in ("cuda", "cuda:0", "cuda:1", "mps"):
        with pytest.raises(InputError, match=r"device: there is no .*; take cpu"):
            chosen_device(name)


def test_a_gpu_is_taken_by_number_and_becomes_the_current_one(gpus):
    current = gpus(2)
    assert chosen_device("auto") == chosen_device("cuda") == "cuda" and current == []
    assert chosen_device("cuda:1") == "cuda:1" and current == [1]
    assert chosen_device("cpu") == "cpu"
    with pytest.raises(InputError, match=r"device: cuda:2 is not there; the last is cuda:1"):
        chosen_device("cuda:2")


def test_an_apple_gpu_is_taken_where_there_is_one(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert chosen_device("mps") == "mps" and chosen_device("auto") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:1x", "CPU", "xpu", ""])
def test_any_other_name_is_refused(name):
    with pytest.raises(InputError, match=r"device: .*; take auto, cpu, cuda, cuda:N or mps"):
        chosen_device(name)
