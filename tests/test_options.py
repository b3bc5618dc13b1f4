"""Every option, alone and in pairs: causal, the same in chunks, saved and loaded, trained, compiled, and read at all."""

import ast
import functools
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, new_model, random_ids, random_model, randomised, run_in_chunks, tiny

from checkpoint import fill, load_tensors, save_model
from config import Config, InputError
from model import Block, build_model

ROOT = Path(__file__).parents[1]

# Each option's values; the first is what `tiny()` has. A value that needs company (k of a crawl, cells) brings it along.
CELLS = {"multinodal_enabled": True}
DEEP = {"mixer_depth": 2}
OPTIONS: dict[str, list[dict]] = {
    "width": [{}, {"C": 12}],
    "depth": [
        {}, {"looped_blocks": True, "looped_blocks_count": 3}, {"loop_iterations": 2}, {"layers": 3},
        {"looped_blocks": True, "looped_blocks_count": 2, "loop_iterations": 2},
    ],
    "levels": [{}, {"levels": 1}, {"levels": 5}, {"levels": 5, "block_size": 8}],  # the last look back beyond the block
    "wavelet": [
        {}, {"multi_basis_lifting": True}, {"untied_reconstruction": True}, {"wavelet_mode": "haar"},
        {"multi_basis_lifting": True, "multi_basis_inits": ("random", "zero", "haar")},
        {"wavelet_mode": "packets", "per_scale_mixer_widths": None},
        {"multi_basis_lifting": True, "untied_reconstruction": True},
        {"wavelet_mode": "haar", "per_scale_mixer_widths": (0.5, 0.5, 0.25, 0.25), "decompose_bypass": False},
    ],
    "lifting_gate": [{}, {"lifting_gate": True}],
    "lifting_linear_only": [{}, {"lifting_linear_only": True}],
    "lifting_hidden_mult": [{}, {"lifting_hidden_mult": 2}],
    "lifting_init": [{}, {"lifting_init": "zero"}, {"lifting_init": "random"}],
    "shared_lifting_weights": [{}, {"shared_lifting_weights": False}],
    "crawl": [{}, {"wavelet_crawl": False}, {"wavelet_crawl_k": 5}, {"wavelet_crawl_k": 1}],
    "bypass": [
        {}, {"decompose_bypass_ema": True}, {"decompose_bypass": False}, {"decompose_bypass_cross_window": True},
    ],
    "gate": [
        {}, {"use_mixer_gate": False}, {"mixer_gate_activation": "relu"}, {"mixer_gate_activation": "sigmoid"},
        {"mixer_gate_activation": "gelu"},
    ],
    "cross_scale_gating": [{}, {"cross_scale_gating": False}],
    "low_rank": [{}, {"low_rank": 0}, {"low_rank": 5}],
    "weights": [{}, {"exp_parametrization": True}, {"stable_parametrization": True}, {"stab_spectral_norm": True}],
    "gradient_checkpointing": [{}, {"gradient_checkpointing": True}],
    "mixer_depth": [
        {}, {"mixer_depth": 3, "mixer_depth_residuals": True, "mixer_depth_stabilizers": True}, DEEP,
        {**DEEP, "mixer_depth_residuals": True}, {**DEEP, "mixer_depth_stabilizers": True},
    ],
    "per_scale_mixer_widths": [{}, {"per_scale_mixer_widths": None}, {"per_scale_mixer_widths": (0.5, 1.0, 0.25, 2.0)}],
    "per_layer_embedding": [{}, {"per_layer_embedding": False}],
    "skip_proj_out": [{}, {"skip_proj_out": True}],
    "learned_residual": [{}, {"learned_residual": False}],
    "tie_embedding_to_lm_head": [{}, {"tie_embedding_to_lm_head": True}],
    "mlp": [{}, {"mlp_expansion": 0}, {"mlp_layers": 4}, {"mlp_layers": 1}],
    "pkm": [{}, {"pkm_enabled": False}, {"pkm_heads": 2, "pkm_top_k": 2}, {"pkm_num_keys": 25, "pkm_top_k": 25}],
    "fwpkm": [
        {}, {"fwpkm_inference_updates": True, "fwpkm_chunk_size": 5, "fwpkm_update_lr": 0.5, "fwpkm_num_keys": 25},
        {"fwpkm_enabled": False}, {"fwpkm_heads": 2, "fwpkm_top_k": 1}, {"fwpkm_inference_updates": True},
    ],
    "recall": [{}, {"recall_heads": 2, "recall_dim": 4}, {"recall_heads": 1, "recall_dim": 8, "recall_every": 2}],
    "scale_norm": [{}, {"scale_norm": True}],
    "mixer_transform": [{}, {"mixer_transform": "identity"}],
    "mixer_top_k": [{}, {"mixer_top_k": 6}],
    "coarse_modulation": [{}, {"coarse_modulation": True}],
    "token_features": [{}, {"token_features": True}],
    "ngrams": [
        {}, {"ngram_slots": 11, "ngram_width": 6}, {"ngram_slots": 40, "ngram_n": 4, "ngram_width": 16},
    ],
    "stochastic_depth_rate": [{}, {"stochastic_depth_rate": 0.4}],
    **{f"stab_{name}": [{}, {f"stab_{name}": True}] for name in (
        "ff_scaling", "embed_scaling", "proj_out_scaling", "mixer_eps_scaling", "lifting_level_scaling",
    )},
    **{key: [{}, {key: 0.3}] for key in (
        "lifting_dropout", "dropout_embedding", "dropout_projection", "dropout_mixer", "dropout_mlp", "dropout_lm_head",
    )},
    "cells": [
        {}, {  # with the default 1e-6 for the other columns, a step of any size leaves where the gradient holds
            **CELLS, "multinodal_cross_cell_gating": True, "multinodal_features_per_cell": 5, "multinodal_bagged_eps": 0.01,
        },
        {**CELLS, "multinodal_combination": "sum", "multinodal_num_cells": 3, "multinodal_seeds": (1, 2, 3)}, CELLS,
        {**CELLS, "multinodal_cross_cell_gating": True, "multinodal_cross_cell_gate_interval": 2},
    ],
}  # fmt: skip
PAIRED = {name: values[:3] for name, values in OPTIONS.items()}  # the others run alone: pairs of all would take minutes


