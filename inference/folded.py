"""The parts of a block, prepared once for inference: what is linear is folded into its neighbours.

- The channels' transform H (Walsh–Hadamard) is folded into the matrices beside it. A mixer reads
  W H and G H; behind it H joins the first layers of the reconstruction's networks.
- Reconstruction, cur ← √2·cur − Update(u), is linear in cur: all Update networks run at once, and
  their last layers, the powers of √2 and the projection behind them are one matrix.
- U Vᵀ joins W where there is no gate. Where there is one, Vᵀ lies above W in one matrix, and U goes
  into what follows.
- Factors of √2, the scale weights and the alphas are multiplied into matrices. (The affine parts of
  LayerNorms are not: torch's kernel applies them in a pass that it makes anyhow.)
- What reads the same input is one matrix, as all projections into an associative memory are.

A step of one token and a chunk of many share all but the way through time. What a part remembers is
a dict by name, as in the model's state, but with what looks back far on a `Tape`. At one token the
parts are given what `look_back` finds in it, and give one new entry for each tape.

Letters as in model.py; N = B·T positions, w a mixer's width. Weights come from and go to a
`weights.PackedWeights` by name, so that a file can hold them prepared.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference import fused
from inference.packed import GROUP, product_gelu, product_sum, round_up
from inference.tape import Tape
from inference.weights import PackedWeights
from layers.memory import AssociativeMemory, NgramEmbedding, read_slots, recall
from model import Block, FastWeightMemory, Haar, Lifting, ProductKeyMemory, RunningMean, best_slots

# ===== The wavelet, from positions to coefficients


def linears(net: nn.Module) -> tuple[nn.Linear | None, nn.Linear]:
    """A Predict or Update network's hidden layer (None where it is linear) and last layer."""
    return (net[0], net[-1]) if isinstance(net, nn.Sequential) else (None, net)


class FoldedNet:
    """A Predict or Update network, its last layer multiplied by `scale`."""

    def __init__(self, net: nn.Module, name: str, scale: float, weights: PackedWeights):
        first, last = linears(net)
        self.hidden = self.hidden_bias = None
        if first is not None:
            self.hidden = weights.matrix(f"{name}.hidden", first.weight, "lifting")
            self.hidden_bias = weights.bias(f"{name}.hidden.bias", first.bias, self.hidden)
        self.last = weights.matrix(f"{name}.last", last.weight * scale, "lifting")
        self.bias = weights.keep(f"{name}.last.bias", last.bias * scale)  # (P,)

    def inside(self, x: Tensor) -> Tensor:
        """What the last layer reads, of x (N, P)."""
        return x if self.hidden is None else product_gelu(self.hidden, x, self.hidden_bias)


