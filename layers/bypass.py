"""The bypass: a summary of all the text so far, (B, T, C), which is added to every scale of the
wavelet's coefficients.

RunningMean is the released network's, MovingAverage its gated alternative (decompose_bypass_ema).
Both carry state."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import Config
from layers.state import BlockState, remember


class RunningMean(nn.Module):
    """m_t = mean(x_0 … x_t), in fp32. A stream's state also has a ring of the last block_size
    inputs, and then the mean is over those: a model has never seen the mean of more positions than
    a training window has."""

    def __init__(self, config: Config):
        super().__init__()
        self.window, self.width = config.block_size, config.C

    def start(self, rows: int, like: Tensor, stream: bool) -> BlockState:
        state = {"count": like.new_zeros(rows, dtype=torch.int64)}
        # entries join and leave the sum for ever: fp64 keeps their rounding errors from adding up
        if stream:
            state["ring"] = like.new_zeros(rows, self.window, self.width, dtype=torch.float32)
        state["sum"] = like.new_zeros(
            rows, self.width, dtype=torch.float64 if stream else torch.float32
        )
        return state

    def forward(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        length, new_state = x.size(1), {"count": state["count"] + x.size(1)}
        # n: (B, T)
        change, n = (
            x.float(),
            state["count"][:, None] + torch.arange(1, length + 1, device=x.device),
        )
        if "ring" in state:
            joined, new_state["ring"] = remember(state["ring"], change)
            change, n = change.double() - joined[:, :length], n.clamp(max=self.window)
        total = state["sum"][:, None] + change.cumsum(1)
        new_state["sum"] = total[:, -1].clone()
        return (total / n[..., None]).to(x.dtype), new_state


class MovingAverage(nn.Module):
    """m_t = f_t·m_{t−1} + (1 − f_t)·x_t with f_t = σ(ema_gate(x_t)) per channel, in fp32."""

    def __init__(self, config: Config):
        super().__init__()
        self.ema_gate = nn.Linear(config.C, config.C)
        nn.init.zeros_(self.ema_gate.weight)
        nn.init.zeros_(self.ema_gate.bias)

    def start(self, rows: int, like: Tensor, stream: bool) -> BlockState:
        return {"mean": like.new_zeros(rows, self.ema_gate.in_features, dtype=torch.float32)}

    def forward(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        with torch.autocast(x.device.type, enabled=False):
            forget = torch.sigmoid(
                F.linear(x.float(), self.ema_gate.weight.float(), self.ema_gate.bias.float())
            )
        mean = (1 - forget) * x.float()
        mean = torch.cat([mean[:, :1] + forget[:, :1] * state["mean"][:, None], mean[:, 1:]], dim=1)
        # Hillis–Steele scan: after the pass with shift d, `mean` sums the last 2d terms and
        # `forget` is their product.
        shift = 1
        while shift < x.size(1):
            mean = mean + forget * F.pad(mean, (0, 0, shift, 0))[:, : x.size(1)]
            forget = forget * F.pad(forget, (0, 0, shift, 0))[:, : x.size(1)]
            shift *= 2
        return mean.to(x.dtype), {"mean": mean[:, -1].clone()}


class Bypass(nn.Module):
    """Adds context = m + M·m₋ to each scale's coefficients, weighted per channel; m₋ is the block
    below's mean."""

    def __init__(self, config: Config):
        super().__init__()
        self.average = MovingAverage(config) if config.decompose_bypass_ema else RunningMean(config)
        self.history_gains = nn.Parameter(torch.zeros(config.scales, config.C))
        # The first block has nothing below it: its M is used (and trained) only when
        # loop_iterations > 1.
        self.cross_layer_mix = nn.Linear(config.C, config.C, bias=False)
        nn.init.eye_(self.cross_layer_mix.weight).data.mul_(0.5)

    def forward(
        self, x: Tensor, below: Tensor | None, state: BlockState
    ) -> tuple[Tensor, Tensor, BlockState]:
        """Returns the biases (S, B, T, C), this block's mean (B, T, C) for the block above, and the
        new state."""
        mean, state = self.average(x, state)
        context = mean if below is None else mean + self.cross_layer_mix(below)
        return context * self.history_gains[:, None, None], mean, state
