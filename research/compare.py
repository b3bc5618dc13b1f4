"""WaveletLM beside a Transformer and a state-space model, at equal parameters and CPU time.

    python -m research.compare --dataset my_books/ --out runs/compare --jobs 2
    python -m research.compare --dataset my_books/ --out runs/compare \\
        --models released best=configs/best-small.json llama

Every contestant gets the same text, tokens, batches in the same order, schedule, clipping and
evaluation, a single thread, and fp32 or (--bf16) autocast to bf16, as train.py on a CPU that has
instructions for it. Its learning rate is the best of short runs, by validation:
rates are doubled or halved until the best one is no longer at the edge of those tried, or six were
tried. Then come full runs, one for each seed.

Minutes are of CPU time on one thread. How many steps each contestant makes in them is measured
first, all in turn, so that a busy machine is fair to all. A run is a process of its own, so that
its peak memory is its own too, and is saved when done: the same command again makes only what is
missing. The weights of a full run lie beside its result.

A network is also measured as it learns from the text that it reads (`adapted`).
"""

import argparse
import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.command import InputError, Parser, run_command
from common.device import cpu_multiplies_bf16
from common.figures import new_figure, plain, save_figure
from common.files import write_whole
from common.tensors import own_tensors, save_tensors
from config import make_config
from data.order import Windows
from data.prepare import Corpus, prepare
from data.tokenizer import text_bytes
from inference.scoring import figures, score
from layers.features import fill_features
from research.contestants import (
    FOREIGN,
    KNOWN,
    Contestant,
    contestant,
    transformers_library,
)
from research.tables import markdown_table, mean_deviation, put_first
from research.timing import seconds_of_each, step_timer, steps_in, take_step
from training.optimizers import (
    clipped_step,
    gradient_norm,
    learning_rate,
    make_optimizers,
    rates,
)
from training.profiling import peak_memory
from training.record import environment

CURVE_POINTS = 10  # measurements on validation during a run
LONG_WINDOW = 4096  # tokens, of networks that read as long a text as they are given
CURVE_TOKENS = 16_384  # of validation, for the curve and the choice of the learning rate
# AdamW's rate while a network learns from what it reads. After an hour of training 1e-4 was better
# than 3e-4 and 1e-3 for ours and for the delta net.
ADAPTING_RATE = 1e-4
RATES = (0.5, 1.0, 2.0)  # learning rates tried first, in units of the contestant's own
MOST_RATES = 6  # tried for one contestant


@dataclass(frozen=True)
class Training:
    """One training: which contestant, its learning rate and seed, minutes of CPU time, and how many
    steps it makes in them. A final one is measured on whole splits."""

    model: str
    lr: float
    seed: int
    minutes: float
    steps: int
    final: bool

    def path(self, out: Path, data: str, block_size: int) -> Path:
        """Where its result lies."""
        end = "" if self.final else "-choice"
        name = full_name(contestant(self.model, block_size), data)
        return out / f"{name}_lr{self.lr:g}_seed{self.seed}_steps{self.steps}{end}.json"


def full_name(entrant: Contestant, data: str) -> str:
    """The contestant's name, with a digest of everything that decides its runs but learning rate,
    seed and steps: a run of other settings has another file. data: of the corpus, `data_digest`."""
    config = entrant.config
    # Seed and learning rate are in the file's name besides; the rest changes no figure.
    unlike = {
        "seed", "lr", "min_lr", "muon_lr", "out_dir", "cache_dir", "log_interval", "eval_interval",
    }  # fmt: skip
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude=unlike)
    shape = getattr(entrant.build, "keywords", {}) | {
        "min_lr": config.min_lr / config.lr,
        "muon_lr": config.muon_lr / config.lr,
    }
    text = json.dumps([settings, shape, data], sort_keys=True)
    return f"{entrant.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def data_digest(corpus: Corpus, batch: int, bf16: bool = False) -> str:
    """A digest of text, tokens, batch size and precision, which are the same for all."""
    parts = [
        corpus.train.digest,
        corpus.validation.digest,
        corpus.test.digest,
        corpus.tokenizer.fingerprint,
        batch,
        "adapted",  # results have this figure
        *(["bf16"] if bf16 else []),
    ]
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:8]


# ===== A run


