"""Products of few rows on a CPU, by a small C++ library (cpu_kernels.cpp) that is compiled when it
is first needed: weights at 32, 16, 8 or 4 bits as they lie in a file, several matrices in one call.

For matrices s = 1 … S, each of its own size (out_s, in_s), and x (S, N, in):

    total[s, n, r] = Σ_k W_s[r, k] x[s, n, k] + beta·add[s, n, r] + bias[r]

and y is that, its GELU, its ReLU squared, or what y was times its SiLU. A `Program` makes several
such products, and the small steps between them, one after the other in one call.

A product of few rows takes as long as its weights take to come from memory. torch's kernels for 8
and 4 bits reach a half to two thirds of that speed on the machines that were tried, this one more
(see runs.md), and rounds x less: to 16 bits with a scale for each 64 inputs, where torch's round x
to bf16. The sums of such integers are exact, so a row's result is the same whatever the number of
threads and of other rows.

Where the library cannot be made (no C++ compiler, another system than Linux, a CPU without AVX2)
torch's kernels do all products, and `missing()` says why (common/native.py).
"""

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.native import NativeLibrary

GROUP = 64  # inputs that share a scale, as in the library
FINISHES = {"": 0, "gelu": 1, "gate": 2, "relu2": 3}  # as the library numbers them


def _declare(library: ctypes.CDLL) -> None:
    """Gives the library's functions their arguments' types, and torch their operation."""
    number, address, fp32 = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    library.product.argtypes = [
        number, address, number, number,  # bits, table, count, rows
        address, number, number, number,  # x, x_width, x_place, x_row
        address, number, number, address,  # add, add_place, add_row, bias
        address, number, number, number, number, fp32,  # y, width, y_place, y_row, how, beta
    ]  # fmt: skip
    library.product.restype = None
    library.program.argtypes = [address, number, number, address, address]
    library.program.restype = None
    library.unpack.argtypes = [
        address, address, number, number, address, number, number, address,
    ]  # fmt: skip
    library.unpack.restype = number
    _define_operations()


LIBRARY = NativeLibrary(Path(__file__).with_suffix(".cpp"), _declare)
missing = LIBRARY.missing


@functools.cache
def _define_operations() -> None:
    """Makes the product an operation of torch's, as which torch.compile can call it."""
    product = "waveletlm::product"
    arguments = (
        "Tensor table, int bits, int width, Tensor x, Tensor? add, float beta, Tensor? bias,"
        " str finish"
    )
    torch.library.define(product, f"({arguments}) -> Tensor")
    torch.library.impl(product, "CPU")(_product)

    @torch.library.register_fake(product)
    def product_shape(table, bits, width, x, add, beta, bias, finish):
        return x.new_empty(*x.shape[:-1], width, dtype=torch.float32)


def _product(
    table: Tensor,
    bits: int,
    width: int,
    x: Tensor,
    add: Tensor | None,
    beta: float,
    bias: Tensor | None,
    finish: str,
    y: Tensor | None = None,
) -> Tensor:
    """The library's product, as `Stack` gives it: table (S, 6), width of y."""
    x = _readable(x)
    if y is None:
        y = x.new_empty(*x.shape[:-1], width)
    assert _readable(y) is y, "the library writes fp32 numbers side by side"
    add_place = add_row = 0
    if add is not None:
        add = _readable(add)
        add_place, add_row = _steps(add)
    bias = None if bias is None else _readable(bias)
    x_place, x_row = _steps(x)
    y_place, y_row = _steps(y)
    LIBRARY.get().product(
        bits, table.data_ptr(), table.size(0), x.size(-2), x.data_ptr(), x.size(-1), x_place, x_row,
        None if add is None else add.data_ptr(), add_place, add_row,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(), y.size(-1), y_place, y_row, FINISHES[finish], beta,
    )  # fmt: skip
    return y


def _readable(t: Tensor) -> Tensor:
    """t as the library reads it: in fp32, the numbers of its last dimension side by side."""
    t = t.float()
    return t if t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()


def _steps(t: Tensor) -> tuple[int, int]:
    """How far the places (S, …) and the rows (…, N, ·) of t lie apart; 0 where there is one, which
    then stands for all."""
    row = t.stride(-2) if t.size(-2) > 1 else 0
    place = t.stride(0) if t.dim() == 3 and t.size(0) > 1 else 0
    return place, row


