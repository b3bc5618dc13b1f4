"""The settings of a run: every key with its type, range, default and meaning, in one place.

A `Config` is frozen and strict: an unknown key, a value of the wrong type or an impossible
combination raises `InputError`, one line that names the key. Keys of the first implementation keep
their names. `config.json` holds its 883M WikiText-103 configuration, `configs/` the others; every
key is also a command-line option of train.py."""

import argparse
import contextlib
import difflib
import json
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from common.command import InputError, Parser, shown
from common.files import parse_json, read_json

# The most that a count or a measure may be that has no limit of its own: far above any use, so that
# a slipped digit is an error in place of a machine without memory. What is done one after the other
# has MOST_REPEATS: more would seem to hang.
MOST, MOST_REPEATS = 2**20, 4096
LONGEST = 10**12  # of a run, in steps or tokens
# logits divided by less may be beyond fp32; far above it the most probable token is certain already
LOWEST_TEMPERATURE = 1e-6


def next_power_of_two(n: int) -> int:
    """The smallest power of two ≥ n, for n ≥ 1."""
    return 1 << (n - 1).bit_length()


def option(default: Any, meaning: str, effect: str = "", **limits: Any) -> Any:
    """A key: its default, what it means, what it was measured to do (shown in docs/options.md) and
    its limits."""
    if isinstance(default, int | float) and not isinstance(default, bool) and "lt" not in limits:
        limits = {"le": MOST} | limits
    return Field(default, description=meaning, json_schema_extra={"effect": effect}, **limits)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON has lists only


def _as_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.items())  # a dict would leave the config without a hash
    return () if value == [] else value  # [] is how the default is written


def _as_dict(pairs: tuple[tuple[str, float], ...]) -> dict[str, float]:
    return dict(pairs)  # a function, since pydantic 2.7 asks a serializer for its signature


Floats = Annotated[tuple[Annotated[float, Field(ge=0, le=MOST)], ...], BeforeValidator(_as_tuple)]
# numpy's limit; torch's is above 1,000,003 times as much, see `Trainer.take_step`
MOST_SEED = 2**32 - 1
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, le=MOST_SEED)], ...], BeforeValidator(_as_tuple)]
Mixture = Annotated[
    tuple[tuple[str, float], ...], BeforeValidator(_as_pairs), PlainSerializer(_as_dict)
]
Basis = Literal["haar", "zero", "random"]
Bases = Annotated[tuple[Basis, ...], BeforeValidator(_as_tuple)]

# Options that were measured, gained nothing and were taken out. The config.json of an old run may
# still name them: at the value that meant "off" its network is one that can still be built. A
# `Config` has none of them. key -> "off"
REMOVED_KEYS = {
    "pkm_query_norm": False,
    "pkm_gate": False,
    "pkm_shared": False,
    "pkm_lr_scale": 1.0,
}
# of keys that stay
REMOVED_VALUES = {"wavelet_mode": ["diagonal"], "mixer_transform": ["dct", "butterfly"]}
LAST_WITH_REMOVED = "5ddc828"  # the last commit that has their code

SECTIONS = {  # the first key of each section of `Config`, for --help and docs/options.md
    "dataset": "Data",
    "C": "Network: size",
    "wavelet_mode": "Network: lifting wavelet",
    "decompose_bypass": "Network: bypass and embedding",
    "mixer_transform": "Network: mixers",
    "pkm_enabled": "Network: memories",
    "learned_residual": "Network: residual stream",
    "dropout_embedding": "Network: regularisation and initial scales",
    "multinodal_enabled": "Network: several cells",
    "out_dir": "Run",
    "optimizer": "Optimisation",
    "generation_prompt": "Generation",
}


