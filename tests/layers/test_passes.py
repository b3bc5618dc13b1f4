"""Passes over memory by C++ of our own: what torch gives, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCAB, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from layers import passes
from layers.lags import (
    CausalFilter,
    HaarState,
    causal_filter,
    gated_haar,
    haar_of_scales,
    torch_haar_state,
)
from layers.loss import linear_cross_entropy
from layers.memory import AssociativeMemory
from model import SquaredReLU, build_model, weighted_sum

pytestmark = pytest.mark.skipif(
    passes.LIBRARY.get() is None, reason=f"no library: {passes.LIBRARY.missing()}"
)
KINDS = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # and the error that rounding may leave


def near(got: torch.Tensor, expected: torch.Tensor, kind: torch.dtype) -> bool:
    got, expected = got.float(), expected.float()
    return (got - expected).abs().max() <= KINDS[kind] * expected.abs().max()


def all_near(got, expected, kind) -> bool:
    return all(near(a, b, kind) for a, b in zip(got, expected, strict=True))


def logits_and_targets(kind: torch.dtype, rows: int = 9, words: int = 333):
    torch.manual_seed(rows)
    return (5 * torch.randn(rows, words)).to(kind), torch.randint(words, (rows,))


# ===== The loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [1, 7, 16, 333, 2048, 60_001])
def test_errors_are_the_gradient_of_the_cross_entropy(kind, words):
    logits, targets = logits_and_targets(kind, words=words)
    given = logits.double().requires_grad_()
    nats = F.cross_entropy(given, targets, reduction="none")
    (error,) = torch.autograd.grad(nats.sum(), given)
    assert near(passes.errors_by_library(logits, targets), nats.detach(), torch.float32)
    assert (logits.float() - error).abs().max() <= KINDS[kind]


def test_logits_of_any_size_are_taken_without_an_overflow():
    logits = torch.tensor([[1e30, -1e30, 0.0], [-3e38, -3e38, -3e38], [88.0, 89.0, -200.0]])
    targets = torch.tensor([0, 1, 1])
    expected = F.cross_entropy(logits, targets, reduction="none")
    nats = passes.errors_by_library(logits, targets)
    torch.testing.assert_close(nats, expected)
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(kind, wrong):
    """A step whose loss is no number is left out by the trainer, which must see that."""
    for place in (0, 100):
        logits, _ = logits_and_targets(kind)
        logits[4, place] = wrong
        nats = passes.errors_by_library(logits, torch.zeros(9, dtype=torch.int64))
        assert not nats[4].isfinite() and not logits[4].isfinite().all()
        assert nats[:4].isfinite().all() and nats[5:].isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 333])
def test_a_target_that_is_no_word_is_an_error(wrong):
    logits, targets = logits_and_targets(torch.float32)
    targets[3] = wrong
    with pytest.raises(IndexError, match="targets"):
        passes.errors_by_library(logits, targets)


# ===== The filter, and the wavelet with its gates


@pytest.mark.parametrize("taps, length, width", [(4, 13, 20), (4, 1, 128), (1, 5, 3), (9, 2, 17)])
def test_a_filter_gives_what_torch_gives_and_its_gradients(taps, length, width):
    torch.manual_seed(length)
    given = [torch.randn(3, taps - 1 + length, width), torch.randn(taps, width)]
    given = [x.requires_grad_() for x in given]
    weights = torch.randn(3, length, width)

    def all_of(out):
        return [out, *torch.autograd.grad((out * weights).sum(), given)]

    ours = all_of(passes.filter_by_library(*given))
    assert all_near(ours, all_of(CausalFilter.apply(*given, length)), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "length, widths", [(37, (5, 16, 20, 3)), (3, (32,) * 5), (64, (17, 1)), (1, (7, 9))]
)
def test_the_gated_wavelet_gives_what_torch_gives_and_its_gradients(kind, length, widths):
    """Also of texts that are shorter than a level's lag, and of widths of all kinds."""
    torch.manual_seed(length)
    positions = 2 ** (len(widths) - 1) - 1
    given = [torch.randn(3, length, 2 * sum(widths)), torch.randn(3, positions, sum(widths))]
    weights = torch.randn(3, length, sum(widths))

    def all_of(function, kind):
        inputs = [x.to(kind).requires_grad_() for x in given]
        out = function(*inputs, widths)
        return [out, *torch.autograd.grad((out * weights.to(kind)).sum(), inputs)]

    def by_torch(both, before, widths):
        values, gates = both.chunk(2, dim=-1)
        return haar_of_scales(values, before, widths) * F.silu(gates)

    ours = all_of(passes.gated_haar_by_library, kind)
    # against fp32: torch rounds to bf16 between the wavelet and the gates besides
    assert all_near(ours, all_of(by_torch, torch.float32), kind)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 14, 15, 16, 40])
