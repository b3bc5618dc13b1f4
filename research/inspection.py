"""What a trained network has learned and what it does with a text: one picture and one page.

    python -m research.inspection --checkpoint logs/RUN

It writes inspection.png and inspection.md: the wavelet's lag filters, the scales' weights and
routing, and, over a text, the energy of each scale, the activity of the gates and the use of the
memories' slots.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import DATA_HELP, add_checkpoint_options, load_asked
from common.command import InputError, Parser, run_command
from common.figures import new_figure, save_figure
from common.files import written_whole
from data.prepare import read_tokens
from inference.decode import PackedModel
from layers.features import NAMES
from layers.memory import NgramEmbedding, read_slots
from layers.variants import DeepMixers, GatedHaar
from model import Block, Haar, Lifting, Mixers, ProductKeyMemory
from research.tables import markdown_table

MOST = 12  # token features that are listed
QUIET = 0.01  # a gate's output below this counts as closed


@dataclass
class Activity:
    """Sums over a text: by block, what passes through mixers, gates and memories."""

    tokens: int = 0
    # block -> (S,), sum over positions of the mean square
    energy: dict[str, Tensor] = field(default_factory=dict)
    # block -> (S, 2), sums of |gate| and of gates that are closed
    gates: dict[str, Tensor] = field(default_factory=dict)
    # memory -> (slots,), sums of the weights of reading
    slots: dict[str, Tensor] = field(default_factory=dict)


def lag_filters(model: nn.Module) -> dict[str, list[tuple[list[int], list[float]]]]:
    """By wavelet, for each level its lags and their weights."""
    filters = {}
    for name, module in model.named_modules():
        if isinstance(module, Haar | GatedHaar):
            filters[name] = [([lag], [1.0]) for lag in module.longest_lag]
        if not isinstance(module, Lifting):
            continue
        levels = []
        logits = module.dilation_logits
        for level, first in enumerate(module.first_lag):
            last = module.longest_lag[level]
            weights = [1.0]  # of the single lag, where none is learned
            if logits is not None:
                weights = logits[level].detach().float().softmax(0).tolist()
            levels.append((list(range(first, last + 1)), weights))
        filters[name] = levels
    return filters


def gate_sums(bank: nn.ModuleList, r: Tensor) -> Tensor | None:
    """(S, 2): sums over positions r (S, N, P) of the mean |gate| and of the share of closed gates;
    None without gates."""
    rows = []
    for mixer, x in zip(bank, r, strict=True):
        if mixer.gate is None:
            return None
        if mixer.proj_in is not None and not bank.gates_read_stream:
            x = mixer.proj_in(x)
        gate = bank.activation(mixer.gate(x)).abs()
        rows.append(torch.stack([gate.mean(-1).sum(), (gate < QUIET).float().mean(-1).sum()]))
    return torch.stack(rows)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value.double() if name in sums else value.double()


@contextlib.contextmanager
def watching(model: nn.Module, activity: Activity) -> Iterator[None]:
    """Within it, every forward pass adds to `activity`."""

    def mixers(name: str):
        def hook(module: Mixers | DeepMixers, inputs: tuple[Tensor, ...]) -> None:
            z = module.transform(inputs[0])  # (S, N, P)
            if isinstance(module, DeepMixers):
                z = module.kept(z)
            _add(activity.energy, name, z.square().mean(-1).sum(-1))
            if len(module.banks) > 1:
                return
            r = module.read_by_gates(z, module.transform(inputs[1]))
            sums = gate_sums(module.banks[-1], r)
            if sums is not None:
                _add(activity.gates, name, sums)

        return hook

    def slots(name: str):
        def hook(module: nn.Module, inputs: tuple) -> None:
            if isinstance(module, NgramEmbedding):
                slot, _ = read_slots(*inputs, module.n, module.size)  # inputs: ids, past
                weight = torch.ones(slot.shape)
            else:
                slot, weight = module.lookup(inputs[0].flatten(0, 1))
            used = torch.zeros(module.values.num_embeddings, dtype=torch.float64)
            _add(activity.slots, name, used.index_add(0, slot.flatten(), weight.flatten().double()))

        return hook

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, Mixers | DeepMixers):
            hooks.append(module.register_forward_pre_hook(mixers(name.rpartition(".")[0])))
        elif isinstance(module, ProductKeyMemory | NgramEmbedding):
            hooks.append(module.register_forward_pre_hook(slots(name)))
    folding = [module for module in model.modules() if isinstance(module, Block) and module.folds]
    for block in folding:
        block.folds = False  # the plain branch, in which the mixers are a step of their own
    try:
        yield
    finally:
        for block in folding:
            block.folds = True
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def watch(model: nn.Module, tokens: np.ndarray, piece: int) -> Activity:
    """The activity over tokens (n,), read once in pieces with the state carried on."""
    activity = Activity()
    state = model.start(1, stream=True)
    with watching(model, activity):
        for start in range(0, len(tokens), piece):
            ids = torch.from_numpy(tokens[start : start + piece].astype(np.int64))[None]
            _, state = model(ids, state)
            activity.tokens += ids.size(1)
    return activity


def slots_in_use(used: Tensor) -> tuple[float, float]:
    """The share of slots that were read at all, and the effective number of slots: exp(entropy of
    the reading weights)."""
    share = used / used.sum()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    return (used > 0).double().mean().item(), entropy.exp().item()


def per_block(model: nn.Module, attribute: str) -> dict[str, np.ndarray]:
    """The parameter `attribute` of every module that has one, by the block's name."""
    found = {}
    for name, module in model.named_modules():
        value = module._parameters.get(attribute)
        if value is not None:
            found[name.removesuffix(".mixers")] = value.detach().float().numpy()
    return found


