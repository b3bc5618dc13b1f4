"""Trains a WaveletLM.

    python train.py --config configs/quickstart.json
    python train.py --layers 4 --lr 0.005          # config.json, with keys overridden
    python train.py --resume logs/RUN              # goes on where a run was stopped or killed
    torchrun --nproc_per_node=8 train.py           # several GPUs; key `parallel` says how (see
    distributed.py)
    python train.py --plan 8 --config FILE         # what it would need on 8 GPUs, without making a
    weight (see plan.py)
    python train.py --profile                      # a few steps under the profiler, and where they
    went

A run's folder, named by the first line of output, holds all there is to know of it. A step depends
on the seed, its number and the weights alone, so a resumed run takes the very steps that it would
have taken without the stop."""

import argparse
import contextlib
import math
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import MODEL_FILE, load_model, own_tensors, save_model
from common.command import InputError, Parser, run_command
from config import Config, add_config_options, given_options, load_config, make_config
from data.corpus import check_source, located
from data.order import evaluation_slice
from data.prepare import run_corpus
from data.tokenizer import text_bytes
from inference.sampling import sample_text
from inference.scoring import bigram_nats, figures, score
from training.distributed import World, join
from training.optimizers import learning_rate, warmup_steps
from training.plan import check_memory, print_plan
from training.profiling import matmul_rate, profile_steps, work_per_token
from training.record import Record
from training.trainer import LATEST, Trainer

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
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def train(trainer: Trainer, stop: StopRequest) -> None:
    """Steps until the end or a request to stop, with log lines, evaluations, samples and saves at
    their intervals."""
    config, record, corpus = trainer.config, trainer.record, trainer.corpus
    # nats per token → bits per byte
    bits = corpus.train.n_tokens / corpus.train.n_bytes / math.log(2)
    held_out = whole_windows(
        evaluation_slice(corpus.validation, config.eval_tokens + 1), config.block_size
    )
    held_out_bits = (
        (len(held_out) - 1) / text_bytes(corpus.tokenizer, held_out[1:].tolist()) / math.log(2)
    )
    work = None  # of a token, as a share of what a GPU multiplies in a second
    if trainer.device == "cuda":
        work = work_per_token(trainer) / matmul_rate("cuda", trainer.cast or torch.float32)
    began, before = time.perf_counter(), trainer.seconds
    last, losses, saved = (time.perf_counter(), trainer.step), [], time.perf_counter()
    progress = tqdm(
        total=trainer.total_steps,
        initial=trainer.step,
        unit="step",
        disable=not sys.stderr.isatty(),
        leave=False,
    )
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
            card, on_the_card = {}, ""
            if work is not None:
                ms, memory = (
                    1e3 * trainer.tokens_per_step / speed,
                    torch.cuda.max_memory_allocated() / 2**30,
                )
                mfu = speed * work / trainer.world.size
                card = {"milliseconds": ms, "mfu": mfu, "memory_gib": memory}
                on_the_card = f"{ms:.1f} ms  MFU {mfu:.0%}  {memory:.1f} GiB  "
            record.say(
                f"step {step}/{trainer.total_steps}  loss {nats:.4f}  bits/byte {nats * bits:.4f} "
                f" lr {rate:.2e}  norm {norm.item():.2f}  {speed:,.0f} tokens/s "
                f" {on_the_card}{timedelta(seconds=int(left))} left"
            )
            record.metric(
                kind="train", step=step, loss=nats, bits_per_byte=nats * bits, lr=rate,
                gradient_norm=norm.item(),
                skipped=trainer.skipped, tokens=step * trainer.tokens_per_step,
                tokens_per_second=speed, **card,
            )  # fmt: skip
            last, losses = (now, step), []
        if step % config.eval_interval == 0 or ended:
            started = time.perf_counter()
            evaluate_now(trainer, held_out, held_out_bits)
            paused = time.perf_counter() - started
            trainer.evaluation_seconds += paused
            last = (last[0] + paused, last[1])
        trainer.seconds = before + time.perf_counter() - began
        due = ended or (config.save_interval is not None and step % config.save_interval == 0)
        # The first weights are never without a save, so that one who finds them without knows that
        # it is lost.
        due = due or (
            trainer.saved_step < 0 and math.isfinite(min(trainer.best, trainer.best_average))
        )
        # several processes must agree, which takes time
        if trainer.world.size == 1 or step % config.log_interval == 0:
            stopping = trainer.world.highest(stop.signal or 0)
            late = (
                config.save_interval is None
                and time.perf_counter() - saved > 60 * config.save_minutes
            )
            due = due or bool(trainer.world.highest(int(late)))
        if due:
            trainer.save()
            saved = time.perf_counter()
    progress.close()
    if stopping:
        trainer.save()
    trainer.writer.finish()
    if stopping:
        record.say(
            f"stopped after step {trainer.step}; go on with: python train.py --resume"
            f" {record.folder}"
        )
        sys.exit(128 + stopping)


