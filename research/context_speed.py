"""Decoding at contexts of 16 to 65,536 tokens, beside networks that one would take instead.

    python -m research.context_speed --threads 2       # logs/context: figures, table, picture

Networks of equal parameters besides embedding and head (within 3%), in fp32, uncompiled:

- ours: config.json's at C 512 without memories, 2 layers; in int8 as a line of its own;
- `transformers`' Llama of the usual shape (MLP 8/3 of the width, so 10 layers), with sdpa attention
  and its cache: DynamicCache or StaticCache, whichever is faster there;
- the same with as many layers as ours, and so a wider MLP and a smaller cache;
- `transformers`' Mamba-2 with its usual heads and states, in plain torch, as it runs on a CPU.

Our states are real: a text is read up to each length. Llama's caches are filled with random keys
and values of the right shape, since the time to read 65,536 tokens through a Transformer on a CPU
grows with their square; that of a step does not hang on what a cache holds. Mamba-2's state has one
size and one cost, so it has read 16 tokens only. A cache beyond --memory is not made; its size is
computed.

At each context and batch all networks take their steps in turn, and the median counts. Figures that
the folder has of other contexts or batches stay, so a long measurement can be made in parts.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.command import InputError, Parser, run_command
from common.figures import new_figure, save_figure
from common.files import read_json, write_whole
from config import Config, load_config
from inference.decode import Decoder
from model import WaveletLM, build_model
from research.contestants import transformers_library
from research.decoding_speed import states_at, stepper
from research.tables import markdown_table
from research.timing import interleaved

ROOT = Path(__file__).resolve().parents[1]

# Of transformers: its caches say their sizes and are gone on from as they are measured here.
CACHES_SINCE = "5.24"
caching_library = partial(transformers_library, CACHES_SINCE)
HEAD = 64  # channels of a head, of Llama's and of Mamba-2's: what both usually have
MAMBA_STATES = range(112, 145, 8)  # numbers per channel, about the usual 128, that fit parameters
TOLERANCE = 0.03  # of the parameters, by which networks may differ
STATE_TOKENS = 16  # that Mamba-2 reads to have a state
PATTERN = 512  # random positions that are repeated up to a context: random numbers take long
PROBES = 3  # steps with each kind of cache that tell which is faster
GIB = 2**30


# ===== Networks of as many parameters


def body_parameters(model: nn.Module) -> int:
    """Parameters besides embedding and head: of ours, or of a network of `transformers`."""
    if isinstance(model, WaveletLM):
        tables = (model.token_embedding.weight, model.lm_head.weight)
    else:
        tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    return sum(p.numel() for p in model.parameters()) - sum(table.numel() for table in tables)


def llama_config(width: int, layers: int, parameters: int, vocab_size: int, positions: int):
    """Llama of so many layers, its MLP as wide as `parameters` besides embedding and head ask for;
    positions: the longest context."""
    # A layer has 4 matrices of attention, width², and 3 of the MLP, width · inner.
    inner = round((parameters / layers - 4 * width**2) / (3 * width))
    heads = width // HEAD
    return caching_library().LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=positions,
        tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip


def usual_layers(width: int, parameters: int) -> int:
    """Layers of a Llama whose MLP is 8/3 of its width, so that a layer has 12 · width²."""
    return max(1, round(parameters / (12 * width**2)))


def mamba_config(width: int, parameters: int, vocab_size: int):
    """Mamba-2 with the number of layers, and of states, that come closest to `parameters` besides
    embedding and head."""
    library = caching_library()

    def config(layers: int, states: int):
        return library.Mamba2Config(
            vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, state_size=states,
            expand=2, head_dim=HEAD, num_heads=2 * width // HEAD, n_groups=1,
            chunk_size=STATE_TOKENS, tie_word_embeddings=False,
        )  # fmt: skip

    def count(layers: int, states: int) -> int:
        with torch.device("meta"):
            return body_parameters(library.Mamba2ForCausalLM(config(layers, states)))

    shapes = []
    for states in MAMBA_STATES:
        each = count(2, states) - count(1, states)
        rest = count(1, states) - each
        layers = max(1, round((parameters - rest) / each))
        shapes.append((abs(layers * each + rest - parameters), layers, states))
    _, layers, states = min(shapes)
    return config(layers, states)


# ===== Who decodes


@dataclass
class Step:
    """What a network does at one context and batch."""

    call: Callable[[], object]  # reads one more token in each row
    nbytes: int  # of the state or cache that it goes on from
    cache: str = ""  # the kind of cache, where there is a choice


class Ours:
    """A Decoder, and the states of a text."""

    def __init__(self, decoder: Decoder, states: dict[int, Any], parameters: int):
        self.decoder = decoder
        self.states = states
        self.parameters = parameters

    def nbytes(self, context: int, rows: int) -> int:
        return rows * self.states[context].nbytes

    def step(self, context: int, rows: int, steps: int) -> Step:
        call = stepper(self.decoder, self.states[context], rows)
        return Step(call, self.nbytes(context, rows))


@torch.no_grad()
def read(network: nn.Module, ids: Tensor, cache) -> Tensor:
    """Reads ids (B, T) after what the cache holds, and keeps them there → logits (B, V) after the
    last."""
    return network(ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def empty_cache(config, kind: str, length: int):
    """A cache of `kind`, "dynamic" or "static", for at most `length` tokens."""
    library = caching_library()
    if kind == "static":
        return library.StaticCache(config=config, max_cache_len=length)
    return library.DynamicCache(config=config)


def filled_cache(config, kind: str, context: int, rows: int, steps: int):
    """A cache of random keys and values of `context` tokens, with room for `steps` more."""
    cache = empty_cache(config, kind, context + steps)
    shape = (rows, config.num_key_value_heads, min(context, PATTERN), config.head_dim)
    for layer in range(config.num_hidden_layers):
        pattern = torch.randn(shape)
        numbers = pattern.repeat(1, 1, -(-context // shape[2]), 1)[:, :, :context]
        cache.update(numbers, numbers, layer)  # which copies them, for keys and for values
    return cache


class Llama:
    """A Transformer of `transformers` that keeps every token's keys and values."""

    def __init__(self, config):
        self.network = caching_library().LlamaForCausalLM(config).eval()
        self.parameters = body_parameters(self.network)

    def nbytes(self, context: int, rows: int) -> int:
        config = self.network.config
        numbers = 2 * config.num_key_value_heads * config.head_dim  # keys and values of a token
        return 4 * numbers * config.num_hidden_layers * rows * context

    def step(self, context: int, rows: int, steps: int) -> Step:
        """With the kind of cache that is faster at this context and batch."""
        times = {}
        for kind in ("dynamic", "static"):
            call = self.stepper(kind, context, rows, 1 + PROBES)
            times[kind] = interleaved({kind: call}, PROBES)[kind]
            del call  # and its cache, before the next is made
        kind = min(times, key=times.get)
        return Step(self.stepper(kind, context, rows, steps), self.nbytes(context, rows), kind)

    def stepper(self, kind: str, context: int, rows: int, steps: int) -> Callable[[], Tensor]:
        """A call that reads one more token in each row; at most `steps` times."""
        cache = filled_cache(self.network.config, kind, context, rows, steps)
        token = torch.zeros(rows, 1, dtype=torch.int64)
        return lambda: read(self.network, token, cache)


