"""Weight matrices prepared for inference at 32, 16, 8 or 4 bits, and their products.

A product of one row reads each weight once and does two operations with it, so it takes as long as
its bytes take to come from memory. From some tens of rows on it takes as long as its arithmetic.
Which kernel is the fastest depends on the CPU and on the number of rows N. So every class here
names the ways that its product can be computed, and on a CPU the fastest is found by timing them
(routes.py). The interface is one:

    matrix(x, add, beta, bias) = x Wᵀ + beta·add + bias     x (N, in), W (out, in), add (N, out)

x may be of any float type. Few rows are multiplied by the quantised numbers as they lie: on a CPU
by the library of cpu_kernels.py or by torch's kernels, one row on a GPU by those of kernels.py. For
many rows, where unpacking costs little beside the product, weights are unpacked a slice at a time.

    python -m research.decoding_speed --kernels           # times every way of every width
    python -m research.cuda_decoding --only products      # a GPU's
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.device import wide_type
from inference import cpu_kernels, kernels
from inference.routes import fastest, shape_class

GROUP = 64  # input channels that share a scale and an offset at 4 bits

# What is unpacked at a time for many rows: a slice should stay in the cache until it is multiplied.
UNPACKED = 2**20  # weights, 2 MB of bf16
LEAST_ROWS = 256  # rows of W even if that is more: a product of fewer is slow
UNPACKED_ON_GPU = 2**27  # weights, 256 MB of bf16: its caches hold no slice, so what memory spares

BLOCK = 64  # int4 outputs are filled up to a multiple of this, as torch's int4 kernels want


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


# ===== Quantising


def to_int8(weight: Tensor, group: int = GROUP) -> dict[str, Tensor]:
    """Quantises each row of `weight` (out, in) with one bf16 scale: w ≈ q·scale.

    Returns "int8" (out, in) and "scale" (out,). Inputs are filled up with zeros to whole groups,
    because torch's kernel reads them in such steps.
    """
    weight = F.pad(weight.float(), (0, -weight.size(1) % group))
    largest = weight.abs().amax(1, keepdim=True)  # (out, 1)
    # 127, so that −128 is left over and the range is symmetric. 1e-30 keeps a row of zeros from
    # being divided by zero. q is rounded for the bf16 scale, which is the one that is stored.
    scale = (largest / 127).clamp_min(1e-30).bfloat16()
    q = (weight / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
    return {"int8": q, "scale": scale[:, 0].contiguous()}


def fit_int4(w: Tensor, share: float) -> tuple[Tensor, ...]:
    """Quantises groups w (out, groups, group) when q from −8 to 7 spans `share` of each group's
    range around its middle.

    Returns q, scale and offset of w ≈ q·scale + offset, and the squared error of each group, all
    fp32 and, but for q, (out, groups, 1).
    """
    low = w.amin(2, keepdim=True)
    high = w.amax(2, keepdim=True)
    # 16 numbers have 15 steps between them; 1e-30 stands for the step of a constant group. Scale
    # and offset are rounded to bf16 before q is chosen, since files store them so.
    scale = ((high - low) * share / 15).clamp_min(1e-30).bfloat16().float()
    # The middle of −8 … 7 is −½, half a step below zero.
    offset = ((high + low) / 2 + scale / 2).bfloat16().float()
    q = ((w - offset) / scale).round_().clamp_(-8, 7)
    error = (q * scale + offset - w).square_().sum(2, keepdim=True)
    return q, scale, offset, error


def to_int4(weight: Tensor, group: int = GROUP) -> dict[str, Tensor]:
    """Quantises `weight` (out, in) in groups of `group` inputs: w ≈ (q − 8)·scale + offset, q from
    0 to 15.

    Returns "int4" (out, in/2), a byte of which holds an even input's q in its low half and the odd
    one's in its high half, and "steps" (out, in/group, 2), each group's bf16 scale and offset.
    Inputs are filled up with zeros to whole groups.
    """
    weight = F.pad(weight.float(), (0, -weight.size(1) % group))
    # 2²² weights at a time: what is computed on the way is several times as large as they are.
    rows_at_a_time = max(1, 2**22 // max(1, weight.size(1)))
    packed = []
    steps = []
    for part in weight.split(rows_at_a_time):
        w = part.unflatten(1, (-1, group))  # (rows, groups, group)
        best = fit_int4(w, 1.0)
        # A range that leaves out the largest weights gives all the others finer steps. Each group
        # keeps the one of these ranges that has the least squared error.
        for share in (0.94, 0.88, 0.82):
            fit = fit_int4(w, share)
            better = fit[-1] < best[-1]
            best = tuple(torch.where(better, *both) for both in zip(fit, best, strict=True))
        q, scale, offset, _ = best
        q = (q + 8).to(torch.uint8).flatten(1)  # (rows, in)
        packed.append(q[:, ::2] | q[:, 1::2] << 4)  # (rows, in/2)
        steps.append(torch.cat([scale, offset], dim=2).bfloat16())  # (rows, groups, 2)
    return {"int4": torch.cat(packed), "steps": torch.cat(steps)}


def from_int4(packed: Tensor) -> Tensor:
    """Bytes (…, n) → the numbers from 0 to 15 in them (…, 2n), a byte's low half first."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def quantised(weight: Tensor, bits: int, group: int = GROUP) -> dict[str, Tensor]:
    """The tensors that hold `weight` (out, in) at 32, 16, 8 or 4 bits, as they lie in a file.

    The keys are "float32"; "float16" (whose values are bf16); those of `to_int8`; or those of
    `to_int4`.
    """
    if bits == 8:
        return to_int8(weight, group)
    if bits == 4:
        return to_int4(weight, group)
    return {f"float{bits}": weight.to(torch.float32 if bits == 32 else torch.bfloat16)}


