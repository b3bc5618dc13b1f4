"""Checkpoints: safetensors beside config.json and the tokenizer; strict loading; the first
implementation's files too.

A checkpoint PATH is a run directory, a `.safetensors` file in one, a `.pt` of the first
implementation, with or without a `config.json` beside it, or `owner/name[:file]` of the Hugging
Face hub. Loading fills every parameter and uses every tensor, or it is an error that names them.
Files are written whole (common/tensors.py), and nothing is ever unpickled."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.command import InputError
from common.files import read_json, written_whole
from common.hub import download, names_a_repository
from common.tensors import (
    check_finite,
    check_tensor,
    check_tensors,
    load_plain,
    load_tensors,
    open_tensors,
    own_tensors,
    save_plain,
    save_tensors,
    some_of,
)
from config import Config, load_config, make_config, next_power_of_two, without_removed
from data.corpus import HUB
from data.prepare import UNKNOWN_DATASET, run_folder
from data.tokenizer import GPT2_TOKENS, Tokenizer, load_tokenizer, named_tokenizer
from inference.decode import Decoder, PackedModel
from inference.weights import Bits, PackedWeights
from layers.state import State
from layers.variants import MultinodalLM
from model import WaveletLM, build_model

MODEL_FILE = "best_model.safetensors"
# what a checkpoint's folder has beside it, for the commands that load it
BESIDE = ("config.json", "tokenizer.json", "tokenizer.model", "data.json")
# in the names of the published files of the first implementation: what they were trained on
PUBLISHED = {"wikitext-103": "wikitext-103", "pg-19": "pg19"}
PACKED_FORMAT = "waveletlm-packed"  # of quantised checkpoints, in the file's metadata


def save_model(model: nn.Module, path: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Writes the model's own tensors; config.json and the tokenizer beside it are the run's.
    `tensors` are the whole ones of a model that is sharded."""
    save_tensors(
        own_tensors(model) if tensors is None else tensors,
        path,
        {"format": "waveletlm", "vocab_size": str(model.vocab_size)},
    )


def fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Puts `tensors` in the place of the model's. Raises `InputError` as `check_tensors` does."""
    check_tensors(tensors, own_tensors(model), path)
    # strict was done above; tied names are absent here
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()


# ===== What commands load


class Loaded(NamedTuple):
    """A checkpoint that a command works with. `folder` holds its config and what the run kept;
    `own_folder` is where something may be written beside it, None for a file of the hub's cache."""

    model: nn.Module
    config: Config
    tokenizer: Tokenizer | None
    folder: Path
    own_folder: Path | None


DATA_HELP = (
    "a split of the run's data, or a file or folder of text: .txt, .jsonl, .parquet, packed ones"
    " (default test)"
)