def usable(device: torch.device) -> bool:
    """Whether these kernels multiply few rows on this device."""
    return device.type == "cpu" and LIBRARY.get() is not None


def unpacked(
    packed: Tensor, steps: Tensor, kind: torch.dtype, rows: Tensor | None = None
) -> Tensor:
    """4-bit weights (n, in), of bytes (n, in/2) and steps (n, in/64, 2) as `packed.to_int4` gives
    them, in `kind`, fp32 or bf16; or those of their rows (m,) int64 alone, (m, in)."""
    count, inputs = packed.size(0), 2 * packed.size(1)
    rows = None if rows is None else rows.contiguous()
    w = packed.new_empty(count if rows is None else rows.size(0), inputs, dtype=kind)
    done = LIBRARY.get().unpack(
        packed.data_ptr(), steps.data_ptr(), count, inputs,
        None if rows is None else rows.data_ptr(), w.size(0), kind == torch.bfloat16, w.data_ptr(),
    )  # fmt: skip
    if not done:
        raise IndexError(f"rows: not all of them are among the {count}")
    return w


class Stack:
    """S matrices with weights of one kind, and their products with N rows of x each.

    The weights are used as they lie: the stack keeps no copy.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Tensor]],
        places: Sequence[int] | None = None,
        inputs: Sequence[int] | None = None,
    ):
        """matrices: of each what `packed.quantised` gives, all of one kind; places: the rows of x
        and y that are theirs, where a product has matrices of other kinds too; inputs: of each
        without filler, where x has more."""
        kind = next(iter(matrices[0]))
        self.bits = {"float32": 32, "float16": 16, "int8": 8, "int4": 4}[kind]
        self.held = [{name: t.contiguous() for name, t in m.items()} for m in matrices]
        places = range(len(matrices)) if places is None else places
        # Not `matrices`, which may be a second copy of the weights.
        self.made_of = (self.held, places, inputs)
        entries = []
        for s, (place, tensors) in enumerate(zip(places, self.held, strict=True)):
            weight = tensors[kind]
            steps = tensors.get("scale", tensors.get("steps", weight))  # weight: it has none
            size = weight.size(1) * (2 if kind == "int4" else 1)
            reads = size if inputs is None else inputs[s]
            numbers = [place, weight.size(0), size, reads]
            groups = steps.size(1) if kind == "int4" else size // GROUP
            if size == 0 or (kind.startswith("int") and groups * GROUP != size):
                raise ValueError(
                    f"{kind} weights {tuple(weight.shape)} are not in groups of {GROUP}"
                )
            entries.append([weight.data_ptr(), steps.data_ptr(), *numbers])
        self.outputs = max(entry[3] for entry in entries)
        # (S, 6) int64, the library's `Matrix` each
        self.table = torch.tensor(entries, device="cpu")

    def __reduce__(self):
        """Copies and pickles are made anew: the table has addresses."""
        return Stack, self.made_of

    def __call__(
        self, x: Tensor, add: Tensor | None = None, beta: float = 1.0, y: Tensor | None = None,
        bias: Tensor | None = None, finish: str = "",
    ) -> Tensor:  # fmt: skip
        """N rows of x (S, N, in) for each matrix → y (S, N, out), which is zero beyond a smaller
        matrix's rows; of a stack of one matrix x may be (N, in), and y is (N, out) then.

        x: of any float type. add, (S or 1, N or 1, out) or (N or 1, out), is added times beta; bias
        (out,) to each product. y: where to write, fp32; if None a new tensor. finish: "gelu" of the
        sum; "relu2", its ReLU squared; "gate", where y is multiplied by the sum's SiLU.
        """
        if torch.compiler.is_compiling():
            assert y is None, "a program would copy the tensor that it writes a part of"
            product = torch.ops.waveletlm.product
            return product(self.table, self.bits, self.outputs, x, add, beta, bias, finish)
        return _product(self.table, self.bits, self.outputs, x, add, beta, bias, finish, y)


# ===== Programs

# The steps of a program besides its products, as the library numbers them; 0 is a product.
KINDS = {
    "mean": 1, "norm": 2, "lags": 3, "join": 4, "route": 5, "copy": 6, "haar": 7, "put": 8,
    "filter": 9,
}  # fmt: skip
FIELDS = 20  # numbers of a step in the table: its kind and what it needs
NOTHING = -1  # the place of what is not there


def bits_of(number: float) -> int:
    """The bits of a number in fp64."""
    return struct.unpack("q", struct.pack("d", number))[0]


@dataclass(frozen=True)
class Rows:
    """Where an operand (S, B, width) of a program lies: `at` its first number, `row` numbers from
    one text to the next and `place` from one matrix to the next."""

    at: int
    width: int
    row: int
    place: int = 0

    def from_column(self, first: int) -> "Rows":
        """The operand without its first columns."""
        return Rows(self.at + first, self.width - first, self.row, self.place)

    def from_place(self, first: int) -> "Rows":
        """The operand without its first places."""
        return Rows(self.at + first * self.place, self.width, self.row, self.place)


class Program:
    """Steps that are made one after the other in one call, of one token in each of `rows` texts:
    between two of them there is no Python, and the threads do not go to sleep.

    All numbers lie in one room, (size,) in fp32, but for those at addresses that each call is given
    by the names in `arguments`.
    """

    def __init__(self, rows: int, arguments: Sequence[str]):
        self.rows = rows
        self.names = list(arguments)
        self.size = 0
        self.steps: list[list[int]] = []
        self.held: list[Tensor | Stack] = []  # the table has their addresses: not to be freed
        self.table: Tensor | None = None  # (steps, FIELDS) int64, made at the first call

    def argument(self, name: str) -> int:
        """The place of an argument; arguments are numbered below `NOTHING`."""
        return NOTHING - 1 - self.names.index(name)

    def given(self, name: str, width: int) -> Rows:
        """An argument (B, width), its rows side by side."""
        return Rows(self.argument(name), width, width)

    def room(self, width: int, places: int = 1) -> Rows:
        """New numbers (places, B, width)."""
        at = self.size
        self.size += -(-places * self.rows * width // 16) * 16  # whole lines of 64 bytes
        return Rows(at, width, width, self.rows * width)

    def constant(self, tensor: Tensor | None) -> int:
        """The address of a tensor that does not change, in fp32 or int64; 0 for None."""
        if tensor is None:
            return 0
        # detached: a parameter that is given another type would let go of what lies at the address
        tensor = tensor.detach()
        tensor = (tensor if tensor.dtype == torch.int64 else tensor.float()).contiguous()
        self.held.append(tensor)
        return tensor.data_ptr()

    def step(self, kind: str, *fields: int) -> None:
        """A step that is no product, with its fields as the library reads them."""
        self.steps.append([KINDS[kind], *fields])

    def product(
        self, stack: Stack, x: Rows, y: Rows, add: Rows | None = None, beta: float = 1.0,
        bias: Tensor | None = None, finish: str = "",
    ) -> None:  # fmt: skip
        """y = what `Stack` gives of x; bias (out,) or (S, out)."""
        self.held.append(stack)
        add = Rows(NOTHING, 0, 0) if add is None else add
        bias_place = bias.size(1) if bias is not None and bias.dim() == 2 else 0
        self.steps.append(
            [
                0, stack.bits, stack.table.data_ptr(), stack.table.size(0),
                x.at, x.width, x.place, x.row, add.at, add.place, add.row,
                self.constant(bias), bias_place, y.at, y.width, y.place, y.row,
                FINISHES[finish], bits_of(beta),
            ]
        )  # fmt: skip

    def __call__(self, given: dict[str, int]) -> Tensor:
        """The room after all steps. given: the arguments, addresses and numbers."""
        table = self.table  # a name of its own, which keeps it while another thread makes one too
        if table is None:
            assert max(map(len, self.steps)) <= FIELDS, "the library reads so many fields a step"
            filled = [step + [0] * (FIELDS - len(step)) for step in self.steps]
            table = self.table = torch.tensor(filled, device="cpu")
        # by name: a program may have made other types or devices its default
        room = torch.empty(self.size, dtype=torch.float32, device="cpu")
        arguments = (ctypes.c_int64 * (len(self.names) + 1))(0, *[given[n] for n in self.names])
        LIBRARY.get().program(
            table.data_ptr(), len(self.steps), self.rows, room.data_ptr(), arguments
        )
        return room
