"""The parts of a block, prepared once for inference: what is linear is folded into its neighbours.

- The channels' transform H (Walsh–Hadamard) is folded into the matrices beside it. A mixer's W and
  G become W H and G H; behind a mixer H joins the first layers of the reconstruction's networks.
- Reconstruction, cur ← √2·cur − Update(u), is linear in cur: all Update networks run at once, and
  their last layers, the powers of √2 and the projection behind them are one matrix.
- U Vᵀ is added to W where there is no gate. Where there is one, Vᵀ lies above W in one matrix, and
  U goes into what follows.
- Factors of √2, the scale weights and the alphas are multiplied into matrices. (The affine parts of
  LayerNorms are not: torch's kernel applies them in a pass that it makes anyhow.)
- Matrices that read the same input become one, as all projections into an associative memory are.

A step of one token and a chunk of many tokens share everything but the way through time. What a
part remembers is a dict of tensors by name, as in the model's state, except that what reaches far
back lies on a `Tape`. For a step of one token each part has `look_back`, which reads what it needs
of the tapes; the part then returns one new entry for each tape, and decode.py writes it.

The methods that every part has:

    part(…, length, state) → result, new state     length: positions of each text in this call
    part.look_back(state) → dict                   what a step of one token reads of the tapes
    part.adopt(block) → dict                       a model's state of a block, with tapes

Letters as in model.py; N = B·T positions, w a mixer's width. Weights come from and go to a
`weights.PackedWeights` by name, so that a file can hold them prepared.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference import fused
from inference.packed import GROUP, Matrix, round_up
from inference.tape import Tape
from inference.weights import PackedWeights
from layers.memory import AssociativeMemory, NgramEmbedding, read_slots, recall
from model import (
    Block,
    FastWeightMemory,
    Haar,
    Lifting,
    Mixer,
    ProductKeyMemory,
    RunningMean,
    SquaredReLU,
    best_slots,
)

# ===== The wavelet, from positions to coefficients


def linears(net: nn.Module) -> tuple[nn.Linear | None, nn.Linear]:
    """The hidden and the last layer of a Predict or Update network; the hidden one is None where
    the network is a single linear layer."""
    return (net[0], net[-1]) if isinstance(net, nn.Sequential) else (None, net)


class FoldedNet:
    """A Predict or Update network, its last layer multiplied by `scale`."""

    def __init__(self, net: nn.Module, name: str, scale: float, weights: PackedWeights):
        first, last = linears(net)
        self.hidden = None
        self.hidden_bias = None
        if first is not None:  # else the network is linear
            self.hidden = weights.matrix(f"{name}.hidden", first.weight, "lifting")
            self.hidden_bias = weights.bias(f"{name}.hidden.bias", first.bias, self.hidden)
        self.last = weights.matrix(f"{name}.last", last.weight * scale, "lifting")
        self.bias = weights.keep(f"{name}.last.bias", last.bias * scale)  # (P,)

    def inside(self, x: Tensor) -> Tensor:
        """What the last layer reads, from the network's input x (N, P): (N, hidden width or P)."""
        return x if self.hidden is None else self.hidden(x, bias=self.hidden_bias, finish="gelu")


