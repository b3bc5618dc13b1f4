"""Trains a WaveletLM.

    python train.py --config configs/quickstart.json
    python train.py --layers 4 --lr 0.005          # config.json, with keys overridden
    python train.py --resume logs/RUN              # goes on where a run was stopped or killed
    python train.py --resume logs/RUN --max_steps 2000   # and further than it was to go
    python train.py --init_from logs/RUN --dataset new/  # begins with trained weights
    python train.py --plan 8 --config FILE         # what it would need on 8 GPUs (training/plan.py)
    python train.py --profile                      # a few steps, and where their time went
    torchrun --nproc_per_node=8 train.py           # several GPUs (training/distributed.py)

A run's folder, named by the first line of output, holds all there is to know of it. A step depends
on the seed, its number and the weights alone, so a resumed run takes the very steps that it would
have taken without the stop."""

import argparse
import contextlib
import math
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoint import load_model
from common import gpu
from common.command import InputError, Parser, run_command
from config import Config, add_config_options, given_options, load_config, make_config
from data.corpus import check_source, located
from data.prepare import run_corpus
from inference.sampling import sample_text
from inference.scoring import bigram_nats, figures, score
from layers import passes
from training.distributed import World, join
from training.loop import AVERAGE_FILE, Loop, StopRequest, hours
from training.origin import Origin, check_vocabulary, config_from, read_origin
from training.plan import check_memory, print_plan
from training.profiling import peak_memory, profile_steps
from training.record import Record, is_finite
from training.tracker import open_tracker, tracker_module
from training.trainer import LATEST, SCHEDULE_KEYS, Trainer, schedule_of

# ===== The end of a run


def finish(trainer: Trainer) -> None:
    """The figures of the best checkpoint on the whole validation and test splits, a sample, what
    the figures mean, and the end block. They are made once: of a run that has them they are printed
    again."""
    record = trainer.record
    # Not any result: a run that has gone on after its end has one of the earlier end.
    if result := record.result_of(trainer.step):
        print("\n".join(closing_words(trainer, result) + figure_lines(result)))
        return
    # The best weights, as the other commands will read them: not those of the last step.
    model, _, tokenizer = load_model(record.folder, trainer.device)
    result = final_figures(trainer, model) | {
        "tokenizer": tokenizer.name,
        "run_dir": str(record.folder),
    }
    # Before the sample: the figures took long, and a prompt may be too much for the memory left.
    record.metric(kind="result", step=trainer.step, **result)
    config = trainer.config
    record.say(f"--- sample\n{sample_text(model, tokenizer, config, config.num_new_tokens)}\n---")
    # The block is the last: who reads the output with a program finds it there.
    for line in closing_words(trainer, result) + figure_lines(result):
        record.say(line)


def final_figures(trainer: Trainer, model: nn.Module) -> dict[str, float | int | str]:
    """What the end block says of a run whose best weights `model` has: by name."""
    corpus = trainer.corpus
    result: dict[str, float | int | str] = {}
    if trainer.average:
        average, _, _ = load_model(trainer.record.folder / AVERAGE_FILE, trainer.device)
        result |= split_figures(trainer, average, "average_")
    result |= split_figures(trainer, model, "")
    # The least that a language model must beat, of the same tokens.
    bigram = bigram_nats(corpus.train.tokens, corpus.validation.tokens, corpus.vocab_size)
    result["bigram_val_loss"] = bigram
    # The first token is predicted by nothing.
    tokens_of_a_byte = (corpus.validation.n_tokens - 1) / corpus.validation.scored_bytes
    result["bigram_val_bits_per_byte"] = bigram * tokens_of_a_byte / math.log(2)
    tokens = trainer.step * trainer.tokens_per_step
    # The speed is that of training alone, so that runs evaluated more or less often compare.
    # 1e-9 s: a run without a step took no time.
    trained = max(trainer.seconds - trainer.evaluation_seconds, 1e-9)
    result["tokens_per_second"] = round(tokens / trained, 1)
    if (peak := peak_memory(trainer.device)) is not None:
        result["peak_memory_mib"] = round(peak / 2**20, 1)
    return result | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": tokens,
        "steps": trainer.step,
        "skipped_steps": trainer.skipped,
        "seconds": round(trainer.seconds, 1),
        "evaluation_share": round(trainer.evaluation_seconds / max(trainer.seconds, 1e-9), 4),
        "autocast": str(trainer.cast).removeprefix("torch.") if trainer.cast else "none",
        "context": trainer.config.eval_context,
    }


