"""Parts that old checkpoints or plans need and no shipped config switches on.

model.py's `parts_of` chooses among them where a network is built. What they need of model.py's own
classes they are given: this file lies below it. Letters as in model.py.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

from config import Config
from layers.lags import haar_reconstruction
from layers.loss import linear_cross_entropy
from layers.state import BlockState, State, ids_name, remember, start_of_lags

# ===== Wavelets


class LagGates(nn.ModuleList):
    """lifting_gate: each level's lagged input is gated per channel by the current one,
    odd ⊙ 2σ(Gate(cur)); the gates are zero at first, which leaves odd as it is."""

    def __init__(self, config: Config):
        width = config.padded_width
        super().__init__(nn.Linear(width, width) for _ in range(config.levels))
        for gate in self:
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)

    def open(self, level: int, odd: Tensor, cur: Tensor) -> Tensor:
        """odd and cur (B, T, P) → (B, T, P)."""
        return odd * (2 * torch.sigmoid(self[level](cur)))


class GatedHaar(nn.Module):
    """The fixed Haar wavelet with lifting_gate:
    detail = (cur − odd) / √2, cur ← (cur + odd) / √2."""

    update_nets = None  # nothing but the gates is learned

    def __init__(self, config: Config):
        super().__init__()
        self.odd_gates = LagGates(config)
        self.width = config.padded_width
        self.longest_lag = [2**level for level in range(config.levels)]

    def start(self, rows: int, like: Tensor) -> BlockState:
        return start_of_lags(self.longest_lag, self.width, rows, like)

    def decompose(self, cur: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """(B, T, P) → coefficients (S, B, T, P), the approximation first."""
        details = []
        new_state = {}
        for level in range(len(self.longest_lag)):
            joined, new_state[f"lag{level}"] = remember(state[f"lag{level}"], cur)
            odd = self.odd_gates.open(level, joined[:, : cur.size(1)], cur)
            details.append((cur - odd) / math.sqrt(2))
            cur = (cur + odd) / math.sqrt(2)
        return torch.stack([cur, *reversed(details)]), new_state

    def reconstruct(self, u: Tensor, updates: None = None) -> Tensor:
        """(S, B, T, P) → (B, T, P): cur ← (cur + detail) / √2."""
        return haar_reconstruction(u)


def basis_weights(config: Config) -> nn.Parameter:
    """Logits of a blend of bases, (bases, S): column 0 of the approximation, column l + 1 of the
    detail of level l. At first the blend is the first basis."""
    logits = torch.zeros(len(config.multi_basis_inits), config.scales)
    logits[0] = 10.0
    return nn.Parameter(logits)


class MultiBasis(nn.Module):
    """Several liftings side by side; per scale their coefficients are blended by a softmax over the
    bases."""

    update_nets = None  # each basis has its own

    def __init__(self, config: Config, wavelets: Sequence[nn.Module]):
        super().__init__()
        self.wavelets = nn.ModuleList(wavelets)
        self.basis_weights = basis_weights(config)

    def start(self, rows: int, like: Tensor) -> BlockState:
        states = [wavelet.start(rows, like) for wavelet in self.wavelets]
        return {
            f"basis{k}.{name}": tensor
            for k, state in enumerate(states)
            for name, tensor in state.items()
        }

    def decompose(self, cur: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """(B, T, P) → coefficients (S, B, T, P)."""
        blend = self.basis_weights.float().softmax(0).to(cur.dtype)
        coarse_to_fine = torch.cat([blend[:, :1], blend[:, 1:].flip(1)], dim=1)
        coarse_to_fine = coarse_to_fine[..., None, None, None]  # (bases, S, 1, 1, 1)
        blended = 0
        new_state = {}
        for k, wavelet in enumerate(self.wavelets):
            own = {name: state[f"basis{k}.{name}"] for name in wavelet.start(0, cur)}
            coefficients, own = wavelet.decompose(cur, own)
            blended = blended + coarse_to_fine[k] * coefficients
            new_state |= {f"basis{k}.{name}": tensor for name, tensor in own.items()}
        return blended, new_state

    def reconstruct(self, u: Tensor, inverse: "InverseBases | None" = None) -> Tensor:
        """Every basis's reconstruction of u (S, B, T, P), blended by the weights of the
        approximation: all of it by the decomposition's networks and weights, or by a block's own
        `inverse`."""
        logits = self.basis_weights if inverse is None else inverse.basis_weights
        updates = [None] * len(self.wavelets) if inverse is None else inverse.update_nets
        blend = logits[:, 0].float().softmax(0).to(u.dtype)
        bases = zip(blend, self.wavelets, updates, strict=True)
        return sum(w * wavelet.reconstruct(u, own) for w, wavelet, own in bases)


class InverseBases(nn.Module):
    """What an untied reconstruction of several bases has of its own: their Update networks and the
    weights of the blend, of which only the approximation's are read."""

    def __init__(self, config: Config, nets: Sequence[nn.ModuleList]):
        super().__init__()
        self.update_nets = nn.ModuleList(nets)
        self.basis_weights = basis_weights(config)