class Config(BaseModel):
    """All settings. The defaults are those of the released 883M configuration wherever it has the
    key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # Data
    dataset: str = option(
        "wikitext-103",
        "built-in corpus `pydoc`, a data set's name, or a file or folder of text (.txt, .jsonl,"
        " .parquet, packed ones)",
        min_length=1,
    )
    dataset_path: str = option(
        "", "hub id or local folder in the hub's layout that overrides the name's own"
    )
    dataset_name: str = option(
        "", "configuration inside the hub data set, such as wikitext-103-raw-v1"
    )
    text_column: str = option(
        "text", "column of a table, or key of a row of .jsonl, that holds the text"
    )
    dataset_mix: Mixture = option(
        (),
        "more data sets to draw training windows from, name -> weight; `dataset`, which alone is"
        " evaluated on, weighs 1",
    )
    split_fractions: Floats = option(
        (0.9, 0.05, 0.05), "train, validation and test shares of a text without splits of its own"
    )
    tokenizer: str = option(
        "auto", "auto, bytes, gpt2, sentencepiece, or a SentencePiece .model file"
    )
    vocab_size: int = option(
        32000,
        "tokens of a SentencePiece that is trained on the training split",
        ge=260,
        le=1_000_000,
    )
    cache_dir: str = option("cache", "folder of the token files and trained tokenizers")
    block_size: int = option(256, "tokens in a training window", ge=2, le=2**24)

    # Network: size
    C: int = option(2048, "channels of the residual stream", ge=2)
    layers: int = option(
        2,
        "blocks",
        "depth 2→10 at equal parameters, without MLP: −0.03 to −0.05",
        ge=1,
        le=MOST_REPEATS,
    )
    levels: int = option(
        5,
        "levels of the wavelet, with levels + 1 scales (packets: 2^levels)",
        "5→7: −0.031",
        ge=1,
        le=20,
    )
    mlp_expansion: int = option(20, "MLP width in units of C; 0 = no MLP", ge=0, le=MOST_REPEATS)
    mlp_layers: int = option(
        2,
        "linear layers of the MLP, with mlp_activation between each two; 1 = two without",
        ge=1,
        le=64,
    )
    mlp_activation: Literal["gelu", "relu2"] = option(
        "gelu", "activation of the MLP: GELU, or the square of ReLU, which costs a CPU less"
    )
    mlp_taps: int = option(
        0,
        "positions that a learned filter before the MLP joins for each channel, the last one's own"
        " included; 0 = no filter",
        ge=0,
        le=64,
    )
    tie_embedding_to_lm_head: bool = option(False, "the head shares the embedding's weight")
    looped_blocks: bool = option(
        False, "one block, applied looped_blocks_count times in place of `layers` blocks"
    )
    looped_blocks_count: int = option(8, "applications of the looped block", ge=1, le=MOST_REPEATS)
    loop_iterations: int = option(
        1, "passes through the whole stack; the loss averages over them", ge=1, le=MOST_REPEATS
    )

    # Network: lifting wavelet
    wavelet_mode: Literal["lifting", "haar", "packets"] = option(
        "lifting",
        "learned lifting by networks (lifting), the fixed Haar wavelet, or its packets: 2^levels"
        " scales",
    )
    shared_lifting_weights: bool = option(
        True, "one lifting for all blocks", "off: −0.024 (untied lifting)"
    )
    untied_reconstruction: bool = option(False, "reconstruction has Update networks of its own")
    lifting_linear_only: bool = option(
        False, "Predict and Update are single linear maps", "on: +0.009 to +0.017"
    )
    lifting_hidden_mult: int = option(1, "hidden width of Predict and Update in units of P", ge=1)
    lifting_init: Basis = option("haar", "initial lifting: haar, zero (last layers 0) or random")
    lifting_dropout: float = option(0.0, "dropout inside Predict and Update", ge=0, lt=1)
    wavelet_crawl: bool = option(
        True, "learn each level's lag as a mixture of wavelet_crawl_k neighbours", "off: +0.018"
    )
    wavelet_crawl_k: int = option(3, "lags in the mixture, odd", "3→33: −0.013", ge=1)
    lifting_gate: bool = option(
        False, "each level's lagged input is gated per channel by the current one"
    )
    scale_norm: bool = option(
        False,
        "RMSNorm of each scale's coefficients, before the mixers and after them",
        "on: −0.003",
    )
    multi_basis_lifting: bool = option(
        False, "several liftings, blended per scale (wavelet_mode lifting)"
    )
    multi_basis_inits: Bases = option(
        ("haar", "random"), "initial lifting of each basis", min_length=1, max_length=64
    )

    # Network: bypass and embedding
    decompose_bypass: bool = option(
        True, "the running mean of the residual stream enters every scale"
    )
    decompose_bypass_ema: bool = option(
        False, "a learned, gated moving average in place of the running mean"
    )
    decompose_bypass_cross_window: bool = option(
        False,
        "training carries the state from one window to the next: windows in order, reset where a"
        " document ends",
    )
    per_layer_embedding: bool = option(
        True, "each block adds the token's embedding again, gated per channel"
    )
    token_features: bool = option(
        False,
        "what a token's text looks like (layers/features.py), by a learned map, joins its"
        " embedding",
    )
    ngram_slots: int = option(
        0,
        "slots of a table that is read by a hash of the last ngram_n tokens; 0 = none",
        ge=0,
        le=2**31,
    )
    ngram_n: int = option(2, "tokens that are hashed together", ge=2, le=64)
    ngram_width: int = option(
        32, "width of the table's values, which a learned map adds to the embedding", ge=1
    )

    # Network: mixers
    mixer_transform: Literal["hadamard", "identity"] = option(
        "hadamard",
        "transform of the channels around the mixers: Walsh–Hadamard, or none (identity)",
        "identity: −0.0024",
    )
    mixer_top_k: int = option(
        0, "coefficients that a mixer takes of each scale, the largest; 0 = all", ge=0
    )
    coarse_modulation: bool = option(
        False, "each scale's coefficients are modulated, per channel, by the next coarser scale's"
    )
    use_mixer_gate: bool = option(True, "SwiGLU-like gate in the mixers", "off: +0.026")
    mixer_gate_activation: Literal["silu", "sigmoid", "gelu", "relu"] = option(
        "silu", "activation of the gate"
    )
    cross_scale_gating: bool = option(True, "each scale's gate reads a learned blend of all scales")
    mixer_gate_input: Literal["coefficients", "stream"] = option(
        "coefficients",
        "what a mixer's gate reads: the coefficients of its scale, or the stream's norm at the"
        " position, by a matrix of its own",
    )
    low_rank: int = option(4, "rank of the mixers' ungated U Vᵀ term; 0 = none", ge=0)
    per_scale_mixer_widths: Floats | None = option(
        (1.0, 1.0, 1.0, 0.5, 0.5, 0.5),
        "mixer width per scale in units of P, coarse to fine; null = full width",
    )
    mixer_depth: int = option(1, "mixers in a row at each scale", ge=1, le=64)
    mixer_depth_residuals: bool = option(False, "each mixer of several adds its input")
    mixer_depth_stabilizers: bool = option(
        False, "learned scalars, 1/mixer_depth at first, around the mixers before the last"
    )
    exp_parametrization: bool = option(
        False, "mixer and gate weights stored as sign and log-magnitude"
    )

    # Network: memories
    pkm_enabled: bool = option(True, "product-key memory beside the MLP", "≈ 0")
    pkm_num_keys: int = option(16384, "memory slots per head, a square", ge=1, le=2**31)
    pkm_top_k: int = option(32, "slots read per head", ge=1)
    pkm_heads: int = option(1, "heads", ge=1)
    fwpkm_enabled: bool = option(True, "fast-weight product-key memory beside the MLP", "≈ 0")
    fwpkm_num_keys: int = option(16384, "memory slots per head, a square", ge=1, le=2**31)
    fwpkm_top_k: int = option(32, "slots read per head", ge=1)
    fwpkm_heads: int = option(1, "heads", ge=1)
    fwpkm_inference_updates: bool = option(
        False, "at inference each sequence writes into its fast weights"
    )
    fwpkm_update_lr: float = option(0.01, "step of a fast-weight update", gt=0)
    fwpkm_chunk_size: int = option(64, "tokens between two fast-weight updates", ge=2)

    recall_heads: int = option(
        0, "heads of an associative memory (gated delta rule) beside the MLP; 0 = none", ge=0
    )
    recall_dim: int = option(32, "width of its keys and values", ge=1)
    recall_horizon: int = option(
        0,
        "tokens after which it has forgotten all but 1/e of what it holds, at the latest; 0 = no"
        " limit, with which a text can be too long to be read on",
        ge=0,
    )
    recall_every: int = option(
        1, "blocks for each one that has it: the last, and every n-th before it", ge=1
    )

    # Network: residual stream
    learned_residual: bool = option(True, "learned scalars on the residual stream")
    skip_proj_out: bool = option(False, "no projection after reconstruction where P = C")
    stochastic_depth_rate: float = option(
        0.0, "block i is dropped in training with probability rate·i/blocks", ge=0, lt=1
    )
    gradient_checkpointing: bool = option(
        False, "recompute the blocks in the backward pass: less memory, more time"
    )

    # Network: regularisation and initial scales
    dropout_embedding: float = option(
        0.2, "dropout on the embedding", "all dropouts 2×, 5 epochs: −0.062", ge=0, lt=1
    )
    dropout_projection: float = option(0.1, "dropout on the wavelet branch's output", ge=0, lt=1)
    dropout_mixer: float = option(0.1, "dropout on the mixed coefficients", ge=0, lt=1)
    dropout_mlp: float = option(0.1, "dropout on the MLP's output", ge=0, lt=1)
    dropout_lm_head: float = option(0.24, "dropout on the head's input", ge=0, lt=1)
    stable_parametrization: bool = option(False, "all six stab_ options")
    stab_spectral_norm: bool = option(False, "spectral norm on the mixers' weight W")
    stab_ff_scaling: bool = option(False, "last MLP weight ×1/√(mlp_expansion·C) at init")
    stab_embed_scaling: bool = option(False, "token embedding ×√C")
    stab_proj_out_scaling: bool = option(False, "projection ×1/√(C·layers) at init")
    stab_mixer_eps_scaling: bool = option(False, "noise of the mixers' identity init ÷√P")
    stab_lifting_level_scaling: bool = option(
        False, "last Predict/Update weight of level l ×1/(1+0.1·l) at init"
    )

    # Network: several cells
    multinodal_enabled: bool = option(
        False, "several whole networks side by side, their logits combined"
    )
    multinodal_num_cells: int = option(2, "cells", ge=1, le=256)
    multinodal_cell_dim: int = option(512, "channels of each cell, in place of C", ge=2)
    multinodal_seeds: Seeds = option((42, 137), "seed of each cell's initial weights")
    multinodal_combination: Literal["average", "sum"] = option(
        "average", "how the cells' logits are combined"
    )
    multinodal_cross_cell_gating: bool = option(
        False, "cells gate each other's residual stream between blocks"
    )
    multinodal_cross_cell_gate_interval: int = option(1, "blocks from one gate to the next", ge=1)
    multinodal_features_per_cell: int = option(
        -1, "embedding columns a cell starts with (the others: bagged_eps); -1 = all"
    )
    multinodal_bagged_eps: float = option(
        1e-6, "initial value of the embedding columns a cell does not start with", ge=-1, le=1
    )

    # Run
    out_dir: str = option("logs", "folder of the run folders")
    seed: int = option(
        1337, "seed of initialisation, data order, dropout and samples", ge=0, le=MOST_SEED
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes a GPU where there is one")
    compile: bool = option(
        True, "torch.compile the loss; says so and goes on without where it cannot"
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = option(
        "default", "mode of torch.compile"
    )
    cuda_graph: bool = option(
        True,
        "a step of one GPU is one CUDA graph, unless state is carried or blocks are recomputed",
    )
    use_amp: bool = option(
        True, "autocast: on CUDA to amp_dtype, on a CPU with bf16 instructions to bf16, else fp32"
    )
    amp_dtype: Literal["fp16", "bf16", "fp8"] = option(
        "fp16",
        "autocast type on CUDA; fp8: bf16, but the MLP's and the lifting's products in fp8 (needs"
        " torchao; Ada and later)",
    )
    allow_tf32: bool = option(True, "TF32 matrix products on CUDA")
    epochs: float = option(5.0, "passes over the training split", gt=0)
    max_steps: int | None = option(
        None, "optimizer steps at the most; null = as epochs say", ge=1, le=LONGEST
    )
    micro_batch_size: int = option(8, "windows in a forward pass, of all processes together", ge=1)
    grad_accum: int = option(1, "forward passes in an optimizer step", ge=1)
    parallel: Literal["auto", "none", "ddp", "fsdp"] = option(
        "auto",
        "under torchrun: ddp (so auto), or fsdp, which shards weights, gradients and optimizer"
        " among the processes",
    )
    log_interval: int = option(10, "steps from one log line to the next", ge=1, le=LONGEST)
    eval_interval: int = option(
        250, "steps between evaluations on the fixed validation tokens", ge=1, le=LONGEST
    )
    eval_tokens: int = option(
        65536, "validation tokens of such an evaluation, the same every time", ge=2, le=LONGEST
    )
    save_interval: int | None = option(
        None, "steps between saves of the resumable state; null = by save_minutes", ge=1, le=LONGEST
    )
    save_minutes: float = option(
        5.0, "minutes between such saves; the first weights, the end and a stop are saved too", gt=0
    )
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "none",
        "where the figures go beside metrics.jsonl; each needs its package: pip install"
        " '.[tensorboard]', '.[wandb]' or '.[trackio]'",
    )
    eval_context: Literal["stream", "window"] = option(
        "stream", "context past block_size in final evaluations and samples"
    )
    skip_warmup_saves: bool = option(True, "no best_model.safetensors before the warm-up is over")
    sample_tokens: int = option(
        64, "tokens of the sample written at each evaluation; 0 = none", ge=0
    )

    # Optimisation
    optimizer: Literal["Adagrad", "AdamW", "Muon", "SGD"] = option(
        "Adagrad", "optimizer; Muon takes the hidden matrices and AdamW the rest"
    )
    optimizer_eps: float = option(2e-13, "epsilon of Adagrad and AdamW", gt=0)
    adam_betas: Floats = option((0.9, 0.95), "AdamW's betas", min_length=2, max_length=2)
    momentum: float = option(0.95, "momentum of Muon and SGD", ge=0, lt=1)
    lr: float = option(0.01, "highest learning rate", gt=0)
    muon_lr: float = option(
        0.02, "highest learning rate of Muon's matrices; it follows the same schedule", gt=0
    )
    min_lr: float = option(2e-4, "last learning rate of schedule cosine", ge=0)
    schedule: Literal["cosine", "trapezoid"] = option(
        "cosine", "after the warm-up: half a cosine to min_lr, or lr until a linear cool-down to 0"
    )
    cooldown_fraction: float = option(
        0.2, "share of the steps that are the cool-down of schedule trapezoid", gt=0, le=1
    )
    warmup_fraction: float = option(
        0.3, "share of the steps that raise the learning rate linearly from 0", ge=0, lt=1
    )
    weight_decay: float = option(
        1e-6, "weight decay on matrices: none on norms, biases, scalars, gains and logits", ge=0
    )
    decay_all: bool = option(False, "weight decay on norms, biases, scalars, gains and logits too")
    ema_decay: float = option(
        0.0,
        "a moving average of the weights, evaluated and saved beside them; 0 = none",
        ge=0,
        lt=1,
    )
    grad_clip: float = option(1.0, "highest gradient norm; 0 = no clipping", ge=0, le=1e9)

    # Generation
    generation_prompt: str = option("The history of", "prompt of samples", min_length=1)
    num_new_tokens: int = option(512, "tokens to generate", ge=0, le=2**31)
    temperature: float = option(1.0, "softmax temperature; 0 = greedy", ge=0)
    top_p: float = option(0.95, "nucleus: smallest set of tokens with this probability", gt=0, le=1)
    repetition_penalty: float = option(
        1.1, "divides the logits of tokens seen before; 1 = none", ge=1
    )

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        for line in _contradictions(self):
            raise ValueError(line)
        return self

    @classmethod
    def network_keys(cls) -> list[str]:
        """The keys that shape the network."""
        section, keys = "", ["block_size"]
        for key in cls.model_fields:
            section = SECTIONS.get(key, section)
            if section.startswith("Network"):
                keys.append(key)
        return keys

    @property
    def padded_width(self) -> int:
        """P, the next power of two ≥ C: the width of wavelet coefficients."""
        return next_power_of_two(self.C)

    @property
    def scales(self) -> int:
        """S = levels + 1, the number of scales; of packets 2^levels."""
        return 2**self.levels if self.wavelet_mode == "packets" else self.levels + 1

    @property
    def applications(self) -> int:
        """Blocks applied in one pass through the stack."""
        return self.looped_blocks_count if self.looped_blocks else self.layers

    @property
    def cell_width(self) -> int:
        """Channels of each network: of a cell where there are several."""
        return self.multinodal_cell_dim if self.multinodal_enabled else self.C

    def stab(self, name: str) -> bool:
        """Whether `stab_<name>` is on, by itself or by `stable_parametrization`."""
        return self.stable_parametrization or getattr(self, f"stab_{name}")


def _contradictions(c: Config) -> Iterator[str]:
    """Yields a line for each combination of keys that no network or run can have."""
    if c.wavelet_mode == "packets" and c.levels > 8:
        scales = f"{c.levels} levels of packets are {2**c.levels} scales"
        yield f"levels: {scales}; at most 8 levels, 256 scales"
        return  # what follows would count them
    yield from _of_the_network(c)
    yield from _of_memories(c)
    yield from _of_cells(c)
    yield from _of_the_data(c)
    yield from _of_the_run(c)


def _of_the_network(c: Config) -> Iterator[str]:
    if c.wavelet_crawl_k % 2 == 0:
        yield f"wavelet_crawl_k: {c.wavelet_crawl_k} is even; lags are centred, so it must be odd"
    padded = next_power_of_two(c.cell_width)
    if c.mixer_top_k >= padded:
        yield f"mixer_top_k: {c.mixer_top_k} is not below P, {padded}; 0 takes all coefficients"
    widths = c.per_scale_mixer_widths
    if widths is not None and len(widths) != c.scales:
        yield (
            f"per_scale_mixer_widths: {len(widths)} widths, but levels {c.levels} of wavelet_mode"
            f" {c.wavelet_mode} make {c.scales} scales (null = full width)"
        )
    if widths is not None and not all(w > 0 and int(padded * w) >= 1 for w in widths):
        yield f"per_scale_mixer_widths: {list(widths)} has a width of no channel at P = {padded}"
    if c.stab("spectral_norm") and (c.exp_parametrization or c.gradient_checkpointing):
        other = "exp_parametrization" if c.exp_parametrization else "gradient_checkpointing"
        yield f"stab_spectral_norm: cannot be combined with {other}; turn one of them off"
    if c.untied_reconstruction and c.wavelet_mode in ("haar", "packets"):
        yield (
            f"untied_reconstruction: wavelet_mode {c.wavelet_mode} has no networks to untie; take"
            " lifting"
        )
    if c.lifting_gate and c.wavelet_mode == "packets":
        yield "lifting_gate: wavelet_mode packets has none; take another mode"
    if c.mixer_gate_input == "stream" and c.cross_scale_gating:
        yield "cross_scale_gating: with mixer_gate_input stream no gate reads a scale; turn it off"
    if c.mixer_gate_input == "stream" and (c.mixer_depth > 1 or c.mixer_top_k):
        other = "mixer_depth: above 1" if c.mixer_depth > 1 else "mixer_top_k: above 0"
        yield f"{other} it takes mixer_gate_input coefficients"
    if c.mlp_taps and not c.mlp_expansion:
        yield "mlp_taps: without an MLP (mlp_expansion 0) nothing reads them; set it to 0"
    if not c.decompose_bypass and c.decompose_bypass_ema:
        yield "decompose_bypass_ema: needs decompose_bypass"


def _of_memories(c: Config) -> Iterator[str]:
    for memory in ("pkm", "fwpkm"):
        keys = getattr(c, f"{memory}_num_keys")
        heads = getattr(c, f"{memory}_heads")
        if not getattr(c, f"{memory}_enabled"):
            continue
        if math.isqrt(keys) ** 2 != keys:
            yield (
                f"{memory}_num_keys: {keys} is not a square; {math.isqrt(keys) ** 2} or"
                f" {(math.isqrt(keys) + 1) ** 2} is"
            )
        if c.cell_width % (2 * heads):
            yield (
                f"{memory}_heads: {heads} heads need C to be a multiple of {2 * heads} (halves of"
                f" queries), not {c.cell_width}"
            )


def _of_cells(c: Config) -> Iterator[str]:
    if c.multinodal_enabled and c.multinodal_cross_cell_gating and c.multinodal_num_cells < 2:
        yield "multinodal_cross_cell_gating: needs at least two cells (multinodal_num_cells)"
    if c.multinodal_enabled and len(c.multinodal_seeds) < c.multinodal_num_cells:
        yield (
            f"multinodal_seeds: {len(c.multinodal_seeds)} seeds for {c.multinodal_num_cells} cells"
            " (multinodal_num_cells)"
        )
    if not (
        c.multinodal_features_per_cell == -1
        or 1 <= c.multinodal_features_per_cell <= c.multinodal_cell_dim
    ):
        yield (
            "multinodal_features_per_cell: must be -1 or from 1 to multinodal_cell_dim,"
            f" {c.multinodal_cell_dim}"
        )


def _of_the_data(c: Config) -> Iterator[str]:
    if not all(weight > 0 and name not in ("", c.dataset) for name, weight in c.dataset_mix):
        yield (
            f"dataset_mix: {json.dumps(dict(c.dataset_mix))} must have weights above 0, of named"
            " data sets other than dataset"
        )
    if c.dataset_mix and c.decompose_bypass_cross_window:
        yield (
            "dataset_mix: draws windows, but decompose_bypass_cross_window reads texts in order;"
            " turn one of them off"
        )
    if (
        len(c.split_fractions) != 3
        or min(c.split_fractions) <= 0
        or abs(sum(c.split_fractions) - 1) > 1e-6
    ):
        yield (
            f"split_fractions: {list(c.split_fractions)} must be three positive numbers that add up"
            " to 1"
        )


def _of_the_run(c: Config) -> Iterator[str]:
    if c.min_lr > c.lr:
        yield f"min_lr: {c.min_lr} is above lr, {c.lr}"
    if not all(beta < 1 for beta in c.adam_betas):
        yield f"adam_betas: {list(c.adam_betas)} must both be below 1"
    if 0 < c.temperature < LOWEST_TEMPERATURE:
        yield (
            f"temperature: {c.temperature} is too low; it must be 0 (the most probable token) or"
            f" {LOWEST_TEMPERATURE} or more"
        )
    if c.schedule == "trapezoid" and c.warmup_fraction + c.cooldown_fraction > 1:
        yield (
            f"cooldown_fraction: {c.cooldown_fraction} and warmup_fraction {c.warmup_fraction} add"
            " up to more than 1"
        )
    if c.parallel == "fsdp" and (
        c.decompose_bypass_cross_window or c.multinodal_enabled or c.stab("spectral_norm")
    ):
        yield (
            "parallel: fsdp has no decompose_bypass_cross_window, multinodal_enabled or spectral"
            " norm; take ddp"
        )
    if c.parallel == "fsdp" and c.use_amp and c.amp_dtype == "fp16":
        yield "amp_dtype: parallel fsdp has no loss scaling; take bf16, or set use_amp to false"
    if c.amp_dtype == "fp8" and (c.parallel == "fsdp" or not c.use_amp):
        yield "amp_dtype: fp8 needs use_amp, and a parallel other than fsdp; take bf16"


def without_removed(
    values: dict[str, Any], source: str, given: Collection[str] = ()
) -> dict[str, Any]:
    """`values` (key -> value) without the removed keys that are off. Raises `InputError` where one
    is not off, or where a key has a value that was removed; `source` and `given` as in
    `make_config`."""
    for key, value in values.items():
        is_on = key in REMOVED_KEYS and value != REMOVED_KEYS[key]
        if is_on or value in REMOVED_VALUES.get(key, []):
            place = "" if key in given else f"{source}: "
            raise InputError(
                f"{place}{key}: {shown(value)} was removed; the last commit that has it is"
                f" {LAST_WITH_REMOVED}"
            )
    return {key: value for key, value in values.items() if key not in REMOVED_KEYS}


def make_config(values: dict[str, Any], source: str, given: Collection[str] = ()) -> Config:
    """Checks `values` (key -> value). Raises `InputError` with one line, which `source` begins,
    unless the key is one of those `given` beside it: on a command line, say."""
    values = without_removed(values, source, given)
    for key in values:
        if key not in Config.model_fields:
            near = difflib.get_close_matches(key, Config.model_fields, n=1)
            hint = (
                f"; did you mean {near[0]}?" if near else "; python train.py --help lists the keys"
            )
            raise InputError(("" if key in given else f"{source}: ") + f"unknown key {key}{hint}")
        for text in values[key] if isinstance(values[key], dict) else [values[key]]:
            if isinstance(text, str) and (
                "\0" in text or text != text.encode("utf-8", "replace").decode("utf-8")
            ):
                raise InputError(
                    ("" if key in given else f"{source}: ")
                    + f"{key}: is no UTF-8 without zero bytes; give it so"
                )
    try:
        return Config(**values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # a combination of keys, which the message begins with
        # of all options those that it names
        about = [key for key in given if re.search(rf"\b{key}\b", message)] or given
        beside = f" with {', '.join(f'--{key}' for key in about)}" if given else ""
        raise InputError(f"{source}{beside}: {message}")
    key = str(first["loc"][0])
    raise InputError(
        ("" if key in given else f"{source}: ") + f"{key}: {message}, not {shown(first['input'])}"
    )


def load_config(path: str | Path, **overrides: Any) -> Config:
    """The config in the JSON file at `path`, with `overrides` (key=value) put over it. Raises
    `InputError`, which names the file where the fault is the file's."""
    path = Path(path)
    return make_config(read_json(path) | overrides, str(path), overrides)