# ===== Products of one matrix

# The most rows that our own CPU kernels are tried for; beyond these the products of a library,
# which keep weights in registers for many rows, are faster.
MOST_ROWS = 64
FEW_ROWS = 8  # for which our own are taken where nothing is measured
# Beyond so many rows nothing is: a product takes long enough for trying all ways to be felt, and
# arithmetic decides, at which the first way was the fastest on every CPU that was tried.
MOST_MEASURED = 64


def filled(x: Tensor, width: int) -> Tensor:
    """x (N, in) with zeros after it up to `width`: (N, width), contiguous."""
    return F.pad(x, (0, width - x.size(1))) if x.size(1) < width else x.contiguous()


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ by oneDNN; `weight` as it lies or in oneDNN's own layout."""
    # No bias, and nothing fused behind the product ("none", with no scalars and no algorithm).
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def plus(y: Tensor, add: Tensor | None, beta: float) -> Tensor:
    """y + beta·add, or y where there is nothing to add."""
    return y if add is None else torch.add(y, add, alpha=beta)


class Routed(ABC):
    """Something with several ways to compute one thing, of which it takes the fastest. A way is a
    method, known by its name."""

    opaque = frozenset({"by_onednn"})  # ways that torch.compile cannot make a part of a program
    # Bytes from which weights are taken to come from memory at each step: matrices as large belong
    # to networks that no cache holds.
    COLD = 2**17

    def __init__(self, key: str, size: int):
        """key: kind and class of shapes, as in `routes.fastest`; size: bytes of all weights."""
        self.key = key
        self.cold = size >= self.COLD
        self.chosen: dict[int, str] = {}  # by rows

    @abstractmethod
    def ways(self, rows: int) -> list[str]:
        """The ways for so many rows; what is taken where nothing is measured comes first. On a GPU
        there is one."""

    def way(self, rows: int, *example) -> str:
        """The fastest way for so many rows. example: arguments to time the ways with."""
        if torch.compiler.is_compiling():  # nothing can be timed now
            names = self.ways(rows)
            fit = [name for name in names if name not in self.opaque] or names
            name = self.chosen.get(rows)
            return name if name in fit else fit[0]
        if rows not in self.chosen:
            names = self.ways(rows)
            if rows > MOST_MEASURED:
                names = names[:1]
            calls = {name: functools.partial(getattr(self, name), *example) for name in names}
            key = f"{self.key}, {shape_class(rows)} rows"
            self.chosen[rows] = fastest(key, calls, self.cold)
        return self.chosen[rows]


def with_kernel(rows: int, others: list[str]) -> list[str]:
    """The ways of a product of so many rows where there is one by our own CPU kernel."""
    if rows > MOST_ROWS:
        return others
    return ["by_kernel", *others] if rows <= FEW_ROWS else [*others, "by_kernel"]


