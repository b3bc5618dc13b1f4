"""Weight matrices prepared for inference at 32, 16, 8 or 4 bits, each with the product that is
fastest for its type.

A product of one row reads each weight once and does two operations with it, so it takes as long as
its bytes take to come from memory. From some tens of rows on it takes as long as its arithmetic.
Every class here therefore has two routes, chosen by the number of rows N, behind one interface:

    matrix(x, add, beta) = x Wᵀ + beta·add      x (N, in), W (out, in), add and result (N, out)

x may be of any float type. Few rows are multiplied by the quantised numbers as they lie. For many
rows, where unpacking costs little beside the product, weights are unpacked a slice at a time. On a
GPU one row is multiplied by the kernels of kernels.py.

The limits of the routes were chosen on two cores each of a CPU with bf16 instructions (AVX-512) and
of one without (AVX2), by

    python -m research.decoding_speed --kernels
    python -m research.cuda_decoding --only products      # a GPU's
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.device import wide_type
from inference import kernels

# The most rows for which the route for few rows was measured to be the faster one.
FEW_FLOAT = 128  # W xᵀ in fp32, in place of x Wᵀ
FEW_HALF = 4  # bf16 on a CPU that has no instructions for it
FEW_INT8 = 16
FEW_INT4 = 64
FEW_STACKED = 4  # several fp32 matrices in one batched product

FROM_ONEDNN = 8  # rows from which oneDNN is the fastest in fp32, where there is AVX-512
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


def filled(x: Tensor, width: int) -> Tensor:
    """x (N, in) with zeros after it up to `width`: (N, width), contiguous."""
    return F.pad(x, (0, width - x.size(1))) if x.size(1) < width else x.contiguous()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of x (N, in) and W (out, in) of one type: (N, out).

    In fp32 on a CPU this takes what is fastest for so many rows: W xᵀ for a few (torch's MKL on an
    AMD CPU), oneDNN from FROM_ONEDNN rows on where there is AVX-512. Both were measured to be up to
    three times as fast as F.linear.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu":
        if x.size(0) >= FROM_ONEDNN and onednn_is_faster() and not torch.compiler.is_compiling():
            return onednn_product(x, weight)
        if x.size(0) <= FEW_FLOAT:
            return (weight @ x.T).T  # (out, N) → (N, out)
    return F.linear(x, weight)


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ by oneDNN; `weight` as it lies or in oneDNN's own layout."""
    # No bias, and nothing fused behind the product ("none", with no scalars and no algorithm).
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def onednn_is_faster() -> bool:
    """Whether there are oneDNN and AVX-512, with which its fp32 products were the faster ones."""
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.backends.mkldnn.is_available() and has_avx512


def plus(y: Tensor, add: Tensor | None, beta: float) -> Tensor:
    """y + beta·add, or y where there is nothing to add."""
    return y if add is None else torch.add(y, add, alpha=beta)


def row_kernel(tensors: dict[str, Tensor]) -> "kernels.Stack | None":
    """Our own kernel for products of one row on a GPU; None on a CPU and without Triton.

    tensors: one matrix, as `quantised` gives it.
    """
    device = next(iter(tensors.values())).device
    return kernels.Stack([tensors]) if kernels.usable(device) else None


def by_row_kernel(kernel: kernels.Stack, x: Tensor, add: Tensor | None, beta: float) -> Tensor:
    """The product of x (1, in) by our own kernel; add (out,) or (1, out)."""
    return kernel(x, add if add is None else add.view(1, -1), beta)


class FloatMatrix:
    """W (out, in) in fp32, by the products that read memory fastest on a CPU.

    One row: W is cut into row blocks which are multiplied as a batch, since MKL's product of a
    matrix and one vector reached a quarter of the memory's bandwidth on an AMD CPU, and its batched
    one reached it. More rows: `product`.
    """

    kind = torch.float32  # the type that x is multiplied in; the other classes have it too
    BLOCKS = 8  # of rows, which 1, 2, 4 or 8 threads share evenly

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        """tensors: as `quantised` gives them; outputs: the rows of W that are not filler."""
        weight = tensors["float32"]
        self.outputs = outputs
        # Rows of zeros make the number of rows a multiple of BLOCKS.
        filler = -outputs % self.BLOCKS
        self.weight = F.pad(weight, (0, 0, 0, filler)) if filler else weight.contiguous()
        self.blocks = self.weight.view(self.BLOCKS, -1, weight.size(1))  # (BLOCKS, out/BLOCKS, in)
        self.row_kernel = row_kernel({"float32": self.weight[:outputs]})

    def __call__(self, x: Tensor, add: Tensor | None = None, beta: float = 1.0) -> Tensor:
        """x (N, in) → x Wᵀ + beta·add (N, out), in fp32."""
        if self.row_kernel is not None and x.size(0) == 1:
            return by_row_kernel(self.row_kernel, x, add, beta)
        x = x.float()
        if x.size(0) > 1 or x.device.type != "cpu":
            return plus(product(x, self.weight[: self.outputs]), add, beta)
        # x as one column for each block. Of a matrix with a single column torch tells the layout by
        # its strides alone: (1, in) says column-major; x.view(in, 1) would be taken for a row-major
        # matrix, and the product was three times slower. Stride 0 repeats x for all blocks.
        inputs = x.size(1)
        column = x.reshape(inputs).as_strided((self.BLOCKS, inputs, 1), (0, 1, inputs))
        if add is None or self.weight.size(0) != self.outputs:
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


