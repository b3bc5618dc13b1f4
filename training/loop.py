"""The loop of a run: steps until its end or a request to stop, with log lines, evaluations, samples
and saves at their intervals."""

import math
import signal
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import MODEL_FILE, save_model
from common.tensors import own_tensors
from data.order import evaluation_slice
from data.tokenizer import text_bytes
from training.optimizers import learning_rate, warmup_steps
from training.profiling import matmul_rate, peak_memory, work_per_token
from training.trainer import Trainer

# the best average of the weights, where ema_decay asks for one
AVERAGE_FILE = "average_model.safetensors"


class StopRequest:
    """Within it, Ctrl-C and SIGTERM only set `signal`, so that a run stops between two steps,
    saved. A second Ctrl-C is not caught."""

    def __enter__(self) -> "StopRequest":
        self.signal: int | None = None
        self.handlers = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _note(self, number: int, frame) -> None:
        self.signal = number
        # Who presses Ctrl-C again does not want to wait for the step and the save.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Loop:
    """Takes the steps of a trainer. `sample` makes the text that is written at each evaluation;
    None for no samples."""

    def __init__(self, trainer: Trainer, stop: StopRequest, sample: Callable[[], str] | None):
        self.trainer = trainer
        self.stop = stop
        self.sample = sample
        config = trainer.config
        corpus = trainer.corpus
        # Losses are nats per token; bits per byte compare across tokenizers.
        self.bits = corpus.train.n_tokens / corpus.train.n_bytes / math.log(2)
        # The same tokens at every evaluation, so that two losses differ by the weights alone. One
        # more than are predicted: the first is only read.
        self.held_out = whole_windows(
            evaluation_slice(corpus.validation, config.eval_tokens + 1), config.block_size
        )
        held_out_bytes = text_bytes(corpus.tokenizer, self.held_out[1:].tolist())
        self.held_out_bits = (len(self.held_out) - 1) / held_out_bytes / math.log(2)
        self.work = None  # of a token, as a share of what the GPU multiplies in a second
        if trainer.device == "cuda":
            rate = matmul_rate("cuda", trainer.cast or torch.float32)
            self.work = work_per_token(trainer) / rate
        self.losses: list[Tensor] = []  # of the steps since the last log line, on the device
        self._start_clocks()

    def _start_clocks(self) -> None:
        now = time.perf_counter()
        self.began = now
        self.seconds_before = self.trainer.seconds  # of the run, in earlier processes
        self.saved_at = now
        # Speed is measured from one log line to the next.
        self.logged_at = now
        self.logged_step = self.trainer.step

    def seconds(self) -> float:
        """Seconds that the run has taken so far, evaluations and earlier processes included."""
        return self.seconds_before + time.perf_counter() - self.began

    def run(self) -> None:
        """Steps until the end. A run that was asked to stop is saved, and ends this process with
        the exit code of the signal."""
        trainer = self.trainer
        config = trainer.config
        # For a person who waits; the log lines are printed above it.
        progress = tqdm(
            total=trainer.total_steps,
            initial=trainer.step,
            unit="step",
            disable=not sys.stderr.isatty(),  # a file of output is not to be filled with bars
            leave=False,
        )
        stopping = 0
        while trainer.step < trainer.total_steps and not stopping:
            loss, norm = trainer.take_step()
            self.losses.append(loss)
            progress.update()
            ended = trainer.step == trainer.total_steps
            if trainer.step % config.log_interval == 0 or ended:
                self.log(norm)
            if trainer.step % config.eval_interval == 0 or ended:
                self.evaluate()
            trainer.seconds = self.seconds()
            stopping = self.save_where_due(ended)
        progress.close()
        if stopping:
            trainer.save()
        # What goes wrong in a write behind is raised here, and not lost with the process.
        trainer.writer.finish()
        if stopping:
            trainer.record.say(
                f"stopped after step {trainer.step}; go on with: python train.py --resume"
                f" {trainer.record.folder}"
            )
            sys.exit(128 + stopping)  # as a shell says that a signal ended a process

    def log(self, norm: Tensor) -> None:
        """A line of the log and of the metrics, of the steps since the last one. norm: of the last
        step's gradient."""
        trainer = self.trainer
        step = trainer.step
        # Reading the loss waits for the device, so the clock is read after it.
        nats = trainer.world.mean(torch.stack(self.losses).mean()).item()
        now = time.perf_counter()
        speed = (step - self.logged_step) * trainer.tokens_per_step / (now - self.logged_at)
        # At the present speed, without the evaluations that are still to come.
        left = (trainer.total_steps - step) * trainer.tokens_per_step / speed
        rate = learning_rate(step - 1, trainer.total_steps, trainer.config)
        measured, words = self.measured(speed)
        trainer.record.say(
            f"step {step}/{trainer.total_steps}  loss {nats:.4f}  bits/byte {nats * self.bits:.4f} "
            f" lr {rate:.2e}  norm {norm.item():.2f}  {speed:,.0f} tokens/s "
            f" {words}{hours(left)} left"
        )
        trainer.record.metric(
            kind="train",
            step=step,
            loss=nats,
            bits_per_byte=nats * self.bits,
            lr=rate,
            gradient_norm=norm.item(),
            skipped=trainer.skipped,
            tokens=step * trainer.tokens_per_step,
            tokens_per_second=speed,
            seconds=self.seconds(),
            **measured,
        )
        self.logged_at = now
        self.logged_step = step
        self.losses = []

    def measured(self, speed: float) -> tuple[dict[str, float], str]:
        """What is known of the machine at `speed` tokens a second: for the metrics, and on a GPU in
        words for the log line."""
        trainer = self.trainer
        values = {}
        peak = peak_memory(trainer.device)
        if peak is not None:
            values["memory_gib"] = peak / 2**30
        if self.work is None:
            return values, ""
        values["milliseconds"] = 1e3 * trainer.tokens_per_step / speed
        # `speed` is of all processes together, a share of one GPU's multiplications is wanted.
        values["mfu"] = speed * self.work / trainer.world.size
        words = (
            f"{values['milliseconds']:.1f} ms  MFU {values['mfu']:.0%}"
            f"  {values['memory_gib']:.1f} GiB  "
        )
        return values, words

    def save_where_due(self, ended: bool) -> int:
        """Saves the state where its interval, the run's end or the first weights ask for it.
        Returns the signal by which the run is to stop, or 0."""
        trainer = self.trainer
        config = trainer.config
        stopping = 0
        by_steps = config.save_interval is not None
        due = ended or (by_steps and trainer.step % config.save_interval == 0)
        # The first weights are never without a save, so that one who finds them without knows that
        # it is lost.
        has_weights = math.isfinite(min(trainer.best, trainer.best_average))
        due = due or (trainer.saved_step < 0 and has_weights)
        # Several processes must agree, and asking them takes time: they do at log lines only.
        if trainer.world.size == 1 or trainer.step % config.log_interval == 0:
            stopping = trainer.world.highest(self.stop.signal or 0)
            late = not by_steps and time.perf_counter() - self.saved_at > 60 * config.save_minutes
            due = due or bool(trainer.world.highest(int(late)))
        if due:
            trainer.save()
            self.saved_at = time.perf_counter()
        return stopping

    # ===== Validation

    def evaluate(self) -> None:
        """Validation on the fixed tokens, of the weights and of their average, the best
        checkpoints, a sample, and the curves."""
        started = time.perf_counter()
        trainer = self.trainer
        record = trainer.record
        trainer.best = self.validate("validation", MODEL_FILE, trainer.best)
        if trainer.average:
            with trainer.average.in_place():
                trainer.best_average = self.validate("average", AVERAGE_FILE, trainer.best_average)
        # A sharded network is in no process whole, and process 0 alone writes.
        if self.sample and trainer.world.kind != "fsdp" and trainer.world.rank == 0:
            record.sample(trainer.step, self.sample())
        record.draw_curves()
        paused = time.perf_counter() - started
        trainer.evaluation_seconds += paused
        self.logged_at += paused  # the speed is that of training alone

    def validate(self, kind: str, file: str, best: float) -> float:
        """Logs the loss of the model's present weights as `kind`, keeps them in `file` where it is
        the lowest, and returns that."""
        trainer = self.trainer
        step = trainer.step
        nats = trainer.validation_nats(self.held_out)
        bits = nats * self.held_out_bits
        trainer.record.say(
            f"step {step}/{trainer.total_steps}  {kind} loss {nats:.4f}  bits/byte {bits:.4f}"
        )
        trainer.record.metric(
            kind=kind, step=step, loss=nats, bits_per_byte=bits, seconds=self.seconds()
        )
        warm_up_over = step >= warmup_steps(trainer.total_steps, trainer.config)
        wanted = warm_up_over or not trainer.config.skip_warmup_saves
        # A run whose every loss was infinite, or whose warm-up is all of it, has weights too.
        last_chance = step == trainer.total_steps and math.isinf(best)
        if not ((nats < best and wanted) or last_chance):
            return best
        # All processes take part in gathering shards, one of them writes.
        tensors = trainer.world.whole(own_tensors(trainer.model))
        if trainer.world.rank == 0:
            trainer.writer.write(
                lambda ready: save_model(trainer.model, trainer.record.folder / file, ready),
                tensors,
            )
        return nats


def whole_windows(tokens: Tensor, block_size: int) -> Tensor:
    """The tokens (n,) that a validation in windows of `block_size` predicts, and the one before
    them."""
    length = min(block_size, len(tokens) - 1)
    return tokens[: (len(tokens) - 1) // length * length + 1]


def hours(seconds: float) -> str:
    """A time as h:mm:ss, of more than a day too."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
