"""Trains a WaveletLM.

    python train.py --config configs/quickstart.json
    python train.py --layers 4 --lr 0.005          # config.json, with keys overridden
    python train.py --resume logs/RUN              # goes on where a run was stopped or killed

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
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import MODEL_FILE, load_model, own_tensors, save_model, save_plain
from config import Config, InputError, add_config_options, given_options, load_config, make_config, run_command
from data import Corpus, evaluation_slice, prepare, training_order
from evaluate import bigram_nats, figures, score
from generate import sample_text
from model import State, build_model
from optimizers import learning_rate, make_optimizer, warmup_steps
from record import Record

LATEST = "latest.pt"  # everything a run needs to go on; our own tensors and numbers, read with weights_only
PATIENCE = 10  # steps in a row without a finite gradient before a run gives up


class Trainer:
    """Everything that a step changes: weights, optimizer, scaler, carried state, best value; and how to save it."""

    def __init__(self, config: Config, record: Record, corpus: Corpus):
        self.config, self.record, self.corpus = config, record, corpus
        self.device = pick_device(config)
        torch.manual_seed(config.seed)
        self.model = build_model(config, corpus.vocab_size).to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        batch = config.micro_batch_size * config.grad_accum
        self.batches = training_order(corpus, config, batch)
        self.total_steps = math.ceil(config.epochs * self.batches.steps_per_epoch)
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.tokens_per_step = batch * config.block_size
        self.cast = autocast_type(config, self.device)
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.cast is torch.float16)
        self.carried: list[State | None] = [None] * config.grad_accum  # one lane of texts for each micro batch
        self.step, self.best, self.seconds, self.skipped, self.bad_in_a_row = 0, math.inf, 0.0, 0, 0
        self.evaluation_seconds = 0.0
        self.loss = self.model.loss

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, self.cast) if self.cast else contextlib.nullcontext()

    def micro_batch(self, i: int) -> tuple[Tensor, Tensor, State | None]:
        """Part i of this step's batch on the device, and the state its texts begin with."""
        size = self.config.micro_batch_size
        ids, targets, *fresh = self.batches.batch(self.step, rows=slice(i * size, (i + 1) * size))
        state = None
        if fresh:  # carried state: streams, since a mean without bound is one no other window has seen
            before = self.carried[i]
            state = self.model.start(size, stream=True) if before is None else before.reset(fresh[0])
        return ids.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True), state

    def take_step(self) -> tuple[Tensor, float]:
        """One optimizer step. Returns the mean loss in nats (a tensor) and the gradient norm; a step whose gradient is
        not finite is left out."""
        self.model.train()
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # dropout is a function of (seed, step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, self.config)
        total = torch.zeros((), device=self.device)
        for i in range(self.config.grad_accum):
            ids, targets, state = self.micro_batch(i)
            with self.autocast():
                loss, state = self.loss(ids, targets, state)
            self.scaler.scale(loss * (self.model.loss_weight / self.config.grad_accum)).backward()
            total += loss.detach() / self.config.grad_accum
            if self.config.decompose_bypass_cross_window:
                self.carried[i] = state.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf).item()
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.bad_in_a_row = 0
        else:
            self.skip_step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, norm

    def skip_step(self) -> None:
        self.skipped += 1
        self.carried = [None] * self.config.grad_accum
        self.bad_in_a_row += 1
        gradients = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
        first = next((name for name, gradient in gradients if not gradient.isfinite().all()), "the loss")
        self.record.say(f"step {self.step} skipped: gradient of {first} is not finite")
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
        total = 0.0
        for rows in torch.arange(windows).split(batch):
            with self.autocast():
                loss, _ = self.model.loss(ids[rows].to(self.device), targets[rows].to(self.device))
            total += loss.double().item() * len(rows)
        return total / windows

    def save(self) -> None:
        """Writes the whole state; a kill at any moment leaves the last whole one."""
        carried = [state.blocks if state else None for state in self.carried]
        values = {
            "model": {name: tensor.detach() for name, tensor in own_tensors(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "carried": carried,
            "lengths": self.record.lengths(),
        }
        values |= {name: getattr(self, name) for name in self.COUNTERS}
        save_plain(values, self.record.folder / LATEST)

    COUNTERS = ("step", "best", "seconds", "evaluation_seconds", "skipped", "bad_in_a_row")

    def restore(self) -> None:
        """Goes back to the state last saved, and cuts the logs back to it. Without one the run starts from the beginning."""
        path = self.record.folder / LATEST
        if not path.exists():
            self.record.cut_back({})
            return
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        with torch.no_grad():
            for name, tensor in own_tensors(self.model).items():
                tensor.copy_(values["model"][name])
        self.optimizer.load_state_dict(values["optimizer"])
        self.scaler.load_state_dict(values["scaler"])
        self.carried = [State(blocks).to(self.device) if blocks else None for blocks in values["carried"]]
        for name in self.COUNTERS:
            setattr(self, name, values[name])
        self.record.cut_back(values["lengths"])


def pick_device(config: Config) -> str:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda, but torch finds no GPU; use cpu or auto")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def autocast_type(config: Config, device: str) -> torch.dtype | None:
    """The type of autocast: on a CPU bf16 where it has instructions for it (elsewhere it would only be slow)."""
    if not config.use_amp:
        return None
    if device == "cuda":
        return torch.float16 if config.amp_dtype == "fp16" else torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else None


def compile_loss(trainer: Trainer) -> None:
    """Replaces the trainer's loss by a compiled one, tried on one batch; where that fails it says so and changes nothing."""
    started = time.perf_counter()
    compiled = torch.compile(trainer.model.loss, mode=trainer.config.compile_mode)
    try:
        trainer.model.train()
        ids, targets, state = trainer.micro_batch(0)
        with trainer.autocast():
            compiled(ids, targets, state)[0].backward()
        trainer.loss = compiled
        trainer.record.say(f"compiled in {time.perf_counter() - started:.0f} s")
    except (RuntimeError, OSError, ImportError) as error:  # no compiler, no Triton, an unsupported operation
        trainer.record.say(f"not compiled, training goes on without: {str(error).strip().splitlines()[0]}")
    trainer.model.zero_grad(set_to_none=True)


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
    while trainer.step < trainer.total_steps and stop.signal is None:
        loss, norm = trainer.take_step()
        losses.append(loss)
        progress.update()
        step, ended = trainer.step, trainer.step == trainer.total_steps
        if step % config.log_interval == 0 or ended:
            nats, now = torch.stack(losses).mean().item(), time.perf_counter()
            speed = (step - last[1]) * trainer.tokens_per_step / (now - last[0])
            left = (trainer.total_steps - step) * trainer.tokens_per_step / speed
            rate = learning_rate(step - 1, trainer.total_steps, config)
            record.say(
                f"step {step}/{trainer.total_steps}  loss {nats:.4f}  bits/byte {nats * bits:.4f}  lr {rate:.2e}  "
                f"norm {norm:.2f}  {speed:,.0f} tokens/s  {int(left // 60)}:{int(left % 60):02d} left"
            )
            record.metric(
                kind="train", step=step, loss=nats, bits_per_byte=nats * bits, lr=rate, gradient_norm=norm,
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
    progress.close()
    if stop.signal is not None:
        trainer.save()
        record.say(f"stopped after step {trainer.step}; go on with: python train.py --resume {record.folder}")
        sys.exit(128 + stop.signal)


def evaluate_now(trainer: Trainer, held_out: Tensor, bits: float) -> None:
    """Validation on the fixed tokens, the best checkpoint, a sample, and the curves."""
    config, record, step = trainer.config, trainer.record, trainer.step
    nats = trainer.validation_nats(held_out)
    record.say(f"step {step}/{trainer.total_steps}  validation loss {nats:.4f}  bits/byte {nats * bits:.4f}")
    record.metric(kind="validation", step=step, loss=nats, bits_per_byte=nats * bits)
    warm = step >= warmup_steps(trainer.total_steps, config) or not config.skip_warmup_saves
    last_chance = step == trainer.total_steps and not (record.folder / MODEL_FILE).exists()
    if (nats < trainer.best and warm) or last_chance:
        trainer.best = nats
        save_model(trainer.model, record.folder / MODEL_FILE)
    if config.sample_tokens:
        record.sample(step, sample_text(trainer.model, trainer.corpus.tokenizer, config, config.sample_tokens))
    record.draw_curves()


def finish(trainer: Trainer) -> None:
    """The figures of the best checkpoint on the whole validation and test splits, a sample, and the end block."""
    config, record, corpus = trainer.config, trainer.record, trainer.corpus
    model, _, tokenizer = load_model(record.folder, trainer.device)
    result: dict[str, float | int | str] = {}
    for short, split in (("val", corpus.validation), ("test", corpus.test)):
        window, context = config.block_size, config.eval_context
        nats = score(model, split.tokens, window, max(1, window // 2), context, trainer.device)
        values = figures(nats, split.n_tokens, split.n_bytes, split.n_words)
        result |= {f"{short}_loss": nats / (split.n_tokens - 1)} | {f"{short}_{key}": value for key, value in values.items()}
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


def read_arguments() -> tuple[Config, Path | None]:
    """The config that the command line asks for, and the run to resume if any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", default=None, metavar="FILE", help="JSON file of keys and values (default config.json)")
    parser.add_argument("--resume", default=None, metavar="RUN_DIR", help="go on with the run in this folder")
    add_config_options(parser)
    args = parser.parse_args()
    given = given_options(args)
    if args.resume is None:
        path = Path(args.config or "config.json")
        return load_config(path, **given), None
    folder = Path(args.resume)
    if not (folder / "config.json").is_file():
        raise InputError(f"resume: {folder} is not a run directory (it has no config.json)")
    saved = load_config(folder / "config.json")
    asked = load_config(args.config, **given) if args.config else make_config(saved.model_dump() | given, "command line")
    changed = [key for key in Config.model_fields if getattr(asked, key) != getattr(saved, key)]
    if changed:
        keys = ", ".join(changed)
        raise InputError(f"resume: not as in {folder}/config.json: {keys}; leave them out, or start a new run")
    return saved, folder


def main() -> None:
    config, folder = read_arguments()
    record = Record(folder) if folder else Record.create(config)
    print(f"run: {record.folder}", flush=True)
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    corpus = prepare(config, record.say)
    corpus.tokenizer.save(record.folder)
    trainer = Trainer(config, record, corpus)
    if folder:
        trainer.restore()
        record.say(f"resumed after step {trainer.step}")
    count = sum(p.numel() for p in trainer.model.parameters())
    record.say(
        f"{count:,} parameters, vocabulary {corpus.vocab_size:,}, {trainer.total_steps:,} steps of "
        f"{trainer.tokens_per_step:,} tokens ({trainer.total_steps / trainer.batches.steps_per_epoch:.2f} epochs), "
        f"{trainer.device}, autocast {trainer.cast}"
    )
    if config.compile:
        compile_loss(trainer)
    with StopRequest() as stop:
        train(trainer, stop)
    finish(trainer)


if __name__ == "__main__":
    run_command(main)