class HalfMatrix:
    """W (out, in) in bf16, in oneDNN's own layout on a CPU that has bf16 instructions."""

    kind = torch.bfloat16

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        """tensors: as `quantised` gives them; outputs: not needed, since W has no filler."""
        weight = tensors["float16"]
        self.wide = wide_type(weight.device)
        on_cpu_with_bf16 = weight.device.type == "cpu" and self.wide == torch.bfloat16
        self.reordered = on_cpu_with_bf16 and torch.backends.mkldnn.is_available()
        self.weight = weight
        if self.reordered:
            # 1: laid out for one row, where reading the weights is all that takes time
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.row_kernel = row_kernel(tensors)

    def __call__(self, x: Tensor, add: Tensor | None = None, beta: float = 1.0) -> Tensor:
        """x (N, in) → x Wᵀ + beta·add (N, out)."""
        if self.row_kernel is not None and x.size(0) == 1:
            return by_row_kernel(self.row_kernel, x, add, beta)
        if self.reordered:
            y = onednn_product(x.to(torch.bfloat16), self.weight)
        elif x.size(0) <= FEW_HALF or self.wide == torch.bfloat16:
            y = F.linear(x.to(torch.bfloat16), self.weight)
        else:  # products of bf16 would be imitated, slowly
            y = product_by_slices(x.to(self.wide), self.weight)
        return plus(y, add, beta)


class Int8Matrix:
    """W (out, in) as int8 rows, each with a scale."""

    kind = torch.bfloat16

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        """tensors: as `quantised` gives them; outputs: the rows of W that are not filler."""
        self.weight = tensors["int8"]  # (out, in), in a multiple of GROUP
        self.scale = tensors["scale"]  # (out,)
        self.outputs = outputs
        self.wide = wide_type(self.weight.device)
        self.row_kernel = row_kernel(tensors)
        # With a kernel of our own torch's is not used at all: on a GPU it is slow (see runs.md).
        self.few = FEW_INT8 if self.row_kernel is None else 1

    def __call__(self, x: Tensor, add: Tensor | None = None, beta: float = 1.0) -> Tensor:
        """x (N, in) → x Wᵀ + beta·add (N, out)."""
        if self.row_kernel is not None and x.size(0) == 1:
            return by_row_kernel(self.row_kernel, x, add, beta)[:, : self.outputs]
        if x.size(0) <= self.few:
            x = filled(x.to(torch.bfloat16), self.weight.size(1))
            # int8 becomes bf16 in registers, on the way to the product
            y = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)
        else:
            x = filled(x.to(self.wide), self.weight.size(1))
            # A row's scale is a factor of its output, so it is applied after the product.
            y = product_by_slices(x, self.weight).mul_(self.scale)
        return plus(y, add, beta)


