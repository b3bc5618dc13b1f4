"""Training in several processes: who they are, how work and weights are divided among them, and
saves of divided weights.

`torchrun --nproc_per_node=N train.py` starts N processes, each of which takes its rows of every
batch; the gradients are averaged, so that all take the step that one process would take. Under DDP
each holds all weights. Under FSDP (FSDP2, ZeRO-3) each holds 1/N of every weight, gradient and
optimizer state, and a block's weights come together only while it computes. Scalars stay whole:
`fully_shard` takes none. A process alone does without all of this, by the same calls."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common.command import InputError
from common.device import chosen_device
from common.tensors import check_finite, check_tensor, open_tensors, save_tensors
from config import Config
from training.optimizers import local


class LossModule(nn.Module):
    """A network's loss as the forward pass of a module: what DDP waits for."""

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__()
        self.model = model  # DDP averages the gradients of what it finds in the module
        self.loss = loss

    def forward(self, *arguments):
        return self.loss(*arguments)


# ===== The processes of a run


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them: its `rank` of `size`, its device, and how
    weights are held."""

    device: str
    rank: int = 0
    size: int = 1
    kind: str = "none"  # none (alone), ddp or fsdp
    # what is to be let go of before the group ends
    wrapped: list[DistributedDataParallel] = field(default_factory=list)

    def rows(self, micro_batch: int, i: int) -> slice:
        """This process's rows of part `i` of a batch."""
        each = micro_batch // self.size
        start = i * micro_batch + self.rank * each
        return slice(start, start + each)

    # ===== Weights

    def place(self, model: nn.Module) -> nn.Module:
        """Puts the network where it trains: whole, or each block and then the rest in shards, one
        per process."""
        if self.kind != "fsdp":
            return model.to(self.device)
        scalars = {p for p in model.parameters() if p.dim() == 0}
        mesh = init_device_mesh(self.device, (self.size,))
        for module in (*model.layers, model):  # the whole network is never on one device
            fully_shard(module, mesh=mesh, ignored_params=scalars)
        for p in scalars:
            p.data = p.data.to(self.device)
        register_fsdp_forward_method(model, "loss")
        return model

    def parallel_loss(self, model: nn.Module, loss: Callable) -> Callable:
        """`loss`, whose backward pass averages the gradients over the processes."""
        if self.kind != "ddp":
            return loss  # FSDP's blocks do it by themselves
        # The first block's M (see Bypass) has no gradient, so some parameters are always unused.
        # Buffers follow from config, tokens and weights: they are the same everywhere and need not
        # be sent.
        options = {
            "find_unused_parameters": True,
            "gradient_as_bucket_view": True,
            "broadcast_buffers": False,
        }
        self.wrapped.append(DistributedDataParallel(LossModule(model, loss), **options))
        return self.wrapped[-1]

    def accumulating(self, loss: Callable, last: bool) -> contextlib.AbstractContextManager:
        """Within it gradients only add up; after the `last` part of a batch they are averaged over
        the processes."""
        return contextlib.nullcontext() if last or self.kind != "ddp" else loss.no_sync()

    def gradient_norms(self, parameters: list[nn.Parameter]) -> Tensor:
        """The norm of each parameter's whole gradient, fp32 (n,). Averages the gradients of FSDP's
        whole scalars first."""
        if self.kind != "fsdp":
            return torch.stack(torch._foreach_norm([p.grad for p in parameters]))
        whole = [p.grad for p in parameters if not isinstance(p.grad, DTensor)]
        # Stacked: one message for all scalars in place of one for each.
        together = torch.stack(whole)
        dist.all_reduce(together)
        for gradient, mean in zip(whole, together / self.size, strict=True):
            gradient.copy_(mean)
        norms = torch.stack(torch._foreach_norm([local(p.grad) for p in parameters]))
        # A scalar is in every process, so each has 1/size of its square to add.
        share = torch.tensor(
            [1.0 if isinstance(p.grad, DTensor) else 1 / self.size for p in parameters],
            device=self.device,
        )
        squares = norms.square() * share
        dist.all_reduce(squares)
        return squares.sqrt()

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors in process 0, sharded ones on the CPU; every process must take part, and
        gets none of those."""
        gathered = {}
        for name, tensor in tensors.items():
            full = (
                tensor.detach().full_tensor().cpu()
                if isinstance(tensor, DTensor)
                else tensor.detach()
            )
            if self.rank == 0:
                gathered[name] = full
        return gathered

    def forget_gathered(self, model: nn.Module) -> None:
        """Gives back the weights that FSDP's outermost part keeps together after a forward pass
        without a backward one."""
        if self.kind == "fsdp":
            model.reshard()

    # ===== Agreement between processes

    def mean(self, value: Tensor) -> Tensor:
        return self.sum(value) / self.size

    def sum(self, value: Tensor) -> Tensor:
        if self.size > 1:
            value = value.clone()  # all_reduce writes into what it is given
            dist.all_reduce(value)
        return value

    def highest(self, number: int) -> int:
        """The highest `number` of all processes."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def rows_of_all(self, rows: Tensor) -> Tensor:
        """`rows` (n, ·) of all processes, one after the other: (n·size, ·)."""
        if self.size == 1:
            return rows
        # a place for what each process has, in the order of their ranks
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def own_rows(self, rows: Tensor) -> Tensor:
        """This process's part of what `rows_of_all` gave, in a world of this size or another."""
        return rows.chunk(self.size)[self.rank]

    def told(self, text: str) -> str:
        """The text that process 0 has."""
        box = [text]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Process 0 goes through the block, then all others do: what it leaves in a cache they find
        there."""
        if self.rank:
            dist.barrier()
        yield
        if self.size > 1 and self.rank == 0:
            dist.barrier()


def launched(name: str, default: int | None = None) -> int:
    """A number that torchrun puts into the environment. Raises `InputError` where it is missing,
    without a default, or none."""
    text = os.environ.get(name, "" if default is None else str(default))
    # More than six digits are no count of processes, and no port.
    if not (text.isdecimal() and len(text) < 7 and (int(text) or name != "WORLD_SIZE")):
        raise InputError(
            f"{name}: {text!r} in the environment is no number of a process; start several by"
            " torchrun, or unset it"
        )
    return int(text)


@contextlib.contextmanager
def join(config: Config) -> Iterator[World]:
    """The world of this process: alone, or, under torchrun, one of several."""
    device = chosen_device(config.device)
    size = launched("WORLD_SIZE", 1)
    if size == 1:
        yield World(device)
        return
    kind = "ddp" if config.parallel == "auto" else config.parallel
    if kind == "none":
        raise InputError(
            f"parallel: none, but torchrun started {size} processes; use ddp, fsdp or auto"
        )
    if config.micro_batch_size % size:
        raise InputError(
            f"micro_batch_size: {config.micro_batch_size} windows do not divide among {size}"
            " processes"
        )
    if device == "cuda":
        # LOCAL_RANK counts the processes of this machine, RANK those of all.
        torch.cuda.set_device(launched("LOCAL_RANK"))
    if launched("RANK") >= size or not os.environ.get("MASTER_ADDR") or not launched("MASTER_PORT"):
        raise InputError(
            f"WORLD_SIZE: {size} processes need RANK below it, MASTER_ADDR and MASTER_PORT; start"
            " them by torchrun"
        )
    # The wait covers what process 0 does alone: making token files before the run, the final
    # figures after it.
    try:
        # None leaves the choice to torch: NCCL for GPUs, and gloo for what lies on the CPU.
        dist.init_process_group("gloo" if device == "cpu" else None, timeout=timedelta(hours=4))
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"MASTER_ADDR: cannot meet the other processes ({reason}); start all by torchrun"
        ) from None
    try:
        world = World(device, dist.get_rank(), size, kind)
        yield world
        # DDP's reducer would be the last to hold the group, and end it with the interpreter's lock
        # held, while a thread of the group that waits for the lock is waited for.
        for module in world.wrapped:
            del module.reducer, module.logger
    finally:
        dist.destroy_process_group()


# ===== Saves of sharded tensors: a folder with a safetensors file from each process
#
# A shard is rows: process i of n holds the i-th of the n parts that torch.chunk cuts dimension 0
# into. So the rows in the files 0-of-n, 1-of-n, … are in this order the whole tensor, and nothing
# but the number of files need be known to read them, in any other number of processes.


def save_shards(tensors: dict[str, dict[str, Tensor]], folder: Path, world: World) -> None:
    """Writes what this process holds of tensors, by group and name; process 0 those that are whole
    in each process. Raises `InputError` in all processes where one of them cannot write."""
    held = {
        f"{group}.{name}": local(tensor)
        for group, named in tensors.items()
        for name, tensor in named.items()
        if world.rank == 0 or isinstance(tensor, DTensor)
    }
    # Kept until all processes have written: one that raised at once would leave the others waiting.
    failure = None
    try:
        folder.mkdir(exist_ok=True)
        save_tensors(held, folder / f"{world.rank}-of-{world.size}.safetensors")
    except OSError as error:
        failure = InputError(f"{folder}: cannot be written ({error.strerror})")
    except InputError as error:
        failure = error
    if world.highest(int(failure is not None)):  # which also waits for all of them
        raise failure or InputError(f"{folder}: another process cannot write its part of it")


class Shards:
    """The tensors that `size` processes wrote to `folder`, by their groups' and their own names
    joined by a dot."""

    def __init__(self, folder: Path, size: int):
        """Raises `InputError` where a file is missing or not whole."""
        self.folder = folder
        # name -> a slice from each file that has rows of it, in their order
        self.parts: dict[str, list] = {}
        for rank in range(size):
            file = open_tensors(folder / f"{rank}-of-{size}.safetensors")
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                self.parts.setdefault(name, []).append(file.get_slice(name))
        self.shapes = {name: self._whole_shape(name) for name in self.parts}

    def _whole_shape(self, name: str) -> torch.Size:
        shapes = [part.get_shape() for part in self.parts[name]]
        if any(shape[1:] != shapes[0][1:] or not shape for shape in shapes) and len(shapes) > 1:
            raise InputError(
                f"{self.folder}: the parts of {name} do not fit together; restore the folder"
            )
        return torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else [])

    def read(self, tensors: dict[str, dict[str, Tensor]], world: World) -> None:
        """Fills `tensors`, sharded or whole. Raises `InputError` where the folder has others, or
        theirs are of another shape or type or not finite."""
        named = {
            f"{group}.{name}": tensor
            for group, own in tensors.items()
            for name, tensor in own.items()
        }
        if different := named.keys() ^ self.parts.keys():
            raise InputError(
                f"{self.folder}: has not the tensors of this run, first {min(different)}; restore"
                " the folder"
            )
        for name, tensor in named.items():
            held = local(tensor)
            if tensor.shape != self.shapes[name]:
                raise InputError(
                    f"{self.folder}: {name} is {list(self.shapes[name])}, not {list(tensor.shape)}"
                )
            rows = (
                own_part(tensor.size(0), world)
                if isinstance(tensor, DTensor)
                else slice(0, sum(tensor.shape[:1]))
            )
            read = self._rows(name, rows.start, rows.stop)
            check_tensor(name, read, held.shape, held.dtype, self.folder)
            # whose squares may be beyond all numbers in a run that goes on well
            if not name.startswith("optimizer."):
                check_finite(name, read, self.folder)
            held.copy_(read)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows from `start` to `stop` − 1, from all files that have some; all of what has no
        rows."""
        pieces = []
        before = 0  # rows in the files that were gone through
        for part in self.parts[name]:
            if not part.get_shape():
                return part[...]
            rows = part.get_shape()[0]
            # start and stop as this file counts its rows, cut to those that it has
            first, last = (min(max(0, row - before), rows) for row in (start, stop))
            pieces.append(part[first:last])
            before += rows
        return torch.cat(pieces)


def own_part(rows: int, world: World) -> slice:
    """Which of so many rows of a sharded tensor this process holds."""
    each = -(-rows // world.size)  # rounded up, as torch.chunk does: the last may have fewer
    start = min(rows, world.rank * each)
    return slice(start, min(rows, start + each))


def remove_other_shards(keep: Path) -> None:
    """Removes the folders of earlier saves beside `keep`."""
    for folder in keep.parent.glob("shards-*"):
        if folder != keep:
            shutil.rmtree(folder)