def add_checkpoint_options(parser: argparse._ActionsContainer) -> None:
    """Adds --checkpoint and --tokenizer, which `load_asked` reads."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="run directory, .safetensors file, an old .pt, or owner/name[:file] of the Hugging"
        " Face hub where no such path is here",
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="NAME",
        help="bytes, gpt2 or a SentencePiece .model file, for a checkpoint that has none beside it"
        " (default: the one beside it; GPT-2's for a vocabulary of 50,257)",
    )


def load_asked(
    checkpoint: str, tokenizer: str = "", device: str = "cpu", needs_text: bool = True
) -> Loaded:
    """What --checkpoint and --tokenizer ask for. Raises `InputError` where there is no such, or no
    tokenizer though the command `needs_text`."""
    from_hub = names_a_repository(checkpoint)
    path = brought_here(checkpoint)
    if from_hub:
        say_on_stderr(f"note: {checkpoint} is kept at {path}")
    model, config, own = load_model(path, device, tokenizer)
    if own is None and needs_text:
        raise InputError(
            f"checkpoint: {checkpoint} has no tokenizer beside it (tokenizer.json), so no text can"
            f" be read or written; give --tokenizer, one of {model.vocab_size:,} tokens: a"
            " SentencePiece .model file, gpt2 or bytes"
        )
    folder = run_folder(path)
    return Loaded(model, config, own, folder, None if from_hub else folder)


def brought_here(checkpoint: str) -> Path:
    """The path of a checkpoint on this machine; one that owner/name[:file] names is downloaded."""
    if names_a_repository(checkpoint):
        return download(checkpoint, chosen_file, BESIDE)
    return Path(checkpoint)


def weights_file(path: Path) -> Path:
    """The file of weights that `path` is, or has as a run directory."""
    return path / chosen_file(os.listdir(path), path) if path.is_dir() else path


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def chosen_file(names: Sequence[str], place: str | Path) -> str:
    """Which of the files `names` in a folder or repository is its checkpoint. Raises `InputError`,
    naming the `place`, where none is, or one of several may be."""
    for name in (MODEL_FILE, "best_model.pt"):
        if name in names:
            return name
    # as the first implementation's are published
    found = sorted(name for name in names if re.fullmatch(r"best_model[^/]*\.pt", name))
    if len(found) > 1:
        raise InputError(
            f"checkpoint: {place} has several, {', '.join(found)}; name one of these files"
        )
    if not found:
        raise InputError(
            f"{place}: no such checkpoint; give a run directory, a .safetensors file or an old .pt"
        )
    return found[0]


def load_model(
    path: str | Path,
    device: str = "cpu",
    tokenizer: str = "",
    say: Callable[[str], None] = say_on_stderr,
) -> tuple[nn.Module, Config, Tokenizer | None]:
    """The model (in eval mode, on `device`), its config and its tokenizer. Of a quantised
    checkpoint the model is a `PackedModel`, which reads text and has no parameters.

    The tokenizer is the one that `tokenizer` names (bytes, gpt2, a .model file), else the one
    beside the checkpoint, else GPT-2's where the vocabulary is its; else None. `say` gets a line
    for what was taken and nothing tells: a tokenizer, and values of a missing config.json."""
    file = weights_file(Path(path))
    if not file.is_file() and not file.exists():
        raise InputError(
            f"{file}: no such checkpoint; give a run directory, a .safetensors file or an old .pt"
        )
    if file.suffix == ".pt":
        tensors, config, vocab_size = read_original(file, say)
    elif file.suffix == ".safetensors":
        tensors = load_tensors(file)
        config = load_config(file.parent / "config.json")
        metadata = open_tensors(file).metadata() or {}
        if metadata.get("format") == PACKED_FORMAT:
            packed = read_packed(tensors, metadata, config, file, device)
            return packed, config, found_tokenizer(file, packed.vocab_size, tokenizer, say)
        vocab_size = _vocab_size(tensors, file)
    else:
        raise InputError(
            f"{file}: not a checkpoint; give a run directory, a .safetensors file or an old .pt"
        )
    # every tensor comes from the file: initialising them first would only cost time
    with torch.device("meta"):
        model = build_model(config, vocab_size)
    if file.suffix == ".pt":
        tensors = from_original(tensors, model, file)
    fill(model, tensors, file)
    found = found_tokenizer(file, vocab_size, tokenizer, say)
    return model.eval().to(device), config, found


def found_tokenizer(
    file: Path, vocab_size: int, asked: str, say: Callable[[str], None]
) -> Tokenizer | None:
    """The tokenizer of the checkpoint `file`, see `load_model`. Raises `InputError` where it has
    not the vocabulary of the checkpoint's network."""
    if asked:
        tokenizer = named_tokenizer(asked)
        if tokenizer.vocab_size != vocab_size:
            raise InputError(
                f"tokenizer: {asked} has {tokenizer.vocab_size:,} tokens, but {file} knows"
                f" {vocab_size:,}; give the one that it was trained with"
            )
        if (changes := getattr(tokenizer, "changes", None)) is not None:
            say(
                f"note: {asked} changes text ({changes!r} becomes"
                f" {tokenizer.decode(tokenizer.encode(changes))!r}), so figures per byte are not"
                " comparable with others"
            )
        return tokenizer
    tokenizer = load_tokenizer(file.parent)
    if tokenizer is None and vocab_size == GPT2_TOKENS:
        say(f"note: no tokenizer lies beside {file}; GPT-2's has its vocabulary and is taken")
        return named_tokenizer("gpt2")
    if tokenizer is not None and tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"{file}: knows {vocab_size} tokens, but {tokenizer.name} beside it has"
            f" {tokenizer.vocab_size}: it is another run's"
        )
    return tokenizer


