"""Weight matrices prepared for inference at 32, 16, 8 or 4 bits, each with the product that is
fastest for its type.

At batch 1 a product reads each weight once and does little else, so its time is the bytes it reads
over the bandwidth; from some tens of rows on it is arithmetic. Every class here therefore has two
routes, by the number of rows N, and one interface: `matrix(x, add, beta)` is x Wᵀ + beta·add, x (N,
in) in any float type, the result (N, out). Quantised weights are never unpacked for few rows. For
many, where unpacking is small beside the product, they are unpacked a slice at a time.

`python -m research.decoding_speed --kernels` measures them. The routes were chosen on two cores
each of a CPU that multiplies bf16 (AVX-512) and of one that does not (AVX2). On a GPU one row is
multiplied by kernels.py, and `research/cuda_decoding.py` measures."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.command import InputError
from common.device import wide_type
from inference import kernels

# rows up to which the route for few rows is the faster one
FEW_FLOAT, FEW_HALF, FEW_INT8, FEW_INT4 = 128, 4, 16, 64
FEW_STACKED = 4  # the same for several fp32 matrices at once
FROM_ONEDNN = 8  # rows from which oneDNN is the fastest in fp32, with AVX-512
GROUP = 64  # input channels that share a scale and an offset at 4 bits
# weights that are unpacked at a time; rows of a weight that are, at the least
UNPACKED, LEAST_ROWS = 2**20, 256
UNPACKED_ON_GPU = 2**27  # the same there: 256 MB of bf16
BLOCK = 64  # outputs of a quantised matrix are a multiple of this: what the int4 kernels want
# bytes that addresses of weights are a multiple of, as of all memory that torch allocates on a CPU
ALIGNMENT = 64


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ===== Quantising


def to_int8(weight: Tensor, group: int = GROUP) -> dict[str, Tensor]:
    """Rows (out, in) as int8 with one bf16 scale each: w ≈ q·scale. Inputs are filled up with zeros
    to whole groups, since torch's kernel reads them in such steps."""
    weight = F.pad(weight.float(), (0, -weight.size(1) % group))
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30).bfloat16()
    q = (weight / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
    return {"int8": q, "scale": scale[:, 0].contiguous()}


def to_int4(weight: Tensor, group: int = GROUP) -> dict[str, Tensor]:
    """Rows (out, in) in groups of `group` inputs, two 4-bit numbers a byte: w ≈ (q − 8)·scale +
    offset.

    Of several ranges, each a share of the group's own, the one with the least squared error is
    kept: a range that leaves out the largest weights gives all others finer steps. Inputs are
    filled up with zeros to whole groups."""
    rows = []
    for part in F.pad(weight.float(), (0, -weight.size(1) % group)).split(
        max(1, 2**22 // max(1, weight.size(1)))
    ):
        w = part.unflatten(1, (-1, group))
        low, high = w.amin(2, keepdim=True), w.amax(2, keepdim=True)
        best, least = None, None
        for share in (1.0, 0.94, 0.88, 0.82):
            scale = ((high - low) * share / 15).clamp_min(1e-30).bfloat16().float()
            offset = ((high + low) / 2 + scale / 2).bfloat16().float()
            q = ((w - offset) / scale).round_().clamp_(-8, 7)
            error = (q * scale + offset - w).square_().sum(2, keepdim=True)
            if best is None:
                best, least = [q, scale, offset], error
            else:
                better = error < least
                best = [
                    torch.where(better, new, old)
                    for new, old in zip((q, scale, offset), best, strict=True)
                ]
                least = torch.minimum(error, least)
        q = (best[0] + 8).to(torch.uint8).flatten(1)
        rows.append((q[:, ::2] | q[:, 1::2] << 4, torch.cat(best[1:], dim=2).bfloat16()))
    packed, steps = zip(*rows, strict=True)
    # (out, in/2), (out, in/group, 2): scale, offset
    return {"int4": torch.cat(packed), "steps": torch.cat(steps)}


def from_int4(packed: Tensor) -> Tensor:
    """(…, n) bytes → (…, 2n) numbers from 0 to 15."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def quantised(weight: Tensor, bits: int, group: int = GROUP) -> dict[str, Tensor]:
    """The tensors that hold `weight` (out, in) at this width, as they lie in a file; its inputs
    fill whole groups."""
    if bits == 8:
        return to_int8(weight, group)
    if bits == 4:
        return to_int4(weight, group)
    return {f"float{bits}": weight.to(torch.float32 if bits == 32 else torch.bfloat16)}


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where it begins at another address than torch's own would. In a
    file that is mapped into memory tensors follow upon each other without gaps, and torch's int8
    kernel for AVX-512 crashes on what is not 16-byte aligned."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


# ===== Products


def filled(x: Tensor, width: int) -> Tensor:
    """x (N, in) with zeros after it up to `width`."""
    return F.pad(x, (0, width - x.size(1))) if x.size(1) < width else x.contiguous()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ, in fp32 on a CPU by what is fastest there for so many rows: as W xᵀ for a few (torch's
    MKL on AMD), by oneDNN from FROM_ONEDNN on where there is AVX-512. Both are up to three times as
    fast as F.linear."""
    if x.dtype == torch.float32 and x.device.type == "cpu":
        if x.size(0) >= FROM_ONEDNN and onednn_is_faster() and not torch.compiler.is_compiling():
            return onednn_product(x, weight)
        if x.size(0) <= FEW_FLOAT:
            return (weight @ x.T).T
    return F.linear(x, weight)


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ by oneDNN, of a weight as it lies or in oneDNN's own layout."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def onednn_is_faster() -> bool:
    return (
        torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def plus(y: Tensor, add: Tensor | None, beta: float) -> Tensor:
    """y + beta·add."""
    return y if add is None else torch.add(y, add, alpha=beta)


class FloatMatrix:
    """fp32, by the products that read memory fastest on a CPU (MKL's on AMD; its plain one reaches
    a quarter of that). One row: W is cut into row blocks, filled up with zeros to a whole number of
    them, and multiplied as a batch. More rows: `product`."""

    kind = torch.float32  # of what is multiplied, as the same name below
    BLOCKS = 8

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        weight = tensors["float32"]
        self.weight = (
            F.pad(weight, (0, 0, 0, filler))
            if (filler := -outputs % self.BLOCKS)
            else weight.contiguous()
        )
        self.outputs, self.cut = outputs, self.weight.view(self.BLOCKS, -1, weight.size(1))
        self.one = for_gpu({"float32": self.weight[:outputs]})

    def __call__(self, x: Tensor, add: Tensor | None = None, beta: float = 1.0) -> Tensor:
        if self.one is not None and x.size(0) == 1:
            return self.one(x, add if add is None else add.view(1, -1), beta)
        x, rows = x.float(), x.size(0)
        if rows > 1 or x.device.type != "cpu":
            return plus(product(x, self.weight[: self.outputs]), add, beta)
        # A column-major matrix, said by its strides: taken for a row-major one it is three times
        # slower.
        inputs = x.size(1)
        column = x.reshape(inputs).as_strided((self.BLOCKS, inputs, 1), (0, 1, inputs))
        if add is None or self.weight.size(0) != self.outputs:
            return plus(torch.bmm(self.cut, column).view(1, -1)[:, : self.outputs], add, beta)
        return torch.baddbmm(add.reshape(self.BLOCKS, -1, 1), self.cut, column, beta=beta).view(
            1, -1
        )


def for_gpu(tensors: dict[str, Tensor]) -> "kernels.Stack | None":
    """The product of one row on a GPU by our own kernel; None on a CPU, and where there is no
    Triton."""
    return kernels.Stack([tensors]) if kernels.usable(next(iter(tensors.values())).device) else None


def at_a_time(inputs: int, device: str = "cpu") -> int:
    """Rows of a weight with so many inputs that are unpacked at a time: what a cache holds, but
    enough for a fast product; on a GPU, whose caches hold none of it, what memory can spare."""
    return max(LEAST_ROWS, (UNPACKED if device == "cpu" else UNPACKED_ON_GPU) // inputs)


def product_by_slices(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of a weight of another type, of which a slice at a time is brought to x's."""
    return torch.cat(
        [
            F.linear(x, part.to(x.dtype))
            for part in weight.split(at_a_time(x.size(1), x.device.type))
        ],
        dim=1,
    )


class HalfMatrix:
    """bf16, in oneDNN's own layout on a CPU that multiplies it."""

    kind = torch.bfloat16

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        weight = tensors["float16"]
        self.wide = wide_type(weight.device)
        self.packed = (
            weight.device.type == "cpu"
            and self.wide == torch.bfloat16
            and torch.backends.mkldnn.is_available()
        )
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1) if self.packed else weight
        self.one = for_gpu(tensors)

    def __call__(self, x: Tensor, add: Tensor | None = None, beta: float = 1.0) -> Tensor:
        if self.one is not None and x.size(0) == 1:
            return self.one(x, add if add is None else add.view(1, -1), beta)
        if self.packed:
            y = onednn_product(x.to(torch.bfloat16), self.weight)
        elif x.size(0) <= FEW_HALF or self.wide == torch.bfloat16:
            y = F.linear(x.to(torch.bfloat16), self.weight)
        else:
            y = product_by_slices(x.to(self.wide), self.weight)
        return plus(y, add, beta)


class Int8Matrix:
    """int8 rows with a scale each."""

    kind = torch.bfloat16

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        self.weight, self.scale, self.outputs = tensors["int8"], tensors["scale"], outputs
        self.wide = wide_type(self.weight.device)
        self.one = for_gpu(tensors)
        self.few = FEW_INT8 if self.one is None else 1

    def __call__(self, x: Tensor, add: Tensor | None = None, beta: float = 1.0) -> Tensor:
        if self.one is not None and x.size(0) == 1:
            return self.one(x, add if add is None else add.view(1, -1), beta)[:, : self.outputs]
        if x.size(0) <= self.few:
            x = filled(x.to(torch.bfloat16), self.weight.size(1))
            y = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)
        else:
            x = filled(x.to(self.wide), self.weight.size(1))
            y = product_by_slices(x, self.weight).mul_(self.scale)
        return plus(y, add, beta)


class Int4Matrix:
    """4-bit groups in the layout of torch's kernel: outputs in blocks, (blocks, in, block/2) bytes,
    a byte's low half an output of the block's first half and its high half the one of the
    second."""

    kind = torch.bfloat16

    def __init__(self, tensors: dict[str, Tensor], outputs: int):
        packed, steps = tensors["int4"], tensors["steps"]
        self.one, self.tensors = for_gpu(tensors), tensors
        extra = -packed.size(0) % BLOCK
        self.inputs, self.outputs, self.group = (
            packed.size(1) * 2,
            outputs,
            packed.size(1) * 2 // steps.size(1),
        )
        packed, steps = F.pad(packed, (0, 0, 0, extra)), F.pad(steps, (0, 0, 0, 0, 0, extra))
        self.steps = steps.transpose(0, 1).contiguous()  # (groups, out, 2)
        self.wide = wide_type(packed.device)
        if self.one is not None:
            del self.steps
            return
        if packed.device.type == "cpu":
            self.block = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                from_int4(packed).int(), 1
            )
            self.kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:  # the CUDA kernel wants the even input in a byte's high half
            self.block = 0
            # of 16 inputs, that lie together: inputs are whole groups of 64
            tiles = 8 if self.inputs % 128 == 0 else 4
            self.weight = torch.ops.aten._convert_weight_to_int4pack(
                (packed << 4) | (packed >> 4), tiles
            )
            self.kernel = torch.ops.aten._weight_int4pack_mm

    def whole(self) -> Tensor:
        """W itself, (out, in), from the bytes of a file: on a GPU, for many rows."""
        q = (from_int4(self.tensors["int4"]).to(self.wide) - 8).unflatten(1, (-1, self.group))
        scale, offset = self.tensors["steps"][..., None].unbind(2)  # (out, groups, 1)
        return torch.addcmul(offset, q, scale).flatten(1)

    def unpacked(self, first: int, last: int) -> Tensor:
        """The columns of Wᵀ that are the blocks `first` to `last` − 1: (in, (last −
        first)·block)."""
        # (in, blocks, block/2)
        packed = self.weight.view(-1, self.inputs, self.block // 2)[first:last].transpose(0, 1)
        q = packed.new_empty(*packed.shape[:2], self.block, dtype=self.wide)
        # a half n, 0 to 15, becomes n − 8 as a signed number of 4 bits
        halves = (packed ^ 0x88).view(torch.int8)
        q[..., : self.block // 2] = (halves << 4) >> 4
        q[..., self.block // 2 :] = halves >> 4
        # (groups, 1, outputs)
        scale, offset = self.steps[:, None, first * self.block : last * self.block].unbind(-1)
        return torch.addcmul(offset, q.view(-1, self.group, scale.size(2)), scale).flatten(0, 1)

    def __call__(self, x: Tensor, add: Tensor | None = None, beta: float = 1.0) -> Tensor:
        if self.one is not None:
            if x.size(0) == 1:
                return self.one(x, add if add is None else add.view(1, -1), beta)
            return plus(F.linear(filled(x.to(self.wide), self.inputs), self.whole()), add, beta)
        if x.size(0) <= FEW_INT4 or not self.block:
            y = self.kernel(
                filled(x.to(torch.bfloat16), self.inputs), self.weight, self.group, self.steps
            )
        else:
            x = filled(x.to(self.wide), self.inputs)
            blocks, each = (
                self.steps.size(1) // self.block,
                max(1, at_a_time(self.inputs) // self.block),
            )
            slices = (
                self.unpacked(first, min(first + each, blocks)) for first in range(0, blocks, each)
            )
            y = torch.cat([x @ part for part in slices], dim=1)
        return plus(y[:, : self.outputs], add, beta)


def product_gelu(matrix, x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x Wᵀ + bias, bias (out,)."""
    if matrix.one is not None and x.size(0) == 1:
        return matrix.one(x, bias.view(1, -1), finish="gelu")
    return F.gelu(matrix(x, bias))


def product_sum(matrix, x: Tensor, bias: Tensor, add: Tensor, beta: float) -> Tensor:
    """x Wᵀ + bias + beta·add, bias (out,), add (N, out)."""
    if matrix.one is not None and x.size(0) == 1:
        return matrix.one(x, add, beta, bias=bias)
    return matrix(x, torch.add(bias, add, alpha=beta))


MATRICES = {32: FloatMatrix, 16: HalfMatrix, 8: Int8Matrix, 4: Int4Matrix}


class FloatStack:
    """S fp32 matrices, one product: x (S, N, in) → (S, N, out). Smaller ones are filled up with
    zeros: a few bytes more to read, half the kernels."""

    kind = torch.float32

    def __init__(self, weights: list[Tensor]):
        outputs, inputs = (max(w.size(d) for w in weights) for d in (0, 1))
        self.weight = torch.stack(
            [F.pad(w, (0, inputs - w.size(1), 0, outputs - w.size(0))) for w in weights]
        )

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        x = x[..., : self.weight.size(2)]
        if x.size(1) <= FEW_STACKED and x.device.type == "cpu":
            if add is None:
                return torch.bmm(self.weight, x.mT).mT
            return torch.baddbmm(add[..., None], self.weight, x.mT).mT
        return (
            torch.bmm(x, self.weight.mT)
            if add is None
            else torch.baddbmm(add[:, None], x, self.weight.mT)
        )

    def gelu(self, x: Tensor, add: Tensor) -> Tensor:
        """GELU of the product."""
        return F.gelu(self(x, add))

    def gate(self, x: Tensor, y: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        """Multiplies y (S, N, out) by the activation of the product."""
        y.mul_(activation(self(x)))


class PackedStack:
    """S matrices that are not all fp32, of several shapes: x (S, N, in) → (S, N, out), filled up
    with zeros. A product each; of one row on a GPU a launch for each width."""

    def __init__(
        self,
        tensors: list[dict[str, Tensor]],
        bits: list[int],
        outputs: list[int],
        inputs: list[int],
    ):
        self.outputs, self.inputs, self.width = outputs, inputs, max(outputs)
        self.kind = torch.float32 if 32 in bits else torch.bfloat16
        self.stacks = None
        if kernels.usable(next(iter(tensors[0].values())).device):
            groups = [[s for s, b in enumerate(bits) if b == width] for width in sorted(set(bits))]
            self.stacks = [kernels.Stack([tensors[s] for s in group], group) for group in groups]
            # what holds them one by one for many rows
            for stack, group in zip(self.stacks, groups, strict=True):
                for s, held in zip(group, stack.matrices(), strict=True):
                    tensors[s] = held
        self.matrices = [MATRICES[b](t, n) for b, t, n in zip(bits, tensors, outputs, strict=True)]

    def one(self, x: Tensor, add: Tensor | None, finish: str = "") -> Tensor:
        """The product of one row, by our own kernels."""
        kind = self.kind if add is None else torch.promote_types(self.kind, add.dtype)
        y = x.new_empty(x.size(0), self.width, dtype=kind)
        for stack in self.stacks:
            stack(x[:, 0], add, y=y, finish=finish)
        return y[:, None]

    def gelu(self, x: Tensor, add: Tensor) -> Tensor:
        """GELU of the product."""
        return (
            self.one(x, add, "gelu")
            if self.stacks is not None and x.size(1) == 1
            else F.gelu(self(x, add))
        )

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        if self.stacks is not None and x.size(1) == 1:
            return self.one(x, add)
        x = x.to(self.kind)
        parts = [
            m(part[:, :n]).to(self.kind)
            for m, part, n in zip(self.matrices, x, self.inputs, strict=True)
        ]
        parts = [
            F.pad(y, (0, self.width - n)) if n < self.width else y
            for y, n in zip(parts, self.outputs, strict=True)
        ]
        y = torch.stack(parts)
        return y if add is None else y + add[:, None]

    def gate(self, x: Tensor, y: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        """Multiplies y (S, N, out) by the activation of the product."""
        alone = self.stacks is not None and x.size(1) == 1
        # which would copy y, a part of a tensor
        if alone and activation is F.silu and not torch.compiler.is_compiling():
            for stack in self.stacks:
                stack(x[:, 0], y=y[:, 0], finish="gate")
        else:
            y.mul_(activation(self(x)))


class Table:
    """A table whose rows are looked up, (rows, width): only the rows that are read are unpacked."""

    def __init__(self, tensors: dict[str, Tensor], width: int):
        self.tensors, self.width = tensors, width
        self.read = {
            "float32": self.floats,
            "float16": self.floats,
            "int8": self.int8,
            "int4": self.int4,
        }[next(iter(tensors))]
        self.floating = next(iter(tensors.values()))

    def floats(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.floating).float()

    def int8(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.tensors["int8"])[..., : self.width] * F.embedding(
            rows, self.tensors["scale"][:, None].float()
        )

    def int4(self, rows: Tensor) -> Tensor:
        q = from_int4(F.embedding(rows, self.tensors["int4"])).float().sub_(8)
        steps = F.embedding(rows, self.tensors["steps"].flatten(1)).float().unflatten(-1, (-1, 2))
        q = q.unflatten(-1, (steps.size(-2), -1))
        return torch.addcmul(steps[..., 1:], q, steps[..., :1]).flatten(-2)[..., : self.width]

    def __call__(self, rows: Tensor) -> Tensor:
        """rows (…) → (…, width) in fp32."""
        return self.read(rows)

    def weighted(self, rows: Tensor, shares: Tensor) -> Tensor:
        """Σ_k shares (N, k) · the k rows that each of `rows` (N, k) names: (N, width) in fp32."""
        if self.floating.dtype == torch.float32:
            return F.embedding_bag(rows, self.floating, mode="sum", per_sample_weights=shares)
        return torch.bmm(shares[:, None], self.read(rows)).squeeze(1)


# ===== The weights of a decoder


@dataclass(frozen=True)
class Bits:
    """Bits of each component's weights. The thirds of the scales are mixer_coarse (with the
    approximation), mid and fine."""

    mixer_coarse: int = 32
    mixer_mid: int = 32
    mixer_fine: int = 32
    lifting: int = 32
    bypass: int = 32
    mlp: int = 32
    memory: int = 32
    query: int = 32
    embedding: int = 32
    head: int = 32

    @classmethod
    def of(cls, bits: int | None) -> "Bits":
        """Raises `InputError` for a width that there is none of."""
        if bits not in (None, 32, 16, 8, 4):
            raise InputError(f"bits: {bits} is not a width; take 8 or 4 (or 16, or 32)")
        widths = cls(*[bits or 32] * len(fields(cls)))
        # The coarse scales reach into everything that follows: their error at 4 bits costs more
        # than all else together.
        return replace(widths, mixer_coarse=8, query=8) if bits == 4 else widths

    def __getitem__(self, component: str) -> int:
        return getattr(self, component)

    @staticmethod
    def of_scale(scale: int, scales: int) -> str:
        """The component that a scale's mixer belongs to."""
        return ("mixer_coarse", "mixer_mid", "mixer_fine")[scale * 3 // scales]


class PackedWeights:
    """Gives a decoder its prepared weights by name: made from a model's, or read from a file that
    holds them as they are.

    If `saving`, whatever is made is also in `saved`, under "name/kind".
    """

    def __init__(
        self,
        bits: Bits,
        tensors: dict[str, Tensor] | None = None,
        saving: bool = False,
        source: str = "checkpoint",
    ):
        """tensors: what a file holds, `source` its name in errors; None = made from a model."""
        self.bits = bits
        self.source = source
        self.used: set[str] = set()
        self.given: dict[str, dict[str, Tensor]] | None = None if tensors is None else {}
        for key, tensor in (tensors or {}).items():
            name, _, kind = key.rpartition("/")
            self.given.setdefault(name, {})[kind] = aligned(tensor)
        self.saved: dict[str, Tensor] | None = {} if saving else None
        # Where all that is prepared goes; of a model's weights `Decoder` says where. Constants are
        # made on the CPU.
        self.device = next(
            (tensor.device for tensor in (tensors or {}).values()), torch.device("cpu")
        )

    def _tensors(self, name: str, make) -> dict[str, Tensor]:
        """The tensors of `name`: from the file, or made, with their own keys."""
        made = make()
        if self.given is not None:
            own = self.given.get(name)
            fits = own is not None and own.keys() == made.keys()
            if not (
                fits
                and all(
                    (own[k].shape, own[k].dtype) == (made[k].shape, made[k].dtype) for k in made
                )
            ):
                raise InputError(
                    f"{self.source}: {name} is absent or not what its config.json makes it;"
                    " quantise the run again"
                )
            self.used.add(name)
            return {key: own[key] for key in made}
        tensors = {key: t.detach().to(self.device) for key, t in made.items()}
        # copies: two names may be given one tensor, and a file holds each once
        if self.saved is not None:
            self.saved |= {f"{name}/{key}": t.clone() for key, t in tensors.items()}
        return tensors

    def check(self) -> None:
        """Raises `InputError` if the file has tensors that nothing asked for."""
        if self.given is not None and (unused := self.given.keys() - self.used):
            # as the file calls it
            first = min(
                f"{name}/{kind}".lstrip("/") for name in unused for kind in self.given[name]
            )
            raise InputError(
                f"{self.source}: has {first}, which the network of its config.json has no use for"
            )
        self.given = None

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """A small tensor, in fp32."""
        return self._tensors(name, lambda: {"float32": tensor.float().contiguous()})["float32"]

    def bias(self, name: str, tensor: Tensor, matrix) -> Tensor:
        """What is added to a product whose result goes into the next product: in bf16 where that
        wants bf16, so that nothing is converted twice."""
        return self.keep(name, tensor).to(matrix.kind)

    def number(self, name: str, value: Tensor | float) -> float:
        return float(self.keep(name, torch.as_tensor(value)))

    def norm(self, name: str, norm: nn.LayerNorm) -> tuple:
        """The arguments of F.layer_norm after its input."""
        return (
            norm.normalized_shape,
            self.keep(f"{name}.weight", norm.weight),
            self.keep(f"{name}.bias", norm.bias),
            norm.eps,
        )

    def matrix(self, name: str, weight: Tensor, component: str):
        bits = self.bits[component]
        return MATRICES[bits](
            self._tensors(name, lambda: quantised(weight.float(), bits)), weight.size(0)
        )

    def stack(
        self, name: str, matrices: list[Tensor], components: list[str]
    ) -> "FloatStack | PackedStack":
        """One product of several matrices, each (out, in) of its own size and width."""
        bits = [self.bits[c] for c in components]
        tensors = [
            self._tensors(f"{name}.{s}", lambda w=w, b=b: quantised(w.float(), b))
            for s, (w, b) in enumerate(zip(matrices, bits, strict=True))
        ]
        if set(bits) == {32}:
            return FloatStack([each["float32"] for each in tensors])
        return PackedStack(
            tensors, bits, [w.size(0) for w in matrices], [w.size(1) for w in matrices]
        )

    def table(self, name: str, weight: Tensor, component: str, group: int = GROUP) -> Table:
        """group: numbers of a row that are quantised together, even; GROUP where the table is
        multiplied by, too."""
        return Table(
            self._tensors(name, lambda: quantised(weight.float(), self.bits[component], group)),
            weight.size(1),
        )

    def module(self, name: str, module: nn.Module) -> nn.Module:
        """A module of the model's own, in fp32, on `device`: its constants are in no file and begin
        on the CPU."""
        if self.given is not None:
            tensors = {
                key: self.keep(f"{name}.{key}", tensor)
                for key, tensor in module.state_dict().items()
            }
            module.load_state_dict(tensors, assign=True)
        elif self.saved is not None:
            for key, tensor in module.state_dict().items():
                self.keep(f"{name}.{key}", tensor)
        return module.to(self.device)
