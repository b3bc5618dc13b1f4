"""The project's own optimizer and loss scale, beside torch's, which compute the same one tensor at
a time; learning rates, and which parameters decay."""

import copy
import itertools

import pytest
import torch
from helpers import SMALL, random_ids, random_model, tiny
from torch import nn

from config import Config, make_config
from model import build_model
from training.optimizers import (
    BatchedMuon,
    LossScale,
    check_groups,
    clipped_step,
    clipping_divisor,
    gradient_norm,
    guarded_step,
    is_decayed,
    learning_rate,
    make_optimizers,
    orthogonal,
    put_rates_on,
    set_rate,
)

SHAPES = [(8, 8), (24, 8), (8, 8), (8, 24), (24, 8), (8, 8)]


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def close(
    ours: list[torch.Tensor],
    theirs: list[torch.Tensor],
    start: list[torch.Tensor],
    tolerance: float,
) -> bool:
    """Whether both have changed alike since `start`."""
    changes = [
        torch.cat([(a - b).flatten() for a, b in zip(each, start, strict=True)])
        for each in (ours, theirs)
    ]
    return ((changes[0] - changes[1]).norm() / changes[1].norm()).item() < tolerance


def test_batches_of_matrices_change_as_torch_changes_them_one_by_one(monkeypatch):
    # what torch.optim.Muon computes in
    monkeypatch.setattr("training.optimizers.wide_type", lambda device: torch.bfloat16)
    # so that three matrices of a shape are two batches
    monkeypatch.setattr(BatchedMuon, "AT_ONCE", 2 * 8 * 8)
    start = matrices()
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    batched = BatchedMuon([{"params": ours, "weight_decay": 0.1}], lr=0.02, momentum=0.95)
    plain = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1)
    for step in range(4):
        for params, optimizer in ((ours, batched), (theirs, plain)):
            give_gradients(params, step)
            optimizer.step()
    # bf16 has 8 bits; sums in another order differ in the last of them
    assert close(ours, theirs, start, 0.02)
    assert not close([2 * p for p in ours], theirs, start, 0.02)


@pytest.mark.parametrize("shape", [(12, 12), (30, 10), (10, 30)])
def test_singular_values_come_near_to_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, *shape)).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_momentum_is_of_each_matrix_and_a_restored_one_goes_on_alike():
    one, other = matrices(), matrices()
    first, second = (BatchedMuon([{"params": p}], lr=0.02, momentum=0.9) for p in (one, other))
    for step in range(2):
        give_gradients(one, step)
        first.step()
    for p, q in zip(one, other, strict=True):
        q.data.copy_(p.data)
        second.state[q]["momentum_buffer"] = first.state[p]["momentum_buffer"].clone()
    for step in range(2, 5):
        for params, optimizer in ((one, first), (other, second)):
            give_gradients(params, step)
            if step == 3:  # other matrices make up the batch then
                params[2].grad = None
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def test_a_matrix_without_a_gradient_stays():
    params = matrices()
    start = copy.deepcopy(params)
    give_gradients(params, 0)
    params[0].grad = None
    BatchedMuon([{"params": params, "weight_decay": 0.1}], lr=0.02, momentum=0.95).step()
    assert torch.equal(params[0], start[0])
    assert not any(torch.equal(p, q) for p, q in zip(params[1:], start[1:], strict=True))


def fused(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    made = {
        "Muon": lambda: BatchedMuon(
            [{"params": params, "weight_decay": 0.1}], lr=0.02, momentum=0.95
        ),
        "AdamW": lambda: torch.optim.AdamW(params, lr=0.01, fused=True),
        "Adagrad": lambda: torch.optim.Adagrad(params, lr=0.01, fused=True),
        "SGD": lambda: torch.optim.SGD(params, lr=0.01, momentum=0.9, fused=True),
        "not fused": lambda: torch.optim.AdamW(params, lr=0.01, foreach=True),
    }
    return made[name]()


@pytest.mark.parametrize("name", ["Muon", "AdamW", "Adagrad", "SGD", "not fused"])
def test_a_step_divides_the_gradients_and_a_bad_one_changes_nothing(name):
    whole, scaled = matrices(), matrices()
    optimizers = [fused(name, whole), fused(name, scaled)]
    for step in range(3):
        give_gradients(whole, step)
        guarded_step(optimizers[:1], torch.tensor(True), torch.tensor(1.0))
        give_gradients(scaled, step)
        for p in scaled:
            p.grad.mul_(64)
        guarded_step(optimizers[1:], torch.tensor(True), torch.tensor(64.0))
        before = copy.deepcopy(scaled), copy.deepcopy(optimizers[1].state_dict())
        scaled[1].grad[0, 0] = float("inf")
        guarded_step(optimizers[1:], torch.tensor(False), torch.tensor(float("nan")))
        assert all(torch.equal(p, q) for p, q in zip(scaled, before[0], strict=True))
        after = optimizers[1].state_dict()["state"]
        assert all(
            torch.equal(after[i][k], t) for i, s in before[1]["state"].items() for k, t in s.items()
        )
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(whole, scaled, strict=True))


def test_the_momentum_of_a_batch_stays_where_it_lies():
    """A CUDA graph reads and writes it there."""
    params = matrices()
    optimizer = BatchedMuon([{"params": params}], lr=0.02, momentum=0.9)
    places = []
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
        places.append([optimizer.state[p]["momentum_buffer"].data_ptr() for p in params])
    assert places[0] == places[1] == places[2]