def read_packed(
    tensors: dict[str, Tensor], metadata: dict[str, str], config: Config, path: Path, device: str
) -> PackedModel:
    """The model of a quantised checkpoint: its tensors as quantize.py wrote them, and the bits of
    each component."""
    try:
        widths = Bits(**json.loads(metadata["bits"]))
        vocab_size = int(metadata["vocab_size"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: its metadata does not name the bits of each component; quantise the run again"
        ) from None
    for name, tensor in tensors.items():
        check_finite(name, tensor, path)
    with torch.device("meta"):
        model = build_model(config, vocab_size).eval()
    weights = PackedWeights(
        widths, {name: tensor.to(device) for name, tensor in tensors.items()}, source=str(path)
    )
    return PackedModel(Decoder(model, weights=weights)).eval()


def _vocab_size(tensors: dict[str, Tensor], path: Path) -> int:
    for name, tensor in tensors.items():
        if name.endswith("token_embedding.weight"):
            return tensor.size(0)
    raise InputError(f"{path}: has no token_embedding.weight, so it is not a WaveletLM checkpoint")


# ===== The first implementation's layout
# One flat state dict, shared tensors under each layer that uses them.


def original_names(name: str, model: WaveletLM) -> list[str]:
    """The names under which the first implementation keeps our tensor `name`; a shared one has
    several."""
    config = model.config
    name = re.sub(r"\.parametrizations\.weight\.original$", ".weight_orig", name)
    name = re.sub(r"\.parametrizations\.weight\.0\._([uv])$", r".weight_\1", name)
    if match := re.match(r"wavelets\.(\d+)\.(.+)", name):
        index = int(match[1])
        rest = match[2]
        layers = [
            f"layers.{i}." for i in range(len(model.layers)) if i % len(model.wavelets) == index
        ]
        return [layer + old for layer in layers for old in _original_wavelet_names(rest, config)]
    if match := re.match(
        r"(layers\.\d+\.)inverse_update_nets\.(?:update_nets\.(\d+)\.(.+)|basis_weights)", name
    ):
        layer, base, rest = match.groups()  # of several bases
        own = "basis_weights" if base is None else f"wavelets.{base}.update_nets.{rest}"
        names = [
            f"{layer}lifting_reconstruct_wavelet.{own}",
            f"{layer}lifting_reconstruct.multi_basis.{own}",
        ]
        inverse = (
            []
            if base is None
            else [f"{layer}lifting_reconstruct.reconstructs.{base}.decompose.update_nets.{rest}"]
        )
        return names + inverse
    if match := re.match(r"(layers\.\d+\.)inverse_(update_nets\..+)", name):
        return [
            match[1] + place + match[2]
            for place in ("lifting_reconstruct_wavelet.", "lifting_reconstruct.decompose.")
        ]
    name = re.sub(r"\.bypass\.(average\.)?", ".", name)
    name = re.sub(r"\.mixers\.norms\.", ".mixer_depth_norms.", name)
    name = re.sub(r"\.mixers\.(alphas|betas)\.", r".mixer_depth_\1.", name)
    name = name.replace(".mixers.scale_routing", ".scale_routing").replace(".ffwd.", ".ffwd.net.")
    bank = ".scale_mixers." if config.mixer_depth == 1 else r".scale_mixers_by_depth.\1."
    inner = "" if config.per_scale_mixer_widths is None else "mixer."
    name = re.sub(r"\.mixers\.banks\.(\d+)\.(\d+)\.(proj_(?:in|out))", bank + r"\2.\3", name)
    name = re.sub(r"\.mixers\.banks\.(\d+)\.(\d+)\.", bank + r"\2." + inner, name)
    if name == "token_embedding.weight" and config.tie_embedding_to_lm_head:
        return [name, "lm_head.weight"]
    return [name]


def _original_wavelet_names(rest: str, config: Config) -> list[str]:
    names = [f"lifting_wavelet.{rest}"]
    if config.untied_reconstruction:
        return names
    base = re.match(r"wavelets\.(\d+)\.(.+)", rest)  # of several
    if base or rest == "basis_weights":
        names.append(f"lifting_reconstruct.multi_basis.{rest}")
    if base:
        return [*names, f"lifting_reconstruct.reconstructs.{base[1]}.decompose.{base[2]}"]
    return names if rest == "basis_weights" else [*names, f"lifting_reconstruct.decompose.{rest}"]


def read_original(
    path: Path, say: Callable[[str], None] = say_on_stderr
) -> tuple[dict[str, Tensor], Config, int]:
    """Reads a `.pt` and the config.json beside it. Returns the tensors by their old names, the
    config, and V. Where there is no config.json, `say` gets a line with all that was taken because
    the tensors cannot show it."""
    raw = load_plain(path)
    if not (
        raw and all(isinstance(name, str) and isinstance(t, Tensor) for name, t in raw.items())
    ):
        raise InputError(
            f"{path}: must hold one dict of tensors by name, as the first implementation saves it"
        )
    # here, since NaN would make copies of one tensor seem to differ
    for name, tensor in raw.items():
        check_tensor(name, tensor, tensor.shape, tensor.dtype, path)
        check_finite(name, tensor, path)
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in raw.items()}
    if "token_embedding.weight" not in tensors or "layers.0.scale_weights" not in tensors:
        raise InputError(
            f"{path}: has no token_embedding.weight or layers.0.scale_weights, so it is not a"
            " WaveletLM"
        )
    source = path.parent / "config.json"
    has_config = os.path.lexists(source)
    config = original_config(read_json(source) if has_config else {}, tensors, source)
    if config.dataset == UNKNOWN_DATASET:
        named = [dataset for words, dataset in PUBLISHED.items() if words in path.name]
        config = config.model_copy(update={"dataset": named[0] if named else UNKNOWN_DATASET})
    if not has_config:
        taken = ", ".join(f"{key} {json.dumps(value)}" for key, value in not_shown(config).items())
        say(
            f"note: no config.json lies beside {path}; what its tensors cannot show is taken to be"
            f" {taken}; a config.json with these keys beside it may say otherwise"
        )
    return tensors, config, tensors["token_embedding.weight"].size(0)