class Int4Matrix:
    """W (out, in) in 4-bit groups, in the layout of torch's kernel for the device.

    On a CPU outputs lie in blocks: (out/block, in, block/2) bytes. A byte's low half is an output
    of the block's first half, and its high half the corresponding output of the second half.
    """

    kind = torch.bfloat16

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        """tensors: as `quantised` gives them; outputs: the rows of W that are not filler."""
        packed = tensors["int4"]  # (out, in/2)
        steps = tensors["steps"]  # (out, in/group, 2)
        self.tensors = tensors
        self.inputs = packed.size(1) * 2
        self.outputs = outputs
        self.group = self.inputs // steps.size(1)
        self.wide = wide_type(packed.device)
        self.row_kernel = row_kernel(tensors)
        if self.row_kernel is not None:
            return  # many rows are then multiplied by `whole`, from the bytes of the file
        extra = -packed.size(0) % BLOCK
        # The filler's scales and offsets are zero, and so are its weights.
        packed = F.pad(packed, (0, 0, 0, extra))
        steps = F.pad(steps, (0, 0, 0, 0, 0, extra))
        self.steps = steps.transpose(0, 1).contiguous()  # (groups, out, 2)
        self.block = 0  # outputs in a block of the layout; 0: unknown, so it cannot be unpacked
        if packed.device.type == "cpu":
            # torch's kernel cuts outputs by the width of the CPU's registers.
            self.block = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)
            numbers = from_int4(packed).int()
            # 1: tiles of inputs, which the CPU's layout does not have
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
            self.kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            # Tiles of 16 inputs that lie together: 8 of them where they divide the inputs, else 4,
            # which always do, since inputs are whole groups of 64.
            tiles = 8 if self.inputs % 128 == 0 else 4
            # CUDA's kernel wants the even input in a byte's high half: the halves change places.
            swapped = (packed << 4) | (packed >> 4)
            self.weight = torch.ops.aten._convert_weight_to_int4pack(swapped, tiles)
            self.kernel = torch.ops.aten._weight_int4pack_mm

    def whole(self) -> Tensor:
        """W itself, (out, in) in the wide type, from the bytes of a file: on a GPU, for many
        rows."""
        q = from_int4(self.tensors["int4"]).to(self.wide) - 8  # (out, in), from −8 to 7
        q = q.unflatten(1, (-1, self.group))  # (out, groups, group)
        scale, offset = self.tensors["steps"][..., None].unbind(2)  # (out, groups, 1) each
        return torch.addcmul(offset, q, scale).flatten(1)

    def unpacked(self, first: int, last: int) -> Tensor:
        """The columns of Wᵀ in the blocks `first` to `last` − 1: (in, (last − first)·block)."""
        blocks = self.weight.view(-1, self.inputs, self.block // 2)  # all of them
        packed = blocks[first:last].transpose(0, 1)  # (in, last − first, block/2)
        q = packed.new_empty(*packed.shape[:2], self.block, dtype=self.wide)
        # A half byte n, from 0 to 15, stands for n − 8. XOR with 8 flips its highest bit, and what
        # results is n − 8 as a signed number of 4 bits. Shifts of int8 keep the sign: to the left
        # and back the low half alone remains, to the right the high half.
        halves = (packed ^ 0x88).view(torch.int8)
        q[..., : self.block // 2] = (halves << 4) >> 4
        q[..., self.block // 2 :] = halves >> 4
        q = q.view(-1, self.group, q.size(1) * self.block)  # (groups, group, outputs)
        steps = self.steps[:, None, first * self.block : last * self.block]
        scale, offset = steps.unbind(-1)  # (groups, 1, outputs) each
        return torch.addcmul(offset, q, scale).flatten(0, 1)  # (in, outputs)

    def product_by_blocks(self, x: Tensor) -> Tensor:
        """x Wᵀ (N, out with filler) of many rows x (N, in), some blocks unpacked at a time."""
        x = filled(x.to(self.wide), self.inputs)
        blocks = self.steps.size(1) // self.block
        each = max(1, at_a_time(self.inputs) // self.block)  # blocks at a time
        parts = []
        for first in range(0, blocks, each):
            last = min(first + each, blocks)
            parts.append(x @ self.unpacked(first, last))  # (N, (last − first)·block)
        return torch.cat(parts, dim=1)

    def __call__(self, x: Tensor, add: Tensor | None = None, beta: float = 1.0) -> Tensor:
        """x (N, in) → x Wᵀ + beta·add (N, out)."""
        if self.row_kernel is not None:
            if x.size(0) == 1:
                return by_row_kernel(self.row_kernel, x, add, beta)
            return plus(F.linear(filled(x.to(self.wide), self.inputs), self.whole()), add, beta)
        if x.size(0) <= FEW_INT4 or not self.block:
            x = filled(x.to(torch.bfloat16), self.inputs)
            y = self.kernel(x, self.weight, self.group, self.steps)
        else:
            y = self.product_by_blocks(x)
        return plus(y[:, : self.outputs], add, beta)  # without the filler of the last block


Matrix = FloatMatrix | HalfMatrix | Int8Matrix | Int4Matrix
MATRICES = {32: FloatMatrix, 16: HalfMatrix, 8: Int8Matrix, 4: Int4Matrix}  # by bits


def product_gelu(matrix: Matrix, x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x Wᵀ + bias) of x (N, in) and bias (out,): (N, out)."""
    if matrix.row_kernel is not None and x.size(0) == 1:
        return matrix.row_kernel(x, bias.view(1, -1), finish="gelu")  # one launch, not three
    return F.gelu(matrix(x, bias))


def product_sum(matrix: Matrix, x: Tensor, bias: Tensor, add: Tensor, beta: float) -> Tensor:
    """x Wᵀ + bias + beta·add of x (N, in), bias (out,) and add (N, out): (N, out)."""
    if matrix.row_kernel is not None and x.size(0) == 1:
        return matrix.row_kernel(x, add, beta, bias=bias)
    # (out,) + (N, out): small beside the weights
    return matrix(x, torch.add(bias, add, alpha=beta))


# ===== Products of several matrices, one for each scale of the wavelet


class FloatStack:
    """S fp32 matrices as one batched product: x (S, N, in) → (S, N, out).

    Smaller matrices are filled up with zeros to the largest: a few bytes more to read, and one
    product in place of S.
    """

    kind = torch.float32

    def __init__(self, weights: list[Tensor]):
        """weights: (out, in) each, of several sizes."""
        outputs = max(w.size(0) for w in weights)
        inputs = max(w.size(1) for w in weights)
        same = [F.pad(w, (0, inputs - w.size(1), 0, outputs - w.size(0))) for w in weights]
        self.weight = torch.stack(same)  # (S, out, in)

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x (S, N, in or more), add (S, out) → x Wᵀ + add (S, N, out)."""
        x = x[..., : self.weight.size(2)]
        if x.size(1) <= FEW_STACKED and x.device.type == "cpu":
            # as W xᵀ, which was measured to be faster for few rows
            if add is None:
                return torch.bmm(self.weight, x.mT).mT
            return torch.baddbmm(add[..., None], self.weight, x.mT).mT  # (S, N, out)
        if add is None:
            return torch.bmm(x, self.weight.mT)
        return torch.baddbmm(add[:, None], x, self.weight.mT)

    def gelu(self, x: Tensor, add: Tensor) -> Tensor:
        """GELU(x Wᵀ + add) of x (S, N, in) and add (S, out): (S, N, out)."""
        return F.gelu(self(x, add))

    def gate(self, x: Tensor, y: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        """Multiplies y (S, N, out), in place, by activation(x Wᵀ)."""
        y.mul_(activation(self(x)))


class PackedStack:
    """S matrices of several shapes that are not all fp32: x (S, N, in) → (S, N, out), filled up
    with zeros to the largest `out`.

    Each matrix has a product of its own, since a batched one takes a single type. For one row on a
    GPU there is one launch for each number of bits.
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
        self.outputs = outputs
        self.inputs = inputs
        self.width = max(outputs)
        self.kind = torch.float32 if 32 in bits else torch.bfloat16
        self.stacks: list[kernels.Stack] | None = None  # for one row, one for each number of bits
        if kernels.usable(next(iter(tensors[0].values())).device):
            self.stacks = []
            for width in sorted(set(bits)):
                scales = [s for s, b in enumerate(bits) if b == width]
                stack = kernels.Stack([tensors[s] for s in scales], scales)
                self.stacks.append(stack)
                # The matrices for many rows are views of the stack's memory, not a second copy.
                for s, held in zip(scales, stack.matrices(), strict=True):
                    tensors[s] = held
        self.matrices = [MATRICES[b](t, n) for b, t, n in zip(bits, tensors, outputs, strict=True)]

    def one_row(self, x: Tensor, add: Tensor | None, finish: str = "") -> Tensor:
        """The product of x (S, 1, in) by our own kernels: (S, 1, out). finish: as in
        `kernels.Stack`."""
        kind = self.kind if add is None else torch.promote_types(self.kind, add.dtype)
        y = x.new_empty(x.size(0), self.width, dtype=kind)  # (S, out)
        for stack in self.stacks:  # each writes the rows of its own scales
            stack(x[:, 0], add, y=y, finish=finish)
        return y[:, None]

    def gelu(self, x: Tensor, add: Tensor) -> Tensor:
        """GELU(x Wᵀ + add) of x (S, N, in) and add (S, out): (S, N, out)."""
        if self.stacks is not None and x.size(1) == 1:
            return self.one_row(x, add, "gelu")
        return F.gelu(self(x, add))

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x (S, N, in or more), add (S, out) → x Wᵀ + add (S, N, out)."""
        if self.stacks is not None and x.size(1) == 1:
            return self.one_row(x, add)
        x = x.to(self.kind)
        parts = []
        for s, matrix in enumerate(self.matrices):
            y = matrix(x[s, :, : self.inputs[s]]).to(self.kind)  # (N, out of this one)
            filler = self.width - self.outputs[s]
            parts.append(F.pad(y, (0, filler)) if filler else y)
        y = torch.stack(parts)  # (S, N, out)
        return y if add is None else y + add[:, None]

    def gate(self, x: Tensor, y: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        """Multiplies y (S, N, out), in place, by activation(x Wᵀ)."""
        by_kernels = self.stacks is not None and x.size(1) == 1 and activation is F.silu
        # y is a part of a larger tensor: torch.compile would copy it around a kernel that writes to
        # it.
        if by_kernels and not torch.compiler.is_compiling():
            for stack in self.stacks:
                stack(x[:, 0], y=y[:, 0], finish="gate")
        else:
            y.mul_(activation(self(x)))
