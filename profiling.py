"""Where a training step spends its time: a table by part and by operation, and a trace for chrome://tracing or Perfetto."""

import torch
from torch.profiler import ProfilerActivity, profile

from checkpoint import written_whole
from trainer import Trainer

WARM_UP, STEPS = 2, 4
PARTS = ("data", "forward", "backward", "clipping", "optimizer")  # the names that `Trainer.take_step` gives its parts


def profile_steps(trainer: Trainer) -> None:
    """Takes a few steps under the profiler and writes profile.txt and trace.json into the run's folder."""
    on_gpu = trainer.device == "cuda"
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