def original_config(old: dict[str, Any], tensors: dict[str, Tensor], source: Path) -> Config:
    """The config of an old run: its own values, for keys that it lacks what the tensors show, else
    off.

    Only what shapes the network is taken: how an old run was trained has no bearing on its weights.
    A key that we do not know may be there, since old configs have many, unless it is true: then it
    switches on what this network lacks."""
    old = without_removed(old, str(source))
    known = {key: old[key] for key in Config.network_keys() if key in old}
    if unknown := [
        key for key, value in old.items() if key not in Config.model_fields and value is True
    ]:
        ignored = {"benchmark_only"}
        if rest := [key for key in unknown if key not in ignored]:
            raise InputError(
                f"{source}: {', '.join(rest)} switches on something that this network does not have"
            )
    values = {
        "per_scale_mixer_widths": None,
        "dataset": _trained_on(old.get("dataset")) or UNKNOWN_DATASET,
        "wavelet_crawl": False,
        "multi_basis_lifting": False,
    }
    values |= {
        key: False for key in Config.network_keys() if Config.model_fields[key].annotation is bool
    }
    shown = shown_by_tensors(tensors)
    if shown["mixer_depth"] > 1:  # mixers in a row were of full width, whatever the key said
        known.pop("per_scale_mixer_widths", None)
    if shown["wavelet_mode"] == "haar":  # there was nothing to untie
        known.pop("untied_reconstruction", None)
    values |= shown | known
    return make_config(values, str(source))


def _trained_on(name: Any) -> str | None:
    """The data set that an old config.json names, where it is one that everybody can have."""
    name = PUBLISHED.get(name, name) if isinstance(name, str) else ""
    return name if name in HUB else None


