"""Every option, alone and in pairs: causal, the same in chunks, saved and loaded, trained,
compiled, and read at all."""

import ast
import functools
import itertools

import pytest
import torch
from cases import CASES, CELLS, DEEP, PAIRED, is_possible, network
from helpers import (
    ROOT,
    VOCAB,
    new_model,
    random_ids,
    random_model,
    randomised,
    run_in_chunks,
    tiny,
)

from checkpoint import fill, save_model
from common.tensors import load_tensors
from config import Config
from model import Block, build_model

every_case = pytest.mark.parametrize("case", CASES)


def test_pairs_leave_no_possible_pair_of_values_out():
    rows = [row for name, row in CASES.items() if name.startswith("pairs")]
    for a, b in itertools.combinations(PAIRED, 2):
        for one, other in itertools.product(PAIRED[a][1:], PAIRED[b][1:]):
            if is_possible(one | other) and (both := one | other):
                assert any(
                    all(row.get(key) == value for key, value in both.items()) for row in rows
                ), both


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
            # dozens of options at once amplify it
            rounding = 1e-4 if case.startswith("pairs") else 1e-5
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
    length = torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]
    )
    falls, gone = [], 0.0
    # The first-order fall is step·length. Spectral norm moves its estimate at every forward pass in
    # training, which a short step would not outweigh; norms of coefficients that begin near zero
    # curve the loss so much that a long one overshoots.
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
        if (
            getattr(config, f"{memory}_top_k") == 1
            and f".{memory}." in name
            and not name.endswith("values.weight")
        ):
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
    # it leaves a block out of some passes
    for seed in range(3 if model.config.stochastic_depth_rate else 1):
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
    "released": {"levels": 1, "layers": 1},
    "moving average, two bases, loops": {
        "decompose_bypass_ema": True, "multi_basis_lifting": True, "looped_blocks": True,
        "looped_blocks_count": 1,
        "loop_iterations": 2, "levels": 1, "mlp_expansion": 0,
    },
    "haar, deep mixers, n-grams": {
        "wavelet_mode": "haar", "mixer_depth": 2, "mixer_depth_stabilizers": True,
        "exp_parametrization": True,
        "per_scale_mixer_widths": None, "layers": 1, "ngram_slots": 11,
    },
    "narrow haar, associative memory": {
        "wavelet_mode": "haar", "per_scale_mixer_widths": (0.5, 0.25, 0.25), "recall_heads": 2,
        "recall_dim": 8, "layers": 1, "pkm_enabled": False, "fwpkm_enabled": False,
    },
    "cells": {
        **CELLS, "multinodal_cross_cell_gating": True, "tie_embedding_to_lm_head": True,
        "untied_reconstruction": True,
        "layers": 1, "levels": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", COMPILED)
def test_the_loss_compiles_to_one_graph_that_equals_eager(kind):
    compiled_equals_eager(
        COMPILED[kind], "eager" if kind.startswith(("moving", "haar", "cells")) else "aot_eager"
    )


def test_training_with_stochastic_depth_and_dropout_compiles_to_one_graph():
    torch._dynamo.reset()
    dropout = {"stochastic_depth_rate": 0.5, "dropout_mlp": 0.1, "dropout_embedding": 0.1}
    # two blocks, since stochastic depth leaves the first alone; memories only take time here
    config = tiny(**dropout, levels=1, pkm_enabled=False, fwpkm_enabled=False)
    model = build_model(config, VOCAB).train()
    loss, _ = torch.compile(model.loss, fullgraph=True, backend="eager")(random_ids(), random_ids())
    loss.backward()
    assert loss.isfinite()


@pytest.mark.slow
def test_the_loss_compiled_by_inductor_equals_eager():
    compiled_equals_eager(COMPILED["released"], "inductor")


# ===== Every key is read

# For each key of the network: other values than those of `tiny()`, under which it must change
# something.
CHANGES: dict[str, tuple[dict, dict]] = {  # key: (context, context with another value of the key)
    "block_size": ({}, {"block_size": 20}),
    "C": ({}, {"C": 8}),
    "layers": ({}, {"layers": 3}),
    "levels": ({"per_scale_mixer_widths": None}, {"per_scale_mixer_widths": None, "levels": 2}),
    "mlp_expansion": ({}, {"mlp_expansion": 3}),
    "mlp_layers": ({}, {"mlp_layers": 3}),
    "mlp_taps": ({}, {"mlp_taps": 3}),
    "mlp_activation": ({}, {"mlp_activation": "relu2"}),
    "looped_blocks_count": ({"looped_blocks": True},
        {"looped_blocks": True, "looped_blocks_count": 2}),
    "loop_iterations": ({}, {"loop_iterations": 2}),
    "wavelet_mode": ({}, {"wavelet_mode": "haar"}),
    "lifting_hidden_mult": ({}, {"lifting_hidden_mult": 2}),
    "lifting_init": ({}, {"lifting_init": "zero"}),
    "wavelet_crawl_k": ({}, {"wavelet_crawl_k": 5}),
    "multi_basis_inits": ({"multi_basis_lifting": True},
        {"multi_basis_lifting": True, "multi_basis_inits": ("zero", "haar")}),
    "mixer_gate_activation": ({}, {"mixer_gate_activation": "gelu"}),
    "mixer_gate_input": ({"cross_scale_gating": False},
        {"cross_scale_gating": False, "mixer_gate_input": "stream"}),
    "low_rank": ({}, {"low_rank": 3}),
    "per_scale_mixer_widths": ({}, {"per_scale_mixer_widths": None}),
    "mixer_depth": ({}, DEEP),
    "mixer_depth_residuals": (DEEP, {**DEEP, "mixer_depth_residuals": True}),
    "mixer_depth_stabilizers": (DEEP, {**DEEP, "mixer_depth_stabilizers": True}),
    "stochastic_depth_rate": ({"layers": 3}, {"layers": 3, "stochastic_depth_rate": 0.99}),
    "skip_proj_out": ({}, {"skip_proj_out": True}),
    **{
        f"{memory}_{key}": ({}, {f"{memory}_{key}": value})
        for memory in ("pkm", "fwpkm")
        for key, value in (("num_keys", 25), ("top_k", 3), ("heads", 2))
    },
    **{
        key: ({"fwpkm_inference_updates": True}, {"fwpkm_inference_updates": True, key: value})
        for key, value in (("fwpkm_update_lr", 5.0), ("fwpkm_chunk_size", 5))
    },
    "mixer_transform": ({}, {"mixer_transform": "identity"}),
    "mixer_top_k": ({}, {"mixer_top_k": 6}),
    "ngram_slots": ({}, {"ngram_slots": 11}),
    "ngram_n": ({"ngram_slots": 11}, {"ngram_slots": 11, "ngram_n": 3}),
    "ngram_width": ({"ngram_slots": 11}, {"ngram_slots": 11, "ngram_width": 4}),
    "recall_heads": ({}, {"recall_heads": 2}),
    "recall_dim": ({"recall_heads": 2}, {"recall_heads": 2, "recall_dim": 8}),
    "recall_horizon": ({"recall_heads": 2}, {"recall_heads": 2, "recall_horizon": 2}),
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
    """What there is to see of a network: its tensors as they begin, its outputs in use and in
    training, its work."""
    torch.manual_seed(0)
    model, ids = new_model(config), random_ids(1, 33)
    seen: list = [
        list(model.state_dict()),
        *(tensor.clone().flatten() for tensor in model.state_dict().values()),
    ]
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
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "key", [key for key in Config.network_keys() if key not in READ_BY_TRAINING]
)
def test_each_network_key_changes_the_network(key):
    context, changed = change_of(key)
    assert getattr(tiny(**context), key) != getattr(tiny(**changed), key), (
        "the test must change the key"
    )
    assert {
        k for k in Config.model_fields if getattr(tiny(**context), k) != getattr(tiny(**changed), k)
    } <= {
        key,
        "per_scale_mixer_widths",
    }
    assert not same(behaviour(tiny(**context)), behaviour(tiny(**changed)))


def is_config(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    return name == "config" or name.endswith("_config")


def keys_read_in_source() -> set[str]:
    """What the scripts, other than config.py, read of something called config: `config.KEY`, and
    where a function has `getattr(config, key)`, the texts that it holds."""
    read = set()
    wings = ("common", "data", "layers", "training", "inference", "research")
    paths = [*ROOT.glob("*.py"), *(path for wing in wings for path in ROOT.glob(f"{wing}/*.py"))]
    for path in paths:
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Load)
                and is_config(node.value)
            ):
                read.add(node.attr)
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(call, ast.Call)
                and ast.unparse(call.func) == "getattr"
                and is_config(call.args[0])
                for call in ast.walk(node)
            ):
                read |= {text.value for text in ast.walk(node) if isinstance(text, ast.Constant)}
    return read


def test_each_other_key_is_read_by_a_script():
    others = [
        key
        for key in Config.model_fields
        if key not in Config.network_keys() or key in READ_BY_TRAINING
    ]
    read = keys_read_in_source()
    unread = [key for key in others if key not in read]
    assert not unread, f"keys that no script reads as config.KEY: {', '.join(unread)}"
