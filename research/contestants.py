"""The networks that compare.py trains beside ours."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from common.command import InputError
from config import Config, load_config
from layers.memory import NgramEmbedding
from model import build_model
from research.delta_net import build_delta_net
from research.opponent import Opponent, ngram_table
from research.transformer import build_transformer

ROOT = Path(__file__).resolve().parents[1]


class Foreign(Opponent):
    """A causal language model of `transformers` with the interface of ours."""

    def __init__(self, network: nn.Module, vocab_size: int, ngrams: NgramEmbedding | None = None):
        """ngrams: a table beside its embedding, as a WaveletLM may have."""
        super().__init__()
        # First, and under our names, by which Muon's optimizers tell tables from matrices.
        self.token_embedding = network.get_input_embeddings()
        self.lm_head = network.get_output_embeddings()
        self.network = network
        self.vocab_size = vocab_size
        self.ngrams = ngrams

    def body(self, e: Tensor) -> Tensor:
        return self.network.base_model(inputs_embeds=e, use_cache=False).last_hidden_state


def transformers_library(at_least: str = "5.17"):
    """The module `transformers`, imported late since it is optional. Raises `InputError` where it
    is not installed, or older than `at_least`."""
    try:
        import transformers
        from transformers.utils.versions import require_version

        require_version(f"transformers>={at_least}")
    except ImportError:
        raise InputError(
            f"models: Llama and Mamba-2 need the package transformers from {at_least} on;"
            f" pip install 'transformers>={at_least}'"
        ) from None
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its advice on fast GPU kernels
    return transformers


def build_llama(config: Config, vocab_size: int, width: int, layers: int, inner: int) -> Foreign:
    """Rotary positions, RMSNorm, SwiGLU; heads of 32 channels; with a table of n-grams where the
    config has one."""
    library = transformers_library()
    network = Foreign(
        library.LlamaForCausalLM(
            library.LlamaConfig(
                vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers,
                num_attention_heads=width // 32,
                num_key_value_heads=width // 32, intermediate_size=inner,
                max_position_embeddings=config.block_size, tie_word_embeddings=False,
            )
        ),
        vocab_size,
        ngram_table(config, width),
    )  # fmt: skip
    network.longest = config.block_size
    return network


def build_mamba2(config: Config, vocab_size: int, width: int, layers: int) -> Foreign:
    """The chunked state-space form in plain torch, with small chunks and states, which suit a CPU.
    (Mamba's first form goes step by step there: a hundredth of the speed.)"""
    library = transformers_library()
    return Foreign(
        library.Mamba2ForCausalLM(
            library.Mamba2Config(
                vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, expand=2,
                head_dim=64,
                num_heads=width // 32, state_size=32, n_groups=1, chunk_size=32,
                tie_word_embeddings=False,
            )
        ),
        vocab_size,
        ngram_table(config, width),
    )  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """A name, its optimisation (and for WaveletLM its network) as a config, and what builds the
    network."""

    name: str
    config: Config
    build: Callable[[Config, int], nn.Module]


ADAMW = {"optimizer": "AdamW", "optimizer_eps": 1e-8, "weight_decay": 0.1, "warmup_fraction": 0.1}
MUON = ADAMW | {
    "optimizer": "Muon", "schedule": "trapezoid", "warmup_fraction": 0.05,
    "cooldown_fraction": 0.95,
    "lr": 32e-3, "muon_lr": 0.02,
}  # fmt: skip
RELEASED = {"released": "configs/released-small.json", "released-4m": "configs/released-4m.json"}
# Builder, and keys of its config. Widths are such that each has about 1 million parameters besides
# embedding and head (4 million with -4m), like RELEASED.
OWN = {
    # best-small with two more heads of memory in each block in place of its wavelet
    "delta-ngrams": (
        partial(build_delta_net, width=128, layers=2, inner=300, taps=4),
        MUON | {"ngram_slots": 21000, "recall_heads": 4},
    ),
    # of llama-muon-ngrams-2's size, with what makes it faster and better
    "transformer-ngrams": (
        partial(build_transformer, width=128, layers=2, inner=384, taps=4),
        MUON | {"ngram_slots": 21000},
    ),
}
FOREIGN = {  # by the package transformers
    "llama": (partial(build_llama, width=128, layers=5, inner=344), ADAMW | {"lr": 3e-3}),
    "llama-muon": (partial(build_llama, width=128, layers=5, inner=344), MUON),
    "llama-muon-ngrams": (
        partial(build_llama, width=128, layers=5, inner=88),
        MUON | {"ngram_slots": 16900},
    ),
    # fewer blocks, and more MLP and slots for them, as best-small has
    "llama-muon-ngrams-2": (
        partial(build_llama, width=128, layers=2, inner=256),
        MUON | {"ngram_slots": 21000},
    ),
    "mamba2-muon-ngrams": (
        partial(build_mamba2, width=128, layers=3),
        MUON | {"ngram_slots": 21000},
    ),
    "mamba2": (partial(build_mamba2, width=128, layers=9), ADAMW | {"lr": 24e-3}),
    "llama-4m": (partial(build_llama, width=256, layers=5, inner=688), ADAMW | {"lr": 3e-3}),
    "llama-muon-4m": (partial(build_llama, width=256, layers=5, inner=688), MUON),
    "mamba2-4m": (partial(build_mamba2, width=256, layers=10), ADAMW | {"lr": 12e-3}),
}

KNOWN = ", ".join([*RELEASED, *OWN, *FOREIGN]) + ", or NAME=FILE, a WaveletLM's config"


def contestant(model: str, block_size: int) -> Contestant:
    """The contestant that an item of --models asks for: a name, or NAME=FILE for a WaveletLM of a
    config file. Raises `InputError` for another name."""
    name, _, file = model.partition("=")
    if not file and name in OWN | FOREIGN:
        build, keys = (OWN | FOREIGN)[name]
        # The rate falls to a fiftieth, as in configs/released-*.json.
        config = Config(block_size=block_size, min_lr=0.02 * keys["lr"], **keys)
        return Contestant(name, config, build)
    if not file and name not in RELEASED:
        raise InputError(f"models: unknown model {model}; known are {KNOWN}")
    path = file or str(ROOT / RELEASED[name])
    return Contestant(name, load_config(path, block_size=block_size), build_model)
