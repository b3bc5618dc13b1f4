"""The whole WaveletLM network, from its leaves to its root.

    ids → embedding (+ n-grams) → [ block ]×layers → LayerNorm → head → logits

    block:  running mean of x ──────────────┐ (bypass)
            x → LayerNorm → lifting wavelet → + → Hadamard → gated mixers → Hadamard → inverse
            lifting → + x
            x → LayerNorm → MLP + memories (memory.py) → + x

Nothing here attends and nothing has a position. Only these look back: the lags of the lifting
wavelet, the running mean, and (if asked) the memories that a text writes and the table of n-grams
(ngrams.py). What they need of the past is a `State` of fixed size (state.py), so one code path
serves whole texts, chunks and single tokens: `logits, state = model(ids, state)`.

Letters: B batch, T positions, C channels, P the next power of two ≥ C, J levels, S = J + 1 scales
(index 0 the coarsest), V vocabulary. Tensors are (B, T, channels), with the scales in front, (S, B,
T, P), between decomposition and reconstruction."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from common.device import autocast_type
from config import Config
from layers.bypass import Bypass
from layers.features import FeatureEmbedding
from layers.lags import CausalFilter, HaarCoefficients
from layers.loss import linear_cross_entropy
from layers.memory import AssociativeMemory, FastWeightMemory, ProductKeyMemory
from layers.ngrams import NgramEmbedding
from layers.state import BlockState, State, remember
from layers.transform import NO_TRANSFORM, build_transform, hadamard

# ===== Lifting wavelet


def lifting_net(config: Config, init: str, gain: float, level: int) -> nn.Module:
    """A Predict (gain 1) or Update (gain ½) network of one level, position-wise, P → P.

    Under `init` "haar" it starts as gain·identity (up to the GELU), so that an untrained lifting is
    close to Haar's."""
    width, hidden = config.padded_width, config.padded_width * config.lifting_hidden_mult
    if config.lifting_linear_only:
        net = last = nn.Linear(width, width)
    else:
        first, last = nn.Linear(width, hidden), nn.Linear(hidden, width)
        net = nn.Sequential(first, nn.GELU(), nn.Dropout(config.lifting_dropout), last)
        nn.init.normal_(first.weight, std=0.01)
        nn.init.zeros_(first.bias)
        if init == "haar":
            nn.init.eye_(first.weight.data[:width])
    if init == "haar":
        nn.init.eye_(last.weight).data.mul_(gain)
    elif init == "zero":
        nn.init.zeros_(last.weight)
    else:
        nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    if config.stab("lifting_level_scaling"):
        last.weight.data.div_(1 + 0.1 * level)
    return net


