"""Decoding on a GPU, measured: steps at every width, and the products that they are made of.

    python -m research.cuda_decoding      # config.json's network with new weights, all sections
    python -m research.cuda_decoding --only products --seconds 60 --json FILE

Sections are functions that take a model on the device and fill a dict; `research.cuda` calls them
too. Each keeps to a number of seconds: what it does not get to is named under "left_out".
"""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from common.command import Parser, run_command
from common.device import free
from config import load_config
from inference import kernels
from inference.decode import Decoder
from inference.graphs import GraphedStep, can_be_captured
from inference.packed import MATRICES, quantised
from inference.sampling import Settings, generate
from inference.weights import Bits, PackedWeights
from model import build_model
from research.timing import mean_ms, median_ms

ROOT = Path(__file__).resolve().parents[1]

WIDTHS = (16, 8, 4, None)  # None: the model's own fp32, last because it is the slowest
KINDS = {32: "float32", 16: "float16", 8: "int8", 4: "int4"}


class Budget:
    """The seconds that a section may take, and the names of what it had no time for."""

    def __init__(self, seconds: float, results: dict[str, Any]):
        self.end = time.perf_counter() + seconds
        self.results = results

    def has(self, seconds: float, name: str) -> bool:
        """Whether `seconds` are left; if not, `name` is noted as left out."""
        if time.perf_counter() + seconds <= self.end:
            return True
        self.results.setdefault("left_out", []).append(name)
        return False


def attempt(results: dict[str, Any], name: str, function: Callable) -> Any:
    """Calls `function`; what it raises is a result too, since one failure should not cost the
    others' figures."""
    try:
        return function()
    except Exception as error:
        results.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:400]
        return None


