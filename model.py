"""The whole WaveletLM network, from its leaves to its root.

    ids → embedding (+ n-grams) → [ block ] × layers → LayerNorm → head → logits

    block:  running mean of x ──────────────┐ (bypass)
            x → LayerNorm → lifting wavelet → + → Hadamard → gated mixers → Hadamard
                                                           → inverse lifting → + x
            x → LayerNorm → MLP + memories → + x

Nothing here attends and nothing has a position. Only these look back: the lags of the lifting
wavelet, the running mean, and (if asked) a short filter before the MLP, fast weights, the
associative memory and the table of n-grams (layers/memory.py). What they need of the past is a
`State` of fixed size (layers/state.py), so one code path serves whole texts, chunks and single
tokens: `logits, state = model(ids, state)`.

What a config chooses is decided once, in `parts_of`: there a part that no shipped config switches
on comes in from layers/variants.py. A part that a network does not have is None.

Glossary
    B        batch: texts side by side
    T        positions of a text that are read at once
    C        channels of the residual stream
    P        channels of the coefficients: the next power of two ≥ C, for the Hadamard transform
    J        levels of the wavelet
    S        scales: J details and the approximation, S = J + 1; index 0 is the coarsest
    V        vocabulary
    N        positions of all texts, B·T
    w        width of a mixer, at most P
    stream   the residual stream x, (B, T, C), to which each branch of a block adds
    coefficients   what the wavelet makes of the stream, (S, B, T, P)
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.command import InputError
from common.device import autocast_type
from config import Config
from layers import variants
from layers.features import FeatureEmbedding
from layers.lags import (
    HaarCoefficients,
    ShortFilter,
    causal_filter,
    gated_haar,
    haar_of_scales,
    haar_reconstruction,
    haar_state,
)
from layers.loss import linear_cross_entropy
from layers.memory import AssociativeMemory, NgramEmbedding
from layers.passes import squared_relu_by_library, weighted_sum_by_library
from layers.state import BlockState, State, remember, start_of_lags

# ===== Hadamard transform of the channels


def hadamard(n: int) -> Tensor:
    """The orthonormal Sylvester–Hadamard matrix (n, n), n a power of two:
    H_2n = [[H, H], [H, −H]] / √2, H_1 = [1]. It is symmetric and its own inverse."""
    h = torch.ones(1, 1, device="cpu")  # a constant, even where weights are on the meta device
    while h.size(0) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / math.sqrt(n)


class WalshHadamard(nn.Module):
    """The orthonormal Walsh–Hadamard transform of the last dimension, (…, P) → (…, P), in natural
    order; its own inverse.

    H_P = H_a ⊗ H_b for P = a·b, so two small matrix products do it: 2·√P multiplications per
    channel in place of P, and faster on every device than log₂P butterfly passes over memory.
    """

    def __init__(self, width: int):
        super().__init__()
        a = 1 << (width.bit_length() - 1) // 2  # about √P, where a + b is least
        # Not persistent: constants of this size are not worth a place in checkpoints.
        self.register_buffer("left", hadamard(a), persistent=False)  # (a, a)
        self.register_buffer("right", hadamard(width // a), persistent=False)  # (b, b)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left.size(0), self.right.size(0)
        grid = x.reshape(-1, b) @ self.right  # (N·a, b): over the low bits of the channel
        return (self.left @ grid.view(-1, a, b)).view(x.shape)  # and over the high ones


NO_TRANSFORM = nn.Identity()  # for coefficients that are transformed already

# ===== Lifting wavelet


def lifting_net(config: Config, init: str, gain: float) -> nn.Module:
    """A Predict (gain 1) or Update (gain ½) network of one level, position-wise, P → P.

    Under `init` "haar" it starts as gain·identity (up to the GELU), so that an untrained lifting is
    close to Haar's wavelet.
    """
    width = config.padded_width
    hidden = width * config.lifting_hidden_mult
    if config.lifting_linear_only:
        net = last = nn.Linear(width, width)  # (P, P)
    else:
        first = nn.Linear(width, hidden)  # (hidden, P)
        last = nn.Linear(hidden, width)  # (P, hidden)
        net = nn.Sequential(first, nn.GELU(), nn.Dropout(config.lifting_dropout), last)
        nn.init.normal_(first.weight, std=0.01)  # small beside the identity below
        nn.init.zeros_(first.bias)
        if init == "haar":
            nn.init.eye_(first.weight.data[:width])  # further hidden units begin as noise
    if init == "haar":
        nn.init.eye_(last.weight).data.mul_(gain)
    elif init == "zero":
        nn.init.zeros_(last.weight)
    else:
        nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    return net


def update_nets(config: Config, init: str) -> nn.ModuleList:
    """The Update networks of all levels."""
    return nn.ModuleList(lifting_net(config, init, 0.5) for _ in range(config.levels))


class Lifting(nn.Module):
    """A causal, undecimated lifting wavelet: at level l each position is paired with the one 2^l
    before it ("odd"; the position's own input is "cur"):

        detail = (odd − Predict(cur)) / √2,  approx = (cur + Update(detail)) / √2,  cur ← approx

    after Sweldens, "The lifting scheme", 1998; here without subsampling, so that every position has
    its coefficients. With wavelet_crawl a level's lag is a learned mixture of wavelet_crawl_k lags
    around 2^l.
    """

    def __init__(self, config: Config, init: str):
        super().__init__()
        levels = range(config.levels)
        k = config.wavelet_crawl_k if config.wavelet_crawl else 1  # lags of a level
        self.width = config.padded_width
        self.first_lag = [max(1, 2**level - k // 2) for level in levels]  # the shortest of k
        self.longest_lag = [first + k - 1 for first in self.first_lag]
        self.dilation_logits = None  # (J, k), of the mixture
        if config.wavelet_crawl:
            self.dilation_logits = nn.Parameter(torch.zeros(config.levels, k))
            for level in levels:  # 5.0: at first 2^l has nearly all of the weight
                self.dilation_logits.data[level, 2**level - self.first_lag[level]] = 5.0
        self.odd_gates = variants.LagGates(config) if config.lifting_gate else None
        self.predict_nets = nn.ModuleList(lifting_net(config, init, 1.0) for _ in levels)
        self.update_nets = update_nets(config, init)

    def start(self, rows: int, like: Tensor) -> BlockState:
        """The inputs of each level that its lags reach back to; like: for type and device."""
        return start_of_lags(self.longest_lag, self.width, rows, like)

    def lagged(self, joined: Tensor, level: int, length: int) -> Tensor:
        """The last `length` positions of `joined` (B, longest lag + T, P), delayed."""
        if self.dilation_logits is None:
            return joined[:, :length]
        weights = self.dilation_logits[level].float().softmax(0).to(joined.dtype)  # (k,)
        return causal_filter(joined, weights.flip(0)[:, None], length)  # longest lag first

    def decompose(self, cur: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """(B, T, P) → coefficients (S, B, T, P), the approximation first, then the details from
        coarse to fine."""
        details = []
        new_state = {}
        for level in range(len(self.longest_lag)):
            joined, new_state[f"lag{level}"] = remember(state[f"lag{level}"], cur)
            odd = self.lagged(joined, level, cur.size(1))  # (B, T, P): the input 2^l before
            if self.odd_gates is not None:
                odd = self.odd_gates.open(level, odd, cur)
            # √2 keeps the coefficients as large as the input, level after level.
            detail = (odd - self.predict_nets[level](cur)) / math.sqrt(2)
            cur = (cur + self.update_nets[level](detail)) / math.sqrt(2)
            details.append(detail)
        return torch.stack([cur, *reversed(details)]), new_state  # (S, B, T, P)

    def reconstruct(self, u: Tensor, updates: nn.ModuleList | None = None) -> Tensor:
        """(S, B, T, P) → (B, T, P): undoes the approximation steps, cur ← √2·cur − Update(detail),
        position-wise, with the Update networks of the decomposition or a block's own `updates`."""
        cur = u[0]  # the approximation
        nets = reversed(self.update_nets if updates is None else updates)  # coarse to fine
        for detail, update in zip(u[1:], nets, strict=True):
            cur = math.sqrt(2) * cur - update(detail)
        return cur


class Haar(nn.Module):
    """The fixed Haar wavelet, without weights: detail = (cur − odd) / √2,
    approx = (cur + odd) / √2, in as few passes over memory as there can be (layers/lags.py)."""

    update_nets = None  # nothing is learned

    def __init__(self, config: Config):
        super().__init__()
        self.width = config.padded_width
        self.longest_lag = [2**level for level in range(config.levels)]
        # On its way through `reconstruct` a scale's power is halved once for each level below it,
        # so reconstruct(u) = Σ_s shares_s · u_s with shares (S,).
        halvings = [config.levels, *range(config.levels, 0, -1)]
        shares = torch.tensor([math.sqrt(0.5) ** n for n in halvings], device="cpu")
        self.register_buffer("shares", shares, persistent=False)

    def start(self, rows: int, like: Tensor) -> BlockState:
        return start_of_lags(self.longest_lag, self.width, rows, like)

    def decompose(self, cur: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """(B, T, P) → coefficients (S, B, T, P), as `Lifting.decompose` orders them."""
        pasts = [state[f"lag{level}"] for level in range(len(self.longest_lag))]
        c, *pasts = HaarCoefficients.apply(cur, *pasts)
        return c, {f"lag{level}": past for level, past in enumerate(pasts)}

    def joined(self, state: BlockState) -> Tensor:
        """All that `state` has of the wavelet, level by level, (B, 2^J − 1, P)."""
        return torch.cat([state[f"lag{level}"] for level in range(len(self.longest_lag))], dim=1)

    def state_after(self, h: Tensor, before: Tensor) -> BlockState:
        """The state after h (B, T, P), where `before` is what was `joined` before it."""
        pasts = haar_state(h, before, len(self.longest_lag)).split(self.longest_lag, dim=1)
        # copies, each of which may be kept without the others
        return {f"lag{level}": past.clone() for level, past in enumerate(pasts)}

    def reconstruct(self, u: Tensor, updates: None = None) -> Tensor:
        """(S, B, T, P) → (B, T, P): cur ← (cur + detail) / √2."""
        return haar_reconstruction(u)


# ===== Bypass: a summary of all the text so far, added to every scale's coefficients


class RunningMean(nn.Module):
    """m_t = mean(x_0 … x_t), in fp32.

    A stream's state also has a ring of the last block_size inputs, and then the mean is over those:
    a model has never seen the mean of more positions than a training window has.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.window = config.block_size
        self.width = config.C

    def start(self, rows: int, like: Tensor, stream: bool) -> BlockState:
        state = {"count": like.new_zeros(rows, dtype=torch.int64)}
        kind = torch.float32
        if stream:
            state["ring"] = like.new_zeros(rows, self.window, self.width, dtype=torch.float32)
            # Entries join and leave the sum for ever: fp64 keeps rounding errors from adding up.
            kind = torch.float64
        state["sum"] = like.new_zeros(rows, self.width, dtype=kind)
        return state

    def forward(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """x (B, T, C) → the means (B, T, C), and the new state."""
        length = x.size(1)
        new_state = {"count": state["count"] + length}
        change = x.float()  # what joins the sum at each position
        n = state["count"][:, None] + torch.arange(1, length + 1, device=x.device)  # (B, T)
        if "ring" in state:
            joined, new_state["ring"] = remember(state["ring"], change)  # (B, window + T, C)
            change = change.double() - joined[:, :length]  # and what leaves it
            n = n.clamp(max=self.window)
        total = state["sum"][:, None] + change.cumsum(1)  # (B, T, C)
        new_state["sum"] = total[:, -1].clone()
        return (total / n[..., None]).to(x.dtype), new_state


class Bypass(nn.Module):
    """Adds context = m + M·m₋ to each scale's coefficients, weighted per channel, where m is the
    average of this block's input and m₋ that of the block below."""

    def __init__(self, config: Config, average: nn.Module):
        super().__init__()
        self.average = average
        self.history_gains = nn.Parameter(torch.zeros(config.scales, config.C))  # at first none
        # The first block has nothing below it: its M is used (and trained) only when
        # loop_iterations > 1.
        self.cross_layer_mix = nn.Linear(config.C, config.C, bias=False)
        nn.init.eye_(self.cross_layer_mix.weight).data.mul_(0.5)  # M: half of what is below

    def forward(
        self, x: Tensor, below: Tensor | None, state: BlockState
    ) -> tuple[Tensor, Tensor, BlockState]:
        """x and the average below (B, T, C) → biases (S, B, T, C), this block's average for the
        block above (B, T, C), and the new state."""
        mean, state = self.average(x, state)
        context = mean if below is None else mean + self.cross_layer_mix(below)
        return context * self.history_gains[:, None, None], mean, state


# ===== Mixers: per scale, y = (W z) ⊙ act(G r) + U (Vᵀ z)


class Mixer(nn.Module):
    """The weights of one scale's mixer, of width w ≤ P. `MixerBank` uses them, for all scales at
    once."""

    def __init__(self, config: Config, width: int, bias: bool):
        super().__init__()
        outer = config.padded_width
        # W (w, w): at first the identity, and noise that tells equal channels apart
        self.mixer = nn.Linear(width, width, bias=False)
        self.mixer.weight.data = torch.eye(width) + 1e-3 * torch.randn(width, width)
        self.gate = None
        if config.use_mixer_gate:
            # G (w, w), or (w, P) where it reads the stream, which no proj_in narrows for it
            inputs = outer if config.mixer_gate_input == "stream" else width
            self.gate = nn.Linear(inputs, width, bias=False)
            nn.init.normal_(self.gate.weight, std=0.02)  # so small that all gates begin alike
        self.U = self.V = None
        if config.low_rank:
            # (w, rank) both: small beside W, but not zero, or neither would get a gradient
            self.U = nn.Parameter(0.01 * torch.randn(width, config.low_rank))
            self.V = nn.Parameter(0.01 * torch.randn(width, config.low_rank))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.proj_in = self.proj_out = None  # P → w and back; none for a mixer of full width
        if width != outer:
            self.proj_in = nn.Linear(outer, width, bias=False)
            self.proj_out = nn.Linear(width, outer, bias=False)
            # of such a size that what passes through keeps its own
            nn.init.normal_(self.proj_in.weight, std=1 / math.sqrt(outer))
            nn.init.normal_(self.proj_out.weight, std=1 / math.sqrt(width))


class MixerBank(nn.ModuleList):
    """One `Mixer` for each scale. Scales of one width that follow each other are a run, which is
    computed by one batched product.

    A transform H may be given with coefficients that it has not been applied to yet. It then goes
    into the weights, W (H c) = (W H) c, which have fewer rows than there are positions. Behind a
    mixer of full width it is applied to the positions.
    """

    def __init__(self, config: Config, bias: bool = False):
        shares = config.per_scale_mixer_widths or (1.0,) * config.scales
        widths = [int(config.padded_width * share) for share in shares]
        super().__init__(Mixer(config, width, bias) for width in widths)
        runs = itertools.groupby(range(config.scales), key=widths.__getitem__)
        members = [list(run) for _, run in runs]
        self.runs = [slice(run[0], run[-1] + 1) for run in members]  # of scales
        activations = {
            "silu": F.silu, "sigmoid": torch.sigmoid, "gelu": F.gelu, "relu": F.relu,
        }  # fmt: skip
        self.activation = activations[config.mixer_gate_activation]
        self.gates_read_stream = config.mixer_gate_input == "stream"

    @property
    def members(self) -> list[list[Mixer]]:
        """The mixers of each run."""
        return [list(self)[run] for run in self.runs]

    def by_run(self, x: Tensor) -> Sequence[Tensor]:
        """x (S, …) cut into its runs; whole where there is one, for even the gradient of a cut into
        one piece is a copy."""
        if len(self.runs) == 1:
            return [x]
        return x.split([run.stop - run.start for run in self.runs])

    def first_matrices(self, transform: nn.Module) -> tuple[Tensor, Tensor | None]:
        """W H of all mixers, one below the other, (Σw, P), and G H, for gates that read the stream.
        No mixer is of full width."""
        values = []
        for mixers in self.members:
            inward = self.inward(mixers, transform)  # (n, w, P)
            values.append((torch.stack([m.mixer.weight for m in mixers]) @ inward).flatten(0, 1))
        gates = None
        if self[0].gate is not None:
            gates = transform(torch.cat([m.gate.weight for m in self]))
        return torch.cat(values), gates

    def forward(self, z: Tensor, r: Tensor, transform: nn.Module = NO_TRANSFORM) -> Tensor:
        """z: what is mixed, r: what the gates read, both (S, N, P) → (S, N, P).

        transform: H where z and r are still to be transformed; the result is transformed back."""
        parts = []
        for mixers, y in zip(self.members, self.narrow(z, r, transform), strict=True):
            out = self.outward(mixers, transform)  # (n, w, P)
            parts.append(transform(y) if out is None else torch.bmm(y, out.to(y.dtype)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)  # (S, N, P)

    def narrow(self, z: Tensor, r: Tensor, transform: nn.Module) -> list[Tensor]:
        """For each run of n scales what its mixers make of z and r, of width w: (n, N, w)."""
        runs = zip(self.members, self.by_run(z), self.by_run(r), strict=True)
        return [self.mix(mixers, z_run, r_run, transform) for mixers, z_run, r_run in runs]

    def inward(self, mixers: Sequence[Mixer], transform: nn.Module) -> Tensor | None:
        """The matrices (n, w, P) from the coefficients to n mixers' width; None where that is the
        transform alone."""
        if mixers[0].proj_in is None:
            return None
        return transform(torch.stack([m.proj_in.weight for m in mixers]))

    def outward(self, mixers: Sequence[Mixer], transform: nn.Module) -> Tensor | None:
        """The matrices (n, w, P) from n mixers' width back to the coefficients; None where that is
        the transform alone."""
        if mixers[0].proj_out is None:
            return None
        return transform(torch.stack([m.proj_out.weight.mT for m in mixers]))

    def mix(self, mixers: Sequence[Mixer], z: Tensor, r: Tensor, transform: nn.Module) -> Tensor:
        """n mixers of one width w: z and r (n, N, P) → (n, N, w)."""
        first = mixers[0]  # of one width, all of them have the same parts
        inward = self.inward(mixers, transform)

        # `inward` without a type: torch 2.9 cannot compile a union in an inner function.
        def product(x: Tensor, weights: list[Tensor], inward=inward) -> Tensor:
            """x (n, N, P) by n matrices (out, w), into which the way to their width and the
            transform are multiplied: they have fewer rows than x has."""
            matrices = torch.stack(weights)  # (n, out, w)
            matrices = transform(matrices) if inward is None else matrices @ inward
            return torch.bmm(x, matrices.mT.to(x.dtype))  # (n, N, out)

        y = product(z, [m.mixer.weight for m in mixers])  # W z
        if first.gate is not None:  # ⊙ act(G r)
            way = None if self.gates_read_stream else inward  # such a gate has the full width
            y = y * self.activation(product(r, [m.gate.weight for m in mixers], way))
        if first.U is not None:
            u = torch.stack([m.U for m in mixers])  # (n, w, rank)
            # + U (Vᵀ z), which no gate closes
            y = y + torch.bmm(product(z, [m.V.mT for m in mixers]), u.mT.to(y.dtype))
        if first.bias is not None:
            y = y + torch.stack([m.bias for m in mixers])[:, None]
        return y


class Mixers(nn.Module):
    """The transform of the channels, a bank of mixers, and the transform back."""

    # Positions for each channel from which the transform is cheaper on weights than on positions.
    FOLDS_FROM = 4

    def __init__(self, config: Config, transform: nn.Module):
        super().__init__()
        self.transform = transform
        self.banks = nn.ModuleList([MixerBank(config)])  # one; variants.DeepMixers has several
        self.scale_routing = None
        if config.cross_scale_gating:
            self.scale_routing = nn.Parameter(torch.eye(config.scales))
        self.gates_read_stream = config.mixer_gate_input == "stream"
        shares = config.per_scale_mixer_widths or (1.0,)
        self.all_narrow = max(shares) < 1  # no mixer is of full width: see `folded`

    def read_by_gates(self, z: Tensor, h: Tensor) -> Tensor:
        """What the gates read of z (S, N, P) and the stream's norm h (N, P), which is transformed
        if z is: z itself, with cross_scale_gating r_s = Σ_s' R[s, s'] z_s', or h for each scale."""
        if self.gates_read_stream:
            return h.to(z.dtype).expand_as(z)
        if self.scale_routing is None:
            return z
        return (self.scale_routing.to(z.dtype) @ z.flatten(1)).view_as(z)

    def forward(self, c: Tensor, h: Tensor) -> Tensor:
        """Coefficients (S, N, P) of the stream's norm h (N, P) → (S, N, P)."""
        if c.size(1) >= self.FOLDS_FROM * c.size(2):  # many positions: the weights are fewer
            c = c.to(autocast_type(c))  # once, in place of once for each product that reads it
            return self.banks[0](c, self.read_by_gates(c, h), self.transform)
        z = self.transform(c)
        return self.transform(self.banks[0](z, self.read_by_gates(z, self.transform(h))))

    def folded(self, c: Tensor, h: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """For mixers that are all narrow: what makes Σ_s shares_s · forward(c, h)_s one product.

        c (S, N, P), h (N, P), shares (S,) → the mixers' outputs side by side (N, Σw), and the
        matrix (Σw, P) by which they are to be multiplied."""
        bank = self.banks[0]
        c = c.to(autocast_type(c))
        runs = bank.narrow(c, self.read_by_gates(c, h), self.transform)
        y = torch.cat([scale for run in runs for scale in run], dim=1)  # (N, Σw)
        return y, self.outward(shares)

    def outward(self, shares: Tensor) -> Tensor:
        """For mixers that are all narrow: the matrix (Σw, P) from their outputs side by side to the
        coefficients, each scale's by its share, shares (S,), summed over the scales."""
        bank = self.banks[0]
        out = [bank.outward(mixers, self.transform) for mixers in bank.members]
        by_run = zip(bank.by_run(shares), out, strict=True)
        weighted = [share[:, None, None] * matrices for share, matrices in by_run]  # (n, w, P)
        return torch.cat([matrices.flatten(0, 1) for matrices in weighted])


# ===== MLP and product-key memories


class SquaredReLU(nn.Module):
    """max(0, x)² (So et al., "Primer", 2021): a CPU makes it in a fraction of a GELU's time."""

    def forward(self, x: Tensor) -> Tensor:
        done = squared_relu_by_library(x)
        return F.relu(x).square() if done is None else done


def build_mlp(config: Config) -> nn.Sequential:
    """`mlp_layers` linear layers with mlp_activation between each two. With mlp_layers 1 there are
    two layers all the same, and nothing between them, as in the first implementation."""
    activation = {"gelu": nn.GELU, "relu2": SquaredReLU}[config.mlp_activation]
    width = config.C
    inner = config.C * config.mlp_expansion
    layers: list[nn.Module] = [nn.Linear(width, inner)]  # C → mlp_expansion · C
    for _ in range(config.mlp_layers - 2):
        layers += [activation(), nn.Linear(inner, inner)]
    if config.mlp_layers > 1:
        layers.append(activation())
    last = nn.Linear(inner, width)
    last.weight.data.mul_(0.02)  # starts as almost nothing beside the residual stream
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last, nn.Dropout(config.dropout_mlp))


def best_slots(
    query: Tensor, keys_a: Tensor, keys_b: Tensor, pairs: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The top_k slots of each head of a product-key memory, whose k² slots are pairs of keys.

    query (N, heads·d), keys of its halves (heads, k, d/2), pairs (2, n) of the ranks that can be
    among the best → slots (N, heads·top_k), numbered on from head to head, and their softmax
    weights.
    """
    heads, side, _ = keys_a.shape
    best = min(top_k, side)  # of each half, as many as can be needed
    query_a, query_b = query.view(query.size(0), heads, 2, -1).unbind(2)  # (N, heads, d/2)
    score_a, index_a = torch.einsum("nhd,hkd->nhk", query_a, keys_a).topk(best)
    score_b, index_b = torch.einsum("nhd,hkd->nhk", query_b, keys_b).topk(best)
    i, j = pairs  # ranks of a best key of each half
    score, rank = (score_a[..., i] + score_b[..., j]).topk(top_k)  # (N, heads, top_k)
    slot = (index_a[..., i] * side + index_b[..., j]).gather(-1, rank)
    # Each head has slots of its own, after those of the heads before it.
    slot = slot + side**2 * torch.arange(heads, device=query.device)[:, None]
    return slot.flatten(1), score.float().softmax(-1).flatten(1)


class ProductKeyMemory(nn.Module):
    """K = k² values per head, found by two codebooks of k keys each (Lample et al., "Large memory
    layers with product keys", 2019): a query's halves are scored against them, and the score of a
    slot is the sum of its two keys' scores."""

    def __init__(self, config: Config, slots: int, top_k: int, heads: int):
        super().__init__()
        side = math.isqrt(slots)  # k
        half = config.C // heads // 2
        self.heads = heads
        self.slots = slots
        self.best_per_half = min(top_k, side)
        self.top_k = min(top_k, self.best_per_half**2)
        self.query_proj = nn.Linear(config.C, config.C, bias=False)
        # 0.02 here and below, as GPT-2's embeddings begin
        self.keys_a = nn.Parameter(0.02 * torch.randn(heads, side, half))
        self.keys_b = nn.Parameter(0.02 * torch.randn(heads, side, half))
        self.values = nn.EmbeddingBag(heads * slots, config.C, mode="sum")
        nn.init.normal_(self.values.weight, std=0.02)
        # Of the pairs of the i-th and j-th best halves, (i+1)(j+1) score at least as high: only
        # pairs with (i+1)(j+1) ≤ top_k can be among the best top_k. For top_k = 32 that leaves 119
        # sums of 1,024.
        ranks = range(self.best_per_half)
        pairs = [(i, j) for i in ranks for j in ranks if (i + 1) * (j + 1) <= self.top_k]
        # (2, pairs); a constant, even where weights are on the meta device
        self.register_buffer(
            "pairs", torch.tensor(pairs, device="cpu").T.contiguous(), persistent=False
        )

    def lookup(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h (N, C) → the rows of `values` that it reads and their weights, (N, heads·top_k)."""
        query = self.query_proj(h)
        return best_slots(query, self.keys_a, self.keys_b, self.pairs, self.top_k)

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        slot, weight = self.lookup(h.flatten(0, 1))  # (N, heads·top_k) both
        values = self.values.weight  # (heads·slots, C)
        weight = weight.to(values.dtype)
        # Σ weight · value in one kernel: no (N, heads·top_k, C) is ever made.
        read = F.embedding_bag(slot, values, mode="sum", per_sample_weights=weight)  # (N, C)
        return read.view_as(h)


class FastWeightMemory(ProductKeyMemory):
    """A product-key memory whose values v_i + Δ_i each text rewrites at inference, if
    fwpkm_inference_updates asks: after each chunk of n tokens one gradient step on Δ towards
    predicting the next hidden state, Δ ← Δ − lr·∇_Δ MSE(lookup(h[:-1]), h[1:])."""

    def __init__(self, config: Config):
        super().__init__(config, config.fwpkm_num_keys, config.fwpkm_top_k, config.fwpkm_heads)
        self.writes = config.fwpkm_inference_updates
        self.lr = config.fwpkm_update_lr
        self.chunk = config.fwpkm_chunk_size  # n

    def start(self, rows: int, like: Tensor) -> BlockState:
        if self.training or not self.writes:  # an ordinary memory, without a state
            return {}
        slots, width = self.values.weight.shape
        return {
            "delta": like.new_zeros(rows, slots, width),
            "unwritten": like.new_zeros(rows, self.chunk, width),  # inputs of the chunk so far
            "held": like.new_zeros(rows, dtype=torch.int64),  # how many of them there are
        }

    def read(self, h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, t, C) → what it reads of each row's own v + Δ, the rows of the flattened Δ that it
        reads, their weights."""
        slot, weight = self.lookup(h.flatten(0, 1))  # (B·t, reads)
        row = torch.arange(h.size(0), device=h.device).repeat_interleave(h.size(1))  # (B·t,)
        own = slot + delta.size(1) * row[:, None]
        weight = weight.to(delta.dtype)
        values = self.values.weight
        read = F.embedding_bag(slot, values, mode="sum", per_sample_weights=weight)  # of v
        flat = delta.flatten(0, 1)  # (B·slots, C): every row's own Δ, one after the other
        read = read + F.embedding_bag(own, flat, mode="sum", per_sample_weights=weight)
        return read.view_as(h), own, weight

    def write(self, h: Tensor, delta: Tensor) -> Tensor:
        """A gradient step on Δ (B, slots, C) by the whole chunk h (B, n, C)."""
        read, own, weight = self.read(h[:, :-1], delta)
        wanted = h[:, 1:]  # what comes next is what a read should have given
        gradient = 2 * (read - wanted) / wanted[0].numel()  # of a row's mean squared error by read
        change = -self.lr * weight[..., None] * gradient.flatten(0, 1)[:, None]  # (B·t, reads, C)
        flat = delta.flatten(0, 1)
        return flat.index_add(0, own.flatten(), change.flatten(0, 1)).view_as(delta)

    def forward(self, h: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """h (B, T, C) → what it reads (B, T, C), and the new state."""
        if self.training or not self.writes:
            kept = {name: state[name] for name in ("delta", "unwritten", "held") if name in state}
            return super().forward(h), kept
        delta = state["delta"]
        unwritten = state["unwritten"]
        held = state["held"]
        reads = []
        # Piece by piece up to where the first row's chunk is full: rows may have begun at
        # different times.
        while h.size(1):
            room = self.chunk - int(held.max())  # asks the device: such a step is no CUDA graph
            piece, h = h.tensor_split([min(room, h.size(1))], dim=1)
            reads.append(self.read(piece, delta)[0])
            place = held[:, None] + torch.arange(piece.size(1), device=h.device)
            unwritten = unwritten.scatter(1, place[..., None].expand_as(piece), piece)
            # rows whose chunk is complete with this piece: they write, and begin a new one
            full = held + piece.size(1) == self.chunk
            if full.any():
                delta = torch.where(full[:, None, None], self.write(unwritten, delta), delta)
            held = (held + piece.size(1)).masked_fill(full, 0)
        return torch.cat(reads, dim=1), {"delta": delta, "unwritten": unwritten, "held": held}


# ===== What a config chooses


@dataclass(frozen=True)
class Parts:
    """How the parts of a network are made. Parts that it does not have are made as None."""

    embedding: Callable[[int], nn.Embedding]  # of so many words
    wavelet: Callable[[], nn.Module]
    inverse: Callable[[], nn.Module | None]  # Update networks of a block's own reconstruction
    bypass: Callable[[], Bypass | None]
    mixers: Callable[[], nn.Module]
    scale_norm: Callable[[], nn.Module | None]
    modulation: Callable[[], nn.Module | None]
    linear_behind: bool  # whether all that follows the mixers is linear: see `Block.folded_branch`


def parts_of(config: Config) -> Parts:
    """The one place where a config's choices become classes."""

    def transform() -> nn.Module:
        if config.mixer_transform == "identity":
            return nn.Identity()
        return WalshHadamard(config.padded_width)

    def embedding(vocab_size: int) -> nn.Embedding:
        kind = FeatureEmbedding if config.token_features else nn.Embedding
        return kind(vocab_size, config.C)

    def wavelet() -> nn.Module:
        if config.wavelet_mode == "packets":
            return variants.HaarPackets(config, hadamard)
        if config.wavelet_mode == "haar":
            return variants.GatedHaar(config) if config.lifting_gate else Haar(config)
        if config.multi_basis_lifting:
            bases = [Lifting(config, init) for init in config.multi_basis_inits]
            return variants.MultiBasis(config, bases)
        return Lifting(config, config.lifting_init)

    def inverse() -> nn.Module | None:
        if not config.untied_reconstruction:
            return None
        if config.multi_basis_lifting and config.wavelet_mode == "lifting":
            nets = [update_nets(config, init) for init in config.multi_basis_inits]
            return variants.InverseBases(config, nets)
        return update_nets(config, config.lifting_init)

    def bypass() -> Bypass | None:
        if not config.decompose_bypass:
            return None
        average = variants.MovingAverage if config.decompose_bypass_ema else RunningMean
        return Bypass(config, average(config))

    def mixers() -> nn.Module:
        if config.mixer_depth == 1 and not config.mixer_top_k:
            return Mixers(config, transform())
        return variants.DeepMixers(config, transform(), lambda bias: MixerBank(config, bias))

    return Parts(
        embedding=embedding,
        wavelet=wavelet,
        inverse=inverse,
        bypass=bypass,
        mixers=mixers,
        scale_norm=lambda: variants.ScaleNorm(config) if config.scale_norm else None,
        modulation=lambda: variants.CoarseModulation(config) if config.coarse_modulation else None,
        linear_behind=config.wavelet_mode == "haar"
        and not (config.lifting_gate or config.scale_norm or config.dropout_mixer),
    )


# ===== Block


def weighted_sum(*terms: tuple[Tensor | float, Tensor]) -> Tensor:
    """Σ weight · x over pairs of a weight, a number or a tensor of one, and x (…) of one shape."""
    done = weighted_sum_by_library(terms)
    if done is not None:
        return done
    (weight, x), *others = terms
    total = weight * x
    for weight, x in others:
        is_learned = isinstance(weight, Tensor)
        total = torch.addcmul(total, weight, x) if is_learned else total.add(x, alpha=weight)
    return total


class Block(nn.Module):
    """One block: a wavelet branch that mixes positions, then a position-wise memory branch, both
    added to the stream."""

    def __init__(self, config: Config, parts: Parts, after: int = 0):
        """after: how many blocks come after it."""
        super().__init__()
        width = config.C
        self.pad = config.padded_width - width
        # The wavelet branch
        self.bypass = parts.bypass()
        self.embedding_residual_gamma = None
        if config.per_layer_embedding:
            self.embedding_residual_gamma = nn.Parameter(torch.zeros(width))  # (C,)
        self.ln1 = nn.LayerNorm(width)  # before the wavelet
        self.ln2 = nn.LayerNorm(width)  # before MLP and memories
        self.scale_norm_in = parts.scale_norm()
        self.scale_norm_out = parts.scale_norm()
        self.coarse_modulation = parts.modulation()
        self.mixers = parts.mixers()
        self.dropout_mixer = nn.Dropout(config.dropout_mixer)
        self.scale_weights = nn.Parameter(torch.ones(config.scales))
        self.inverse_update_nets = parts.inverse()
        self.proj_out = None
        if not (config.skip_proj_out and self.pad == 0):
            self.proj_out = nn.Linear(config.padded_width, width)
            self.proj_out.weight.data.mul_(1e-3)  # the branch too starts as almost nothing
            nn.init.zeros_(self.proj_out.bias)
        self.folds = parts.linear_behind and self.mixers.all_narrow and not config.skip_proj_out
        # Whether all that is between the norm and the gates is linear, too: see `mapped_branch`.
        gate_reads_scales = config.use_mixer_gate and config.mixer_gate_input == "coefficients"
        parts_between = config.decompose_bypass or config.coarse_modulation or config.low_rank
        self.maps_first = self.folds and not (gate_reads_scales or parts_between)
        self.dropout_projection = nn.Dropout(config.dropout_projection)
        # The residual stream
        self.residual_alpha_spectral = self.residual_alpha_mlp = 1.0
        if config.learned_residual:
            self.residual_alpha_spectral = nn.Parameter(torch.tensor(1.0))
            self.residual_alpha_mlp = nn.Parameter(torch.tensor(1.0))
        # The memory branch
        self.ffwd = build_mlp(config) if config.mlp_expansion else None
        self.mlp_filter = ShortFilter(width, config.mlp_taps) if config.mlp_taps else None
        self.pkm = self.fwpkm = self.recall = None
        if config.pkm_enabled:
            slots, top_k = config.pkm_num_keys, config.pkm_top_k
            self.pkm = ProductKeyMemory(config, slots, top_k, config.pkm_heads)
        if config.fwpkm_enabled:
            self.fwpkm = FastWeightMemory(config)
        if config.recall_heads and after % config.recall_every == 0:
            self.recall = AssociativeMemory(config)
        branches = {
            "mlp": self.ffwd, "pkm": self.pkm, "fwpkm": self.fwpkm, "recall": self.recall,
        }  # fmt: skip
        for name, branch in branches.items():  # a learned factor of each, 1 at first
            alpha = None if branch is None else nn.Parameter(torch.tensor(1.0))
            self.register_parameter(f"alpha_{name}", alpha)

    def start(self, wavelet: nn.Module, rows: int, like: Tensor, stream: bool) -> BlockState:
        """The state at the start of `rows` texts; stream as in `WaveletLM.start`."""
        state = wavelet.start(rows, like)
        if self.bypass is not None:
            state |= self.bypass.average.start(rows, like, stream)
        for memory in (self.fwpkm, self.recall):
            if memory is not None:
                state |= memory.start(rows, like)
        if self.mlp_filter is not None:
            state["before_mlp"] = self.mlp_filter.start(rows, like)
        return state

    def padded(self, x: Tensor) -> Tensor:
        """x (…, C) with zeros for the channels up to P."""
        return F.pad(x, (0, self.pad)) if self.pad else x

    def forward(
        self, x: Tensor, e: Tensor, below: Tensor | None, wavelet: nn.Module, state: BlockState
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        """The stream x, the token embedding e, the average of the block below, all (B, T, C)
        → the new stream, this block's average (None without a bypass), the new state."""
        x, mean, looked_back = self.mix_positions(x, e, below, wavelet, state)
        x, written = self.remember_and_think(x, state)
        return x, mean, looked_back | written

    def mix_positions(
        self, x: Tensor, e: Tensor, below: Tensor | None, wavelet: nn.Module, state: BlockState
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        """The stream with what the wavelet branch adds to it; arguments as in `forward`."""
        bias = mean = None
        averages: BlockState = {}
        if self.bypass is not None:  # of the stream as it comes in, before the norm
            bias, mean, averages = self.bypass(x, below, state)  # bias (S, B, T, C)
        if self.embedding_residual_gamma is not None:
            x = x + self.embedding_residual_gamma * e
        h = self.padded(self.ln1(x))  # (B, T, P)
        if self.maps_first:
            gain, lags = self.mapped_branch(h, wavelet, state)  # (B, T, C)
        else:
            c, lags = wavelet.decompose(h, state)  # (S, B, T, P)
            if bias is not None:
                c = c + self.padded(bias)
            branch = self.folded_branch if self.folds else self.wavelet_branch
            gain = branch(c, h, wavelet)
        # "spectral": the first implementation's word for the wavelet branch
        x = weighted_sum((self.residual_alpha_spectral, x), (1.0, self.dropout_projection(gain)))
        return x, mean, lags | averages

    def mix(self, c: Tensor, h: Tensor) -> Tensor:
        """The coefficients (S, B, T, P) of h (B, T, P) mixed over channels."""
        before = c
        if self.scale_norm_in is not None:
            c = self.scale_norm_in(c)
        if self.coarse_modulation is not None:
            c = self.coarse_modulation(c)
        y = self.dropout_mixer(self.mixers(c.flatten(1, 2), h.flatten(0, 1)))  # (S, N, P)
        y = (y * self.scale_weights[:, None, None]).view_as(before)  # (S, B, T, P)
        return y if self.scale_norm_out is None else self.scale_norm_out(y)

    def wavelet_branch(self, c: Tensor, h: Tensor, wavelet: nn.Module) -> Tensor:
        """What the stream gains (B, T, C) from the coefficients (S, B, T, P) of h (B, T, P): mixed,
        reconstructed and projected."""
        cur = wavelet.reconstruct(self.mix(c, h), self.inverse_update_nets)  # (B, T, P)
        return cur if self.proj_out is None else self.proj_out(cur)

    def folded_branch(self, c: Tensor, h: Tensor, wavelet: nn.Module) -> Tensor:
        """The same where all that follows narrow mixers is linear: one product of their outputs
        side by side. So nothing of the size of the coefficients is written behind the mixers, nor
        in the backward pass until it is before them."""
        if self.coarse_modulation is not None:
            c = self.coarse_modulation(c)
        shares = self.scale_weights * wavelet.shares  # (S,)
        mixed, out = self.mixers.folded(
            c.flatten(1, 2), h.flatten(0, 1), shares
        )  # (N, Σw), (Σw, P)
        # Reconstruction and projection joined, (C, Σw): fewer numbers than there are positions.
        gain = F.linear(mixed, self.proj_out.weight @ out.mT, self.proj_out.bias)  # (N, C)
        return gain.unflatten(0, c.shape[1:3])

    def mapped_branch(
        self, h: Tensor, wavelet: nn.Module, state: BlockState
    ) -> tuple[Tensor, BlockState]:
        """`folded_branch` of the coefficients of h (B, T, P) where nothing reads them but the
        mixers' first matrices: these come before the wavelet. Returns what the stream gains,
        (B, T, C), and what the wavelet remembers."""
        bank = self.mixers.banks[0]
        values, gates = bank.first_matrices(self.mixers.transform)  # (Σw, P) both
        widths = tuple(mixer.mixer.weight.size(0) for mixer in bank)
        remembered = wavelet.joined(state)
        # The wavelet acts on positions and the matrices on channels, so these may come first.
        before = F.linear(remembered, values)  # (B, 2^J − 1, Σw)
        if gates is None:
            mixed = haar_of_scales(F.linear(h, values), before, widths)  # (B, T, Σw)
        else:
            # One product of what both read, twice as wide: 0.98 of a small network's step.
            both = F.linear(h, torch.cat([values, gates]))  # (B, T, 2·Σw)
            mixed = gated_haar(both, before, widths, bank.activation)
        out = self.mixers.outward(self.scale_weights * wavelet.shares)  # (Σw, P)
        gain = F.linear(mixed, self.proj_out.weight @ out.mT, self.proj_out.bias)  # (B, T, C)
        return gain, wavelet.state_after(h, remembered)

    def remember_and_think(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """The stream x (B, T, C) with what the memory branches make of its norm."""
        h = self.ln2(x)  # all branches read the same h, side by side
        terms = [(self.residual_alpha_mlp, x)]
        written: BlockState = {}
        if self.ffwd is not None:
            read = h
            if self.mlp_filter is not None:
                read, written["before_mlp"] = self.mlp_filter(h, state["before_mlp"])
            terms.append((self.alpha_mlp, self.ffwd(read)))
        if self.pkm is not None:
            terms.append((self.alpha_pkm, self.pkm(h)))
        if self.fwpkm is not None:
            read, new = self.fwpkm(h, state)
            terms.append((self.alpha_fwpkm, read))
            written |= new
        if self.recall is not None:
            read, new = self.recall(h, state)
            terms.append((self.alpha_recall, read))
            written |= new
        return weighted_sum(*terms), written


# ===== The network


class WaveletLM(nn.Module):
    """The language model: ids (B, T) int64 → logits (B, T, V), and a state."""

    loss_weight = 1.0  # what training multiplies the loss by before the backward pass

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        if config.loop_iterations > 1 and not isinstance(self, variants.Loops):
            raise InputError("loop_iterations: above 1 it takes build_model, not WaveletLM")
        self.config = config
        self.vocab_size = vocab_size
        self.recomputes = config.gradient_checkpointing
        self.loops = config.loop_iterations
        parts = parts_of(config)
        # stab_embed_scaling: √C undoes the scale that the table begins with
        self.embed_scale = math.sqrt(config.C) if config.stab("embed_scaling") else 1.0
        self.token_embedding = parts.embedding(vocab_size)
        # so that an embedding is about as long as 1, whatever C
        nn.init.normal_(self.token_embedding.weight, std=1 / math.sqrt(config.C))
        self.ngrams = NgramEmbedding(config) if config.ngram_slots else None
        self.dropout_embedding = nn.Dropout(config.dropout_embedding)
        count = 1 if config.looped_blocks else config.layers
        self.layers = nn.ModuleList(Block(config, parts, after) for after in reversed(range(count)))
        wavelets = 1 if config.shared_lifting_weights else count
        self.wavelets = nn.ModuleList(parts.wavelet() for _ in range(wavelets))
        self.final_ln = nn.LayerNorm(config.C)
        self.dropout_lm_head = nn.Dropout(config.dropout_lm_head)
        self.lm_head = nn.Linear(config.C, vocab_size, bias=False)  # (V, C)
        # of each block application in training: later ones are dropped more often
        rate, n = config.stochastic_depth_rate, config.applications
        self.drop_rates = [rate * i / n for i in range(n)]
        variants.rescale(self, config)
        variants.parametrise(self.layers, config)
        self.tie_weights()

    @property
    def cells(self) -> list["WaveletLM"]:
        """The networks that it is made of: itself."""
        return [self]

    def tie_weights(self) -> None:
        """Has embedding and head share their weight, if the config says so."""
        if self.config.tie_embedding_to_lm_head:
            self.lm_head.weight = self.token_embedding.weight

    def block(self, i: int) -> tuple[Block, nn.Module]:
        """The block that is applied i-th and its wavelet; looped blocks and shared wavelets are
        applied repeatedly."""
        return self.layers[i % len(self.layers)], self.wavelets[i % len(self.wavelets)]

    def start(self, rows: int, stream: bool = False) -> State:
        """The state at the start of `rows` texts. With stream its running mean is over the last
        block_size positions, for texts longer than that."""
        like = self.token_embedding.weight.detach()  # for type and device
        blocks = []
        for i in range(self.config.applications):
            block, wavelet = self.block(i)
            blocks.append(block.start(wavelet, rows, like, stream))
        embedding = {}
        if self.ngrams is not None:
            embedding["ids"] = self.ngrams.start(rows, like.device)
        return State(blocks, embedding)

    def embed(self, ids: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """The embedding of ids (B, T), (B, T, C), and what the embedding remembers."""
        e = self.token_embedding(ids)
        if self.embed_scale != 1.0:  # a product by one would be a pass over memory
            e = e * self.embed_scale
        if self.ngrams is None:
            return e, {}
        read, past = self.ngrams(ids, state["ids"])  # (B, T, C), (B, n − 1)
        return e + read, {"ids": past}

    def hidden(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the head reads, (B, T, C), and the state after ids (B, T)."""
        state = self.start(ids.size(0)) if state is None else state
        e, remembered = self.embed(ids, state.embedding)  # (B, T, C)
        x = self.dropout_embedding(e)
        below = None  # the average of the block below, for the bypass
        blocks = []
        for i, before in enumerate(state.blocks):
            x, below, after = self.apply_block(i, x, e, below, before)
            blocks.append(after)
        return self.dropout_lm_head(self.final_ln(x)), State(blocks, remembered)

    def apply_block(self, i: int, x: Tensor, e: Tensor, below: Tensor | None, state: BlockState):
        """Block application i: returns the new x, its average and its new state."""
        block, wavelet = self.block(i)
        if self.recomputes and self.training:  # gradient_checkpointing: memory for time
            applied = checkpoint(block, x, e, below, wavelet, state, use_reentrant=False)
        else:
            applied = block(x, e, below, wavelet, state)
        new_x, mean, new_state = applied
        if self.drop_rates[i] and self.training:
            # Computed and then discarded: simple, and one graph for torch.compile.
            dropped = torch.rand((), device=x.device) < self.drop_rates[i]
            new_x = torch.where(dropped, x, new_x)
            mean = mean if below is None else torch.where(dropped, below, mean)
        return new_x, mean, new_state

    def head_weight(self) -> Tensor:
        """(V, C): logits are hidden · head_weightᵀ."""
        return self.lm_head.weight

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """ids (B, T) int64 → logits (B, T, V), and the state after them. state None: a start."""
        hidden, state = self.hidden(ids, state)
        return F.linear(hidden, self.head_weight()), state  # (B, T, V)

    def loss(
        self, ids: Tensor, targets: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mean cross-entropy in nats over all targets (B, T), and the state after ids."""
        hidden, state = self.hidden(ids, state)
        return linear_cross_entropy(hidden, self.head_weight(), targets), state


class LoopedLM(variants.Loops, WaveletLM):
    """A WaveletLM whose blocks are passed through loop_iterations times."""


LanguageModel = WaveletLM | variants.MultinodalLM


def build_model(config: Config, vocab_size: int) -> LanguageModel:
    """The network that `config` asks for, over so many words."""
    if config.multinodal_enabled:
        return variants.MultinodalLM(config, vocab_size, WaveletLM)
    return (LoopedLM if config.loop_iterations > 1 else WaveletLM)(config, vocab_size)
