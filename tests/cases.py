"""The cases that several tests share: each option alone, and rows in which all pairs meet."""

import functools
import itertools
from collections import Counter

from helpers import random_model, tiny

from common.command import InputError

# Each option's values; the first is what `tiny()` has. A value that needs company (k of a crawl,
# cells) brings it along.
CELLS = {"multinodal_enabled": True}
DEEP = {"mixer_depth": 2}
OPTIONS: dict[str, list[dict]] = {
    "width": [{}, {"C": 12}],
    "depth": [
        {}, {"looped_blocks": True, "looped_blocks_count": 3}, {"loop_iterations": 2},
        {"layers": 3},
        {"looped_blocks": True, "looped_blocks_count": 2, "loop_iterations": 2},
    ],
    # the last look back beyond the block
    "levels": [{}, {"levels": 1}, {"levels": 5}, {"levels": 5, "block_size": 8}],
    "wavelet": [
        {}, {"multi_basis_lifting": True}, {"untied_reconstruction": True},
        {"wavelet_mode": "haar"},
        {"multi_basis_lifting": True, "multi_basis_inits": ("random", "zero", "haar")},
        {"wavelet_mode": "packets", "per_scale_mixer_widths": None},
        {"multi_basis_lifting": True, "untied_reconstruction": True},
        {"wavelet_mode": "haar", "per_scale_mixer_widths": (0.5, 0.5, 0.25, 0.25),
            "decompose_bypass": False},
    ],
    "lifting_gate": [{}, {"lifting_gate": True}],
    "lifting_linear_only": [{}, {"lifting_linear_only": True}],
    "lifting_hidden_mult": [{}, {"lifting_hidden_mult": 2}],
    "lifting_init": [{}, {"lifting_init": "zero"}, {"lifting_init": "random"}],
    "shared_lifting_weights": [{}, {"shared_lifting_weights": False}],
    "crawl": [{}, {"wavelet_crawl": False}, {"wavelet_crawl_k": 5}, {"wavelet_crawl_k": 1}],
    "bypass": [
        {}, {"decompose_bypass_ema": True}, {"decompose_bypass": False},
        {"decompose_bypass_cross_window": True},
    ],
    "gate": [
        {}, {"use_mixer_gate": False}, {"mixer_gate_activation": "relu"},
        {"mixer_gate_activation": "sigmoid"},
        {"mixer_gate_activation": "gelu"},
    ],
    "cross_scale_gating": [{}, {"cross_scale_gating": False},
        {"cross_scale_gating": False, "mixer_gate_input": "stream"}],
    "low_rank": [{}, {"low_rank": 0}, {"low_rank": 5}],
    "weights": [{}, {"exp_parametrization": True}, {"stable_parametrization": True},
        {"stab_spectral_norm": True}],
    "gradient_checkpointing": [{}, {"gradient_checkpointing": True}],
    "mixer_depth": [
        {}, {"mixer_depth": 3, "mixer_depth_residuals": True, "mixer_depth_stabilizers": True},
        DEEP,
        {**DEEP, "mixer_depth_residuals": True}, {**DEEP, "mixer_depth_stabilizers": True},
    ],
    "per_scale_mixer_widths": [{}, {"per_scale_mixer_widths": None},
        {"per_scale_mixer_widths": (0.5, 1.0, 0.25, 2.0)}],
    "per_layer_embedding": [{}, {"per_layer_embedding": False}],
    "skip_proj_out": [{}, {"skip_proj_out": True}],
    "learned_residual": [{}, {"learned_residual": False}],
    "tie_embedding_to_lm_head": [{}, {"tie_embedding_to_lm_head": True}],
    "mlp": [{}, {"mlp_expansion": 0}, {"mlp_activation": "relu2", "mlp_layers": 3},
        {"mlp_layers": 4}, {"mlp_layers": 1}, {"mlp_taps": 3}],
    "pkm": [{}, {"pkm_enabled": False}, {"pkm_heads": 2, "pkm_top_k": 2},
        {"pkm_num_keys": 25, "pkm_top_k": 25}],
    "fwpkm": [
        {}, {"fwpkm_inference_updates": True, "fwpkm_chunk_size": 5, "fwpkm_update_lr": 0.5,
            "fwpkm_num_keys": 25},
        {"fwpkm_enabled": False}, {"fwpkm_heads": 2, "fwpkm_top_k": 1},
        {"fwpkm_inference_updates": True},
    ],
    "recall": [{}, {"recall_heads": 2, "recall_dim": 4},
        {"recall_heads": 1, "recall_dim": 16, "recall_every": 2, "recall_horizon": 3}],
    "scale_norm": [{}, {"scale_norm": True}],
    "mixer_transform": [{}, {"mixer_transform": "identity"}],
    "mixer_top_k": [{}, {"mixer_top_k": 6}],
    "coarse_modulation": [{}, {"coarse_modulation": True}],
    "token_features": [{}, {"token_features": True}],
    "ngrams": [
        {}, {"ngram_slots": 11, "ngram_width": 6}, {"ngram_slots": 40, "ngram_n": 4,
        "ngram_width": 16},
    ],
    "stochastic_depth_rate": [{}, {"stochastic_depth_rate": 0.4}],
    **{f"stab_{name}": [{}, {f"stab_{name}": True}] for name in (
        "ff_scaling", "embed_scaling", "proj_out_scaling", "mixer_eps_scaling",
        "lifting_level_scaling",
    )},
    **{key: [{}, {key: 0.3}] for key in (
        "lifting_dropout", "dropout_embedding", "dropout_projection", "dropout_mixer",
        "dropout_mlp", "dropout_lm_head",
    )},
    "cells": [
        # with the default 1e-6 for the other columns, a step of any size leaves where the gradient
        # holds
        {}, {
            **CELLS, "multinodal_cross_cell_gating": True, "multinodal_features_per_cell": 5,
            "multinodal_bagged_eps": 0.01,
        },
        {**CELLS, "multinodal_combination": "sum", "multinodal_num_cells": 3,
            "multinodal_seeds": (1, 2, 3)}, CELLS,
        {**CELLS, "multinodal_cross_cell_gating": True, "multinodal_cross_cell_gate_interval": 2},
    ],
}  # fmt: skip
# the others run alone: pairs of all would take minutes
PAIRED = {name: values[:3] for name, values in OPTIONS.items()}


