"""Tensors on disk: safetensors and plain dicts, written whole, read strictly, never unpickled."""

import json
import warnings
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.command import InputError, first_line
from common.files import check_regular, written_whole


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers by name, a tensor with several names (tied, shared)
    once."""
    tensors = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            tensors[name] = tensor
            seen.add(id(tensor))
    return tensors


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors to a safetensors file, whole or not at all. The same tensors and metadata make
    the same bytes."""
    with written_whole(path) as beside:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, metadata
        )
        if metadata:
            _order_metadata(beside)


def _order_metadata(path: Path) -> None:
    """Sorts the metadata in a safetensors file's header, which safetensors writes in another order
    each time."""
    with open(path, "r+b") as file:
        # the file: the header's size, the header in JSON, the tensors
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{path}: the header of {size} bytes has become one of {len(text)}")
        file.seek(8)
        file.write(text.ljust(size))


def save_plain(values: dict[str, Any], path: Path) -> None:
    """Writes tensors, numbers and lists in torch's own format, to be read with weights_only; whole
    or not at all."""
    with written_whole(path) as beside, open(beside, "wb") as file:
        try:
            torch.save(values, file)
        except RuntimeError as error:
            # torch's writer hides the system's error, such as a full disk
            raise OSError(first_line(error)) from None


def open_tensors(path: Path) -> safetensors.safe_open:
    """A safetensors file, of which nothing but the names is read yet. Raises `InputError` where it
    is missing, cut short or something else."""
    check_regular(path)  # a FIFO would be waited for
    try:
        return safetensors.safe_open(path, "pt")
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `InputError` as `open_tensors` does."""
    file = open_tensors(path)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)


def load_plain(path: Path) -> dict[str, Any]:
    """What `save_plain` or the first implementation wrote: a dict of tensors, numbers, texts and
    lists. Whatever else a pickle may hold is refused, and nothing in it is called."""
    check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused anyhow
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's reader meets damage in many ways, and its own advice is to unpickle all the same
        raise InputError(
            f"{path}: cannot be read: not a whole file of plain tensors ({type(error).__name__})"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: cannot be read: holds no dict of values by name")
    return values


def check_tensors(tensors: dict[str, Tensor], like: dict[str, Tensor], source: str | Path) -> None:
    """Raises `InputError`, naming `source`, unless `tensors` has the names of `like`, in its shapes
    and types, all finite."""
    if missing := like.keys() - tensors.keys():
        raise InputError(f"{source}: lacks {some_of(missing)}, which its config.json asks for")
    if unused := tensors.keys() - like.keys():
        raise InputError(
            f"{source}: has {some_of(unused)}, which the network of its config.json has no use for"
        )
    for name, wanted in like.items():
        check_tensor(name, tensors[name], wanted.shape, wanted.dtype, source)
        check_finite(name, tensors[name], source)


def check_tensor(
    name: str, tensor: Any, shape: torch.Size, dtype: torch.dtype, source: str | Path
) -> None:
    """Raises `InputError` unless `tensor` is a plain one of this shape and type: no copy may
    broadcast or convert it."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.layout != torch.strided
        or tensor.device.type == "meta"
    ):
        raise InputError(f"{source}: {name} is no plain tensor")
    if tensor.shape != shape:
        raise InputError(
            f"{source}: {name} is {list(tensor.shape)}, its config.json makes it {list(shape)}"
        )
    if tensor.dtype != dtype:
        raise InputError(
            f"{source}: {name} is {_type(tensor.dtype)}, not {_type(dtype)}; convert it"
        )


def check_finite(name: str, tensor: Tensor, source: str | Path) -> None:
    """Raises `InputError` where a value is NaN or infinite. NaN is both the least and the greatest,
    so these two tell, without a copy."""
    if (
        tensor.is_floating_point()
        and tensor.numel()
        and not all(extreme.isfinite() for extreme in tensor.aminmax())
    ):
        raise InputError(
            f"{source}: {name} has values that are not finite; take an earlier checkpoint"
        )


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def some_of(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