@pytest.fixture
def nothing_is_zero_by_chance():
    """Within it torch fills memory that nobody has written with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def steps_of(
    name: str, losses_times: list[float], rates_lie_on_the_device: bool = False
) -> torch.Tensor:
    """The weights after a step of each loss times the number given, at rates that fall to 0.01."""
    config = tiny(optimizer=name, layers=1, lr=0.01, muon_lr=0.01, optimizer_eps=1e-8)
    model = random_model(config)
    optimizers = make_optimizers(model, config)
    if rates_lie_on_the_device:
        put_rates_on(torch.device("cpu"), optimizers)
    for left, times in zip(range(len(losses_times), 0, -1), losses_times, strict=True):
        (times * model.loss(random_ids(2, 16), random_ids(2, 16, 1))[0]).backward()
        set_rate(optimizers, 0.01 * left)
        clipped_step(model, optimizers, gradient_norm(model), 1.0)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["Muon", "AdamW", "Adagrad", "SGD"])
def test_a_first_step_that_is_bad_leaves_nothing_behind(name, nothing_is_zero_by_chance):
    assert torch.equal(steps_of(name, [float("inf"), 1.0, 1.0]), steps_of(name, [1.0, 1.0]))


@pytest.mark.parametrize("name", ["Muon", "AdamW", "Adagrad", "SGD"])
def test_rates_on_the_device_make_the_same_steps(name):
    torch.testing.assert_close(
        steps_of(name, [1.0] * 4, True), steps_of(name, [1.0] * 4), rtol=1e-5, atol=1e-6
    )


def test_a_scale_is_taken_from_torchs_save_too_and_nothing_else():
    theirs = torch.amp.GradScaler("cpu")
    theirs.scale(torch.zeros(1))
    for state in ({}, theirs.state_dict(), LossScale("cpu", True).state_dict()):
        assert LossScale.takes(state)
    for state in ({"scale": 1.0}, {"scale": "1", "_growth_tracker": 0}):
        assert not LossScale.takes(state)


def test_clipping_divides_down_to_the_norm_and_leaves_smaller_gradients_alone():
    assert clipping_divisor(torch.tensor(0.3), 1.0) == 1
    assert clipping_divisor(torch.tensor(7.0), 0) == 1
    assert torch.allclose(7 / clipping_divisor(torch.tensor(7.0), 0.5), torch.tensor(0.5))


def test_the_loss_scale_moves_as_torchs():
    ours, theirs = (
        LossScale("cpu", True),
        torch.amp.GradScaler("cpu", growth_interval=LossScale.PATIENCE),
    )
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.1)
    ours.good_steps.fill_(LossScale.PATIENCE - 3)
    theirs.scale(torch.zeros(1))  # makes its tensors
    theirs._growth_tracker.fill_(LossScale.PATIENCE - 3)
    for good in (True, True, True, True, False, True, False):
        p.grad = torch.tensor([1.0 if good else float("inf")])
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(good))
        assert ours.state_dict() == {key: theirs.state_dict()[key] for key in ours.state_dict()}
    again = LossScale("cpu", True)
    again.load_state_dict(theirs.state_dict())
    assert again.state_dict() == ours.state_dict()


# ===== Rates and groups


def test_the_learning_rate_warms_up_linearly_and_ends_at_the_lowest():
    config = Config(lr=0.01, min_lr=0.0002, warmup_fraction=0.3)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates[:5] == pytest.approx([0.0, 0.01 / 3, 0.02 / 3, 0.01, 0.009514747452721854])
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))
    assert learning_rate(10, 10, config) == pytest.approx(0.0002)


def test_the_trapezoid_holds_the_highest_rate_and_falls_linearly_to_zero():
    config = Config(lr=0.01, schedule="trapezoid", warmup_fraction=0.2, cooldown_fraction=0.4)
    rates = [learning_rate(step, 10, config) for step in range(11)]
    assert rates == pytest.approx(
        [0, 0.005, 0.01, 0.01, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025, 0]
    )


@pytest.mark.parametrize("name", ["Adagrad", "AdamW", "Muon", "SGD"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay_unless_asked(name):
    config = make_config(SMALL | {"optimizer": name, "weight_decay": 0.1}, "test")
    model = build_model(config, 50)
    optimizers = make_optimizers(model, config)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for part, decays in {
        "ln1.weight": 0,
        "history_gains": 0,
        "scale_routing": 0,
        "alpha_mlp": 0,
        "mixer.weight": 1,
    }.items():
        matching = [(n, p) for n, p in model.named_parameters() if n.endswith(part)]
        assert matching
        assert all((id(p) in decayed) == bool(decays) == is_decayed(n, p) for n, p in matching), (
            part
        )
    optimizers = make_optimizers(model, config.model_copy(update={"decay_all": True}))
    assert all(
        group["weight_decay"] == 0.1 for optimizer in optimizers for group in optimizer.param_groups
    )


def test_a_parameter_in_no_group_or_in_two_is_an_error_that_names_it():
    model = build_model(make_config(SMALL, "test"), 50)
    named = dict(model.named_parameters())
    with pytest.raises(ValueError, match="lm_head.weight is in 0"):
        check_groups(
            named, [torch.optim.SGD([p for name, p in named.items() if name != "lm_head.weight"])]
        )
    with pytest.raises(ValueError, match="token_embedding.weight is in 2"):
        check_groups(
            named,
            [torch.optim.SGD(named.values()), torch.optim.SGD([named["token_embedding.weight"]])],
        )
