"""Trains variants of a config with several seeds each and says which differences exceed the noise.

    python -m research.ablate --config configs/quickstart.json --tokens 500000 --try recall_heads=1
    python -m research.ablate --minutes 1 --file variants.json --out logs/ablation --jobs 2

A variant is the config with some keys changed; the first, `baseline`, has none changed. Each run is
one of train.py, in a folder of its own, so the same command again takes up what was stopped and
makes what is missing. With --minutes each variant gets as many steps as it can make in that CPU
time on one thread, timed once, in turn with the other variants.

The rule: Dunnett's test of all variants against the baseline (two-sided, one variance for all), on
bits per byte of the whole validation split. Runs of one seed read the same data in the same order
and begin alike, so what a seed does to all variants is taken out first (a randomised block design).
With probability 95% none of the differences called better or worse is by chance of the seed alone.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.command import InputError, Parser, run_command
from common.figures import new_figure, plain, save_figure
from common.files import parse_json, read_json
from config import Config, load_config, make_config, save_config
from data.prepare import differences, prepare, read_data_file
from model import build_model
from research.tables import markdown_table, mean_deviation, put_first
from research.timing import seconds_of_each, step_timer, steps_in
from training.record import Record

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
BASELINE = "baseline"
SIGNIFICANCE = 0.05  # of all verdicts together
# Keys that don't belong to a variant: runs of one differ in them, or they change no figure.
NOT_OF_A_VARIANT = {"seed", "out_dir", "cache_dir", "max_steps"}


@dataclass(frozen=True)
class Variant:
    """A config, and its name: the keys in which it differs from the baseline."""

    name: str
    config: Config

    @property
    def key(self) -> str:
        """The name of its folder: some words, and a digest of every setting."""
        settings = self.config.model_dump(
            mode="json", exclude_defaults=True, exclude=NOT_OF_A_VARIANT
        )
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return re.sub(r"[^\w.]+", "-", self.name).strip("-")[:60] + "-" + digest


def parse_overrides(text: str) -> dict[str, Any]:
    """The keys and values of "key=value key=value". A value that is not JSON is text. Raises
    `InputError` for a part without "="."""
    values = {}
    for part in text.split():
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(
                f"try: {part} must be KEY=VALUE; several are separated by spaces, and lists have"
                " none inside"
            )
        try:
            values[key] = parse_json(value, key)
        except InputError:
            values[key] = value  # text, as its key's type says or does not
    return values


def read_variants(base: Config, tries: Sequence[str], file: str | None) -> list[Variant]:
    """The baseline, and the variants of --try and of the JSON file {name: {key: value, …}, …}.
    Raises `InputError` where there is none, or one is not a valid config."""
    changes = {text: parse_overrides(text) for text in tries}
    for name, values in (read_json(Path(file)) if file else {}).items():
        if not isinstance(values, dict):
            raise InputError(f"{file}: {name} must be an object of keys and values")
        changes[name] = values
    if not changes:
        raise InputError("try: no variants; give --try KEY=VALUE or --file FILE")
    settings = base.model_dump()
    return [
        Variant(BASELINE, base),
        *(
            Variant(name, make_config(settings | values, name))
            for name, values in changes.items()
            if name != BASELINE
        ),
    ]


def steps_of(variants: Sequence[Variant], args: argparse.Namespace, out: Path) -> dict[str, int]:
    """How many steps each variant gets, by name: as many as --tokens fill, or as it makes in
    --minutes."""
    batches = {v.name: v.config.micro_batch_size * v.config.grad_accum for v in variants}
    if args.tokens:
        return {
            v.name: max(1, args.tokens // (batches[v.name] * v.config.block_size)) for v in variants
        }
    corpus = prepare(variants[0].config)
    timers = {v.key: step_timer(build_model, v.config, corpus, batches[v.name]) for v in variants}
    each = seconds_of_each(timers, out / "speed.json")
    return {v.name: steps_in(args.minutes, each[v.key]) for v in variants}


# ===== Runs


def latest_run(parent: Path) -> Path | None:
    """The run in `parent`, finished or not; None where there is none."""
    found = sorted(path.parent for path in parent.glob("*/config.json"))
    return found[-1] if found else None


def result_of(folder: Path | None) -> dict[str, Any] | None:
    """The figures at the end of a run; None for one that has not ended."""
    results = Record(folder).metrics("result") if folder else []
    return results[-1] if results else None


def check_same_text(folder: Path, config: Config) -> None:
    """Raises `InputError` where the run in `folder` was trained on another text than `config` reads
    now: its figure beside that of a new run would compare the texts, not the variants."""
    kept = read_data_file(folder)
    if kept and (different := differences(kept, prepare(config, lambda line: None))):
        raise InputError(
            f"{folder} was not trained on this: {'; '.join(different)}. Restore it, or give another"
            " --out"
        )


def make_run(variant: Variant, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """The figures of one run, which is read where it has ended, else resumed or made now. Raises
    `InputError` where train.py fails."""
    parent = out / variant.key / f"seed{seed}_steps{steps}"
    folder = latest_run(parent)
    if (result := result_of(folder)) is not None:
        check_same_text(folder, variant.config)
        return result
    parent.mkdir(parents=True, exist_ok=True)
    if folder:
        command = ["--resume", str(folder)]
    else:
        config = variant.config.model_copy(
            update={"seed": seed, "max_steps": steps, "out_dir": str(parent)}
        )
        save_config(config, parent / "asked.json")
        command = ["--config", str(parent / "asked.json")]
    with open(parent / "output.txt", "a", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, str(TRAIN), *command],
            stdout=output,
            stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
    result = result_of(latest_run(parent))
    if done.returncode or result is None:
        raise InputError(
            f"{variant.name}: train.py ended with exit code {done.returncode}; see"
            f" {parent / 'output.txt'}"
        )
    print(f"{variant.name}, seed {seed}: {result['val_bits_per_byte']:.4f}", flush=True)
    return result


# ===== Verdicts


def chances(results: dict[str, list[float]]) -> dict[str, float]:
    """For each variant the probability, under Dunnett's test (1955) in blocks, of so large a
    difference from the baseline by chance alone. Empty with fewer than two seeds, and where there
    is nothing to compare.

    results: bits per byte of each variant, in the order of the seeds, which are the same for all.

    With k variants and n seeds, t = (mean − baseline's) / (s √(2/n)), where s² is what is left of
    the squares after the means of variants and seeds, over (k − 1)(n − 1); under chance alone all t
    together are multivariate t, any two correlated by ½."""
    from scipy.stats import multivariate_t  # optional, and slow to import

    names = [name for name in results if name != BASELINE]
    if not names or BASELINE not in results or len(results[BASELINE]) < 2:
        return {}
    bits = np.array([results[name] for name in (BASELINE, *names)])  # (k, n)
    k, n = bits.shape
    means = bits.mean(1)
    left = bits - means[:, None] - bits.mean(0) + bits.mean()
    degrees = (k - 1) * (n - 1)
    differences = np.abs(means[1:] - means[0])
    noise = np.sqrt(2 / n * np.square(left).sum() / degrees)
    # Without any noise (s = 0) t of a difference is infinite, and t of no difference is 0.
    t = np.divide(differences, noise, out=np.where(differences > 0, np.inf, 0.0), where=noise > 0)
    together = multivariate_t(shape=(np.eye(k - 1) + 1) / 2, df=degrees, seed=0)
    within = [together.cdf(np.full(k - 1, x), lower_limit=np.full(k - 1, -x)) for x in t]
    return {name: float(1 - p) for name, p in zip(names, within, strict=True)}


def verdict(difference: float, chance: float | None) -> str:
    """The words for a difference from the baseline in bits per byte. chance: its probability by
    chance alone, from `chances`; None where there were too few runs for one."""
    if chance is None:
        return "too few runs"
    if chance >= SIGNIFICANCE:
        return f"within the noise (p {chance:.2f})"
    return f"{'better' if difference < 0 else 'worse'} (p {chance:.3f})"


def section_of(
    runs: dict[str, list[dict[str, Any]]], variants: Sequence[Variant], budget: str
) -> str:
    """The section for runs.md, the best variant first."""
    bits = {name: [r["val_bits_per_byte"] for r in group] for name, group in runs.items()}
    chance = chances(bits)
    base = statistics.mean(bits[BASELINE]) if BASELINE in bits else None
    config = variants[0].config
    rows = []
    for name in sorted(bits, key=lambda name: statistics.mean(bits[name])):
        group = runs[name]
        environment = read_json(Path(group[0]["run_dir"]) / "env.json")
        difference = statistics.mean(bits[name]) - base if base is not None else 0.0
        memory = max(r.get("peak_memory_mib", math.nan) for r in group)  # Windows does not say
        called = ""
        if name != BASELINE:
            called = f"{difference:+.4f}: {verdict(difference, chance.get(name))}"
        rows.append([
            environment["date"][:10], environment["commit"] or "-", name, config.dataset,
            group[0]["tokenizer"],
            f"{group[0]['parameters'] / 1e6:.2f}M", f"{group[0]['training_tokens'] / 1e6:.2f}M",
            f"{statistics.mean(r['seconds'] for r in group):.0f} s", f"{memory:.0f} MiB",
            mean_deviation(bits[name]), called, str(Path(group[0]["run_dir"]).parent.parent.name),
        ])  # fmt: skip
    header = [
        "date", "commit", "config difference", "data", "tokenizer", "parameters", "tokens", "time",
        "memory", "bits/byte ± deviation (runs)", "verdict", "folder",
    ]  # fmt: skip
    return (
        f"## Ablation of {Path(config.dataset).name}, {budget}\n\n`python -m research.ablate"
        f" {' '.join(sys.argv[1:])}`\n\nBits per byte of the whole validation split. Verdicts by"
        f" Dunnett's test against the baseline in blocks of one seed, two-sided, {SIGNIFICANCE:.0%}"
        " for all together; time is of the clock, of runs side by side.\n\n"
        + markdown_table(header, rows)
    )


def draw_runs(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Each run's bits per byte, a line for each variant, the best at the top."""
    bits = {name: [r["val_bits_per_byte"] for r in group] for name, group in runs.items()}
    names = sorted(bits, key=lambda name: statistics.mean(bits[name]), reverse=True)
    figure = new_figure(8, 1 + 0.35 * len(names))
    axes = figure.subplots()
    for row, name in enumerate(names):
        axes.plot(
            bits[name],
            [row] * len(bits[name]),
            "o",
            color="C1" if name == BASELINE else "C0",
            alpha=0.6,
        )
        axes.plot(statistics.mean(bits[name]), row, "|", color="black", markersize=14)
    if BASELINE in bits:
        axes.axvline(statistics.mean(bits[BASELINE]), color="C1", linewidth=1, alpha=0.6)
    axes.set_yticks(range(len(names)), map(plain, names))
    axes.set(xlabel="bits per byte (validation): runs, and their mean")
    axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)


