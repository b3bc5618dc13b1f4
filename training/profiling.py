"""Where time goes: the parts and operations of a training step, as a table and a trace for
chrome://tracing or Perfetto; and calls timed, for the benchmarks."""

import math
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from common.device import free
from common.files import written_whole
from training.trainer import Trainer

WARM_UP = 2  # steps that are not counted: memory is taken and kernels are chosen in them
STEPS = 4  # enough for a mean, few enough for a trace that a browser opens
# the names that `Trainer.take_step` gives its parts
PARTS = ("data", "forward", "backward", "clipping", "optimizer")


def profile_steps(trainer: Trainer) -> None:
    """Takes a few steps under the profiler and writes profile.txt and trace.json into the run's
    folder."""
    on_gpu = trainer.device == "cuda"
    trainer.eager_steps = math.inf  # a CUDA graph has no parts
    for _ in range(WARM_UP):
        trainer.take_step()
    with profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu, record_shapes=True
    ) as profiler:
        for _ in range(STEPS):
            trainer.take_step()
        if on_gpu:
            torch.cuda.synchronize()
    if trainer.world.rank:  # all processes must take the steps, one writes
        return
    events = profiler.key_averages()
    lines = [
        f"{STEPS} steps; seconds per step by part (on a GPU: of the host, which runs ahead of it)"
    ]
    lines += [
        f"{e.key:>12} {e.cpu_time_total / 1e6 / STEPS:9.4f}"
        for part in PARTS
        for e in events
        if e.key == part
    ]
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = (
        "\n".join(lines)
        + "\n\n"
        + events.table(sort_by=order, row_limit=40, max_name_column_width=48)
    )
    with written_whole(trainer.record.folder / "profile.txt") as beside:
        beside.write_text(table, encoding="utf-8")
    with written_whole(trainer.record.folder / "trace.json") as beside:
        profiler.export_chrome_trace(str(beside))
    trainer.record.say(table)


# ===== What a machine has done


def peak_memory(device: str) -> int | None:
    """The most memory that this process has had on `device`, in bytes; None on a system without a
    record of it (Windows)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # Unix only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB on Linux, bytes on a Mac


@torch.no_grad()
def work_per_token(trainer: Trainer) -> float:
    """Floating point operations of the products of a training step for each token: three times the
    forward pass's, since each product has two in the backward pass, by its input and by its
    weight."""
    ids, targets, state = trainer.micro_batch(0)
    # spectral norms change theirs in a pass
    before = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]
    with FlopCounterMode(display=False) as counter, trainer.autocast():
        trainer.model.loss(ids, targets, state)
    for buffer, value in before:
        buffer.copy_(value)
    return 3 * counter.get_total_flops() / ids.numel()


def matmul_rate(device: str, kind: torch.dtype) -> float:
    """Floating point operations a second of large products of `kind` on a GPU: the most that a
    training step could reach. The count of the most memory that was used begins anew with it."""
    # large enough that nothing but the products takes time
    x, y = torch.randn(2, 8192, 8192, device=device).to(kind)
    seconds = []
    for _ in range(5):  # the first ones wake the card up
        torch.cuda.synchronize()
        start = time.perf_counter()
        x @ y
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    del x, y
    free()  # a run's peak is not that of the gigabyte that was taken here
    return 2 * 8192**3 / min(seconds)