def bytes_read(model: nn.Module, bits: int | None) -> float:
    """Bytes of weights that a token reads: of all matrices, but not of tables that are looked up,
    of which it reads a few rows."""
    weights = PackedWeights(Bits.of(bits), saving=True)
    Decoder(model, weights=weights)
    tables = ["ngrams.values/", ".pkm.values/", ".fwpkm.values/"]
    if not model.config.tie_embedding_to_lm_head:
        tables.append("embedding/")  # else it is the head too, and all of it is read
    read = 0
    for name, tensor in weights.saved.items():
        if not any(table in name for table in tables):
            read += tensor.nbytes
    return float(read)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found − wanted| / |wanted|."""
    return ((found - wanted).norm() / wanted.norm()).item()


def steps(
    model: nn.Module,
    results: dict[str, Any],
    seconds: float,
    widths=WIDTHS,
    compiles: bool = True,
    save=lambda: None,
) -> None:
    """A token's step at each width: eager, as a graph, compiled and as a graph; batches; a prompt;
    whole texts."""
    budget = Budget(seconds, results)
    device = model.cells[0].token_embedding.weight.device
    ids = torch.randint(model.vocab_size, (1, 16), device=device)
    with torch.no_grad():
        wanted, _ = model(ids, model.start(1, stream=True))
    for bits in widths:
        row: dict[str, Any] = results.setdefault(f"bits {bits or 32}", {})
        name = f"bits {bits}"

        def measure(bits=bits, row=row, name=name) -> None:
            if budget.has(5, name):
                width = Width(model, bits, row, ids, wanted[:, -1])
                width.measure(budget, name, compiles, save)

        attempt(row, "all", measure)
        save()
        free()


class Width:
    """A decoder at one width; each method measures one thing and puts it into `row`."""

    def __init__(
        self, model: nn.Module, bits: int | None, row: dict[str, Any], ids: Tensor, wanted: Tensor
    ):
        """ids (1, T): a text; wanted (1, V): the model's logits after it."""
        self.row = row
        self.ids = ids
        self.wanted = wanted
        self.token = ids[:, :1].clone()
        row["bytes"] = bytes_read(model, bits)
        free()
        began = time.perf_counter()
        self.decoder = Decoder(model, bits)
        row["seconds_to_prepare"] = time.perf_counter() - began

    def measure(self, budget: Budget, name: str, compiles: bool, save: Callable[[], None]) -> None:
        """Everything that there is time for; name: of the width, for what is left out."""
        row = self.row
        self.eager()
        if can_be_captured(self.decoder):
            attempt(row, "graph", lambda: self.graph(False, "graph"))
        save()
        if budget.has(2, f"{name}: prompt"):
            attempt(row, "prompt", self.prompt)
        if budget.has(3, f"{name}: text"):
            attempt(row, "text", lambda: self.text(False, "text"))
        for n in (8, 64):
            if budget.has(3, f"{name}: {n} rows"):
                attempt(row, f"{n} rows", lambda n=n: self.several(n))
                free()
        if compiles and budget.has(60, f"{name}: compiled"):  # compiling takes about a minute
            attempt(row, "compiled", lambda: self.graph(True, "compiled_graph"))
            if budget.has(10, f"{name}: compiled text"):
                attempt(row, "compiled text", lambda: self.text(True, "compiled_text"))
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30

    def eager(self) -> None:
        """The step as operations of torch, and its logits against the model's."""
        decoder = self.decoder
        logits, state = decoder(self.ids, decoder.start(1, stream=True))
        self.row["error"] = relative_error(logits[:, -1], self.wanted)
        box = [state]  # the state that the next step goes on from

        def step() -> None:
            box[0] = decoder(self.token, box[0])[1]

        state = decoder.start(1, stream=True)
        for one in self.ids.split(1, dim=1):
            logits, state = decoder(one, state)
        self.row["error_of_steps"] = relative_error(logits[:, -1], self.wanted)
        self.row["eager_ms"] = mean_ms(step, 20)
        _, self.row["host_ms"] = median_ms(step, 10)

    def graph(self, compiled: bool, name: str) -> None:
        """The step as a CUDA graph: with the copy of its id, and the replay alone."""
        row = self.row
        began = time.perf_counter()
        step = GraphedStep(self.decoder, 1, True, compiled)
        row[f"{name}_seconds_to_make"] = time.perf_counter() - began
        for one in self.ids.split(1, dim=1):
            found = step(one)
        row[f"{name}_error"] = relative_error(found, self.wanted)
        ms = mean_ms(lambda: step(self.token), 100)
        row[f"{name}_ms"] = ms
        row[f"{name}_replay_ms"] = mean_ms(step.graph.replay, 100)
        row[f"{name}_tokens_per_second"] = 1e3 / ms
        row[f"{name}_gb_per_second"] = row["bytes"] / ms / 1e6
        row[f"{name}_kernels"] = kernels_of(step.graph.replay)

    def prompt(self) -> None:
        """A prompt of 512 tokens."""
        ids = torch.zeros(1, 512, dtype=torch.int64, device=self.ids.device)
        self.row["prefill_512_ms"] = mean_ms(lambda: self.decoder(ids), 5, 1)

    def text(self, compiled: bool, name: str) -> None:
        """256 tokens of text, each given to the host as it is chosen."""
        self.decoder.compiles_graphs = compiled
        self.decoder.graphs = {}
        generate(self.decoder, self.ids, 8, Settings())  # captures the graph
        torch.cuda.synchronize()
        began = time.perf_counter()
        generate(self.decoder, self.ids, 256, Settings(), on_token=lambda tokens: int(tokens[0]))
        torch.cuda.synchronize()
        self.row[f"{name}_tokens_per_second"] = 256 / (time.perf_counter() - began)

    def several(self, n: int) -> None:
        """n texts side by side."""
        step = GraphedStep(self.decoder, n, True)
        tokens = torch.zeros(n, 1, dtype=torch.int64, device=self.ids.device)
        ms = mean_ms(lambda: step(tokens), 20)
        self.row[f"{n}_rows_tokens_per_second"] = 1e3 * n / ms