def split_figures(trainer: Trainer, model: nn.Module, prefix: str) -> dict[str, float]:
    """The figures of `model` on the whole validation and test splits, their names begun with
    `prefix`."""
    window = trainer.config.block_size
    stride = max(1, window // 2)  # each token but the first has half a window before it
    context = trainer.config.eval_context
    result = {}
    # "val" and "test", as the tables of papers have them
    for short, split in (("val", trainer.corpus.validation), ("test", trainer.corpus.test)):
        nats = score(model, split.tokens, window, stride, context, trainer.device)
        values = figures(nats, split.n_tokens, split.scored_bytes, split.scored_words)
        values = {"loss": nats / (split.n_tokens - 1)} | values
        result |= {f"{prefix}{short}_{key}": value for key, value in values.items()}
    return result


def closing_words(trainer: Trainer, result: dict[str, float | int | str]) -> list[str]:
    """What a run came to, in three sentences, and the commands that one may want next. result: what
    the end block says."""
    corpus = trainer.corpus
    # Where the run is now: it may have been moved since its figures were made.
    folder = str(trainer.record.folder)
    passes = result["training_tokens"] / corpus.train.n_tokens
    # Quoted for a shell, since the lines are there to be copied.
    checkpoint = f"--checkpoint {shlex.quote(folder)}"
    prompt = shlex.quote(trainer.config.generation_prompt)
    return [
        f"Trained a network of {result['parameters']:,} parameters on {corpus.name} for"
        f" {result['steps']:,} steps of {trainer.tokens_per_step:,} tokens, {passes:.2f} times the"
        f" training text, in {hours(result['seconds'])}.",
        how_good(result["val_bits_per_byte"], result["bigram_val_bits_per_byte"]),
        f"Its weights, log, curves and samples lie in {folder}.",
        "To let it write, and to measure it on other text:",
        f"  python generate.py {checkpoint} --prompt {prompt}",
        f"  python evaluate.py {checkpoint} --data FILE",
    ]


def how_good(bits: float | None, bigram: float) -> str:
    """What `bits` per byte of validation mean, in a sentence; bigram: those of a bigram model."""
    # A loss beyond all numbers is null in metrics.jsonl, and has nothing to compare.
    if not is_finite(bits):
        return "Its loss on the validation text is not finite; lower lr, or set use_amp to false."
    beside = f"{abs(1 - bits / bigram):.0%} {'fewer' if bits < bigram else 'more'}"
    return (
        f"On the validation text it needs {bits:.3f} bits per byte (what a byte of unseen text"
        f" would take, compressed by it; 8 as it stands), {beside} than the {bigram:.3f} of a"
        " bigram model, which guesses each token from the one before it alone."
    )


def figure_lines(result: dict[str, float | int | str]) -> list[str]:
    """The end block: a line `key: value` for each figure."""
    # Six digits after the point tell any two losses apart; counts have none.
    return [
        (
            f"{key}: {value:.6f}"
            if isinstance(value, float) and not value.is_integer()
            else f"{key}: {value}"
        )
        for key, value in result.items()
    ]


# ===== The command line


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


USAGE = "%(prog)s [--config FILE] [--KEY VALUE ...] [--resume RUN_DIR]"


def make_parser() -> Parser:
    """The parser of train.py's options: its own, and one for each key of the config."""
    parser = Parser(
        __doc__.split("\n", 1)[0],
        # argparse's own usage would have a screen full of keys.
        usage=USAGE,
        # Room for the longest of the common names, so that most keys are one or two lines.
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="JSON file of keys and values [default config.json]")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    add(
        "--init_from",
        metavar="CHECKPOINT",
        help="begin with these weights, their network and tokenizer: a run directory, a"
        " .safetensors file or an old .pt; keys that are not given are the checkpoint's",
    )
    add("--plan", type=int, metavar="GPUS", help="print what a run on so many GPUs needs, and stop")
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="with --plan: of each GPU; says whether the run fits",
    )
    add(
        "--profile",
        action="store_true",
        help="a few steps under the profiler, their table, and stop",
    )
    add_config_options(parser)
    return parser


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    config: Config
    folder: Path | None  # of the run to go on with
    origin: Origin | None  # the weights that a new run begins with
    options: argparse.Namespace  # --plan, --memory and --profile
    schedule: dict[str, float | None] | None = None  # of a run to go on with, as it was


