"""The gated delta rule by C++ of our own: what the chunked form gives, forward and backward."""

import pytest
import torch
from helpers import VOCAB, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from layers import delta_rule
from layers.delta_rule import DeltaRule
from layers.memory import delta_rule as chunked
from layers.memory import unit
from model import build_model

pytestmark = pytest.mark.skipif(
    delta_rule.LIBRARY.get() is None, reason=f"no library: {delta_rule.LIBRARY.missing()}"
)


def inputs(heads: int, length: int, width: int) -> list[torch.Tensor]:
    """q, k, v, log α, β, and a matrix before them, of three texts."""
    torch.manual_seed(length)
    q, k, v = torch.randn(3, 3, heads, length, width)
    log_alpha = -torch.rand(3, heads, length)
    beta = torch.rand(3, heads, length)
    pairs = torch.randn(3, heads, width, width)
    return [x.requires_grad_() for x in (unit(q), unit(k), v, log_alpha, beta, pairs)]


@pytest.fixture
def torch_only(monkeypatch):
    """delta_rule of memory.py by its chunked form."""
    monkeypatch.setattr("layers.memory.by_library", lambda *tensors: None)


@pytest.mark.parametrize(
    "heads, length, width", [(1, 64, 32), (2, 37, 16), (1, 5, 64), (3, 16, 32)]
)
def test_it_gives_what_the_chunked_form_gives_and_its_gradients(torch_only, heads, length, width):
    given = inputs(heads, length, width)
    weights = torch.randn(3, heads, length, width), torch.randn(3, heads, width, width)

    def all_of(function):
        results = function(*given)
        total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
        return [*results, *torch.autograd.grad(total, given)]

    for ours, expected in zip(all_of(DeltaRule.apply), all_of(chunked), strict=True):
        assert (ours - expected).abs().max() < 2e-6 * expected.abs().max()


def test_a_text_in_pieces_gives_the_same_bits_as_the_whole():
    *given, pairs = (x.detach() for x in inputs(2, 50, 32))
    whole, after = DeltaRule.apply(*given, pairs)
    parts = []
    for piece in zip(*(x.split([7, 16, 27], dim=2) for x in given), strict=True):
        out, pairs = DeltaRule.apply(*piece, pairs)
        parts.append(out)
    assert torch.equal(torch.cat(parts, dim=2), whole) and torch.equal(pairs, after)


def test_the_result_does_not_depend_on_the_number_of_threads():
    given = inputs(2, 40, 32)

    def all_of(threads):
        torch.set_num_threads(threads)
        out, after = DeltaRule.apply(*given)
        return [out, after, *torch.autograd.grad(out.sum() + after.sum(), given)]

    before = torch.get_num_threads()
    try:
        one, two = all_of(1), all_of(2)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))


def test_it_is_taken_for_fp32_on_a_cpu_of_the_sizes_that_it_has():
    given = [x.detach() for x in inputs(1, 4, 32)]
    assert delta_rule.takes(*given)
    for i in range(len(given)):  # a single one that is unlike what the library reads
        for other in (given[i].double(), given[i].bfloat16(), given[i][:1], given[i].to("meta")):
            assert not delta_rule.takes(*given[:i], other, *given[i + 1 :])
    assert not delta_rule.takes(*(x.detach() for x in inputs(1, 4, 31)))
    assert not delta_rule.takes(*(x.detach() for x in inputs(1, 0, 32)))


def test_a_plan_of_a_network_with_it_needs_no_numbers():
    config = tiny(recall_heads=1, recall_dim=16)
    with FakeTensorMode():
        model = build_model(config, VOCAB)
        ids = torch.zeros(2, 8, dtype=torch.int64)
        loss, _ = model.loss(ids, ids)
        loss.backward()
    assert loss.shape == ()