class HaarPackets(nn.Module):
    """Haar's wavelet packets, undecimated: every band is split at each level, details too, into 2^J
    bands of equal width. They are a Walsh–Hadamard transform of the last 2^J positions, ordered by
    the number of sign changes: from coarse to fine."""

    update_nets = None  # nothing is learned

    def __init__(self, config: Config, hadamard: Callable[[int], Tensor]):
        super().__init__()
        self.bands = config.scales
        self.width = config.padded_width
        rows = hadamard(self.bands)
        order = rows.sign().diff(dim=1).abs().sum(1).argsort()
        # (bands, positions from old to new)
        self.register_buffer("matrix", rows[order].flip(1), persistent=False)

    def start(self, rows: int, like: Tensor) -> BlockState:
        return {"past": like.new_zeros(rows, self.bands - 1, self.width)}

    def decompose(self, cur: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """(B, T, P) → coefficients (bands, B, T, P)."""
        joined, past = remember(state["past"], cur)
        windows = joined.unfold(1, self.bands, 1)  # (B, T, P, positions)
        coefficients = (windows @ self.matrix.mT.to(cur.dtype)).movedim(-1, 0)
        return coefficients, {"past": past}

    def reconstruct(self, u: Tensor, updates: None = None) -> Tensor:
        return u.sum(0) / math.sqrt(self.bands)


# ===== Bypass


class MovingAverage(nn.Module):
    """decompose_bypass_ema: m_t = f_t·m_{t−1} + (1 − f_t)·x_t with f_t = σ(ema_gate(x_t)) per
    channel, in fp32, in place of the running mean."""

    def __init__(self, config: Config):
        super().__init__()
        self.ema_gate = nn.Linear(config.C, config.C)
        nn.init.zeros_(self.ema_gate.weight)
        nn.init.zeros_(self.ema_gate.bias)

    def start(self, rows: int, like: Tensor, stream: bool) -> BlockState:
        return {"mean": like.new_zeros(rows, self.ema_gate.in_features, dtype=torch.float32)}

    def forward(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """x (B, T, C) → the averages (B, T, C) and the new state."""
        with torch.autocast(x.device.type, enabled=False):
            gate = self.ema_gate
            forget = torch.sigmoid(F.linear(x.float(), gate.weight.float(), gate.bias.float()))
        mean = (1 - forget) * x.float()
        first = mean[:, :1] + forget[:, :1] * state["mean"][:, None]
        mean = torch.cat([first, mean[:, 1:]], dim=1)
        # Hillis–Steele scan: after the pass with shift d, `mean` sums the last 2d terms and
        # `forget` is their product.
        shift = 1
        while shift < x.size(1):
            mean = mean + forget * F.pad(mean, (0, 0, shift, 0))[:, : x.size(1)]
            forget = forget * F.pad(forget, (0, 0, shift, 0))[:, : x.size(1)]
            shift *= 2
        return mean.to(x.dtype), {"mean": mean[:, -1].clone()}


# ===== Coefficients and mixers


class ScaleNorm(nn.Module):
    """scale_norm: RMSNorm of coefficients (S, B, T, P) over channels, with gains of its own at each
    scale."""

    def __init__(self, config: Config):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(config.scales, config.padded_width))

    def forward(self, c: Tensor) -> Tensor:
        return F.rms_norm(c, c.shape[-1:], eps=1e-5) * self.gains[:, None, None]


class CoarseModulation(nn.Module):
    """coarse_modulation: c_s ← c_s ⊙ (1 + tanh(a_s ⊙ c_{s−1})), where scale s − 1 is the next
    coarser one; a is zero at first, which leaves c as it is."""

    def __init__(self, config: Config):
        super().__init__()
        self.gains = nn.Parameter(torch.zeros(config.scales - 1, config.padded_width))

    def forward(self, c: Tensor) -> Tensor:  # (S, B, T, P)
        factors = 1 + torch.tanh(self.gains[:, None, None] * c[:-1])
        return torch.cat([c[:1], c[1:] * factors])


class DeepMixers(nn.Module):
    """mixer_depth banks in a row between the transform and its inverse, and mixer_top_k.

    All banks but the last have a LayerNorm before them and if asked scalars,
    z ← α·mix(β·LayerNorm(z)). With residuals each bank adds its input z, the last one too. With
    mixer_top_k the banks are given the largest coefficients of each scale and position, and zeros
    for the others.
    """

    all_narrow = False  # its outputs cannot be folded into what follows

    def __init__(
        self, config: Config, transform: nn.Module, build_bank: Callable[[bool], nn.Module]
    ):
        """build_bank: makes a bank, with biases or without."""
        super().__init__()
        depth = config.mixer_depth
        self.transform = transform
        self.banks = nn.ModuleList(build_bank(d < depth - 1) for d in range(depth))
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.LayerNorm(config.padded_width) for _ in range(config.scales))
            for _ in range(depth - 1)
        )
        self.residuals = config.mixer_depth_residuals and depth > 1
        self.alphas = self.betas = None
        if config.mixer_depth_stabilizers:
            shares = [torch.tensor(1 / depth) for _ in range(depth - 1)]
            self.alphas = nn.ParameterList(nn.Parameter(share.clone()) for share in shares)
            self.betas = nn.ParameterList(nn.Parameter(share.clone()) for share in shares)
        self.scale_routing = None
        if config.cross_scale_gating:
            self.scale_routing = nn.Parameter(torch.eye(config.scales))
        self.top_k = config.mixer_top_k

    def read_by_gates(self, z: Tensor, h: Tensor) -> Tensor:
        """What the gates read of z (S, N, P): z itself, or a learned blend of all scales. h is what
        `Mixers` can have them read."""
        if self.scale_routing is None:
            return z
        return (self.scale_routing.to(z.dtype) @ z.flatten(1)).view_as(z)

    def kept(self, z: Tensor) -> Tensor:
        """What is mixed of z (S, N, P): with mixer_top_k the largest coefficients of each scale and
        position, and zeros for the others."""
        if not self.top_k:
            return z
        largest = z.abs().topk(self.top_k).indices
        return torch.zeros_like(z).scatter(-1, largest, z.gather(-1, largest))

    def forward(self, c: Tensor, h: Tensor) -> Tensor:
        """Coefficients (S, N, P) of the stream's norm h (N, P) → (S, N, P)."""
        z = self.kept(self.transform(c))
        for d, norms in enumerate(self.norms):
            normed = torch.stack([norm(scale) for norm, scale in zip(norms, z, strict=True)])
            if self.betas is not None:
                normed = self.betas[d] * normed
            mixed = self.banks[d](normed, self.read_by_gates(normed, h))
            if self.alphas is not None:
                mixed = self.alphas[d] * mixed
            z = z + mixed if self.residuals else mixed
        mixed = self.banks[-1](z, self.read_by_gates(z, h))
        return self.transform(z + mixed if self.residuals else mixed)