def read_arguments() -> Asked:
    """What the command line asks for. Raises `InputError` where no run can be so."""
    args = make_parser().parse_args()
    # "is None" below: an empty name is a mistake, and is not to be taken for none.
    given = given_options(args)
    if args.resume is None:
        origin = None
        if args.init_from is None:
            config = load_config(Path(args.config or "config.json"), **given)
        else:
            origin = read_origin(args.init_from)
            config = config_from(origin, args.config, given)
        check_levels(config)
        return Asked(config, None, origin, args)
    if args.init_from is not None:
        raise InputError(
            "init_from: a run that is resumed has weights of its own; give --resume or --init_from"
        )
    folder = Path(args.resume)
    if not args.resume or not Record.is_run(folder):
        raise InputError(
            f"resume: {args.resume or 'an empty name'} is no folder that train.py made for a run;"
            " give one of those"
        )
    # Read once, by all processes before they meet: process 0 may write another one soon.
    saved = load_config(folder / "config.json")
    config = resumed_config(saved, folder, args.config, given)
    return Asked(config, folder, None, args, schedule_of(saved))


def resumed_config(saved: Config, folder: Path, file: str | None, given: dict[str, Any]) -> Config:
    """The config `saved` of the run in `folder`, with the schedule that the config file or the keys
    `given` on the command line ask for. Raises `InputError` where they ask for more than that."""
    # A config file says all keys: those that it leaves out are at their defaults, as in a new run.
    asked = (
        load_config(file, **given)
        if file
        else make_config(saved.model_dump() | given, "command line")
    )
    # A run's paths are full ones, those of the command line may not be.
    asked = located(asked)
    before = located(saved)
    changed = [
        key
        for key in Config.model_fields
        if key not in SCHEDULE_KEYS and getattr(asked, key) != getattr(before, key)
    ]
    if changed:
        raise InputError(
            f"resume: not as in {folder}/config.json: {', '.join(changed)}; leave them out, or"
            f" start a new run (only the schedule may change: {', '.join(SCHEDULE_KEYS)})"
        )
    # The paths stay as the run has them, since its token files go by them.
    return saved.model_copy(update=schedule_of(asked))


# ===== The run


def main() -> None:
    asked = read_arguments()
    if asked.options.plan is not None:  # before a process joins others, or looks for a GPU
        print_plan(asked.config, asked.options.plan, asked.options.memory)
        return
    with join(asked.config) as world, contextlib.ExitStack() as held:
        run(asked, world, held)