class FoldedLifting:
    """`Lifting.decompose` with trained networks. At one token all lagged inputs are known before
    the first level: one weighted gather makes them. Written with details and approximations divided
    by √2 inside the networks' last layers."""

    def __init__(self, wavelet: Lifting, name: str, weights: PackedWeights):
        self.longest = wavelet.longest_lag
        self.width = wavelet.width
        self.levels = len(wavelet.longest_lag)
        crawl = wavelet.dilation_logits
        shares = torch.ones(self.levels, 1) if crawl is None else crawl.float().softmax(1)
        self.shares = weights.keep(f"{name}.shares", shares / math.sqrt(2))  # (J, k)
        count = self.shares.size(1)
        # of each level's lags, the place in a window of the longest lag of all levels
        longest = max(self.longest)
        self.offsets = [[longest - first - k for k in range(count)] for first in wavelet.first_lag]
        scale = 1 / math.sqrt(2)
        self.predict = [
            FoldedNet(net, f"{name}.predict.{i}", -scale, weights)
            for i, net in enumerate(wavelet.predict_nets)
        ]
        self.update = [
            FoldedNet(net, f"{name}.update.{i}", scale, weights)
            for i, net in enumerate(wavelet.update_nets)
        ]
        self.predict_bias = torch.stack([net.bias for net in self.predict])  # (J, P)
        self.has_kernels = self.predict[0].last.row_kernel is not None  # our own, for one row
        self.gathers: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # indices, by rows and size

    def lagged(self, tape: Tape) -> Tensor:
        """What each level takes as odd at the next token, over √2: (B, J, P)."""
        rows, size = tape.buffer.shape[:2]
        if (rows, size) not in self.gathers:
            levels = torch.arange(self.levels)[None, :, None]
            row = torch.arange(rows)[:, None, None]
            entry = torch.tensor(self.offsets)[None] * self.levels + levels  # (1, J, k)
            entry = entry + row * size * self.levels  # (B, J, k)
            starts = torch.arange(0, entry.numel(), entry.size(2))
            shares = self.shares.repeat(rows, 1).flatten()
            parts = entry.flatten(), starts, shares
            self.gathers[rows, size] = tuple(t.to(self.shares.device) for t in parts)
        entry, starts, shares = self.gathers[rows, size]
        entries = tape.buffer.view(-1, self.width)[(tape.end - tape.length) * self.levels :]
        odd = torch.embedding_bag(entries, entry, starts, False, 0, False, shares)[0]
        return odd.view(rows, self.levels, self.width)

    def lagged_in_ring(self, ring: Tensor, position: Tensor) -> Tensor:
        """What `lagged` gives, of a ring (B, size, J, P) whose oldest entry is at position (1,)
        modulo its size."""
        rows, size = ring.shape[:2]
        if (rows, 0) not in self.gathers:
            levels = torch.arange(self.levels)[None, :, None]
            row = torch.arange(rows)[:, None, None] * size * self.levels + levels  # (B, J, 1)
            starts = torch.arange(0, rows * self.levels * self.shares.size(1), self.shares.size(1))
            shares = self.shares.repeat(rows, 1).flatten()
            parts = row, torch.tensor(self.offsets), starts, shares
            self.gathers[rows, 0] = tuple(t.to(self.shares.device) for t in parts)
        row, offsets, starts, shares = self.gathers[rows, 0]
        entry = (row + (position + offsets) % size * self.levels).flatten()
        entries = ring.view(-1, self.width)
        odd = torch.embedding_bag(entries, entry, starts, False, 0, False, shares)[0]
        return odd.view(rows, self.levels, self.width)

    def lagged_by_kernel(self, ring: Tensor, position: Tensor) -> Tensor:
        """The same plus the Predict networks' bias, of one row, by a kernel of our own."""
        if (1, -1) not in self.gathers:
            self.gathers[1, -1] = (torch.tensor(self.offsets).to(self.shares.device),)
        (offsets,) = self.gathers[1, -1]
        return fused.lags_in_ring(ring, position, offsets, self.shares, self.predict_bias)

    def look_back(self, part: dict) -> dict[str, Tensor]:
        """What a step needs to know of the past."""
        return {"odd": self.lagged(part["lags"])}

    def decompose(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        """h (N, P) → coefficients (S, N, P), and what to remember."""
        if length == 1:
            return self.step(h, part["odd"])
        tape: Tape = part["lags"]
        cur = h
        details = []
        curs = []
        for level, (predict, update) in enumerate(zip(self.predict, self.update, strict=True)):
            inputs = cur.view(-1, length, self.width)
            joined = torch.cat([tape.window[:, :, level], inputs], dim=1)
            lags = zip(self.shares[level], self.offsets[level], strict=True)
            odd = sum(share * joined[:, first : first + length] for share, first in lags)
            curs.append(joined[:, length:])
            detail = predict.last(predict.inside(cur), odd.flatten(0, 1) + predict.bias)
            cur = update.last(update.inside(detail), cur, math.sqrt(0.5)) + update.bias
            details.append(detail)
        remembered = Tape(torch.stack(curs, dim=2), tape.length)
        return torch.stack([cur, *reversed(details)]), {"lags": remembered}

    def step(self, cur: Tensor, odd: Tensor) -> tuple[Tensor, dict]:
        """cur (B, P); odd (B, J, P): what `lagged` gives."""
        odd = odd + self.predict_bias
        if self.has_kernels and cur.size(0) == 1:
            rows = self.room(cur)
            rows[0].copy_(cur)
            return self.step_by_kernels(rows, odd)
        details = []
        curs = []
        for level, (predict, update) in enumerate(zip(self.predict, self.update, strict=True)):
            curs.append(cur)
            detail = predict.last(predict.inside(cur), odd[:, level])
            cur = update.last(update.inside(detail), cur, math.sqrt(0.5)).add_(update.bias)
            details.append(detail)
        return torch.stack([cur, *reversed(details)]), {"lags": curs}

    def room(self, like: Tensor) -> list[Tensor | None]:
        """For `step_by_kernels`: rows below one another, where each product writes its result, so
        that nothing is stacked afterwards. Of those that follow the first there are none for
        torch.compile: it would copy all of a tensor of which a part is written."""
        if torch.compiler.is_compiling():
            return [like.new_empty(1, self.width), *[None] * 2 * self.levels]
        return list(like.new_empty(2 * self.levels + 1, self.width).split(1))

    def step_by_kernels(self, rows: list[Tensor | None], odd: Tensor) -> tuple[Tensor, dict]:
        """`step` of one text, from the first of what `room` gives; odd: with the bias. The rows
        become the J approximations to remember, the last approximation, and the details."""
        for level, (predict, update) in enumerate(zip(self.predict, self.update, strict=True)):
            after = level + 1
            detail = 2 * self.levels - level
            cur = rows[level]
            inside = predict.inside(cur)
            rows[detail] = predict.last.row_kernel(inside, odd[:, level], y=rows[detail])
            inside = update.inside(rows[detail])
            rows[after] = update.last.row_kernel(
                inside, cur, math.sqrt(0.5), y=rows[after], bias=update.bias
            )
        if torch.compiler.is_compiling():
            whole = torch.cat(rows)
        else:
            whole = rows[0].as_strided((len(rows), self.width), (self.width, 1))
        return whole[self.levels :, None], {"lags": whole[None, : self.levels]}

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """The lags of a model's state, on a tape."""
        longest = max(self.longest)
        like = block["lag0"]
        buffer = like.new_zeros(like.size(0), longest, self.levels, self.width)
        for level, n in enumerate(self.longest):
            buffer[:, longest - n :, level] = block[f"lag{level}"]
        return {"lags": Tape(buffer, longest)}


class FixedWavelet:
    """The decomposition of the fixed Haar wavelet, which has no matrices: the model's own."""

    has_kernels = False
    longest: tuple[int, ...] = ()  # nothing is on a tape

    def __init__(self, wavelet: Haar):
        self.wavelet = wavelet
        self.names = [f"lag{level}" for level in range(len(wavelet.longest_lag))]

    def look_back(self, part: dict) -> dict[str, Tensor]:
        return {}

    def decompose(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        """h (N, P) → coefficients (S, N, P), and what to remember."""
        c, lags = self.wavelet.decompose(h.view(-1, length, h.size(-1)), part)
        return c.flatten(1, 2), lags

    def adopt(self, block: dict[str, Tensor]) -> dict:
        return {name: block[name] for name in self.names}


# ===== Mixers


class FoldedMixers:
    """One bank of mixers between its two transforms: coefficients c (S, N, P) → y (S, N, ·)."""

    def __init__(self, block: Block, name: str, weights: PackedWeights):
        mixers = list(block.mixers.banks[0])
        scales = len(mixers)
        self.activation = block.mixers.banks[0].activation
        device = block.scale_weights.device
        width = block.pad + block.ln1.weight.size(0)
        transform = block.mixers.transform(torch.eye(width, device=device))  # H itself, (P, P)
        kinds = [weights.bits.of_scale(s, scales) for s in range(scales)]
        gated = mixers[0].gate is not None
        low_rank = mixers[0].U is not None
        rank = mixers[0].U.size(1) if low_rank and gated else 0
        # Rows of Vᵀ above W's: filled up so that what lies below them begins at a whole group.
        fp32 = min(weights.bits[kind] for kind in kinds) == 32
        self.head = round_up(rank, 16 if fp32 else GROUP) if rank else 0
        first = []
        gates = []
        self.after = []  # matrices (P, ·): u_s = after_s · y_s are the network's mixed coefficients
        for s, m in enumerate(mixers):
            inner = transform if m.proj_in is None else m.proj_in.weight.float() @ transform
            outer = transform if m.proj_out is None else transform @ m.proj_out.weight.float()
            w = m.mixer.weight
            if low_rank and not gated:
                w = w + m.U @ m.V.T
            rows = w @ inner  # (w, P)
            columns = outer * block.scale_weights[s]  # (P, w)
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
        self.routing = None
        if routing is not None and gated:
            self.routing = weights.keep(f"{name}.routing", routing)  # (S, S)

    def __call__(self, c: Tensor, routed: Tensor | None = None) -> Tensor:
        """routed (S, N, P): what the gates read, where that is known."""
        y = self.first(c)
        if self.gate is not None:
            if routed is None:
                routed = c
                if self.routing is not None:
                    routed = (self.routing @ c.flatten(1)).view_as(c)
            self.gate.gate(routed, y[..., self.head :], self.activation)
        return y


# ===== The wavelet, from coefficients to positions


class FoldedReconstruction:
    """From the mixers' y (S, N, ·) through the inverse wavelet and the projection to what the
    stream gains, (N, C)."""

    def __init__(
        self,
        block: Block,
        wavelet: Lifting | Haar,
        after: list[Tensor],
        name: str,
        weights: PackedWeights,
    ):
        """after: the matrices of `FoldedMixers`, from y to the coefficients."""
        width = block.ln1.weight.size(0)
        device = block.scale_weights.device
        if block.proj_out is None:
            matrix = torch.eye(width, device=device)  # (C, P)
            bias = torch.zeros(width, device=device)
        else:
            matrix = block.proj_out.weight
            bias = block.proj_out.bias
        details = len(after) - 1
        self.hidden = None
        if isinstance(wavelet, Haar):
            shares = wavelet.shares.tolist()
            parts = [share * (matrix @ below) for share, below in zip(shares, after, strict=True)]
        else:
            nets = block.inverse_update_nets
            nets = wavelet.update_nets if nets is None else nets
            nets = [linears(net) for net in reversed(nets)]  # coarse to fine
            # cur is multiplied by √2 at each step, what Update gives from its own step on.
            parts = [math.sqrt(2) ** details * (matrix @ after[0])]
            for s, (hidden, last) in enumerate(nets, start=1):
                gain = -(math.sqrt(2) ** (details - s))
                # Of a quantised file the model has shapes only, and lies on the meta device.
                weight = last.weight.to(matrix.device)
                offset = last.bias.to(matrix.device)
                part = gain * (matrix @ weight)
                parts.append(part if hidden is not None else part @ after[s])
                bias = bias + gain * (matrix @ offset)
            if nets[0][0] is not None:
                inner = zip(nets, after[1:], strict=True)
                firsts = [hidden.weight @ below for (hidden, _), below in inner]
                self.hidden = weights.stack(f"{name}.hidden", firsts, ["lifting"] * details)
                hidden_bias = torch.stack([hidden.bias for hidden, _ in nets])
                self.hidden_bias = weights.bias(f"{name}.hidden.bias", hidden_bias, self.hidden)
        self.widths = [part.size(1) for part in parts]
        self.last = weights.matrix(f"{name}.last", torch.cat(parts, dim=1), "lifting")
        self.bias = weights.keep(f"{name}.last.bias", bias)

    def __call__(self, y: Tensor, x: Tensor, alpha: float) -> Tensor:
        """alpha·x + what the stream x (N, C) gains."""
        scales = list(y.unbind(0))
        if self.hidden is not None:
            scales = [y[0], *self.hidden.gelu(y[1:], self.hidden_bias).unbind(0)]
        # Scales are filled up to one width, where the mixers' widths differ.
        joined = torch.cat([s[:, :n] for s, n in zip(scales, self.widths, strict=True)], dim=1)
        return product_sum(self.last, joined, self.bias, x, alpha)


# ===== Bypass


class Mean:
    """The running mean."""

    def __init__(self, average: RunningMean):
        self.average = average
        self.window = average.window

    def look_back(self, part: dict) -> dict[str, Tensor]:
        """The oldest input in the window, which leaves it at the next token."""
        return {"oldest": part["ring"].window[:, 0]} if "ring" in part else {}

    def __call__(
        self, x: Tensor, length: int, part: dict, counts: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, dict]:
        """x (N, C) → the means (N, C), and what to remember.

        counts: at one token, the new count (B,) and over how many positions the mean is (B, 1):
        the same for all blocks."""
        if length > 1:
            before = {name: part[name] for name in ("count", "sum")}
            if "ring" in part:
                before["ring"] = part["ring"].window
            mean, after = self.average(x.view(-1, length, x.size(1)), before)
            return mean.flatten(0, 1), self.adopt(after)
        count, n = counts
        new = {"count": count}
        total = part["sum"] + x
        if "oldest" in part:
            total = total - part["oldest"]
            new["ring"] = x
        new["sum"] = total
        return (total / n).float(), new

    def adopt(self, block: dict[str, Tensor]) -> dict:
        part = {name: block[name] for name in ("count", "sum")}
        if "ring" in block:
            part["ring"] = Tape(block["ring"], block["ring"].size(1))
        return part


# ===== MLP and memories


class MLP:
    """The wide MLP, its alpha multiplied into the last layer."""

    def __init__(self, block: Block, name: str, weights: PackedWeights):
        layers = [module for module in block.ffwd if isinstance(module, nn.Linear)]
        # There is none between the two maps of mlp_layers 1.
        self.gelu = any(isinstance(module, nn.GELU) for module in block.ffwd)
        self.inner = []
        for i, layer in enumerate(layers[:-1]):
            matrix = weights.matrix(f"{name}.{i}", layer.weight, "mlp")
            self.inner.append((matrix, weights.bias(f"{name}.{i}.bias", layer.bias, matrix)))
        last = layers[-1]
        self.last = weights.matrix(f"{name}.last", last.weight * block.alpha_mlp, "mlp")
        self.bias = weights.keep(f"{name}.last.bias", last.bias * block.alpha_mlp)

    def __call__(self, h: Tensor, x: Tensor, alpha: float) -> Tensor:
        """alpha·x + MLP(h), of h and x (N, C)."""
        for matrix, bias in self.inner:
            h = product_gelu(matrix, h, bias) if self.gelu else matrix(h, bias)
        return product_sum(self.last, h, self.bias, x, alpha)


class Memory:
    """A product-key memory: queries by a packed matrix, values in a packed table."""

    def __init__(self, memory: ProductKeyMemory, alpha: Tensor, name: str, weights: PackedWeights):
        self.alpha = weights.number(f"{name}.alpha", alpha)
        self.values = weights.table(f"{name}.values", memory.values.weight, "memory")
        self.query = weights.matrix(f"{name}.query", memory.query_proj.weight, "query")
        self.keys_a = weights.keep(f"{name}.keys.keys_a", memory.keys_a)  # (heads, k, d/2)
        self.keys_b = weights.keep(f"{name}.keys.keys_b", memory.keys_b)
        self.pairs = memory.pairs.to(weights.device)
        self.top_k = memory.top_k
        self.slots = memory.slots

    def score_rows(self, memory: ProductKeyMemory, name: str, weights: PackedWeights) -> Tensor:
        """The matrix whose product with h is the scores of all keys, for `fused.MemoryReads`; from
        the weights as they are packed."""
        query = weights.table(f"{name}.query", memory.query_proj.weight, "query")
        rows = torch.arange(memory.query_proj.out_features, device=weights.device)
        return fused.MemoryReads.fold(query(rows), self.keys_a, self.keys_b)

    def __call__(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        """h (N, C) → alpha · what it reads (N, C), and what to remember: nothing."""
        query = self.query(h).float()
        slot, weight = best_slots(query, self.keys_a, self.keys_b, self.pairs, self.top_k)
        return self.alpha * self.values.weighted(slot, weight), {}

    def adopt(self, block: dict[str, Tensor]) -> dict:
        return {}


class Recall:
    """An associative memory: the model's own recurrence between packed matrices."""

    def __init__(self, memory: AssociativeMemory, alpha: Tensor, name: str, weights: PackedWeights):
        projections = [memory.query_key, memory.value_gate, memory.forget_write]
        self.sizes = [linear.out_features for linear in projections]
        joined = torch.cat([linear.weight for linear in projections])
        self.inside = weights.matrix(f"{name}.inside", joined, "query")
        self.rates_bias = weights.keep(f"{name}.rates.bias", memory.forget_write.bias)
        self.output = weights.matrix(f"{name}.output", memory.output.weight * alpha, "memory")
        self.taps = weights.keep(f"{name}.kernel.taps", memory.taps)
        self.names = list(memory.start(0, alpha.detach()))

    def __call__(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        """h (N, C) → alpha · what it reads (N, C), and what to remember."""
        inside = self.inside(h).float().view(-1, length, sum(self.sizes))
        query_key, value_gate, rates = inside.split(self.sizes, dim=2)
        read, new = recall(query_key, value_gate, rates + self.rates_bias, self.taps, part)
        return self.output(read.flatten(0, 1)).float(), new

    def adopt(self, block: dict[str, Tensor]) -> dict:
        return {name: block[name] for name in self.names}


class WrittenMemory:
    """A memory with fast weights that the text writes, by the model's own module."""

    def __init__(self, memory: FastWeightMemory, alpha: Tensor, name: str, weights: PackedWeights):
        self.alpha = weights.number(f"{name}.alpha", alpha)
        self.memory = weights.module(name, memory)
        self.names = list(memory.start(0, alpha.detach()))

    def __call__(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        """h (N, C) → alpha · what it reads (N, C), and what to remember."""
        read, new = self.memory(h.view(-1, length, h.size(1)), part)
        return self.alpha * read.flatten(0, 1), new

    def adopt(self, block: dict[str, Tensor]) -> dict:
        return {name: block[name] for name in self.names}


class Ngrams:
    """The table of n-grams, packed, and its map, a product of one narrow row."""

    def __init__(self, ngrams: NgramEmbedding, name: str, weights: PackedWeights):
        # Narrow rows are not filled up to whole groups: they are most of a file.
        group = min(GROUP, round_up(ngrams.up.in_features, 2))
        self.values = weights.table(f"{name}.values", ngrams.values.weight, "embedding", group)
        self.up = weights.matrix(f"{name}.up", ngrams.up.weight, "embedding")
        self.n = ngrams.n
        self.size = ngrams.size

    def __call__(self, ids: Tensor, e: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T), their embedding e (N, C), the ids before them → e + what the table adds to
        it, and the last ids."""
        slots, past = read_slots(ids, past, self.n, self.size)
        return self.up(self.values(slots.flatten()), e), past
