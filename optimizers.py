"""Optimizers, their parameter groups, the learning rate's course, and the average of the weights."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config import Config

# Two-dimensional, but gains and logits rather than matrices: decay would pull them towards a mixture nobody asked for.
NOT_MATRICES = ("history_gains", "scale_routing", "dilation_logits", "basis_weights", "original", "taps", "gains", "factors")
TABLES = (
    "token_embedding.weight",
    "feature_map",
    "lm_head.weight",
    "values.weight",
)  # rows to look up, not maps between channels


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, scalars, gains, logits or log-magnitudes."""
    return parameter.dim() >= 2 and name.rsplit(".", 1)[-1] not in NOT_MATRICES


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes it: a map between hidden channels, whose update may well be orthogonal. Not a table."""
    return parameter.dim() == 2 and is_decayed(name, parameter) and not name.endswith(TABLES)


def make_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """The optimizers of `config.optimizer`: two for Muon, else one. Each group's learning rate is `lr_scale` times the
    schedule's. Raises `ValueError` unless every parameter is in exactly one group."""
    named = dict(model.named_parameters())
    hidden = {name: p for name, p in named.items() if config.optimizer == "Muon" and is_hidden_matrix(name, p)}
    groups = _groups({name: p for name, p in named.items() if name not in hidden}, config)
    whole = not any(isinstance(p, DTensor) for p in named.values())  # shards have no kernels that look at found_inf
    rest = {"lr": config.lr, "eps": config.optimizer_eps}
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        decayed = {"weight_decay": config.weight_decay, "lr_scale": config.muon_lr / config.lr}
        matrices = [{"params": list(hidden.values()), **decayed}]
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_lr, momentum=config.momentum))
    if config.optimizer in ("AdamW", "Muon"):
        optimizers.append(torch.optim.AdamW(groups, betas=config.adam_betas, fused=whole, **rest))
    elif config.optimizer == "SGD":
        optimizers.append(torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=whole))
    else:
        on_cpu = all(p.device.type == "cpu" for p in named.values())  # Adagrad has a fused kernel there only
        optimizers.append(torch.optim.Adagrad(groups, fused=whole and on_cpu, **rest))
    check_groups(named, optimizers)
    return optimizers


def _groups(named: dict[str, nn.Parameter], config: Config) -> list[dict]:
    """Groups by decay and rate; scalars apart, since those of a sharded network stay whole and kernels take no mixture."""
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, p in named.items():
        scale = config.pkm_lr_scale if name.endswith("pkm.values.weight") else 1.0
        groups.setdefault((config.decay_all or is_decayed(name, p), p.dim() == 0, scale), []).append(p)
    return [
        {"params": params, "weight_decay": config.weight_decay if decays else 0.0, "lr_scale": scale}
        for (decays, _, scale), params in groups.items()
    ]


def check_groups(named: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> None:
    """Raises `ValueError`, naming it, when a parameter is in no group or in two."""
    grouped = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for name, p in named.items():
        if (count := grouped.count(id(p))) != 1:
            raise ValueError(f"{name} is in {count} optimizer groups; it must be in exactly one")


def step_if(good: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Steps where `good`, a bool scalar on the device, is true. Fused kernels look at it themselves, so the host need not
    wait for the device; the others (Muon, Adagrad on CUDA, any on shards) cost one wait."""
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~good).float()  # the names under which GradScaler hands them over
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif good:
        optimizer.step()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Gives every group the learning rate `rate`, in its own units."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate * group["lr_scale"]


def clipped_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], rate: float, grad_clip: float) -> None:
    """A step of all optimizers at learning rate `rate`, gradients clipped to a norm of `grad_clip` (0 = not), then cleared."""
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    set_rate(optimizers, rate)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimizers keep of each parameter, as `<parameter>:<what>`; the rest of them follows from the config."""
    states = {name: o.state[p] for name, p in model.named_parameters() for o in optimizers if p in o.state}
    return {f"{name}:{key}": t for name, state in states.items() for key, t in state.items() if t is not None}


def room_for_state(model: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors to read a saved optimizer state into: a parameter's shape and sharding, or a number."""
    named, room = dict(model.named_parameters()), {}
    for key, shape in shapes.items():
        group, _, name = key.partition(".")
        if group == "optimizer":
            p = named[name.rpartition(":")[0]].detach()
            room[name] = torch.zeros_like(p) if p.shape == shape else torch.zeros(shape)
    return room


def load_state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Puts back what `state_tensors` gave."""
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, what = key.rpartition(":")
        p = named[name]
        state = owner[id(p)].state[p]
        state[what] = tensor.to(state[what].device if what in state else p.device)


def rates(config: Config, lr: float) -> dict[str, float]:
    """lr, and the rates that go along with it in the proportions that they have in `config`, by their keys."""
    return {"lr": lr} | {key: getattr(config, key) * (lr / config.lr) for key in ("min_lr", "muon_lr")}


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The rate of optimizer step `step` (from 0): linear from 0 to lr over the warm-up, then by `config.schedule` half a
    cosine to min_lr, or lr itself until the cool-down, which is linear to 0."""
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return config.lr * step / warmup
    if config.schedule == "trapezoid":
        cooldown = max(1, int(config.cooldown_fraction * total_steps))
        return config.lr * min(1.0, (total_steps - step) / cooldown)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.lr - config.min_lr)


def warmup_steps(total_steps: int, config: Config) -> int:
    return int(config.warmup_fraction * total_steps)


class WeightAverage:
    """An exponential moving average of a network's weights: average ← d·average + (1 − d)·weights after each step.

    The first steps have a lower d, (1 + step) / (10 + step), so that the initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.weights = decay, dict(model.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the network has the average as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges values, not tensors: a shard of FSDP's stays what it was whatever its `data` is set to."""
        for name, p in self.weights.items():
            own, average = local(p), local(self.average[name])
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)
