"""WaveletLM beside a Transformer and a delta net on a GPU, for equal seconds of training.

    python -m research.gpu_compare --pack my_books/ --tokens books.npz.xz
    python -m research.gpu_compare --tokens books.npz.xz --seconds 170 --out runs/ \\
        --models best=configs/best-30m.json transformer delta

The first command makes a file of tokens, the second trains on it. All contestants get the same
batches in the same order, bf16 autocast, torch.compile, Muon for their matrices, a table of
n-grams, a schedule by the share of the seconds that has gone, and the same loss, of all logits at
once.

Seconds are of training steps alone: compilation comes before them and is reported, and the clock
stands still while validation is measured, in windows of block_size side by side. Each contestant
has a file of JSON lines in --out, and each line is there as soon as it is known, so a run that is
killed leaves what it measured. With several --rates, in units of the contestant's own learning
rate, a short run at each chooses one by validation.
"""

import argparse
import contextlib
import io
import json
import lzma
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.command import InputError, Parser, run_command
from common.device import cpu_multiplies_bf16
from common.files import written_whole
from config import Config, load_config
from data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from model import build_model
from research.contestants import MUON
from research.delta_net import build_delta_net
from research.opponent import Opponent
from research.tables import markdown_table
from research.transformer import build_transformer
from training.optimizers import learning_rate, make_optimizers, rates, step_at_rate
from training.record import environment

SPLITS = ("train", "validation", "test")
SHARES = 10_000  # a schedule by time goes in so many steps
WARM_STEPS = 4  # before the clock starts: the first ones compile
# Steps that the host may be ahead of the device: enough to keep it busy, and the clock is wrong by
# so many steps at the most.
AHEAD = 2
# Windows whose operations are counted. With several, what is done once for a whole batch (such as
# transforming weights) weighs as little as it does in training.
COUNTED_ROWS = 8
EVALUATED_ROWS = 16  # windows that are measured at a time: their logits are half a gigabyte


# ===== The contestants

# Networks of compare.py, written out with what helps them. Each has, at 512 channels and with its
# table, about the parameters of configs/best-30m.json.
OPPONENTS = {
    "transformer": partial(build_transformer, width=512, layers=6, inner=1536, taps=4),
    "transformer-4": partial(build_transformer, width=512, layers=4, inner=2816, taps=4),
    "delta": partial(build_delta_net, width=512, layers=5, inner=1880, taps=4),
}
# compare.py's Muon. A matrix's update has the same norm at any width, so its rate stays; Adam's,
# chosen at 128 channels, goes with one over the width, as in configs/best-30m.json.
OPPONENT_KEYS = MUON | {
    "C": 512, "ngram_slots": 500_000, "lr": 8e-3, "block_size": 512, "recall_heads": 8,
    "recall_dim": 64,
}  # fmt: skip


def head_loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean nats of targets (B, T) under logits h Wᵀ, all of them at once: h (B, T, C), weight (V,
    C)."""
    return F.cross_entropy(F.linear(h, weight).float().flatten(0, 1), targets.flatten())


class Entrant:
    """A name, the config of its optimisation, and its network with the weights that every run of it
    begins with."""

    def __init__(self, model: str, vocab_size: int, device: str, seed: int, block_size: int | None):
        self.name, _, file = model.partition("=")
        if not file and self.name not in OPPONENTS:
            known = ", ".join(OPPONENTS)
            raise InputError(
                f"models: unknown model {model}; known are {known} and NAME=CONFIG_FILE"
            )
        keys = {} if block_size is None else {"block_size": block_size}
        self.config = load_config(file, **keys) if file else Config(**OPPONENT_KEYS | keys)
        if self.config.token_features or self.config.decompose_bypass_cross_window:
            raise InputError(
                f"{file}: turn off token_features and decompose_bypass_cross_window, which need"
                " texts"
            )
        torch.manual_seed(seed)
        self.model = (build_model if file else OPPONENTS[self.name])(self.config, vocab_size)
        self.model.to(device)
        self.initial = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.head_loss = head_loss

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token of ids and targets (B, T)."""
        if isinstance(self.model, Opponent):
            return self.head_loss(self.model.hidden(ids), self.model.lm_head.weight, targets)
        hidden, _ = self.model.hidden(ids)
        return self.head_loss(hidden, self.model.head_weight(), targets)

    def compile(self) -> None:
        """Compiles a block, once for all that are alike, and the loss: minutes less than compiling
        all of it as one program."""
        for block in self.model.layers:
            block.compile()
        self.head_loss = torch.compile(head_loss)

    def optimizers(self, config: Config) -> list[torch.optim.Optimizer]:
        """New ones, for a network with its initial weights again."""
        self.model.load_state_dict(self.initial)
        return make_optimizers(self.model, config)


