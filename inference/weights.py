"""The prepared weights of a decoder by name: made from a model's, or read from a file that holds
them as they are.

decode.py and folded.py ask a `PackedWeights` for each matrix, table, norm and number that they
need, and don't know which of the two it does. What comes back multiplies (packed.py), is looked up
in (`Table`), or is a small fp32 tensor. `Bits` says which width each part of the network has.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.command import InputError
from inference import cpu_kernels
from inference.packed import (
    GROUP,
    MATRICES,
    FloatStack,
    Matrix,
    PackedStack,
    from_int4,
    quantised,
)

ALIGNMENT = 64  # bytes; torch's own allocations on a CPU begin at multiples of this


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its address is not a multiple of ALIGNMENT.

    In a file that is mapped into memory tensors follow each other without gaps, and torch's int8
    kernel for AVX-512 crashes on addresses that are not multiples of 16 bytes.
    """
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


# ===== Widths


@dataclass(frozen=True)
class Bits:
    """How many bits the weights of each component have: 32, 16, 8 or 4.

    Mixers are three components by their scale: the coarsest third (with the approximation), the
    middle one and the finest.
    """

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
        """The widths that a user's `bits` stands for; None is 32. Raises `InputError` for a width
        that does not exist."""
        if bits not in (None, 32, 16, 8, 4):
            raise InputError(f"bits: {bits} is not a width; take 8 or 4 (or 16, or 32)")
        widths = cls(*[bits or 32] * len(fields(cls)))
        if bits == 4:
            # What follows is computed from the coarse scales, so that their error at 4 bits cost
            # more than that of all other weights together. And a query that is a little off
            # chooses other slots of a memory.
            widths = replace(widths, mixer_coarse=8, query=8)
        return widths

    def __getitem__(self, component: str) -> int:
        return getattr(self, component)

    @staticmethod
    def of_scale(scale: int, scales: int) -> str:
        """The component that the mixer of `scale` (0 the coarsest) of `scales` belongs to."""
        return ("mixer_coarse", "mixer_mid", "mixer_fine")[scale * 3 // scales]


# ===== Tables


class Table:
    """A table (rows, width) whose rows are looked up: only the rows that are read are unpacked."""

    def __init__(self, tensors: dict[str, Tensor], width: int):
        """tensors: as `quantised` gives them; width: of a row without the filler of its last
        group."""
        self.tensors = tensors
        self.width = width
        self.kind, self.held = next(iter(tensors.items()))  # the weights, before their scales
        by_kind = {
            "float32": self.floats,
            "float16": self.floats,
            "int8": self.int8,
            "int4": self.int4,
        }
        self.read = by_kind[self.kind]
        self.by_kernel = False  # whether rows are unpacked by our own CPU kernel
        if self.kind == "int4" and cpu_kernels.usable(self.held.device):
            groups = tensors["steps"].size(1)
            self.by_kernel = 2 * self.held.size(1) == groups * cpu_kernels.GROUP

    # Each of these reads rows (…) → (…, width) in fp32, of a table of one kind.

    def floats(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.held).float()

    def int8(self, rows: Tensor) -> Tensor:
        q = F.embedding(rows, self.held)[..., : self.width]  # (…, width)
        return q * F.embedding(rows, self.tensors["scale"][:, None].float())

    def int4(self, rows: Tensor) -> Tensor:
        if self.by_kernel and not torch.compiler.is_compiling():
            steps = self.tensors["steps"]
            w = cpu_kernels.unpacked(self.held, steps, torch.float32, rows.flatten())
            w = w.view(*rows.shape, -1)  # (…, groups·group)
            return w if w.size(-1) == self.width else w[..., : self.width]
        q = from_int4(F.embedding(rows, self.held)).float().sub_(8)  # (…, groups·group)
        steps = F.embedding(rows, self.tensors["steps"].flatten(1)).float()  # (…, groups·2)
        steps = steps.unflatten(-1, (-1, 2))  # (…, groups, 2)
        q = q.unflatten(-1, (steps.size(-2), -1))  # (…, groups, group)
        scale = steps[..., :1]
        offset = steps[..., 1:]
        return torch.addcmul(offset, q, scale).flatten(-2)[..., : self.width]

    def __call__(self, rows: Tensor) -> Tensor:
        """rows (…) int64 → those rows of the table, (…, width) in fp32."""
        return self.read(rows)

    def weighted(self, rows: Tensor, shares: Tensor) -> Tensor:
        """Weighted sums of rows: rows (N, k) int64 and shares (N, k) → Σ_k shares[n, k] ·
        table[rows[n, k]], (N, width) in fp32."""
        if self.held.dtype == torch.float32:
            return F.embedding_bag(rows, self.held, mode="sum", per_sample_weights=shares)
        # (N, 1, k) × (N, k, width): the k rows alone are unpacked
        return torch.bmm(shares[:, None], self.read(rows)).squeeze(1)


# ===== The weights of a decoder


class PackedWeights:
    """Gives a decoder its prepared weights by name: made from a model's, or read from a file that
    holds them as they are.

    With `saving`, every tensor that is made is also put into `saved`, under "name/kind": kind is a
    key of `quantised`, "float32" for small tensors.
    """

    def __init__(
        self,
        bits: Bits,
        tensors: dict[str, Tensor] | None = None,
        saving: bool = False,
        source: str = "checkpoint",
    ):
        """tensors: what a file holds, by "name/kind"; None: weights are made from a model's.
        source: the file's name in errors."""
        self.bits = bits
        self.source = source
        self.used: set[str] = set()  # names that were asked for, for `check`
        # name → kind → tensor; None where weights are made
        self.given: dict[str, dict[str, Tensor]] | None = None if tensors is None else {}
        for key, tensor in (tensors or {}).items():
            name, _, kind = key.rpartition("/")  # names have dots, and no "/"
            self.given.setdefault(name, {})[kind] = aligned(tensor)
        self.saved: dict[str, Tensor] | None = {} if saving else None
        # Where prepared weights go: where the file's tensors are; for a model's, `Decoder` sets it.
        # Constants are made on the CPU, so they have to be moved too.
        held = (tensor.device for tensor in (tensors or {}).values())
        self.device = next(held, torch.device("cpu"))

    def _tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of `name` by kind: from the file, or those that `make` gives.

        With a file `make` is called too: a model on the meta device costs nothing, and what it
        makes tells which shapes and types the file must have.
        """
        made = make()
        if self.given is not None:
            own = self.given.get(name)
            if own is None or not _alike(own, made):
                raise InputError(
                    f"{self.source}: {name} is absent or not what its config.json makes it;"
                    " quantise the run again"
                )
            self.used.add(name)
            return {kind: own[kind] for kind in made}  # in the order in which they are made
        tensors = {kind: t.detach().to(self.device) for kind, t in made.items()}
        if self.saved is not None:
            # Copies: two names may share one tensor, and a file holds each tensor once.
            self.saved |= {f"{name}/{kind}": t.clone() for kind, t in tensors.items()}
        return tensors

    def _quantised(
        self, name: str, weight: Tensor, bits: int, group: int = GROUP
    ) -> dict[str, Tensor]:
        return self._tensors(name, lambda: quantised(weight.float(), bits, group))

    def check(self) -> None:
        """Ends the reading: raises `InputError` if the file has tensors that nothing asked for."""
        if self.given is not None and (unused := self.given.keys() - self.used):
            keys = [f"{name}/{kind}" for name in unused for kind in self.given[name]]
            first = min(key.lstrip("/") for key in keys)  # a key without "/" has no name here
            raise InputError(
                f"{self.source}: has {first}, which the network of its config.json has no use for"
            )
        self.given = None  # the decoder holds what it uses; the rest may be freed

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """A small tensor of any shape, in fp32."""
        return self._tensors(name, lambda: {"float32": tensor.float().contiguous()})["float32"]

    def bias(self, name: str, tensor: Tensor, matrix: Matrix | FloatStack | PackedStack) -> Tensor:
        """What is added to the product of `matrix`, when its result is read by the next product:
        in the type in which `matrix` multiplies, so that nothing is converted in between."""
        return self.keep(name, tensor).to(matrix.kind)

    def number(self, name: str, value: Tensor | float) -> float:
        """One number, as a Python float."""
        return float(self.keep(name, torch.as_tensor(value)))  # known to the host, as a constant

    def norm(self, name: str, norm: nn.LayerNorm) -> tuple:
        """The arguments of F.layer_norm after its input: shape, weight (C,), bias (C,), eps."""
        return (
            norm.normalized_shape,
            self.keep(f"{name}.weight", norm.weight),
            self.keep(f"{name}.bias", norm.bias),
            norm.eps,
        )

    def matrix(self, name: str, weight: Tensor, component: str) -> Matrix:
        """A matrix to multiply by, of `weight` (out, in), at the width of `component`."""
        bits = self.bits[component]
        return MATRICES[bits](self._quantised(name, weight, bits), weight.size(0))

    def stack(
        self, name: str, matrices: list[Tensor], components: list[str]
    ) -> FloatStack | PackedStack:
        """One product of several matrices, (out, in) each of its own sizes, each at the width of
        its component."""
        bits = [self.bits[component] for component in components]
        tensors = [
            self._quantised(f"{name}.{s}", weight, width)
            for s, (weight, width) in enumerate(zip(matrices, bits, strict=True))
        ]
        if set(bits) == {32}:  # one batched product
            return FloatStack([each["float32"] for each in tensors])
        outputs = [weight.size(0) for weight in matrices]
        inputs = [weight.size(1) for weight in matrices]
        return PackedStack(tensors, bits, outputs, inputs)

    def table(self, name: str, weight: Tensor, component: str, group: int = GROUP) -> Table:
        """A table to look rows up in, of `weight` (rows, width), at the width of `component`.

        group: how many numbers of a row are quantised together, even. It has to be GROUP where the
        same weights are multiplied by, too.
        """
        tensors = self._quantised(name, weight, self.bits[component], group)
        return Table(tensors, weight.size(1))

    def module(self, name: str, module: nn.Module) -> nn.Module:
        """A module of the model as it is, in fp32, on `device`.

        Its constants (buffers that are not saved) are in no file and are made on the CPU.
        """
        if self.given is not None:
            state = module.state_dict()
            tensors = {key: self.keep(f"{name}.{key}", tensor) for key, tensor in state.items()}
            module.load_state_dict(tensors, assign=True)  # also from the meta device
        elif self.saved is not None:
            for key, tensor in module.state_dict().items():
                self.keep(f"{name}.{key}", tensor)
        return module.to(self.device)


def _alike(own: dict[str, Tensor], made: dict[str, Tensor]) -> bool:
    """Whether both hold the same kinds, each of the same shape and type."""
    if own.keys() != made.keys():
        return False
    return all(
        (own[kind].shape, own[kind].dtype) == (made[kind].shape, made[kind].dtype) for kind in made
    )