class Mamba2:
    """A recurrent network of `transformers`."""

    def __init__(self, config):
        self.network = caching_library().Mamba2ForCausalLM(config).eval()
        self.parameters = body_parameters(self.network)

    def nbytes(self, context: int, rows: int) -> int:
        return rows * self.start(1)[1]

    def start(self, rows: int) -> tuple[Any, int]:
        """A state of so many rows, and its bytes."""
        cache = empty_cache(self.network.config, "dynamic", STATE_TOKENS)
        # One text, whose state is copied: many at once would take gigabytes to be read.
        read(self.network, torch.zeros(1, STATE_TOKENS, dtype=torch.int64), cache)
        cache.reorder_cache(torch.zeros(rows, dtype=torch.int64))
        tensors = [
            tensor
            for layer in cache.layers
            for states in (layer.conv_states, layer.recurrent_states)
            for tensor in states.values()
        ]
        return cache, sum(tensor.nbytes for tensor in tensors)

    def step(self, context: int, rows: int, steps: int) -> Step:
        cache, nbytes = self.start(rows)
        token = torch.zeros(rows, 1, dtype=torch.int64)
        return Step(lambda: read(self.network, token, cache), nbytes)


def networks(config: Config, vocab_size: int, contexts: list[int], text: int) -> dict[str, Any]:
    """The networks by name. text: tokens that ours reads at most; where a context is longer, the
    state after so many stands for it.

    Raises `InputError` where C has no whole number of heads, or a network's parameters are not
    within `TOLERANCE` of ours.
    """
    if config.C % HEAD:
        raise InputError(f"C: {config.C} is not divisible into heads of {HEAD}; take a multiple")
    torch.manual_seed(0)
    model = build_model(config, vocab_size).eval()
    parameters = body_parameters(model)
    lengths = sorted({min(context, text) for context in contexts})
    # bf16 reads a text fastest, and states are the same for every width.
    read_states = states_at(Decoder(model, 16), lengths, vocab_size)
    states = {context: read_states[min(context, text)] for context in contexts}
    layers = usual_layers(config.C, parameters)
    positions = 2 * max(contexts)  # more than any step reaches
    llamas = {
        f"Llama, {n} layers": Llama(llama_config(config.C, n, parameters, vocab_size, positions))
        for n in (layers, config.layers)
    }
    mamba = mamba_config(config.C, parameters, vocab_size)
    result = {
        "WaveletLM": Ours(Decoder(model), states, parameters),
        "WaveletLM, int8": Ours(Decoder(model, 8), states, parameters),
        **llamas,
        f"Mamba-2, {mamba.num_hidden_layers} layers": Mamba2(mamba),
    }
    for name, network in result.items():
        if abs(network.parameters / parameters - 1) > TOLERANCE:
            raise InputError(
                f"C: {name} has {network.parameters:,} parameters, ours {parameters:,}; take"
                " another C"
            )
    return result


