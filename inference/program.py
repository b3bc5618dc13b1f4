"""A block's step of one token on a CPU as one call of our own kernels: its products and all that
lies between them, for which torch would be called some twenty times.

A `BlockProgram` writes the block of folded.py down as a `cpu_kernels.Program`, once for each number
of texts and kind of state. It is for a folded branch and an MLP whose activations the library has;
other blocks, torch.compile and steps of many texts go part by part, as chunks do. What a memory
reads is added afterwards. Which of both ways is faster is measured, as for a product.

Letters as in model.py; B texts, of one token each.
"""

import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.cpu_kernels import NOTHING, Program, Rows, Stack, bits_of
from inference.folded import FixedWavelet, FoldedLifting, counts_after
from inference.packed import FEW_ROWS, FloatStack, Matrix, PackedStack, Routed
from inference.routes import shape_class
from inference.tape import Tape


def stacks_of(weights: Matrix | FloatStack | PackedStack) -> Sequence[Stack]:
    """The products of our own CPU kernels that one of packed.py's is; empty where it has none."""
    if isinstance(weights, PackedStack):
        return weights.cpu_stacks
    return [] if weights.kernel is None else [weights.kernel]


def width_of(weights: FloatStack | PackedStack) -> int:
    """The numbers that a product of several matrices gives for each of them."""
    return weights.width if isinstance(weights, PackedStack) else weights.kernel.outputs


def tape_arguments(tape: Tape, name: str) -> dict[str, int]:
    """Where a tape that has become `longer` lies: under `name` the address of the window before,
    under "… end" that of the entry that is still to be written, and under "… row" how many numbers
    the texts are apart.

    Its buffer was made by `longer`, so that the numbers of a text lie side by side.
    """
    each = tape.buffer.stride(1)
    end = tape.buffer.data_ptr() + 4 * each * tape.end
    row = tape.buffer.stride(0)
    before = end - 4 * each * (tape.length + 1)
    return {name: before, f"{name} end": end - 4 * each, f"{name} row": row}


def write_norm(p: Program, x: Rows, norm: tuple, y: Rows, gamma: Tensor | None = None) -> Rows:
    """y = the layer norm of x, or of x + gamma·e. Returns the stream that was normed: x, or that
    sum."""
    _, weight, bias, eps = norm
    normed = x if gamma is None else p.room(x.width)
    e = NOTHING if gamma is None else p.argument("e")
    constants = [p.constant(weight), p.constant(bias), bits_of(eps)]
    p.step("norm", x.width, y.width, x.at, e, p.constant(gamma), normed.at, *constants, y.at)
    return normed


