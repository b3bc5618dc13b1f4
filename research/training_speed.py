"""Training speed and memory against a plain PyTorch version of the same network, in one run.

    python -m research.training_speed                    # every table, ten minutes on two cores
    python -m research.training_speed --only step,loss   # some of them

The plain version computes the same loss from the same weights (checked before anything is timed)
the way one would write it down first: a loop over scales, butterfly passes for the Walsh–Hadamard
transform, all logits at once, every memory slot pair, an optimizer that is not fused; in fp32, and
in bf16 where the CPU multiplies it.

Times are medians of rounds in which the versions take turns, so that a machine that others use too
slows all of them alike. Memory is the peak resident size above what the process held with its
weights built, each in a process of its own. The machine's rate is that of one large matrix product
in the same type.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.command import Parser, run_command
from common.device import cpu_multiplies_bf16
from config import make_config
from layers.loss import linear_cross_entropy
from model import Block, Lifting, ProductKeyMemory, WaveletLM
from research.timing import interleaved
from training.optimizers import make_optimizers

VOCAB = 50257
BARE = {
    "C": 256, "layers": 2, "levels": 5, "mlp_expansion": 8, "block_size": 256,
    "micro_batch_size": 8,
    "wavelet_crawl": False, "cross_scale_gating": False, "per_scale_mixer_widths": None,
    "pkm_enabled": False,
    "fwpkm_enabled": False,
}  # fmt: skip
RELEASED_KEYS = {
    key: BARE[key]
    for key in ("C", "layers", "levels", "mlp_expansion", "block_size", "micro_batch_size")
}
# "released" leaves the lags, routing, widths and memories as config.json has them.
NAMED = {"bare": BARE, "released": RELEASED_KEYS}


# ===== The plain version: functions of the same network's weights


def butterfly(x: Tensor) -> Tensor:
    """The orthonormal Walsh–Hadamard transform of the last dimension in log₂P passes of sums and
    differences."""
    width = x.size(-1)
    half = 1
    while half < width:
        pairs = x.unflatten(-1, (-1, 2, half))
        a, b = pairs.unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return x / math.sqrt(width)


def plain_decompose(wavelet: Lifting, cur: Tensor) -> list[Tensor]:
    """Coefficients of h (B, T, P): the approximation, then the details from coarse to fine."""

    def delayed(lag: int) -> Tensor:
        return F.pad(cur, (0, 0, lag, 0))[:, : cur.size(1)]

    details = []
    for level, first in enumerate(wavelet.first_lag):
        if wavelet.dilation_logits is None:
            odd = delayed(first)
        else:
            weights = wavelet.dilation_logits[level].softmax(0)
            odd = sum(weights[k] * delayed(first + k) for k in range(len(weights)))
        detail = (odd - wavelet.predict_nets[level](cur)) / math.sqrt(2)
        cur = (cur + wavelet.update_nets[level](detail)) / math.sqrt(2)
        details.append(detail)
    return [cur, *reversed(details)]


def plain_mix(block: Block, coefficients: list[Tensor]) -> list[Tensor]:
    """`Block.mix`: coefficients (B, T, P) of each scale, mixed over channels."""
    mixers = block.mixers
    z = [butterfly(c) for c in coefficients]
    r = z
    if mixers.scale_routing is not None:
        r = [
            sum(mixers.scale_routing[s, other] * z[other] for other in range(len(z)))
            for s in range(len(z))
        ]
    mixed = []
    for s, mixer in enumerate(mixers.banks[0]):
        own = z[s]
        gate = r[s]
        if mixer.proj_in is not None:
            own = mixer.proj_in(own)
            gate = mixer.proj_in(gate)
        y = mixer.mixer(own) * F.silu(mixer.gate(gate)) + own @ mixer.V @ mixer.U.T
        if mixer.proj_out is not None:
            y = mixer.proj_out(y)
        mixed.append(block.dropout_mixer(butterfly(y)) * block.scale_weights[s])
    return mixed


def plain_memory(memory: ProductKeyMemory, h: Tensor) -> Tensor:
    """A product-key memory that sums the scores of all pairs of best halves; h (N, C)."""
    query_a, query_b = memory.query_proj(h).view(len(h), memory.heads, 2, -1).unbind(2)
    score_a, index_a = torch.einsum("nhd,hkd->nhk", query_a, memory.keys_a).topk(
        memory.best_per_half
    )
    score_b, index_b = torch.einsum("nhd,hkd->nhk", query_b, memory.keys_b).topk(
        memory.best_per_half
    )
    pairs = (score_a[..., :, None] + score_b[..., None, :]).flatten(-2)
    slots = (index_a[..., :, None] * memory.keys_b.size(1) + index_b[..., None, :]).flatten(-2)
    score, best = pairs.topk(memory.top_k)
    slot = slots.gather(-1, best) + memory.slots * torch.arange(memory.heads)[:, None]
    weight = score.float().softmax(-1).flatten(1)
    table = memory.values.weight
    return F.embedding_bag(
        slot.flatten(1), table, mode="sum", per_sample_weights=weight.to(table.dtype)
    )


def plain_block(
    block: Block, wavelet: Lifting, x: Tensor, e: Tensor, below: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`Block.forward`: the stream x, the embedding e, the mean of the block below, all (B, T, C) →
    the new stream and this block's mean."""
    mean = x.float().cumsum(1) / torch.arange(1, x.size(1) + 1)[:, None]
    context = mean if below is None else mean + block.bypass.cross_layer_mix(below)
    x = x + block.embedding_residual_gamma * e
    coefficients = plain_decompose(wavelet, F.pad(block.ln1(x), (0, block.pad)))
    coefficients = [
        c + F.pad(context * block.bypass.history_gains[s], (0, block.pad))
        for s, c in enumerate(coefficients)
    ]
    cur, *details = plain_mix(block, coefficients)
    for detail, update in zip(details, reversed(wavelet.update_nets), strict=True):
        cur = math.sqrt(2) * cur - update(detail)
    x = block.residual_alpha_spectral * x + block.dropout_projection(block.proj_out(cur))
    h = block.ln2(x)
    thought = block.alpha_mlp * block.ffwd(h)
    for memory, alpha in ((block.pkm, block.alpha_pkm), (block.fwpkm, block.alpha_fwpkm)):
        if memory is not None:
            thought = thought + alpha * plain_memory(memory, h.flatten(0, 1)).view_as(h)
    return block.residual_alpha_mlp * x + thought, mean