# ===== How weights begin, and how they are stored


# The last layer of a Predict or Update network, and its level: the network itself where it is one
# linear map, its layer 3 where it has a hidden one.
LAST_LAYER = re.compile(
    r"(?:inverse_update_nets\.update_nets\.\d+|inverse_update_nets|predict_nets|update_nets)"
    r"\.(\d+)(?:\.3)?$"
)


def rescale(model: nn.Module, config: Config) -> None:
    """Brings the weights of a new network to the scales that the init-only stab_ options and
    mixer_depth_stabilizers ask for."""
    if config.stab("lifting_level_scaling"):
        for name, module in model.named_modules():
            last = LAST_LAYER.search(name)
            if last and isinstance(module, nn.Linear):
                module.weight.data.div_(1 + 0.1 * int(last[1]))
    for block in model.layers:
        if config.stab("ff_scaling") and block.ffwd is not None:
            last = block.ffwd[-2]  # a dropout is behind it
            last.weight.data.div_(math.sqrt(last.in_features))
        if config.stab("proj_out_scaling") and block.proj_out is not None:
            block.proj_out.weight.data.div_(math.sqrt(config.C * config.applications))
        for depth, bank in enumerate(block.mixers.banks):
            factor = 1.0
            if config.stab("mixer_eps_scaling"):
                factor /= math.sqrt(config.padded_width)
            if config.mixer_depth_stabilizers:
                factor /= depth + 1
            if factor != 1:
                for mixer in bank:
                    weight = mixer.mixer.weight.data
                    identity = torch.eye(len(weight))
                    weight.sub_(identity).mul_(factor).add_(identity)  # of the noise around it


