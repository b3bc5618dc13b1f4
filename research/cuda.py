"""What a GPU does with this code, in some minutes: training beside its floor, decoding, commands.

    python -m research.cuda --out DIR                        # five minutes on an H100
    python -m research.cuda --out DIR --only ceilings,train  # some of its sections

Sections are independent, each has a budget of seconds, and DIR/results.json is written after each,
so that a run cut short keeps what it has. No text is needed: tokens are random. `pytest -m cuda`
asks whether numbers are right; this asks how fast.

How to read it: "host_ms" close to "ms" means that launching is the limit. A step beside its floor
says what is left to gain: see `floor_ms`.
"""

import fcntl
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from common.command import Parser, run_command
from common.device import free
from common.files import write_whole
from config import load_config
from data.prepare import Corpus
from layers.memory import AssociativeMemory
from research import cuda_decoding
from research.timing import mean_ms, median_ms
from research.training_speed import plain_loss
from training import trainer as training
from training.distributed import World
from training.profiling import PARTS

ROOT = Path(__file__).resolve().parents[1]

DEVICE = "cuda"
STEPS = 10  # of a training step's timing: enough for a median beside a step of some ms
TOKENS = 400_000  # of the random text: more than all steps read


class Results(dict):
    """Figures by section and name, in a file that is written whole after every section."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def row(self, section: str, name: str) -> dict:
        """A section's figures of one thing, to be filled."""
        return self.setdefault(section, {}).setdefault(name, {})

    def save(self) -> None:
        """Writes all figures so far, whole or not at all."""
        text = json.dumps(self, indent=1, default=str)
        write_whole(self.folder / "results.json", text.encode())


# ===== The card


def ceilings(results: Results) -> None:
    """Bytes a second of a copy (read and written) and of a sum, and operations a second of large
    products."""
    card = results.row("card", "ceilings")
    big, copy = torch.randn(2, 2**29, device=DEVICE)
    nbytes = big.nbytes
    card["copy_gb_s"] = 2 * nbytes / median_ms(lambda big=big, copy=copy: copy.copy_(big))[0] / 1e6
    card["read_gb_s"] = nbytes / median_ms(lambda big=big: big.sum())[0] / 1e6
    del big, copy
    free()
    for kind in (torch.float16, torch.bfloat16):
        x, y = torch.randn(2, 8192, 8192, device=DEVICE).to(kind)
        card[f"tflops_{str(kind)[6:]}"] = 2 * 8192**3 / median_ms(lambda x=x, y=y: x @ y)[0] / 1e9
    # config.json's own shapes: 2,048 tokens through a mixer, into the MLP and out of it
    for m, n, k in ((2048, 2048, 2048), (2048, 40960, 2048), (2048, 2048, 40960)):
        x, y = (torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16) for rows in (m, n))
        card[f"tflops_{m}x{n}x{k}"] = 2 * m * n * k / median_ms(lambda x=x, y=y: x @ y.T)[0] / 1e9


# ===== Training


class RandomTokens:
    """A split of random tokens, with what a trainer reads of one."""

    def __init__(self, n: int, vocab_size: int):
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, n).astype(np.uint16)
        self.n_tokens = n
        self.n_bytes = 4 * n  # about as many as a text's
        self.n_words = n
        self.parts = [n]
        self.document_starts = np.arange(0, n, 5000)

    def __len__(self) -> int:
        return self.n_tokens


class NoTokenizer:
    """What a trainer reads of a tokenizer, for tokens that are no text."""

    name = "none"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


