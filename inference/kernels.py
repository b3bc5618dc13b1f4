"""Products with one row on a GPU, as Triton kernels: weights at 32, 16, 8 or 4 bits, several
matrices in one launch.

For matrices s = 1 … S, each of its own size (out_s, in_s), and x (S, in):

    y[s, n] = Σ_k W_s[n, k] x[s, k] + beta·add[s, n] + bias[n],   summed in fp32, or GELU of it, or
    y[s, n] times its SiLU

A token at batch 1 reads every weight once and does two operations with it, so a kernel is as fast
as it reads. Weights lie as they do in a file (packed.py): rows of floats; of int8 with a scale
each; of two 4-bit numbers a byte with a scale and an offset for each group. A program takes a few
whole rows of one matrix and goes along them; a thread reads 16 bytes at a time.

Integers become floats without a conversion, of which a GPU makes fewer than products: as the
leading bits of a mantissa they are a number from 1 to 2, and what that adds to the sum, a multiple
of Σ x, is taken off at the end."""

import importlib.util
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
# inputs are filled up to a multiple of this, so that reads of 16 bytes are aligned at every width
STEP = 64

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _mantissa(bits):
        """Leading bits of a mantissa → the number from 1 to 2 that has them."""
        return (bits | 0x3F800000).to(tl.float32, bitcast=True)

    @triton.jit
    def _place(table, outputs, inputs, ROWS: tl.constexpr, STACKED: tl.constexpr):
        """Of this program's rows: which of x and y is theirs, the first of them, their matrix's
        size, where in all weights the first one begins, and how many rows the matrices before it
        have."""
        first = tl.program_id(0) * ROWS
        if STACKED:
            entry = table + tl.program_id(1) * 5
            s, outputs, inputs = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
            start, before = tl.load(entry + 3), tl.load(entry + 4)
            inputs, start = tl.multiple_of(inputs, 64), tl.multiple_of(start, 64)
        else:
            s, start, before = 0, 0, 0
        return s, first, outputs, inputs, start + first.to(tl.int64) * inputs, before

    @triton.jit
    def _store(
        total, y, add, bias, s, rows, inside, add_s, add_n, y_s, width, beta,
        HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr, FINISH: tl.constexpr,
    ):  # fmt: skip
        """Beyond the matrix's rows, up to y's width, zeros."""
        if HAS_ADD:
            total += beta * tl.load(add + s * add_s + rows * add_n, mask=inside, other=0.0).to(
                tl.float32
            )
        if HAS_BIAS:
            total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
        if FINISH == "gelu":
            total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))  # 1/√2
        place = y + s * y_s + rows
        if FINISH == "gate":
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
        s, first, outputs, inputs, start, _ = _place(table, outputs, inputs, ROWS, STACKED)
        rows = first + tl.arange(0, ROWS)
        inside = rows < outputs
        k = tl.arange(0, INPUTS)
        w = weight + start + tl.arange(0, ROWS)[:, None] * inputs + k[None, :]
        sums = tl.zeros((ROWS, INPUTS), tl.float32)
        for at in range(0, inputs, INPUTS):
            here = k < inputs - at
            a = tl.load(w + at, mask=inside[:, None] & here[None, :], other=0.0)
            b = tl.load(x + s * x_s + at + k, mask=here, other=0.0)
            sums += a.to(tl.float32) * b.to(tl.float32)[None, :]
        _store(
            tl.sum(sums, 1),
            y,
            add,
            bias,
            s,
            rows,
            inside,
            add_s,
            add_n,
            y_s,
            width,
            beta,
            HAS_ADD,
            HAS_BIAS,
            FINISH,
        )

    @triton.jit
    def _int8_kernel(
        weight, scale, table, x, add, bias, y, outputs, inputs, x_s, add_s, add_n, y_s, width, beta,
        ROWS: tl.constexpr, INPUTS: tl.constexpr, STACKED: tl.constexpr,
        HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr, FINISH: tl.constexpr,
    ):  # fmt: skip
        """weight: int8 seen as uint8. With u = q + 128 as a mantissa's bits, a number is 1 + u/256
        = 1.5 + q/256."""
        s, first, outputs, inputs, start, before = _place(table, outputs, inputs, ROWS, STACKED)
        rows = first + tl.arange(0, ROWS)
        inside = rows < outputs
        k = tl.arange(0, INPUTS)
        w = weight + start + tl.arange(0, ROWS)[:, None] * inputs + k[None, :]
        sums = tl.zeros((ROWS, INPUTS), tl.float32)
        ones = tl.zeros((INPUTS,), tl.float32)
        for at in range(0, inputs, INPUTS):
            here = k < inputs - at
            a = tl.load(w + at, mask=inside[:, None] & here[None, :], other=0)
            b = tl.load(x + s * x_s + at + k, mask=here, other=0.0).to(tl.float32)
            sums += _mantissa((a ^ 128).to(tl.int32) << 15) * b[None, :]
            ones += b
        total = tl.sum(sums, 1) - 1.5 * tl.sum(ones, 0)
        total *= 256 * tl.load(scale + before + rows, mask=inside, other=0.0).to(tl.float32)
        _store(
            total,
            y,
            add,
            bias,
            s,
            rows,
            inside,
            add_s,
            add_n,
            y_s,
            width,
            beta,
            HAS_ADD,
            HAS_BIAS,
            FINISH,
        )

    @triton.jit
    def _int4_kernel(
        weight, steps, table, x, add, bias, y, outputs, inputs, x_s, add_s, add_n, y_s, width, beta,
        ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, STACKED: tl.constexpr,
        HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr, FINISH: tl.constexpr,
    ):  # fmt: skip
        """x: in fp32 if WIDE, else pairs of bf16 seen as int32, as are steps: pairs of a scale and
        an offset. Half a byte q, 0 to 15, is the number 1 + q/16; w = (q − 8)·scale + offset, over
        a group of 64: Σ w x = 16·scale·Σ (1 + q/16) x + (offset − 24·scale)·Σ x."""
        s, first, outputs, inputs, start, _ = _place(table, outputs, inputs, ROWS, STACKED)
        row = tl.arange(0, ROWS)
        rows = first + row
        inside = rows < outputs
        group = tl.arange(0, GROUPS)
        pair = tl.arange(0, 32)
        groups = inputs // 64
        at_byte = group[:, None] * 32 + pair[None, :]  # (GROUPS, 32)
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
                even, odd = (
                    tl.load(b, mask=here[:, None], other=0.0),
                    tl.load(b + 1, mask=here[:, None], other=0.0),
                )
            else:
                b = tl.load(x + s * x_s + at * 32 + at_byte, mask=here[:, None], other=0)
                # a bf16 is the first half of a float32
                even = (b << 16).to(tl.float32, bitcast=True)
                odd = (b & -65536).to(tl.float32, bitcast=True)
            inner = (
                _mantissa((a & 15) << 19) * even[None, :, :]
                + _mantissa((a & 240) << 15) * odd[None, :, :]
            )
            both = tl.load(step + at, mask=inside[:, None] & here[None, :], other=0)
            scale, offset = (
                (both << 16).to(tl.float32, bitcast=True),
                (both & -65536).to(tl.float32, bitcast=True),
            )
            ones = tl.sum(even + odd, 1)
            sums += 16 * scale * tl.sum(inner, 2) + (offset - 24 * scale) * ones[None, :]
        _store(
            tl.sum(sums, 1),
            y,
            add,
            bias,
            s,
            rows,
            inside,
            add_s,
            add_n,
            y_s,
            width,
            beta,
            HAS_ADD,
            HAS_BIAS,
            FINISH,
        )


