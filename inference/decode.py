"""Decoding at the speed of memory: the network of model.py with its weights prepared once for
inference.

    decoder = Decoder(model, bits=None | 16 | 8 | 4)
    logits, state = decoder(ids, state)

The same numbers as the model's, from fewer and larger products, read at full bandwidth (packed.py):

- The channels' transform H (Walsh–Hadamard, say) is folded into its neighbours. A mixer reads W H
  and G H; what follows it
  is H⁻¹ times the first layer of the reconstruction's networks.
- Reconstruction, cur ← √2·cur − Update(u), is linear in cur: all Update networks run at once, and
  their last layers,
  the powers of √2 and the projection after them are one matrix.
- U Vᵀ joins W where there is no gate. Where there is, Vᵀ lies above W in one matrix and U goes into
  what follows.
- Factors of √2, the scale weights and the alphas are multiplied into matrices. (The affine parts of
  LayerNorms are not: torch's
  kernel applies them in the pass that it makes anyhow.)
- All projections into an associative memory are one matrix.
- A table of n-grams stays narrow: its map to the channels is a product of one row.
- What looks back far is a `Tape`, so a step writes one position and copies nothing.
- A step is a function of tensors (`Decoder.run`) between reading tapes and writing them, so that
  torch.compile can make one
  program of it: `decoder.compile()`.

What cannot be folded is the model's own module, chosen here when the decoder is built: mixers in a
row or of the largest coefficients, several bases, packets, a wavelet without matrices or with gated
lags, norms of each scale and what coarse ones do to fine ones, fast weights, the moving average. A
step of one token and a chunk of many share all but the way through time.

Letters as in model.py; N = B·T positions, w a mixer's width.
"""

import copy
import itertools
import math
import re
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.command import InputError
from config import Config
from inference import fused, kernels
from inference.packed import GROUP, Weights, Widths, product_gelu, product_sum, round_up
from inference.tape import DecoderState, Tape, plain
from layers.bypass import RunningMean
from layers.memory import AssociativeMemory, FastWeightMemory, ProductKeyMemory
from layers.ngrams import NgramEmbedding, read_slots
from layers.state import State
from model import Block, HaarPackets, LanguageModel, Lifting, MultiBasis, ScaleNorm

# names of what a compiled step is given; the empty one is of torch's own state
GIVEN = re.compile(r"(L\['?)?(ids|parts)\b|$")


# ===== The wavelet, one way