def test_what_the_wavelet_remembers_is_what_torch_remembers_with_its_gradients(length):
    torch.manual_seed(length)
    given = [torch.randn(2, length, 6).requires_grad_(), torch.randn(2, 15, 6).requires_grad_()]
    weights = torch.randn(2, 15, 6)

    def all_of(function):
        after = function(*given, 4)
        return [after, *torch.autograd.grad((after * weights).sum(), given)]

    assert passes.takes_haar_state(*given, 4)
    assert all_near(all_of(HaarState.apply), all_of(torch_haar_state), torch.float32)


# ===== Squared ReLU, and sums of the residual stream


@pytest.mark.parametrize("kind", KINDS)
def test_squared_relu_gives_what_torch_gives_and_its_gradient(kind):
    torch.manual_seed(0)
    x = torch.randn(5, 77).to(kind).requires_grad_()
    weights = torch.randn(5, 77).to(kind)
    ours, expected = passes.squared_relu_by_library(x), F.relu(x).square()
    assert near(ours, expected, kind)
    of_ours, of_expected = (torch.autograd.grad((y * weights).sum(), x) for y in (ours, expected))
    assert all_near(of_ours, of_expected, kind)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3000, 3)])
def test_a_weighted_sum_gives_what_torch_gives_and_its_gradients(shape, monkeypatch):
    torch.manual_seed(0)
    parts = [torch.randn(shape), torch.randn(shape).bfloat16(), torch.randn(shape)]
    weights = [torch.tensor(0.5), torch.tensor(-2.0)]
    given = [x.requires_grad_() for x in (*parts, *weights)]
    wanted = torch.randn(shape)

    def all_of(total):
        return [total, *torch.autograd.grad((total * wanted).sum(), given)]

    def by_torch(terms):
        with monkeypatch.context() as patch:
            patch.setattr(passes.LIBRARY, "get", lambda: None)
            return weighted_sum(*terms)

    terms = list(zip([*weights, 0.25], parts, strict=True))
    expected = all_of(sum(weight * x.float() for weight, x in terms))
    for total in (passes.weighted_sum_by_library(terms), by_torch(terms)):
        for got, want in zip(all_of(total), expected, strict=True):
            assert got.dtype == want.dtype
            assert near(got, want, got.dtype)


@pytest.mark.parametrize("size", [3, 300])  # of a gradient that the system takes back when freed
@pytest.mark.parametrize("function", [torch.sum, lambda x: (x.mT * x.mT).sum()])
def test_a_gradient_may_lie_in_memory_as_it_likes(size, function, monkeypatch):
    """A sum's gradient is one number, read again and again, and a transposed one is transposed."""
    torch.manual_seed(0)
    x = torch.randn(size, 43, 2 * size).requires_grad_()
    before, taps = torch.randn(size, 1, size), torch.randn(4, 2 * size)

    def all_of():
        filtered = causal_filter(x, taps, 40)
        mixed = gated_haar(x, before, (1, size - 1), F.silu)
        outputs = [filtered, mixed, SquaredReLU()(x), weighted_sum((0.5, x), (2.0, x))]
        return [torch.autograd.grad(function(y), x)[0] for y in outputs]

    ours = all_of()
    monkeypatch.setattr(passes.LIBRARY, "get", lambda: None)
    assert all_near(ours, all_of(), torch.float32)


def test_the_result_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    given = [torch.randn(5, 2000, 2 * 40), torch.randn(5, 1, 40), torch.randn(5, 2003, 40)]
    given = [x.requires_grad_() for x in (*given, torch.randn(4, 40), torch.tensor(0.3))]

    def all_of(threads):
        torch.set_num_threads(threads)
        both, before, x, taps, weight = given
        mixed = passes.gated_haar_by_library(both, before, (10, 30))
        filtered = passes.squared_relu_by_library(passes.filter_by_library(x, taps))
        total = passes.weighted_sum_by_library([(weight, mixed), (1.0, filtered)])
        logits, targets = logits_and_targets(torch.bfloat16)
        nats = passes.errors_by_library(logits, targets)
        return [total, logits, nats, *torch.autograd.grad(total.square().sum(), given)]

    before = torch.get_num_threads()
    try:
        one, two = all_of(1), all_of(2)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))


# ===== Which inputs it takes