def kernels_of(call: Callable[[], object]) -> list[tuple[str, float]]:
    """The kernels of a call in their order: the name of each and its microseconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if str(e.device_type).endswith("CUDA")]
    events.sort(key=lambda e: e.time_range.start)
    return [(e.name[:90], round(e.time_range.elapsed_us(), 2)) for e in events]


# ===== Products alone


def shapes(model: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """The products of a step, (outputs, inputs) of each matrix, by name: those of the model's
    width."""
    c = model.config.C
    v = model.vocab_size
    return {
        "mixers": [(c + 64, c)] * 3 + [(c // 2 + 64, c)] * 3, "square": [(c, c)],
        "up": [(20 * c, c)], "down": [(c, 20 * c)],
        "head": [(v, c)],
    }  # fmt: skip


def products(
    model: nn.Module, results: dict[str, Any], seconds: float, sweep: bool = True, save=lambda: None
) -> None:
    """GB/s of each product with one row: our kernels, with other block sizes too if `sweep`, and
    torch's."""
    budget = Budget(seconds, results)
    device = model.cells[0].token_embedding.weight.device
    for name, sizes in shapes(model).items():
        for bits in (16, 8, 4):
            row: dict[str, Any] = results.setdefault(f"{name} {bits}", {})

            def measure(sizes=sizes, bits=bits, row=row) -> None:
                product = Product(sizes, bits, row, device)
                if kernels.HAS_TRITON:
                    product.ours(budget, sweep)
                product.torchs()

            if budget.has(3, f"{name} {bits}"):
                attempt(row, "all", measure)
            save()


