"""Measures decoding: everything in turn in one run, medians or --fastest.

    python -m research.decoding_speed --threads 2              # every table
    python -m research.decoding_speed --threads 2 --compile    # and compiled steps beside
    python -m research.decoding_speed --kernels                # every way of each product
    python -m research.decoding_speed --recipes A.json B.json  # networks of several config files
    python -m research.decoding_speed --bound                  # bytes a token of config.json reads

Each prints a table, and writes its figures with --json FILE. The network is config.json's at C 512,
without memories: 2 layers, 5 levels, vocabulary 50,257. Contexts are real: a text is read up to
each length once, its state carried, and every width goes on from there.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from common.command import Parser, run_command
from config import Config, load_config
from inference.decode import Decoder
from inference.packed import MATRICES, Matrix, quantised
from inference.weights import Bits, PackedWeights
from layers.features import FeatureEmbedding
from model import LanguageModel, WaveletLM, build_model
from research.timing import interleaved

ROOT = Path(__file__).resolve().parents[1]

NAMES = {32: "fp32", 16: "bf16", 8: "int8", 4: "int4"}  # by bits
WINDOWS = (256, 1024)  # tokens that are read anew for each new one, by generation without a state
COLD = 96 * 2**20  # bytes of weights, more than the caches of the CPUs that were tried hold
PIECE = 512  # tokens of a long text that are read at a time
# Operations of torch that compute nothing: views, and allocations.
VIEWS = (
    "alias as_strided detach empty empty_like expand expand_as flatten mT narrow numpy_T permute"
    " select slice split squeeze t transpose unbind unflatten unsqueeze view view_as"
)
MAY_COPY = "contiguous float reshape to"  # views or nothing, unless a copy is made inside


def kernels_per_token(decoder: Decoder, state) -> Counter:
    """How often each operation of torch that computes something is called in a step: views and
    allocations left out."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(3):  # buffers move in the first step, and what they need is made in the second
        _, state = decoder(token, state)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        decoder(token, state)
    counts: Counter = Counter()
    for event in record.events():
        library, _, name = event.name.rpartition("::")
        if event.cpu_parent is not None or not library or name in VIEWS.split():
            continue
        inside = {child.name.rpartition("::")[2] for child in event.cpu_children}
        if name not in MAY_COPY.split() or inside & {"_to_copy", "clone", "copy_"}:
            counts[name] += 1
    return counts


def weight_bytes(model: LanguageModel, bits: int) -> tuple[int, int]:
    """Bytes of a decoder's weights as they lie in a file, and of those that a step reads (all but
    tables that are looked up)."""
    weights = PackedWeights(Bits.of(bits), saving=True)
    Decoder(model, weights=weights)
    total = sum(tensor.nbytes for tensor in weights.saved.values())
    tables = ("embedding/", "ngrams.values/")
    return total, total - sum(
        t.nbytes for name, t in weights.saved.items() if name.startswith(tables)
    )


def bytes_per_token(config: Config, vocab_size: int, bytes_each: int = 2) -> int:
    """What a step of the network must read of its weights, counted on the meta device: every matrix
    once for each use, of tables the rows that are looked up."""
    with torch.device("meta"):
        model = WaveletLM(config, vocab_size)
    numbers = model.lm_head.weight.numel() + config.C
    if model.ngrams is not None:
        numbers += model.ngrams.up.weight.numel() + config.ngram_width
    for i in range(config.applications * config.loop_iterations):
        block, wavelet = model.block(i % config.applications)
        numbers += sum(
            p.numel() for name, p in block.named_parameters() if not name.endswith("values.weight")
        )
        numbers += sum(
            p.numel() * (2 if "update_nets" in name else 1)
            for name, p in wavelet.named_parameters()
        )
        for memory in filter(None, (block.pkm, block.fwpkm)):
            numbers += memory.heads * memory.top_k * config.C
    return numbers * bytes_each