class BlockProgram(Routed):
    """The step of one block up to its memories. Each way is a method of the stream x, the
    embedding e, the running mean of the block below (all (B, C) or None), and the block's state,
    whose tapes have become `longer` and wait for their last entry. It gives the new stream, what
    the memories read (None where there are none), this block's running mean, and the new state, its
    tapes written."""

    def __init__(self, block):
        """block: a `DecoderBlock` of decode.py, which has this program and is not kept by it:
        decoders in a circle would keep their weights until the collector comes by."""
        self._block = weakref.ref(block)
        branch = block.branch
        self.levels = len(branch.longest or branch.wavelet.names)
        self.channels = branch.norm[0][0]  # C
        self.width = self.channels + branch.pad  # P
        every = [each for weights in products_of(block) for each in stacks_of(weights)]
        held = [tensor for stack in every for m in stack.held for tensor in m.values()]
        size = sum(tensor.nbytes for tensor in held)
        bits = " ".join(str(b) for b in sorted({stack.bits for stack in every}))
        kind = type(branch.wavelet).__name__
        super().__init__(f"{kind} block of {bits} bits {shape_class(self.width, size)}", size)
        self.programs: dict[tuple, tuple[Program, dict[str, Rows]]] = {}

    @staticmethod
    def takes(block) -> bool:
        """Whether a `DecoderBlock` is of parts that a program has."""
        branch = block.branch
        wavelet = getattr(branch, "wavelet", None)
        if not isinstance(wavelet, FoldedLifting | FixedWavelet) or block.mlp is None:
            return False
        mixers = branch.mixers
        if mixers.gate is not None and mixers.activation is not F.silu:
            return False
        return all(stacks_of(weights) for weights in products_of(block))

    @property
    def block(self):
        return self._block()

    def ways(self, rows: int) -> list[str]:
        both = ["by_program", "by_parts"]
        return both if rows <= FEW_ROWS else both[::-1]

    def __call__(self, x: Tensor, *others) -> tuple[Tensor, Tensor | None, Tensor | None, dict]:
        """By the fastest way."""
        return getattr(self, self.way(x.size(0), x, *others))(x, *others)

    def by_parts(self, x, e, below, part) -> tuple[Tensor, Tensor | None, Tensor | None, dict]:
        """Part by part, by torch and a call of our own kernels for each product."""
        tapes = {name: tape for name, tape in part.items() if isinstance(tape, Tape)}
        seen = self.block.look_back(part | {name: tape.before() for name, tape in tapes.items()})
        average = self.block.branch.average
        counts = None if average is None else counts_after(part, average.window)
        x, h, mean, new = self.block.by_parts(x, e, below, 1, seen, counts)
        for name, tape in tapes.items():
            tape.write(new[name])
        return x, h, mean, new | tapes

    def by_program(self, x, e, below, part) -> tuple[Tensor, Tensor | None, Tensor | None, dict]:
        """In one call."""
        rows = x.size(0)
        key = (rows, below is None, "ring" in part)
        if key not in self.programs:
            self.programs[key] = self.written(*key)
        program, places = self.programs[key]
        new = {}
        used = {"x": x.contiguous(), "e": e.contiguous()}  # kept until the call is done
        given: dict[str, int] = {}
        if below is not None:
            used["below"] = below.contiguous()
        tapes, renewed = self.entries(is_stream="ring" in part)
        for name in tapes:
            new[name] = part[name]
            given |= tape_arguments(part[name], name)
        for name in renewed:
            used[name] = part[name].contiguous()
            new[name] = used[f"new {name}"] = torch.empty_like(used[name])
        for name, tensor in used.items():
            given[name] = tensor.data_ptr()
        room = program(given)

        def result(name: str) -> Tensor | None:  # (B, C)
            if name not in places:
                return None
            return room.as_strided((rows, self.channels), (self.channels, 1), places[name].at)

        return result("y"), result("h"), result("mean"), new

    def entries(self, is_stream: bool) -> tuple[list[str], list[str]]:
        """The names of the state's tapes, and of its tensors that a step makes anew."""
        branch = self.block.branch
        tapes = []
        renewed = []
        if branch.average is not None:
            renewed += ["sum", "count"]
            tapes += ["ring"] if is_stream else []
        if isinstance(branch.wavelet, FoldedLifting):
            tapes.append("lags")
        else:
            renewed += branch.wavelet.names
        if self.block.mlp_filter is not None:
            renewed.append("before_mlp")
        return tapes, renewed

    def written(
        self, rows: int, is_first: bool, is_stream: bool
    ) -> tuple[Program, dict[str, Rows]]:
        """The program for so many texts, for a first block (with none below it) and a stream's
        state or not; and where its results lie."""
        branch = self.block.branch
        width = self.channels
        tapes, renewed = self.entries(is_stream)
        names = ["x", "e"] if is_first else ["x", "e", "below"]
        names += [each for name in tapes for each in (name, f"{name} end", f"{name} row")]
        names += [each for name in renewed for each in (name, f"new {name}")]
        p = Program(rows, names)
        places = {}
        x = p.given("x", width)
        if branch.average is not None:
            places["mean"] = self.write_mean(p, x, is_stream)
        # One below the other lie the J levels' inputs, the approximation, and the details from
        # coarse to fine: the last S of them are the coefficients, (S, B, P).
        inputs = p.room(self.width, 2 * self.levels + 1)
        x = write_norm(p, x, branch.norm, inputs, branch.gamma)
        self.write_wavelet(p, inputs)
        y = self.write_mixers(p, inputs, places.get("mean"), is_first)
        x = self.write_reconstruction(p, y, x)
        h = p.room(width)
        write_norm(p, x, self.block.norm, h)
        read = h if self.block.mlp_filter is None else self.write_filter(p, h)
        places["y"] = self.write_mlp(p, read, x)
        return p, places | ({"h": h} if self.block.memories else {})

    def write_mean(self, p: Program, x: Rows, is_stream: bool) -> Rows:
        """The running mean of x, (B, C)."""
        mean = p.room(self.channels)
        oldest = [NOTHING, NOTHING]
        if is_stream:
            oldest = [p.argument("ring"), p.argument("ring row")]
            row = p.argument("ring row")
            p.step("put", 1, self.channels, x.at, p.argument("ring end"), row)
        p.step(
            "mean", self.channels, x.at, p.argument("sum"), *oldest, p.argument("new sum"), mean.at,
            p.argument("count"), p.argument("new count"), self.block.branch.average.window,
            is_stream,  # a stream's sum is in fp64, see `RunningMean`
        )  # fmt: skip
        return mean

    def write_wavelet(self, p: Program, rows: Rows) -> None:
        """From the first of the rows to the others."""
        wavelet = self.block.branch.wavelet
        if isinstance(wavelet, FoldedLifting):
            odds = p.room(self.width, self.levels)  # (J, B, P)
            p.step(
                "lags", self.levels, wavelet.shares.size(1), self.width,
                p.argument("lags"), p.argument("lags row"),
                p.constant(torch.tensor(wavelet.offsets, device="cpu")),
                p.constant(wavelet.shares), p.constant(wavelet.predict_bias), odds.at,
            )  # fmt: skip
        for level in range(self.levels):
            cur = rows.from_place(level)
            approx = rows.from_place(level + 1)
            detail = rows.from_place(2 * self.levels - level)
            if isinstance(wavelet, FixedWavelet):
                lag = wavelet.names[level]
                places = [cur.at, p.argument(lag), p.argument(f"new {lag}"), detail.at, approx.at]
                p.step("haar", 2**level, self.width, *places)
                continue
            predict = wavelet.predict[level]
            update = wavelet.update[level]
            inside = self.write_hidden(p, predict, cur)
            p.product(predict.last.kernel, inside, detail, odds.from_place(level))
            inside = self.write_hidden(p, update, detail)
            # approx = cur·√½ + Update(detail)/√2
            p.product(update.last.kernel, inside, approx, cur, 0.5**0.5, update.bias)
        if isinstance(wavelet, FoldedLifting):
            end, row = p.argument("lags end"), p.argument("lags row")
            p.step("put", self.levels, self.width, rows.at, end, row)

    @staticmethod
    def write_hidden(p: Program, net, x: Rows) -> Rows:
        """What the last layer of a Predict or Update network reads."""
        if net.hidden is None:
            return x
        y = p.room(net.hidden.outputs)
        p.product(net.hidden.kernel, x, y, bias=net.hidden_bias, finish="gelu")
        return y

    def write_mixers(self, p: Program, rows: Rows, mean: Rows | None, is_first: bool) -> Rows:
        """The coefficients with the bypass added, mixed: (S, B, ·)."""
        branch = self.block.branch
        mixers = branch.mixers
        scales = self.levels + 1
        c = rows.from_place(self.levels)
        if mean is not None:
            context = mean
            if not is_first:
                context = p.room(self.channels)
                p.product(branch.below.kernel, p.given("below", self.channels), context, mean)
            gains = p.constant(branch.gains)
            p.step("join", scales, self.channels, self.width, c.at, context.at, gains)
        y = p.room(width_of(mixers.first), scales)
        for stack in stacks_of(mixers.first):
            p.product(stack, c, y)
        if mixers.gate is None:
            return y
        routed = c
        if mixers.gates_read_stream:
            routed = Rows(rows.at, rows.width, rows.row)  # the same for all scales
        elif mixers.routing is not None:
            routed = p.room(self.width, scales)
            p.step("route", scales, self.width, c.at, p.constant(mixers.routing), routed.at)
        for stack in stacks_of(mixers.gate):
            p.product(stack, routed, y.from_column(mixers.head), finish="gate")
        return y

    def write_reconstruction(self, p: Program, y: Rows, x: Rows) -> Rows:
        """alpha·x + what the mixed coefficients are on their way back, (B, C)."""
        reconstruction = self.block.branch.reconstruction
        parts = [y.from_place(s) for s in range(self.levels + 1)]
        if reconstruction.hidden is not None:
            inside = p.room(width_of(reconstruction.hidden), self.levels)
            for stack in stacks_of(reconstruction.hidden):
                bias = reconstruction.hidden_bias
                p.product(stack, y.from_place(1), inside, bias=bias, finish="gelu")
            parts = [y, *[inside.from_place(s) for s in range(self.levels)]]
        joined = p.room(sum(reconstruction.widths))
        to = joined
        for part, width in zip(parts, reconstruction.widths, strict=True):
            p.step("copy", width, part.at, part.row, to.at, joined.row)
            to = to.from_column(width)
        z = p.room(self.channels)
        last = reconstruction.last.kernel
        p.product(last, joined, z, x, self.block.branch.alpha, reconstruction.bias)
        return z

    def write_filter(self, p: Program, h: Rows) -> Rows:
        """What the MLP reads of h, (B, C)."""
        taps = self.block.mlp_filter.taps  # (n + 1, C)
        y = p.room(self.channels)
        past = [p.argument("before_mlp"), p.argument("new before_mlp")]
        p.step("filter", taps.size(0) - 1, self.channels, h.at, *past, p.constant(taps), y.at)
        return y

    def write_mlp(self, p: Program, h: Rows, x: Rows) -> Rows:
        """alpha·x + MLP(h), (B, C)."""
        mlp = self.block.mlp
        for matrix, bias in mlp.inner:
            y = p.room(matrix.outputs)
            p.product(matrix.kernel, h, y, bias=bias, finish=mlp.finish)
            h = y
        y = p.room(self.channels)
        p.product(mlp.last.kernel, h, y, x, self.block.alpha, mlp.bias)
        return y


