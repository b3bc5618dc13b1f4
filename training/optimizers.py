"""Optimizers, their parameter groups, the learning rate's course, and the average of the
weights."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.device import wide_type
from config import Config

# ===== Which parameter goes where

# Two-dimensional, but gains and logits rather than matrices: decay would pull them towards a
# mixture nobody asked for.
NOT_MATRICES = (
    "history_gains",
    "scale_routing",
    "dilation_logits",
    "basis_weights",
    "original",
    "taps",
    "gains",
)
TABLES = (
    "token_embedding.weight",
    "feature_map",
    "lm_head.weight",
    "values.weight",
)  # rows to look up, not maps between channels


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, scalars, gains, logits or
    log-magnitudes."""
    return parameter.dim() >= 2 and name.rsplit(".", 1)[-1] not in NOT_MATRICES


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes it: a map between hidden channels, whose update may well be orthogonal.
    Not a table."""
    return parameter.dim() == 2 and is_decayed(name, parameter) and not name.endswith(TABLES)


def make_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """The optimizers of `config.optimizer`: two for Muon, else one. Each group's learning rate is
    `lr_scale` times the schedule's. Raises `ValueError` unless every parameter is in exactly one
    group."""
    named = dict(model.named_parameters())
    hidden = {
        name: p
        for name, p in named.items()
        if config.optimizer == "Muon" and is_hidden_matrix(name, p)
    }
    groups = _groups({name: p for name, p in named.items() if name not in hidden}, config)
    whole = not any(isinstance(p, DTensor) for p in named.values())  # fused kernels take no shards
    rest = {"lr": config.lr, "eps": config.optimizer_eps}  # SGD has no epsilon
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        # The schedule is that of lr, so Muon's own rate is a multiple of it.
        decayed = {"weight_decay": config.weight_decay, "lr_scale": config.muon_lr / config.lr}
        matrices = [{"params": list(hidden.values()), **decayed}]
        kind = BatchedMuon if whole else torch.optim.Muon
        optimizers.append(kind(matrices, lr=config.muon_lr, momentum=config.momentum))
    if config.optimizer in ("AdamW", "Muon"):
        optimizers.append(torch.optim.AdamW(groups, betas=config.adam_betas, fused=whole, **rest))
    elif config.optimizer == "SGD":
        optimizers.append(
            torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=whole)
        )
        if whole and config.momentum:
            # A first step that is left out, which is common in fp16, would leave torch's fused
            # kernel with momentum that nobody has written. From zeros the first one that is taken
            # is the same as without any.
            for p in named.values():
                optimizers[-1].state[p]["momentum_buffer"] = torch.zeros_like(p)
    else:
        optimizers.append(torch.optim.Adagrad(groups, fused=whole, **rest))
        # torch before 2.13 has a fused Adagrad kernel for CUDA, but its optimizer asks for a CPU
        # all the same.
        optimizers[-1]._need_device_dtype_check_for_fused = False
    # One that is in no group would never learn, and nothing else would say so.
    check_groups(named, optimizers)
    return optimizers


# ===== Muon


class BatchedMuon(torch.optim.Optimizer):
    """Muon (Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024), as
    torch.optim.Muon computes it, with matrices of one shape in batches: hundreds of matrices cost
    some thirty kernels a batch in place of thirty each.

        B ← m·B + (1 − m)·g,  O = orthogonal((1 − m)·g + m·B),  W ← (1 − lr·decay)·W − lr·√max(1,
        rows/columns)·O

    Like a fused optimizer it takes `grad_scale` and `found_inf` (see `guarded_step`), so the host
    waits for nothing. State: `momentum_buffer` of each matrix, of which those of a batch are views
    of one tensor (n, rows, columns)."""

    # numbers in a batch at the most: 256 MB in fp32, of which a step holds three or four
    AT_ONCE = 2**26

    def __init__(self, params: list[dict], lr: float, momentum: float):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "fused": True}
        )

    @torch.no_grad()
    def step(self) -> None:
        """Changes every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            # All of one shape lie in one tensor, up to what the memory takes at a time.
            for shape, same in shapes.items():
                each = max(1, self.AT_ONCE // shape.numel())
                for i in range(0, len(same), each):
                    self._step_of(same[i : i + each], group)

    def _step_of(self, params: list[nn.Parameter], group: dict) -> None:
        """The step of a batch of matrices of one shape."""
        rows, columns = params[0].shape
        gradients = torch.stack([p.grad for p in params])  # (n, rows, columns)
        good = gradients.new_ones(())  # 1, or 0 where the step is to change nothing
        if (divisor := getattr(self, "grad_scale", None)) is not None:
            gradients.div_(divisor)
        if (bad := getattr(self, "found_inf", None)) is not None:
            good = 1 - bad
            gradients.masked_fill_(bad.bool(), 0.0)  # what is not finite stays so times zero
        buffers = self._buffers(params)
        buffers.lerp_(gradients, (1 - group["momentum"]) * good)
        update = orthogonal(gradients.lerp_(buffers, group["momentum"]))
        # as the weights lie: a fused pass wants that
        update = update.to(torch.float32, memory_format=torch.contiguous_format)
        rate = group["lr"] * good
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        update.mul_(rate * -math.sqrt(max(1, rows / columns)))
        torch._foreach_add_(params, list(update.unbind()))

    def _buffers(self, params: list[nn.Parameter]) -> Tensor:
        """The momentum of these matrices as one tensor (n, rows, columns). Each matrix's state is a
        view of it; where one is not yet (at the first step, after a restore, or when other matrices
        had gradients before) they are made so."""
        states = [self.state[p] for p in params]
        whole = getattr(states[0].get("momentum_buffer"), "_base", None)
        views = () if whole is None or len(whole) != len(params) else whole.unbind()
        own = [state.get("momentum_buffer") for state in states]
        if [view.data_ptr() for view in views] != [-1 if b is None else b.data_ptr() for b in own]:
            whole = torch.stack(
                [torch.zeros_like(p) if b is None else b for p, b in zip(params, own, strict=True)]
            )
            for state, view in zip(states, whole.unbind(), strict=True):
                state["momentum_buffer"] = view
        return whole


def orthogonal(g: Tensor) -> Tensor:
    """Matrices (n, rows, columns) brought near to orthogonal ones: five Newton–Schulz steps, x ←
    a·x + (b·A + c·A²)·x with A = x·xᵀ, bring their singular values to between about 0.7 and 1.2. In
    bf16, which they bear (Jordan, 2024), or in fp32 on a CPU that would only imitate it."""
    # Jordan's: the steepest at zero, where most singular values begin
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.size(1) > g.size(2)
    x = (g.mT if tall else g).to(wide_type(g.device))
    # no singular value is then above 1, so the steps converge
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# ===== Groups and rates


def put_rates_on(device: torch.device, optimizers: list[torch.optim.Optimizer]) -> None:
    """Has every group's learning rate, and what else a step reads, lie on `device`, so that a CUDA
    graph can take the step."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        # A number would be baked into the graph, and stay at its first step's.
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = True


def _groups(named: dict[str, nn.Parameter], config: Config) -> list[dict]:
    """Groups by decay; scalars apart, since those of a sharded network stay whole and kernels take
    no mixture."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in named.items():
        groups.setdefault((config.decay_all or is_decayed(name, p), p.dim() == 0), []).append(p)
    return [
        {"params": params, "weight_decay": config.weight_decay if decays else 0.0, "lr_scale": 1.0}
        for (decays, _), params in groups.items()
    ]


def check_groups(named: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> None:
    """Raises `ValueError`, naming it, when a parameter is in no group or in two."""
    grouped = [
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    for name, p in named.items():
        if (count := grouped.count(id(p))) != 1:
            raise ValueError(f"{name} is in {count} optimizer groups; it must be in exactly one")


# ===== A step


def guarded_step(optimizers: list[torch.optim.Optimizer], good: Tensor, divisor: Tensor) -> None:
    """A step of all optimizers where `good`, a bool scalar on the device, is true, with gradients
    divided by `divisor`, an fp32 scalar there: the loss scale times what clipping asks for.

    Fused kernels take both along in their one pass over the weights, so a gradient is read once
    more for its norm and never for the division, and the host need not wait for the device.
    Optimizers that shards need (no fused kernel takes a part of a tensor) cost a pass and a
    wait."""
    for optimizer in optimizers:
        if optimizer.defaults.get("fused"):
            # The names under which torch's own GradScaler hands these two over.
            optimizer.grad_scale = divisor
            optimizer.found_inf = (~good).float()
            optimizer.step()
            # A later call of `step` without them must not find these.
            del optimizer.grad_scale, optimizer.found_inf
        elif good:  # here the host waits for the device
            gradients = [
                p.grad
                for group in optimizer.param_groups
                for p in group["params"]
                if p.grad is not None
            ]
            torch._foreach_div_([local(gradient) for gradient in gradients], divisor)
            optimizer.step()


def clipping_divisor(norm: Tensor, grad_clip: float) -> Tensor:
    """What gradients of the norm `norm` are divided by so that theirs is at most `grad_clip` (0 =
    no clipping): at least 1."""
    if not grad_clip:
        return torch.ones_like(norm)
    # 1e-6: torch.nn.utils.clip_grad_norm_'s, so that both clip alike.
    return ((norm + 1e-6) / grad_clip).clamp(min=1.0)


class LossScale:
    """What a loss is multiplied by before its backward pass, so that fp16's small gradients do not
    vanish (Micikevicius et al., "Mixed precision training", 2018): halved after a step whose
    gradients overflowed, doubled after 2,000 good ones in a row, as torch's GradScaler does. It
    lies on the device and is changed there; the division is left to the optimizers' own pass."""

    # torch's GradScaler begins so and waits so long; a run of either can be resumed by the other.
    FIRST = 2.0**16
    PATIENCE = 2000  # good steps in a row before the scale is doubled
    # the names under which torch's GradScaler saves the two; it has more
    SAVED = ("scale", "_growth_tracker")

    def __init__(self, device: str, enabled: bool):
        self.enabled = enabled
        self.scale = torch.full((), self.FIRST if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, good: Tensor) -> None:
        """After a step whose gradients were all finite, or were not."""
        if not self.enabled:
            return
        counted = torch.where(good, self.good_steps + 1, 0)
        grows = counted == self.PATIENCE
        # In place, and without a branch: the host never learns whether the step was good.
        self.scale.mul_(torch.where(good, 1.0 + grows.float(), 0.5))
        self.good_steps.copy_(torch.where(grows, 0, counted))

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` takes, in plain numbers."""
        return (
            {"scale": self.scale.item(), "_growth_tracker": self.good_steps.item()}
            if self.enabled
            else {}
        )

    @classmethod
    def takes(cls, state: dict) -> bool:
        """Whether `state` is one to load: a GradScaler's too, and an empty one, of a run that had
        no use for a scale so far."""
        numbers = all(isinstance(value, (int, float)) for value in state.values())
        return numbers and (not state or all(name in state for name in cls.SAVED))

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.enabled and state:
            self.scale.fill_(state["scale"])
            self.good_steps.fill_(state["_growth_tracker"])


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Gives every group the learning rate `rate`, in its own units."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if isinstance(group["lr"], Tensor):  # a CUDA graph reads it where it lies
            group["lr"].fill_(rate * group["lr_scale"])
        else:
            group["lr"] = rate * group["lr_scale"]


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients of a network that one process holds whole: a scalar on its
    device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def clipped_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    norm: Tensor,
    grad_clip: float,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """A step of all optimizers with gradients of the norm `norm` clipped to `grad_clip` (0 = not),
    which are then cleared. `scale` is the loss scale that is still in them, and not in `norm`.
    Returns whether the step was taken, a bool scalar on the device: not where the norm is not
    finite."""
    good = norm.isfinite()
    guarded_step(optimizers, good, clipping_divisor(norm, grad_clip) * scale)
    # None rather than zeros: a parameter that the next step does not use is then left alone.
    model.zero_grad(set_to_none=True)
    return good


def step_at_rate(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], rate: float, grad_clip: float
) -> None:
    """A step at the learning rate `rate` with the gradients that a backward pass has left in a
    network that one process holds whole, without a loss scale; see `clipped_step`."""
    set_rate(optimizers, rate)
    clipped_step(model, optimizers, gradient_norm(model), grad_clip)


# ===== Saved states


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimizers keep of each parameter, as `<parameter>:<what>`; the rest of them follows
    from the config."""
    states = {
        name: o.state[p] for name, p in model.named_parameters() for o in optimizers if p in o.state
    }
    return {
        f"{name}:{key}": t
        for name, state in states.items()
        for key, t in state.items()
        if t is not None
    }


def room_for_state(model: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors to read a saved optimizer state into: a parameter's shape and sharding, or a
    number."""
    named = dict(model.named_parameters())
    room = {}
    for key, shape in shapes.items():
        group, _, name = key.partition(".")
        if group == "optimizer":
            p = named[name.rpartition(":")[0]].detach()
            # a moment is shaped and sharded like its parameter, a count of steps is one number
            room[name] = torch.zeros_like(p) if p.shape == shape else torch.zeros(shape)
    return room


def load_state_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Puts back what `state_tensors` gave."""
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, what = key.rpartition(":")
        p = named[name]
        state = owner[id(p)].state[p]
        # Counts of steps may lie on the CPU beside moments on a GPU: each goes where its like is.
        state[what] = tensor.to(state[what].device if what in state else p.device)


# ===== The learning rate's course


def rates(config: Config, lr: float) -> dict[str, float]:
    """lr, and the rates that go along with it in the proportions that they have in `config`, by
    their keys."""
    return {"lr": lr} | {
        key: getattr(config, key) * (lr / config.lr) for key in ("min_lr", "muon_lr")
    }


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The rate of optimizer step `step` (from 0): linear from 0 to lr over the warm-up, then by
    `config.schedule` half a cosine to min_lr, or lr itself until the cool-down, which is linear to
    0."""
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return config.lr * step / warmup
    if config.schedule == "trapezoid":
        # At least one step: a share of a short run may be none.
        cooldown = max(1, int(config.cooldown_fraction * total_steps))
        return config.lr * min(1.0, (total_steps - step) / cooldown)
    # from 0 after the warm-up to 1 at the end, where half a cosine's wave has gone by
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.lr - config.min_lr)


def warmup_steps(total_steps: int, config: Config) -> int:
    return int(config.warmup_fraction * total_steps)


# ===== The average of the weights


class WeightAverage:
    """An exponential moving average of a network's weights: average ← d·average + (1 − d)·weights
    after each step.

    The first steps have a lower d, (1 + step) / (10 + step), so that the initial weights are soon
    forgotten."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = dict(model.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        # As in TensorFlow's ExponentialMovingAverage: about the last ninth of the steps counts.
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
        """Exchanges values, not tensors: a shard of FSDP's stays what it was whatever its `data` is
        set to."""
        for name, p in self.weights.items():
            own = local(p)
            average = local(self.average[name])
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)