@torch.no_grad()
def recompute(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits after the last of ids, all of them read anew: what generation without a state
    costs per token."""
    hidden, _ = model.hidden(ids)
    return F.linear(hidden[:, -1], model.head_weight())


def states_at(decoder: Decoder, contexts: list[int], vocab_size: int) -> dict[int, object]:
    """The state after each number of tokens of one random text, read in pieces."""
    ids = torch.randint(vocab_size, (1, max(contexts)), generator=torch.Generator().manual_seed(0))
    states = {}
    state = decoder.start(1, stream=True)
    read = 0
    for context in sorted(contexts):
        for piece in ids[:, read:context].split(PIECE, dim=1):
            _, state = decoder(piece, state)
        states[context] = state
        read = context
    return states


def stepper(decoder: Decoder, state, rows: int) -> Callable[[], None]:
    """A call that reads one more token in each of `rows` copies of a text."""
    held = [state.select([0] * rows)]  # the state that the next step goes on from
    token = torch.zeros(rows, 1, dtype=torch.int64)

    def step() -> None:
        held[0] = decoder(token, held[0])[1]

    return step


def first_token(decoder: Decoder, prompt: torch.Tensor) -> None:
    """Reads a prompt (1, T), as is done before its first new token."""
    state = decoder.start(1, stream=True)
    for piece in prompt.split(PIECE, dim=1):
        _, state = decoder(piece, state)


def decoding(args: argparse.Namespace) -> dict:
    """Steps of every width at each context and batch size, beside reading a window anew."""
    memories = {"pkm_enabled": args.memories, "fwpkm_enabled": args.memories}
    config = load_config(ROOT / "config.json", C=args.C, **memories)
    torch.manual_seed(0)
    model = build_model(config, args.vocab_size).eval()
    sizes = {NAMES[bits]: weight_bytes(model, bits) for bits in NAMES}
    decoders = {NAMES[bits]: Decoder(model, bits) for bits in NAMES}
    compiled = {}
    for bits in (32, 8, 4) if args.compile else ():
        decoder = Decoder(model, bits)
        decoder.compile()
        compiled[f"{NAMES[bits]} compiled"] = decoder
    states = states_at(decoders["bf16"], args.contexts, args.vocab_size)
    calls: dict = {}
    for n in WINDOWS:
        ids = torch.randint(args.vocab_size, (1, n))
        calls["recompute", n] = lambda ids=ids: recompute(model, ids)
    names = decoders | compiled
    places = [(context, 1) for context in states]
    places += [(256, rows) for rows in args.batches if rows > 1]
    for context, rows in places:
        # A compiled program is for one number of rows, and takes a minute: only for one row.
        for name, decoder in (names if rows == 1 else decoders).items():
            calls[name, context, rows] = stepper(decoder, states[context], rows)
    # In turn with the steps, since on a machine that others share it changes from second to second.
    big = torch.ones(2**27)  # 512 MB
    calls["read", 0, 0] = big.sum
    middle = min if args.fastest else statistics.median
    seconds = interleaved(calls, args.rounds, args.seconds, middle, twice=True)
    bandwidth = big.nbytes / seconds["read", 0, 0]
    prefill = {}
    if args.prefill:
        prompt = torch.randint(args.vocab_size, (1, 4096))
        reads = {name: lambda d=d: first_token(d, prompt) for name, d in decoders.items()}
        prefill = interleaved(reads, 1)
    kernels_of = {name: kernels_per_token(d, d.start(1)) for name, d in decoders.items()}
    fp32_bytes = 4 * sum(p.numel() for p in model.parameters())
    return {
        "threads": torch.get_num_threads(), "statistic": "fastest" if args.fastest else "median",
        "C": args.C, "vocab_size": args.vocab_size, "memories": args.memories,
        "read_bandwidth_gb_per_s": bandwidth / 1e9,
        "recompute_ms": {n: 1e3 * seconds["recompute", n] for n in WINDOWS},
        "steps": [
            step_figures(key, seconds, sizes, bandwidth) for key in calls if key[0] in names
        ],
        "seconds_to_first_token_4096": prefill,
        "kernels_per_token": {name: sum(counts.values()) for name, counts in kernels_of.items()},
        "file_share_of_fp32": {name: total / fp32_bytes for name, (total, _) in sizes.items()},
    }  # fmt: skip


def step_figures(
    key: tuple[str, int, int], seconds: dict, sizes: dict[str, tuple[int, int]], bandwidth: float
) -> dict:
    """A row of the table of steps.

    key: weights, context and batch; seconds: of every call, by key; sizes: by weights, bytes of
    `weight_bytes`; bandwidth: bytes per second that this machine reads.
    """
    name, context, rows = key
    _, read = sizes[name.removesuffix(" compiled")]
    each = seconds[key]
    times = {f"times_recompute_{n}": seconds["recompute", n] / each * rows for n in WINDOWS}
    return {
        "weights": name, "context": context, "batch": rows, "ms": 1e3 * each,
        "tokens_per_s": rows / each, "gb_per_s": read / each / 1e9,
        "share_of_bandwidth": read / each / bandwidth, **times,
    }  # fmt: skip


def print_decoding(result: dict) -> None:
    """Prints what `decoding` gives, as a table in Markdown and some lines."""
    how = f"{result['threads']} threads, {result['statistic']} of all rounds"
    print(f"read bandwidth {result['read_bandwidth_gb_per_s']:.1f} GB/s, {how}")
    print(
        "recomputing the window: "
        + ", ".join(f"{n} tokens {ms:.1f} ms" for n, ms in result["recompute_ms"].items())
    )
    print(
        "| weights | context | batch | tokens/s | GB/s | of bandwidth | × recompute 256 | ×"
        " recompute 1,024 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in result["steps"]:
        times = " | ".join(f"{row[f'times_recompute_{n}']:.0f}" for n in (256, 1024))
        print(
            f"| {row['weights']} | {row['context']:,} | {row['batch']} | {row['tokens_per_s']:.1f}"
            f" | {row['gb_per_s']:.1f} | {row['share_of_bandwidth']:.0%} | {times} |"
        )
    for key in ("seconds_to_first_token_4096", "kernels_per_token", "file_share_of_fp32"):
        print(f"{key}: " + ", ".join(f"{name} {value:.4g}" for name, value in result[key].items()))


def copies_of(weight: Tensor, bits: int) -> tuple[list[Matrix], int]:
    """`weight` (out, in) at so many bits, so often that no cache holds all copies; and the bytes of
    them all."""
    tensors = quantised(weight, bits)
    size = sum(t.nbytes for t in tensors.values())
    copies = [
        MATRICES[bits]({name: t.clone() for name, t in tensors.items()}, weight.size(0))
        for _ in range(max(1, COLD // size))
    ]
    return copies, size * len(copies)


def passes(copies: list[Matrix], x: Tensor) -> dict[str, Callable[[], None]]:
    """For each way to multiply x (N, in) by a matrix, a call that does it with one of the copies
    after the other."""

    def one_pass(way: str) -> Callable[[], None]:
        def call() -> None:
            for matrix in copies:
                getattr(matrix, way)(x, None, 1.0)

        return call

    return {way: one_pass(way) for way in copies[0].ways(x.size(0))}


@torch.no_grad()
def kernels(args: argparse.Namespace) -> dict:
    """GB/s at which each way of each width's product reads the weights, by number of rows, beside
    those that the machine reads; and which way a decoder takes."""
    result = {}
    big = torch.ones(2**27)
    for outputs, inputs in ((512, 512), (10240, 512), (512, 10240)):
        weight = torch.randn(outputs, inputs)
        for bits, width in NAMES.items():
            copies, size = copies_of(weight, bits)
            for rows in args.batches:
                x = torch.randn(rows, inputs)
                calls = passes(copies, x)
                times = interleaved(calls | {"read": big.sum}, args.rounds, middle=min)
                read = big.nbytes / times.pop("read") / 1e9
                speeds = {way: size / seconds / 1e9 for way, seconds in times.items()}
                taken = copies[0].way(rows, x, None, 1.0)
                name = f"{outputs}×{inputs} {width}, {rows} rows"
                result[name] = speeds | {"read": read, "taken": taken}
                ways = ", ".join(f"{way} {speed:.1f}" for way, speed in speeds.items())
                print(f"{name}: {ways}; read {read:.1f} GB/s; taken: {taken}", flush=True)
    return result


def recipes(args: argparse.Namespace) -> dict:
    """Milliseconds of a step of each config file's network, in turn, at batch 1 after 256 tokens,
    and its state's size."""
    result = {}
    calls = {}
    for file in args.recipes:
        config = load_config(file)
        torch.manual_seed(0)
        model = build_model(config, args.vocab_size).eval()
        for module in model.modules():
            if isinstance(module, FeatureEmbedding):
                module.basis.zero_()  # there are no tokens to describe
        tables = {
            p for cell in model.cells for p in (cell.token_embedding.weight, cell.lm_head.weight)
        }
        result[file] = {
            "parameters_besides_embeddings": sum(
                p.numel() for p in model.parameters() if p not in tables
            )
        }
        for bits in NAMES:
            decoder = Decoder(model, bits)
            state = states_at(decoder, [256], args.vocab_size)[256]
            result[file] |= {"state_kib": state.nbytes / 1024}
            calls[file, bits] = stepper(decoder, state, 1)
    for (file, bits), seconds in interleaved(calls, args.rounds, args.seconds, twice=True).items():
        result[file] |= {f"{NAMES[bits]}_ms": 1e3 * seconds}
    first = result[args.recipes[0]]
    for file, row in result.items():
        row |= {
            f"{name}_times_first": row[f"{name}_ms"] / first[f"{name}_ms"]
            for name in NAMES.values()
        }
        print(
            f"{file}: "
            + ", ".join(
                f"{key} {value:,.3g}" if value < 1000 else f"{key} {value:,.0f}"
                for key, value in row.items()
            )
        )
    return result


def bound(args: argparse.Namespace) -> dict:
    """The most tokens a second that config.json can write at --gpu_bandwidth, from the bytes that a
    step reads."""
    config = load_config(ROOT / "config.json")
    size = bytes_per_token(config, 50257)
    result = {
        "bytes_per_token_fp16": size,
        "gb_per_s": args.gpu_bandwidth,
        "tokens_per_s": args.gpu_bandwidth * 1e9 / size,
    }
    print(
        f"config.json at fp16 reads {size / 1e6:,.0f} MB per token: at "
        f"{args.gpu_bandwidth:,.0f} GB/s no more than {result['tokens_per_s']:,.0f} tokens/s. "
        "Counted, not run."
    )
    return result


def read_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch"
    )
    parser.add_argument(
        "--C", type=int, default=512, help="channels (default 512); the rest is config.json's"
    )
    parser.add_argument("--vocab_size", type=int, default=50257, help="default 50257")
    parser.add_argument("--memories", action="store_true", help="with the product-key memories")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[16, 256, 4096, 65536], help="must include 256"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="at context 256")
    parser.add_argument(
        "--rounds", type=int, default=15, help="times that each thing is measured (default 15)"
    )
    parser.add_argument(
        "--seconds", type=float, default=240, help="measure steps no longer than this (default 240)"
    )
    parser.add_argument(
        "--fastest",
        action="store_true",
        help="fastest, not median, of all rounds: for a busy machine",
    )
    parser.add_argument(
        "--compile", action="store_true", help="steps of one row compiled, too; not in bf16"
    )
    parser.add_argument(
        "--no_prefill",
        dest="prefill",
        action="store_false",
        help="leave the 4,096-token prompt out",
    )
    parser.add_argument(
        "--gpu_bandwidth",
        type=float,
        default=1792,
        help="GB/s for --bound (default 1792, an RTX 5090)",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="measure every way of every product only, for --batches rows",
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        metavar="FILE",
        help="measure the steps of these config files' networks only",
    )
    parser.add_argument(
        "--bound", action="store_true", help="count config.json's bytes per token only"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result here too")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    if args.kernels:
        result = kernels(args)
    elif args.bound:
        result = bound(args)
    elif args.recipes:
        result = recipes(args)
    else:
        result = decoding(args)
        print_decoding(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
