"""Decoding on a GPU, measured: functions that take a model on the device and fill a dict. `cuda.py`
beside this calls them.

    python -m research.cuda_decoding      # config.json's network with new weights, all sections
    python -m research.cuda_decoding --only products --seconds 60 --json FILE

Every section keeps to a number of seconds: what it does not get to is named under "left_out".
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

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


WIDTHS = (16, 8, 4, None)
KINDS = {32: "float32", 16: "float16", 8: "int8", 4: "int4"}


class Budget:
    """Seconds that a section may take, and what it left out for want of them."""

    def __init__(self, seconds: float, results: dict[str, Any]):
        self.end, self.results = time.perf_counter() + seconds, results

    def has(self, seconds: float, name: str) -> bool:
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
    """Bytes of weights that a token reads: all but the tables that are looked up, whose rows are of
    no weight."""
    weights = PackedWeights(Bits.of(bits), saving=True)
    Decoder(model, weights=weights)
    tied = model.config.tie_embedding_to_lm_head
    tables = ["ngrams.values/", ".pkm.values/", ".fwpkm.values/"] + ([] if tied else ["embedding/"])
    return float(
        sum(
            t.nbytes
            for name, t in weights.saved.items()
            if not any(name.startswith(a) or a in name for a in tables)
        )
    )


def steps(
    model: nn.Module,
    results: dict[str, Any],
    seconds: float,
    widths=WIDTHS,
    compiles: bool = True,
    save=lambda: None,
):
    """A token's step at each width: eager, as a graph, compiled and as a graph; batches; a prompt;
    whole texts."""
    budget, device = Budget(seconds, results), model.cells[0].token_embedding.weight.device
    vocab = model.vocab_size
    ids = torch.randint(vocab, (1, 16), device=device)
    with torch.no_grad():
        wanted, _ = model(ids, model.start(1, stream=True))
    for bits in widths:
        row: dict[str, Any] = results.setdefault(f"bits {bits or 32}", {})
        attempt(
            row,
            "all",
            lambda bits=bits, row=row: one_width(
                model, bits, row, budget, ids, wanted[:, -1], compiles, save
            ),
        )
        save()
        free()


def one_width(model, bits, row, budget, ids, wanted, compiles, save) -> None:
    if not budget.has(5, f"bits {bits}"):
        return
    row["bytes"] = bytes_read(model, bits)
    free()
    began = time.perf_counter()
    decoder = Decoder(model, bits)
    row["seconds_to_prepare"] = time.perf_counter() - began
    token = ids[:, :1].clone()
    box = [decoder(ids, decoder.start(1, stream=True))[1]]

    def eager() -> None:
        box[0] = decoder(token, box[0])[1]

    logits, _ = decoder(ids, decoder.start(1, stream=True))
    row["error"] = ((logits[:, -1] - wanted).norm() / wanted.norm()).item()
    state, last = decoder.start(1, stream=True), None
    for one in ids.split(1, dim=1):
        last, state = decoder(one, state)
    row["error_of_steps"] = ((last[:, -1] - wanted).norm() / wanted.norm()).item()
    row["eager_ms"], (_, row["host_ms"]) = mean_ms(eager, 20), median_ms(eager, 10)

    def graphed(compiled: bool, name: str) -> None:
        began = time.perf_counter()
        step = GraphedStep(decoder, 1, True, compiled)
        row[f"{name}_seconds_to_make"] = time.perf_counter() - began
        for one in ids.split(1, dim=1):
            found = step(one)
        row[f"{name}_error"] = ((found - wanted).norm() / wanted.norm()).item()
        row[f"{name}_ms"] = ms = mean_ms(lambda: step(token), 100)
        row[f"{name}_replay_ms"] = mean_ms(step.graph.replay, 100)
        row[f"{name}_tokens_per_second"], row[f"{name}_gb_per_second"] = (
            1e3 / ms,
            row["bytes"] / ms / 1e6,
        )

    if can_be_captured(decoder):
        attempt(row, "graph", lambda: graphed(False, "graph"))
    save()
    prompt = torch.zeros(1, 512, dtype=torch.int64, device=ids.device)
    if budget.has(2, f"bits {bits}: prompt"):
        attempt(
            row,
            "prompt",
            lambda: row.__setitem__("prefill_512_ms", mean_ms(lambda: decoder(prompt), 5, 1)),
        )

    def text(compiled: bool, name: str) -> None:
        decoder.compiles_graphs = compiled
        decoder.graphs = {}
        generate(decoder, ids, 8, Settings())
        torch.cuda.synchronize()
        began = time.perf_counter()
        generate(decoder, ids, 256, Settings(), on_token=lambda tokens: int(tokens[0]))
        torch.cuda.synchronize()
        row[f"{name}_tokens_per_second"] = 256 / (time.perf_counter() - began)

    if budget.has(3, f"bits {bits}: text"):
        attempt(row, "text", lambda: text(False, "text"))
    for n in (8, 64):
        if budget.has(3, f"bits {bits}: {n} rows"):

            def many(n=n) -> None:
                step = GraphedStep(decoder, n, True)
                tokens = torch.zeros(n, 1, dtype=torch.int64, device=ids.device)
                row[f"{n}_rows_tokens_per_second"] = 1e3 * n / mean_ms(lambda: step(tokens), 20)

            attempt(row, f"{n} rows", many)
            free()
    if compiles and budget.has(60, f"bits {bits}: compiled"):
        attempt(row, "compiled", lambda: graphed(True, "compiled_graph"))
        if budget.has(10, f"bits {bits}: compiled text"):
            attempt(row, "compiled text", lambda: text(True, "compiled_text"))
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30


# ===== Products alone


def shapes(model: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """The products of a step, (outputs, inputs) of each matrix, by name: those of the model's
    width."""
    c, v = model.config.C, model.vocab_size
    return {
        "mixers": [(c + 64, c)] * 3 + [(c // 2 + 64, c)] * 3, "square": [(c, c)],
        "up": [(20 * c, c)], "down": [(c, 20 * c)],
        "head": [(v, c)],
    }  # fmt: skip


def products(
    model: nn.Module, results: dict[str, Any], seconds: float, sweep: bool = True, save=lambda: None
) -> None:
    """GB/s of each product with one row: our kernels, with other block sizes too, torch's, and of 8
    rows."""
    budget, device = Budget(seconds, results), model.cells[0].token_embedding.weight.device
    for name, sizes in shapes(model).items():
        for bits in (16, 8, 4):
            row: dict[str, Any] = results.setdefault(f"{name} {bits}", {})
            if budget.has(3, f"{name} {bits}"):
                attempt(
                    row,
                    "all",
                    lambda s=sizes, b=bits, r=row: one_product(s, b, r, device, budget, sweep),
                )
            save()


def one_product(sizes, bits, row, device, budget, sweep) -> None:
    inputs = max(k for _, k in sizes)
    weights = [torch.randn(size, device=device) * 0.02 for size in sizes]
    tensors = [quantised(weight, bits) for weight in weights]
    size = sum(t.nbytes for each in tensors for t in each.values())
    # more than a cache holds, read in turn, as a step reads its weights
    copies = max(2, int(2**28 / size) + 1)
    held = [
        [{k: t.clone() for k, t in each.items()} for each in tensors] for _ in range(min(copies, 8))
    ]
    x = torch.randn(len(sizes), inputs, device=device, dtype=torch.bfloat16)
    row["mb"] = size / 1e6

    def rate(calls: list[Callable]) -> float:
        """GB/s of the calls in turn, in one graph, so that launches of the host do not count."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph, rounds = torch.cuda.CUDAGraph(), max(1, 16 // len(calls))
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        return size * rounds * len(calls) / mean_ms(graph.replay, 20, 3) / 1e6

    if kernels.HAS_TRITON:
        stacks = [kernels.Stack(each) for each in held]
        wanted = torch.stack(
            [
                F.pad(w @ x[s, : w.size(1)].float(), (0, max(n for n, _ in sizes) - len(w)))
                for s, w in enumerate(weights)
            ]
        )
        found = stacks[0](x).float()
        row["error"] = ((found - wanted).norm() / wanted.norm()).item()
        kind = KINDS[bits]
        before = kernels.Stack.SHAPES[kind]
        row[f"ours {before}"] = rate([lambda s=s: s(x) for s in stacks])
        if sweep:
            for rows in (1, 2, 4, 8, 16):
                for wide in (512, 1024, 2048, 4096):
                    for warps in (2, 4, 8):
                        per_thread = rows * wide / (warps * 32)
                        if (
                            (rows, wide, warps) == before
                            or not 16 <= per_thread <= 128
                            or not budget.has(1, "sweep")
                        ):
                            continue
                        kernels.Stack.SHAPES = kernels.Stack.SHAPES | {kind: (rows, wide, warps)}
                        name = f"ours {(rows, wide, warps)}"
                        value = attempt(row, name, lambda: rate([lambda s=s: s(x) for s in stacks]))
                        if value:
                            row[name] = value
            kernels.Stack.SHAPES = kernels.Stack.SHAPES | {kind: before}
        del stacks
    matrices = [
        [MATRICES[bits](t, n) for t, (n, _) in zip(each, sizes, strict=True)] for each in held
    ]
    for each in matrices:
        for matrix in each:
            matrix.row_kernel = None
    rows = [x[s : s + 1, :k] for s, (_, k) in enumerate(sizes)]
    if bits == 16:
        calls = [lambda e=each: [m(r) for m, r in zip(e, rows, strict=True)] for each in matrices]
        row["torch's"] = attempt(row, "torch's", lambda: rate(calls))
    elif bits == 8:

        def int8() -> float:
            calls = [
                lambda e=each: [
                    torch.ops.aten._weight_int8pack_mm(x[s : s + 1, :k], t["int8"], t["scale"])
                    for s, (t, (_, k)) in enumerate(zip(e, sizes, strict=True))
                ]
                for each in held
            ]
            return rate(calls)

        row["torch's"] = attempt(row, "torch's", int8)
    elif len(sizes) == 1 and sizes[0][0] % 8 == 0:

        def int4() -> float:
            packs = [
                (
                    torch.ops.aten._convert_weight_to_int4pack(
                        (t["int4"] << 4) | (t["int4"] >> 4), 8
                    ),
                    t["steps"].transpose(0, 1).contiguous(),
                )
                for (t,) in held
            ]
            return rate(
                [lambda p=p: torch.ops.aten._weight_int4pack_mm(x, p[0], 64, p[1]) for p in packs]
            )

        row["torch's"] = attempt(row, "torch's", int4)


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
