"""Trains a WaveletLM.

    python train.py --config configs/quickstart.json
    python train.py --layers 4 --lr 0.005          # config.json, with keys overridden
    python train.py --resume logs/RUN              # goes on where a run was stopped or killed
    torchrun --nproc_per_node=8 train.py           # several GPUs; key `parallel` says how (see distributed.py)
    python train.py --plan 8 --config FILE         # what it would need on 8 GPUs, without making a weight (see plan.py)
    python train.py --profile                      # a few steps under the profiler, and where they went

A run's folder, named by the first line of output, holds all there is to know of it. A step depends on the seed, its number
and the weights alone, so a resumed run takes the very steps that it would have taken without the stop.
"""

import argparse
import contextlib
import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from tqdm import tqdm

from checkpoint import MODEL_FILE, load_model, own_tensors, save_model, save_plain
from config import Config, InputError, add_config_options, given_options, load_config, make_config, run_command
from data import Corpus, evaluation_slice, prepare, training_order
from distributed import World, join, load_shards, local, remove_other_shards, save_shards, saved_shapes
from evaluate import bigram_nats, figures, score
from generate import sample_text
from model import State, build_model
from optimizers import (
    WeightAverage,
    learning_rate,
    load_state_tensors,
    make_optimizers,
    room_for_state,
    state_tensors,
    step_if,
    warmup_steps,
)
from plan import print_plan
from profiling import profile_steps
from record import Record

LATEST = "latest.pt"  # everything a run needs to go on; our own tensors and numbers, read with weights_only
AVERAGE_FILE = "average_model.safetensors"  # the best average of the weights, where ema_decay asks for one
PATIENCE = 10  # steps in a row without a finite gradient before a run gives up