def is_possible(overrides: dict) -> bool:
    try:
        tiny(**overrides)
    except InputError:
        return False
    return True


def covering_rows() -> list[dict]:
    """Combinations in which every two options meet in every two of their values, but for those that config.py rejects.

    Greedy: each row starts from a pair not met so far and takes, option by option, the value that meets most new pairs.
    """
    names = sorted(PAIRED, key=lambda name: -len(PAIRED[name]))
    value = {(name, i): values for name in names for i, values in enumerate(PAIRED[name])}
    missing = {
        frozenset((a, b)) for a, b in itertools.combinations(value, 2) if a[0] != b[0] and is_possible(value[a] | value[b])
    }
    rows = []
    while missing:
        unmet = Counter(itertools.chain.from_iterable(missing))
        chosen = max((sorted(pair) for pair in missing), key=lambda pair: (unmet[pair[0]] + unmet[pair[1]], pair))
        overrides = value[chosen[0]] | value[chosen[1]]
        for name in names:
            if name in (choice[0] for choice in chosen):
                continue
            new = {
                (name, i): (sum(frozenset(((name, i), other)) in missing for other in chosen), unmet[name, i])
                for i in range(len(PAIRED[name]))
            }
            best = max((c for c in new if is_possible(overrides | value[c])), key=new.get, default=None)
            if best:
                chosen.append(best)
                overrides |= value[best]
        missing -= {frozenset(pair) for pair in itertools.combinations(chosen, 2)}
        rows.append(overrides)
    return rows


CASES = {"released": {}}
CASES |= {", ".join(f"{k}={v}" for k, v in values.items()): values for n in OPTIONS for values in OPTIONS[n][1:]}
CASES |= {f"pairs {i}": row for i, row in enumerate(covering_rows())}
every_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def network(case: str):
    """The randomised network of a case; tests leave its weights as they are."""
    return random_model(tiny(**CASES[case]))


def test_pairs_leave_no_possible_pair_of_values_out():
    rows = [row for name, row in CASES.items() if name.startswith("pairs")]
    for a, b in itertools.combinations(PAIRED, 2):
        for one, other in itertools.product(PAIRED[a][1:], PAIRED[b][1:]):
            if is_possible(one | other) and (both := one | other):
                assert any(all(row.get(key) == value for key, value in both.items()) for row in rows), both


# ===== Each case