def bits_per_byte(
    model: nn.Module,
    corpus: Corpus,
    split: str,
    tokens: int | None = None,
    reading: tuple[int, int, str] | None = None,
) -> float:
    """Bits per byte of a split, of its first `tokens` tokens only if given. reading: window, stride
    and context as in `score`; None for windows of block_size side by side."""
    file = getattr(corpus, split)
    ids = file.tokens[:tokens]
    reading = reading or (model.block_size, model.block_size, "window")
    nats = score(model.eval(), ids, *reading)
    size = file.scored_bytes if tokens is None else text_bytes(corpus.tokenizer, ids[1:].tolist())
    return figures(nats, len(ids), size, 1)["bits_per_byte"]


def embedding_parameters(model: nn.Module) -> int:
    """How many numbers the token embedding and the head have together."""
    return sum(p.numel() for p in {model.token_embedding.weight, model.lm_head.weight})


def train_and_measure(
    entrant: Contestant, spec: Training, corpus: Corpus, batch: int, bf16: bool = False,
    weights: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains and measures; returns the figures and the curve of [minutes, tokens, bits per byte of
    validation]. weights: where to write those of a final run."""
    torch.set_num_threads(1)
    torch.manual_seed(spec.seed)
    config = entrant.config.model_copy(update=rates(entrant.config, spec.lr))
    model = entrant.build(config, corpus.vocab_size)
    fill_features(model, corpus.tokenizer)
    model.block_size = config.block_size
    optimizers = make_optimizers(model, config)
    windows = Windows(corpus.train, config.block_size, batch, spec.seed)
    used = 0.0  # seconds of this process's CPU time, without evaluations
    curve = []
    for step in range(spec.steps):
        began = time.process_time()
        model.train()
        torch.manual_seed(spec.seed * 1_000_003 + step)  # for dropout: the same for all
        rate = learning_rate(step, spec.steps, config)
        take_step(model, optimizers, windows.batch(step), rate, config.grad_clip, bf16)
        used += time.process_time() - began
        done = step + 1
        if done * CURVE_POINTS >= spec.steps * (len(curve) + 1):
            measured = bits_per_byte(model, corpus, "validation", CURVE_TOKENS)
            minutes = spec.minutes * done / spec.steps
            curve.append([minutes, done * batch * config.block_size, measured])
    if spec.final and weights is not None:
        save_tensors(own_tensors(model), weights)
    peak = peak_memory("cpu") / 2**20
    return {
        "model": entrant.name, "lr": spec.lr, "seed": spec.seed, "minutes": spec.minutes,
        "optimizer": config.optimizer,
        "parameters": sum(p.numel() for p in model.parameters()),
        "embedding_parameters": embedding_parameters(model),
        "tokens": spec.steps * batch * config.block_size, "seconds": used, "peak_memory_mib": peak,
        "curve": curve,
        "chosen_by": curve[-1][2], "environment": environment(),
    } | (final_figures(model, corpus) if spec.final else {})  # fmt: skip


def read_on(model: nn.Module, corpus: Corpus, split: str) -> float:
    """Bits per byte of a whole split that is read as each network best reads a long text: on and
    on with its state (ours), in long windows (others without a longest text), or in windows of
    block_size of which each begins a quarter after the one before it and scores its last quarter,
    which takes four times as long as windows side by side."""
    longest = getattr(model, "longest", None)
    if longest is not None:
        reading = (longest, max(1, longest // 4), "window")
    elif hasattr(model, "start"):
        reading = (0, 0, "stream")
    else:
        reading = (LONG_WINDOW, LONG_WINDOW, "window")
    return bits_per_byte(model, corpus, split, reading=reading)


def adapted(model: nn.Module, corpus: Corpus, split: str, rate: float = ADAPTING_RATE) -> float:
    """Bits per byte of a whole split, in windows of block_size side by side, by a network that
    takes a step of AdamW on each window after it was scored (dynamic evaluation: Krause et al.,
    "Dynamic evaluation of neural sequence models", 2018). No token is learned from before it was
    scored, and `model` itself stays as it is."""
    model = copy.deepcopy(model).eval()
    # Squared gradients are remembered for 100 windows in place of 1,000, which a text is short for.
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.0)
    file = getattr(corpus, split)
    ids = torch.from_numpy(file.tokens.astype(np.int64))[None]  # (1, n)
    nats = 0.0
    for start in range(0, ids.size(1) - 1, model.block_size):
        window = ids[:, start : start + model.block_size + 1]
        loss, _ = model.loss(window[:, :-1], window[:, 1:])
        nats += loss.item() * (window.size(1) - 1)
        loss.backward()
        clipped_step(model, [optimizer], gradient_norm(model), grad_clip=1.0)
    return figures(nats, ids.size(1), file.scored_bytes, 1)["bits_per_byte"]


# A final run's figures, for each split that was not trained on.
MEASURES = {"bits_per_byte": bits_per_byte, "read_on": read_on, "adapted": adapted}


def final_figures(model: nn.Module, corpus: Corpus) -> dict[str, float]:
    """Bits per byte of the whole splits that were not trained on."""
    return {
        f"{split}_{name}": measure(model, corpus, split)
        for split in ("validation", "test")
        for name, measure in MEASURES.items()
    }


# ===== The table


def make_missing(
    runs: Sequence[Training], paths: dict[Training, Path], jobs: int, arguments: list[str]
) -> dict[Training, dict[str, Any]]:
    """The results of `runs`; those without a file are made now, `jobs` at a time, each in a process
    of its own."""

    def make(spec: Training) -> None:
        text = json.dumps(vars(spec))
        done = subprocess.run(
            [sys.executable, "-m", "research.compare", *arguments, "--run", text],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        if done.returncode:
            raise InputError(
                f"{paths[spec].stem}: the run ended with exit code {done.returncode}; its message"
                " stands above"
            )
        result = json.loads(paths[spec].read_text(encoding="utf-8"))
        print(
            f"{paths[spec].stem}: {result['chosen_by']:.4f} after {result['tokens']:,} tokens",
            flush=True,
        )

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(make, [spec for spec in runs if not paths[spec].exists()]))
    return {spec: json.loads(paths[spec].read_text(encoding="utf-8")) for spec in runs}


def contestants_table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a row for each contestant, the best on validation first."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_model.setdefault(result["model"], []).append(result)
    rows = []
    for name, group in by_model.items():
        first = group[0]
        body = first["parameters"] - first["embedding_parameters"]
        tokens = sum(r["tokens"] for r in group) / len(group)
        names = [f"{split}_{name}" for name in MEASURES for split in ("validation", "test")]
        values = [[r[name] for r in group] for name in names]
        rows.append(
            (
                sum(values[0]) / len(group),
                [
                    name,
                    f"{body / 1e6:.2f}M",
                    f"{first['embedding_parameters'] / 1e6:.2f}M",
                    f"{first['optimizer']} {first['lr']:g}",
                    f"{tokens / 1e6:.2f}M",
                    f"{tokens / first['seconds']:,.0f}",
                    f"{max(r['peak_memory_mib'] for r in group):.0f}",
                    *map(mean_deviation, values),
                ],
            )
        )
    header = [
        "model", "parameters", "+ embeddings", "optimizer, lr", "tokens", "tokens/s", "MiB",
        "validation bits/byte", "test bits/byte", "validation, read on", "test, read on",
        "validation, adapted", "test, adapted (runs)",
    ]  # fmt: skip
    return markdown_table(header, [row for _, row in sorted(rows)])


def leads(results: Sequence[dict[str, Any]]) -> dict[str, tuple[list[float], np.ndarray]]:
    """How far the first contestant's runs lie below each other one's along their curves.

    By the other's name: the minutes of the first one's points, and bits per byte (seeds, points)
    for the seeds that both have. The curves are measured on the same text, so a difference of two
    runs of one seed is less uncertain than either run.
    """
    curves: dict[str, dict[int, list]] = {}
    for result in results:
        curves.setdefault(result["model"], {})[result["seed"]] = result["curve"]
    first, *others = curves
    minutes = [point[0] for point in results[0]["curve"]]

    def bits(name: str, seed: int) -> np.ndarray:
        at, _, values = zip(*curves[name][seed], strict=True)
        return np.interp(minutes, at, values, left=math.nan)  # not before its first point

    lead = {}
    for other in others:
        seeds = sorted(set(curves[first]) & set(curves[other]))
        lead[other] = minutes, np.stack([bits(other, s) - bits(first, s) for s in seeds])
    return lead


def draw_curves(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Bits per byte of validation against minutes of CPU time and against tokens, which separates
    speed from learning, each run thin, each contestant a colour; and the first contestant's lead
    over each other one against minutes, the mean of the seeds and from the least to the most."""
    names = list(dict.fromkeys(result["model"] for result in results))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    lead = leads(results)
    figure = new_figure(6 * (3 if lead else 2), 4.5)
    panels = figure.subplots(1, 3 if lead else 2)
    for result in results:
        minutes, tokens, bits = zip(*result["curve"], strict=True)
        name = result["model"]
        style = {"color": colours[name], "marker": "o", "markersize": 3, "alpha": 0.7}
        label = plain(name) if result["seed"] == results[0]["seed"] else None
        panels[0].plot(minutes, bits, label=label, **style)
        panels[1].plot([n / 1e6 for n in tokens], bits, **style)
    panels[0].set(xlabel="minutes of CPU time, one thread", ylabel="bits per byte (validation)")
    panels[1].set(xlabel="million tokens", ylabel="bits per byte (validation)")
    panels[0].legend()
    for name, (minutes, bits) in lead.items():
        panels[2].plot(minutes, bits.mean(0), color=colours[name], label=plain(f"below {name}"))
        panels[2].fill_between(minutes, bits.min(0), bits.max(0), color=colours[name], alpha=0.2)
    if lead:
        panels[2].axhline(0, color="grey", linewidth=0.8)
        panels[2].set(
            xlabel="minutes of CPU time, one thread",
            ylabel=f"lead of {plain(names[0])}, bits per byte",
        )
        panels[2].legend()
    for axes in panels:
        axes.grid(alpha=0.3)
    save_figure(figure, path)


@contextlib.contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Holds the folder's lock: two commands on one table would make the same runs."""
    with open(out / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"out: another process is working in {out}; wait for it, or give another folder"
            ) from None
        yield


def read_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--out",
        default="logs/compare",
        help="folder of the runs, table.md and compare.png (default logs/compare)",
    )
    models = ["released", "llama", "llama-muon", "mamba2"]
    parser.add_argument(
        "--models",
        nargs="+",
        default=models,
        metavar="MODEL",
        help=f"{KNOWN} (default {' '.join(models)})",
    )
    parser.add_argument("--dataset", default="pydoc", help="as in train.py (default pydoc)")
    parser.add_argument(
        "--vocab_size", type=int, default=2048, help="of the SentencePiece tokenizer (default 2048)"
    )
    parser.add_argument(
        "--cache_dir", default="cache", help="folder of the token files (default cache)"
    )
    parser.add_argument(
        "--block_size", type=int, default=256, help="tokens in a window (default 256)"
    )
    parser.add_argument("--batch", type=int, default=8, help="windows in a step (default 8)")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="train in autocast to bf16, as train.py does where a CPU has instructions for it",
    )
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="CPU time of a final run (default 5)"
    )
    parser.add_argument(
        "--choice_minutes",
        type=float,
        default=1.5,
        help="CPU time of a run to choose lr by (default 1.5); 0 = its own",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="final runs of each contestant (default 3)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, a thread each (default 1)"
    )
    parser.add_argument(
        "--runs", metavar="FILE", help="put the table into this Markdown file too, such as runs.md"
    )
    parser.add_argument(
        "--run", metavar="JSON", help="make this one run (the command starts itself so for each)"
    )
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    above_zero = args.minutes > 0 and min(args.seeds, args.jobs, args.batch) >= 1
    if not above_zero or args.choice_minutes < 0:
        raise InputError("minutes, seeds, jobs and batch must be above 0, choice_minutes not below")
    if args.bf16 and not cpu_multiplies_bf16():
        raise InputError("bf16: this CPU would imitate it, slowly; leave it out")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    keys = {key: getattr(args, key) for key in ("dataset", "vocab_size", "cache_dir", "block_size")}
    data = make_config(keys | {"tokenizer": "sentencepiece"}, "command line", keys)
    entrants = {model: contestant(model, args.block_size) for model in args.models}
    corpus = prepare(data)
    digest = data_digest(corpus, args.batch, args.bf16)
    if args.run:
        spec = Training(**json.loads(args.run))
        path = spec.path(out, digest, args.block_size)
        entrant = contestant(spec.model, args.block_size)
        weights = path.with_suffix(".safetensors")
        result = train_and_measure(entrant, spec, corpus, args.batch, args.bf16, weights)
        write_whole(path, json.dumps(result, indent=1).encode())
        return
    if set(args.models) & set(FOREIGN):
        transformers_library()
    with folder_lock(out):
        names = {model: full_name(entrant, digest) for model, entrant in entrants.items()}
        timers = {
            names[m]: step_timer(entrant.build, entrant.config, corpus, args.batch, args.bf16)
            for m, entrant in entrants.items()
        }
        timed = seconds_of_each(timers, out / "speed.json")
        seconds = {model: timed[name] for model, name in names.items()}
        make_table(args, out, entrants, digest, seconds)