class Product:
    """Matrices of one width that are multiplied by one row of x each; the methods put GB/s into
    `row`."""

    def __init__(
        self, sizes: list[tuple[int, int]], bits: int, row: dict[str, Any], device: torch.device
    ):
        """sizes: (outputs, inputs) of each matrix."""
        self.sizes = sizes
        self.bits = bits
        self.row = row
        self.weights = [torch.randn(size, device=device) * 0.02 for size in sizes]
        tensors = [quantised(weight, bits) for weight in self.weights]
        self.nbytes = sum(t.nbytes for each in tensors for t in each.values())
        # Copies that are read in turn, 256 MB of them if 8 are enough for that: more than a cache
        # holds, since a step too finds its weights in memory.
        copies = min(8, max(2, int(2**28 / self.nbytes) + 1))
        self.held = [
            [{k: t.clone() for k, t in each.items()} for each in tensors] for _ in range(copies)
        ]
        inputs = max(k for _, k in sizes)
        self.x = torch.randn(len(sizes), inputs, device=device, dtype=torch.bfloat16)  # (S, in)
        row["mb"] = self.nbytes / 1e6

    def rate(self, calls: list[Callable]) -> float:
        """GB/s of the calls in turn, in one graph, so that launches of the host do not count."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        rounds = max(1, 16 // len(calls))
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        return self.nbytes * rounds * len(calls) / mean_ms(graph.replay, 20, 3) / 1e6

    def ours(self, budget: Budget, sweep: bool) -> None:
        """Our kernel, its error, and if `sweep` other block sizes than the one that is used."""
        stacks = [kernels.Stack(each) for each in self.held]
        outputs = max(n for n, _ in self.sizes)
        wanted = [w @ self.x[s, : w.size(1)].float() for s, w in enumerate(self.weights)]
        wanted = torch.stack([F.pad(y, (0, outputs - len(y))) for y in wanted])  # (S, out)
        self.row["error"] = relative_error(stacks[0](self.x).float(), wanted)
        calls = [lambda stack=stack: stack(self.x) for stack in stacks]
        kind = KINDS[self.bits]
        used = kernels.Stack.SHAPES[kind]
        self.row[f"ours {used}"] = self.rate(calls)
        if not sweep:
            return
        for shape in itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (2, 4, 8)):
            rows, wide, warps = shape
            per_thread = rows * wide / (warps * 32)  # bytes at a time: one to eight loads of 16
            if shape == used or not 16 <= per_thread <= 128 or not budget.has(1, "sweep"):
                continue
            kernels.Stack.SHAPES = kernels.Stack.SHAPES | {kind: shape}
            value = attempt(self.row, f"ours {shape}", lambda: self.rate(calls))
            if value:
                self.row[f"ours {shape}"] = value
        kernels.Stack.SHAPES = kernels.Stack.SHAPES | {kind: used}

    def torchs(self) -> None:
        """Torch's own product of this width, where it has one for these sizes."""
        if self.bits == 16:
            make = self.torchs_16
        elif self.bits == 8:
            make = self.torchs_8
        elif len(self.sizes) == 1 and self.sizes[0][0] % 8 == 0:
            make = self.torchs_4
        else:
            return
        self.row["torch's"] = attempt(self.row, "torch's", lambda: self.rate(make()))

    # Each of these gives the calls of torch's products, one for each copy of the weights.

    def torchs_16(self) -> list[Callable]:
        rows = [self.x[s : s + 1, :k] for s, (_, k) in enumerate(self.sizes)]
        calls = []
        for each in self.held:
            pairs = zip(each, self.sizes, strict=True)
            matrices = [MATRICES[self.bits](t, n) for t, (n, _) in pairs]
            for matrix in matrices:
                matrix.row_kernel = None  # else it would be our kernel
            calls.append(lambda ms=matrices: [m(x) for m, x in zip(ms, rows, strict=True)])
        return calls

    def torchs_8(self) -> list[Callable]:
        def call(each: list[dict[str, Tensor]]) -> None:
            for s, (tensors, (_, k)) in enumerate(zip(each, self.sizes, strict=True)):
                x = self.x[s : s + 1, :k]
                torch.ops.aten._weight_int8pack_mm(x, tensors["int8"], tensors["scale"])

        return [lambda each=each: call(each) for each in self.held]

    def torchs_4(self) -> list[Callable]:
        calls = []
        for (tensors,) in self.held:
            # Torch wants the even input in a byte's high half, 8 tiles of 16 inputs together, and
            # scales and offsets as (groups, out, 2); a group is 64 inputs.
            swapped = (tensors["int4"] << 4) | (tensors["int4"] >> 4)
            packed = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
            steps = tensors["steps"].transpose(0, 1).contiguous()
            calls.append(
                lambda p=packed, s=steps: torch.ops.aten._weight_int4pack_mm(self.x, p, 64, s)
            )
        return calls


SECTIONS = {"steps": steps, "products": products}


def new_model(file: Path = ROOT / "config.json", vocab: int = 50257) -> nn.Module:
    """A network on the GPU as it begins, but for gains that are not all the same."""
    with torch.device("cuda"):
        model = build_model(load_config(file), vocab)
    for p in model.parameters():
        if p.dim() == 1 and p.numel() > 1:
            nn.init.normal_(p.data, 1.0, 0.02)
    return model.to("cuda").eval()


def main() -> None:
    parser = Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", type=Path, default=ROOT / "config.json")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--seconds", type=float, default=240, help="for each section (default 240)")
    parser.add_argument(
        "--no_compile", action="store_true", help="no compiled steps, which take a minute each"
    )
    parser.add_argument(
        "--no_sweep", action="store_true", help="no other block sizes than those that are used"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(SECTIONS):
        parser.error(f"only: {', '.join(unknown)} is no section; there are {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU that torch can use")
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}

    def save() -> None:
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1, default=str))

    model = new_model(args.config)
    more = {"steps": {"compiles": not args.no_compile}, "products": {"sweep": not args.no_sweep}}
    for name in args.only.split(","):
        SECTIONS[name](model, results.setdefault(name, {}), args.seconds, save=save, **more[name])
        save()
    print(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    run_command(main)