@every_case
def test_no_future_token_changes_the_past(case):
    model, ids, places = network(case), random_ids(1, 34), (1, 4, 9, 32, 33)
    changed = torch.cat([torch.cat([ids[:, :t], (ids[:, t:] + 1) % VOCAB], dim=1) for t in places])
    with torch.no_grad():
        logits, _ = model(ids.expand(len(places), -1))
        others, _ = model(changed)
    for t, one, other in zip(places, logits, others, strict=True):
        assert torch.equal(other[:t], one[:t]), t
        assert not torch.equal(other[t], one[t]), t


@every_case
def test_chunks_equal_whole(case):
    model, ids = network(case), random_ids(1, 37)
    with torch.no_grad():
        for stream in (False, True):
            whole, _ = model(ids, model.start(1, stream=stream))
            parts, _ = run_in_chunks(model, ids, [1, 16, 20], model.start(1, stream=stream))
            rounding = 1e-4 if case.startswith("pairs") else 1e-5  # dozens of options at once amplify it
            torch.testing.assert_close(parts, whole, atol=rounding, rtol=rounding)


@every_case
def test_a_saved_network_gives_the_same_logits(case, tmp_path):
    model, ids, path = network(case), random_ids(1, 34), tmp_path / "model.safetensors"
    save_model(model, path)
    other = build_model(model.config, VOCAB).eval()
    fill(other, load_tensors(path), path)
    with torch.no_grad():
        torch.testing.assert_close(other(ids)[0], model(ids)[0], atol=1e-5, rtol=1e-5)


def loss_in_training(model):
    """The training loss on one batch, with the same dropout every time."""
    torch.manual_seed(3)
    loss, _ = model.loss(random_ids(2, 25)[:, :-1], random_ids(2, 25)[:, 1:])
    return loss


@every_case
def test_a_step_down_the_gradient_lowers_the_loss_of_its_batch(case):
    torch.manual_seed(0)
    model = new_model(tiny(**CASES[case])).train()  # as a run starts, not randomised
    before = loss_in_training(model)
    before.backward()
    length = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    falls, gone = [], 0.0
    # The first-order fall is step·length. Spectral norm moves its estimate at every forward pass in training, which a short
    # step would not outweigh; norms of coefficients that begin near zero curve the loss so much that a long one overshoots.
    for step in (0.03, 0.001):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= (step - gone) / length * parameter.grad
            falls.append((before - loss_in_training(model)) / (step * length))
        gone = step
    assert max(falls) > 1 / 6


def unused(config: Config, name: str) -> str | None:
    """Why the parameter `name` has no gradient, where that is as it should be."""
    if not config.use_mixer_gate and name.endswith("scale_routing"):
        return "what the gates read matters only where there are gates"
    if config.wavelet_crawl_k == 1 and name.endswith("dilation_logits"):
        return "the softmax of a single lag is 1"
    for memory in ("pkm", "fwpkm"):
        if getattr(config, f"{memory}_top_k") == 1 and f".{memory}." in name and not name.endswith("values.weight"):
            return "the softmax of a single slot is 1, and which slot it is has no gradient"
    branches = (config.mlp_expansion, config.pkm_enabled, config.fwpkm_enabled, config.recall_heads)
    if not any(branches) and ".ln2." in name:
        return "there is no branch that reads the second norm"
    first = name.endswith("layers.0.bypass.cross_layer_mix.weight") and config.loop_iterations == 1
    if first and (config.applications == 1 or not config.looped_blocks):
        return "the first block has no block below"
    return None


@every_case
def test_every_parameter_gets_a_gradient(case):
    model = random_model(tiny(**CASES[case])).train()
    for seed in range(3 if model.config.stochastic_depth_rate else 1):  # it leaves a block out of some passes
        torch.manual_seed(seed)
        model.loss(random_ids(2, 24, seed), random_ids(2, 24, seed + 1))[0].backward()
    for name, parameter in model.named_parameters():
        if unused(model.config, name):
            assert parameter.grad is None or (parameter.grad == 0).all(), name
        else:
            assert parameter.grad is not None and (parameter.grad != 0).any(), name
            assert parameter.grad.isfinite().all(), name


# ===== torch.compile