# ===== Tokens


def pack(folder: Path, path: Path, vocab_size: int) -> None:
    """Makes a token file of train.txt.xz (or train.txt), validation.txt and test.txt in
    `folder`."""
    texts = {}
    for split in SPLITS:
        found = [
            folder / name
            for name in (f"{split}.txt.xz", f"{split}.txt")
            if (folder / name).is_file()
        ]
        if not found:
            raise InputError(f"pack: {folder} has no {split}.txt.xz and no {split}.txt")
        with (lzma.open if found[0].suffix == ".xz" else open)(found[0], "rb") as file:
            texts[split] = file.read().decode("utf-8")
    train = texts["train"]
    # An eighth of the text, from all over it: enough for a vocabulary, and learned in seconds.
    model = train_sentencepiece(
        (train[i : i + 250_000] for i in range(0, len(train), 2_000_000)), vocab_size
    )
    arrays = {}
    with ProcessPoolExecutor(2, initializer=_load_tokenizer, initargs=(model,)) as pool:
        for split, text in texts.items():
            arrays[split] = np.concatenate(list(pool.map(_encode, _pieces(text))))
    sizes = {split: len(text.encode()) for split, text in texts.items()}
    meta = json.dumps(
        {"vocab_size": SentencePieceTokenizer(model).vocab_size, "bytes": sizes}
    ).encode()
    raw = io.BytesIO()
    np.savez(raw, meta=np.frombuffer(meta, np.uint8), **arrays)
    # Two bytes a token, so the compressor is told which of the two it is at (lp, pb): a little
    # smaller.
    how = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 3, "lp": 1, "pb": 1, "dict_size": 96 << 20}]
    with written_whole(path) as beside:
        beside.write_bytes(lzma.compress(raw.getbuffer(), filters=how))


def _pieces(text: str) -> Iterator[str]:
    """Cut at line ends, which are always tokens of their own, so the tokens are those of the whole
    text."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + 500_000) + 1 or len(text)
        yield text[start:end]
        start = end


def _load_tokenizer(model: bytes) -> None:
    global _tokenizer
    _tokenizer = SentencePieceTokenizer(model)


def _encode(text: str) -> np.ndarray:
    return np.array(_tokenizer.encode(text), np.uint16)


def read_packed(path: Path) -> tuple[dict[str, np.ndarray], int, dict[str, int]]:
    """Tokens of each split, the vocabulary's size, bytes of each split's text."""
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            arrays = np.load(io.BytesIO(file.read()), allow_pickle=False)
        meta = json.loads(bytes(arrays["meta"]))
        return {split: arrays[split] for split in SPLITS}, meta["vocab_size"], meta["bytes"]
    except (OSError, EOFError, ValueError, KeyError, lzma.LZMAError) as error:
        raise InputError(f"tokens: {path} is no token file ({error}); --pack makes one") from None


class Batches:
    """Windows of `block` tokens side by side, in an order of their own each epoch, which also
    begins at another token."""

    def __init__(self, tokens: np.ndarray, block: int, batch: int, seed: int, device: str):
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.block = block
        self.batch = batch
        self.seed = seed
        self.device = device
        # One block less than there are, since an epoch begins somewhere within the first one.
        self.per_epoch = (len(tokens) - 1 - block) // block // batch
        if self.per_epoch < 1:
            raise InputError(
                f"tokens: train has {len(tokens)} tokens; a batch needs {batch} windows of {block}"
            )
        self.epoch = -1  # whose order `starts` has; none yet
        self.starts = torch.empty(0)  # where each window begins, in the order of the epoch

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """ids and targets, both (batch, block), of step `step`."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            random = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            first = torch.randint(self.block, (), generator=random)
            order = torch.randperm(self.per_epoch * self.batch, generator=random)
            self.epoch = epoch
            self.starts = (first + self.block * order).to(self.device)
        starts = self.starts[place * self.batch : (place + 1) * self.batch]
        places = starts[:, None] + torch.arange(self.block + 1, device=self.device)
        rows = self.tokens[places].long()  # (batch, block + 1)
        return rows[:, :-1], rows[:, 1:]


# ===== A run