class Matrix(Routed):
    """W (out, in) at some width, ready to multiply by. Each way is a method of x (N, in), add
    (N, out) or None, and beta, that gives x Wᵀ + beta·add."""

    bits: int
    kind: torch.dtype  # the type that x is multiplied in

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        """tensors: as `quantised` gives them; outputs: the rows of W that are not filler."""
        first = next(iter(tensors.values()))
        super().__init__(f"{self.bits} bits {shape_class(outputs, first.size(1))}", first.nbytes)
        self.outputs = outputs
        self.on_cpu = first.device.type == "cpu"
        self.row_kernel: kernels.Stack | None = None  # a GPU's, for one row
        if kernels.usable(first.device):
            self.row_kernel = kernels.Stack([tensors])
        self.kernel: cpu_kernels.Stack | None = None  # a CPU's, for few rows
        if cpu_kernels.usable(first.device):
            self.kernel = cpu_kernels.Stack([tensors])

    def by_kernel(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """By our own CPU kernel."""
        return self.kernel(x, add, beta)

    def __call__(
        self,
        x: Tensor,
        add: Tensor | None = None,
        beta: float = 1.0,
        bias: Tensor | None = None,
        finish: str = "",
    ) -> Tensor:
        """x (N, in) → x Wᵀ + beta·add + bias (N, out), or with finish "gelu" its GELU. add: (N,
        out), (1, out) or (out,); bias: (out,)."""
        if self.row_kernel is not None and x.size(0) == 1:
            add = add if add is None else add.view(1, -1)
            return self.row_kernel(x, add, beta, bias=bias, finish=finish)[:, : self.outputs]
        way = self.way(x.size(0), x, None, 1.0)
        if way == "by_kernel":
            add = add if add is None else add.view(-1, add.size(-1))
            return self.kernel(x, add, beta, bias=bias, finish=finish)
        if bias is not None:  # small beside the weights
            add = bias if add is None else torch.add(bias, add, alpha=beta)
            beta = 1.0
        y = getattr(self, way)(x, add, beta)
        return F.gelu(y) if finish == "gelu" else y


class FloatMatrix(Matrix):
    """W (out, in) in fp32."""

    bits = 32
    kind = torch.float32
    BLOCKS = 8  # of rows, which 1, 2, 4 or 8 threads share evenly
    MOST_COLUMNS = 128  # rows that W xᵀ, in place of x Wᵀ, is tried for

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        weight = tensors["float32"]
        # Rows of zeros make the number of rows a multiple of BLOCKS.
        filler = -outputs % self.BLOCKS
        padded = F.pad(weight, (0, 0, 0, filler)) if filler else weight.contiguous()
        self.blocks = padded.view(self.BLOCKS, -1, weight.size(1))  # (BLOCKS, out/BLOCKS, in)
        self.weight = padded[:outputs]
        super().__init__({"float32": self.weight}, outputs)
        self.has_onednn = torch.backends.mkldnn.is_available()

    def ways(self, rows: int) -> list[str]:
        if not self.on_cpu:
            return ["by_linear"]
        names = ["by_columns", "by_linear"] if rows <= self.MOST_COLUMNS else ["by_linear"]
        if rows == 1:
            names = ["by_blocks", *names]
        if self.has_onednn:
            # From 8 rows on it was the fastest on a CPU with AVX-512.
            first = rows >= 8 and torch.backends.cpu.get_cpu_capability() == "AVX512"
            names = ["by_onednn", *names] if first else [*names, "by_onednn"]
        return names if self.kernel is None else with_kernel(rows, names)

    def by_linear(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """By F.linear."""
        return plus(F.linear(x.float(), self.weight), add, beta)

    def by_columns(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """As W xᵀ: for a few rows MKL was three times as fast so on an AMD CPU."""
        return plus((self.weight @ x.float().T).T, add, beta)  # (out, N) → (N, out)

    def by_onednn(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """By oneDNN, with the weights as they lie."""
        return plus(onednn_product(x.float(), self.weight), add, beta)

    def by_blocks(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """One row: W is cut into row blocks, which are multiplied as a batch. MKL's product of a
        matrix and one vector reached a quarter of the memory's bandwidth on an AMD CPU, and its
        batched one all of it."""
        x = x.float()
        # x as one column for each block. Of a matrix with a single column torch tells the layout by
        # its strides alone: (1, in) says column-major; x.view(in, 1) would be taken for a row-major
        # matrix, and the product was three times slower. Stride 0 repeats x for all blocks.
        inputs = x.size(1)
        column = x.reshape(inputs).as_strided((self.BLOCKS, inputs, 1), (0, 1, inputs))
        if add is None or self.blocks.size(0) * self.blocks.size(1) != self.outputs:
            y = torch.bmm(self.blocks, column).view(1, -1)  # (1, out with filler)
            return plus(y[:, : self.outputs], add, beta)
        add = add.reshape(self.BLOCKS, -1, 1)  # without filler, `add` can be cut as W is
        return torch.baddbmm(add, self.blocks, column, beta=beta).view(1, -1)


def at_a_time(inputs: int, device: str = "cpu") -> int:
    """How many rows of W, each with `inputs` weights, are unpacked at a time: what a cache holds,
    but enough rows for a fast product; on a GPU, what memory can spare."""
    return max(LEAST_ROWS, (UNPACKED if device == "cpu" else UNPACKED_ON_GPU) // inputs)


def product_by_slices(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ (N, out), in the type of x (N, in), of a weight (out, in) of another type: a slice of
    its rows is converted at a time."""
    slices = weight.split(at_a_time(x.size(1), x.device.type))
    return torch.cat([F.linear(x, part.to(x.dtype)) for part in slices], dim=1)


class HalfMatrix(Matrix):
    """W (out, in) in bf16; in oneDNN's own layout on a CPU that has bf16 instructions, where there
    is no kernel of our own, which reads the weights as they lie."""

    bits = 16
    kind = torch.bfloat16
    FEW = 4  # rows for which bf16 products are tried on a CPU that imitates them

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        super().__init__(tensors, outputs)
        weight = tensors["float16"]
        self.wide = wide_type(weight.device)
        self.weight = weight
        on_cpu_with_bf16 = self.on_cpu and self.wide == torch.bfloat16
        has_onednn = on_cpu_with_bf16 and torch.backends.mkldnn.is_available()
        # One layout alone is kept, since a second one would be all the weights once more.
        self.reordered = has_onednn and self.kernel is None
        if self.reordered:
            # 1: laid out for one row, where reading the weights is all that takes time
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        if self.kernel is not None:
            self.kind = torch.float32  # what our own kernel reads and gives

    def ways(self, rows: int) -> list[str]:
        if self.reordered:
            return ["by_onednn"]
        names = ["by_linear"]
        if self.wide != torch.bfloat16:
            names = ["by_linear", "by_slices"] if rows <= self.FEW else ["by_slices"]
        return names if self.kernel is None else with_kernel(rows, names)

    def by_onednn(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """By oneDNN, in its own layout."""
        return plus(onednn_product(x.to(torch.bfloat16), self.weight), add, beta)

    def by_linear(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """By F.linear in bf16."""
        return plus(F.linear(x.to(torch.bfloat16), self.weight), add, beta)

    def by_slices(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """In fp32, a slice of W at a time: for a CPU that would imitate products of bf16."""
        return plus(product_by_slices(x.to(self.wide), self.weight), add, beta)


class Int8Matrix(Matrix):
    """W (out, in) as int8 rows, each with a scale."""

    bits = 8
    kind = torch.bfloat16
    FEW = 16  # rows for which torch's kernel was the faster way

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        super().__init__(tensors, outputs)
        self.weight = tensors["int8"]  # (out, in), in a multiple of GROUP
        self.scale = tensors["scale"]  # (out,)
        self.wide = wide_type(self.weight.device)
        if self.kernel is not None:
            self.kind = torch.float32  # what our own kernel reads and gives

    def ways(self, rows: int) -> list[str]:
        few = rows <= self.FEW
        if not self.on_cpu:
            # With a kernel of our own torch's is not used at all: on a GPU it is slow (see
            # runs.md).
            return ["by_torch" if few and self.row_kernel is None else "by_slices"]
        names = ["by_torch", "by_slices"] if few else ["by_slices", "by_torch"]
        return names if self.kernel is None else with_kernel(rows, names)

    def by_torch(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """By torch's kernel: int8 becomes bf16 in registers, on the way to the product."""
        x = filled(x.to(torch.bfloat16), self.weight.size(1))
        return plus(torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale), add, beta)

    def by_slices(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """A slice of W unpacked at a time."""
        x = filled(x.to(self.wide), self.weight.size(1))
        # A row's scale is a factor of its output, so it is applied after the product.
        return plus(product_by_slices(x, self.weight).mul_(self.scale), add, beta)


class Int4Matrix(Matrix):
    """W (out, in) in 4-bit groups, as they lie in a file; in the layout of torch's kernel besides
    where there is no kernel of our own."""

    bits = 4
    kind = torch.bfloat16
    FEW = 64  # rows for which torch's kernel was the faster way

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        super().__init__(tensors, outputs)
        self.packed = tensors["int4"]  # (out, in/2)
        self.steps = tensors["steps"]  # (out, groups, 2)
        self.inputs = self.packed.size(1) * 2
        self.group = self.inputs // self.steps.size(1)
        self.wide = wide_type(self.packed.device)
        if self.kernel is not None:
            self.kind = torch.float32  # what our own kernel reads and gives
        elif self.row_kernel is None:
            self.lay_out_for_torch()

    def lay_out_for_torch(self) -> None:
        """Makes what torch's kernel for the device wants."""
        extra = -self.packed.size(0) % BLOCK
        # The filler's scales and offsets are zero, and so are its weights.
        packed = F.pad(self.packed, (0, 0, 0, extra))
        steps = F.pad(self.steps, (0, 0, 0, 0, 0, extra))
        self.torch_steps = steps.transpose(0, 1).contiguous()  # (groups, out, 2)
        if self.on_cpu:
            numbers = from_int4(packed).int()
            # 1: tiles of inputs, which the CPU's layout does not have
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
            self.torch_kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            # Tiles of 16 inputs that lie together: 8 of them where they divide the inputs, else 4,
            # which always do, since inputs are whole groups of 64.
            tiles = 8 if self.inputs % 128 == 0 else 4
            # CUDA's kernel wants the even input in a byte's high half: the halves change places.
            swapped = (packed << 4) | (packed >> 4)
            self.weight = torch.ops.aten._convert_weight_to_int4pack(swapped, tiles)
            self.torch_kernel = torch.ops.aten._weight_int4pack_mm

    def ways(self, rows: int) -> list[str]:
        if not self.on_cpu:
            return ["by_torch" if self.row_kernel is None else "by_slices"]
        if self.kernel is not None:
            return with_kernel(rows, ["by_slices"])
        return ["by_torch", "by_slices"] if rows <= self.FEW else ["by_slices", "by_torch"]

    def by_torch(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """By torch's kernel, which reads the numbers in a layout of its own."""
        x = filled(x.to(torch.bfloat16), self.inputs)
        y = self.torch_kernel(x, self.weight, self.group, self.torch_steps)
        return plus(y[:, : self.outputs], add, beta)  # without the filler of the last block

    def by_slices(self, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
        """A slice of W unpacked at a time."""
        x = filled(x.to(self.wide), self.inputs)
        each = at_a_time(self.inputs, x.device.type)  # rows of W
        pairs = zip(self.packed.split(each), self.steps.split(each), strict=True)
        parts = [F.linear(x, self.unpacked(*pair)) for pair in pairs]
        return plus(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), add, beta)

    def unpacked(self, packed: Tensor, steps: Tensor) -> Tensor:
        """Rows of W (n, in) in the wide type, from their bytes (n, in/2) and steps (n, groups,
        2)."""
        if self.kernel is not None and not torch.compiler.is_compiling():
            return cpu_kernels.unpacked(packed, steps, self.wide)
        q = packed.new_empty(*packed.shape, 2, dtype=self.wide)
        # A half byte h, from 0 to 15, stands for h − 8. XOR with 8 flips its highest bit, and what
        # results is h − 8 as a signed number of 4 bits. Shifts of int8 keep the sign: to the left
        # and back the low half alone remains, to the right the high half.
        halves = (packed ^ 0x88).view(torch.int8)
        q[..., 0] = (halves << 4) >> 4
        q[..., 1] = halves >> 4
        q = q.view(packed.size(0), -1, self.group)  # (n, groups, group)
        scale, offset = steps.to(self.wide)[..., None].unbind(2)  # (n, groups, 1) each
        return torch.addcmul(offset, q, scale).flatten(1)


MATRICES = {32: FloatMatrix, 16: HalfMatrix, 8: Int8Matrix, 4: Int4Matrix}  # by bits


# ===== Products of several matrices, one for each scale of the wavelet


class MatrixStack(Routed):
    """S matrices, one for each scale. Each way is a method of x (S, N, in) and add (S, out) or None
    that gives x Wᵀ + add, (S, N, out)."""

    def gelu(self, x: Tensor, add: Tensor) -> Tensor:
        """GELU(x Wᵀ + add) of x (S, N, in) and add (S, out): (S, N, out)."""
        if self.way(x.size(1), x, None) == "by_kernel":
            return self.by_kernel(x, add, finish="gelu")
        return F.gelu(self(x, add))

    def gate(self, x: Tensor, y: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        """Multiplies y (S, N, out), in place, by activation(x Wᵀ)."""
        by_kernel = activation is F.silu and self.way(x.size(1), x, None) == "by_kernel"
        # It writes to y, of which numbers side by side are to lie so in memory. And y is a part of
        # a larger tensor, which torch.compile would copy around a kernel that writes to it.
        in_place = y.stride(-1) == 1 and y.dtype == torch.float32
        if by_kernel and in_place and not torch.compiler.is_compiling():
            self.by_kernel(x, None, y=y, finish="gate")
        else:
            y.mul_(activation(self(x)))


class FloatStack(MatrixStack):
    """S fp32 matrices as one product: x (S, N, in) → (S, N, out).

    Smaller matrices are filled up with zeros to the largest: a few bytes more to read, and one
    product in place of S.
    """

    kind = torch.float32
    FEW = 4  # rows for which W xᵀ was the faster way

    def __init__(self, weights: list[Tensor]):
        """weights: (out, in) each, of several sizes."""
        outputs = max(w.size(0) for w in weights)
        inputs = max(w.size(1) for w in weights)
        size = 4 * len(weights) * outputs * inputs
        super().__init__(f"{len(weights)} of 32 bits {shape_class(outputs, inputs)}", size)
        same = [F.pad(w, (0, inputs - w.size(1), 0, outputs - w.size(0))) for w in weights]
        self.weight = torch.stack(same)  # (S, out, in)
        self.kernel = None  # a CPU's, for few rows
        if cpu_kernels.usable(self.weight.device):
            self.kernel = cpu_kernels.Stack([{"float32": w} for w in self.weight])

    def ways(self, rows: int) -> list[str]:
        if self.weight.device.type != "cpu":
            return ["by_rows"]
        names = ["by_columns", "by_rows"] if rows <= self.FEW else ["by_rows"]
        return names if self.kernel is None else with_kernel(rows, names)

    def by_kernel(
        self, x: Tensor, add: Tensor | None, y: Tensor | None = None, finish: str = ""
    ) -> Tensor:
        """By our own CPU kernel; y and finish as in `cpu_kernels.Stack`."""
        return self.kernel(x, add if add is None else add[:, None], y=y, finish=finish)

    def by_columns(self, x: Tensor, add: Tensor | None) -> Tensor:
        """As W xᵀ."""
        x = x[..., : self.weight.size(2)]
        if add is None:
            return torch.bmm(self.weight, x.mT).mT
        return torch.baddbmm(add[..., None], self.weight, x.mT).mT  # (S, N, out)

    def by_rows(self, x: Tensor, add: Tensor | None) -> Tensor:
        """As x Wᵀ."""
        x = x[..., : self.weight.size(2)]
        if add is None:
            return torch.bmm(x, self.weight.mT)
        return torch.baddbmm(add[:, None], x, self.weight.mT)

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x (S, N, in or more), add (S, out) → x Wᵀ + add (S, N, out)."""
        return getattr(self, self.way(x.size(1), x, None))(x, add)


class PackedStack(MatrixStack):
    """S matrices of several shapes that are not all fp32: x (S, N, in) → (S, N, out), filled up
    with zeros to the largest `out`.

    By our own kernels there is one call, or on a GPU one launch, for each number of bits. By others
    each matrix has a product of its own, since a batched one takes a single type.
    """

    def __init__(
        self,
        tensors: list[dict[str, Tensor]],
        bits: list[int],
        outputs: list[int],
        inputs: list[int],
    ):
        """tensors: of each matrix what `quantised` gives for its `bits`; outputs, inputs: the sizes
        of each, without filler."""
        sizes = shape_class(max(outputs), max(inputs))
        size = sum(next(iter(each.values())).nbytes for each in tensors)
        super().__init__(f"{len(bits)} of {min(bits)} to {max(bits)} bits {sizes}", size)
        self.bits = bits
        self.outputs = outputs
        self.inputs = inputs
        self.width = max(outputs)
        device = next(iter(tensors[0].values())).device
        scales_of = {b: [s for s, each in enumerate(bits) if each == b] for b in sorted(set(bits))}
        self.stacks: list[kernels.Stack] | None = None  # a GPU's, for one row
        if kernels.usable(device):
            self.stacks = []
            for scales in scales_of.values():
                stack = kernels.Stack([tensors[s] for s in scales], scales)
                self.stacks.append(stack)
                # The matrices for many rows are views of the stack's memory, not a second copy.
                for s, held in zip(scales, stack.matrices(), strict=True):
                    tensors[s] = held
        self.matrices = [MATRICES[b](t, n) for b, t, n in zip(bits, tensors, outputs, strict=True)]
        self.cpu_stacks: list[cpu_kernels.Stack] = []
        if cpu_kernels.usable(device):
            for scales in scales_of.values():
                own = [inputs[s] for s in scales]
                held = [self.matrices[s].kernel.held[0] for s in scales]  # no second copy
                stack = cpu_kernels.Stack(held, scales, own)
                self.cpu_stacks.append(stack)
        if len(self.cpu_stacks) > 1:  # they write into one tensor, which a program would copy
            self.opaque = frozenset({"by_kernel"})
        fp32 = bool(self.cpu_stacks) or 32 in bits
        self.kind = torch.float32 if fp32 else torch.bfloat16

    def ways(self, rows: int) -> list[str]:
        return with_kernel(rows, ["each"]) if self.cpu_stacks else ["each"]

    def one_row(self, x: Tensor, add: Tensor | None, finish: str = "") -> Tensor:
        """The product of x (S, 1, in) by our own GPU kernels: (S, 1, out). finish: as in
        `kernels.Stack`."""
        kind = self.kind if add is None else torch.promote_types(self.kind, add.dtype)
        y = x.new_empty(x.size(0), self.width, dtype=kind)  # (S, out)
        for stack in self.stacks:  # each writes the rows of its own scales
            stack(x[:, 0], add, y=y, finish=finish)
        return y[:, None]

    def by_kernel(
        self, x: Tensor, add: Tensor | None, y: Tensor | None = None, finish: str = ""
    ) -> Tensor:
        """By our own CPU kernels; y and finish as in `cpu_kernels.Stack`."""
        add = add if add is None else add[:, None]
        if y is None and len(self.cpu_stacks) > 1:
            y = x.new_empty(*x.shape[:2], self.width, dtype=torch.float32)
        for stack in self.cpu_stacks:  # each writes the rows of its own scales
            y = stack(x, add, y=y, finish=finish)
        return y

    def each(self, x: Tensor, add: Tensor | None) -> Tensor:
        """Matrix by matrix."""
        x = x.to(self.kind)
        parts = []
        for s, matrix in enumerate(self.matrices):
            y = matrix(x[s, :, : self.inputs[s]]).to(self.kind)  # (N, out of this one)
            filler = self.width - self.outputs[s]
            parts.append(F.pad(y, (0, filler)) if filler else y)
        y = torch.stack(parts)  # (S, N, out)
        return y if add is None else y + add[:, None]

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x (S, N, in or more), add (S, out) → x Wᵀ + add (S, N, out)."""
        if self.stacks is not None and x.size(1) == 1:
            return self.one_row(x, add)
        return getattr(self, self.way(x.size(1), x, None))(x, add)

    def gelu(self, x: Tensor, add: Tensor) -> Tensor:
        if self.stacks is not None and x.size(1) == 1:
            return self.one_row(x, add, "gelu")
        return super().gelu(x, add)

    def gate(self, x: Tensor, y: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        by_kernels = self.stacks is not None and x.size(1) == 1 and activation is F.silu
        if by_kernels and not torch.compiler.is_compiling():
            for stack in self.stacks:
                stack(x[:, 0], y=y[:, 0], finish="gate")
        else:
            super().gate(x, y, activation)