class FoldedLifting:
    """`Lifting.decompose` with trained networks.

    With the factors 1/√2 inside the networks' last layers, a level is

        detail = odd/√2 − Predict(cur)/√2      approx = cur·√½ + Update(detail)/√2

    In a step of one token the delayed inputs "odd" of all levels come from the past alone, so one
    weighted gather makes them before the first level.
    """

    def __init__(self, wavelet: Lifting, name: str, weights: PackedWeights):
        self.longest = wavelet.longest_lag  # of each level
        self.width = wavelet.width  # P
        self.levels = len(wavelet.longest_lag)
        crawl = wavelet.dilation_logits
        # Without a crawl each level has one lag, with it a learned mixture of k.
        shares = torch.ones(self.levels, 1) if crawl is None else crawl.float().softmax(1)
        # The share of each lag in a level's odd input, already divided by √2.
        self.shares = weights.keep(f"{name}.shares", shares / math.sqrt(2))  # (J, k)
        count = self.shares.size(1)
        # A tape's window has as many entries as the longest lag of all levels. The lag n of a level
        # is at its place longest − n, seen from the next token.
        longest = max(self.longest)
        self.offsets = [[longest - first - k for k in range(count)] for first in wavelet.first_lag]
        scale = 1 / math.sqrt(2)
        self.predict = [
            FoldedNet(net, f"{name}.predict.{i}", -scale, weights)  # it is subtracted
            for i, net in enumerate(wavelet.predict_nets)
        ]
        self.update = [
            FoldedNet(net, f"{name}.update.{i}", scale, weights)
            for i, net in enumerate(wavelet.update_nets)
        ]
        self.predict_bias = torch.stack([net.bias for net in self.predict])  # (J, P)
        # whether one row is multiplied by our own GPU kernels
        self.has_kernels = self.predict[0].last.row_kernel is not None
        # Indices of the gathers, made when first needed: by rows and buffer size for tapes, by rows
        # and 0 for rings, and (1, −1) for the kernel.
        self.gathers: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def lagged(self, tape: Tape) -> Tensor:
        """The odd input of every level at the next token, divided by √2: (B, J, P).

        tape: of entries (B, J, P), the inputs of all levels at one position.
        """
        rows, size = tape.buffer.shape[:2]
        if (rows, size) not in self.gathers:
            levels = torch.arange(self.levels)[None, :, None]
            row = torch.arange(rows)[:, None, None]
            # The buffer is seen as a table of vectors (P,), numbered by text, position and level.
            entry = torch.tensor(self.offsets)[None] * self.levels + levels  # (1, J, k)
            entry = entry + row * size * self.levels  # (B, J, k)
            starts = torch.arange(0, entry.numel(), entry.size(2))  # (B·J,), a bag of k lags each
            shares = self.shares.repeat(rows, 1).flatten()  # (B·J·k,)
            parts = entry.flatten(), starts, shares
            self.gathers[rows, size] = tuple(t.to(self.shares.device) for t in parts)
        entry, starts, shares = self.gathers[rows, size]
        # The table begins where the window does, so that the indices are the same at every step.
        entries = tape.buffer.view(-1, self.width)[(tape.end - tape.length) * self.levels :]
        return self.weighted_sums(entries, entry, starts, shares, rows)

    def lagged_in_ring(self, ring: Tensor, position: Tensor) -> Tensor:
        """What `lagged` gives, of a ring (B, size, J, P) whose oldest entry is at `position` (1,)
        modulo its size."""
        rows, size = ring.shape[:2]
        if (rows, 0) not in self.gathers:
            levels = torch.arange(self.levels)[None, :, None]
            row = torch.arange(rows)[:, None, None] * size * self.levels + levels  # (B, J, 1)
            count = self.shares.size(1)
            starts = torch.arange(0, rows * self.levels * count, count)  # (B·J,)
            shares = self.shares.repeat(rows, 1).flatten()  # (B·J·k,)
            parts = row, torch.tensor(self.offsets), starts, shares
            self.gathers[rows, 0] = tuple(t.to(self.shares.device) for t in parts)
        row, offsets, starts, shares = self.gathers[rows, 0]
        # `position` is a tensor, so that a captured CUDA graph reads the newest one at each replay.
        entry = (row + (position + offsets) % size * self.levels).flatten()  # (B·J·k,)
        return self.weighted_sums(ring.view(-1, self.width), entry, starts, shares, rows)

    def weighted_sums(
        self, entries: Tensor, entry: Tensor, starts: Tensor, shares: Tensor, rows: int
    ) -> Tensor:
        """For each text and level the sum of its k lags by their shares: (B, J, P).

        entries (·, P): a table of inputs; entry (B·J·k,): which of them; starts (B·J,): where each
        sum begins among these; shares (B·J·k,).
        """
        # By position: scale_grad_by_freq False, mode 0 (a sum), sparse False. F.embedding_bag calls
        # this too, but checks its arguments in Python first, which every step would pay for.
        odd = torch.embedding_bag(entries, entry, starts, False, 0, False, shares)[0]
        return odd.view(rows, self.levels, self.width)

    def lagged_by_kernel(self, ring: Tensor, position: Tensor) -> Tensor:
        """What `lagged_in_ring` gives plus the Predict networks' bias, of one text, by a kernel of
        our own: (1, J, P)."""
        if (1, -1) not in self.gathers:
            self.gathers[1, -1] = (torch.tensor(self.offsets).to(self.shares.device),)
        (offsets,) = self.gathers[1, -1]
        return fused.lags_in_ring(ring, position, offsets, self.shares, self.predict_bias)

    def look_back(self, part: dict) -> dict[str, Tensor]:
        """What a step of one token needs of the past: "odd", (B, J, P)."""
        return {"odd": self.lagged(part["lags"])}

    def decompose(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        """h (N, P) → coefficients (S, N, P), as `Lifting.decompose` orders them, and what to
        remember of the levels' inputs."""
        if length == 1:
            return self.step(h, part["odd"])
        tape: Tape = part["lags"]
        cur = h
        details = []
        joined_inputs = []
        for level, (predict, update) in enumerate(zip(self.predict, self.update, strict=True)):
            inputs = cur.view(-1, length, self.width)  # (B, T, P)
            joined = torch.cat([tape.window[:, :, level], inputs], dim=1)  # (B, longest + T, P)
            lags = zip(self.shares[level], self.offsets[level], strict=True)
            # (B, T, P): of each lag the inputs so many positions before, weighted
            odd = sum(share * joined[:, first : first + length] for share, first in lags)
            joined_inputs.append(joined[:, length:])  # the last `longest` of them
            detail = predict.last(predict.inside(cur), odd.flatten(0, 1) + predict.bias)  # (N, P)
            cur = update.last(update.inside(detail), cur, math.sqrt(0.5), update.bias)
            details.append(detail)
        remembered = Tape(torch.stack(joined_inputs, dim=2), tape.length)  # (B, longest, J, P)
        return torch.stack([cur, *reversed(details)]), {"lags": remembered}

    def step(self, cur: Tensor, odd: Tensor) -> tuple[Tensor, dict]:
        """`decompose` of one token: cur (B, P), and odd (B, J, P), as `lagged` gives it →
        coefficients (S, B, P), and the entry of the tape, as a list of J tensors (B, P)."""
        odd = odd + self.predict_bias
        if self.has_kernels and cur.size(0) == 1:
            rows = self.room(cur)
            rows[0].copy_(cur)
            return self.step_by_kernels(rows, odd)
        details = []
        inputs = []
        for level, (predict, update) in enumerate(zip(self.predict, self.update, strict=True)):
            inputs.append(cur)  # what the level's lags will look back on
            detail = predict.last(predict.inside(cur), odd[:, level])
            # approx = cur·√½ + Update(detail)/√2
            cur = update.last(update.inside(detail), cur, math.sqrt(0.5), update.bias)
            details.append(detail)
        return torch.stack([cur, *reversed(details)]), {"lags": inputs}

    def room(self, like: Tensor) -> list[Tensor | None]:
        """For `step_by_kernels`: 2·J + 1 rows (1, P) of one tensor, each for the result of one
        product, so that nothing needs to be stacked afterwards.

        Under torch.compile only the first row is made and the others are None: where a part of a
        tensor is written, compiled code would copy all of it.
        """
        if torch.compiler.is_compiling():
            return [like.new_empty(1, self.width), *[None] * 2 * self.levels]
        return list(like.new_empty(2 * self.levels + 1, self.width).split(1))

    def step_by_kernels(self, rows: list[Tensor | None], odd: Tensor) -> tuple[Tensor, dict]:
        """`step` of one text by our own kernels.

        rows: what `room` gives, the first one filled with the input; odd (1, J, P): with the
        Predict networks' bias. Afterwards the rows are the J levels' inputs, the approximation, and
        the details from coarse to fine.
        """
        for level, (predict, update) in enumerate(zip(self.predict, self.update, strict=True)):
            after = level + 1
            detail = 2 * self.levels - level  # the finest, of level 0, comes last
            cur = rows[level]
            rows[detail] = predict.last.row_kernel(
                predict.inside(cur), odd[:, level], y=rows[detail]
            )
            inside = update.inside(rows[detail])
            # the kernel adds a bias too
            rows[after] = update.last.row_kernel(
                inside, cur, math.sqrt(0.5), y=rows[after], bias=update.bias
            )
        if torch.compiler.is_compiling():
            whole = torch.cat(rows)
        else:
            # The rows lie below one another in memory, so the first one's address is the whole's.
            whole = rows[0].as_strided((len(rows), self.width), (self.width, 1))
        # the last S rows as coefficients (S, 1, P), the first J as an entry (1, J, P)
        return whole[self.levels :, None], {"lags": whole[None, : self.levels]}

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """The inputs that a model's state remembers, "lag0" … (B, longest lag of the level, P), on
        one tape of entries (B, J, P)."""
        longest = max(self.longest)
        like = block["lag0"]
        buffer = like.new_zeros(like.size(0), longest, self.levels, self.width)
        for level, n in enumerate(self.longest):
            # Levels with shorter lags have zeros before their inputs, which no lag reaches.
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
        """Nothing: there is no tape."""
        return {}

    def decompose(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        """h (N, P) → coefficients (S, N, P), and what to remember."""
        cur = h.view(-1, length, h.size(-1))  # (B, T, P)
        if length > 1:
            c, lags = self.wavelet.decompose(cur, part)
            return c.flatten(1, 2), lags
        # The same step by step: one token is not worth the model's saving of passes over memory.
        details = []
        lags = {}
        for name in self.names:
            past = part[name]  # (B, 2^l, P), the oldest first
            odd = past[:, :1]
            lags[name] = torch.cat([past[:, 1:], cur], dim=1)
            details.append((cur - odd) * math.sqrt(0.5))
            cur = (cur + odd) * math.sqrt(0.5)
        return torch.stack([cur, *reversed(details)]).flatten(1, 2), lags

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """The wavelet's part of a model's state, as it is."""
        return {name: block[name] for name in self.names}


# ===== Mixers


class FoldedMixers:
    """One bank of mixers between its two transforms: coefficients c (S, N, P) → y (S, N, ·), of
    which `after[s] · y[s]` would be the network's mixed coefficients (P,).

    Row by row of y, for a mixer with a gate of low rank r: first Vᵀ (proj_in H c), filled up to
    `head` rows, then (W proj_in H c) ⊙ act(G r).
    """

    def __init__(self, block: Block, name: str, weights: PackedWeights):
        bank = block.mixers.banks[0]
        mixers = list(bank)
        scales = len(mixers)
        self.activation = bank.activation
        self.gates_read_stream = bank.gates_read_stream
        width = block.pad + block.ln1.weight.size(0)  # P
        eye = torch.eye(width, device=block.scale_weights.device)
        transform = block.mixers.transform(eye)  # H itself, (P, P)
        kinds = [weights.bits.of_scale(s, scales) for s in range(scales)]
        gated = mixers[0].gate is not None
        # With a gate Vᵀ has rows of its own above W's, since the gate does not multiply them.
        rank = mixers[0].U.size(1) if gated and mixers[0].U is not None else 0
        # They are filled up so that W's rows begin at a whole group of what the next product
        # quantises together; in fp32 16 rows do, 64 bytes of y.
        fp32 = min(weights.bits[kind] for kind in kinds) == 32
        self.head = round_up(rank, 16 if fp32 else GROUP) if rank else 0
        first = []  # (head + w, P) each
        gates = []  # (w, P) each
        self.after = []  # (P, head + w) each
        for mixer, share in zip(mixers, block.scale_weights, strict=True):
            inner = transform  # from coefficients to what the mixer reads, (w, P)
            outer = transform  # from what it gives to coefficients, (P, w)
            if mixer.proj_in is not None:
                inner = mixer.proj_in.weight.float() @ transform
            if mixer.proj_out is not None:
                outer = transform @ mixer.proj_out.weight.float()
            rows, columns = self.fold(mixer, inner, outer * share, rank)
            first.append(rows)
            self.after.append(columns)
            if gated:
                # A gate that reads the stream has the full width, and so no way in of its own.
                way = transform if self.gates_read_stream else inner
                gates.append(mixer.gate.weight @ way)
        self.first = weights.stack(f"{name}.first", first, kinds)
        self.gate = weights.stack(f"{name}.gate", gates, kinds) if gated else None
        self.routing = None
        if block.mixers.scale_routing is not None and gated:
            self.routing = weights.keep(f"{name}.routing", block.mixers.scale_routing)  # (S, S)

    def fold(self, mixer: Mixer, inner: Tensor, outer: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """One mixer's matrices: from coefficients to y (head + w, P), and from y back to
        coefficients (P, head + w).

        inner (w, P) and outer (P, w): what lies before and behind the mixer; rank: columns of V,
        where Vᵀ has rows of its own.
        """
        w = mixer.mixer.weight
        if mixer.U is not None and not rank:
            w = w + mixer.U @ mixer.V.T  # without a gate both act on the same input
        rows = w @ inner  # (w, P)
        if not rank:
            return rows, outer
        filler = self.head - rank
        rows = torch.cat([F.pad(mixer.V.T @ inner, (0, 0, 0, filler)), rows])
        return rows, torch.cat([F.pad(outer @ mixer.U, (0, filler)), outer], dim=1)

    def __call__(self, c: Tensor, h: Tensor, routed: Tensor | None = None) -> Tensor:
        """c (S, N, P), the coefficients of h (N, P) → y (S, N, ·). routed (S, N, P): what the gates
        read, where a kernel has computed it already."""
        y = self.first(c)  # (S, N, head + w)
        if self.gate is not None:
            if self.gates_read_stream:
                routed = h.expand_as(c)
            elif routed is None:
                routed = c
                if self.routing is not None:
                    routed = (self.routing @ c.flatten(1)).view_as(c)  # sums over scales
            # W's rows alone are gated, in place; those of Vᵀ above them are not.
            self.gate.gate(routed, y[..., self.head :], self.activation)
        return y


# ===== The wavelet, from coefficients to positions


class FoldedReconstruction:
    """From the mixers' y (S, N, ·) through the inverse wavelet and the projection to what the
    stream gains, (N, C): `last` · [scale 0, GELU(hidden · scales 1 … J)] + bias."""

    def __init__(
        self,
        block: Block,
        wavelet: Lifting | Haar,
        after: list[Tensor],
        name: str,
        weights: PackedWeights,
    ):
        """after: the matrices of `FoldedMixers` from y to the coefficients, (P, ·) each."""
        width = block.ln1.weight.size(0)  # C
        device = block.scale_weights.device
        if block.proj_out is None:
            matrix = torch.eye(width, device=device)
            bias = torch.zeros(width, device=device)
        else:
            matrix = block.proj_out.weight  # (C, P)
            bias = block.proj_out.bias
        self.hidden = None
        self.hidden_bias = None
        if isinstance(wavelet, Haar):
            shares = wavelet.shares.tolist()
            # The inverse is a sum over scales, each with a share.
            parts = [share * (matrix @ below) for share, below in zip(shares, after, strict=True)]
        else:
            # A block's own networks for the way back, else those of the decomposition.
            nets = block.inverse_update_nets
            nets = wavelet.update_nets if nets is None else nets
            nets = [linears(net) for net in reversed(nets)]  # coarse to fine
            parts, bias = self.fold(nets, after, matrix, bias)
            if nets[0][0] is not None:
                inner = zip(nets, after[1:], strict=True)
                firsts = [hidden.weight @ below for (hidden, _), below in inner]
                components = ["lifting"] * len(firsts)
                self.hidden = weights.stack(f"{name}.hidden", firsts, components)
                hidden_bias = torch.stack([hidden.bias for hidden, _ in nets])  # (J, hidden width)
                self.hidden_bias = weights.bias(f"{name}.hidden.bias", hidden_bias, self.hidden)
        self.widths = [part.size(1) for part in parts]  # inputs of `last` from each scale
        self.last = weights.matrix(f"{name}.last", torch.cat(parts, dim=1), "lifting")
        self.bias = weights.keep(f"{name}.last.bias", bias)  # (C,)

    @staticmethod
    def fold(
        nets: list[tuple[nn.Linear | None, nn.Linear]],
        after: list[Tensor],
        matrix: Tensor,
        bias: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """The columns of `last` that read each scale, (C, ·) each, and its bias (C,).

        nets: the layers of the Update networks from coarse to fine; matrix (C, P) and bias (C,): of
        the projection behind the wavelet.
        """
        details = len(nets)
        # Each of the J steps multiplies cur by √2: the approximation J times, and what the Update
        # network of step s subtracts as often as there are steps after it.
        parts = [math.sqrt(2) ** details * (matrix @ after[0])]
        for s, (hidden, last) in enumerate(nets, start=1):
            gain = -(math.sqrt(2) ** (details - s))
            # Weights of a quantised checkpoint's model have shapes only, on the meta device, while
            # `matrix` may be a constant on the CPU.
            weight = last.weight.to(matrix.device)
            offset = last.bias.to(matrix.device)
            part = gain * (matrix @ weight)
            # A linear network reads the coefficients, and so has after[s] before it; another reads
            # its hidden layer, which has after[s] folded in.
            parts.append(part if hidden is not None else part @ after[s])
            bias = bias + gain * (matrix @ offset)
        return parts, bias

    def __call__(self, y: Tensor, x: Tensor, alpha: float) -> Tensor:
        """y (S, N, ·), the stream x (N, C) → alpha·x + what the stream gains, (N, C)."""
        scales = list(y.unbind(0))
        if self.hidden is not None:
            scales = [y[0], *self.hidden.gelu(y[1:], self.hidden_bias).unbind(0)]
        # Where mixers differ in width, their scales are filled up to one; the filler is cut off.
        joined = torch.cat([s[:, :n] for s, n in zip(scales, self.widths, strict=True)], dim=1)
        return self.last(joined, x, alpha, self.bias)  # (N, C)


# ===== Bypass


def counts_after(part: dict, window: int) -> tuple[Tensor, Tensor]:
    """After one more token: the count of tokens (B,), and over how many positions the running mean
    goes (B, 1). part: the state of a block, all of which count the same tokens."""
    count = part["count"] + 1
    # A stream's mean is over the last block_size positions: "oldest" is what leaves it next, "ring"
    # all of them, on a tape or where a kernel reads them.
    windowed = "oldest" in part or "ring" in part
    n = count.clamp(max=window) if windowed else count  # (B,)
    return count, n[:, None]


class Mean:
    """The running mean of the stream."""

    def __init__(self, average: RunningMean):
        self.average = average
        self.window = average.window

    def look_back(self, part: dict) -> dict[str, Tensor]:
        """ "oldest" (B, C): the oldest input in the window, which leaves it at the next token;
        nothing where the mean is over all of the text."""
        return {"oldest": part["ring"].window[:, 0]} if "ring" in part else {}

    def __call__(
        self, x: Tensor, length: int, part: dict, counts: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, dict]:
        """x (N, C) → the means (N, C), and what to remember.

        counts: for one token, how many tokens there are now (B,), and over how many positions the
        mean is (B, 1). `Decoder` computes them once for all blocks.
        """
        if length > 1:
            # The model's own mean, on the state as the model has it.
            before = {name: part[name] for name in ("count", "sum")}
            if "ring" in part:
                before["ring"] = part["ring"].window
            mean, after = self.average(x.view(-1, length, x.size(1)), before)
            return mean.flatten(0, 1), self.adopt(after)
        count, n = counts
        new = {"count": count}
        total = part["sum"] + x  # in fp64 where entries also leave it: see `RunningMean`
        if "oldest" in part:
            total = total - part["oldest"]
            new["ring"] = x  # one entry, which the caller puts onto the tape
        new["sum"] = total
        return (total / n).float(), new

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """The mean's part of a model's state, its ring on a tape."""
        part = {name: block[name] for name in ("count", "sum")}
        if "ring" in block:
            part["ring"] = Tape(block["ring"], block["ring"].size(1))
        return part


# ===== MLP and memories


class MLP:
    """The wide MLP, its alpha multiplied into the last layer."""

    def __init__(self, block: Block, name: str, weights: PackedWeights):
        layers = [module for module in block.ffwd if isinstance(module, nn.Linear)]
        # With mlp_layers 1 the MLP is two maps with nothing between them.
        kinds = [type(module) for module in block.ffwd]
        # what follows an inner layer, by its name among our own kernels' finishes
        self.finish = "gelu" if nn.GELU in kinds else "relu2" if SquaredReLU in kinds else ""
        self.inner = []  # (matrix, bias) of all layers but the last
        for i, layer in enumerate(layers[:-1]):
            matrix = weights.matrix(f"{name}.{i}", layer.weight, "mlp")
            self.inner.append((matrix, weights.bias(f"{name}.{i}.bias", layer.bias, matrix)))
        last = layers[-1]  # (C, ·)
        self.last = weights.matrix(f"{name}.last", last.weight * block.alpha_mlp, "mlp")
        self.bias = weights.keep(f"{name}.last.bias", last.bias * block.alpha_mlp)

    def inside(self, matrix: Matrix, h: Tensor, bias: Tensor) -> Tensor:
        """An inner layer and its activation: h (N, in) → (N, out)."""
        if self.finish == "gelu":
            return matrix(h, bias=bias, finish="gelu")
        h = matrix(h, bias=bias)
        return F.relu(h).square_() if self.finish == "relu2" else h

    def __call__(self, h: Tensor, x: Tensor, alpha: float) -> Tensor:
        """h, the normed stream, and x, the stream, both (N, C) → alpha·x + MLP(h), (N, C)."""
        for matrix, bias in self.inner:
            h = self.inside(matrix, h, bias)
        return self.last(h, x, alpha, self.bias)


class Memory:
    """A product-key memory: queries by a packed matrix, values in a packed table."""

    def __init__(self, memory: ProductKeyMemory, alpha: Tensor, name: str, weights: PackedWeights):
        self.alpha = weights.number(f"{name}.alpha", alpha)
        self.values = weights.table(f"{name}.values", memory.values.weight, "memory")
        self.query = weights.matrix(f"{name}.query", memory.query_proj.weight, "query")
        self.keys_a = weights.keep(f"{name}.keys.keys_a", memory.keys_a)  # (heads, side, d/2)
        self.keys_b = weights.keep(f"{name}.keys.keys_b", memory.keys_b)  # the same
        self.pairs = memory.pairs.to(weights.device)
        self.top_k = memory.top_k
        self.slots = memory.slots

    def score_rows(self, memory: ProductKeyMemory, name: str, weights: PackedWeights) -> Tensor:
        """The matrix (heads·2·side, C) whose product with h is the scores of all keys, for
        `fused.MemoryReads`."""
        # From the weights as they are packed, so that both ways choose the same slots.
        query = weights.table(f"{name}.query", memory.query_proj.weight, "query")
        rows = torch.arange(memory.query_proj.out_features, device=weights.device)
        return fused.MemoryReads.fold(query(rows), self.keys_a, self.keys_b)

    def __call__(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        """h (N, C) → alpha · what it reads (N, C), and what to remember: nothing."""
        query = self.query(h).float()  # (N, heads·d)
        # (N, heads·top_k) each: rows of the table, and their shares, which sum to 1 in each head
        slot, weight = best_slots(query, self.keys_a, self.keys_b, self.pairs, self.top_k)
        return self.alpha * self.values.weighted(slot, weight), {}

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """Nothing: it has no state."""
        return {}


class Recall:
    """An associative memory: the model's own recurrence between packed matrices."""

    def __init__(self, memory: AssociativeMemory, alpha: Tensor, name: str, weights: PackedWeights):
        projections = [memory.query_key, memory.value_gate, memory.forget_write]
        self.sizes = [linear.out_features for linear in projections]
        joined = torch.cat([linear.weight for linear in projections])  # all of them read h
        self.inside = weights.matrix(f"{name}.inside", joined, "query")
        self.rates_bias = weights.keep(f"{name}.rates.bias", memory.forget_write.bias)
        self.output = weights.matrix(f"{name}.output", memory.output.weight * alpha, "memory")
        self.taps = weights.keep(f"{name}.kernel.taps", memory.taps)
        self.least = memory.least
        self.names = list(memory.start(0, alpha.detach()))  # of its state; alpha for the type only

    def __call__(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        """h (N, C) → alpha · what it reads (N, C), and what to remember."""
        inside = self.inside(h).float().view(-1, length, sum(self.sizes))  # (B, T, ·)
        query_key, value_gate, rates = inside.split(self.sizes, dim=2)
        # read (B, T, ·)
        rates = rates + self.rates_bias
        read, new = recall(query_key, value_gate, rates, self.taps, part, self.least)
        return self.output(read.flatten(0, 1)).float(), new

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """The memory's part of a model's state, as it is."""
        return {name: block[name] for name in self.names}


class WrittenMemory:
    """A memory with fast weights that the text writes, by the model's own module."""

    def __init__(self, memory: FastWeightMemory, alpha: Tensor, name: str, weights: PackedWeights):
        self.alpha = weights.number(f"{name}.alpha", alpha)
        self.memory = weights.module(name, memory)
        self.names = list(memory.start(0, alpha.detach()))  # of its state; alpha for the type only

    def __call__(self, h: Tensor, length: int, part: dict) -> tuple[Tensor, dict]:
        """h (N, C) → alpha · what it reads (N, C), and what to remember."""
        read, new = self.memory(h.view(-1, length, h.size(1)), part)
        return self.alpha * read.flatten(0, 1), new

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """The memory's part of a model's state, as it is."""
        return {name: block[name] for name in self.names}


class Ngrams:
    """The table of n-grams, packed, and the map from its narrow rows to the stream's width."""

    def __init__(self, ngrams: NgramEmbedding, name: str, weights: PackedWeights):
        # Rows narrower than GROUP are one group each. Filled up to whole groups they would be
        # several times as large, and this table is most of a file. 2: two 4-bit numbers a byte.
        group = min(GROUP, round_up(ngrams.up.in_features, 2))
        self.values = weights.table(f"{name}.values", ngrams.values.weight, "embedding", group)
        self.up = weights.matrix(f"{name}.up", ngrams.up.weight, "embedding")
        self.n = ngrams.n
        self.size = ngrams.size

    def __call__(self, ids: Tensor, e: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T) int64, their embedding e (N, C), the ids before them → e + what the table adds
        to it (N, C), and the last ids, for the next call."""
        slots, past = read_slots(ids, past, self.n, self.size)  # slots (B, T)
        return self.up(self.values(slots.flatten()), e), past