class Lifting(nn.Module):
    """A causal, undecimated lifting wavelet: at level l each position is paired with the one 2^l
    before it.

    odd = lagged cur [⊙ 2σ(Gate(cur))], detail = (odd − Predict(cur)) / √2, approx = (cur +
    Update(detail)) / √2, cur ← approx (after Sweldens, "The lifting scheme", 1998; here without
    subsampling, so that every position has its coefficients). wavelet_mode "haar" is the fixed
    wavelet detail = (cur − odd) / √2, approx = (cur + odd) / √2, without weights. Gate:
    lifting_gate, a linear map per level, zero at first."""

    def __init__(self, config: Config, init: str):
        super().__init__()
        levels = range(config.levels)
        self.fixed = config.wavelet_mode == "haar"
        crawls = config.wavelet_crawl and not self.fixed
        k = config.wavelet_crawl_k if crawls else 1
        self.first_lag = [max(1, 2**level - k // 2) for level in levels]
        self.longest_lag = [first + k - 1 for first in self.first_lag]
        self.width = config.padded_width
        self.dilation_logits = nn.Parameter(torch.zeros(config.levels, k)) if crawls else None
        if crawls:
            for level in levels:
                self.dilation_logits.data[level, 2**level - self.first_lag[level]] = 5.0
        self.odd_gates = None
        if config.lifting_gate:
            self.odd_gates = nn.ModuleList(nn.Linear(self.width, self.width) for _ in levels)
            for gate in self.odd_gates:
                nn.init.zeros_(gate.weight)
                nn.init.zeros_(gate.bias)
        self.predict_nets = self.update_nets = None
        if not self.fixed:
            self.predict_nets = nn.ModuleList(
                lifting_net(config, init, 1.0, level) for level in levels
            )
            self.update_nets = nn.ModuleList(
                lifting_net(config, init, 0.5, level) for level in levels
            )

    def start(self, rows: int, like: Tensor) -> BlockState:
        return {
            f"lag{level}": like.new_zeros(rows, n, self.width)
            for level, n in enumerate(self.longest_lag)
        }

    def lagged(self, joined: Tensor, level: int, length: int) -> Tensor:
        """The last `length` positions of `joined`, delayed by 2^level, or by the learned mixture of
        lags around it."""
        if self.dilation_logits is None:
            return joined[:, :length]
        weights = self.dilation_logits[level].float().softmax(0).to(joined.dtype)
        return CausalFilter.apply(joined, weights.flip(0)[:, None], length)  # the longest lag first

    def decompose(self, cur: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """(B, T, P) → coefficients (S, B, T, P), the approximation first, then the details from
        coarse to fine."""
        details, new_state = [], {}
        for level in range(len(self.longest_lag)):
            joined, new_state[f"lag{level}"] = remember(state[f"lag{level}"], cur)
            odd = self.lagged(joined, level, cur.size(1))
            if self.odd_gates is not None:
                odd = odd * (2 * torch.sigmoid(self.odd_gates[level](cur)))
            if self.fixed:
                detail, cur = (cur - odd) / math.sqrt(2), (cur + odd) / math.sqrt(2)
            else:
                detail = (odd - self.predict_nets[level](cur)) / math.sqrt(2)
                cur = (cur + self.update_nets[level](detail)) / math.sqrt(2)
            details.append(detail)
        return torch.stack([cur, *reversed(details)]), new_state

    def reconstruct(self, u: Tensor, updates: nn.ModuleList | None = None) -> Tensor:
        """(S, B, T, P) → (B, T, P): undoes the approximation steps, cur ← √2·cur − Update(detail),
        position-wise, with the Update networks of the decomposition or a block's own `updates`.
        Haar's: cur ← (cur + detail) / √2."""
        cur = u[0]
        if self.fixed:
            for detail in u[1:]:
                cur = (cur + detail) / math.sqrt(2)
            return cur
        for detail, update in zip(u[1:], reversed(updates or self.update_nets), strict=True):
            cur = math.sqrt(2) * cur - update(detail)
        return cur


class Haar(Lifting):
    """The fixed wavelet in as few passes over memory as there can be (lags.py): the same
    coefficients."""

    def __init__(self, config: Config):
        super().__init__(config, config.lifting_init)
        # of each scale's power on its way through `reconstruct`
        halvings = [config.levels, *range(config.levels, 0, -1)]
        shares = torch.tensor([math.sqrt(0.5) ** n for n in halvings], device="cpu")
        # (S,): reconstruct(u) = Σ_s shares_s · u_s
        self.register_buffer("shares", shares, persistent=False)

    def decompose(self, cur: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        names = [f"lag{level}" for level in range(len(self.longest_lag))]
        c, *new = HaarCoefficients.apply(cur, *(state[name] for name in names))
        return c, dict(zip(names, new, strict=True))


def basis_weights(config: Config) -> nn.Parameter:
    """Logits of a blend of bases, (bases, S): column 0 of the approximation, column l + 1 of the
    detail of level l."""
    logits = torch.zeros(len(config.multi_basis_inits), config.scales)
    logits[0] = 10.0
    return nn.Parameter(logits)


class MultiBasis(nn.Module):
    """Several liftings side by side; per scale their coefficients are blended by a softmax over the
    bases."""

    update_nets = None  # each basis has its own

    def __init__(self, config: Config):
        super().__init__()
        self.wavelets = nn.ModuleList(Lifting(config, init) for init in config.multi_basis_inits)
        self.basis_weights = basis_weights(config)

    def start(self, rows: int, like: Tensor) -> BlockState:
        states = [wavelet.start(rows, like) for wavelet in self.wavelets]
        return {
            f"basis{k}.{name}": tensor
            for k, state in enumerate(states)
            for name, tensor in state.items()
        }

    def decompose(self, cur: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        blend = self.basis_weights.float().softmax(0).to(cur.dtype)
        # (bases, S, 1, 1, 1)
        coarse_to_fine = torch.cat([blend[:, :1], blend[:, 1:].flip(1)], dim=1)[
            ..., None, None, None
        ]
        blended, new_state = 0, {}
        for k, wavelet in enumerate(self.wavelets):
            own = {name: state[f"basis{k}.{name}"] for name in wavelet.start(0, cur)}
            coefficients, own = wavelet.decompose(cur, own)
            blended = blended + coarse_to_fine[k] * coefficients
            new_state |= {f"basis{k}.{name}": tensor for name, tensor in own.items()}
        return blended, new_state

    def reconstruct(self, u: Tensor, inverse: "InverseBases | None" = None) -> Tensor:
        """Every basis's reconstruction of u (S, B, T, P), blended by the weights of the
        approximation; all of it by the decomposition's networks and weights, or by a block's own
        `inverse`."""
        logits = self.basis_weights if inverse is None else inverse.basis_weights
        updates = [None] * len(self.wavelets) if inverse is None else inverse.update_nets
        blend = logits[:, 0].float().softmax(0).to(u.dtype)
        bases = zip(blend, self.wavelets, updates, strict=True)
        return sum(w * wavelet.reconstruct(u, own) for w, wavelet, own in bases)


class InverseBases(nn.Module):
    """What an untied reconstruction of several bases has of its own: their Update networks, and the
    weights of the blend (of which nothing but the approximation's is read, as with the
    decomposition's)."""

    def __init__(self, config: Config):
        super().__init__()
        self.update_nets = nn.ModuleList(
            inverse_nets(config, init) for init in config.multi_basis_inits
        )
        self.basis_weights = basis_weights(config)


def inverse_nets(config: Config, init: str) -> nn.ModuleList:
    """The Update networks of an untied reconstruction, one for each level."""
    return nn.ModuleList(lifting_net(config, init, 0.5, level) for level in range(config.levels))


class HaarPackets(nn.Module):
    """Haar's wavelet packets, undecimated: every band is split at each level, details too, into 2^J
    bands of equal width. They are a Walsh–Hadamard transform of the last 2^J positions, by number
    of sign changes: from coarse to fine."""

    update_nets = None  # nothing is learned

    def __init__(self, config: Config):
        super().__init__()
        self.bands, self.width = config.scales, config.padded_width
        rows = hadamard(self.bands)
        order = rows.sign().diff(dim=1).abs().sum(1).argsort()
        # (bands, positions from old to new)
        self.register_buffer("matrix", rows[order].flip(1), persistent=False)

    def start(self, rows: int, like: Tensor) -> BlockState:
        return {"past": like.new_zeros(rows, self.bands - 1, self.width)}

    def decompose(self, cur: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        joined, past = remember(state["past"], cur)
        windows = joined.unfold(1, self.bands, 1)  # (B, T, P, positions)
        return (windows @ self.matrix.mT.to(cur.dtype)).movedim(-1, 0), {"past": past}

    def reconstruct(self, u: Tensor, updates: None = None) -> Tensor:
        return u.sum(0) / math.sqrt(self.bands)


def has_bases(config: Config) -> bool:
    return config.multi_basis_lifting and config.wavelet_mode == "lifting"


def build_wavelet(config: Config) -> Lifting | MultiBasis | HaarPackets:
    if config.wavelet_mode == "packets":
        return HaarPackets(config)
    if config.wavelet_mode == "haar" and not config.lifting_gate:
        return Haar(config)
    return MultiBasis(config) if has_bases(config) else Lifting(config, config.lifting_init)


def build_inverse(config: Config) -> nn.ModuleList | InverseBases | None:
    """What a block has of its own for the reconstruction; None where that is the
    decomposition's."""
    if not config.untied_reconstruction:
        return None
    return InverseBases(config) if has_bases(config) else inverse_nets(config, config.lifting_init)


# ===== Mixers: per scale, y = (W z) ⊙ act(G r) + U (Vᵀ z)


class SignExp(nn.Module):
    """Stores a matrix as its sign (fixed) and log-magnitude (trained)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("sign", weight.sign())

    def forward(self, log_magnitude: Tensor) -> Tensor:
        return self.sign * log_magnitude.exp()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.abs().clamp_min(1e-30).log()


class Mixer(nn.Module):
    """The weights of one scale's mixer, of width w ≤ P. Their use is in `MixerBank`, for all scales
    at once."""

    def __init__(self, config: Config, width: int, depth: int):
        super().__init__()
        outer = config.padded_width
        self.mixer = nn.Linear(width, width, bias=False)
        noise = 1e-3 / (math.sqrt(outer) if config.stab("mixer_eps_scaling") else 1)
        if config.mixer_depth_stabilizers:
            noise /= depth + 1
        self.mixer.weight.data = torch.eye(width) + noise * torch.randn(width, width)
        self.gate = None
        if config.use_mixer_gate:
            self.gate = nn.Linear(width, width, bias=False)
            nn.init.normal_(self.gate.weight, std=0.02)
        self.U = self.V = None
        if config.low_rank:
            self.U = nn.Parameter(0.01 * torch.randn(width, config.low_rank))
            self.V = nn.Parameter(0.01 * torch.randn(width, config.low_rank))
        last = depth == config.mixer_depth - 1
        self.bias = None if last else nn.Parameter(torch.zeros(width))
        self.proj_in = self.proj_out = None
        if width != outer:
            self.proj_in, self.proj_out = (
                nn.Linear(outer, width, bias=False),
                nn.Linear(width, outer, bias=False),
            )
            nn.init.normal_(self.proj_in.weight, std=1 / math.sqrt(outer))
            nn.init.normal_(self.proj_out.weight, std=1 / math.sqrt(width))
        if config.stab("spectral_norm"):
            parametrizations.spectral_norm(self.mixer)
        if config.exp_parametrization:
            for linear in filter(None, (self.mixer, self.gate)):
                parametrize.register_parametrization(linear, "weight", SignExp(linear.weight.data))


class MixerBank(nn.ModuleList):
    """One `Mixer` per scale. Neighbouring scales of one width are computed by one batched product.

    The transform H before them and its inverse behind may be given with what has not been
    transformed. H is then applied to the weights, W (H c) = (W H) c, which are fewer than the
    positions; only behind a mixer of full width to the positions."""

    def __init__(self, config: Config, depth: int):
        shares = config.per_scale_mixer_widths or (1.0,) * config.scales
        widths = [int(config.padded_width * share) for share in shares]
        super().__init__(Mixer(config, width, depth) for width in widths)
        runs = itertools.groupby(range(config.scales), key=widths.__getitem__)
        self.runs = [
            slice(members[0], members[-1] + 1) for members in (list(run) for _, run in runs)
        ]
        self.activation = {
            "silu": F.silu,
            "sigmoid": torch.sigmoid,
            "gelu": F.gelu,
            "relu": F.relu,
        }[config.mixer_gate_activation]

    @property
    def members(self) -> list[list[Mixer]]:
        """The mixers of each run."""
        return [list(self)[run] for run in self.runs]

    def by_run(self, x: Tensor) -> Sequence[Tensor]:
        """x (S, …) cut into its runs; whole where there is one, for even the gradient of a cut into
        one piece is a copy."""
        return [x] if len(self.runs) == 1 else x.split([run.stop - run.start for run in self.runs])

    def forward(self, z: Tensor, r: Tensor, transform: nn.Module = NO_TRANSFORM) -> Tensor:
        """z: what is mixed, r: what the gate reads, both (S, N, P); transform: that which neither
        has had yet."""
        parts = []
        for mixers, y in zip(self.members, self.narrow(z, r, transform), strict=True):
            out = self.outward(mixers, transform)
            parts.append(transform(y) if out is None else torch.bmm(y, out.to(y.dtype)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def narrow(self, z: Tensor, r: Tensor, transform: nn.Module) -> list[Tensor]:
        """For each run of n scales what its mixers make of them, in their own width, (n, N, w)."""
        return [
            self._mix(mixers, z_run, r_run, transform)
            for mixers, z_run, r_run in zip(
                self.members, self.by_run(z), self.by_run(r), strict=True
            )
        ]

    def outward(self, mixers: Sequence[Mixer], transform: nn.Module) -> Tensor | None:
        """The matrices (n, w, P) from n mixers' width back to the coefficients; None where that is
        the transform alone."""
        if mixers[0].proj_out is None:
            return None
        return transform(torch.stack([m.proj_out.weight.mT for m in mixers]))

    def _mix(self, mixers: Sequence[Mixer], z: Tensor, r: Tensor, transform: nn.Module) -> Tensor:
        first, inward = mixers[0], None
        if first.proj_in is not None:
            inward = transform(torch.stack([m.proj_in.weight for m in mixers]))  # (n, w, P)

        def product(x: Tensor, weights: list[Tensor]) -> Tensor:
            """x (n, N, P) by n matrices (out, w), into which the way to their width and the
            transform are multiplied: they have fewer rows than x has."""
            matrices = torch.stack(weights)
            matrices = transform(matrices) if inward is None else matrices @ inward
            return torch.bmm(x, matrices.mT.to(x.dtype))

        y = product(z, [m.mixer.weight for m in mixers])
        if first.gate is not None:
            y = y * self.activation(product(r, [m.gate.weight for m in mixers]))
        if first.U is not None:
            u = torch.stack([m.U for m in mixers])
            y = y + torch.bmm(product(z, [m.V.mT for m in mixers]), u.mT.to(y.dtype))
        if first.bias is not None:
            y = y + torch.stack([m.bias for m in mixers])[:, None]
        return y


class Mixers(nn.Module):
    """The transform of the channels, `mixer_depth` banks in a row, and the transform back. All
    banks but the last have a LayerNorm before them and if asked scalars, z ← α·mix(β·LayerNorm(z));
    with residuals each bank adds its input z, the last one too. A single bank has none of it."""

    # positions per channel from which the transform is cheaper on the weights than on the positions
    FOLDS_FROM = 4

    def __init__(self, config: Config):
        super().__init__()
        depth = config.mixer_depth
        self.transform = build_transform(config)
        self.banks = nn.ModuleList(MixerBank(config, d) for d in range(depth))
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.LayerNorm(config.padded_width) for _ in range(config.scales))
            for _ in range(depth - 1)
        )
        self.residuals = config.mixer_depth_residuals and depth > 1
        self.alphas = self.betas = None
        if config.mixer_depth_stabilizers:
            self.alphas = nn.ParameterList(
                nn.Parameter(torch.tensor(1 / depth)) for _ in range(depth - 1)
            )
            self.betas = nn.ParameterList(
                nn.Parameter(torch.tensor(1 / depth)) for _ in range(depth - 1)
            )
        self.scale_routing = (
            nn.Parameter(torch.eye(config.scales)) if config.cross_scale_gating else None
        )
        self.top_k = config.mixer_top_k

    def kept(self, z: Tensor) -> Tensor:
        """What is mixed: with mixer_top_k the largest coefficients of each scale and position, the
        others zero."""
        if not self.top_k:
            return z
        largest = z.abs().topk(self.top_k).indices
        return torch.zeros_like(z).scatter(-1, largest, z.gather(-1, largest))

    def routed(self, z: Tensor) -> Tensor:
        """What the gates read: z itself, or with cross_scale_gating r_s = Σ_s' R[s, s'] z_s'."""
        if self.scale_routing is None:
            return z
        return (self.scale_routing.to(z.dtype) @ z.flatten(1)).view_as(z)

    def forward(self, c: Tensor) -> Tensor:  # (S, N, P)
        if len(self.banks) == 1 and not self.top_k and c.size(1) >= self.FOLDS_FROM * c.size(2):
            c = c.to(autocast_type(c))  # once, in place of once for each product that reads it
            return self.banks[0](c, self.routed(c), self.transform)
        z = self.kept(self.transform(c))
        for d, norms in enumerate(self.norms):
            normed = torch.stack([norm(scale) for norm, scale in zip(norms, z, strict=True)])
            if self.betas is not None:
                normed = self.betas[d] * normed
            mixed = self.banks[d](normed, self.routed(normed))
            if self.alphas is not None:
                mixed = self.alphas[d] * mixed
            z = z + mixed if self.residuals else mixed
        mixed = self.banks[-1](z, self.routed(z))
        return self.transform(z + mixed if self.residuals else mixed)

    def folded(self, c: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Of mixers that are all narrow, in one bank, what makes a weighted sum over scales of what
        they mix: their outputs side by side (N, Σw), and a matrix (Σw, P) by which Σ_s shares_s ·
        forward(c)_s is one product."""
        transform, bank, c = self.transform, self.banks[0], c.to(autocast_type(c))
        y = torch.cat(
            [scale for run in bank.narrow(c, self.routed(c), transform) for scale in run], dim=1
        )
        out = [bank.outward(mixers, transform) for mixers in bank.members]
        weighted = [
            share[:, None, None] * matrices
            for share, matrices in zip(bank.by_run(shares), out, strict=True)
        ]
        return y, torch.cat([matrices.flatten(0, 1) for matrices in weighted])


# ===== The wide MLP


def build_mlp(config: Config) -> nn.Sequential:
    """`mlp_layers` linear layers with a GELU between each two. Of 1 there are two all the same,
    with nothing between."""
    width, inner = config.C, config.C * config.mlp_expansion
    layers: list[nn.Module] = [nn.Linear(width, inner)]
    for _ in range(config.mlp_layers - 2):
        layers += [nn.GELU(), nn.Linear(inner, inner)]
    if config.mlp_layers > 1:
        layers.append(nn.GELU())
    last = nn.Linear(inner, width)
    last.weight.data.mul_(0.02)  # starts as almost nothing beside the residual stream
    if config.stab("ff_scaling"):
        last.weight.data.div_(math.sqrt(inner))
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last, nn.Dropout(config.dropout_mlp))


# ===== Block


class ScaleNorm(nn.Module):
    """RMSNorm of coefficients (S, B, T, P) over channels, with gains of its own at each scale."""

    def __init__(self, config: Config):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(config.scales, config.padded_width))

    def forward(self, c: Tensor) -> Tensor:
        return F.rms_norm(c, c.shape[-1:], eps=1e-5) * self.gains[:, None, None]


class CoarseModulation(nn.Module):
    """Coarse modulates fine: c_s ← c_s ⊙ (1 + tanh(a_s ⊙ c_{s−1})); scale s − 1 is the next coarser
    one, a is zero at first."""

    def __init__(self, config: Config):
        super().__init__()
        self.gains = nn.Parameter(torch.zeros(config.scales - 1, config.padded_width))

    def forward(self, c: Tensor) -> Tensor:  # (S, B, T, P)
        return torch.cat([c[:1], c[1:] * (1 + torch.tanh(self.gains[:, None, None] * c[:-1]))])


def folds(config: Config) -> bool:
    """Whether a block's mixers are all narrow and all behind them is linear: then it is one product
    (`Block.folded_branch`)."""
    shares = config.per_scale_mixer_widths or (1.0,)
    narrow = config.mixer_depth == 1 and config.mixer_top_k == 0 and max(shares) < 1
    linear = config.wavelet_mode == "haar" and not (
        config.lifting_gate or config.scale_norm or config.dropout_mixer
    )
    return narrow and linear and not config.skip_proj_out


class Block(nn.Module):
    """One block: a wavelet branch that mixes positions, then a position-wise memory branch, both
    added to the stream."""

    def __init__(self, config: Config, after: int = 0):
        """after: how many blocks come after it."""
        super().__init__()
        width, padded = config.C, config.padded_width
        self.pad = padded - width
        self.bypass = Bypass(config) if config.decompose_bypass else None
        self.embedding_residual_gamma = (
            nn.Parameter(torch.zeros(width)) if config.per_layer_embedding else None
        )
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.scale_norm_in = self.scale_norm_out = nn.Identity()
        if config.scale_norm:
            self.scale_norm_in, self.scale_norm_out = ScaleNorm(config), ScaleNorm(config)
        self.coarse_modulation = (
            CoarseModulation(config) if config.coarse_modulation else nn.Identity()
        )
        self.mixers = Mixers(config)
        self.dropout_mixer = nn.Dropout(config.dropout_mixer)
        self.scale_weights = nn.Parameter(torch.ones(config.scales))
        self.inverse_update_nets = build_inverse(config)
        self.proj_out = nn.Identity()
        if not (config.skip_proj_out and padded == width):
            self.proj_out = nn.Linear(padded, width)
            self.proj_out.weight.data.mul_(1e-3)  # the wavelet branch too starts as almost nothing
            if config.stab("proj_out_scaling"):
                self.proj_out.weight.data.div_(math.sqrt(width * config.applications))
            nn.init.zeros_(self.proj_out.bias)
        self.branch = Block.folded_branch if folds(config) else Block.wavelet_branch
        self.dropout_projection = nn.Dropout(config.dropout_projection)
        self.residual_alpha_spectral = self.residual_alpha_mlp = 1.0
        if config.learned_residual:
            self.residual_alpha_spectral = nn.Parameter(torch.tensor(1.0))
            self.residual_alpha_mlp = nn.Parameter(torch.tensor(1.0))
        self.ffwd = build_mlp(config) if config.mlp_expansion else None
        self.pkm = self.fwpkm = self.recall = None
        if config.pkm_enabled:
            self.pkm = ProductKeyMemory(
                config, config.pkm_num_keys, config.pkm_top_k, config.pkm_heads
            )
        if config.fwpkm_enabled:
            self.fwpkm = FastWeightMemory(config)
        if config.recall_heads and after % config.recall_every == 0:
            self.recall = AssociativeMemory(config)
        for name, branch in (
            ("mlp", self.ffwd),
            ("pkm", self.pkm),
            ("fwpkm", self.fwpkm),
            ("recall", self.recall),
        ):
            self.register_parameter(
                f"alpha_{name}", nn.Parameter(torch.tensor(1.0)) if branch is not None else None
            )

    def start(self, wavelet: nn.Module, rows: int, like: Tensor, stream: bool) -> BlockState:
        state = wavelet.start(rows, like)
        if self.bypass is not None:
            state |= self.bypass.average.start(rows, like, stream)
        if self.fwpkm is not None:
            state |= self.fwpkm.start(rows, like)
        if self.recall is not None:
            state |= self.recall.start(rows, like)
        return state

    def mix(self, c: Tensor) -> Tensor:
        """The coefficients (S, B, T, P) mixed over channels, in the transform's domain."""
        y = self.dropout_mixer(
            self.mixers(self.coarse_modulation(self.scale_norm_in(c)).flatten(1, 2))
        )
        return self.scale_norm_out((y * self.scale_weights[:, None, None]).view_as(c))

    def wavelet_branch(self, c: Tensor, wavelet: nn.Module) -> Tensor:
        """What the stream gains (B, T, C) from the coefficients (S, B, T, P): mixed, reconstructed
        and projected."""
        return self.proj_out(wavelet.reconstruct(self.mix(c), self.inverse_update_nets))

    def folded_branch(self, c: Tensor, wavelet: nn.Module) -> Tensor:
        """The same where all that follows the mixers is linear (see `folds`): one product of their
        outputs side by side, so nothing of the size of the coefficients is written behind them, nor
        in the backward pass until it is before them."""
        mixed, out = self.mixers.folded(
            self.coarse_modulation(c).flatten(1, 2), self.scale_weights * wavelet.shares
        )
        return F.linear(mixed, self.proj_out.weight @ out.mT, self.proj_out.bias).unflatten(
            0, c.shape[1:3]
        )

    def remember_and_think(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """The stream x (B, T, C) with what the memory branches make of its norm."""
        h, x = self.ln2(x), self.residual_alpha_mlp * x
        written: BlockState = {}
        if self.ffwd is not None:
            x = torch.addcmul(x, self.alpha_mlp, self.ffwd(h))
        if self.pkm is not None:
            x = torch.addcmul(x, self.alpha_pkm, self.pkm(h))
        if self.fwpkm is not None:
            read, new = self.fwpkm(h, state)
            x, written = torch.addcmul(x, self.alpha_fwpkm, read), written | new
        if self.recall is not None:
            read, new = self.recall(h, state)
            x, written = torch.addcmul(x, self.alpha_recall, read), written | new
        return x, written

    def padded(self, x: Tensor) -> Tensor:
        """x (…, C) with zeros for the channels up to P."""
        return F.pad(x, (0, self.pad)) if self.pad else x

    def forward(
        self, x: Tensor, e: Tensor, below: Tensor | None, wavelet: nn.Module, state: BlockState
    ):
        """x, the token embedding e, the mean of the block below (all (B, T, C)) → new x, this
        block's mean, new state."""
        bias, mean, averages = (
            self.bypass(x, below, state) if self.bypass is not None else (0.0, None, {})
        )
        if self.embedding_residual_gamma is not None:
            x = x + self.embedding_residual_gamma * e
        c, lags = wavelet.decompose(self.padded(self.ln1(x)), state)
        if self.bypass is not None:
            c = c + self.padded(bias)
        x = self.residual_alpha_spectral * x + self.dropout_projection(
            self.branch(self, c, wavelet)
        )
        x, written = self.remember_and_think(x, state)
        return x, mean, lags | averages | written


# ===== The network


class LanguageModel(nn.Module):
    """What one network and several side by side have in common: ids (B, T) int64 → logits (B, T,
    V), and a state.

    `state` None is the start of a text. `start(rows, stream=True)` gives a start whose running mean
    is over the last block_size positions, for texts longer than that."""

    share = 1.0  # of each cell in the logits
    loss_weight = 1.0  # what training multiplies the loss by before the backward pass

    def start(self, rows: int, stream: bool = False) -> State:
        """The state at the start of `rows` texts: by cell, then iteration, then block
        application."""
        applications = self.config.applications
        blocks = []
        for cell in self.cells:
            like = cell.token_embedding.weight.detach()
            for i in range(applications * self.config.loop_iterations):
                block, wavelet = cell.block(i % applications)
                blocks.append(block.start(wavelet, rows, like, stream))
                # what an embedding remembers lies with the first block
                if i == 0 and cell.ngrams is not None:
                    blocks[-1] |= cell.ngrams.start(rows, like)
        return State(blocks)

    def head_inputs(self, ids: Tensor, state: State | None) -> tuple[list[list[Tensor]], State]:
        """Runs the blocks of all cells in step. Returns what the heads read, [iteration][cell] →
        (B, T, C), and the state."""
        config, cells = self.config, self.cells
        state = self.start(ids.size(0)) if state is None else state
        each = config.applications * config.loop_iterations
        before = [iter(state.blocks[c * each : (c + 1) * each]) for c in range(len(cells))]
        after: list[list[BlockState]] = [[] for _ in cells]
        es, remembered = zip(
            *(cell.embed(ids, state.blocks[c * each]) for c, cell in enumerate(cells)), strict=True
        )
        xs = [cell.dropout_embedding(e) for cell, e in zip(cells, es, strict=True)]
        means: list[Tensor | None] = [None] * len(cells)
        hidden = []
        for _ in range(config.loop_iterations):
            for i in range(config.applications):
                for c, cell in enumerate(cells):
                    xs[c], means[c], new = cell.apply_block(
                        i, xs[c], es[c], means[c], next(before[c])
                    )
                    after[c].append(new)
                if self.gates is not None and i % config.multinodal_cross_cell_gate_interval == 0:
                    xs = self.gates[i // config.multinodal_cross_cell_gate_interval](xs)
            hidden.append(
                [cell.dropout_lm_head(cell.final_ln(x)) for cell, x in zip(cells, xs, strict=True)]
            )
        for blocks, past in zip(after, remembered, strict=True):
            blocks[0] |= past
        return hidden, State([block for blocks in after for block in blocks])

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        hidden, state = self.head_inputs(ids, state)
        return F.linear(*self.one_head(hidden[-1])), state

    def loss(
        self, ids: Tensor, targets: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mean cross-entropy in nats over all targets (B, T), averaged over loop_iterations, and
        the state after ids."""
        hidden, state = self.head_inputs(ids, state)
        losses = [linear_cross_entropy(*self.one_head(hs), targets) for hs in hidden]
        return sum(losses) / len(losses), state

    def one_head(self, hs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The cells' combined logits Σ h_i W_iᵀ are one product h Wᵀ, of their h and W side by
        side: returns h and W."""
        if len(hs) == 1:
            return hs[0], self.cells[0].lm_head.weight
        return torch.cat(hs, dim=-1) * self.share, torch.cat(
            [cell.lm_head.weight for cell in self.cells], dim=1
        )

    def tie_weights(self) -> None:
        for cell in self.cells:
            if cell.config.tie_embedding_to_lm_head:
                cell.lm_head.weight = cell.token_embedding.weight


class WaveletLM(LanguageModel):
    """The language model of one network."""

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embed_scale = math.sqrt(config.C) if config.stab("embed_scaling") else 1.0
        self.token_embedding = (FeatureEmbedding if config.token_features else nn.Embedding)(
            vocab_size, config.C
        )
        nn.init.normal_(self.token_embedding.weight, std=1 / math.sqrt(config.C))
        self.ngrams = NgramEmbedding(config) if config.ngram_slots else None
        self.dropout_embedding = nn.Dropout(config.dropout_embedding)
        count = 1 if config.looped_blocks else config.layers
        self.layers = nn.ModuleList(Block(config, after) for after in reversed(range(count)))
        self.wavelets = nn.ModuleList(
            build_wavelet(config) for _ in range(1 if config.shared_lifting_weights else count)
        )
        self.final_ln = nn.LayerNorm(config.C)
        self.dropout_lm_head = nn.Dropout(config.dropout_lm_head)
        self.lm_head = nn.Linear(config.C, vocab_size, bias=False)
        self.gates = None
        self.tie_weights()

    @property
    def cells(self) -> list["WaveletLM"]:
        return [self]

    def embed(self, ids: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """The embedding of ids (B, T), (B, T, C), and what of them is to be remembered."""
        e = self.token_embedding(ids)
        if self.embed_scale != 1.0:
            e = e * self.embed_scale
        if self.ngrams is None:
            return e, {}
        read, past = self.ngrams(ids, state)
        return e + read, past

    def block(self, i: int) -> tuple[Block, nn.Module]:
        """The block that is applied i-th and its wavelet; looped blocks and shared wavelets are
        applied repeatedly."""
        return self.layers[i % len(self.layers)], self.wavelets[i % len(self.wavelets)]

    def apply_block(self, i: int, x: Tensor, e: Tensor, below: Tensor | None, state: BlockState):
        """Block application i: returns the new x, its mean and its new state."""
        block, wavelet = self.block(i)
        if self.config.gradient_checkpointing and self.training:
            new_x, mean, state = checkpoint(block, x, e, below, wavelet, state, use_reentrant=False)
        else:
            new_x, mean, state = block(x, e, below, wavelet, state)
        drop = self.config.stochastic_depth_rate * i / self.config.applications
        # computed and then discarded: simple, and one graph for torch.compile
        if drop and self.training:
            dropped = torch.rand((), device=x.device) < drop
            new_x = torch.where(dropped, x, new_x)
            mean = mean if below is None else torch.where(dropped, below, mean)
        return new_x, mean, state


class CrossCellGate(nn.Module):
    """h_i ← h_i·(1 + tanh(A·mean of the other cells' h)), A zero at first."""

    def __init__(self, width: int):
        super().__init__()
        self.A = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.A.weight)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        total = sum(xs)
        return [x * (1 + torch.tanh(self.A((total - x) / (len(xs) - 1)))) for x in xs]


class MultinodalLM(LanguageModel):
    """Several whole networks (cells), each with its own seed, in step; their logits are averaged or
    summed."""

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        width, features = config.multinodal_cell_dim, config.multinodal_features_per_cell
        cell_config = config.model_copy(update={"C": width, "multinodal_enabled": False})
        self.cells = nn.ModuleList()
        for seed in config.multinodal_seeds[: config.multinodal_num_cells]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                cell = WaveletLM(cell_config, vocab_size)
                # feature bagging: each cell starts from a random subset of the embedding's columns
                if features != -1:
                    cell.token_embedding.weight.data[:, torch.randperm(width)[features:]] = (
                        config.multinodal_bagged_eps
                    )
            self.cells.append(cell)
        self.gates = None
        if config.multinodal_cross_cell_gating:
            count = math.ceil(config.applications / config.multinodal_cross_cell_gate_interval)
            self.gates = nn.ModuleList(CrossCellGate(width) for _ in range(count))
        self.share = 1 / len(self.cells) if config.multinodal_combination == "average" else 1.0
        self.loss_weight = 1 / math.sqrt(len(self.cells))


def build_model(config: Config, vocab_size: int) -> WaveletLM | MultinodalLM:
    """The network that `config` asks for."""
    return (
        MultinodalLM(config, vocab_size)
        if config.multinodal_enabled
        else WaveletLM(config, vocab_size)
    )
