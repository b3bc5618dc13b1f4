"""What a training step changes, how it changes it, and how it is saved and restored.

A step depends on the seed, its number, the weights and what the optimizers keep alone: a `Trainer`
that was restored takes the very steps that the one that was saved would have taken."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from common.command import InputError, first_line, shown
from common.device import cpu_multiplies_bf16
from common.tensors import check_tensor, check_tensors, load_plain, own_tensors, save_plain
from config import Config
from data.order import total_steps, training_order
from data.prepare import Corpus
from layers.features import fill_features
from layers.state import State
from model import build_model
from training.distributed import Shards, World, remove_other_shards, save_shards
from training.optimizers import (
    LossScale,
    WeightAverage,
    clipped_step,
    learning_rate,
    load_state_tensors,
    make_optimizers,
    put_rates_on,
    room_for_state,
    set_rate,
    state_tensors,
)
from training.origin import Origin, begin_with
from training.record import Record
from training.writer import Writer

# everything a run needs to go on; our own tensors and numbers, read with weights_only
LATEST = "latest.pt"
# before a step becomes a CUDA graph: optimizers have made their states by then, kernels have been
# chosen
EAGER_STEPS = 3
# Keys that say how far a run goes and at which rate. They may change when it goes on: the data, the
# dropout and the state of the optimizers are the same whatever they say.
SCHEDULE_KEYS = (
    "max_steps",
    "epochs",
    "lr",
    "min_lr",
    "muon_lr",
    "warmup_fraction",
    "cooldown_fraction",
)
PATIENCE = 10  # steps in a row without a finite gradient before a run gives up


# ===== A step, and all that it changes


class Trainer:
    """Everything that a step changes: weights, optimizers, scaler, carried state, best value; and
    how to save it. The weights begin with those of `origin`, else at random."""

    def __init__(
        self,
        config: Config,
        record: Record,
        corpus: Corpus,
        world: World,
        origin: Origin | None = None,
    ):
        self.config = config
        self.record = record
        self.corpus = corpus
        self.world = world
        self.device = world.device
        # Every process begins with the same weights: under DDP none are sent at the start.
        torch.manual_seed(config.seed)
        model = build_model(config, corpus.vocab_size)
        fill_features(model, corpus.tokenizer)
        # Before it is placed in shards, and before a moving average begins with its weights.
        if origin is not None:
            begin_with(model, origin)
        self.model = world.place(model)
        # Before the optimizers, which take the parameters: it exchanges the modules that have them.
        if config.amp_dtype == "fp8":
            multiply_in_fp8(
                self.model, self.device, config.micro_batch_size // world.size * config.block_size
            )
        self.optimizers = make_optimizers(self.model, config)
        self.average = WeightAverage(self.model, config.ema_decay) if config.ema_decay else None
        batch = config.micro_batch_size * config.grad_accum
        self.batches = training_order(corpus, config, batch)
        self.total_steps = total_steps(self.batches, config)
        self.tokens_per_step = batch * config.block_size
        self.cast = training_type(config, self.device)
        self.scaler = LossScale(self.device, enabled=self.cast is torch.float16)
        # one lane of texts for each micro batch
        self.carried: list[State | None] = [None] * config.grad_accum
        # (step, names, norms, event) of steps whose gradients nobody has looked at yet
        self.unchecked: list[tuple] = []
        self.step = 0  # optimizer steps taken
        self.best = math.inf  # lowest validation loss, in nats per token
        self.best_average = math.inf  # of the average of the weights
        self.seconds = 0.0  # that the run has taken, evaluations and earlier processes included
        self.evaluation_seconds = 0.0
        self.skipped = 0  # steps left out because a gradient was not finite
        self.bad_in_a_row = 0
        self.saved_step = -1  # the step of the last save; -1: none yet
        self.schedule = schedule_of(config)  # that of the steps taken so far
        self.writer = Writer(self.device)
        self.loss = world.parallel_loss(
            self.model, compiled_loss(self) if config.compile else self.model.loss
        )
        self.graph: StepGraph | None = None
        self.eager_steps = math.inf  # left before the step becomes a CUDA graph
        if self.may_be_a_graph():
            self.eager_steps = EAGER_STEPS
            put_rates_on(next(self.model.parameters()).device, self.optimizers)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, self.cast) if self.cast else contextlib.nullcontext()

    def micro_batch(self, i: int) -> tuple[Tensor, Tensor, State | None]:
        """This process's rows of part i of this step's batch on the device, and the state its texts
        begin with."""
        ids, targets, *fresh = self.batches.batch(
            self.step, rows=self.world.rows(self.config.micro_batch_size, i)
        )
        state = None
        # carried state: streams, since a mean without bound is one no other window has seen
        if fresh:
            before = self.carried[i]
            state = (
                self.model.start(len(ids), stream=True)
                if before is None
                else before.reset(fresh[0])
            )
        return (
            ids.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
            state,
        )

    def take_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns the mean loss in nats of this process's rows and the gradient
        norm, on the device; a step whose gradient is not finite is left out."""
        self.model.train()
        # Dropout is a function of (seed, step), another one in each process. 1,000,003 is a prime
        # above a million, so that the steps of one seed are not those of the next.
        torch.manual_seed(self.config.seed * 1_000_003 + self.step + (self.world.rank << 40))
        set_rate(self.optimizers, learning_rate(self.step, self.total_steps, self.config))
        parts = []
        for i in range(self.config.grad_accum):
            with record_function("data"):
                parts.append(self.micro_batch(i))
        # The step that becomes a graph is captured first and then replayed: it is taken once.
        if self.eager_steps == 0:
            self.make_graph(parts)
        self.eager_steps -= 1
        total, norms, norm = self.compute(parts) if self.graph is None else self.graph(parts)
        if self.average:
            self.average.update(self.step)
        self.note_gradients(norms)
        self.step += 1
        # A GPU's step has only been launched: to look at its gradients now would wait for it.
        self.check_steps(late=1 if self.device == "cuda" else 0)
        return total, norm

    def compute(
        self, parts: list[tuple[Tensor, Tensor, State | None]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All that a step does on the device with its parts, from `micro_batch`: the passes forward
        and backward, and the optimizers' step. Returns the loss, each parameter's gradient norm
        (n,) and the whole gradient's. The host waits for nothing in it, and nothing depends on what
        it finds."""
        total = torch.zeros((), device=self.device)
        # Compiled to CUDA graphs, it writes where the last step did: gradients live from part to
        # part of a step, not longer.
        torch.compiler.cudagraph_mark_step_begin()
        for i, (ids, targets, state) in enumerate(parts):
            with self.world.accumulating(self.loss, last=i == self.config.grad_accum - 1):
                with record_function("forward"), self.autocast():
                    loss, state = self.loss(ids, targets, state)
                # Gradients add up over the parts, so each has its share of the mean.
                share = self.model.loss_weight / self.config.grad_accum
                with record_function("backward"):
                    (self.scaler.scale * (loss * share)).backward()
            total += loss.detach() / self.config.grad_accum
            if self.config.decompose_bypass_cross_window:
                # a CUDA graph's output lives until the next step alone
                self.carried[i] = state.detach().clone()
        with record_function("clipping"):
            with_gradients = {
                name: p for name, p in self.model.named_parameters() if p.grad is not None
            }
            self.named_gradients = list(with_gradients)
            # Of the true gradients: the loss scale is divided out of the norms, which are few, and
            # out of the gradients by the optimizers' own pass.
            norms = self.world.gradient_norms(list(with_gradients.values())) / self.scaler.scale
            norm = torch.linalg.vector_norm(norms)
        with record_function("optimizer"):
            self.apply(norm)
        return total, norms, norm

    def may_be_a_graph(self) -> bool:
        """Whether a step is the same work on the device each time, by one process: then it may
        become one CUDA graph."""
        config = self.config
        # other states; saved random states
        changing = config.decompose_bypass_cross_window or config.gradient_checkpointing
        # torch.compile makes graphs of its own then
        nested = config.compile and config.compile_mode != "default"
        return (
            self.device == "cuda"
            and config.cuda_graph
            and self.world.kind == "none"
            and not (changing or nested)
        )

    def make_graph(self, parts: list[tuple[Tensor, Tensor, State | None]]) -> None:
        """Makes a CUDA graph of the step; where that fails, says so, and steps go on as before."""
        self.writer.finish()  # no other thread may use the GPU during a capture
        stream = torch.cuda.current_stream()
        try:
            self.graph = StepGraph(self, parts)
        except RuntimeError as error:
            # a capture that cannot end leaves its own as the current one
            torch.cuda.set_stream(stream)
            self.record.say(f"no CUDA graph, training goes on without: {first_line(error)}")
            # What was captured so far has left gradients that no step has computed.
            self.model.zero_grad(set_to_none=True)

    def note_gradients(self, norms: Tensor) -> None:
        """Keeps the step's gradient norms, by which one that was left out is explained, on their
        way to the host."""
        event = torch.cuda.Event() if self.device == "cuda" else None
        self.unchecked.append(
            (self.step, self.named_gradients, norms.to("cpu", non_blocking=True), event)
        )
        if event:
            event.record()

    def apply(self, norm: Tensor) -> None:
        """The optimizers' step, with gradients of this `norm` clipped to grad_clip. Where it is not
        finite weights and optimizers stay, and carried texts start anew."""
        good = clipped_step(
            self.model, self.optimizers, norm, self.config.grad_clip, self.scaler.scale
        )
        # After the step, whose gradients are divided by the scale that they were made with.
        self.scaler.update(good)
        self.carried = [state and state.reset((~good).expand(state.rows)) for state in self.carried]

    def check_steps(self, late: int) -> None:
        """Looks at the gradients of past steps but the last `late` ones, and counts those that were
        left out. On a GPU it is one step late, so that the host prepares a step while the device
        computes the one before."""
        while len(self.unchecked) > late:
            # The oldest first, so that steps are counted and told in their order.
            step, names, norms, event = self.unchecked.pop(0)
            if event:
                event.synchronize()
            if torch.linalg.vector_norm(norms).isfinite():
                self.bad_in_a_row = 0
            # Overflows are how fp16 finds its scale; below 1 it is no matter of the scale any more.
            elif self.scaler.enabled and self.scaler.scale >= 1:
                self.record.say(
                    f"step {step} skipped: fp16 overflow, loss scale lowered to"
                    f" {self.scaler.scale.item():g}"
                )
            else:
                bad = (
                    name
                    for name, norm in zip(names, norms.tolist(), strict=True)
                    if not math.isfinite(norm)
                )
                # "all": each norm is finite, and the square of one is beyond all numbers
                self.count_bad(step, next(bad, "all"))

    def count_bad(self, step: int, first: str) -> None:
        self.skipped += 1
        self.bad_in_a_row += 1
        self.record.say(f"step {step} skipped: gradient of {first} is not finite")
        if self.bad_in_a_row >= PATIENCE:
            latest = self.record.folder / LATEST
            state = f"; the last good state is {latest}" if latest.exists() else ""
            raise InputError(
                f"{self.bad_in_a_row} steps in a row without a finite gradient, first of"
                f" {first}{state}. Lower lr, or set use_amp to false"
            )

    @torch.inference_mode()
    def validation_nats(self, tokens: Tensor) -> float:
        """Mean nats per token of a fixed stretch, in whole windows, the way training sees text."""
        self.model.eval()
        block = self.config.block_size
        windows = max(1, (len(tokens) - 1) // block)
        length = min(block, len(tokens) - 1)  # a text shorter than a window is one window
        ids = tokens[: windows * length].view(windows, length)
        targets = tokens[1 : windows * length + 1].view(windows, length)
        parts = torch.arange(windows).split(self.config.micro_batch_size)
        rank = self.world.rank
        size = self.world.size
        # float64: a sum of thousands of losses would lose digits that a best checkpoint turns on
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        # As many passes in each process, since FSDP's gather their weights together: what is beyond
        # the last part is the last part again, and not counted.
        for i in range(rank, math.ceil(len(parts) / size) * size, size):
            rows = parts[min(i, len(parts) - 1)]
            with self.autocast():
                loss, _ = self.model.loss(ids[rows].to(self.device), targets[rows].to(self.device))
            total += loss.double() * len(rows) * (i < len(parts))
        self.world.forget_gathered(self.model)
        return self.world.sum(total).item() / windows

    # ===== Saving and restoring

    # numbers of the run that a save holds beside its tensors, by their names here
    COUNTERS = (
        "step",
        "best",
        "best_average",
        "seconds",
        "evaluation_seconds",
        "skipped",
        "bad_in_a_row",
    )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The model's, the optimizers' and the average's tensors, whole or sharded, by group and
        name."""
        return {
            "model": {name: tensor.detach() for name, tensor in own_tensors(self.model).items()},
            "optimizer": state_tensors(self.model, self.optimizers),
            "average": dict(self.average.average) if self.average else {},
        }

    def save(self, again: bool = False) -> None:
        """Writes the whole state; a kill at any moment leaves the last whole one. A step that is
        saved already is saved `again` only where that is asked for."""
        self.check_steps(late=0)
        if self.saved_step == self.step and not again:
            return
        path = self.record.folder / LATEST
        world = self.world
        # of all processes together, so that another number of them can go on
        carried = [
            state and [{k: world.rows_of_all(t) for k, t in b.items()} for b in state.saved()]
            for state in self.carried
        ]
        values = {name: getattr(self, name) for name in self.COUNTERS}
        values |= {
            "scaler": self.scaler.state_dict(),
            "carried": carried,
            "schedule": self.schedule,
            # Lines that are appended after this save are cut off when the run goes on from it.
            "lengths": self.record.lengths(),
        }
        shards = path.with_name(f"shards-{self.step}")
        if self.config.parallel == "fsdp":
            # the folder is read only when latest.pt is whole and of its step
            values["shards"] = world.size
            save_shards(self.tensors(), shards, world)
        else:
            values |= self.tensors()
        if world.rank == 0:
            self.writer.write(lambda ready: self.write_save(ready, path, shards), values)
            if self.config.parallel == "fsdp":
                # or it might take the next save's shards, which are written at once, for old ones
                self.writer.finish()
        self.saved_step = self.step

    def write_save(self, values: dict[str, Any], path: Path, shards: Path) -> None:
        save_plain(values, path)
        # Only now: until latest.pt is whole, the one before it and its shards are the save.
        if self.config.parallel == "fsdp":
            remove_other_shards(shards)

    def restore(self, before: dict[str, float | None] | None = None) -> None:
        """Goes back to the state last saved, and cuts the logs back to it, unless the run has ended
        there and they hold its result: no step is done again. Without a save a run that was stopped
        before its first one starts from the beginning; of any other it is missing, which raises
        `InputError`. before: the schedule that the run's config.json had when this process began;
        None for that of the config."""
        before = before or self.schedule
        path = self.record.folder / LATEST
        if not path.exists():
            self.check_nothing_is_lost()
            self.record.cut_back({})
            self.schedule = before
            return
        values = load_plain(path)
        # Saves of before the schedule could change have none: it is config.json's.
        if "schedule" not in values:
            values["schedule"] = before
        self.check_saved(values, path)
        own = self.tensors()
        if self.config.parallel == "fsdp":
            shards = Shards(path.with_name(f"shards-{values['step']}"), values["shards"])
            shapes = {f"optimizer.{name}": p.shape for name, p in self.model.named_parameters()}
            fitting = {
                k: s
                for k, s in shards.shapes.items()
                if s in (torch.Size([]), shapes.get(k.rpartition(":")[0]))
            }
            # what does not fit is then found to be too much
            own["optimizer"] = room_for_state(self.model, fitting)
            shards.read(own, self.world)
        else:
            for group in ("model", "average"):
                for name, tensor in own[group].items():
                    tensor.copy_(values[group][name])  # of one shape and type: it was checked
            own["optimizer"] = values["optimizer"]
        load_state_tensors(self.model, self.optimizers, own["optimizer"])
        self.scaler.load_state_dict(values["scaler"])
        self.carried = [self.own_part(parts) if parts else None for parts in values["carried"]]
        for name in self.COUNTERS:
            setattr(self, name, values[name])
        self.schedule = values["schedule"]
        self.saved_step = self.step
        if not self.record.ends_with_result(self.step):
            self.record.cut_back(values["lengths"])

    def check_nothing_is_lost(self) -> None:
        """Raises `InputError` where a run without a save had something to go on from."""
        folder = self.record.folder
        if self.record.has_lost_its_save(self.config.save_interval):
            raise InputError(
                f"resume: {folder} has results, but no {LATEST} to go on from; start a new run"
            )
        if origin := self.record.origin():
            raise InputError(
                f"resume: {folder} was stopped before it had the weights that it begins with;"
                f" start a new run with --init_from {origin}"
            )

    def own_part(self, parts: list[dict[str, Tensor]]) -> State:
        """Of a saved state of all processes' rows, this process's."""
        own = [{name: self.world.own_rows(t) for name, t in part.items()} for part in parts]
        return State.of_saved(own).to(self.device)

    def change_schedule(self) -> None:
        """Where the config has another schedule than the steps so far had: says so, and makes it
        that of the run. Killed at any moment, it leaves a run that goes on with the old schedule or
        with the new one, and that has said so."""
        new = schedule_of(self.config)
        old = self.schedule
        if new == old:
            return
        changed = [key for key in SCHEDULE_KEYS if new[key] != old[key]]
        # Now the logs, with the result of a run that had ended, are what this save counts on, and
        # whatever is appended until the next one would be cut off.
        self.save(again=True)
        if not self.record.quiet:
            self.record.write_config(self.config)
        words = ", ".join(f"{key} {shown(old[key])} -> {shown(new[key])}" for key in changed)
        self.record.say(f"schedule changed after step {self.step}: {words}")
        self.record.metric(
            kind="schedule",
            step=self.step,
            before={key: old[key] for key in changed},
            now={key: new[key] for key in changed},
        )
        self.schedule = new
        self.save(again=True)
        self.writer.finish()

    def check_saved(self, values: dict[str, Any], path: Path) -> None:
        """Raises `InputError` unless `values`, read from `path`, are what `save` writes in a run of
        this config: in the right places and of the right shapes, so that nothing is filled in, left
        out or stretched to fit."""
        fsdp = self.config.parallel == "fsdp"
        kinds: dict[str, type | tuple] = dict.fromkeys(self.COUNTERS, (int, float))
        kinds |= {"step": int, "scaler": dict, "carried": list, "lengths": dict, "schedule": dict}
        kinds |= {"shards": int} if fsdp else {"model": dict, "optimizer": dict, "average": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]
        wrong += values.keys() - kinds.keys()  # more than we wrote is not ours
        if not wrong:
            wrong += ["scaler"] * (not self.scaler.takes(values["scaler"]))
            wrong += ["carried"] * (not self.fits(values["carried"]))
            wrong += ["lengths"] * (
                not all(isinstance(n, int) and n >= 0 for n in values["lengths"].values())
            )
            wrong += ["schedule"] * (not is_schedule(values["schedule"]))
        if not wrong:
            self.check_end(values)
            wrong += ["step"] * (not 0 <= values["step"] <= self.total_steps)
        if wrong:
            hint = (
                "; it has shards, which only parallel fsdp reads"
                if "shards" in values and not fsdp
                else ""
            )
            raise InputError(
                f"{path}: was not saved by a run with this config.json: {wrong[0]} is not as it"
                f" should be{hint}"
            )
        if not fsdp:  # shards are checked one by one, as they are read
            own = self.tensors()
            check_tensors(values["model"], own["model"], path)
            check_tensors(values["average"], own["average"], path)
            named = dict(self.model.named_parameters())
            # a parameter's, shaped like it or a number
            for key, tensor in values["optimizer"].items():
                p = named.get(key.rpartition(":")[0])
                if p is None:
                    raise InputError(
                        f"{path}: has {key}, which the network of its config.json has no use for"
                    )
                number = isinstance(tensor, Tensor) and not tensor.dim()
                check_tensor(key, tensor, torch.Size([]) if number else p.shape, p.dtype, path)

    def check_end(self, values: dict[str, Any]) -> None:
        """Raises `InputError` where the schedule has changed and leaves no step to take."""
        changed = values["schedule"] != schedule_of(self.config)
        if changed and values["step"] >= self.total_steps:
            raise InputError(
                f"resume: {values['step']:,} steps are taken, and the run would end after"
                f" {self.total_steps:,}; give more max_steps or epochs"
            )

    def fits(self, carried: list) -> bool:
        """Whether these are states to go on from, one for each micro batch of all processes, or
        None at the start."""
        like = self.model.start(self.config.micro_batch_size, stream=True).saved()
        shapes = [{name: tensor.shape for name, tensor in block.items()} for block in like]
        try:
            found = [
                blocks
                and [
                    {name: t.shape for name, t in part.items()}
                    for part in State.of_saved(blocks).saved()
                ]
                for blocks in carried
            ]
        except (AttributeError, TypeError, ValueError):  # no lists of dicts of tensors
            return False
        return len(found) == self.config.grad_accum and all(own in (None, shapes) for own in found)


def schedule_of(config: Config) -> dict[str, float | None]:
    """The keys of the schedule, with their values."""
    return {key: getattr(config, key) for key in SCHEDULE_KEYS}


def is_schedule(saved: dict[str, Any]) -> bool:
    """Whether a save's schedule is what `schedule_of` makes."""
    return saved.keys() == set(SCHEDULE_KEYS) and all(
        value is None or isinstance(value, int | float) for value in saved.values()
    )


# ===== What a step runs as


class StepGraph:
    """A training step as one CUDA graph: thousands of kernels start without Python, which takes
    longer to launch those of a small network than a GPU to run them. The same kernels in the same
    order, dropout too: numbers do not change."""

    def __init__(self, trainer: Trainer, parts: list[tuple[Tensor, Tensor, State | None]]):
        """Captures the step that `trainer.compute` makes of parts like these; nothing is computed
        yet."""
        # A graph reads where it was captured: each step's tokens are copied to these.
        self.parts = [(ids.clone(), targets.clone(), None) for ids, targets, _ in parts]
        torch.cuda.synchronize()
        # the graph has memory of its own, and what steps left behind is not for it
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = trainer.compute(self.parts)

    def __call__(
        self, parts: list[tuple[Tensor, Tensor, State | None]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        for (ids, targets, _), (own_ids, own_targets, _) in zip(parts, self.parts, strict=True):
            own_ids.copy_(ids)
            own_targets.copy_(targets)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)  # the next step writes over them


def training_type(config: Config, device: str) -> torch.dtype | None:
    """The type of autocast: on a CPU bf16 where it has instructions for it (elsewhere it would only
    be slow)."""
    if not config.use_amp:
        return None
    if device == "cuda":
        return torch.float16 if config.amp_dtype == "fp16" else torch.bfloat16
    return torch.bfloat16 if cpu_multiplies_bf16() else None


def multiply_in_fp8(model: nn.Module, device: str, tokens: int) -> None:
    """Has the wide maps of MLP and lifting multiply in fp8, their weights kept in fp32 under their
    own names: inputs, weights and gradients are scaled by their largest number at each product.
    (The mixers' products are batched, and stay in bf16.) tokens: that a pass reads at a time.

    Raises `InputError` on a device without fp8's matrix units, for other numbers of tokens than
    those take, and where torchao is missing."""
    # 8.9 is Ada, the first that has them
    if device != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        raise InputError(
            "amp_dtype: fp8 needs a GPU of the Ada, Hopper or Blackwell generation; take bf16"
        )
    if tokens % 16:  # over which the products for the weights' gradients sum
        raise InputError(
            f"amp_dtype: fp8 needs a multiple of 16 tokens at a time on each GPU, not {tokens};"
            " change block_size"
        )
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        raise InputError(
            "amp_dtype: fp8 needs torchao (pip install torchao); or take bf16"
        ) from None

    def is_wide(module: nn.Module, name: str) -> bool:
        wide = any(part in name for part in ("ffwd", "predict_nets", "update_nets"))
        # Multiples of 16 are what the products take; under a thousand channels scaling costs more
        # than fp8 saves.
        return wide and all(size % 16 == 0 and size >= 1024 for size in module.weight.shape)

    convert_to_float8_training(model, module_filter_fn=is_wide)


def compiled_loss(trainer: Trainer) -> Callable:
    """The compiled loss of the trainer's model, tried on one batch; where that fails it says so and
    returns the plain one."""
    if trainer.world.kind == "fsdp":
        trainer.record.say("not compiled: parallel fsdp gathers its weights block by block")
        return trainer.model.loss
    started = time.perf_counter()
    # torch.compile itself only wraps; what fails does so in the first pass, so one is made here.
    compiled = torch.compile(trainer.model.loss, mode=trainer.config.compile_mode)
    try:
        trainer.model.train()
        torch.compiler.cudagraph_mark_step_begin()
        for i in range(trainer.config.grad_accum):  # a CUDA graph is made for each part of a step
            ids, targets, state = trainer.micro_batch(i)
            with trainer.autocast():
                loss, _ = compiled(ids, targets, state)
            (trainer.scaler.scale * loss).backward()  # else fp16 has zeros for small gradients
        if lost := lost_gradient(trainer):
            raise RuntimeError(f"compiled, {lost} would not learn; another torch may do it right")
        trainer.record.say(f"compiled in {time.perf_counter() - started:.0f} s")
    except (RuntimeError, OSError, ImportError) as error:
        # no compiler, no Triton, an unsupported operation
        trainer.record.say(f"not compiled, training goes on without: {first_line(error)}")
        compiled = trainer.model.loss
    trainer.model.zero_grad(set_to_none=True)  # the trial was no step
    return compiled


def lost_gradient(trainer: Trainer) -> str | None:
    """The name of a parameter whose gradient, which a compiled pass has just made, is all zero or
    missing where the plain one is not; None where there is none, or where a plain pass cannot be
    made. torch 2.11 has made such programs, and a run that trains with one looks like a slow
    learner."""
    config = trainer.config
    # Blocks are left out at random: either pass may miss one. And fp8 wants many rows.
    if config.stochastic_depth_rate or config.amp_dtype == "fp8":
        return None
    suspects = {
        name: p
        for name, p in trainer.model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    }
    if not suspects:
        return None
    trainer.model.zero_grad(set_to_none=True)
    ids, targets, _ = trainer.micro_batch(0)
    try:
        with trainer.autocast():
            # one text is enough to see that, and needs little memory
            loss, _ = trainer.model.loss(ids[:1], targets[:1])
        (trainer.scaler.scale * loss).backward()
    except torch.OutOfMemoryError:
        return None
    found = (name for name, p in suspects.items() if p.grad is not None and p.grad.any())
    return next(found, None)