def usable(device: torch.device) -> bool:
    """Whether products of one row on this device are by these kernels."""
    return HAS_TRITON and device.type == "cuda"


def _aligned(tensors: dict[str, Tensor], kind: str) -> Tensor:
    """The rows of one matrix, their inputs filled up to a multiple of STEP; quantised ones are
    already."""
    weight = tensors[kind]
    return F.pad(weight, (0, -weight.size(1) % STEP)) if kind.startswith("float") else weight


class Stack:
    """S matrices at one width, prepared for the kernels, and their products with one row of x
    each."""

    # Rows of a program, bytes of each that it reads at a time, and warps: enough programs for every
    # processor of the GPU, and enough reads on the way in each.
    SHAPES: ClassVar = {
        "float32": (4, 2048, 4),
        "float16": (4, 2048, 4),
        "int8": (4, 2048, 4),
        "int4": (4, 1024, 4),
    }

    def __init__(self, matrices: Sequence[dict[str, Tensor]], places: Sequence[int] | None = None):
        """matrices: of each what `packed.quantised` gives, all at one width. places: which rows of
        x and y are theirs, where a product has other matrices too."""
        self.kind = next(iter(matrices[0]))
        rows = [_aligned(m, self.kind) for m in matrices]
        self.outputs = [r.size(0) for r in rows]
        self.inputs = [r.size(1) * (2 if self.kind == "int4" else 1) for r in rows]
        # of the tensors given: before anything is filled up
        self.widths = [m[self.kind].size(1) for m in matrices]
        self.places = list(range(len(rows)) if places is None else places)
        self.weight = (
            rows[0].contiguous() if len(rows) == 1 else torch.cat([r.flatten() for r in rows])
        )
        self.scale = self.weight
        if self.kind == "int8":
            self.weight, self.scale = (
                self.weight.view(torch.uint8),
                torch.cat([m["scale"] for m in matrices]),
            )
        elif self.kind == "int4":
            # (out·groups,)
            steps = [m["steps"].contiguous().view(torch.int32).flatten() for m in matrices]
            self.scale = steps[0] if len(steps) == 1 else torch.cat(steps)
        self.table, self.stacked = self.weight, len(rows) > 1 or self.places != [0]
        if self.stacked:
            sizes = [n * k for n, k in zip(self.outputs, self.inputs, strict=True)]
            starts = [sum(sizes[:s]) for s in range(len(sizes))]
            before = [sum(self.outputs[:s]) for s in range(len(sizes))]
            entries = list(zip(self.places, self.outputs, self.inputs, starts, before, strict=True))
            self.table = torch.tensor(entries, device=self.weight.device)

    def matrices(self) -> list[dict[str, Tensor]]:
        """The matrices one by one, as `packed.quantised` gives them, in the memory of the stack."""
        held, at, row = [], 0, 0
        flat, scale = self.weight.flatten(), self.scale
        per_byte = 2 if self.kind == "int4" else 1
        for outputs, inputs, width in zip(self.outputs, self.inputs, self.widths, strict=True):
            size = outputs * inputs
            weight = flat[at // per_byte : (at + size) // per_byte].view(outputs, -1)[:, :width]
            tensors = {self.kind: weight.view(torch.int8) if self.kind == "int8" else weight}
            if self.kind == "int8":
                tensors["scale"] = scale[row : row + outputs]
            elif self.kind == "int4":
                tensors["steps"] = (
                    scale[at // STEP : (at + size) // STEP]
                    .view(torch.bfloat16)
                    .view(outputs, -1, 2)
                )
            held.append(tensors)
            at, row = at + size, row + outputs
        return held

    def __call__(
        self, x: Tensor, add: Tensor | None = None, beta: float = 1.0, y: Tensor | None = None,
        bias: Tensor | None = None, finish: str = "",
    ) -> Tensor:  # fmt: skip
        """x (S, in) in fp32 or bf16, in at least each matrix's; add (S, out) or for all (1, out) →
        y (S, out): what is given, or new, fp32 where weights or add are fp32, else bf16. Beyond a
        smaller matrix's rows y is zero.

        bias (out,): of a single matrix, added besides. finish: "gelu" of the sum; "gate", where y
        is multiplied by its silu."""
        if x.size(1) < max(self.inputs):
            x = F.pad(x, (0, max(self.inputs) - x.size(1)))
        if x.stride(1) != 1 or (self.kind == "int4" and x.stride(0) % 2):
            x = x.contiguous()
        if y is None:
            wide = self.kind == "float32" or (add is not None and add.dtype == torch.float32)
            y = x.new_empty(
                x.size(0), max(self.outputs), dtype=torch.float32 if wide else torch.bfloat16
            )
        pairs = self.kind == "int4" and x.dtype == torch.bfloat16
        if pairs:
            x = x.view(torch.int32)
        rows, size, warps = self.SHAPES[self.kind]
        grid = (triton.cdiv(y.size(1), rows), len(self.places))
        more = y if add is None else add
        strides = (
            x.stride(0),
            0 if more.size(0) == 1 else more.stride(0),
            more.stride(1),
            y.stride(0),
            y.size(1),
        )
        rest = (
            self.table,
            x,
            more,
            y if bias is None else bias,
            y,
            self.outputs[0],
            self.inputs[0],
            *strides,
            beta,
        )
        how = {
            "ROWS": rows,
            "STACKED": self.stacked,
            "HAS_ADD": add is not None,
            "HAS_BIAS": bias is not None,
        }
        how |= {"FINISH": finish, "num_warps": warps}
        if self.kind == "int4":
            _int4_kernel[grid](
                self.weight, self.scale, *rest, GROUPS=size // 32, WIDE=not pairs, **how
            )
        elif self.kind == "int8":
            _int8_kernel[grid](self.weight, self.scale, *rest, INPUTS=size, **how)
        else:
            _float_kernel[grid](
                self.weight, *rest, INPUTS=size // self.weight.element_size(), **how
            )
        return y
