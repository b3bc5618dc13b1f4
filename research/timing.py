"""Timing calls: medians, means, and several candidates in turn."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from common.files import read_json, written_whole
from config import Config
from data.order import Windows
from data.prepare import Corpus
from layers.features import fill_features
from training.optimizers import make_optimizers, step_at_rate

TURNS = 5  # times that the speed of each variant is measured


def median_ms(call: Callable[[], object], n: int = 10, warm_up: int = 3) -> tuple[float, float]:
    """Median milliseconds of a call on a GPU, by events, and of the host until its last launch, the
    GPU idle before each."""
    for _ in range(warm_up):
        call()
    device = []
    host = []
    for _ in range(n):
        torch.cuda.synchronize()
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        began = time.perf_counter()
        before.record()
        call()
        after.record()
        host.append(1e3 * (time.perf_counter() - began))
        torch.cuda.synchronize()
        device.append(before.elapsed_time(after))
    return statistics.median(device), statistics.median(host)


def mean_ms(call: Callable[[], object], n: int = 10, warm_up: int = 3) -> float:
    """Milliseconds of a call in a row of n on a GPU, the way a run makes them: the host may be
    ahead of the device."""
    for _ in range(warm_up):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(n):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / n


def interleaved(
    calls: dict,
    rounds: int,
    seconds: float = 1e9,
    middle: Callable = statistics.median,
    twice: bool = False,
) -> dict:
    """The median seconds of each call (or what `middle` makes of all its times), all called in
    turn, `rounds` times or until `seconds` are over (twice at least).

    twice: each call is made once more before it is timed. A text is written step after step, so a
    step finds in the caches what they keep of its own weights, not what another call left there.
    """
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


# ===== How many steps a variant gets


def take_step(
    model: nn.Module, optimizers: list, batch: tuple, rate: float, clip: float, bf16: bool
) -> None:
    """A training step on a CPU, in fp32 or with bf16 in the autocast that train.py takes where a
    CPU has instructions for it. batch: ids and targets; rate: as in `step_at_rate`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = model.loss(*batch)
    loss.backward()
    step_at_rate(model, optimizers, rate, clip)


def step_timer(
    build: Callable[[Config, int], nn.Module],
    config: Config,
    corpus: Corpus,
    batch: int,
    bf16: bool = False,
) -> Callable[[], float]:
    """A function that measures the CPU seconds of a training step: the least of a few, in fp32 or
    autocast to bf16, on this thread."""

    def seconds(rounds: int = 3) -> float:
        torch.manual_seed(0)
        model = build(config, corpus.vocab_size)
        fill_features(model, corpus.tokenizer)
        optimizers = make_optimizers(model, config)
        windows = Windows(corpus.train, config.block_size, batch, 0)
        times = []
        for step in range(rounds + 1):  # the first warms up
            began = time.process_time()
            batch_of_step = windows.batch(step)
            take_step(model, optimizers, batch_of_step, config.lr, config.grad_clip, bf16)
            times.append(time.process_time() - began)
        return min(times[1:])

    return seconds


def seconds_of_each(measure: dict[str, Callable[[], float]], path: Path) -> dict[str, float]:
    """Seconds per step, measured in turn, so that a machine whose speed changes is fair to all, and
    kept in the file `path`: a later command must not give other steps."""
    known = read_json(path) if path.exists() else {}
    missing = {key: seconds for key, seconds in measure.items() if key not in known}
    if missing:
        torch.set_num_threads(1)
        turns = [{key: seconds() for key, seconds in missing.items()} for _ in range(TURNS)]
        known |= {key: statistics.median(turn[key] for turn in turns) for key in missing}
        with written_whole(path) as beside:
            beside.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return {key: known[key] for key in measure}


def steps_in(minutes: float, seconds: float) -> int:
    """How many steps of so many seconds go into these minutes, at least one."""
    return max(1, round(60 * minutes / seconds))