# ===== Figures


def measured(
    contenders: dict[str, Any], context: int, rows: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row of figures for each network at one context and batch; no speed where its cache is
    larger than --memory."""
    # The warm-up, and each round twice.
    steps = 1 + 2 * args.rounds
    taken = {
        name: network.step(context, rows, steps)
        for name, network in contenders.items()
        if network.nbytes(context, rows) <= args.memory * GIB
    }
    calls = {name: step.call for name, step in taken.items()}
    times = interleaved(calls, args.rounds, args.seconds, statistics.median, twice=True)
    return [
        {
            "network": name,
            "parameters": network.parameters,
            "context": context,
            "batch": rows,
            "tokens_per_s": rows / times[name] if name in times else None,
            "bytes": taken[name].nbytes if name in taken else network.nbytes(context, rows),
            "cache": taken[name].cache if name in taken else "",
        }
        for name, network in contenders.items()
    ]


def size(nbytes: int) -> str:
    """Bytes in words."""
    return f"{nbytes / GIB:,.1f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:,.1f} MiB"


def cell(row: dict[str, Any], memory: float) -> str:
    """What the table says of one network at one context and batch."""
    if row["tokens_per_s"] is None:
        return f"does not fit in {memory:g} GiB: {size(row['bytes'])}"
    kind = f", {row['cache']}" if row["cache"] else ""
    return f"{row['tokens_per_s']:,.1f} ({size(row['bytes'])}{kind})"


def table(result: dict[str, Any]) -> str:
    """The figures as a table in Markdown: a line for each network and batch."""
    rows = {(row["network"], row["batch"], row["context"]): row for row in result["rows"]}
    contexts = sorted({row["context"] for row in result["rows"]})
    header = ["network", "parameters", "batch", *(f"{c:,}" for c in contexts)]
    lines = []
    for batch, name in dict.fromkeys((row["batch"], row["network"]) for row in result["rows"]):
        own = {row["context"]: row for key, row in rows.items() if key[:2] == (name, batch)}
        # Where the folder has a context for some batches only, others have an empty place.
        cells = [cell(own[c], result["memory_gib"]) if c in own else "" for c in contexts]
        parameters = next(iter(own.values()))["parameters"]
        lines.append([name, f"{parameters / 1e6:.1f}M", batch, *cells])
    what = f"Tokens/s, and the state or cache (of Llama its kind); {result['threads']} threads."
    return f"{what}\n\n{markdown_table(header, lines)}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s and memory against context: a colour for each network, dashed for the larger batch;
    crosses where a cache does not fit, and has no speed."""
    figure = new_figure(11, 4.5)
    speed, memory = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["network"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    for name, batch in ((name, batch) for name in names for batch in batches):
        own = [row for row in rows if (row["network"], row["batch"]) == (name, batch)]
        made = [row for row in own if row["tokens_per_s"] is not None]
        label = f"{name}, batch {batch}"
        style = {"color": f"C{names.index(name)}", "ls": "-" if batch == batches[0] else "--"}
        contexts = [row["context"] for row in made]
        speed.plot(
            contexts, [row["tokens_per_s"] for row in made], marker="o", label=label, **style
        )
        mib = [row["bytes"] / 2**20 for row in own]
        memory.plot([row["context"] for row in own], mib, marker="o", **style)
        large = [row for row in own if row["tokens_per_s"] is None]
        sizes = [row["bytes"] / 2**20 for row in large]
        memory.plot([row["context"] for row in large], sizes, "kx", zorder=3)
    for axes, what in ((speed, "tokens/s"), (memory, "state or cache, MiB (×: does not fit)")):
        axes.set(xlabel="context, tokens", ylabel=what, xscale="log", yscale="log")
        lengths = sorted({row["context"] for row in rows})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    save_figure(figure, path)


# ===== The command


def read_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    add("--C", type=int, default=512, help="channels (default 512); the rest is config.json's")
    add("--vocab_size", type=int, default=50257, help="default 50257")
    add("--contexts", type=int, nargs="+", default=[16, 1024, 16384, 65536], metavar="TOKENS")
    add("--batches", type=int, nargs="+", default=[1, 32], metavar="ROWS")
    add("--rounds", type=int, default=15, help="times that each is measured (default 15)")
    add("--seconds", type=float, default=60, help="and no longer than this at each context and"
        " batch (default 60)")  # fmt: skip
    add("--text", type=int, default=2**20, metavar="TOKENS", help="read no more of the text to make"
        " our states: for a short look")  # fmt: skip
    add("--memory", type=float, default=8, metavar="GIB", help="make no cache larger than this"
        " (default 8)")  # fmt: skip
    add("--out", default="logs/context", metavar="FOLDER", help="of figures.json, table.md and"
        " context.png (default logs/context)")  # fmt: skip
    return parser.parse_args()


def earlier_rows(out: Path, settings: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    """The rows of figures that `out` has, by network, context and batch. Raises `InputError` where
    they were made otherwise than with `settings`."""
    path = out / "figures.json"
    if not path.exists():
        return {}
    result = read_json(path)
    other = {key: result.get(key) for key in settings if result.get(key) != settings[key]}
    if other:
        key, value = next(iter(other.items()))
        raise InputError(f"{key}: {out} has figures of {key} {value}; give another --out")
    return {key_of(row): row for row in result["rows"]}


def key_of(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["network"], row["context"], row["batch"]


def save(result: dict[str, Any], out: Path) -> None:
    """Writes figures.json, table.md and context.png."""
    figures = json.dumps(result, indent=1) + "\n"
    for name, content in (("figures.json", figures), ("table.md", table(result))):
        write_whole(out / name, content.encode("utf-8"))
    draw(result["rows"], out / "context.png")


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "threads": args.threads, "C": args.C, "vocab_size": args.vocab_size,
        "memory_gib": args.memory,
    }  # fmt: skip
    rows = earlier_rows(out, settings)
    config = load_config(ROOT / "config.json", C=args.C, pkm_enabled=False, fwpkm_enabled=False)
    contenders = networks(config, args.vocab_size, args.contexts, args.text)
    for batch in args.batches:
        for context in args.contexts:
            began = time.perf_counter()
            rows |= {key_of(row): row for row in measured(contenders, context, batch, args)}
            seconds = time.perf_counter() - began
            print(f"context {context:,}, batch {batch}: {seconds:.0f} s", file=sys.stderr)
            in_order = sorted(rows.values(), key=lambda row: (row["batch"], row["context"]))
            save(settings | {"rows": in_order}, out)
    print((out / "table.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    run_command(main)
