"""Which device to use, and what this one multiplies fast."""

import gc

import torch
from torch import Tensor

from common.command import InputError


def chosen_device(device: str) -> str:
    """What the commands' --device names: "auto" is a GPU where there is one. Raises `InputError`
    where there is no such."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise InputError("device: there is no CUDA GPU that torch can use; take cpu")
    return "cuda" if has_gpu and device != "cpu" else "cpu"


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
