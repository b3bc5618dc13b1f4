"""Where time goes: the parts and operations of a training step, as a table and a trace for chrome://tracing or Perfetto; and
calls timed, for the benchmarks."""

import gc
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import written_whole
from trainer import Trainer

WARM_UP, STEPS = 2, 4
PARTS = ("data", "forward", "backward", "clipping", "optimizer")  # the names that `Trainer.take_step` gives its parts


def profile_steps(trainer: Trainer) -> None:
    """Takes a few steps under the profiler and writes profile.txt and trace.json into the run's folder."""
    on_gpu = trainer.device == "cuda"
    trainer.eager_steps = math.inf  # a CUDA graph has no parts
    for _ in range(WARM_UP):
        trainer.take_step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu, record_shapes=True) as profiler:
        for _ in range(STEPS):
            trainer.take_step()
        if on_gpu:
            torch.cuda.synchronize()
    if trainer.world.rank:
        return
    events = profiler.key_averages()
    lines = [f"{STEPS} steps; seconds per step by part (on a GPU: of the host, which runs ahead of it)"]
    lines += [f"{e.key:>12} {e.cpu_time_total / 1e6 / STEPS:9.4f}" for part in PARTS for e in events if e.key == part]
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = "\n".join(lines) + "\n\n" + events.table(sort_by=order, row_limit=40, max_name_column_width=48)
    with written_whole(trainer.record.folder / "profile.txt") as beside:
        beside.write_text(table, encoding="utf-8")
    with written_whole(trainer.record.folder / "trace.json") as beside:
        profiler.export_chrome_trace(str(beside))
    trainer.record.say(table)


@torch.no_grad()
def work_per_token(trainer: Trainer) -> float:
    """Floating point operations of the products of a training step for each token: three times the forward pass's, since each
    product has two in the backward pass, by its input and by its weight."""
    ids, targets, state = trainer.micro_batch(0)
    before = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]  # spectral norms change theirs in a pass
    with FlopCounterMode(display=False) as counter, trainer.autocast():
        trainer.model.loss(ids, targets, state)
    for buffer, value in before:
        buffer.copy_(value)
    return 3 * counter.get_total_flops() / ids.numel()


def matmul_rate(device: str, kind: torch.dtype) -> float:
    """Floating point operations a second of large products of `kind` on a GPU: the most that a training step could reach. The
    count of the most memory that was used begins anew with it."""
    x, y = torch.randn(2, 8192, 8192, device=device).to(kind)  # large enough that nothing but the products takes time
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


def median_ms(call: Callable[[], object], n: int = 10, warm_up: int = 3) -> tuple[float, float]:
    """Median milliseconds of a call on a GPU, by events, and of the host until its last launch, the GPU idle before each."""
    for _ in range(warm_up):
        call()
    device, host = [], []
    for _ in range(n):
        torch.cuda.synchronize()
        before, after = torch.cuda.Event(True), torch.cuda.Event(True)
        began = time.perf_counter()
        before.record()
        call()
        after.record()
        host.append(1e3 * (time.perf_counter() - began))
        torch.cuda.synchronize()
        device.append(before.elapsed_time(after))
    return statistics.median(device), statistics.median(host)


def mean_ms(call: Callable[[], object], n: int = 10, warm_up: int = 3) -> float:
    """Milliseconds of a call in a row of n on a GPU, the way a run makes them: the host may be ahead of the device."""
    for _ in range(warm_up):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(n):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / n


def free() -> None:
    """Gives a GPU's unused memory back, and begins the count of the most that was used anew."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def interleaved(
    calls: dict, rounds: int, seconds: float = 1e9, middle: Callable = statistics.median, twice: bool = False
) -> dict:
    """The median seconds of each call (or what `middle` makes of all its times), all called in turn, `rounds` times or until
    `seconds` are over (twice at least). If `twice`, each is made once more before it is timed: a text is written step after
    step, so that a step finds of its weights what the caches could keep of them, not what another call has left there."""
    times: dict = {name: [] for name in calls}
    for call in calls.values():  # warms up, and compiles
        call()
    end = time.perf_counter() + seconds
    for i in range(rounds):
        for name, call in calls.items():
            if twice:
                call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        if i > 0 and time.perf_counter() > end:
            break
    return {name: middle(values) for name, values in times.items()}