def read_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--config", default="config.json", help="JSON file of the baseline (default config.json)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="keys of the baseline put over the file's",
    )
    parser.add_argument(
        "--try", nargs="+", default=[], dest="tries", metavar="'KEY=VALUE …'", help="variants"
    )
    parser.add_argument("--file", help="JSON file of more variants: {name: {key: value, …}, …}")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default 3)")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--tokens", type=int, help="training tokens of each run")
    budget.add_argument(
        "--minutes", type=float, help="training minutes of each run, of CPU time on one thread"
    )
    parser.add_argument(
        "--out", default="logs/ablation", help="folder of the runs, table.md and ablation.png"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, a thread each (default 1)"
    )
    parser.add_argument(
        "--runs", metavar="FILE", help="put the table into this Markdown file too, such as runs.md"
    )
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    size = args.minutes if args.tokens is None else args.tokens
    if args.seeds < 1 or args.jobs < 1 or size <= 0:
        raise InputError("seeds, jobs, tokens and minutes must be above 0")
    if importlib.util.find_spec("scipy") is None:  # asked before the runs are made, not after
        raise InputError("ablate: the verdicts need the package scipy; pip install '.[research]'")
    base = load_config(args.config, **parse_overrides(" ".join(args.set)))
    if args.minutes is not None:
        # Steps are timed in fp32, so they are made in fp32.
        base = base.model_copy(update={"use_amp": False})
    variants = read_variants(base, args.tries, args.file)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    prepare(base)  # once, before several processes want it
    steps = steps_of(variants, args, out)
    if args.tokens is None:
        budget = f"{args.minutes:g} minutes of CPU time a run"
    else:
        budget = f"{args.tokens:,} tokens a run"
    runs: dict[str, list[dict[str, Any]]] = {}
    section = ""
    for seed in range(1, args.seeds + 1):
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(lambda v: make_run(v, seed, steps[v.name], out), variants))  # noqa: B023
        for variant, result in zip(variants, results, strict=True):
            runs.setdefault(variant.name, []).append(result)
        section = section_of(runs, variants, budget)
        (out / "table.md").write_text(section, encoding="utf-8")
        draw_runs(runs, out / "ablation.png")
    print(section)
    if args.runs:
        put_first(Path(args.runs), section)


if __name__ == "__main__":
    run_command(main)
