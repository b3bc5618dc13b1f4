"""The delta rule's kernels against torch's chunked form, by Triton's interpreter where there is no
GPU."""

import pytest
import torch

from layers import memory
from layers.delta_rule import DeltaRule


def inputs(device: str, texts: int, length: int, heads: int, width: int) -> list[torch.Tensor]:
    """q, k, v, log α, β and the matrix before, of so many texts."""
    with torch.device(device):
        q, k = memory.unit(torch.randn(texts, length, 2, heads, width)).unbind(2)
        both = torch.randn(texts, length, 2 * heads * width)  # of values and gates, as in `recall`
        v = both.chunk(2, dim=-1)[0].unflatten(-1, (heads, -1))
        log_alpha = -torch.rand(texts, length, heads)
        beta = torch.rand(texts, length, heads)
        pairs = torch.randn(texts, heads, width, width)
    return [q, k, v, log_alpha, beta, pairs]


def results(function, given: list[torch.Tensor], of_after: bool = True) -> list[torch.Tensor]:
    """What `function` gives, and the gradients of all inputs."""
    given = [x.detach().requires_grad_() for x in given]
    read, after = function(*given)
    generator = torch.Generator().manual_seed(1)
    total = (read * torch.randn(read.shape, generator=generator).to(read)).sum()
    if of_after:
        total = total + (after * torch.randn(after.shape, generator=generator).to(after)).sum()
    return [read, after, *torch.autograd.grad(total, given)]


@pytest.mark.parametrize(
    "texts, length, heads, width", [(2, 37, 2, 16), (1, 40, 1, 64), (2, 2, 3, 32), (1, 3, 1, 128)]
)
def test_it_gives_what_torch_gives_and_its_gradients(
    interpreted_triton, texts, length, heads, width
):
    given = inputs(interpreted_triton, texts, length, heads, width)
    ours = results(DeltaRule.apply, given)
    for got, wanted in zip(ours, results(memory.delta_rule, given), strict=True):
        assert (got - wanted).norm() <= 4e-6 * wanted.norm()


def test_the_gradient_of_the_matrix_after_a_text_may_be_missing(interpreted_triton):
    given = inputs(interpreted_triton, 1, 9, 1, 16)
    ours = results(DeltaRule.apply, given, of_after=False)
    expected = results(memory.delta_rule, given, of_after=False)
    for got, wanted in zip(ours, expected, strict=True):
        assert (got - wanted).norm() <= 4e-6 * wanted.norm()


@pytest.mark.parametrize("copied", [0, 1])
def test_queries_and_keys_may_lie_in_memory_in_other_ways(interpreted_triton, copied):
    given = inputs(interpreted_triton, 2, 9, 2, 16)
    expected = DeltaRule.apply(*given)
    given[copied] = given[copied].contiguous()  # the other one has gaps
    for got, wanted in zip(DeltaRule.apply(*given), expected, strict=True):
        assert torch.equal(got, wanted)


def test_no_positions_leave_the_matrix_as_it_is(interpreted_triton):
    given = inputs(interpreted_triton, 2, 0, 1, 16)
    read, after = DeltaRule.apply(*given)
    assert read.shape == (2, 0, 1, 16) and torch.equal(after, given[-1])


def test_a_text_in_pieces_gives_what_the_whole_gives(interpreted_triton):
    *given, pairs = inputs(interpreted_triton, 2, 21, 2, 16)
    whole, after = DeltaRule.apply(*given, pairs)
    parts = []
    for piece in zip(*(x.split([4, 1, 16], dim=1) for x in given), strict=True):
        part, pairs = DeltaRule.apply(*piece, pairs)
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert torch.equal(pairs, after)


def test_values_in_16_bits_have_gradients_in_16_bits(interpreted_triton):
    given = inputs(interpreted_triton, 1, 12, 2, 16)
    given[2] = given[2].bfloat16()
    ours = results(DeltaRule.apply, given)
    assert ours[4].dtype == torch.bfloat16
    wide = [x.float() for x in given]
    for got, wanted in zip(ours, results(memory.delta_rule, wide), strict=True):
        assert (got - wanted).norm() <= 1e-2 * wanted.norm()