def make_table(
    args: argparse.Namespace,
    out: Path,
    entrants: dict[str, Contestant],
    digest: str,
    seconds: dict[str, float],
) -> None:
    """Makes all runs that are missing, and after each seed the table and the picture in `out`.

    entrants: by what --models calls them; digest: of the corpus; seconds: of each one's step.
    """

    def runs(
        rates: Sequence[tuple[str, float]], seed: int, minutes: float, final: bool
    ) -> list[Training]:
        return [
            Training(model, lr, seed, minutes, steps_in(minutes, seconds[model]), final)
            for model, lr in rates
        ]

    def make(runs: list[Training]) -> dict[Training, dict[str, Any]]:
        return make_missing(
            runs, {r: r.path(out, digest, args.block_size) for r in runs}, args.jobs, sys.argv[1:]
        )

    tried = {}
    best = {model: entrant.config.lr for model, entrant in entrants.items()}
    if args.choice_minutes:
        tried, best = choose_rates(
            entrants, lambda rates: make(runs(rates, 0, args.choice_minutes, False))
        )
    results = []
    for seed in range(1, args.seeds + 1):
        results += make(runs(list(best.items()), seed, args.minutes, True)).values()
        section = section_of(args, entrants, tried, best, results)
        (out / "table.md").write_text(section, encoding="utf-8")
        draw_curves(results, out / "compare.png")
    print(section)
    if args.runs:
        put_first(Path(args.runs), section)