# ===== The page and the picture


def numbers(values) -> list[str]:
    """As cells of a table, with three digits."""
    return [f"{value:.3g}" for value in values]


def page(model: nn.Module, activity: Activity, about: str) -> str:
    """Everything as tables."""
    scales = [f"scale {s}" for s in range(model.config.scales)]
    parts = [f"# Inspection\n\n{about}. Scale 0 is the coarsest.\n\n![All of it](inspection.png)\n"]
    rows = [
        [
            name or "wavelet",
            level,
            ", ".join(f"{lag}: {weight:.3f}" for lag, weight in zip(lags, weights, strict=True)),
        ]
        for name, levels in lag_filters(model).items()
        for level, (lags, weights) in enumerate(levels)
    ]
    if rows:
        parts.append(
            "## Lag filters\n\n" + markdown_table(["wavelet", "level", "lag: weight"], rows)
        )
    rows = []
    for name, vectors in per_block(model, "feature_map").items():
        lengths = np.linalg.norm(vectors, axis=1)
        longest = sorted(enumerate(lengths), key=lambda row: -row[1])[:MOST]
        rows += [[name, NAMES[i], f"{length:.3g}"] for i, length in longest]
    if rows:
        parts.append(
            "## Token features of the largest vectors\n\n"
            + markdown_table(["", "feature", "length"], rows)
        )
    rows = [
        [name, *numbers(weights)] for name, weights in per_block(model, "scale_weights").items()
    ]
    parts.append("## Scale weights\n\n" + markdown_table(["block", *scales], rows))
    for name, matrix in per_block(model, "scale_routing").items():
        rows = [[f"gate of scale {s}", *numbers(row)] for s, row in enumerate(matrix)]
        parts.append(f"## Routing of {name}\n\n" + markdown_table(["reads", *scales], rows))
    rows = [[name, *numbers(energy / activity.tokens)] for name, energy in activity.energy.items()]
    parts.append(
        "## Energy (mean square of a coefficient)\n\n" + markdown_table(["block", *scales], rows)
    )
    rows = [
        [name, what, *numbers(column / activity.tokens)]
        for name, sums in activity.gates.items()
        for what, column in (("mean size", sums[:, 0]), (f"share below {QUIET}", sums[:, 1]))
    ]
    if rows:
        parts.append("## Gates\n\n" + markdown_table(["block", "", *scales], rows))
    rows = [
        [name, len(used), f"{slots_in_use(used)[0]:.1%}", f"{slots_in_use(used)[1]:.0f}"]
        for name, used in activity.slots.items()
    ]
    if rows:
        parts.append(
            "## Memory slots\n\n"
            + markdown_table(["memory", "slots", "ever read", "effective number"], rows)
        )
    return "\n".join(parts)