class SignExp(nn.Module):
    """exp_parametrization: a matrix as its sign (fixed) and log-magnitude (trained)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("sign", weight.sign())

    def forward(self, log_magnitude: Tensor) -> Tensor:
        return self.sign * log_magnitude.exp()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.abs().clamp_min(1e-30).log()


def parametrise(blocks: Iterable[nn.Module], config: Config) -> None:
    """Has the mixers' matrices kept in another form: W by its spectral norm (stab_spectral_norm),
    W and the gate G as sign and log-magnitude (exp_parametrization)."""
    for mixer in (m for block in blocks for bank in block.mixers.banks for m in bank):
        if config.stab("spectral_norm"):
            parametrizations.spectral_norm(mixer.mixer)
        if config.exp_parametrization:
            for linear in filter(None, (mixer.mixer, mixer.gate)):
                sign_exp = SignExp(linear.weight.data)
                parametrize.register_parametrization(linear, "weight", sign_exp)


# ===== Several passes, several cells


class SeveralPasses:
    """What a network has that makes `passes`: (what the head reads after each pass, new state)."""

    def hidden(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the head reads after the last pass, and the state after ids (B, T)."""
        hidden, state = self.passes(ids, state)
        return hidden[-1], state

    def loss(
        self, ids: Tensor, targets: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mean cross-entropy in nats over all targets (B, T), averaged over the passes, and the
        state after ids."""
        hidden, state = self.passes(ids, state)
        weight = self.head_weight()
        losses = [linear_cross_entropy(h, weight, targets) for h in hidden]
        return sum(losses) / len(losses), state


class Loops(SeveralPasses):
    """loop_iterations: a network whose whole stack of blocks is passed through several times, every
    time with a state of its own; the loss averages over the passes. It comes before the network's
    class among the bases."""

    def start(self, rows: int, stream: bool = False) -> State:
        passes = [super(Loops, self).start(rows, stream) for _ in range(self.loops)]
        return State([block for each in passes for block in each.blocks], passes[0].embedding)

    def passes(self, ids: Tensor, state: State | None) -> tuple[list[Tensor], State]:
        """What the head reads after each pass, (B, T, C) each, and the new state."""
        state = self.start(ids.size(0)) if state is None else state
        e, remembered = self.embed(ids, state.embedding)
        x = self.dropout_embedding(e)
        below = None
        hidden = []
        blocks = []
        each = len(state.blocks) // self.loops
        for loop in range(self.loops):
            for i, before in enumerate(state.blocks[loop * each : (loop + 1) * each]):
                x, below, after = self.apply_block(i, x, e, below, before)
                blocks.append(after)
            hidden.append(self.dropout_lm_head(self.final_ln(x)))
        return hidden, State(blocks, remembered)


class CrossCellGate(nn.Module):
    """h_i ← h_i·(1 + tanh(A·mean of the other cells' h)), A zero at first."""

    def __init__(self, width: int):
        super().__init__()
        self.A = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.A.weight)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """xs: of each cell (B, T, C)."""
        total = sum(xs)
        return [x * (1 + torch.tanh(self.A((total - x) / (len(xs) - 1)))) for x in xs]


class MultinodalLM(SeveralPasses, nn.Module):
    """Several whole networks (cells), each with its own seed, in step; their logits are averaged or
    summed. Its state holds the blocks of one cell after the other, within a cell by pass."""

    def __init__(
        self, config: Config, vocab_size: int, build_cell: Callable[[Config, int], nn.Module]
    ):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        width = config.multinodal_cell_dim
        changes = {"C": width, "multinodal_enabled": False, "loop_iterations": 1}
        cell_config = config.model_copy(update=changes)
        self.cells = nn.ModuleList()
        for seed in config.multinodal_seeds[: config.multinodal_num_cells]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                cell = build_cell(cell_config, vocab_size)
                kept = config.multinodal_features_per_cell
                if kept != -1:  # each cell starts from a random subset of the embedding's columns
                    others = torch.randperm(width)[kept:]
                    cell.token_embedding.weight.data[:, others] = config.multinodal_bagged_eps
            self.cells.append(cell)
        self.loops = config.loop_iterations
        self.gates = None
        self.gate_interval = config.multinodal_cross_cell_gate_interval
        if config.multinodal_cross_cell_gating:
            count = math.ceil(config.applications / self.gate_interval)
            self.gates = nn.ModuleList(CrossCellGate(width) for _ in range(count))
        # of each cell in the logits
        self.share = 1 / len(self.cells) if config.multinodal_combination == "average" else 1.0
        self.loss_weight = 1 / math.sqrt(len(self.cells))

    def start(self, rows: int, stream: bool = False) -> State:
        """The state at the start of `rows` texts; stream as in `WaveletLM.start`."""
        blocks = []
        embedding = {}
        for c, cell in enumerate(self.cells):
            for _ in range(self.loops):
                own = cell.start(rows, stream)
                blocks += own.blocks
            embedding |= {ids_name(c): ids for ids in own.embedding.values()}
        return State(blocks, embedding)

    def gated(self, i: int, xs: list[Tensor]) -> list[Tensor]:
        """What each cell's stream is after block application i."""
        if self.gates is None or i % self.gate_interval:
            return xs
        return self.gates[i // self.gate_interval](xs)

    def passes(self, ids: Tensor, state: State | None) -> tuple[list[Tensor], State]:
        """What the head reads after each pass, (B, T, cells·C) each, and the new state:
        Σ_i h_i W_iᵀ is one product of all h joined."""
        state = self.start(ids.size(0)) if state is None else state
        cells = list(self.cells)
        each = len(state.blocks) // len(cells)
        before = [iter(state.blocks[c * each : (c + 1) * each]) for c in range(len(cells))]
        after: list[list[BlockState]] = [[] for _ in cells]
        es = []
        remembered = {}
        for c, cell in enumerate(cells):
            own = {"ids": state.embedding[ids_name(c)]} if state.embedding else {}
            e, own = cell.embed(ids, own)
            es.append(e)
            remembered |= {ids_name(c): past for past in own.values()}
        xs = [cell.dropout_embedding(e) for cell, e in zip(cells, es, strict=True)]
        below: list[Tensor | None] = [None] * len(cells)
        hidden = []
        for _ in range(self.loops):
            for i in range(self.config.applications):
                for c, cell in enumerate(cells):
                    applied = cell.apply_block(i, xs[c], es[c], below[c], next(before[c]))
                    xs[c], below[c], new = applied
                    after[c].append(new)
                xs = self.gated(i, xs)
            ends = [cell.final_ln(x) for cell, x in zip(cells, xs, strict=True)]
            ends = [cell.dropout_lm_head(h) for cell, h in zip(cells, ends, strict=True)]
            hidden.append(torch.cat(ends, dim=-1) * self.share)
        return hidden, State([block for own in after for block in own], remembered)

    def head_weight(self) -> Tensor:
        """(V, cells·C)."""
        return torch.cat([cell.lm_head.weight for cell in self.cells], dim=1)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        hidden, state = self.hidden(ids, state)
        return F.linear(hidden, self.head_weight()), state

    def tie_weights(self) -> None:
        for cell in self.cells:
            cell.tie_weights()