class HeadProgram:
    """The last norm and the head, of one token in each text."""

    def __init__(self, norm: tuple, head: Matrix):
        """norm: as `PackedWeights.norm` gives it."""
        self.norm = norm
        self.head = head
        self.programs: dict[int, Program] = {}  # by rows

    def __getstate__(self) -> dict:
        return self.__dict__ | {"programs": {}}

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, C) → logits (B, V)."""
        rows, width = x.shape
        if rows not in self.programs:
            p = Program(rows, ["x", "logits"])
            h = p.room(width)
            write_norm(p, p.given("x", width), self.norm, h)
            p.product(self.head.kernel, h, p.given("logits", self.head.outputs))
            self.programs[rows] = p
        x = x.contiguous()
        logits = torch.empty(rows, self.head.outputs, dtype=torch.float32, device="cpu")
        self.programs[rows]({"x": x.data_ptr(), "logits": logits.data_ptr()})
        return logits


def products_of(block) -> list[Matrix | FloatStack | PackedStack]:
    """All products of a folded branch and an MLP."""
    branch = block.branch
    nets = []
    if isinstance(branch.wavelet, FoldedLifting):
        nets = [*branch.wavelet.predict, *branch.wavelet.update]
    every = [weights for net in nets for weights in (net.hidden, net.last)]
    every += [branch.below, branch.mixers.first, branch.mixers.gate]
    every += [branch.reconstruction.hidden, branch.reconstruction.last]
    every += [*[matrix for matrix, _ in block.mlp.inner], block.mlp.last]
    return [weights for weights in every if weights is not None]