def not_shown(config: Config) -> dict[str, Any]:
    """The keys and values of `config` that decide what an old network computes and leave no trace
    in its tensors."""
    keys = ["block_size", "loop_iterations", "stab_embed_scaling"]
    if config.layers == 1:
        keys.append("looped_blocks")
    if config.use_mixer_gate:
        keys.append("mixer_gate_activation")
    if config.mixer_depth > 1:
        keys.append("mixer_depth_residuals")
    if config.pkm_enabled:
        keys.append("pkm_top_k")
    if config.fwpkm_enabled:
        keys += ["fwpkm_top_k", "fwpkm_chunk_size", "fwpkm_update_lr"]
    return {key: getattr(config, key) for key in keys}


def shown_by_tensors(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The config values that the names and shapes of an old state dict show."""

    def shape(pattern: str) -> torch.Size | None:
        return next((t.shape for name, t in tensors.items() if re.fullmatch(pattern, name)), None)

    def count(pattern: str) -> int:
        return len({re.match(pattern, name)[1] for name in tensors if re.match(pattern, name)})

    width = tensors["token_embedding.weight"].size(1)
    padded = next_power_of_two(width)
    levels = tensors["layers.0.scale_weights"].numel() - 1
    mixers = r"layers\.0\.(?:scale_mixers|scale_mixers_by_depth\.0)"
    hidden = shape(r"layers\.0\.lifting_wavelet\.(?:wavelets\.0\.)?predict_nets\.0\.0\.weight")
    linear = shape(r"layers\.0\.lifting_wavelet\.(?:wavelets\.0\.)?predict_nets\.0\.weight")
    crawl = shape(r"layers\.0\.lifting_wavelet\.(?:wavelets\.0\.)?dilation_logits")
    layer0 = {
        n.removeprefix("layers.0."): t
        for n, t in tensors.items()
        if n.startswith("layers.0.lifting")
    }
    shared = all(torch.equal(t, tensors.get(f"layers.1.{n}", t)) for n, t in layer0.items())
    depths = count(r"layers\.0\.scale_mixers_by_depth\.(\d+)\.")
    values = {
        "C": width, "layers": count(r"layers\.(\d+)\."), "levels": levels,
        "wavelet_mode": "lifting" if hidden or linear else "haar",
        "lifting_linear_only": linear is not None,
        "lifting_hidden_mult": hidden[0] // padded if hidden else 1,
        "shared_lifting_weights": shared,
        "skip_proj_out": "layers.0.proj_out.weight" not in tensors,
        "untied_reconstruction": shape(r"layers\.0\.lifting_reconstruct_wavelet\..*") is not None,
        "multi_basis_lifting": "layers.0.lifting_wavelet.basis_weights" in tensors,
        "multi_basis_inits": ["haar"] * max(1,
            count(r"layers\.0\.lifting_wavelet\.wavelets\.(\d+)\.")),
        "wavelet_crawl": crawl is not None, "wavelet_crawl_k": crawl[1] if crawl else 3,
        "decompose_bypass": "layers.0.history_gains" in tensors,
        "decompose_bypass_ema": "layers.0.ema_gate.weight" in tensors,
        "learned_residual": "layers.0.residual_alpha_mlp" in tensors,
        "per_layer_embedding": "layers.0.embedding_residual_gamma" in tensors,
        "cross_scale_gating": "layers.0.scale_routing" in tensors,
        "use_mixer_gate": shape(mixers + r"\.0\.(?:mixer\.)?gate\.weight") is not None,
        "low_rank": (shape(mixers + r"\.0\.(?:mixer\.)?U") or [0, 0])[1],
        "mixer_depth": max(1, depths),
        "mixer_depth_stabilizers": "layers.0.mixer_depth_alphas.0" in tensors,
        "stab_spectral_norm": any(name.endswith(".weight_orig") for name in tensors),
        "mlp_expansion": (shape(r"layers\.0\.ffwd\.net\.0\.weight") or [0])[0] // width,
        "mlp_layers": 1 if "layers.0.ffwd.net.1.weight" in tensors else max(2,
            count(r"layers\.0\.ffwd\.net\.(\d+)\.")),
    }  # fmt: skip
    inner = [shape(mixers + rf"\.{s}\.mixer\.mixer\.weight(?:_orig)?") for s in range(levels + 1)]
    values["per_scale_mixer_widths"] = [s[0] / padded for s in inner] if all(inner) else None
    if "lm_head.weight" in tensors:
        values["tie_embedding_to_lm_head"] = torch.equal(
            tensors["lm_head.weight"], tensors["token_embedding.weight"]
        )
    return values | _memories_shown(tensors)


def _memories_shown(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What an old state dict shows of the product-key memories."""
    values = {}
    for memory in ("pkm", "fwpkm"):
        keys = tensors.get(f"layers.0.{memory}.keys_a")  # (heads, keys of a half, width of a half)
        values[f"{memory}_enabled"] = keys is not None
        if keys is not None:
            values |= {f"{memory}_heads": len(keys), f"{memory}_num_keys": keys.size(1) ** 2}
    return values


def from_original(old: dict[str, Tensor], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Old tensors under our names. Copies of a shared tensor must be equal; every old tensor must
    be used.

    Two have no place here and are used up so: fast weights left in a file are added to the values
    they change, and the Predict networks of an untied reconstruction, which nothing ever reads, are
    dropped."""
    if isinstance(model, MultinodalLM):
        raise InputError(
            f"{path}: multinodal_enabled: only single networks are read from the old format"
        )
    unused = set(old)
    tensors = {}
    for name in own_tensors(model):
        copies = [alias for alias in original_names(name, model) if alias in old]
        if not copies:
            raise InputError(
                f"{path}: lacks {original_names(name, model)[0]}, which its config.json asks for"
            )
        if different := [alias for alias in copies if not torch.equal(old[alias], old[copies[0]])]:
            raise InputError(
                f"{path}: {different[0]} differs from {copies[0]}, but its config.json makes them"
                " one tensor"
            )
        unused -= set(copies)
        tensors[name] = old[copies[0]]
    for name in sorted(unused):
        if name.endswith(".fwpkm.value_deltas"):
            values = name.replace("value_deltas", "values.weight")
            if values in tensors:
                tensors[values] = tensors[values] + old[name]
                unused.discard(name)
        elif model.config.untied_reconstruction and re.search(
            r"\.lifting_reconstruct.*\.(predict_nets|dilation_logits)", name
        ):
            unused.discard(name)
    if unused:
        raise InputError(
            f"{path}: has {some_of(unused)}, which the network of its config.json has no use for"
        )
    return tensors


def to_original(model: WaveletLM) -> dict[str, Tensor]:
    """The model's tensors in the first implementation's layout, which `from_original` reads back
    unchanged."""
    if not isinstance(model, WaveletLM) or model.config.exp_parametrization:
        raise InputError("the old format holds single networks without exp_parametrization only")
    old = {}
    for name, tensor in own_tensors(model).items():
        for alias in original_names(name, model):
            old[alias] = tensor.detach()
        if name.endswith(".fwpkm.values.weight"):
            old[name.replace("values.weight", "value_deltas")] = torch.zeros_like(tensor)
    return old


def save_original(model: WaveletLM, folder: Path) -> None:
    """Writes `best_model.pt` and config.json as the first implementation lays them out."""
    save_plain(to_original(model), folder / "best_model.pt")
    with written_whole(folder / "config.json") as beside:
        beside.write_text(
            json.dumps(model.config.model_dump(mode="json"), indent=1), encoding="utf-8"
        )


# ===== States


def save_state(state: State, path: Path) -> None:
    """Writes a model state, so that a text can be gone on with later."""
    parts = state.saved()
    tensors = {f"{i}.{name}": t for i, part in enumerate(parts) for name, t in part.items()}
    save_tensors(tensors, path, {"blocks": str(len(parts))})


def load_state(path: Path, device: str = "cpu") -> State:
    """The state that `save_state` wrote."""
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(path).items():
        index, _, name = key.partition(".")
        if not index.isdecimal():
            raise InputError(
                f"{path}: has {key}, so it is not a saved state; give a file that save_state wrote"
            )
        parts.setdefault(int(index), {})[name] = tensor.to(device)
    return State.of_saved([parts[i] for i in sorted(parts)])