class FoldedLifting:
    """`Lifting.decompose` with trained networks. At one token all lagged inputs are known before
    the first level: one weighted gather makes them. Written with details and approximations divided
    by √2 inside the networks' last layers."""

    def __init__(self, wavelet: Lifting, name: str, weights: Weights):
        self.longest, self.width, self.levels = (
            wavelet.longest_lag,
            wavelet.width,
            len(wavelet.longest_lag),
        )
        crawl = wavelet.dilation_logits
        shares = torch.ones(self.levels, 1) if crawl is None else crawl.float().softmax(1)
        self.shares = weights.keep(f"{name}.shares", shares / math.sqrt(2))  # (J, K)
        count = self.shares.size(1)
        self.offsets = [
            [(max(self.longest) - first - k) for k in range(count)] for first in wavelet.first_lag
        ]
        self.predict = [
            self._layers(n, f"{name}.predict.{i}", -1, weights)
            for i, n in enumerate(wavelet.predict_nets)
        ]
        self.update = [
            self._layers(n, f"{name}.update.{i}", 1, weights)
            for i, n in enumerate(wavelet.update_nets)
        ]
        self.predict_bias = torch.stack([bias for *_, bias in self.predict])  # (J, P)
        self.has_kernels = self.predict[0][2].one is not None  # for one row
        self.gathers: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    @staticmethod
    def _layers(net: nn.Module, name: str, sign: int, weights: Weights):
        """Hidden layer and its bias (None where linear), last layer and its bias, these two times
        sign/√2."""
        first, last = linears(net)
        scale = sign / math.sqrt(2)
        hidden = (
            None if first is None else weights.matrix(f"{name}.hidden", first.weight, "lifting")
        )
        hidden_bias = (
            None if first is None else weights.bias(f"{name}.hidden.bias", first.bias, hidden)
        )
        matrix = weights.matrix(f"{name}.last", last.weight * scale, "lifting")
        return hidden, hidden_bias, matrix, weights.keep(f"{name}.last.bias", last.bias * scale)

    @staticmethod
    def _inside(net, x: Tensor) -> Tensor:
        hidden, bias, *_ = net
        return x if hidden is None else product_gelu(hidden, x, bias)

    def lagged(self, tape: Tape) -> Tensor:
        """What each level takes as odd at the next token, over √2: (B, J, P)."""
        rows, size = tape.buffer.shape[:2]
        if (rows, size) not in self.gathers:
            entry = (
                torch.tensor(self.offsets)[None] * self.levels
                + torch.arange(self.levels)[None, :, None]
            )
            entry = entry + torch.arange(rows)[:, None, None] * size * self.levels  # (B, J, K)
            starts = torch.arange(0, entry.numel(), entry.size(2))
            shares = self.shares.repeat(rows, 1).flatten()
            self.gathers[rows, size] = tuple(
                t.to(self.shares.device) for t in (entry.flatten(), starts, shares)
            )
        entry, starts, shares = self.gathers[rows, size]
        entries = tape.buffer.view(-1, self.width)[(tape.end - tape.length) * self.levels :]
        odd = torch.embedding_bag(entries, entry, starts, False, 0, False, shares)[0]
        return odd.view(rows, self.levels, self.width)

    def lagged_in_ring(self, ring: Tensor, position: Tensor) -> Tensor:
        """What `lagged` gives, of a ring (B, size, J, P) whose oldest entry is at position (1,)
        modulo its size."""
        rows, size = ring.shape[:2]
        if (rows, 0) not in self.gathers:
            # (B, J, 1)
            row = (
                torch.arange(rows)[:, None, None] * size * self.levels
                + torch.arange(self.levels)[None, :, None]
            )
            starts = torch.arange(0, rows * self.levels * self.shares.size(1), self.shares.size(1))
            parts = row, torch.tensor(self.offsets), starts, self.shares.repeat(rows, 1).flatten()
            self.gathers[rows, 0] = tuple(t.to(self.shares.device) for t in parts)
        row, offsets, starts, shares = self.gathers[rows, 0]
        entry = (row + (position + offsets) % size * self.levels).flatten()
        odd = torch.embedding_bag(
            ring.view(-1, self.width), entry, starts, False, 0, False, shares
        )[0]
        return odd.view(rows, self.levels, self.width)

    def lagged_by_kernel(self, ring: Tensor, position: Tensor) -> Tensor:
        """The same and the bias, of one row."""
        if (1, -1) not in self.gathers:
            self.gathers[1, -1] = (torch.tensor(self.offsets).to(self.shares.device),)
        return fused.lags_in_ring(
            ring, position, *self.gathers[1, -1], self.shares, self.predict_bias
        )

    def decompose(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        """h (N, P) → coefficients (S, N, P), and what to remember."""
        if length == 1:
            return self.step(h, part["odd"])
        tape: Tape = part["lags"]
        cur, details, curs = h, [], []
        for level, (predict, update) in enumerate(zip(self.predict, self.update, strict=True)):
            joined = torch.cat([tape.window[:, :, level], cur.view(-1, length, self.width)], dim=1)
            odd = sum(
                share * joined[:, offset : offset + length]
                for share, offset in zip(self.shares[level], self.offsets[level], strict=True)
            )
            curs.append(joined[:, length:])
            detail = predict[2](self._inside(predict, cur), odd.flatten(0, 1) + predict[3])
            cur = update[2](self._inside(update, detail), cur, math.sqrt(0.5)) + update[3]
            details.append(detail)
        return torch.stack([cur, *reversed(details)]), {
            "lags": Tape(torch.stack(curs, dim=2), tape.length)
        }

    def step(self, cur: Tensor, odd: Tensor) -> tuple[Tensor, dict]:
        """odd: what `lagged` gives."""
        odd = odd + self.predict_bias
        if self.has_kernels and cur.size(0) == 1:
            rows = self.room(cur)
            rows[0].copy_(cur)
            return self.step_by_kernels(rows, odd)
        details, curs = [], []
        for level, (predict, update) in enumerate(zip(self.predict, self.update, strict=True)):
            curs.append(cur)
            detail = predict[2](self._inside(predict, cur), odd[:, level])
            cur = update[2](self._inside(update, detail), cur, math.sqrt(0.5)).add_(update[3])
            details.append(detail)
        return torch.stack([cur, *reversed(details)]), {"lags": curs}

    def room(self, like: Tensor) -> list[Tensor | None]:
        """For `step_by_kernels`: rows below one another, where each product writes what is wanted
        of it. Of those that follow the first there are none for torch.compile: it would copy all of
        a tensor of which a part is written."""
        if torch.compiler.is_compiling():
            return [like.new_empty(1, self.width), *[None] * 2 * self.levels]
        return list(like.new_empty(2 * self.levels + 1, self.width).split(1))

    def step_by_kernels(self, rows: list[Tensor | None], odd: Tensor) -> tuple[Tensor, dict]:
        """The same of one text, from the first of what `room` gives: rows become the J
        approximations to remember, the last one, and the details. odd: with the bias."""
        for level, (predict, update) in enumerate(zip(self.predict, self.update, strict=True)):
            cur, after, detail = rows[level], level + 1, 2 * self.levels - level
            rows[detail] = predict[2].one(self._inside(predict, cur), odd[:, level], y=rows[detail])
            inside = self._inside(update, rows[detail])
            rows[after] = update[2].one(inside, cur, math.sqrt(0.5), y=rows[after], bias=update[3])
        if torch.compiler.is_compiling():
            whole = torch.cat(rows)
        else:
            whole = rows[0].as_strided((len(rows), self.width), (self.width, 1))
        return whole[self.levels :, None], {"lags": whole[None, : self.levels]}

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """The lags of a model's state, on a tape."""
        longest, like = max(self.longest), block["lag0"]
        buffer = like.new_zeros(like.size(0), longest, self.levels, self.width)
        for level, n in enumerate(self.longest):
            buffer[:, longest - n :, level] = block[f"lag{level}"]
        return {"lags": Tape(buffer, longest)}


class OwnWavelet:
    """The decomposition by the model's own module: without matrices, with gated lags, of several
    bases, or into packets."""

    def __init__(self, wavelet: Lifting | MultiBasis | HaarPackets, name: str, weights: Weights):
        self.wavelet = weights.module(name, wavelet)
        self.names = list(wavelet.start(0, torch.empty(0)))
        self.longest: list[int] = []

    def decompose(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        c, lags = self.wavelet.decompose(h.view(-1, length, h.size(-1)), part)
        return c.flatten(1, 2), lags

    def adopt(self, block: dict[str, Tensor]) -> dict:
        return {name: block[name] for name in self.names}


def has_matrices(wavelet: nn.Module) -> bool:
    """Whether its decomposition is products of matrices alone, that others can be folded into."""
    return isinstance(wavelet, Lifting) and not wavelet.fixed and wavelet.odd_gates is None


def linears(net: nn.Module) -> tuple[nn.Linear | None, nn.Linear]:
    """A Predict or Update network's hidden layer (None where it is linear) and last layer."""
    return (net[0], net[-1]) if isinstance(net, nn.Sequential) else (None, net)


# ===== Mixers, and the wavelet the other way


class FoldedMixers:
    """One bank of mixers between its two Hadamard transforms: coefficients c (S, N, P) → y (S, N,
    ·), and in `after` the matrices that make the network's mixed coefficients of it, u_s = after_s
    · y_s; they are the next layer's to fold."""

    def __init__(self, block: Block, name: str, weights: Weights):
        mixers, self.activation = list(block.mixers.banks[0]), block.mixers.banks[0].activation
        scales = len(mixers)
        # symmetric and its own inverse: before the mixers and behind
        transform = block.mixers.transform(channels(block))
        kinds = [weights.widths.of_scale(s, scales) for s in range(scales)]
        gated, low_rank = mixers[0].gate is not None, mixers[0].U is not None
        rank = mixers[0].U.size(1) if low_rank and gated else 0
        self.head = (
            round_up(rank, 16 if min(weights.widths[k] for k in kinds) == 32 else 64) if rank else 0
        )
        first, gates, self.after = [], [], []
        for s, m in enumerate(mixers):
            # (w, P)
            inner = transform if m.proj_in is None else m.proj_in.weight.float() @ transform
            # (P, w)
            outer = transform if m.proj_out is None else transform @ m.proj_out.weight.float()
            w = m.mixer.weight
            if low_rank and not gated:
                w = w + m.U @ m.V.T
            rows, columns = w @ inner, outer * block.scale_weights[s]
            if rank:
                filler = self.head - rank
                rows = torch.cat([F.pad(m.V.T @ inner, (0, 0, 0, filler)), rows])
                columns = torch.cat([F.pad(columns @ m.U, (0, filler)), columns], dim=1)
            first.append(rows)
            self.after.append(columns)
            if gated:
                gates.append(m.gate.weight @ inner)
        self.first = weights.stack(f"{name}.first", first, kinds)
        self.gate = weights.stack(f"{name}.gate", gates, kinds) if gated else None
        routing = block.mixers.scale_routing
        self.routing = (
            None if routing is None or not gated else weights.keep(f"{name}.routing", routing)
        )

    def __call__(self, c: Tensor, routed: Tensor | None = None) -> Tensor:
        """routed: what the routing makes of c, where that is known."""
        y = self.first(c)
        if self.gate is not None:
            r = (
                c
                if self.routing is None
                else (self.routing @ c.flatten(1)).view_as(c)
                if routed is None
                else routed
            )
            self.gate.gate(r, y[..., self.head :], self.activation)
        return y


def channels(block: Block) -> Tensor:
    """The identity of the coefficients' channels, (P, P)."""
    return torch.eye(block.pad + block.ln1.weight.size(0), device=block.scale_weights.device)


class OwnMixers:
    """Several banks in a row, or of the largest coefficients alone, by the model's own modules."""

    def __init__(self, block: Block, name: str, weights: Weights):
        self.mixers = weights.module(f"{name}.own", block.mixers)
        identity = channels(block)
        self.after = [weight * identity for weight in block.scale_weights]

    def __call__(self, c: Tensor) -> Tensor:
        return self.mixers(c)


def projection(block: Block) -> tuple[Tensor, Tensor]:
    """Weight (C, P) and bias (C,) of what follows the reconstruction, also where that is
    nothing."""
    width = block.ln1.weight.size(0)
    if isinstance(block.proj_out, nn.Linear):
        return block.proj_out.weight, block.proj_out.bias
    device = block.scale_weights.device
    return torch.eye(width, device=device), torch.zeros(width, device=device)


class FoldedReconstruction:
    """From the mixers' y (S, N, ·) through the inverse wavelet and the projection to what the
    stream gains, (N, C)."""

    def __init__(
        self, block: Block, wavelet: Lifting, after: list[Tensor], name: str, weights: Weights
    ):
        matrix, bias = projection(block)
        details = len(after) - 1
        share = 0.5 if wavelet.fixed else 2.0  # of the approximation that each step keeps, squared
        self.hidden = None
        parts = [math.sqrt(share) ** details * (matrix @ after[0])]
        if wavelet.fixed:
            parts += [
                math.sqrt(share) ** (details - s + 1) * (matrix @ after[s])
                for s in range(1, details + 1)
            ]
        else:
            nets = [
                linears(net) for net in reversed(block.inverse_update_nets or wavelet.update_nets)
            ]
            gains = [-(math.sqrt(share) ** (details - s)) for s in range(1, details + 1)]
            for (hidden, last), gain, below in zip(nets, gains, after[1:], strict=True):
                # of a quantised file, what else stands here has shapes only, and lies on the meta
                # device
                weight, offset = last.weight.to(matrix.device), last.bias.to(matrix.device)
                parts.append(
                    gain * (matrix @ weight if hidden is not None else matrix @ weight @ below)
                )
                bias = bias + gain * (matrix @ offset)
            if nets[0][0] is not None:
                firsts = [
                    hidden.weight @ below
                    for (hidden, _), below in zip(nets, after[1:], strict=True)
                ]
                self.hidden = weights.stack(f"{name}.hidden", firsts, ["lifting"] * details)
                self.hidden_bias = weights.bias(
                    f"{name}.hidden.bias",
                    torch.stack([hidden.bias for hidden, _ in nets]),
                    self.hidden,
                )
        self.widths = [part.size(1) for part in parts]
        self.last = weights.matrix(f"{name}.last", torch.cat(parts, dim=1), "lifting")
        self.bias = weights.keep(f"{name}.last.bias", bias)

    def __call__(self, y: Tensor, x: Tensor, alpha: float, length: int) -> Tensor:
        """alpha·x + what it gains."""
        scales = (
            y.unbind(0)
            if self.hidden is None
            else [y[0], *self.hidden.gelu(y[1:], self.hidden_bias).unbind(0)]
        )
        joined = torch.cat(
            [part[:, :n] for part, n in zip(scales, self.widths, strict=True)], dim=1
        )
        return product_sum(self.last, joined, self.bias, x, alpha)


class OwnReconstruction:
    """The reconstruction by the model's own module: of several bases or packets, or with a norm of
    each scale before it."""

    def __init__(
        self, block: Block, wavelet: nn.Module, after: list[Tensor], name: str, weights: Weights
    ):
        matrix, bias = projection(block)
        kinds = [weights.widths.of_scale(s, len(after)) for s in range(len(after))]
        self.wavelet, self.after = wavelet, weights.stack(f"{name}.after", after, kinds)
        self.norm = weights.module(f"{name}.norm", block.scale_norm_out)
        nets = block.inverse_update_nets or wavelet.update_nets
        self.updates = None if nets is None else weights.module(f"{name}.updates", nets)
        self.last = weights.matrix(f"{name}.last", matrix, "lifting")
        self.bias = weights.keep(f"{name}.last.bias", bias)

    def __call__(self, y: Tensor, x: Tensor, alpha: float, length: int) -> Tensor:
        u = self.after(y).float()
        u = self.norm(u.view(u.size(0), -1, length, u.size(2)))
        cur = self.wavelet.reconstruct(u, self.updates).flatten(0, 1)
        return product_sum(self.last, cur, self.bias, x, alpha)


# ===== Bypass and memories


class Mean:
    """The running mean. `counts` is shared by all blocks: (new count (B,), positions averaged over
    (B, 1))."""

    def __init__(self, average: RunningMean):
        self.average = average

    def __call__(
        self, x: Tensor, length: int, part: dict, counts: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict]:
        if length > 1:
            before = {
                k: part[k].window if k == "ring" else part[k]
                for k in ("count", "sum", "ring")
                if k in part
            }
            mean, after = self.average(x.view(-1, length, x.size(1)), before)
            return mean.flatten(0, 1), self.adopt(after)
        count, n = counts
        total, new = part["sum"] + x, {"count": count}
        if "oldest" in part:  # of the ring
            total, new["ring"] = total - part["oldest"], x
        new["sum"] = total
        return (total / n).float(), new

    def adopt(self, block: dict[str, Tensor]) -> dict:
        part = {name: block[name] for name in ("count", "sum")}
        return (
            part | {"ring": Tape(block["ring"], block["ring"].size(1))} if "ring" in block else part
        )


class OwnAverage:
    """The moving average, by the model's own module."""

    def __init__(self, average: nn.Module, name: str, weights: Weights):
        self.average = weights.module(name, average)

    def __call__(self, x: Tensor, length: int, part: dict, counts) -> tuple[Tensor, dict]:
        mean, new = self.average(x.view(-1, length, x.size(1)), part)
        return mean.flatten(0, 1), new

    def adopt(self, block: dict[str, Tensor]) -> dict:
        return {"mean": block["mean"]}


class MLP:
    def __init__(self, block: Block, name: str, weights: Weights):
        layers = [module for module in block.ffwd if isinstance(module, nn.Linear)]
        # none between the two maps of mlp_layers 1
        self.gelu = any(isinstance(module, nn.GELU) for module in block.ffwd)
        self.inner = []
        for i, layer in enumerate(layers[:-1]):
            matrix = weights.matrix(f"{name}.{i}", layer.weight, "mlp")
            self.inner.append((matrix, weights.bias(f"{name}.{i}.bias", layer.bias, matrix)))
        self.last = weights.matrix(f"{name}.last", layers[-1].weight * block.alpha_mlp, "mlp")
        self.bias = weights.keep(f"{name}.last.bias", layers[-1].bias * block.alpha_mlp)

    def __call__(self, h: Tensor, x: Tensor, alpha: float) -> Tensor:
        """alpha·x + MLP(h)."""
        for matrix, bias in self.inner:
            h = product_gelu(matrix, h, bias) if self.gelu else matrix(h, bias)
        return product_sum(self.last, h, self.bias, x, alpha)


def without_modules(memory: nn.Module) -> nn.Module:
    """A copy of it with its own parameters and buffers, but not its matrices and tables, which are
    packed."""
    bare = copy.copy(memory)
    bare._modules = {}
    return bare


class Memory:
    """A product-key memory: the model's own look-up, but queries by a packed matrix, and values in
    a packed table."""

    def __init__(self, memory: ProductKeyMemory, alpha: Tensor, name: str, weights: Weights):
        self.alpha = weights.number(f"{name}.alpha", alpha)
        self.values = weights.table(f"{name}.values", memory.values.weight, "memory")
        query = weights.matrix(f"{name}.query", memory.query_proj.weight, "query")
        keys = weights.module(f"{name}.keys", without_modules(memory))
        keys.query_proj = lambda h: query(h).float()
        self.keys, self.lookup, self.folded = keys, keys.lookup, None
        if fused.MemoryReads.takes(memory, weights.device):  # for one row
            rows = torch.arange(memory.query_proj.out_features, device=weights.device)
            exact = weights.table(f"{name}.query", memory.query_proj.weight, "query")(rows)
            self.folded = fused.MemoryReads.fold(exact, keys.keys_a, keys.keys_b)

    def __call__(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        slot, weight = self.lookup(h)
        return self.alpha * self.values.weighted(slot, weight), {}

    def adopt(self, block: dict[str, Tensor]) -> dict:
        return {}


class Recall:
    """An associative memory: the model's own recurrence between packed matrices, all that read h in
    one."""

    def __init__(self, memory: AssociativeMemory, alpha: Tensor, name: str, weights: Weights):
        projections = [memory.query_key, memory.value_gate, memory.forget_write]
        self.sizes = [linear.out_features for linear in projections]
        self.inside = weights.matrix(
            f"{name}.inside", torch.cat([linear.weight for linear in projections]), "query"
        )
        self.rates_bias = weights.keep(f"{name}.rates.bias", memory.forget_write.bias)
        self.output = weights.matrix(f"{name}.output", memory.output.weight * alpha, "memory")
        self.read = weights.module(f"{name}.kernel", without_modules(memory)).read
        self.names = list(memory.start(0, alpha.detach()))

    def __call__(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        inside = self.inside(h).float().view(-1, length, sum(self.sizes))
        query_key, value_gate, rates = inside.split(self.sizes, dim=2)
        read, new = self.read(query_key, value_gate, rates + self.rates_bias, part)
        return self.output(read.flatten(0, 1)).float(), new

    def adopt(self, block: dict[str, Tensor]) -> dict:
        return {name: block[name] for name in self.names}


class WrittenMemory:
    """A memory with fast weights that the text writes, by the model's own module."""

    def __init__(self, memory: FastWeightMemory, alpha: Tensor, name: str, weights: Weights):
        self.alpha, self.memory = (
            weights.number(f"{name}.alpha", alpha),
            weights.module(name, memory),
        )
        self.names = list(memory.start(0, alpha.detach()))

    def __call__(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        read, new = self.memory(h.view(-1, length, h.size(1)), part)
        return self.alpha * read.flatten(0, 1), new

    def adopt(self, block: dict[str, Tensor]) -> dict:
        return {name: block[name] for name in self.names}


# ===== Block


class DecoderBlock:
    def __init__(
        self,
        block: Block,
        wavelet: FoldedLifting | OwnWavelet,
        source: nn.Module,
        name: str,
        weights: Weights,
    ):
        """block and its wavelet `source` as in the model; `wavelet` is the prepared one, which
        blocks may share."""
        self.pad, self.wavelet = block.pad, wavelet
        self.gamma = self.average = self.below = self.mlp = None
        self.window = 0  # of the running mean
        if block.embedding_residual_gamma is not None:
            self.gamma = weights.keep(f"{name}.gamma", block.embedding_residual_gamma)
        if block.bypass is not None:
            average = block.bypass.average
            own = not isinstance(average, RunningMean)
            self.window = 0 if own else average.window
            self.average = OwnAverage(average, f"{name}.average", weights) if own else Mean(average)
            self.below = weights.matrix(
                f"{name}.below", block.bypass.cross_layer_mix.weight, "bypass"
            )
            # (S, 1, P)
            self.gains = weights.keep(
                f"{name}.gains", F.pad(block.bypass.history_gains, (0, self.pad))
            )[:, None]
        self.norms = [
            weights.norm(f"{name}.{n}", norm)
            for n, norm in (("ln1", block.ln1), ("ln2", block.ln2))
        ]
        plain_mixers = len(block.mixers.banks) == 1 and not block.mixers.top_k
        self.mixers = (FoldedMixers if plain_mixers else OwnMixers)(
            block, f"{name}.mixers", weights
        )
        self.norm_in = weights.module(f"{name}.scale_norm", block.scale_norm_in)
        self.modulation = weights.module(f"{name}.coarse_modulation", block.coarse_modulation)
        folds = isinstance(source, Lifting) and not isinstance(block.scale_norm_out, ScaleNorm)
        self.reconstruction = (FoldedReconstruction if folds else OwnReconstruction)(
            block, source, self.mixers.after, f"{name}.reconstruction", weights
        )
        del self.mixers.after  # folded into the reconstruction
        self.alphas = [
            weights.number(f"{name}.alpha_{kind}", getattr(block, f"residual_alpha_{kind}"))
            for kind in ("spectral", "mlp")
        ]
        if block.ffwd is not None:
            self.mlp = MLP(block, f"{name}.mlp", weights)
        # Whether a step of one row may change what is remembered where it lies, by kernels of our
        # own.
        self.in_place = (
            kernels.usable(weights.device)
            and isinstance(wavelet, FoldedLifting)
            and wavelet.has_kernels
        )
        self.in_place = self.in_place and not isinstance(self.average, OwnAverage)
        plain_scales = isinstance(self.norm_in, nn.Identity) and isinstance(
            self.modulation, nn.Identity
        )
        self.joins = self.in_place and self.average is not None and plain_mixers and plain_scales
        self.memories: list[Memory | WrittenMemory | Recall] = []
        if block.pkm is not None:
            self.memories.append(Memory(block.pkm, block.alpha_pkm, f"{name}.pkm", weights))
        if block.fwpkm is not None:
            kind = WrittenMemory if block.fwpkm.writes else Memory
            self.memories.append(kind(block.fwpkm, block.alpha_fwpkm, f"{name}.fwpkm", weights))
        if block.recall is not None:
            self.memories.append(
                Recall(block.recall, block.alpha_recall, f"{name}.recall", weights)
            )
        folded = [
            memory
            for memory in self.memories
            if isinstance(memory, Memory) and memory.folded is not None
        ]
        self.reads = fused.MemoryReads(folded) if folded else None  # of one row
        for memory in folded:
            memory.folded = None  # all lie together now
        self.other_memories = [memory for memory in self.memories if memory not in folded]

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """A model's state of this block as this decoder keeps it."""
        part = self.wavelet.adopt(block)
        if "ids" in block:  # which the n-grams' table remembers, with the first block
            part["ids"] = block["ids"]
        for keeper in (self.average, *self.memories):
            if keeper is not None:
                part |= keeper.adopt(block)
        return part

    def look_back(self, part: dict) -> dict[str, Tensor]:
        """What a step reads of the state: of tapes the entries that it needs."""
        seen = {name: value for name, value in part.items() if not isinstance(value, Tape)}
        if "lags" in part:
            seen["odd"] = self.wavelet.lagged(part["lags"])
        if "ring" in part:
            seen["oldest"] = part["ring"].window[:, 0]
        return seen

    def __call__(self, x: Tensor, e: Tensor, below: Tensor | None, length: int, part: dict, counts):
        """x, the token embedding e, the mean of the block below (all (N, C)) → new x, this block's
        mean, new state.

        At one token `part` is what `look_back` gives, and the new state has one entry for each
        tape."""
        if "position" in part:  # one row, whose state is changed where it lies
            rows = self.wavelet.room(x)
            x, mean = fused.open_block(x, e, self.gamma, self.norms[0], part, self.window, rows[0])
            new = {} if counts is None else {"count": counts[0]}
            c, lags = self.wavelet.step_by_kernels(rows, part["odd"])
        else:
            mean, new = None, {}
            if self.average is not None:
                mean, new = self.average(x, length, part, counts)
            if self.gamma is not None:
                x = torch.addcmul(x, e, self.gamma)
            h = F.layer_norm(x, *self.norms[0])
            c, lags = self.wavelet.decompose(
                F.pad(h, (0, self.pad)) if self.pad else h, length, part
            )
        new |= lags
        if self.average is not None:
            context = mean if below is None else self.below(below, mean)
        if self.joins and x.size(0) == 1:
            y = self.mixers(*fused.join(c, context, self.gains, self.mixers.routing))
        else:
            if self.average is not None:
                c = torch.addcmul(
                    c, F.pad(context, (0, self.pad)) if self.pad else context, self.gains
                )
            y = self.mixers(self.modulation(self.norm_in(c[:, None]))[:, 0])
        x = self.reconstruction(y, x, self.alphas[0], length)
        h = F.layer_norm(x, *self.norms[1])
        x = self.alphas[1] * x if self.mlp is None else self.mlp(h, x, self.alphas[1])
        alone = self.reads is not None and x.size(0) == 1
        if alone:
            x = self.reads(h, x)
        for memory in self.other_memories if alone else self.memories:
            read, written = memory(h, length, part)
            x, new = x + read, new | written
        return x, mean, new


# ===== The network


class Ngrams:
    """The table of n-grams, packed, and its map; the hash is the model's own."""

    def __init__(self, ngrams: NgramEmbedding, name: str, weights: Weights):
        # narrow rows are not filled up: they are most of a file
        group = min(GROUP, round_up(ngrams.up.in_features, 2))
        self.values = weights.table(f"{name}.values", ngrams.values.weight, "embedding", group)
        self.up = weights.matrix(f"{name}.up", ngrams.up.weight, "embedding")
        self.n, self.size = ngrams.n, ngrams.size

    def __call__(self, ids: Tensor, e: Tensor, part: dict) -> tuple[Tensor, dict]:
        """ids (B, T), their embedding e (N, C) → e + what the table adds to it, and what to
        remember."""
        slots, past = read_slots(ids, part, self.n, self.size)
        return self.up(self.values(slots.flatten()), e), past


class DecoderCell:
    """One network of the model, prepared: the embedding, the blocks in the order in which they are
    applied, the last norm."""

    def __init__(self, cell, name: str, weights: Weights):
        table = (
            cell.token_embedding.whole()
            if cell.config.token_features
            else cell.token_embedding.weight
        )
        self.embedding = weights.table(f"{name}embedding", table * cell.embed_scale, "embedding")
        self.ngrams = None if cell.ngrams is None else Ngrams(cell.ngrams, f"{name}ngrams", weights)
        prepared = [
            (FoldedLifting if has_matrices(w) else OwnWavelet)(w, f"{name}wavelets.{i}", weights)
            for i, w in enumerate(cell.wavelets)
        ]
        blocks = [
            DecoderBlock(
                b, prepared[i % len(prepared)], cell.block(i)[1], f"{name}layers.{i}", weights
            )
            for i, b in enumerate(cell.layers)
        ]
        self.blocks = [blocks[i % len(blocks)] for i in range(cell.config.applications)]
        self.norm = weights.norm(f"{name}final_ln", cell.final_ln)

    def embed(self, ids: Tensor, part: dict) -> tuple[Tensor, dict]:
        """The embedding of ids (B, T), (N, C), and what of them to remember, which lies with the
        first block."""
        e = self.embedding(ids.flatten())
        return (e, {}) if self.ngrams is None else self.ngrams(ids, e, part)


def head_is_embedding(config: Config) -> bool:
    """Whether the head's matrix is the table that tokens are looked up in, with nothing done to
    it."""
    changed = config.stab("embed_scaling") or config.token_features or config.multinodal_enabled
    return config.tie_embedding_to_lm_head and not changed


COPIES = itertools.count()


def own_code(function: Callable) -> Callable:
    """A copy of a function with a code object of its own: by that torch.compile keeps programs, and
    since ours are not guarded by the decoder that they were made for, each decoder compiles a
    copy."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(COPIES)}")
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


class Decoder:
    """`model`, ready to read text and write it: `decoder(ids, state)` gives its logits and its next
    state.

    bits: None for the model's own fp32, 16 for bf16, 8 or 4. The model is not kept, but weights
    that nothing is folded into are shared with it, so it must not be trained on. States of the
    model's are taken too; a state given is left as it is."""

    @torch.no_grad()
    def __init__(
        self, model: LanguageModel, bits: int | None = None, weights: Weights | None = None
    ):
        """weights: where prepared weights come from or go to, in place of `bits`. If they come from
        a file, only the shapes of the model, which may be on the meta device, are used."""
        self.config, self.vocab_size = model.config, model.vocab_size
        weights = Weights(Widths.of(bits)) if weights is None else weights
        if weights.given is None:
            weights.device = model.cells[0].token_embedding.weight.device
        self.applications = model.config.applications
        names = [""] if len(model.cells) == 1 else [f"cells.{i}." for i in range(len(model.cells))]
        self.cells = [
            DecoderCell(cell, name, weights) for cell, name in zip(model.cells, names, strict=True)
        ]
        self.blocks = [
            b
            for cell in self.cells
            for _ in range(self.config.loop_iterations)
            for b in cell.blocks
        ]
        self.gates = None if model.gates is None else weights.module("gates", model.gates)
        heads = [cell.lm_head.weight for cell in model.cells]
        tied = head_is_embedding(self.config)
        joined = heads[0] if len(heads) == 1 else torch.cat(heads, dim=1) * model.share
        self.head = weights.matrix(
            "embedding" if tied else "head", joined, "embedding" if tied else "head"
        )
        self.device = self.cells[0].norm[1].device
        # of one row, with and without stream; all zeros, on this device even if the model is on
        # none
        self.starts = [
            model.start(1, stream)._map(
                lambda t: torch.zeros(t.shape, dtype=t.dtype, device=self.device)
            )
            for stream in (False, True)
        ]
        self.program, self.rows = None, 0
        self.graphs: dict = {}  # for graphs.py: by rows and kind of state
        self.compiles_graphs = False
        weights.check()

    def compile(self, rows: int = 1, stream: bool = True) -> None:
        """Has torch.compile make one program of the step of one token in `rows` texts, which may
        take a minute; steps of other numbers of rows stay as they are. stream: as in `start`; for
        the other kind a program is made when it is wanted.

        Raises `InputError` where a memory writes, which is not one program, and RuntimeError for
        what torch cannot compile: for want of a C++ compiler, say, or bf16 weights on a CPU that
        multiplies them."""
        if any(
            isinstance(memory, WrittenMemory) for block in self.blocks for memory in block.memories
        ):
            raise InputError("compile: not with fwpkm_inference_updates; leave one of the two out")
        # A decoder does not change, so nothing of it needs to be checked at each step; what it is
        # given does.
        options: dict = {
            "guard_filter_fn": lambda guards: [bool(GIVEN.match(guard.name)) for guard in guards]
        }
        if self.device.type == "cpu":
            options["cpp_wrapper"] = True
        run = types.MethodType(own_code(Decoder.run), self)
        self.program = torch.compile(run, fullgraph=True, dynamic=False, options=options)
        self.rows = rows
        self(torch.zeros(rows, 1, dtype=torch.int64, device=self.device), self.start(rows, stream))

    def start(self, rows: int, stream: bool = False) -> DecoderState:
        """The state at the start of `rows` texts; stream as in `LanguageModel.start`."""
        return self.adopt(self.starts[stream].select([0] * rows))

    def adopt(self, state: State) -> DecoderState:
        """A state of the model's as this decoder keeps it."""
        parts = [block.adopt(shown) for block, shown in zip(self.blocks, state.blocks, strict=True)]
        return DecoderState(parts, [block.wavelet.longest for block in self.blocks])

    def counts(self, seen: list[dict]) -> tuple[Tensor, Tensor] | None:
        """After one more token: the count of tokens (B,), and over how many the running mean goes
        (B, 1)."""
        first = seen[0]
        if "count" not in first:
            return None
        count = first["count"] + 1
        return count, (count.clamp(max=self.config.block_size) if "oldest" in first else count)[
            :, None
        ]

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, state: State | None = None, last_only: bool = True
    ) -> tuple[Tensor, DecoderState]:
        """ids (B, T) int64 → fp32 logits after the last token, (B, 1, V), or with last_only False
        after each, (B, T, V)."""
        state = self.start(ids.size(0)) if state is None else state
        state = state if isinstance(state, DecoderState) else self.adopt(state)
        if ids.size(1) > 1:
            logits, parts = self.run(ids, state.parts, last_only)
            return logits, DecoderState(parts, state.lags)
        seen = [block.look_back(part) for block, part in zip(self.blocks, state.parts, strict=True)]
        if self.program is not None and ids.size(0) == self.rows:
            plainly = [{name: plain(x) for name, x in block.items()} for block in seen]
            logits, written = self.program(plain(ids), plainly)
        else:
            logits, written = self.run(ids, seen)
        parts = [
            {
                name: part[name].then(new) if isinstance(part[name], Tape) else new
                for name, new in block.items()
            }
            for part, block in zip(state.parts, written, strict=True)
        ]
        return logits, DecoderState(parts, state.lags)

    def run(
        self, ids: Tensor, parts: list[dict], last_only: bool = True
    ) -> tuple[Tensor, list[dict]]:
        """The network, from ids to logits, with the state (at one token: what `look_back` sees of
        it) of each block."""
        rows, length = ids.shape
        cells, each = self.cells, self.applications * self.config.loop_iterations
        before = [iter(parts[c * each : (c + 1) * each]) for c in range(len(cells))]
        after: list[list[dict]] = [[] for _ in cells]
        counts = self.counts(parts) if length == 1 else None
        es, remembered = zip(
            *(cell.embed(ids, parts[c * each]) for c, cell in enumerate(cells)), strict=True
        )
        xs, means = list(es), [None] * len(cells)
        for _ in range(self.config.loop_iterations):
            for i in range(self.applications):
                for c, cell in enumerate(cells):
                    xs[c], means[c], new = cell.blocks[i](
                        xs[c], es[c], means[c], length, next(before[c]), counts
                    )
                    after[c].append(new)
                if (
                    self.gates is not None
                    and i % self.config.multinodal_cross_cell_gate_interval == 0
                ):
                    xs = self.gates[i // self.config.multinodal_cross_cell_gate_interval](xs)
        for blocks, past in zip(after, remembered, strict=True):
            blocks[0] |= past
        if last_only and length > 1:
            xs = [x.view(rows, length, -1)[:, -1] for x in xs]
        hs = [F.layer_norm(x, *cell.norm) for x, cell in zip(xs, cells, strict=True)]
        logits = self.head(hs[0] if len(hs) == 1 else torch.cat(hs, dim=1))
        return logits.float().view(rows, -1, self.vocab_size), [
            b for blocks in after for b in blocks
        ]


class PackedModel(nn.Module):
    """A decoder in the place of a model, as a quantised checkpoint gives it: the logits of every
    position, no gradients."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder, self.config, self.vocab_size = decoder, decoder.config, decoder.vocab_size
        self.start = decoder.start

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self.decoder(ids, state, last_only=False)