class Notes:
    """In the place of a run's record: keeps what a trainer says."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines: list[str] = []
        self.quiet = True

    def say(self, line: str) -> None:
        """Keeps a line that a run would print."""
        self.lines.append(line)


def make_trainer(file: str, vocab_size: int, folder: Path, **changes) -> training.Trainer:
    """A trainer of `file` with some keys changed, its weights made on the device, which is faster
    than on a CPU."""
    config = load_config(ROOT / file, **({"compile": False} | changes))
    corpus = Corpus(
        "none",
        "random tokens",
        "nothing",
        NoTokenizer(vocab_size),
        *(RandomTokens(TOKENS, vocab_size) for _ in range(3)),
    )
    build = training.build_model

    def build_there(*arguments):
        with torch.device(DEVICE):
            return build(*arguments)

    training.build_model = build_there
    try:
        return training.Trainer(config, Notes(folder), corpus, World(DEVICE))
    finally:
        training.build_model = build


@contextmanager
def undisturbed():
    """Within it no other run of this file times anything: one that compiles may go on beside one
    that times."""
    with open(Path(tempfile.gettempdir()) / "waveletlm-cuda.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def step_figures(trainer: training.Trainer, tokens: int, n: int = STEPS) -> dict:
    """Time, memory and loss of a training step of so many tokens, the mean of n of them."""
    torch.cuda.reset_peak_memory_stats()
    with undisturbed():
        # After EAGER_STEPS steps the trainer captures a CUDA graph, where it may.
        ms = mean_ms(trainer.take_step, n, training.EAGER_STEPS + 2)
        _, host = median_ms(trainer.take_step, 5, 1)
    peak = torch.cuda.max_memory_allocated() / 2**30
    loss = float(trainer.take_step()[0])
    return {
        "ms": ms,
        "host_ms": host,
        "tokens_per_s": 1e3 * tokens / ms,
        "peak_gib": peak,
        "loss": loss,
        "said": trainer.record.lines,
    }


def write_profile(call: Callable[[], object], path: Path, n: int = 3) -> None:
    """The kernels of n calls, the costliest first, and the sums of their device time by part of the
    step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(n):
            call()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    kernels = [e for e in events if str(e.device_type).endswith("CUDA")]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    lines = [f"{n} calls; ms a call, launches a call, kernel"]
    total = sum(e.self_device_time_total for e in kernels)
    lines.append(f"{total / 1e3 / n:9.3f} {sum(e.count for e in kernels) / n:7.0f}  all kernels")
    lines += [
        f"{e.self_device_time_total / 1e3 / n:9.3f} {e.count / n:7.0f}  {e.key[:150]}"
        for e in kernels[:60]
    ]
    lines += [
        f"{e.cpu_time_total / 1e3 / n:9.3f}  {e.key}, on the host" for e in events if e.key in PARTS
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def floor_ms(trainer: training.Trainer, results: Results) -> float:
    """Milliseconds that config.json's step takes at least: 10.1 TFLOP of products, then the bytes
    that have to move besides: 21 GB in the optimizer's pass and the norm, 10 GB of weights and
    gradients, 13 GB of activations and memory rows."""
    card = {"tflops_bfloat16": 600, "copy_gb_s": 3000}  # an H100's
    if "card" in results:
        card = results["card"]["ceilings"]
    return 10.1e3 / card["tflops_bfloat16"] + 44e3 / card["copy_gb_s"]


@contextmanager
def plain_version(trainer: training.Trainer):
    """Within it the trainer computes the loss the way one would write it down first
    (research/training_speed.py), and steps with torch's optimizer of one kernel for each list of
    tensors."""
    loss = trainer.loss
    trainer.loss = lambda ids, targets, state: (plain_loss(trainer.model, ids, targets), None)
    try:
        with torch.device(DEVICE):  # it makes its constants where tensors are made
            yield
    finally:
        trainer.loss = loss


def train(results: Results) -> None:
    """config.json's step in each type, eager, beside the plain version's in bf16."""
    for name, changes in {
        "fp16": {}, "bf16": {"amp_dtype": "bf16"}, "bf16, no CUDA graph": {"amp_dtype": "bf16",
        "cuda_graph": False},
        "fp32, products in TF32": {"use_amp": False},
    }.items():  # fmt: skip
        trainer = make_trainer("config.json", 50257, results.folder, **changes)
        results.row("train config.json", name).update(
            step_figures(trainer, trainer.tokens_per_step)
        )
        if name == "bf16, no CUDA graph":
            results.row("train config.json", "floor")["ms"] = floor_ms(trainer, results)
            write_profile(trainer.take_step, results.folder / "profile_train_bf16.txt")
            with plain_version(trainer):
                results.row("train config.json", "plain bf16").update(
                    step_figures(trainer, trainer.tokens_per_step, 5)
                )
        del trainer
        free()
        results.save()


def compiled(results: Results) -> None:
    """config.json's step compiled, as train.py takes it."""
    compiled_step(results, "bf16", amp_dtype="bf16")


def compiled_fp8(results: Results) -> None:
    """The same in fp8, where torchao is installed."""
    compiled_step(results, "fp8", amp_dtype="fp8")


def compiled_step(results: Results, name: str, **changes) -> None:
    """config.json's step with some keys changed, compiled, and its profile."""
    began = time.time()
    trainer = make_trainer("config.json", 50257, results.folder, compile=True, **changes)
    row = results.row("train config.json", f"{name} compiled")
    row["compile_s"] = time.time() - began
    row.update(step_figures(trainer, trainer.tokens_per_step))
    with undisturbed():
        write_profile(trainer.take_step, results.folder / f"profile_train_{name}_compiled.txt")


def others(results: Results) -> None:
    """Training steps of the other recipes, and the milliseconds of Muon's part in them."""
    for name, file, vocab_size, changes in (
        ("best-small", "configs/best-small.json", 32000, {"amp_dtype": "bf16"}),
        ("quickstart", "configs/quickstart.json", 2048, {}),
        (
            "best-large, no checkpointing",
            "configs/best-large.json",
            50257,
            {"grad_accum": 1, "gradient_checkpointing": False},
        ),
        ("best-large, checkpointing", "configs/best-large.json", 50257, {"grad_accum": 1}),
    ):
        trainer = make_trainer(file, vocab_size, results.folder, **changes)
        row = results.row("train others", name)
        row.update(step_figures(trainer, trainer.tokens_per_step, 5 if "large" in name else STEPS))
        if len(trainer.optimizers) > 1:
            for p in trainer.model.parameters():
                p.grad = torch.zeros_like(p)
            row["muon_ms"] = median_ms(trainer.optimizers[0].step, 3, 1)[0]
            trainer.model.zero_grad()
        write_profile(trainer.take_step, results.folder / f"profile_{name.partition(',')[0]}.txt")
        del trainer
        free()
        results.save()


def small_compiled(results: Results) -> None:
    """best-small's step compiled, also as a CUDA graph, where launching is the limit."""
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        began = time.time()
        trainer = make_trainer(
            "configs/best-small.json",
            32000,
            results.folder,
            amp_dtype="bf16",
            compile=True,
            compile_mode=mode,
            grad_accum=2,
        )
        row = results.row("train others", f"best-small compiled, {mode}, 2 parts")
        row["compile_s"] = time.time() - began
        row.update(step_figures(trainer, trainer.tokens_per_step))
        del trainer
        free()


# ===== The associative memory alone


def memory(results: Results) -> None:
    """An associative memory of configs/best-30m.json, forward and back over its batch in bf16: by
    torch's operations and by our kernels, plain and compiled, and how far the gradients are
    apart."""
    config = load_config(ROOT / "configs/best-30m.json")
    with torch.device(DEVICE):
        module = AssociativeMemory(config)
        with torch.no_grad():
            # else rates are the same at all positions, and queries those of the keys
            module.forget_write.weight.normal_(std=0.02)
            module.query_key.weight.add_(torch.randn_like(module.query_key.weight), alpha=0.02)
        h = torch.randn(config.micro_batch_size, config.block_size, config.C, requires_grad=True)
        of_out = torch.randn_like(h)
    inputs = [h, *module.parameters()]

    def gradients(forward: Callable) -> list[torch.Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16):
            out, _ = forward(h, module.start(len(h), h))
        return torch.autograd.grad((out * of_out).sum(), inputs)

    wanted: list[torch.Tensor] = []
    for name, by_kernels, is_compiled in (
        ("torch", False, False), ("torch, compiled", False, True),
        ("kernels", True, False), ("kernels, compiled", True, True),
    ):  # fmt: skip
        torch._dynamo.reset()
        with mock.patch("layers.memory.has_kernels", lambda q, value=by_kernels: value):
            forward = torch.compile(module.forward) if is_compiled else module.forward
            row = results.row("associative memory", name)
            began = time.time()
            found = gradients(forward)
            row["first_s"] = time.time() - began
            wanted = wanted or found
            pairs = zip(found, wanted, strict=True)
            row["error"] = max(cuda_decoding.relative_error(f, w) for f, w in pairs)
            with undisturbed():
                row["ms"] = mean_ms(lambda forward=forward: gradients(forward), STEPS)
            file = f"profile_memory_{name.replace(', ', '_')}.txt"
            write_profile(lambda forward=forward: gradients(forward), results.folder / file)
        results.save()


# ===== The commands of a user


def run_script(log: TextIO, *arguments: object, limit: int = 90) -> tuple[int, str]:
    """Runs one of the commands, for `limit` seconds at the most, and writes the ends of its output
    to `log`; returns its exit code (124 when time was up) and what it printed."""
    began = time.time()
    words = [str(a) for a in arguments]
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=limit
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:
        code, out, err = 124, str(stopped.stdout), str(stopped.stderr)
    seconds = time.time() - began
    log.write(f"$ {' '.join(words)}\n{out[-3000:]}\n{err[-2000:]}\n[{code}] {seconds:.1f} s\n")
    log.flush()
    return code, out


def commands(results: Results) -> None:
    """train, resume, generate, quantize and evaluate as a user runs them, on the documentation that
    comes with Python."""
    work = Path(tempfile.mkdtemp())
    base = [
        "train.py", "--config", "configs/quickstart.json", "--tokenizer", "bytes",
        "--cache_dir", work / "cache", "--eval_tokens", 4096, "--num_new_tokens", 20,
        "--sample_tokens", 8, "--max_steps", 60, "--eval_interval", 60,
    ]  # fmt: skip
    runs = {
        "fp16": [],
        "compiled": ["--compile", "true"],
        "muon bf16": ["--amp_dtype", "bf16", "--optimizer", "Muon"],
        "adagrad": ["--optimizer", "Adagrad", "--lr", 0.01],
    }
    kept = ("step 60", "tokens_per_second", "peak", "skipped", "test_bits", "not compiled")
    rows = results.setdefault("commands", {})
    with (results.folder / "commands.txt").open("a", encoding="utf-8") as log:
        for name, more in runs.items():
            folder = work / name.replace(" ", "_")
            code, text = run_script(log, *base, "--out_dir", folder, *more)
            lines = [line for line in text.splitlines() if line.startswith(kept)]
            rows[f"train {name}"] = [code, lines]
        folder = next((work / "fp16").iterdir())
        for arguments in (
            ["generate.py", "--checkpoint", folder, "--num_tokens", 50, "--metrics"],
            ["generate.py", "--checkpoint", folder, "--num_tokens", 50, "--ptq8"],
            ["generate.py", "--checkpoint", folder, "--num_tokens", 50, "--ptq4"],
            ["quantize.py", "--checkpoint", folder, "--bits", 8, "--out", work / "q8"],
            ["evaluate.py", "--checkpoint", work / "q8"],
            ["generate.py", "--checkpoint", work / "q8", "--num_tokens", 50],
        ):
            # by the script and what follows --checkpoint PATH
            name = " ".join(str(a) for a in (arguments[0], *arguments[3:]))[:60]
            rows[name], _ = run_script(log, *arguments)


# ===== This command


def decode(results: Results) -> None:
    """config.json's decoding step at every width (research/cuda_decoding.py)."""
    model = cuda_decoding.new_model()
    with undisturbed():
        for name, section in cuda_decoding.SECTIONS.items():
            section(model, results.row("decode config.json", name), 60, save=results.save)


# Seconds that a section takes, roughly: it is left out where less than half of that is left.
SECTIONS = {
    ceilings: 10, train: 40, decode: 90, others: 40, compiled: 100, compiled_fp8: 100,
    small_compiled: 60, memory: 60, commands: 120,
}  # fmt: skip


def main() -> None:
    names = [section.__name__ for section in SECTIONS]
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out",
        default="logs/cuda",
        metavar="DIR",
        help="folder of results.json (default logs/cuda)",
    )
    parser.add_argument(
        "--only", default=",".join(names), help="sections, with commas between them (default: all)"
    )
    parser.add_argument(
        "--budget", type=float, default=900, help="seconds for all of it (default 900)"
    )
    args = parser.parse_args()
    asked = args.only.split(",")
    began = time.time()
    if unknown := set(asked) - set(names):
        parser.error(f"only: {', '.join(unknown)} is no section; there are {', '.join(names)}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU that torch can use")
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    results["device"] = torch.cuda.get_device_name()
    results["torch"] = torch.__version__
    torch.set_float32_matmul_precision("high")
    for section, seconds in SECTIONS.items():
        name = section.__name__
        left = args.budget - (time.time() - began)
        if name not in asked:
            continue
        if left < seconds / 2:
            results[f"left out: {name}"] = f"{left:.0f} s were left"
            continue
        started = time.time()
        try:
            section(results)
        except Exception:  # the other sections say what they can; the file says what failed here
            results[f"FAILED: {name}"] = traceback.format_exc()[-3000:]
        results.row("seconds", "section")[name] = round(time.time() - started, 1)
        results.save()
        free()
        print(name, f"{time.time() - started:.1f} s", flush=True)
    print(json.dumps(results, indent=0, default=str)[-9000:])


if __name__ == "__main__":
    run_command(main)
