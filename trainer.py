"""What a training step changes, how it changes it, and how it is saved and restored.

A step depends on the seed, its number, the weights and what the optimizers keep alone: a `Trainer` that was restored takes the
very steps that the one that was saved would have taken.
"""

import contextlib
import math
import time
from collections.abc import Callable
from pickle import UnpicklingError

import torch
from torch import Tensor
from torch.profiler import record_function

from checkpoint import own_tensors, save_plain
from config import Config, InputError
from data import Corpus, training_order
from distributed import World, load_shards, remove_other_shards, save_shards, saved_shapes
from errors import check_regular
from features import fill_features
from model import build_model
from optimizers import (
    WeightAverage,
    learning_rate,
    load_state_tensors,
    local,
    make_optimizers,
    room_for_state,
    set_rate,
    state_tensors,
    step_if,
)
from packed import cpu_multiplies_bf16
from record import Record
from state import State

LATEST = "latest.pt"  # everything a run needs to go on; our own tensors and numbers, read with weights_only
PATIENCE = 10  # steps in a row without a finite gradient before a run gives up


class Trainer:
    """Everything that a step changes: weights, optimizers, scaler, carried state, best value; and how to save it."""

    def __init__(self, config: Config, record: Record, corpus: Corpus, world: World):
        self.config, self.record, self.corpus, self.world = config, record, corpus, world
        self.device = world.device
        torch.manual_seed(config.seed)
        model = build_model(config, corpus.vocab_size)
        fill_features(model, corpus.tokenizer)
        self.model = world.place(model)
        self.optimizers = make_optimizers(self.model, config)
        self.average = WeightAverage(self.model, config.ema_decay) if config.ema_decay else None
        batch = config.micro_batch_size * config.grad_accum
        self.batches = training_order(corpus, config, batch)
        self.total_steps = math.ceil(config.epochs * self.batches.steps_per_epoch)
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.tokens_per_step = batch * config.block_size
        self.cast = autocast_type(config, self.device)
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.cast is torch.float16)
        self.carried: list[State | None] = [None] * config.grad_accum  # one lane of texts for each micro batch
        self.unchecked: list[tuple] = []  # (step, names, norms, event) of steps whose gradients nobody has looked at yet
        self.step, self.best, self.seconds, self.skipped, self.bad_in_a_row = 0, math.inf, 0.0, 0, 0
        self.best_average, self.evaluation_seconds, self.saved_step = math.inf, 0.0, -1
        self.loss = world.parallel_loss(self.model, compiled_loss(self) if config.compile else self.model.loss)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, self.cast) if self.cast else contextlib.nullcontext()

    def micro_batch(self, i: int) -> tuple[Tensor, Tensor, State | None]:
        """This process's rows of part i of this step's batch on the device, and the state its texts begin with."""
        ids, targets, *fresh = self.batches.batch(self.step, rows=self.world.rows(self.config.micro_batch_size, i))
        state = None
        if fresh:  # carried state: streams, since a mean without bound is one no other window has seen
            before = self.carried[i]
            state = self.model.start(len(ids), stream=True) if before is None else before.reset(fresh[0])
        return ids.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True), state

    def take_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns the mean loss in nats of this process's rows and the gradient norm, on the device; a
        step whose gradient is not finite is left out."""
        self.model.train()
        # Dropout is a function of (seed, step), another one in each process.
        torch.manual_seed(self.config.seed * 1_000_003 + self.step + (self.world.rank << 40))
        set_rate(self.optimizers, learning_rate(self.step, self.total_steps, self.config))
        total = torch.zeros((), device=self.device)
        for i in range(self.config.grad_accum):
            with record_function("data"):
                ids, targets, state = self.micro_batch(i)
            with self.world.accumulating(self.loss, last=i == self.config.grad_accum - 1):
                with record_function("forward"), self.autocast():
                    loss, state = self.loss(ids, targets, state)
                with record_function("backward"):
                    self.scaler.scale(loss * (self.model.loss_weight / self.config.grad_accum)).backward()
            total += loss.detach() / self.config.grad_accum
            if self.config.decompose_bypass_cross_window:
                self.carried[i] = state.detach()
        with record_function("clipping"):
            norm = self.clip()
        with record_function("optimizer"):
            self.apply(norm.isfinite())
        self.step += 1
        self.check_steps(late=1 if self.device == "cuda" else 0)
        return total, norm

    def clip(self) -> Tensor:
        """Scales the gradients down to the norm `grad_clip`, and returns the norm that they had."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        named = [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]
        norms = self.world.gradient_norms([p for _, p in named])
        norm = torch.linalg.vector_norm(norms)
        if self.config.grad_clip:
            factor = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local(p.grad) for _, p in named], factor)
        event = torch.cuda.Event() if self.device == "cuda" else None
        self.unchecked.append((self.step, [name for name, _ in named], norms.to("cpu", non_blocking=True), event))
        if event:
            event.record()
        return norm

    def apply(self, good: Tensor) -> None:
        """The optimizers' step where `good`; else weights and optimizers stay, and carried texts start anew."""
        for optimizer in self.optimizers:
            step_if(good, optimizer)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.step)
        self.carried = [state and state.reset((~good).expand(state.rows)) for state in self.carried]

    def check_steps(self, late: int) -> None:
        """Looks at the gradients of past steps but the last `late` ones, and counts those that were left out. On a GPU it
        is one step late, so that the host prepares a step while the device computes the one before."""
        while len(self.unchecked) > late:
            step, names, norms, event = self.unchecked.pop(0)
            if event:
                event.synchronize()
            if torch.linalg.vector_norm(norms).isfinite():
                self.bad_in_a_row = 0
            elif self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
                self.record.say(f"step {step} skipped: fp16 overflow, loss scale lowered to {self.scaler.get_scale():g}")
            else:
                self.count_bad(
                    step, next((n for n, x in zip(names, norms.tolist(), strict=True) if not math.isfinite(x)), "all")
                )

    def count_bad(self, step: int, first: str) -> None:
        self.skipped += 1
        self.bad_in_a_row += 1
        self.record.say(f"step {step} skipped: gradient of {first} is not finite")
        if self.bad_in_a_row >= PATIENCE:
            latest = self.record.folder / LATEST
            state = f"; the last good state is {latest}" if latest.exists() else ""
            raise InputError(
                f"{self.bad_in_a_row} steps in a row without a finite gradient, first of {first}{state}. "
                "Lower lr, or set use_amp to false"
            )

    @torch.inference_mode()
    def validation_nats(self, tokens: Tensor) -> float:
        """Mean nats per token of a fixed stretch, in whole windows, the way training sees text."""
        self.model.eval()
        block, batch = self.config.block_size, self.config.micro_batch_size
        windows = max(1, (len(tokens) - 1) // block)
        length = min(block, len(tokens) - 1)
        ids = tokens[: windows * length].view(windows, length)
        targets = tokens[1 : windows * length + 1].view(windows, length)
        parts, (rank, size) = torch.arange(windows).split(batch), (self.world.rank, self.world.size)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(rank, math.ceil(len(parts) / size) * size, size):  # as many passes in each process
            rows = parts[min(i, len(parts) - 1)]
            with self.autocast():
                loss, _ = self.model.loss(ids[rows].to(self.device), targets[rows].to(self.device))
            total += loss.double() * len(rows) * (i < len(parts))
        self.world.forget_gathered(self.model)
        return self.world.sum(total).item() / windows

    COUNTERS = ("step", "best", "best_average", "seconds", "evaluation_seconds", "skipped", "bad_in_a_row")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The model's, the optimizers' and the average's tensors, whole or sharded, by group and name."""
        return {
            "model": {name: tensor.detach() for name, tensor in own_tensors(self.model).items()},
            "optimizer": state_tensors(self.model, self.optimizers),
            "average": dict(self.average.average) if self.average else {},
        }

    def save(self) -> None:
        """Writes the whole state; a kill at any moment leaves the last whole one."""
        self.check_steps(late=0)
        if self.saved_step == self.step:
            return
        path, world = self.record.folder / LATEST, self.world
        carried = [state and [{k: world.rows_of_all(t) for k, t in b.items()} for b in state.blocks] for state in self.carried]
        values = {name: getattr(self, name) for name in self.COUNTERS}
        values |= {"scaler": self.scaler.state_dict(), "carried": carried, "lengths": self.record.lengths()}
        if self.config.parallel == "fsdp":
            values["shards"] = f"shards-{self.step}"  # read only when latest.pt names it, and it does when it is whole
            save_shards(self.tensors(), path.with_name(values["shards"]), world)
        else:
            values |= self.tensors()
        if world.rank == 0:
            save_plain(values, path)
            remove_other_shards(path.with_name(values.get("shards", "none")))
        self.saved_step = self.step

    def restore(self) -> None:
        """Goes back to the state last saved, and cuts the logs back to it. Without one the run starts from the beginning."""
        path = self.record.folder / LATEST
        check_regular(path)  # a FIFO would be waited for
        if not path.exists():
            self.record.cut_back({})
            return
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(f"{path}: cannot be read ({reason})") from None
        own = self.tensors()
        if "shards" in values:
            folder = path.with_name(values["shards"])
            own["optimizer"] = room_for_state(self.model, saved_shapes(folder))
            load_shards(own, folder, self.world)
        else:
            for group in ("model", "average"):
                for name, tensor in own[group].items():
                    tensor.copy_(values[group][name])
            own["optimizer"] = values["optimizer"]
        load_state_tensors(self.model, self.optimizers, own["optimizer"])
        self.scaler.load_state_dict(values["scaler"])
        self.carried = [
            State([{k: self.world.own_rows(t) for k, t in b.items()} for b in blocks]).to(self.device) if blocks else None
            for blocks in values["carried"]
        ]
        for name in self.COUNTERS:
            setattr(self, name, values[name])
        self.saved_step = self.step
        self.record.cut_back(values["lengths"])


def autocast_type(config: Config, device: str) -> torch.dtype | None:
    """The type of autocast: on a CPU bf16 where it has instructions for it (elsewhere it would only be slow)."""
    if not config.use_amp:
        return None
    if device == "cuda":
        return torch.float16 if config.amp_dtype == "fp16" else torch.bfloat16
    return torch.bfloat16 if cpu_multiplies_bf16() else None


def compiled_loss(trainer: Trainer) -> Callable:
    """The compiled loss of the trainer's model, tried on one batch; where that fails it says so and returns the plain one."""
    if trainer.world.kind == "fsdp":
        trainer.record.say("not compiled: parallel fsdp gathers its weights block by block")
        return trainer.model.loss
    started = time.perf_counter()
    compiled = torch.compile(trainer.model.loss, mode=trainer.config.compile_mode)
    try:
        trainer.model.train()
        ids, targets, state = trainer.micro_batch(0)
        with trainer.autocast():
            compiled(ids, targets, state)[0].backward()
        trainer.record.say(f"compiled in {time.perf_counter() - started:.0f} s")
    except (RuntimeError, OSError, ImportError) as error:  # no compiler, no Triton, an unsupported operation
        trainer.record.say(f"not compiled, training goes on without: {str(error).strip().splitlines()[0]}")
        compiled = trainer.model.loss
    trainer.model.zero_grad(set_to_none=True)
    return compiled