def save_config(config: Config, path: Path) -> None:
    """Writes every key of `config` as JSON, so that a run does not depend on later defaults."""
    path.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")


def add_config_options(parser: Parser) -> None:
    """Adds an option `--KEY VALUE` for every key, with its meaning, legal values and default, in
    sections."""
    removed = f"was removed; the last commit that has it is {LAST_WITH_REMOVED}"
    parser.hints |= dict.fromkeys(REMOVED_KEYS, removed)
    schemas = Config.model_json_schema()["properties"]
    group = parser
    for key, field in Config.model_fields.items():
        if key in SECTIONS:
            group = parser.add_argument_group(SECTIONS[key])
        default = json.dumps(field.get_default(), ensure_ascii=False)
        values = legal_values(schemas[key]).replace("`", "")  # which mark code in Markdown only
        text = f"{field.description} [{values}; default {default}]"
        # argparse formats the text with %, and would take a single one for a field.
        text = text.replace("%", "%%")
        group.add_argument(f"--{key}", metavar="VALUE", default=argparse.SUPPRESS, help=text)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config keys given on the command line. A value is read as JSON, so `false`, `3` and `[1,
    0.5]` have their types; what is not JSON, and every value of a text key, stays text."""
    values = {}
    for key, text in vars(arguments).items():
        if key not in Config.model_fields:
            continue
        values[key] = text
        if Config.model_fields[key].annotation is not str:
            # stays text, which the check of its type then names
            with contextlib.suppress(InputError):
                values[key] = parse_json(
                    {"None": "null", "True": "true", "False": "false"}.get(text, text), key
                )
    return values


def legal_values(schema: dict[str, Any]) -> str:
    """What a key may be, in words, from its JSON schema. Combinations of keys have limits of their
    own (`_contradictions`)."""
    if "anyOf" in schema:
        return " or ".join(legal_values(kind) for kind in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema["type"]
    if kind == "array" and "prefixItems" in schema.get("items", {}):
        return "JSON object, name -> number"  # `Mixture`: kept as pairs
    if kind == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        count = "" if most is None else f"{least} " if least == most else f"{least} to {most} "
        return f"list of {count}({legal_values(schema['items'])})"
    if kind in ("boolean", "null", "string"):
        return {"boolean": "`true`, `false`", "null": "`null`", "string": "text"}[kind]
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if high == MOST:  # what a key without a limit of its own has
        high = None
    if kind == "integer" and low is not None and high is not None:
        return f"integer, {low:,} to {high:,}"
    bounds = [(low, "{} or more"), (above, "above {}"), (high, "at most {}"), (below, "below {}")]
    return ", ".join(
        [kind, *(words.format(f"{bound:,.15g}") for bound, words in bounds if bound is not None)]
    )


def options_table() -> str:
    """The table of options of docs/options.md, in Markdown: key, default, legal values, meaning,
    measured effect."""
    schemas = Config.model_json_schema()["properties"]
    lines = []
    for key, field in Config.model_fields.items():
        if key in SECTIONS:
            lines += [
                f"\n**{SECTIONS[key]}**\n",
                "| key | default | values | meaning | effect |",
                "|---|---|---|---|---|",
            ]
        default = json.dumps(field.get_default(), ensure_ascii=False)
        cells = [
            f"`{key}`",
            f"`{default}`",
            legal_values(schemas[key]),
            field.description,
            field.json_schema_extra["effect"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    print(options_table(), end="")