def test_it_takes_what_it_can_read_and_nothing_else():
    x, taps = torch.randn(2, 8, 4), torch.randn(4, 4)
    assert passes.filter_by_library(x, taps) is not None
    for wrong in (x.double(), x.bfloat16(), x.to("meta"), x[:0], x[:, :3]):
        assert passes.filter_by_library(wrong, taps) is None
    assert passes.filter_by_library(x, taps[:, :1]) is None  # taps that all channels share
    both, widths = torch.randn(2, 8, 2 * 5), (2, 3)
    before = torch.randn(2, 1, 5)
    assert passes.gated_haar_by_library(both, before, widths) is not None
    for wrong in (before.double(), before.to("meta"), before.bfloat16(), before[:1]):
        assert passes.gated_haar_by_library(both, wrong, widths) is None
    assert passes.gated_haar_by_library(both[..., :9], before, widths) is None
    terms = [(torch.tensor(2.0), x), (1.0, x)]
    assert passes.weighted_sum_by_library(terms) is not None
    for wrong in (x.double(), x.half(), x.to("meta"), x[:1]):
        assert passes.weighted_sum_by_library([*terms, (1.0, wrong)]) is None
    for wrong in (taps, torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0).bfloat16()):
        assert passes.weighted_sum_by_library([(wrong, x), *terms]) is None
    assert passes.weighted_sum_by_library([(1.0, x.bfloat16()), *terms]) is None
    assert passes.squared_relu_by_library(x.double()) is None
    logits, targets = logits_and_targets(torch.float32)
    assert passes.errors_by_library(logits.half(), targets) is None
    assert passes.errors_by_library(logits[:, ::2], targets) is None
    for wrong in (targets.int(), targets[1:], targets.to("meta"), targets[:, None]):
        assert passes.errors_by_library(logits, wrong) is None
    assert passes.takes_haar_state(both, torch.randn(2, 3, 10), 2)
    for wrong in (torch.randn(2, 1, 10), torch.randn(1, 3, 10), torch.randn(2, 3, 9)):
        assert not passes.takes_haar_state(both, wrong, 2)


def narrow() -> dict:
    """A network that all of the library is of use to."""
    return {
        "wavelet_mode": "haar", "decompose_bypass": False, "low_rank": 0,
        "mixer_gate_input": "stream", "cross_scale_gating": False, "mlp_taps": 4,
        "recall_heads": 1, "recall_dim": 16, "recall_horizon": 8, "levels": 2,
        "mlp_activation": "relu2",
        # whose choice of slots changes with a rounding
        "pkm_enabled": False, "fwpkm_enabled": False,
        "per_scale_mixer_widths": [0.25, 0.5, 0.25],
    }  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
def test_a_network_learns_the_same_with_and_without_the_library(monkeypatch, bf16):
    """And uses all of it."""
    ids = torch.randint(VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))
    used = set()
    call = passes.call

    def watched(function, *arguments):
        used.add(function)
        call(function, *arguments)

    def gradients(kind=bf16):
        torch.manual_seed(0)
        model = build_model(tiny(**narrow()), VOCAB)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind):
            loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    monkeypatch.setattr(passes, "call", watched)
    ours = gradients()
    both_ways = ["causal_filter", "gated_haar", "squared_relu", "weighted_sum", "recall"]
    backward = {f"{name}_backward" for name in both_ways}
    assert used == {*both_ways, *backward, "error_of_logits", "haar_state"}
    monkeypatch.setattr(passes.LIBRARY, "get", lambda: None)
    exact = gradients(kind=False)
    for got, by_torch, expected in zip(ours, gradients(), exact, strict=True):
        # In bf16 what a rounding changes can be as large as a gradient: torch's is off as far.
        rounding = 2 * (by_torch - expected).norm() + (3e-2 if bf16 else 1e-4) * expected.norm()
        assert (got - expected).norm() <= rounding + 1e-9


def test_a_plan_of_a_network_with_it_needs_no_numbers():
    with FakeTensorMode():
        model = build_model(tiny(**narrow()), VOCAB)
        ids = torch.zeros(2, 8, dtype=torch.int64)
        loss, _ = model.loss(ids, ids)
        loss.backward()
    assert loss.shape == ()


def test_a_loss_without_gradients_is_the_same_and_makes_none(monkeypatch):
    h, weight = torch.randn(2, 3, 8), torch.randn(40, 8)
    targets = torch.randint(40, (2, 3))
    asked = []
    call = passes.call
    monkeypatch.setattr(passes, "call", lambda *given: asked.append(given) or call(*given))
    with torch.no_grad():
        loss = linear_cross_entropy(h, weight, targets)
    ((name, _, rows, words, want_errors, *_),) = asked
    assert (name, rows, words, want_errors) == ("error_of_logits", 6, 40, False)
    torch.testing.assert_close(
        loss, F.cross_entropy((h @ weight.T).flatten(0, 1), targets.flatten())
    )


def test_an_evaluation_keeps_nothing_for_a_way_back(monkeypatch):
    memory = AssociativeMemory(tiny(recall_heads=1, recall_dim=16))
    h = torch.randn(1, 5, tiny().C)
    asked = []
    call = passes.call
    monkeypatch.setattr(passes, "call", lambda *given: asked.append(given) or call(*given))
    with torch.no_grad():
        memory(h, memory.start(1, h))
    memory(h, memory.start(1, h))
    assert [given[-2] is None for given in asked if given[0] == "recall"] == [True, False]