def compiled_equals_eager(overrides: dict, backend: str) -> None:
    torch._dynamo.reset()
    model = random_model(tiny(**{"levels": 2} | overrides)).train()
    ids, targets = random_ids(2, 20), random_ids(2, 20, seed=1)
    expected, _ = model.loss(ids, targets)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, _ = torch.compile(model.loss, fullgraph=True, backend=backend)(ids, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


COMPILED = {
    "released": {"levels": 1},
    "moving average, two bases, loops": {
        "decompose_bypass_ema": True, "multi_basis_lifting": True, "looped_blocks": True, "looped_blocks_count": 1,
        "loop_iterations": 2, "levels": 1, "mlp_expansion": 0,
    },
    "haar, deep mixers, n-grams": {
        "wavelet_mode": "haar", "mixer_depth": 2, "mixer_depth_stabilizers": True, "exp_parametrization": True,
        "per_scale_mixer_widths": None, "layers": 1, "ngram_slots": 11,
    },
    "narrow haar, associative memory": {
        "wavelet_mode": "haar", "per_scale_mixer_widths": (0.5, 0.25, 0.25), "recall_heads": 2, "recall_dim": 8,
    },
    "cells": {
        **CELLS, "multinodal_cross_cell_gating": True, "tie_embedding_to_lm_head": True, "untied_reconstruction": True,
        "layers": 1, "levels": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", COMPILED)
def test_the_loss_compiles_to_one_graph_that_equals_eager(kind):
    compiled_equals_eager(COMPILED[kind], "eager" if kind.startswith(("moving", "haar", "cells")) else "aot_eager")


def test_training_with_stochastic_depth_and_dropout_compiles_to_one_graph():
    torch._dynamo.reset()
    model = build_model(tiny(stochastic_depth_rate=0.5, dropout_mlp=0.1, dropout_embedding=0.1, levels=1), VOCAB).train()
    loss, _ = torch.compile(model.loss, fullgraph=True, backend="eager")(random_ids(), random_ids())
    loss.backward()
    assert loss.isfinite()


@pytest.mark.slow
def test_the_loss_compiled_by_inductor_equals_eager():
    compiled_equals_eager(COMPILED["released"], "inductor")


# ===== Every key is read

# For each key of the network: other values than those of `tiny()`, under which it must change something.
CHANGES: dict[str, tuple[dict, dict]] = {  # key: (context, context with another value of the key)
    "block_size": ({}, {"block_size": 20}),
    "C": ({}, {"C": 8}),
    "layers": ({}, {"layers": 3}),
    "levels": ({"per_scale_mixer_widths": None}, {"per_scale_mixer_widths": None, "levels": 2}),
    "mlp_expansion": ({}, {"mlp_expansion": 3}),
    "mlp_layers": ({}, {"mlp_layers": 3}),
    "looped_blocks_count": ({"looped_blocks": True}, {"looped_blocks": True, "looped_blocks_count": 2}),
    "loop_iterations": ({}, {"loop_iterations": 2}),
    "wavelet_mode": ({}, {"wavelet_mode": "haar"}),
    "lifting_hidden_mult": ({}, {"lifting_hidden_mult": 2}),
    "lifting_init": ({}, {"lifting_init": "zero"}),
    "wavelet_crawl_k": ({}, {"wavelet_crawl_k": 5}),
    "multi_basis_inits": ({"multi_basis_lifting": True}, {"multi_basis_lifting": True, "multi_basis_inits": ("zero", "haar")}),
    "mixer_gate_activation": ({}, {"mixer_gate_activation": "gelu"}),
    "low_rank": ({}, {"low_rank": 3}),
    "per_scale_mixer_widths": ({}, {"per_scale_mixer_widths": None}),
    "mixer_depth": ({}, DEEP),
    "mixer_depth_residuals": (DEEP, {**DEEP, "mixer_depth_residuals": True}),
    "mixer_depth_stabilizers": (DEEP, {**DEEP, "mixer_depth_stabilizers": True}),
    "stochastic_depth_rate": ({"layers": 3}, {"layers": 3, "stochastic_depth_rate": 0.99}),
    "skip_proj_out": ({}, {"skip_proj_out": True}),
    **{f"{memory}_{key}": ({}, {f"{memory}_{key}": value}) for memory in ("pkm", "fwpkm") for key, value in (
        ("num_keys", 25), ("top_k", 3), ("heads", 2),
    )},
    **{key: ({"fwpkm_inference_updates": True}, {"fwpkm_inference_updates": True, key: value}) for key, value in (
        ("fwpkm_update_lr", 5.0), ("fwpkm_chunk_size", 5),
    )},
    "mixer_transform": ({}, {"mixer_transform": "identity"}),
    "mixer_top_k": ({}, {"mixer_top_k": 6}),
    "ngram_slots": ({}, {"ngram_slots": 11}),
    "ngram_n": ({"ngram_slots": 11}, {"ngram_slots": 11, "ngram_n": 3}),
    "ngram_width": ({"ngram_slots": 11}, {"ngram_slots": 11, "ngram_width": 4}),
    "recall_heads": ({}, {"recall_heads": 2}),
    "recall_dim": ({"recall_heads": 2}, {"recall_heads": 2, "recall_dim": 8}),
    "recall_every": ({"recall_heads": 2}, {"recall_heads": 2, "recall_every": 2}),
    "stab_spectral_norm": ({}, {"stab_spectral_norm": True}),
    "multinodal_enabled": ({}, CELLS),
    "multinodal_num_cells": (CELLS, {**CELLS, "multinodal_num_cells": 1}),
    "multinodal_cell_dim": (CELLS, {**CELLS, "multinodal_cell_dim": 8}),
    "multinodal_seeds": (CELLS, {**CELLS, "multinodal_seeds": (1, 2)}),
    "multinodal_combination": (CELLS, {**CELLS, "multinodal_combination": "sum"}),
    "multinodal_cross_cell_gating": (CELLS, {**CELLS, "multinodal_cross_cell_gating": True}),
    "multinodal_cross_cell_gate_interval": (
        {**CELLS, "multinodal_cross_cell_gating": True},
        {**CELLS, "multinodal_cross_cell_gating": True, "multinodal_cross_cell_gate_interval": 2},
    ),
    "multinodal_features_per_cell": (CELLS, {**CELLS, "multinodal_features_per_cell": 5}),
    "multinodal_bagged_eps": (
        {**CELLS, "multinodal_features_per_cell": 5},
        {**CELLS, "multinodal_features_per_cell": 5, "multinodal_bagged_eps": 0.1},
    ),
}  # fmt: skip
READ_BY_TRAINING = {"decompose_bypass_cross_window"}  # how windows follow each other


def change_of(key: str) -> tuple[dict, dict]:
    if key in CHANGES:
        return CHANGES[key]
    value = getattr(tiny(), key)
    return {}, {key: (not value) if isinstance(value, bool) else value + 0.3}


@functools.cache
def behaviour(config: Config) -> list:
    """What there is to see of a network: its tensors as they begin, its outputs in use and in training, its work."""
    torch.manual_seed(0)
    model, ids = new_model(config), random_ids(1, 33)
    seen: list = [list(model.state_dict()), *(tensor.clone().flatten() for tensor in model.state_dict().values())]
    randomised(model).eval()
    with torch.no_grad():
        seen += [model(ids, model.start(1, stream=stream))[0] for stream in (False, True)]
    passes = []
    for module in model.modules():
        if isinstance(module, Block):
            module.mixers.register_forward_hook(lambda *_: passes.append(1))
    torch.manual_seed(1)
    loss, _ = model.train().loss(ids, ids)
    loss.backward()
    return [*seen, loss.detach(), len(passes)]


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("key", [key for key in Config.network_keys() if key not in READ_BY_TRAINING])
def test_each_network_key_changes_the_network(key):
    context, changed = change_of(key)
    assert getattr(tiny(**context), key) != getattr(tiny(**changed), key), "the test must change the key"
    assert {k for k in Config.model_fields if getattr(tiny(**context), k) != getattr(tiny(**changed), k)} <= {
        key, "per_scale_mixer_widths",
    }  # fmt: skip
    assert not same(behaviour(tiny(**context)), behaviour(tiny(**changed)))


def is_config(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    return name == "config" or name.endswith("_config")


def keys_read_in_source() -> set[str]:
    """What the scripts, other than config.py, read of something called config: `config.KEY`, and where a function has
    `getattr(config, key)`, the texts that it holds."""
    read = set()
    for path in ROOT.glob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and is_config(node.value):
                read.add(node.attr)
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(call, ast.Call) and ast.unparse(call.func) == "getattr" and is_config(call.args[0])
                for call in ast.walk(node)
            ):
                read |= {text.value for text in ast.walk(node) if isinstance(text, ast.Constant)}
    return read


def test_each_other_key_is_read_by_a_script():
    others = [key for key in Config.model_fields if key not in Config.network_keys() or key in READ_BY_TRAINING]
    read = keys_read_in_source()
    unread = [key for key in others if key not in read]
    assert not unread, f"keys that no script reads as config.KEY: {', '.join(unread)}"