def draw_activity(model: nn.Module, activity: Activity, path: Path) -> None:
    """Lag filters, scale weights, the first blocks' routing, energy, gates and slots."""
    figure = new_figure(13, 8)
    axes = figure.subplots(2, 3).flatten()
    for name, levels in list(lag_filters(model).items())[:1]:
        for level, (lags, weights) in enumerate(levels):
            axes[0].plot(lags, weights, "o-", label=f"level {level}")
        axes[0].set(
            title=f"lag filters of {name or 'the wavelet'}",
            xlabel="lag",
            ylabel="weight",
            xscale="log",
        )
    for name, weights in per_block(model, "scale_weights").items():
        axes[1].plot(weights, "o-", label=name)
    axes[1].set(title="scale weights", xlabel="scale (0 = coarsest)")
    for name, matrix in list(per_block(model, "scale_routing").items())[:1]:
        limit = np.abs(matrix).max()
        figure.colorbar(axes[2].imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit), ax=axes[2])
        axes[2].set(
            title=f"routing of {name}", xlabel="scale that is read", ylabel="scale that is gated"
        )
    for name, energy in activity.energy.items():
        axes[3].plot(energy / activity.tokens, "o-", label=name)
    axes[3].set(title="energy per scale", xlabel="scale (0 = coarsest)", yscale="log")
    for name, sums in activity.gates.items():
        axes[4].plot(sums[:, 0] / activity.tokens, "o-", label=name)
    axes[4].set(title="mean size of a gate", xlabel="scale (0 = coarsest)", yscale="log")
    for name, used in activity.slots.items():
        axes[5].plot((used / used.sum()).sort(descending=True).values.clamp_min(1e-9), label=name)
    axes[5].set(title="share of reading by slot", xlabel="slot, most read first", yscale="log")
    for one in axes:
        one.grid(alpha=0.3)
        if one.lines:
            one.legend(fontsize="small")
    save_figure(figure, path)


def main() -> None:
    parser = Parser(__doc__.split("\n", 1)[0])
    add_checkpoint_options(parser)
    parser.add_argument("--data", default="test", help=DATA_HELP)
    parser.add_argument(
        "--tokens", type=int, default=16384, help="tokens of it to read (default 16384)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder of page and picture (default: the checkpoint's)"
    )
    args = parser.parse_args()
    if args.tokens < 1:
        raise InputError(f"tokens: {args.tokens} must be at least 1")
    loaded = load_asked(args.checkpoint, args.tokenizer)
    model = loaded.model
    config = loaded.config
    tokenizer = loaded.tokenizer
    if isinstance(model, PackedModel):
        raise InputError(
            f"checkpoint: {args.checkpoint} is quantised; inspect the run that it was made from"
        )
    if args.out is None and loaded.own_folder is None:
        raise InputError("out: give a folder; a checkpoint of the hub lies in a cache")
    out = Path(args.out) if args.out else loaded.own_folder
    out.mkdir(parents=True, exist_ok=True)
    text = read_tokens(args.data, config, tokenizer, print, loaded.folder)
    activity = watch(model.eval(), text.tokens[: args.tokens], config.block_size)
    about = f"`{args.checkpoint}`, {activity.tokens:,} {tokenizer.name} tokens of {text.source}"
    with written_whole(out / "inspection.md") as beside:
        beside.write_text(page(model, activity, about), encoding="utf-8")
    draw_activity(model, activity, out / "inspection.png")
    print(f"{out / 'inspection.md'}\n{out / 'inspection.png'}")


if __name__ == "__main__":
    run_command(main)
