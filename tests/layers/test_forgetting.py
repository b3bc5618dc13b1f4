"""How an associative memory forgets, by C++ of our own and by torch."""

import math

import pytest
import torch
from helpers import tiny

from common.command import InputError
from layers import memory, passes
from layers.memory import AssociativeMemory, recall

INNER = 16  # one head


@pytest.fixture(params=["library", "torch"])
def kind(request, monkeypatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(memory, "recall_by_library", lambda *tensors: None)
    elif passes.LIBRARY.get() is None:
        pytest.skip(f"no library: {passes.LIBRARY.missing()}")
    return request.param


def read(length: int, forget: float, write: float, pairs: torch.Tensor, least: float):
    """What `recall` gives of a random text whose rates are the same everywhere."""
    torch.manual_seed(0)
    projections = torch.randn(2, 1, length, 2 * INNER)
    rates = torch.tensor([forget, write]).expand(1, length, 2).contiguous()
    state = {"keys": torch.zeros(1, 3, 2 * INNER), "pairs": pairs}
    return recall(*projections, rates, torch.randn(2, 4, INNER), state, least)


@pytest.mark.parametrize("least", [0.0, 1 / 6])
def test_a_memory_that_would_keep_all_forgets_at_least_so_much(kind, least):
    pairs = torch.randn(1, 1, INNER, INNER)
    _, after = read(12, -30.0, -30.0, pairs, least)  # forgets nothing of its own, writes nothing
    torch.testing.assert_close(after["pairs"], pairs * math.exp(-12 * least))


def test_what_was_read_long_ago_does_not_matter_with_a_bound_and_does_without(kind):
    one, other = torch.randn(2, 1, 1, INNER, INNER)
    for least, gone in ((1 / 20, True), (0.0, False)):
        # writes so little that it replaces nothing
        reads = [read(400, -30.0, -12.0, pairs, least)[0][:, -1] for pairs in (one, other)]
        assert torch.allclose(*reads, atol=1e-5) == gone


def test_a_rate_that_is_no_number_shows(kind):
    results, _ = read(5, math.nan, 0.0, torch.zeros(1, 1, INNER, INNER), 0.1)
    assert results.isnan().any()


def test_the_bound_is_the_configs_and_there_is_none_unless_it_asks():
    given = {"recall_heads": 3, "recall_dim": 16}
    assert AssociativeMemory(tiny(**given)).least == 0
    bounded = AssociativeMemory(tiny(**given, recall_horizon=1000))
    assert bounded.least == pytest.approx(1 / 1000)
    with pytest.raises(InputError, match="recall_horizon"):
        tiny(**given, recall_horizon=-1)