def plain_loss(model: WaveletLM, ids: Tensor, targets: Tensor) -> Tensor:
    """`WaveletLM.loss`: mean nats of targets (B, T) after ids (B, T)."""
    e = model.token_embedding(ids)
    x = model.dropout_embedding(e)
    below = None
    for i in range(model.config.layers):
        x, below = plain_block(*model.block(i), x, e, below)
    logits = model.lm_head(model.dropout_lm_head(model.final_ln(x)))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# ===== Steps


class Version:
    """One version of a network under training: `step()` is one optimizer step on random tokens."""

    def __init__(self, values: dict, plain: bool, bf16: bool, vocab: int = VOCAB):
        self.config = make_config(values, "benchmark")
        torch.manual_seed(0)
        self.model = WaveletLM(self.config, vocab)
        self.plain = plain
        self.bf16 = bf16
        if plain:
            groups = [
                group
                for optimizer in make_optimizers(self.model, self.config)
                for group in optimizer.param_groups
            ]
            groups = [
                {"params": group["params"], "weight_decay": group["weight_decay"]}
                for group in groups
            ]
            self.optimizers = [
                torch.optim.Adagrad(groups, lr=1e-4, eps=self.config.optimizer_eps, foreach=False)
            ]
        else:
            self.optimizers = make_optimizers(self.model, self.config)
            for group in self.optimizers[0].param_groups:
                group["lr"] = 1e-4
        self.tokens = self.config.micro_batch_size * self.config.block_size
        size = (self.config.micro_batch_size, self.config.block_size + 1)
        self.ids = torch.randint(vocab, size, generator=torch.Generator().manual_seed(0))

    def loss(self) -> Tensor:
        """Mean nats per token, of this version's own computation."""
        ids = self.ids[:, :-1]
        targets = self.ids[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            if self.plain:
                return plain_loss(self.model, ids, targets)
            return self.model.loss(ids, targets)[0]

    def step(self) -> None:
        """One step on the same random tokens every time: gradients, clipping, optimizer."""
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def check_same(values: dict) -> None:
    """Both versions must have the same loss and gradients, or the comparison is of two different
    things."""
    runs = [Version(values, plain, bf16=False) for plain in (True, False)]
    for run in runs:
        run.model.eval()
        run.loss().backward()
    torch.testing.assert_close(runs[0].loss(), runs[1].loss(), rtol=1e-5, atol=1e-5)
    for (name, p), q in zip(
        runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True
    ):
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


# ===== Measures


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_above(action: Callable[[], object]) -> int:
    """The most bytes that this process, which has never held more before, held during `action`,
    less what it held before."""
    before = resident()
    action()
    # Not getrusage's: it counts what the process that started this one held.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


def in_own_process(*arguments: str) -> dict:
    """What this script prints as JSON when it is called with these arguments."""
    command = [sys.executable, "-m", "research.training_speed", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# ===== Tables


def matmul_rate(kind: torch.dtype) -> Callable[[], object]:
    """One product of RATE_SIZE³ multiplications and additions."""
    a, b = torch.randn(2, RATE_SIZE, RATE_SIZE).to(kind)
    return lambda: a @ b


RATE_SIZE = 2048
VERSIONS = {"plain fp32": (True, False), "ours fp32": (False, False)}
if cpu_multiplies_bf16():  # elsewhere it is imitated, which measures nothing of ours
    VERSIONS |= {"plain bf16": (True, True), "ours bf16": (False, True)}


def step_flops(values: dict) -> int:
    """Floating point operations of the matrix products of one step."""
    with FlopCounterMode(display=False) as counter:
        Version(values, plain=False, bf16=False).loss().backward()
    return counter.get_total_flops()


def step_table(name: str, rounds: int) -> dict:
    """Tokens/s, memory above the weights and share of the machine's rate of each version of a named
    configuration."""
    values = NAMED[name]
    check_same(values)
    runs = {version: Version(values, *how) for version, how in VERSIONS.items()}
    kinds = {
        version[-4:]: torch.bfloat16 if bf16 else torch.float32
        for version, (_, bf16) in VERSIONS.items()
    }
    rates = {f"rate {name}": matmul_rate(kind) for name, kind in kinds.items()}
    seconds = interleaved({version: run.step for version, run in runs.items()} | rates, rounds)
    flops = step_flops(values)
    tokens = runs["ours fp32"].tokens
    table = {}
    for version in VERSIONS:
        rate = 2 * RATE_SIZE**3 / seconds["rate " + version[-4:]]
        table[version] = {
            "tokens_per_second": tokens / seconds[version],
            "times_plain_fp32": seconds["plain fp32"] / seconds[version],
            "times_plain_same_type": seconds["plain " + version[-4:]] / seconds[version],
            "share_of_matmul_rate": flops / seconds[version] / rate,
            "peak_mib_above_weights": (
                in_own_process("--peak", f"{name}:{version}")["bytes"] / 2**20
            ),
        }
    for version, row in table.items():
        row["memory_of_plain_same_type"] = (
            row["peak_mib_above_weights"] / table["plain " + version[-4:]]["peak_mib_above_weights"]
        )
    return table


def step_peak(name: str, version: str) -> dict:
    """The memory of two steps above that of the weights; the second has the optimizer's state
    too."""
    run = Version(NAMED[name], *VERSIONS[version])
    return {"bytes": peak_above(lambda: (run.step(), run.step()))}


def loss_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """What the head reads (8, 256, 256), its weight (V, 256), and targets (8, 256)."""
    torch.manual_seed(0)
    h = torch.randn(8, 256, 256, requires_grad=True)
    weight = (torch.randn(VOCAB, 256) / 16).requires_grad_()
    return h, weight, torch.randint(VOCAB, (8, 256))


LOSSES: dict[str, Callable] = {
    "plain": lambda h, weight, targets: F.cross_entropy(
        (h @ weight.T).flatten(0, 1), targets.flatten()
    ),
    "ours": linear_cross_entropy,
}


def loss_pass(which: str) -> Callable[[], object]:
    """A call that computes one of LOSSES and its gradients."""
    inputs = loss_inputs()

    def action() -> None:
        inputs[0].grad = None
        inputs[1].grad = None
        LOSSES[which](*inputs).backward()

    return action


def loss_table(rounds: int) -> dict:
    """Time and memory of the head and the loss alone, forward and backward, C 256, V 50257, 2,048
    tokens."""
    seconds = interleaved({which: loss_pass(which) for which in LOSSES}, rounds)
    table = {
        which: {
            "seconds": seconds[which],
            "times_plain": seconds[which] / seconds["plain"],
            "peak_mib": in_own_process("--peak", f"loss:{which}")["bytes"] / 2**20,
        }
        for which in LOSSES
    }
    for row in table.values():
        row["memory_of_plain"] = row["peak_mib"] / table["plain"]["peak_mib"]
    return table


LENGTHS = (256, 1024, 4096, 16384)


def length_run(length: int) -> Version:
    """A smaller network of the released features, 16,384 tokens a step at every length. Its
    vocabulary is small, so that the head, which costs the same per token at any length, does not
    hide the rest."""
    values = RELEASED_KEYS | {
        "C": 128,
        "mlp_expansion": 4,
        "block_size": length,
        "micro_batch_size": max(LENGTHS) // length,  # the same tokens in a step at every length
    }
    return Version(values, plain=False, bf16=False, vocab=2048)


def length_table(rounds: int) -> dict:
    """Seconds and bytes per token for windows of each length."""
    runs = {length: length_run(length) for length in LENGTHS}
    seconds = interleaved({str(length): run.step for length, run in runs.items()}, rounds)
    table = {}
    for length, run in runs.items():
        microseconds = 1e6 * seconds[str(length)] / run.tokens
        peak = in_own_process("--peak", f"length:{length}")["bytes"]
        table[str(length)] = {
            "microseconds_per_token": microseconds,
            "times_1024": seconds[str(length)] / seconds["1024"],
            "kib_per_token": peak / 1024 / run.tokens,
        }
    return table


def peak_of(what: str) -> dict:
    """The peak memory of "loss:WHICH", "length:TOKENS" or "CONFIG:VERSION", for --peak."""
    kind, _, which = what.partition(":")
    if kind == "loss":
        return {"bytes": peak_above(loss_pass(which))}
    if kind == "length":
        return {"bytes": peak_above(length_run(int(which)).step)}
    return step_peak(kind, which)


def print_table(title: str, table: dict[str, dict[str, float]]) -> None:
    """Prints a table in Markdown."""
    columns = list(next(iter(table.values())))
    print(
        f"\n**{title}**\n\n| | {' | '.join(column.replace('_', ' ') for column in columns)}"
        f" |\n|---|{'---|' * len(columns)}"
    )
    for name, row in table.items():
        print(
            f"| {name} | "
            + " | ".join(
                f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in row.values()
            )
            + " |"
        )
    sys.stdout.flush()


def main() -> None:
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--only",
        default="step,loss,length",
        help="tables to make, of step, loss, length (default all)",
    )
    parser.add_argument(
        "--configs",
        default="bare,released",
        help="configurations of table step (default bare,released)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="timed rounds, of which the median is taken (default 5)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--peak",
        metavar="WHAT",
        help="print the peak memory of one thing (the script calls itself so)",
    )
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak_of(args.peak)))
        return
    tables = {}
    if "step" in args.only:
        for name in args.configs.split(","):
            tables[f"step, {name}"] = step_table(name, args.rounds)
            print_table(f"step, {name}", tables[f"step, {name}"])
    if "loss" in args.only:
        tables["loss"] = loss_table(args.rounds)
        print_table("loss", tables["loss"])
    if "length" in args.only:
        tables["length"] = length_table(args.rounds)
        print_table("length", tables["length"])
    if args.json:
        figures = {"torch": torch.__version__, "threads": torch.get_num_threads(), "tables": tables}
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
