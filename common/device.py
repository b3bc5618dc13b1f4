"""Which device to use, and what this one multiplies fast."""

import gc
import platform
import re
from pathlib import Path

import torch
from torch import Tensor

from common.command import InputError

DEVICE_HELP = (
    "auto, cpu, cuda, cuda:N or mps; auto takes a CUDA GPU where there is one (default auto)"
)


def chosen_device(device: str) -> str:
    """What the commands' --device names: "auto" is a CUDA GPU where there is one; "cuda:1" becomes
    the one that kernels are launched on. Raises `InputError` where there is no such."""
    match = re.fullmatch(r"auto|cpu|mps|cuda(?::(\d{1,4}))?", device)
    if not match:
        raise InputError(f"device: {device} is none; take auto, cpu, cuda, cuda:N or mps")
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise InputError("device: there is no Apple GPU (mps) that torch can use; take cpu")
        return device
    has_gpu = torch.cuda.is_available()
    if device.startswith("cuda") and not has_gpu:
        raise InputError("device: there is no CUDA GPU that torch can use; take cpu")
    if match[1] is not None:
        count = torch.cuda.device_count()
        if int(match[1]) >= count:
            raise InputError(f"device: {device} is not there; the last is cuda:{count - 1}")
        # graphs and kernels of our own go to the current device, wherever their tensors are
        torch.cuda.set_device(int(match[1]))
        return f"cuda:{int(match[1])}"
    return "cuda" if has_gpu and device != "cpu" else "cpu"


def cpu_name() -> str:
    """This CPU's name and what torch makes of it, such as "AMD EPYC, AVX512"."""
    info = Path("/proc/cpuinfo")  # Linux's; elsewhere Python knows the family at best
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = match[1].strip() if match else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16; without them they are imitated,
    slowly."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def wide_type(device: torch.device) -> torch.dtype:
    """What weights are unpacked to for many rows."""
    return torch.bfloat16 if device.type != "cpu" or cpu_multiplies_bf16() else torch.float32


def autocast_type(like: Tensor) -> torch.dtype:
    """The type of a matrix product of `like` under the autocast in force, if any."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def free() -> None:
    """Gives a GPU's unused memory back, and begins the count of the most that was used anew."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