def cast(device: str) -> contextlib.AbstractContextManager:
    """bf16 autocast, but fp32 on a CPU that would only imitate bf16, at a tenth of the speed."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or cpu_multiplies_bf16())


def wait_for(device: str) -> None:
    """Waits until the device has done all that it was given, so that a clock may be read."""
    if device == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def measured_nats(model: nn.Module, tokens: Tensor, block: int, device: str) -> float:
    """The summed nats of all tokens but the first, in windows of `block` side by side."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    last = len(tokens) - 1
    whole = last // block * block
    ids = tokens[:whole].view(-1, block)
    targets = tokens[1 : whole + 1].view(-1, block)
    pieces = list(zip(ids.split(EVALUATED_ROWS), targets.split(EVALUATED_ROWS), strict=True))
    if whole < last:
        pieces.append((tokens[None, whole:last], tokens[None, whole + 1 :]))
    for ids, targets in pieces:
        # Compiled, this would need a program of its own for each shape.
        with cast(device), torch.compiler.set_stance("force_eager"):
            logits = model(ids)[0]
        total += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return total.item()


def operations_per_token(entrant: Entrant, batches: Batches, device: str) -> float:
    """Floating-point operations of products, forward and backward; attention counts as if it were
    not causal."""
    with FlopCounterMode(display=False) as counter, cast(device):
        ids, targets = (t[:COUNTED_ROWS] for t in batches(0))
        entrant.loss(ids, targets).backward()
    entrant.model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / ids.numel()


def one_step(
    entrant: Entrant,
    optimizers: list,
    config: Config,
    rate: float,
    batch: tuple[Tensor, Tensor],
    device: str,
):
    """A training step; returns its loss, on the device."""
    with cast(device):
        loss = entrant.loss(*batch)
    loss.backward()
    step_at_rate(entrant.model, optimizers, rate, config.grad_clip)
    return loss.detach()


def warm_up(entrant: Entrant, batches: Batches, device: str) -> dict[str, float]:
    """Compiles, by some steps whose results are thrown away: the seconds of the first, and the
    least of the others."""
    optimizers = entrant.optimizers(entrant.config)
    seconds = []
    for step in range(WARM_STEPS):
        began = time.perf_counter()
        one_step(entrant, optimizers, entrant.config, 1e-6, batches(step), device)
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return {"compile_seconds": seconds[0], "step_ms": 1e3 * min(seconds[1:])}


