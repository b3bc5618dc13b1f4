"""Whether kernels of our own can be made for the GPU at hand."""

import functools
import importlib.util
import warnings

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _write_one(place):
        tl.store(place, 1.0)


@functools.cache
def _can_compile() -> bool:
    """Compiles and runs a kernel that writes one number."""
    try:
        _write_one[(1,)](torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
        return True
    except Exception as error:  # whatever a compiler, a linker or a driver may lack
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"no GPU kernels of our own, torch's operations take their place: {reason}",
            stacklevel=2,
        )
        return False


def compiles_kernels() -> bool:
    """Whether Triton is installed and compiles for this GPU. It makes its launchers with a C
    compiler, which images of a GPU's machine often lack: then it says so once, as a warning.

    Not to be asked for the first time while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return HAS_TRITON  # torch.compile needs the same compiler, and fails without
    return HAS_TRITON and _can_compile()
