"""The associative memory by C++ of our own: what torch's chunked form gives, forward and back."""

import pytest
import torch

from layers import memory, passes
from layers.memory import recall
from layers.passes import recall_by_library

pytestmark = pytest.mark.skipif(
    passes.LIBRARY.get() is None, reason=f"no library: {passes.LIBRARY.missing()}"
)


LEAST = 0.25  # as much as a third of what the rates below forget


def inputs(heads: int, length: int, width: int) -> list[torch.Tensor]:
    """Projections, rates, taps, and what came before, of three texts."""
    torch.manual_seed(length)
    inner = heads * width
    return [
        torch.randn(3, length, 2 * inner),
        torch.randn(3, length, 2 * inner),
        torch.randn(3, length, 2 * heads),
        torch.randn(2, 4, inner),
        torch.randn(3, 3, 2 * inner),
        torch.randn(3, heads, width, width),
    ]


def all_of(given: list[torch.Tensor], kind: torch.dtype) -> list[torch.Tensor]:
    """What `recall` gives of projections in `kind`, and the gradients of all inputs."""
    given = [x.to(kind) if n < 2 else x for n, x in enumerate(given)]
    given = [x.clone().requires_grad_() for x in given]
    *projections, keys, pairs = given
    read, state = recall(*projections, {"keys": keys, "pairs": pairs}, LEAST)
    results = [read, state["pairs"], state["keys"]]
    generator = torch.Generator().manual_seed(1)
    total = sum((r * torch.randn(r.shape, generator=generator).to(r)).sum() for r in results)
    return [*results, *torch.autograd.grad(total, given)]


@pytest.fixture
def torch_only(monkeypatch):
    """A function after which `recall` is torch's."""
    return lambda: monkeypatch.setattr(memory, "recall_by_library", lambda *tensors: None)


@pytest.mark.parametrize("kind, error", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    "heads, length, width", [(1, 64, 32), (2, 37, 16), (1, 5, 64), (3, 16, 32), (2, 1, 16)]
)
def test_it_gives_what_torch_gives_and_its_gradients(torch_only, kind, error, heads, length, width):
    given = inputs(heads, length, width)
    ours = all_of(given, kind)
    torch_only()
    expected = all_of(
        [x.to(kind).float() if n < 2 else x for n, x in enumerate(given)], torch.float
    )
    for got, wanted in zip(ours, expected, strict=True):
        assert (got - wanted).abs().max() <= error * wanted.abs().max()


def test_a_text_in_pieces_gives_the_same_bits_as_the_whole():
    *given, keys, pairs = inputs(2, 50, 32)
    whole, after = recall(*given, {"keys": keys, "pairs": pairs}, LEAST)
    projections, (taps,) = given[:3], given[3:]
    state = {"keys": keys, "pairs": pairs}
    parts = []
    for piece in zip(*(x.split([7, 1, 16, 26], dim=1) for x in projections), strict=True):
        read, state = recall(*piece, taps, state, LEAST)
        parts.append(read)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert all(torch.equal(state[name], after[name]) for name in after)


def test_what_a_text_gives_does_not_depend_on_the_texts_beside_it():
    given = inputs(2, 20, 16)
    both, _ = recall_by_library(*given, LEAST)
    one = [x if n == 3 else x[1:2] for n, x in enumerate(given)]
    alone, _ = recall_by_library(*one, LEAST)
    assert torch.equal(both[1:2], alone)


def test_the_result_does_not_depend_on_the_number_of_threads():
    given = inputs(2, 40, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = all_of(given, torch.float32)
        torch.set_num_threads(2)
        two = all_of(given, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))


def test_it_is_taken_for_what_the_library_reads_and_nothing_else():
    given = inputs(1, 4, 32)
    assert recall_by_library(*given, LEAST) is not None
    for i in range(len(given)):  # a single one that is unlike what the library reads
        for other in (given[i].double(), given[i].bfloat16(), given[i][:1], given[i].to("meta")):
            assert recall_by_library(*given[:i], other, *given[i + 1 :], LEAST) is None
    assert recall_by_library(*inputs(1, 4, 31), LEAST) is None
    assert recall_by_library(*inputs(1, 0, 32), LEAST) is None