def train_for(
    entrant: Entrant, config: Config, batches: Batches, seconds: float, limit: int | None,
    device: str,
    evaluations: int, evaluate: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """Trains from the initial weights for `seconds`, or `limit` steps if they are over first.
    `evaluate` is called `evaluations` times at equal distances, the last time at the end, with the
    figures of the run so far. Returns the figures at the end."""
    optimizers = entrant.optimizers(config)
    under_way: deque[torch.cuda.Event] = deque()
    used = 0.0  # seconds of training, without evaluations
    step = 0
    measured = 0  # evaluations that were due so far
    peak = 0  # bytes of the device's memory in training
    losses = []
    entrant.model.train()
    wait_for(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    while True:
        share = (used + time.perf_counter() - began) / seconds
        share = max(share, step / limit) if limit else share
        if share * evaluations >= measured + 1:
            wait_for(device)
            used += time.perf_counter() - began
            if device == "cuda":
                peak = max(peak, torch.cuda.max_memory_allocated())
            measured = min(evaluations, int(share * evaluations))
            state = {
                "tokens": step * batches.batch * batches.block, "steps": step, "seconds": used,
                "peak_bytes": peak,
                "train_nats": torch.stack(losses).mean().item() if losses else None,
            }  # fmt: skip
            losses.clear()
            entrant.model.eval()
            evaluate(state)
            if share >= 1:
                return state
            entrant.model.train()
            wait_for(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
        rate = learning_rate(int(share * SHARES), SHARES, config)
        losses.append(one_step(entrant, optimizers, config, rate, batches(step), device))
        step += 1
        if device == "cuda":
            under_way.append(torch.cuda.Event())
            under_way[-1].record()
            if len(under_way) > AHEAD:
                under_way.popleft().synchronize()


class Lines:
    """A file of JSON lines, each on disk before the next is made."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, **values: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


class Race:
    """One contestant on the card: what it is trained on, measured by and written to."""

    def __init__(
        self,
        entrant: Entrant,
        args: argparse.Namespace,
        arrays: dict[str, np.ndarray],
        sizes: dict[str, int],
    ):
        """arrays, sizes: the tokens and the text's bytes of each split."""
        self.entrant = entrant
        self.args = args
        self.sizes = sizes
        self.device = args.device
        self.block = entrant.config.block_size
        self.write = Lines(Path(args.out) / f"{entrant.name}.jsonl")
        self.batches = Batches(arrays["train"], self.block, args.batch, args.seed, args.device)
        self.held_out = {
            split: torch.from_numpy(arrays[split].astype(np.int64)).to(args.device)
            for split in ("validation", "test")
        }

    def say(self, text: str) -> None:
        """Prints a line about this contestant at once."""
        print(f"{self.entrant.name}: {text}", flush=True)

    def bits_per_byte(self, split: str) -> float:
        """Of the split's first --eval_tokens tokens."""
        tokens = self.held_out[split][: self.args.eval_tokens]
        # exact for a whole split, near enough for a part of it
        size = self.sizes[split] * (len(tokens) / len(self.held_out[split]))
        nats = measured_nats(self.entrant.model, tokens, self.block, self.device)
        return nats / math.log(2) / size

    def best_scale(self) -> float:
        """The one of --rates, in units of the contestant's own learning rate, whose short run ends
        with the least loss on validation; the only one where there is one."""
        args = self.args
        if len(args.rates) == 1:
            return args.rates[0]
        found = {}
        for scale in args.rates:
            config = self.entrant.config
            tried = config.model_copy(update=rates(config, config.lr * scale))
            train_for(
                self.entrant, tried, self.batches, args.choice_seconds, args.limit, self.device,
                evaluations=1, evaluate=lambda state: None,
            )  # fmt: skip
            bits = self.bits_per_byte("validation")
            found[scale] = bits if math.isfinite(bits) else math.inf  # a run that diverged
            self.write(
                kind="choice", model=self.entrant.name, lr=tried.lr, muon_lr=tried.muon_lr,
                validation=bits,
            )  # fmt: skip
            self.say(f"lr {tried.lr:g}: {bits:.4f} after {args.choice_seconds:g} s")
        return min(found, key=found.__getitem__)

    def evaluate(self, state: dict[str, Any]) -> None:
        """Measures on validation in the middle of a run, and adds it to `state`."""
        state["validation"] = self.bits_per_byte("validation")
        self.write(kind="evaluation", model=self.entrant.name, **state)
        self.say(
            f"{state['seconds']:.1f} s, {state['tokens']:,} tokens, "
            f"validation {state['validation']:.4f} bits/byte"
        )


def compete(
    entrant: Entrant,
    args: argparse.Namespace,
    arrays: dict[str, np.ndarray],
    sizes: dict[str, int],
) -> dict[str, Any]:
    """Compiles, chooses a rate if there are several, trains and measures one contestant; returns
    its last line."""
    race = Race(entrant, args, arrays, sizes)
    tables = {entrant.model.token_embedding.weight, entrant.model.lm_head.weight}  # may be one
    about = {
        "parameters": sum(p.numel() for p in entrant.model.parameters()),
        "embedding_parameters": sum(p.numel() for p in tables),
    }
    operations = operations_per_token(entrant, race.batches, args.device)
    if not args.eager:
        entrant.compile()
    speed = warm_up(entrant, race.batches, args.device)
    race.write(
        kind="start", model=entrant.name, **about, operations_per_token=operations,
        config=entrant.config.model_dump(mode="json", exclude_defaults=True),
        train_tokens=len(arrays["train"]), environment=environment(), **speed,
    )  # fmt: skip
    race.say(
        f"{(about['parameters'] - about['embedding_parameters']) / 1e6:.2f}M parameters and"
        f" {about['embedding_parameters'] / 1e6:.2f}M of embeddings,"
        f" {operations / 1e6:.0f} MFLOP a token, first step"
        f" {speed['compile_seconds']:.1f} s, then {speed['step_ms']:.1f} ms"
    )
    lr = entrant.config.lr * race.best_scale()
    config = entrant.config.model_copy(update=rates(entrant.config, lr))
    state = train_for(
        entrant, config, race.batches, args.seconds, args.limit, args.device, args.evaluations,
        race.evaluate,
    )  # fmt: skip
    tokens_per_second = state["tokens"] / state["seconds"]
    result = {
        "kind": "end", "model": entrant.name, "lr": config.lr, "muon_lr": config.muon_lr,
        "seed": args.seed, **about, "batch": args.batch, "block_size": config.block_size,
        "epochs": state["tokens"] / len(arrays["train"]), "tokens_per_second": tokens_per_second,
        "mfu": operations * tokens_per_second / (args.peak_tflops * 1e12), **speed, **state,
        "test": race.bits_per_byte("test"),
    }  # fmt: skip
    race.write(**result)
    race.say(f"test {result['test']:.4f} bits/byte, {tokens_per_second:,.0f} tokens/s")
    return result


def entrants_table(results: list[dict[str, Any]]) -> str:
    """A row for each contestant in Markdown, the best on validation first."""
    header = [
        "model", "parameters", "+ embeddings", "lr, Muon's", "seconds", "tokens", "epochs",
        "tokens/s", "MFU", "GiB", "compiled in", "validation bits/byte", "test bits/byte",
    ]  # fmt: skip
    rows = [
        [r["model"], f"{(r['parameters'] - r['embedding_parameters']) / 1e6:.2f}M",
         f"{r['embedding_parameters'] / 1e6:.2f}M",
         f"{r['lr']:g}, {r['muon_lr']:g}", f"{r['seconds']:.0f}", f"{r['tokens'] / 1e6:.1f}M",
         f"{r['epochs']:.1f}",
         f"{r['tokens_per_second']:,.0f}", f"{100 * r['mfu']:.0f}%",
         f"{r['peak_bytes'] / 2**30:.1f}",
         f"{r['compile_seconds']:.0f} s", f"{r['validation']:.4f}", f"{r['test']:.4f}"]
        for r in sorted(results, key=lambda r: r["validation"])
    ]  # fmt: skip
    return markdown_table(header, rows)


def read_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n", 1)[0])
    add = parser.add_argument
    models = ["best=configs/best-30m.json", "transformer", "delta"]
    known = (
        f"{', '.join(OPPONENTS)} or NAME=FILE, a WaveletLM's config (default {' '.join(models)})"
    )
    # fmt: off
    add("--tokens", required=True, metavar="FILE", help="the token file, which --pack makes")
    add("--pack", metavar="FOLDER",
        help="make the token file of this folder's texts, and do nothing else")
    add("--vocab_size", type=int, default=16_000,
        help="of --pack's SentencePiece tokenizer (default 16000)")
    add("--models", nargs="+", default=models, metavar="MODEL", help=known)
    add("--out", default="logs/gpu_compare",
        help="folder of the files of lines (default logs/gpu_compare)")
    add("--seconds", type=float, default=170.0,
        help="of training, for each contestant (default 170)")
    add("--evaluations", type=int, default=10,
        help="measurements of validation in them (default 10)")
    add("--rates", type=float, nargs="+", default=[1.0],
        help="learning rates, in units of its own (default 1)")
    add("--choice_seconds", type=float, default=15.0,
        help="of a run that chooses among them (default 15)")
    add("--batch", type=int, default=128, help="windows in a step (default 128)")
    add("--block_size", type=int, help="tokens in a window (default: the configs', 512)")
    add("--limit", type=int, help="steps of a run at the most")
    add("--eval_tokens", type=int,
        help="tokens of a split that are measured at the most (default: all)")
    add("--seed", type=int, default=1,
        help="of weights and of the order of windows (default 1)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default cuda")
    add("--eager", action="store_true", help="do not compile")
    add("--peak_tflops", type=float, default=989.0,
        help="the card's in bf16, for MFU (default an H100's, 989)")
    # fmt: on
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    if args.pack:
        pack(Path(args.pack), Path(args.tokens), args.vocab_size)
        return
    sizes = (args.seconds, args.choice_seconds, args.batch, args.evaluations, args.limit or 1)
    if min(*sizes, *args.rates) <= 0:
        raise InputError(
            "seconds, choice_seconds, batch, evaluations, rates and limit must be above 0"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: there is no CUDA GPU that torch can use; take cpu")
    torch.set_float32_matmul_precision("high")  # TF32 for the products that autocast leaves in fp32
    # flash attention wherever it is, rather than whichever this torch prefers
    torch.backends.cuda.enable_cudnn_sdp(False)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    arrays, vocab_size, text_bytes = read_packed(Path(args.tokens))
    results = []
    for model in args.models:
        entrant = Entrant(model, vocab_size, args.device, args.seed, args.block_size)
        results.append(compete(entrant, args, arrays, text_bytes))
        del entrant
        torch._dynamo.reset()  # lets go of the network, and of the code made for it
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(entrants_table(results))


if __name__ == "__main__":
    run_command(main)
