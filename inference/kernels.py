"""Products with one row on a GPU, as Triton kernels: weights at 32, 16, 8 or 4 bits, several
matrices in one launch.

For matrices s = 1 … S, each of its own size (out_s, in_s), and x (S, in):

    total[s, n] = Σ_k W_s[n, k] x[s, k] + beta·add[s, n] + bias[n]        summed in fp32

and y[s, n] is that, or its GELU, or what y[s, n] was times its SiLU.

A token at batch 1 reads every weight once and does two operations with it, so a kernel is as fast
as it reads. Weights lie as they do in a file (packed.py): rows of floats; of int8 with a scale
each; of two 4-bit numbers a byte with a scale and an offset for each group. A program (one of many
that run at once) takes a few whole rows of one matrix and goes along them; a thread reads 16 bytes
at a time.

Integers become floats without a conversion, because a GPU makes fewer conversions than products in
the same time. A 4-bit number put into the leading bits of a mantissa is a number from 1 to 2. What
is too much in it adds a multiple of Σ x to the sum, which is taken off at the end. An int8 put into
the last bits of the mantissa of 2²³ is that much more, and 2²³ is subtracted without rounding.

In the kernels names of tensors are addresses of their first elements; `x_s`, `add_s`, `add_n` and
`y_s` are strides in elements, of scales s and outputs n.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from common.gpu import HAS_TRITON, compiles_kernels

# Inputs are filled up to a multiple of this: a group at 4 bits, and at every width a multiple of 16
# bytes, so that every row begins at an aligned address.
STEP = 64

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _mantissa(bits):
        """Bits in the 23 places of an fp32's mantissa → the number from 1 to 2 that has them."""
        # 0x3F800000 is 1.0: sign 0, exponent 0, an empty mantissa.
        return (bits | 0x3F800000).to(tl.float32, bitcast=True)

    @triton.jit
    def _number(bits):
        """Bits in the 23 places of an fp32's mantissa → 2²³ + the integer that they are."""
        # 0x4B000000 is 2²³: an exponent at which the last place of the mantissa counts ones.
        return (bits | 0x4B000000).to(tl.float32, bitcast=True)

    @triton.jit
    def _pair(place, mask):
        """Two bf16 that are read as one int32 → both as fp32."""
        both = tl.load(place, mask=mask, other=0)
        # A bf16 is the upper half of an fp32. The first one is the lower half of the int32: it is
        # shifted up; of the second one the mask −65536 clears what is below.
        first = (both << 16).to(tl.float32, bitcast=True)
        return first, (both & -65536).to(tl.float32, bitcast=True)

    @triton.jit
    def _place(table, outputs, inputs, ROWS: tl.constexpr, STACKED: tl.constexpr):
        """Where this program works: its matrix's row s of x and y; the program's rows within the
        matrix (ROWS,), and which of them there are; the matrix's inputs; the weight at which the
        first of these rows begins, counted over all matrices; and how many rows the matrices before
        have.

        table (S, 5) int64, where there are several matrices: s, outputs, inputs, first weight,
        rows before. For one matrix its size is given as it is.
        """
        first = tl.program_id(0) * ROWS
        if STACKED:
            entry = table + tl.program_id(1) * 5
            s = tl.load(entry)
            outputs = tl.load(entry + 1)
            # What the compiler cannot know of loaded numbers: that reads may be 16 bytes wide.
            inputs = tl.multiple_of(tl.load(entry + 2), 64)
            start = tl.multiple_of(tl.load(entry + 3), 64)
            before = tl.load(entry + 4)
        else:
            s = 0
            start = 0
            before = 0
        rows = first + tl.arange(0, ROWS)
        # The product is made in 64 bits: all weights together may be more than 2³¹.
        return s, rows, rows < outputs, inputs, start + first.to(tl.int64) * inputs, before

    @triton.jit
    def _store(
        total, y, add, bias, s, rows, inside, add_s, add_n, y_s, width, beta,
        HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr, FINISH: tl.constexpr,
    ):  # fmt: skip
        """Finishes the products `total` (ROWS,) and writes them to y; beyond the matrix's rows, up
        to y's width, it writes zeros."""
        if HAS_ADD:
            total += beta * tl.load(add + s * add_s + rows * add_n, mask=inside, other=0.0).to(
                tl.float32
            )
        if HAS_BIAS:
            total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
        if FINISH == "gelu":
            total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))  # 1/√2
        place = y + s * y_s + rows
        if FINISH == "gate":  # what is there, times SiLU(total) = total / (1 + e^−total)
            total = (
                total
                / (1 + tl.exp(-total))
                * tl.load(place, mask=rows < width, other=0.0).to(tl.float32)
            )
        tl.store(place, total.to(y.dtype.element_ty), mask=rows < width)

    @triton.jit
    def _float_kernel(
        weight, table, x, add, bias, y, outputs, inputs, x_s, add_s, add_n, y_s, width, beta,
        ROWS: tl.constexpr, INPUTS: tl.constexpr, STACKED: tl.constexpr,
        HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr, FINISH: tl.constexpr,
    ):  # fmt: skip
        """weight: fp32 or bf16. ROWS rows of INPUTS at a time."""
        s, rows, inside, inputs, start, _ = _place(table, outputs, inputs, ROWS, STACKED)
        k = tl.arange(0, INPUTS)
        w = weight + start + tl.arange(0, ROWS)[:, None] * inputs + k[None, :]  # (ROWS, INPUTS)
        sums = tl.zeros((ROWS, INPUTS), tl.float32)
        for at in range(0, inputs, INPUTS):
            here = k < inputs - at
            a = tl.load(w + at, mask=inside[:, None] & here[None, :], other=0.0)
            b = tl.load(x + s * x_s + at + k, mask=here, other=0.0)
            sums += a.to(tl.float32) * b.to(tl.float32)[None, :]
        _store(
            tl.sum(sums, 1), y, add, bias, s, rows, inside, add_s, add_n, y_s, width, beta,
            HAS_ADD, HAS_BIAS, FINISH,
        )  # fmt: skip

    @triton.jit
    def _int8_kernel(
        weight, scale, table, x, add, bias, y, outputs, inputs, x_s, add_s, add_n, y_s, width, beta,
        ROWS: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr, STACKED: tl.constexpr,
        HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr, FINISH: tl.constexpr,
    ):  # fmt: skip
        """weight: words of four int8, seen as int32. x: fp32 if WIDE, else pairs of bf16 seen as
        int32. ROWS rows of WORDS at a time."""
        s, rows, inside, inputs, start, before = _place(table, outputs, inputs, ROWS, STACKED)
        words = inputs // 4
        word = tl.arange(0, WORDS)
        w = weight + start // 4 + tl.arange(0, ROWS)[:, None] * words + word[None, :]
        sums = tl.zeros((ROWS, WORDS), tl.float32)
        for at in range(0, words, WORDS):
            here = word < words - at
            a = tl.load(w + at, mask=inside[:, None] & here[None, :], other=0)
            if WIDE:
                b = x + s * x_s + 4 * (at + word)
                b0 = tl.load(b, mask=here, other=0.0)
                b1 = tl.load(b + 1, mask=here, other=0.0)
                b2 = tl.load(b + 2, mask=here, other=0.0)
                b3 = tl.load(b + 3, mask=here, other=0.0)
            else:
                b0, b1 = _pair(x + s * x_s + 2 * (at + word), here)
                b2, b3 = _pair(x + s * x_s + 2 * (at + word) + 1, here)
            # XOR with 128 makes u = q + 128 of each int8 q; 2²³ + 128 is taken off again.
            a = a ^ -2139062144  # 0x80808080
            sums += (
                (_number(a & 255) - 8388736.0) * b0[None, :]
                + (_number((a >> 8) & 255) - 8388736.0) * b1[None, :]
                + (_number((a >> 16) & 255) - 8388736.0) * b2[None, :]
                + (_number((a >> 24) & 255) - 8388736.0) * b3[None, :]
            )
        total = tl.sum(sums, 1)
        total *= tl.load(scale + before + rows, mask=inside, other=0.0).to(tl.float32)
        _store(
            total, y, add, bias, s, rows, inside, add_s, add_n, y_s, width, beta,
            HAS_ADD, HAS_BIAS, FINISH,
        )  # fmt: skip

    @triton.jit
    def _int4_kernel(
        weight, steps, table, x, add, bias, y, outputs, inputs, x_s, add_s, add_n, y_s, width, beta,
        ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, STACKED: tl.constexpr,
        HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr, FINISH: tl.constexpr,
    ):  # fmt: skip
        """x: fp32 if WIDE, else pairs of bf16 seen as int32. steps: pairs of bf16, scale and
        offset, seen as int32.

        A half byte q, from 0 to 15, as leading bits of a mantissa is the number 1 + q/16. With
        w = (q − 8)·scale + offset, over a group of 64 inputs:
        Σ w x = 16·scale·Σ (1 + q/16) x + (offset − 24·scale)·Σ x.
        """
        s, rows, inside, inputs, start, _ = _place(table, outputs, inputs, ROWS, STACKED)
        row = tl.arange(0, ROWS)
        group = tl.arange(0, GROUPS)
        pair = tl.arange(0, 32)  # a group of 64 inputs is 32 bytes
        groups = inputs // 64
        at_byte = group[:, None] * 32 + pair[None, :]  # (GROUPS, 32)
        # (ROWS, GROUPS, 32) bytes, and (ROWS, GROUPS) pairs of scale and offset
        w = weight + start // 2 + row[:, None, None] * (inputs // 2) + at_byte[None, :, :]
        step = steps + start // 64 + row[:, None] * groups + group[None, :]
        sums = tl.zeros((ROWS, GROUPS), tl.float32)
        for at in range(0, groups, GROUPS):
            here = group < groups - at
            a = tl.load(w + at * 32, mask=inside[:, None, None] & here[None, :, None], other=0).to(
                tl.int32
            )
            if WIDE:
                b = x + s * x_s + 2 * (at * 32 + at_byte)
                even = tl.load(b, mask=here[:, None], other=0.0)
                odd = tl.load(b + 1, mask=here[:, None], other=0.0)
            else:
                even, odd = _pair(x + s * x_s + at * 32 + at_byte, here[:, None])
            # Low halves, of 4 bits, are shifted to the top of 23; high halves are 4 places higher.
            inner = (
                _mantissa((a & 15) << 19) * even[None, :, :]
                + _mantissa((a & 240) << 15) * odd[None, :, :]
            )
            # scale in the lower half, offset in the upper one
            both = tl.load(step + at, mask=inside[:, None] & here[None, :], other=0)
            scale = (both << 16).to(tl.float32, bitcast=True)
            offset = (both & -65536).to(tl.float32, bitcast=True)
            ones = tl.sum(even + odd, 1)
            sums += 16 * scale * tl.sum(inner, 2) + (offset - 24 * scale) * ones[None, :]
        _store(
            tl.sum(sums, 1), y, add, bias, s, rows, inside, add_s, add_n, y_s, width, beta,
            HAS_ADD, HAS_BIAS, FINISH,
        )  # fmt: skip