def whole_windows(tokens: Tensor, block_size: int) -> Tensor:
    """The tokens (n,) that a validation in windows of `block_size` predicts, and the one before
    them."""
    length = min(block_size, len(tokens) - 1)
    return tokens[: (len(tokens) - 1) // length * length + 1]


def evaluate_now(trainer: Trainer, held_out: Tensor, bits: float) -> None:
    """Validation on the fixed tokens, of the weights and of their average, the best checkpoints, a
    sample, and the curves."""
    config, record = trainer.config, trainer.record
    trainer.best = validate(trainer, held_out, bits, "validation", MODEL_FILE, trainer.best)
    if trainer.average:
        with trainer.average.in_place():
            trainer.best_average = validate(
                trainer, held_out, bits, "average", AVERAGE_FILE, trainer.best_average
            )
    if config.sample_tokens and trainer.world.kind != "fsdp" and trainer.world.rank == 0:
        record.sample(
            trainer.step,
            sample_text(trainer.model, trainer.corpus.tokenizer, config, config.sample_tokens),
        )
    record.draw_curves()


def validate(
    trainer: Trainer, held_out: Tensor, bits: float, kind: str, file: str, best: float
) -> float:
    """Logs the loss of the model's present weights as `kind`, keeps them in `file` where it is the
    lowest, and returns that."""
    config, record, step = trainer.config, trainer.record, trainer.step
    nats = trainer.validation_nats(held_out)
    record.say(
        f"step {step}/{trainer.total_steps}  {kind} loss {nats:.4f}  bits/byte {nats * bits:.4f}"
    )
    record.metric(kind=kind, step=step, loss=nats, bits_per_byte=nats * bits)
    warm = step >= warmup_steps(trainer.total_steps, config) or not config.skip_warmup_saves
    last_chance = step == trainer.total_steps and math.isinf(best)
    if not ((nats < best and warm) or last_chance):
        return best
    tensors = trainer.world.whole(own_tensors(trainer.model))
    if trainer.world.rank == 0:
        trainer.writer.write(
            lambda ready: save_model(trainer.model, record.folder / file, ready), tensors
        )
    return nats


def finish(trainer: Trainer) -> None:
    """The figures of the best checkpoint on the whole validation and test splits, a sample, and the
    end block. They are made once: of a run that has them they are printed again."""
    config, record, corpus = trainer.config, trainer.record, trainer.corpus
    if made := record.metrics("result"):
        print(
            "\n".join(
                figure_lines(
                    {key: value for key, value in made[-1].items() if key not in ("kind", "step")}
                )
            )
        )
        return
    result: dict[str, float | int | str] = {}
    if trainer.average:
        result |= split_figures(
            trainer, load_model(record.folder / AVERAGE_FILE, trainer.device)[0], "average_"
        )
    model, _, tokenizer = load_model(record.folder, trainer.device)
    result |= split_figures(trainer, model, "")
    bigram = bigram_nats(corpus.train.tokens, corpus.validation.tokens, corpus.vocab_size)
    result["bigram_val_loss"] = bigram
    scored = (corpus.validation.n_tokens - 1) / corpus.validation.scored_bytes
    result["bigram_val_bits_per_byte"] = bigram * scored / math.log(2)
    trained = trainer.seconds - trainer.evaluation_seconds
    result |= {
        "tokens_per_second": round(trainer.step * trainer.tokens_per_step / max(trained, 1e-9), 1)
    }
    if (peak := peak_memory(trainer.device)) is not None:
        result["peak_memory_mib"] = round(peak / 2**20, 1)
    result |= {
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
    record.metric(kind="result", step=trainer.step, **result)
    record.say(f"--- sample\n{sample_text(model, tokenizer, config, config.num_new_tokens)}\n---")
    for line in figure_lines(result):
        record.say(line)


def figure_lines(result: dict[str, float | int | str]) -> list[str]:
    return [
        (
            f"{key}: {value:.6f}"
            if isinstance(value, float) and not value.is_integer()
            else f"{key}: {value}"
        )
        for key, value in result.items()
    ]


def peak_memory(device: str) -> int | None:
    """The most memory that this process has had on `device`, in bytes; None on a system without a
    record of it (Windows)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # Unix only
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def split_figures(trainer: Trainer, model: nn.Module, prefix: str) -> dict[str, float]:
    """The figures of `model` on the whole validation and test splits, their names begun with
    `prefix`."""
    window, context, result = trainer.config.block_size, trainer.config.eval_context, {}
    for short, split in (("val", trainer.corpus.validation), ("test", trainer.corpus.test)):
        nats = score(model, split.tokens, window, max(1, window // 2), context, trainer.device)
        values = figures(nats, split.n_tokens, split.scored_bytes, split.scored_words)
        values = {"loss": nats / (split.n_tokens - 1)} | values
        result |= {f"{prefix}{short}_{key}": value for key, value in values.items()}
    return result


def check_levels(config: Config) -> None:
    """Raises `InputError` where the coarsest levels would see nothing but zeros in training, as
    windows have nothing before them. Networks of the first implementation may have such levels, so
    the config itself allows it."""
    longest = 2 ** (config.levels - 1)  # tokens that the coarsest level looks back
    if longest >= config.block_size and not config.decompose_bypass_cross_window:
        raise InputError(
            f"levels: {config.levels} levels look back {longest} tokens, block_size is"
            f" {config.block_size}; at most {int(math.log2(config.block_size - 1)) + 1} levels fit"
        )


def read_arguments() -> tuple[Config, Path | None, argparse.Namespace]:
    """The config that the command line asks for, the run to resume if any, and the other
    options."""
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="JSON file of keys and values (default config.json)",
    )
    parser.add_argument(
        "--resume", default=None, metavar="RUN_DIR", help="go on with the run in this folder"
    )
    parser.add_argument(
        "--plan", type=int, metavar="GPUS", help="print what a run on so many GPUs needs, and stop"
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="with --plan: of each GPU; says whether the run fits",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="a few steps under the profiler, their table, and stop",
    )
    add_config_options(parser)
    args = parser.parse_args()
    given = given_options(args)
    if args.resume is None:
        path = Path(args.config or "config.json")
        config = load_config(path, **given)
        check_levels(config)
        return config, None, args
    folder = Path(args.resume)
    if not args.resume or not Record.is_run(folder):
        raise InputError(
            f"resume: {args.resume or 'an empty name'} is no folder that train.py made for a run;"
            " give one of those"
        )
    saved = load_config(folder / "config.json")
    asked = (
        load_config(args.config, **given)
        if args.config
        else make_config(saved.model_dump() | given, "command line")
    )
    # a run's paths are full ones, those of the command line may not be
    asked, before = located(asked), located(saved)
    changed = [key for key in Config.model_fields if getattr(asked, key) != getattr(before, key)]
    if changed:
        keys = ", ".join(changed)
        raise InputError(
            f"resume: not as in {folder}/config.json: {keys}; leave them out, or start a new run"
        )
    return saved, folder, args


def main() -> None:
    config, folder, options = read_arguments()
    if options.plan is not None:
        print_plan(config, options.plan, options.memory)
        return
    with join(config) as world, contextlib.ExitStack() as held:
        run(config, folder, world, held, profile=options.profile)


def run(
    config: Config, folder: Path | None, world: World, held: contextlib.ExitStack, profile: bool
) -> None:
    """Trains from the beginning, or goes on with the run in `folder`; process 0 alone writes, and
    holds the run while `held` is open. A new run that fails before its first step leaves no
    folder."""
    resumed = folder is not None
    begun = resumed and (folder / LATEST).exists()
    if not resumed:
        config = located(config)
        check_source(config)
    if world.rank == 0 and not resumed:
        # By an exception, as Ctrl-C is, so that the folder of a start that is stopped goes too.
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        held.callback(signal.signal, signal.SIGTERM, before)
        folder = Record.create(config).folder
    trainer = None
    try:
        record = Record(Path(world.told(str(folder))), quiet=world.rank > 0)
        if world.rank == 0:
            held.enter_context(record.locked())
            print(f"run: {record.folder}", flush=True)
        trainer = start(config, record, world, resumed, begun)
        if profile:
            profile_steps(trainer)
            return
        with StopRequest() as stop:
            train(trainer, stop)
    except BaseException:
        if world.rank == 0 and not resumed and (trainer is None or trainer.step == 0):
            shutil.rmtree(folder, ignore_errors=True)  # what ended the run is what is to be said
        raise
    if world.rank == 0:
        finish(trainer)


def start(config: Config, record: Record, world: World, resumed: bool, begun: bool) -> Trainer:
    """All that comes before the first step: data, network and optimizers, and what a resumed run
    had, if it had `begun`."""
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    with world.first_alone():
        # What a run that is refused would have in its log is not of the run, so a resumed one only
        # prints it.
        say = record.say if not resumed else print if world.rank == 0 else lambda line: None
        corpus = run_corpus(config, record.folder, begun, say, keeps=world.rank == 0)
    say(
        f"text: {corpus.source}; {corpus.train.n_bytes:,} bytes of training,"
        f" {corpus.validation.n_bytes:,} of validation, {corpus.test.n_bytes:,} of test; between"
        f" documents {corpus.separator}"
    )
    check_memory(config, corpus.vocab_size, world.device, world.size)
    trainer = Trainer(config, record, corpus, world)
    if resumed:
        trainer.restore()
        record.say(f"resumed after step {trainer.step}")
    count = sum(p.numel() for p in trainer.model.parameters())
    record.say(
        f"{count:,} parameters, vocabulary {corpus.vocab_size:,}, {trainer.total_steps:,} steps of"
        f" {trainer.tokens_per_step:,} tokens"
        f" ({trainer.total_steps / trainer.batches.steps_per_epoch:.2f} epochs), {world.size} ×"
        f" {trainer.device}, autocast {trainer.cast}"
    )
    return trainer


if __name__ == "__main__":
    run_command(main)