def run(asked: Asked, world: World, held: contextlib.ExitStack) -> None:
    """Trains from the beginning, or goes on with a run; process 0 alone writes, and holds the run
    while `held` is open. A new run that fails before its first step leaves no folder."""
    folder = asked.folder
    resumed = folder is not None
    begun = resumed and (folder / LATEST).exists()
    # What can be wrong is found before anything is made.
    if world.rank == 0:
        tracker_module(asked.config)
    if not resumed:
        asked = replace(asked, config=located(asked.config))
        check_source(asked.config)
    if world.rank == 0 and not resumed:
        # By an exception, as Ctrl-C is, so that the folder of a start that is stopped goes too.
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        held.callback(signal.signal, signal.SIGTERM, before)
        folder = Record.create(asked.config, asked.origin and asked.origin.note()).folder
    trainer = None
    try:
        record = Record(Path(world.told(str(folder))), quiet=world.rank > 0)
        if world.rank == 0:
            held.enter_context(record.locked())
            # The first line of the output, at once: scripts read it to find the run.
            print(f"run: {record.folder}", flush=True)
        trainer = start(asked, record, world, begun)
        if asked.options.profile:
            profile_steps(trainer)
            return
        # An ended run only prints its figures again, and has nothing to send.
        ended = trainer.step == trainer.total_steps and record.result_of(trainer.step) is not None
        if world.rank == 0 and not ended:
            record.tracker = open_tracker(asked.config, record.folder, trainer.step)
            if record.tracker is not None:
                held.callback(record.tracker.finish)
        with StopRequest() as stop:
            Loop(trainer, stop, sampler(trainer)).run()
    except BaseException:
        if world.rank == 0 and not resumed and (trainer is None or trainer.step == 0):
            shutil.rmtree(folder, ignore_errors=True)  # what ended the run is what is to be said
        raise
    if world.rank == 0:
        finish(trainer)


def sampler(trainer: Trainer) -> Callable[[], str] | None:
    """What makes the text of an evaluation; None where the config wants none."""
    config = trainer.config
    if not config.sample_tokens:
        return None
    return lambda: sample_text(
        trainer.model, trainer.corpus.tokenizer, config, config.sample_tokens
    )


def start(asked: Asked, record: Record, world: World, begun: bool) -> Trainer:
    """All that comes before the first step: data, network and optimizers, and what a resumed run
    had, if it had `begun`."""
    config = asked.config
    resumed = asked.folder is not None
    # "high" lets a GPU multiply fp32 in TF32: fractions of 10 bits in place of 23, much faster.
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    with world.first_alone():
        # `run_corpus` encodes the text with the tokenizer that it finds in the folder.
        if world.rank == 0 and asked.origin and asked.origin.tokenizer:
            asked.origin.tokenizer.save(record.folder)
        # What a run that is refused would have in its log is not of the run, so a resumed one only
        # prints it.
        say = record.say if not resumed else print if world.rank == 0 else lambda line: None
        corpus = run_corpus(config, record.folder, begun, say, keeps=world.rank == 0)
    say(
        f"text: {corpus.source}; {corpus.train.n_bytes:,} bytes of training,"
        f" {corpus.validation.n_bytes:,} of validation, {corpus.test.n_bytes:,} of test; between"
        f" documents {corpus.separator}"
    )
    # Only now, since the vocabulary may be most of the network.
    check_memory(config, corpus.vocab_size, world.device, world.size)
    if asked.origin:
        check_vocabulary(asked.origin, corpus.tokenizer)
    trainer = Trainer(config, record, corpus, world, asked.origin)
    if asked.origin:
        record.say(f"begins with {asked.origin.file}, sha256 {asked.origin.sha256}")
        # From now on the run has the weights, and goes on without the file.
        trainer.save()
    if resumed:
        trainer.restore(asked.schedule)
        record.say(f"resumed after step {trainer.step}")
        if not asked.options.profile:  # which takes steps for the clock alone
            trainer.change_schedule()
    count = sum(p.numel() for p in trainer.model.parameters())
    record.say(
        f"{count:,} parameters, vocabulary {corpus.vocab_size:,}, {trainer.total_steps:,} steps of"
        f" {trainer.tokens_per_step:,} tokens"
        f" ({trainer.total_steps / trainer.batches.steps_per_epoch:.2f} epochs), {world.size} ×"
        f" {trainer.device}, autocast {trainer.cast}"
    )
    if not config.compile and (reason := what_is_missing(trainer)):
        record.say(f"steps by torch alone, which is slower: {reason}")
    return trainer


def what_is_missing(trainer: Trainer) -> str:
    """Why code of our own takes no part in the steps; empty where it does, or there is none."""
    kind = torch.device(trainer.device).type
    if kind == "cpu":
        return passes.LIBRARY.missing()
    return gpu.missing() if kind == "cuda" and trainer.config.recall_heads else ""


if __name__ == "__main__":
    run_command(main)