def is_possible(overrides: dict) -> bool:
    try:
        tiny(**overrides)
    except InputError:
        return False
    return True


def covering_rows() -> list[dict]:
    """Combinations in which every two options meet in every two of their values, but for those that
    config.py rejects.

    Greedy: each row starts from a pair not met so far and takes, option by option, the value that
    meets most new pairs."""
    names = sorted(PAIRED, key=lambda name: -len(PAIRED[name]))
    value = {(name, i): values for name in names for i, values in enumerate(PAIRED[name])}
    missing = {
        frozenset((a, b))
        for a, b in itertools.combinations(value, 2)
        if a[0] != b[0] and is_possible(value[a] | value[b])
    }
    rows = []
    while missing:
        unmet = Counter(itertools.chain.from_iterable(missing))
        chosen = max(
            (sorted(pair) for pair in missing),
            key=lambda pair: (unmet[pair[0]] + unmet[pair[1]], pair),
        )
        overrides = value[chosen[0]] | value[chosen[1]]
        for name in names:
            if name in (choice[0] for choice in chosen):
                continue
            new = {
                (name, i): (
                    sum(frozenset(((name, i), other)) in missing for other in chosen),
                    unmet[name, i],
                )
                for i in range(len(PAIRED[name]))
            }
            best = max(
                (c for c in new if is_possible(overrides | value[c])), key=new.get, default=None
            )
            if best:
                chosen.append(best)
                overrides |= value[best]
        missing -= {frozenset(pair) for pair in itertools.combinations(chosen, 2)}
        rows.append(overrides)
    return rows


CASES = {"released": {}}
CASES |= {
    ", ".join(f"{k}={v}" for k, v in values.items()): values
    for n in OPTIONS
    for values in OPTIONS[n][1:]
}
CASES |= {f"pairs {i}": row for i, row in enumerate(covering_rows())}
ALONE = [case for case in CASES if not case.startswith("pairs")]


@functools.cache
def network(case: str):
    """The randomised network of a case; tests leave its weights as they are."""
    return random_model(tiny(**CASES[case]))
