"""Optimizers, their parameter groups and the learning rate's course."""

import math

import torch
from torch import nn

from config import Config

# Two-dimensional, but gains and logits rather than matrices: decay would pull them towards a mixture nobody asked for.
NOT_MATRICES = ("history_gains", "scale_routing", "dilation_logits", "basis_weights", "original")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, scalars, gains, logits or log-magnitudes."""
    return parameter.dim() >= 2 and name.rsplit(".", 1)[-1] not in NOT_MATRICES


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of `config.optimizer` over every parameter of `model`, each in exactly one group."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if is_decayed(name, p)]
    others = [p for name, p in named if not is_decayed(name, p)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "AdamW":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.adam_betas, eps=config.optimizer_eps, fused=True)
    on_cpu = all(p.device.type == "cpu" for _, p in named)  # Adagrad has a fused kernel there only
    return torch.optim.Adagrad(groups, lr=config.lr, eps=config.optimizer_eps, fused=on_cpu)


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The rate of optimizer step `step` (from 0): linear from 0 to lr over the warm-up, then half a cosine to min_lr."""
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.lr - config.min_lr)


def warmup_steps(total_steps: int, config: Config) -> int:
    return int(config.warmup_fraction * total_steps)