def choose_rates(
    entrants: dict[str, Contestant], make: Callable
) -> tuple[dict[Training, dict], dict[str, float]]:
    """All short runs, which `make` makes of pairs of model and rate, and by model the rate of the
    best: it lies between two worse ones, unless MOST_RATES were tried."""
    tried: dict[Training, dict[str, Any]] = {}
    best: dict[str, float] = {}
    wanted = [
        (model, entrant.config.lr * rate) for rate in RATES for model, entrant in entrants.items()
    ]
    while wanted:
        tried |= make(wanted)
        wanted = []
        for model in entrants:
            bits = {r.lr: result["chosen_by"] for r, result in tried.items() if r.model == model}
            # A run that diverged has no figure to compare.
            bits = {lr: value if math.isfinite(value) else math.inf for lr, value in bits.items()}
            lr = min(bits, key=bits.__getitem__)
            best[model] = lr
            if len(bits) < MOST_RATES and lr in (min(bits), max(bits)):
                wanted.append((model, lr * 2 if lr == max(bits) else lr / 2))
    return tried, best


def section_of(
    args,
    entrants: dict[str, Contestant],
    tried: dict[Training, dict],
    best: dict[str, float],
    results: list[dict],
) -> str:
    """The section for runs.md: how it was measured, the table, the tried learning rates."""
    machine = results[-1]["environment"]
    choices = [
        [
            entrants[r.model].name,
            f"{r.lr:g}",
            f"{tried[r]['chosen_by']:.4f}",
            "chosen" if best[r.model] == r.lr else "",
        ]
        for r in sorted(tried, key=lambda r: (args.models.index(r.model), r.lr))
    ]
    precision = "bf16" if args.bf16 else "fp32"
    chosen = "Each has its own learning rate."
    tried_rates = ""
    if choices:
        tried_rates = markdown_table(["model", "lr tried", "validation bits/byte", ""], choices)
        chosen = (
            f"A learning rate was chosen for each by runs of {args.choice_minutes:g} minutes on"
            f" {CURVE_TOKENS:,} tokens of validation; Muon's rate for matrices goes along with it."
        )
    command = " ".join(["python -m research.compare", *sys.argv[1:]])
    return (
        f"## Equal CPU time: {' '.join(entrant.name for entrant in entrants.values())}"
        f" ({machine['date'][:10]})\n\n`{command}` at commit {machine['commit']}, torch"
        f" {machine['torch']}, {machine['machine']}.\n{args.minutes:g} minutes of CPU time each, as"
        f" steps that were timed in turn, one thread, {precision}; SentencePiece {args.vocab_size},"
        f" windows of {args.block_size}, {args.batch} in a step; measured in such windows side by"
        " side over whole splits, and read on: ours with its state, others without a longest text"
        f" in windows of {LONG_WINDOW}, a Transformer in windows that begin a quarter after each"
        " other and score their last quarter. Adapted: in windows side by side, and after each a"
        f" step of AdamW at {ADAPTING_RATE:g} on it. Mean ± sample standard deviation (runs)."
        f" {chosen}\n\n{contestants_table(results)}\n"
    ) + tried_rates


if __name__ == "__main__":
    run_command(main)
