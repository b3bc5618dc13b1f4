"""Whether kernels of our own can be made for the GPU at hand."""

import functools
import importlib.util

import torch

from common.command import first_line

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _write_one(place):
        tl.store(place, 1.0)


@functools.cache
def missing() -> str:
    """Why Triton makes no kernels for this GPU; empty where it does. It needs a C compiler, which
    images of a GPU's machine often lack. Not to be asked first while a CUDA graph is captured."""
    if not HAS_TRITON:
        return "Triton is not installed"
    try:
        _write_one[(1,)](torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler, a linker or a driver may lack
        return first_line(error)
    return ""


def compiles_kernels() -> bool:
    """Whether Triton makes kernels for this GPU."""
    if torch.compiler.is_compiling():
        return HAS_TRITON  # torch.compile needs the same compiler, and fails without
    return not missing()