class Trainer:
    """Everything that a step changes: weights, optimizers, scaler, carried state, best value; and how to save it."""

    def __init__(self, config: Config, record: Record, corpus: Corpus, world: World):
        self.config, self.record, self.corpus, self.world = config, record, corpus, world
        self.device = world.device
        torch.manual_seed(config.seed)
        self.model = world.place(build_model(config, corpus.vocab_size))
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
        self.loss = self.model.loss
        self.loss = world.parallel_loss(self.model, compiled_loss(self) if config.compile else self.loss)

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
        rate = learning_rate(self.step, self.total_steps, self.config)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group["lr_scale"]
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
            raise InputError(
                f"{self.bad_in_a_row} steps in a row without a finite gradient, first of {first}; the last good state is "
                f"{self.record.folder / LATEST}. Lower lr, or set use_amp to false"
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
        if not path.exists():
            self.record.cut_back({})
            return
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise InputError(f"{path}: cannot be read ({str(error).partition(chr(10))[0] or type(error).__name__})") from None
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
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else None


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


class StopRequest:
    """Within it, Ctrl-C and SIGTERM only set `signal`, so that a run stops between two steps, saved. A second Ctrl-C
    is not caught."""

    def __enter__(self) -> "StopRequest":
        self.signal: int | None = None
        self.handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def train(trainer: Trainer, stop: StopRequest) -> None:
    """Steps until the end or a request to stop, with log lines, evaluations, samples and saves at their intervals."""
    config, record, corpus = trainer.config, trainer.record, trainer.corpus
    bits = corpus.train.n_tokens / corpus.train.n_bytes / math.log(2)  # nats per token → bits per byte
    held_out = evaluation_slice(corpus.validation, config.eval_tokens + 1)
    held_out_bits = (len(held_out) - 1) / len(corpus.tokenizer.decode_bytes(held_out[1:].tolist())) / math.log(2)
    began, before = time.perf_counter(), trainer.seconds
    last, losses = (time.perf_counter(), trainer.step), []
    progress = tqdm(total=trainer.total_steps, initial=trainer.step, unit="step", disable=not sys.stderr.isatty(), leave=False)
    stopping = 0
    while trainer.step < trainer.total_steps and not stopping:
        loss, norm = trainer.take_step()
        losses.append(loss)
        progress.update()
        step, ended = trainer.step, trainer.step == trainer.total_steps
        if step % config.log_interval == 0 or ended:
            nats, now = trainer.world.mean(torch.stack(losses).mean()).item(), time.perf_counter()
            speed = (step - last[1]) * trainer.tokens_per_step / (now - last[0])
            left = (trainer.total_steps - step) * trainer.tokens_per_step / speed
            rate = learning_rate(step - 1, trainer.total_steps, config)
            record.say(
                f"step {step}/{trainer.total_steps}  loss {nats:.4f}  bits/byte {nats * bits:.4f}  lr {rate:.2e}  "
                f"norm {norm.item():.2f}  {speed:,.0f} tokens/s  {int(left // 60)}:{int(left % 60):02d} left"
            )
            record.metric(
                kind="train", step=step, loss=nats, bits_per_byte=nats * bits, lr=rate, gradient_norm=norm.item(),
                skipped=trainer.skipped, tokens=step * trainer.tokens_per_step, tokens_per_second=speed,
            )  # fmt: skip
            last, losses = (now, step), []
        if step % config.eval_interval == 0 or ended:
            started = time.perf_counter()
            evaluate_now(trainer, held_out, held_out_bits)
            paused = time.perf_counter() - started
            trainer.evaluation_seconds += paused
            last = (last[0] + paused, last[1])
        trainer.seconds = before + time.perf_counter() - began
        if step % config.save_interval == 0 or ended:
            trainer.save()
        if trainer.world.size == 1 or step % config.log_interval == 0:  # several processes must agree, which takes time
            stopping = trainer.world.highest(stop.signal or 0)
    progress.close()
    if stopping:
        trainer.save()
        record.say(f"stopped after step {trainer.step}; go on with: python train.py --resume {record.folder}")
        sys.exit(128 + stopping)


def evaluate_now(trainer: Trainer, held_out: Tensor, bits: float) -> None:
    """Validation on the fixed tokens, of the weights and of their average, the best checkpoints, a sample, and the curves."""
    config, record = trainer.config, trainer.record
    trainer.best = validate(trainer, held_out, bits, "validation", MODEL_FILE, trainer.best)
    if trainer.average:
        with trainer.average.in_place():
            trainer.best_average = validate(trainer, held_out, bits, "average", AVERAGE_FILE, trainer.best_average)
    if config.sample_tokens and trainer.world.kind != "fsdp" and trainer.world.rank == 0:
        record.sample(trainer.step, sample_text(trainer.model, trainer.corpus.tokenizer, config, config.sample_tokens))
    record.draw_curves()


def validate(trainer: Trainer, held_out: Tensor, bits: float, kind: str, file: str, best: float) -> float:
    """Logs the loss of the model's present weights as `kind`, keeps them in `file` where it is the lowest, and returns that."""
    config, record, step = trainer.config, trainer.record, trainer.step
    nats = trainer.validation_nats(held_out)
    record.say(f"step {step}/{trainer.total_steps}  {kind} loss {nats:.4f}  bits/byte {nats * bits:.4f}")
    record.metric(kind=kind, step=step, loss=nats, bits_per_byte=nats * bits)
    warm = step >= warmup_steps(trainer.total_steps, config) or not config.skip_warmup_saves
    last_chance = step == trainer.total_steps and math.isinf(best)
    if not ((nats < best and warm) or last_chance):
        return best
    tensors = trainer.world.whole(own_tensors(trainer.model))
    if trainer.world.rank == 0:
        save_model(trainer.model, record.folder / file, tensors)
    return nats


def finish(trainer: Trainer) -> None:
    """The figures of the best checkpoint on the whole validation and test splits, a sample, and the end block."""
    config, record, corpus = trainer.config, trainer.record, trainer.corpus
    result: dict[str, float | int | str] = {}
    if trainer.average:
        result |= split_figures(trainer, load_model(record.folder / AVERAGE_FILE, trainer.device)[0], "average_")
    model, _, tokenizer = load_model(record.folder, trainer.device)
    result |= split_figures(trainer, model, "")
    bigram = bigram_nats(corpus.train.tokens, corpus.validation.tokens, corpus.vocab_size)
    result["bigram_val_loss"] = bigram
    result["bigram_val_bits_per_byte"] = bigram * (corpus.validation.n_tokens - 1) / math.log(2) / corpus.validation.n_bytes
    trained = trainer.seconds - trainer.evaluation_seconds
    if trainer.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    result |= {
        "tokens_per_second": round(trainer.step * trainer.tokens_per_step / max(trained, 1e-9), 1),
        "peak_memory_mib": round(peak, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": trainer.step * trainer.tokens_per_step,
        "steps": trainer.step,
        "skipped_steps": trainer.skipped,
        "seconds": round(trainer.seconds, 1),
        "evaluation_share": round(trainer.evaluation_seconds / max(trainer.seconds, 1e-9), 4),
        "autocast": str(trainer.cast).removeprefix("torch.") if trainer.cast else "none",
        "context": config.eval_context,
        "tokenizer": tokenizer.name,
        "run_dir": str(record.folder),
    }
    record.say(f"--- sample\n{sample_text(model, tokenizer, config, config.num_new_tokens)}\n---")
    record.metric(kind="result", step=trainer.step, **result)
    for key, value in result.items():
        record.say(f"{key}: {value:.6f}" if isinstance(value, float) and not value.is_integer() else f"{key}: {value}")


def split_figures(trainer: Trainer, model: nn.Module, prefix: str) -> dict[str, float]:
    """The figures of `model` on the whole validation and test splits, their names begun with `prefix`."""
    window, context, result = trainer.config.block_size, trainer.config.eval_context, {}
    for short, split in (("val", trainer.corpus.validation), ("test", trainer.corpus.test)):
        nats = score(model, split.tokens, window, max(1, window // 2), context, trainer.device)
        values = figures(nats, split.n_tokens, split.n_bytes, split.n_words)
        values = {"loss": nats / (split.n_tokens - 1)} | values
        result |= {f"{prefix}{short}_{key}": value for key, value in values.items()}
    return result


def read_arguments() -> tuple[Config, Path | None, argparse.Namespace]:
    """The config that the command line asks for, the run to resume if any, and the other options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", default=None, metavar="FILE", help="JSON file of keys and values (default config.json)")
    parser.add_argument("--resume", default=None, metavar="RUN_DIR", help="go on with the run in this folder")
    parser.add_argument("--plan", type=int, metavar="GPUS", help="print what a run on so many GPUs needs, and stop")
    parser.add_argument("--profile", action="store_true", help="a few steps under the profiler, their table, and stop")
    add_config_options(parser)
    args = parser.parse_args()
    given = given_options(args)
    if args.resume is None:
        path = Path(args.config or "config.json")
        return load_config(path, **given), None, args
    folder = Path(args.resume)
    if not (folder / "config.json").is_file():
        raise InputError(f"resume: {folder} is not a run directory (it has no config.json)")
    saved = load_config(folder / "config.json")
    asked = load_config(args.config, **given) if args.config else make_config(saved.model_dump() | given, "command line")
    changed = [key for key in Config.model_fields if getattr(asked, key) != getattr(saved, key)]
    if changed:
        keys = ", ".join(changed)
        raise InputError(f"resume: not as in {folder}/config.json: {keys}; leave them out, or start a new run")
    return saved, folder, args


def main() -> None:
    config, folder, options = read_arguments()
    if options.plan is not None:
        print_plan(config, options.plan)
        return
    with join(config) as world:
        run(config, folder, world, profile=options.profile)


def run(config: Config, folder: Path | None, world: World, profile: bool) -> None:
    """Trains from the beginning, or goes on with the run in `folder`; process 0 alone writes."""
    resumed = folder is not None
    if world.rank == 0 and not resumed:
        folder = Record.create(config).folder
    record = Record(Path(world.told(str(folder))), quiet=world.rank > 0)
    if world.rank == 0:
        print(f"run: {record.folder}", flush=True)
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    with world.first_alone():
        corpus = prepare(config, record.say)
    if world.rank == 0:
        corpus.tokenizer.save(record.folder)
    trainer = Trainer(config, record, corpus, world)
    if resumed:
        trainer.restore()
        record.say(f"resumed after step {trainer.step}")
    count = sum(p.numel() for p in trainer.model.parameters())
    record.say(
        f"{count:,} parameters, vocabulary {corpus.vocab_size:,}, {trainer.total_steps:,} steps of "
        f"{trainer.tokens_per_step:,} tokens ({trainer.total_steps / trainer.batches.steps_per_epoch:.2f} epochs), "
        f"{world.size} × {trainer.device}, autocast {trainer.cast}"
    )
    if profile:
        profile_steps(trainer)
        return
    with StopRequest() as stop:
        train(trainer, stop)
    if world.rank == 0:
        finish(trainer)


if __name__ == "__main__":
    run_command(main)
