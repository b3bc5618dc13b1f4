"""Beginning from trained weights: another run's, those of a .safetensors file, or of an old .pt.

A run that begins so has the network and the tokenizer of the checkpoint, an optimizer and a
schedule of its own, and a note in its env.json of what it began from. Everything it needs is in
its folder from its first save on, before its first step: the checkpoint may go."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from checkpoint import PACKED_FORMAT, brought_here, load_model, weights_file
from common.command import InputError, shown
from common.files import read_json
from common.tensors import check_tensors, open_tensors, own_tensors
from config import Config, make_config
from data.tokenizer import Tokenizer

# Keys of the network that weights do not depend on: what training does to it, how much text it
# sees at a time, and how long a memory keeps what it saw. A run may have others than those that its
# weights were trained with.
FREE_KEYS = {
    "block_size",
    "recall_horizon",
    "stochastic_depth_rate",
    "gradient_checkpointing",
    "decompose_bypass_cross_window",
    "lifting_dropout",
    "dropout_embedding",
    "dropout_projection",
    "dropout_mixer",
    "dropout_mlp",
    "dropout_lm_head",
}
# Keys of the machine and the folders where the checkpoint was trained: a new run has its own.
PLACE_KEYS = {"out_dir", "cache_dir", "device", "parallel", "tracker"}


@dataclass(frozen=True)
class Origin:
    """Trained weights that a run begins with."""

    file: Path  # a full path
    sha256: str  # of the file
    config: Config  # of the checkpoint
    vocab_size: int
    tokenizer: Tokenizer | None  # None where an old .pt has none beside it
    tensors: dict[str, Tensor]  # by the names of `own_tensors`

    def note(self) -> dict[str, str]:
        """What the run's env.json keeps of it."""
        return {"path": str(self.file), "sha256": self.sha256}


def read_origin(checkpoint: str) -> Origin:
    """Reads the weights of a run directory, a .safetensors file, an old .pt or `owner/name[:file]`
    of the hub. Raises `InputError` where there are none, or where they are quantised."""
    file = weights_file(brought_here(checkpoint))
    if file.suffix == ".safetensors" and file.is_file():
        # Asked of the header, before gigabytes are read.
        metadata = open_tensors(file).metadata() or {}
        if metadata.get("format") == PACKED_FORMAT:
            raise InputError(
                f"init_from: {file} is quantised, and has no weights to train; give the run that it"
                " was made from"
            )
    model, config, tokenizer = load_model(file)  # which says what is wrong with it
    tensors = {name: tensor.detach() for name, tensor in own_tensors(model).items()}
    return Origin(file.resolve(), digest(file), config, model.vocab_size, tokenizer, tensors)


def digest(file: Path) -> str:
    """The sha256 of a file, read a MiB at a time."""
    sha256 = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            sha256.update(block)
    return sha256.hexdigest()


def config_from(origin: Origin, file: str | None, given: dict[str, Any]) -> Config:
    """The config of a run that begins with `origin`: the checkpoint's, with the keys of the config
    `file` and those `given` on the command line put over it.

    Raises `InputError`, naming the key, where one of these asks for another network or another
    tokenizer than the weights are of."""
    in_file = read_json(Path(file)) if file else {}
    asked = in_file | given
    own = origin.config.model_dump(mode="json")
    for key in fixed_keys(origin):
        # As JSON, in which lists are lists: what is of a wrong type is different too.
        if key in asked and asked[key] not in fixed_values(origin, key):
            raise InputError(
                f"{place(key, file, given)}{key}: {shown(asked[key])}, but the weights in"
                f" {origin.file} have {shown(fixed_values(origin, key)[0])}; leave it out"
            )
    kept = {key: value for key, value in own.items() if key not in PLACE_KEYS}
    return make_config(kept | asked, file or str(origin.file), given)


def place(key: str, file: str | None, given: Collection[str]) -> str:
    """What an error's line begins with: the config file, unless the key is of the command line."""
    return "" if key in given else f"{file}: "


def fixed_keys(origin: Origin) -> list[str]:
    """The keys that the weights, and the tokenizer that goes with them, decide."""
    keys = [key for key in Config.network_keys() if key not in FREE_KEYS]
    if origin.tokenizer is not None:
        keys.append("tokenizer")
        if origin.tokenizer.name.startswith("sentencepiece"):
            keys.append("vocab_size")  # which no other tokenizer reads
    return keys


def fixed_values(origin: Origin, key: str) -> list[Any]:
    """The values that a fixed key may have, as JSON has them."""
    # A SentencePiece may come from a .model file, of a config that says nothing of its size.
    if key == "vocab_size":
        return [origin.vocab_size]
    values = [origin.config.model_dump(mode="json", include={key})[key]]
    if key == "tokenizer":
        values.append(origin.tokenizer.name)  # what "auto" came to
    return values


def check_vocabulary(origin: Origin, tokenizer: Tokenizer) -> None:
    """Raises `InputError` unless `tokenizer` has as many tokens as the weights know: where none
    came with them, it is the one that the config asks for."""
    if tokenizer.vocab_size != origin.vocab_size:
        raise InputError(
            f"tokenizer: {tokenizer.name} has {tokenizer.vocab_size:,} tokens, but the weights in"
            f" {origin.file} know {origin.vocab_size:,}; give the tokenizer of their training"
        )


def begin_with(model: nn.Module, origin: Origin) -> None:
    """Gives `model`, whole and on the CPU, the weights of `origin`, which has none from then on.
    Raises `InputError` where they do not fit."""
    own = own_tensors(model)
    check_tensors(origin.tensors, own, origin.file)
    for name, tensor in own.items():
        tensor.detach().copy_(origin.tensors[name])
    # The options of a command live as long as it runs: gigabytes are not to.
    origin.tensors.clear()