def usable(device: torch.device) -> bool:
    """Whether these kernels multiply one row on this device: a GPU that Triton compiles for."""
    return device.type == "cuda" and compiles_kernels()


def _aligned(tensors: dict[str, Tensor], kind: str) -> Tensor:
    """The rows of one matrix, their inputs filled up to a multiple of STEP. Quantised ones are
    already."""
    weight = tensors[kind]
    return F.pad(weight, (0, -weight.size(1) % STEP)) if kind.startswith("float") else weight


class Stack:
    """S matrices with weights of one kind, prepared for the kernels, and their products with one
    row of x each."""

    # By kind: rows of a program, bytes of each row that it reads at a time, and warps. So chosen
    # that every processor of the GPU has a program, and each program enough reads on the way;
    # `research.cuda_decoding --only products` tries others.
    SHAPES: ClassVar = {
        "float32": (4, 2048, 4),
        "float16": (4, 2048, 4),
        "int8": (4, 2048, 4),
        "int4": (4, 1024, 4),
    }

    def __init__(self, matrices: Sequence[dict[str, Tensor]], places: Sequence[int] | None = None):
        """matrices: of each what `packed.quantised` gives, all of one kind. places: the rows of x
        and y that are theirs, where a product has matrices of other kinds too."""
        self.kind = next(iter(matrices[0]))
        rows = [_aligned(m, self.kind) for m in matrices]
        per_byte = 2 if self.kind == "int4" else 1
        self.outputs = [r.size(0) for r in rows]
        self.inputs = [r.size(1) * per_byte for r in rows]
        self.widths = [m[self.kind].size(1) for m in matrices]  # before `_aligned` fills them up
        self.places = list(range(len(rows)) if places is None else places)
        # One tensor for all: (out, in) as it is for one matrix, else all weights in a row.
        self.weight = (
            rows[0].contiguous() if len(rows) == 1 else torch.cat([r.flatten() for r in rows])
        )
        self.scale = self.weight  # stands in for scales where there are none
        if self.kind == "int8":
            self.words = self.weight.flatten().view(torch.int32)  # as the kernel reads them
            self.scale = torch.cat([m["scale"] for m in matrices])  # (Σ out,)
        elif self.kind == "int4":
            # Scale and offset, two bf16, are read as one int32: (Σ out·groups,).
            steps = [m["steps"].contiguous().view(torch.int32).flatten() for m in matrices]
            self.scale = steps[0] if len(steps) == 1 else torch.cat(steps)
        self.table = self.weight  # stands in for the table where there is none
        self.stacked = len(rows) > 1 or self.places != [0]
        if self.stacked:
            sizes = [n * k for n, k in zip(self.outputs, self.inputs, strict=True)]
            starts = [sum(sizes[:s]) for s in range(len(sizes))]
            before = [sum(self.outputs[:s]) for s in range(len(sizes))]
            entries = list(zip(self.places, self.outputs, self.inputs, starts, before, strict=True))
            self.table = torch.tensor(entries, device=self.weight.device)  # (S, 5), see `_place`

    def matrices(self) -> list[dict[str, Tensor]]:
        """The matrices one by one, as `packed.quantised` gives them: views of the stack's
        memory."""
        held = []
        flat = self.weight.flatten()
        per_byte = 2 if self.kind == "int4" else 1
        at = 0  # the matrix's first weight
        row = 0  # its first row
        for outputs, inputs, width in zip(self.outputs, self.inputs, self.widths, strict=True):
            end = at + outputs * inputs
            weight = flat[at // per_byte : end // per_byte].view(outputs, -1)[:, :width]
            tensors = {self.kind: weight}
            if self.kind == "int8":
                tensors["scale"] = self.scale[row : row + outputs]
            elif self.kind == "int4":
                steps = self.scale[at // STEP : end // STEP].view(torch.bfloat16)
                tensors["steps"] = steps.view(outputs, -1, 2)  # (out, groups, 2)
            held.append(tensors)
            at = end
            row += outputs
        return held

    def __call__(
        self, x: Tensor, add: Tensor | None = None, beta: float = 1.0, y: Tensor | None = None,
        bias: Tensor | None = None, finish: str = "",
    ) -> Tensor:  # fmt: skip
        """One row of x for each matrix → y (S, out), which is zero beyond a smaller matrix's rows.

        x (S, in) in fp32 or bf16, `in` at least each matrix's. add (S, out), or (1, out) for all,
        is added times beta. y: where to write; if None a new tensor, fp32 where weights or add are
        fp32, else bf16. bias (out,): of a single matrix, added besides. finish: "gelu" of the sum;
        "gate", where y is multiplied by the sum's SiLU.
        """
        x = self._readable(x)
        if y is None:
            wide = self.kind == "float32" or (add is not None and add.dtype == torch.float32)
            kind = torch.float32 if wide else torch.bfloat16
            y = x.new_empty(x.size(0), max(self.outputs), dtype=kind)
        # Quantised weights are read several at a time: bf16 inputs in pairs then, as int32.
        pairs = self.kind.startswith("int") and x.dtype == torch.bfloat16
        if pairs:
            x = x.view(torch.int32)
        rows, size, warps = self.SHAPES[self.kind]
        grid = (triton.cdiv(y.size(1), rows), len(self.places))
        # Where something is missing, y stands in for it: the kernel does not read it.
        more = y if add is None else add
        add_s = 0 if more.size(0) == 1 else more.stride(0)  # 0: one row for all matrices
        rest = (
            self.table, x, more, y if bias is None else bias, y, self.outputs[0], self.inputs[0],
            x.stride(0), add_s, more.stride(1), y.stride(0), y.size(1), beta,
        )  # fmt: skip
        how = {
            "ROWS": rows, "STACKED": self.stacked, "HAS_ADD": add is not None,
            "HAS_BIAS": bias is not None, "FINISH": finish, "num_warps": warps,
        }  # fmt: skip
        if self.kind == "int4":
            # a group is 32 bytes
            _int4_kernel[grid](
                self.weight, self.scale, *rest, GROUPS=size // 32, WIDE=not pairs, **how
            )
        elif self.kind == "int8":
            _int8_kernel[grid](
                self.words, self.scale, *rest, WORDS=size // 4, WIDE=not pairs, **how
            )
        else:
            inputs = size // self.weight.element_size()
            _float_kernel[grid](self.weight, *rest, INPUTS=inputs, **how)
        return y

    def _readable(self, x: Tensor) -> Tensor:
        """x (S, in) as the kernels can read it: with the inputs of the widest matrix, without gaps
        between them, and, where they are read in pairs, with rows that begin at a pair."""
        if x.size(1) < max(self.inputs):
            x = F.pad(x, (0, max(self.inputs) - x.size(1)))
        if x.stride(1) != 1:
            x = x.contiguous()
        # pairs of 16 bits begin where pairs do
        if self.kind.startswith("int") and (x.stride(0) % 2 or x.storage_offset() % 2):
            x = F.pad(x, (0, x.size(1) % 2)).clone(memory_format=torch.contiguous_format)
        return x
