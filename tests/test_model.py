"""The network's parts equal their definitions, nothing sees the future, and any split into chunks
gives the same numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, VOCAB, random_ids, random_model, randomised, run_in_chunks, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard

from checkpoint import load_state, save_model, save_state
from common.command import InputError
from config import Config, load_config
from layers import memory as memory_module
from layers.loss import LinearCrossEntropy
from layers.memory import AssociativeMemory
from layers.variants import GatedHaar, HaarPackets, MovingAverage
from model import (
    FastWeightMemory,
    Haar,
    Lifting,
    ProductKeyMemory,
    RunningMean,
    WalshHadamard,
    build_model,
    hadamard,
    parts_of,
)

AROUND_POWERS_OF_TWO = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)
UPDATES = {"fwpkm_inference_updates": True, "fwpkm_update_lr": 0.5}
KINDS = {  # the ways of looking back
    "released": {},
    "no bypass, no crawl": {"decompose_bypass": False, "wavelet_crawl": False},
    "moving average": {"decompose_bypass_ema": True},
    "haar": {"wavelet_mode": "haar"},
    "narrow haar": {"wavelet_mode": "haar", "per_scale_mixer_widths": (0.5, 0.5, 0.25, 0.25)},
    "packets": {"wavelet_mode": "packets", "per_scale_mixer_widths": None},
    "gated lags": {"lifting_gate": True},
    "two bases": {"multi_basis_lifting": True},
    "untied": {"untied_reconstruction": True, "shared_lifting_weights": False},
    "loops": {"looped_blocks": True, "looped_blocks_count": 3, "loop_iterations": 2},
    "fast weights": UPDATES,
    "cells": {"multinodal_enabled": True, "multinodal_cross_cell_gating": True},
    "padded width": {"C": 12},
    "associative memory": {"recall_heads": 2, "recall_dim": 8},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str, **overrides):
    return random_model(tiny(**KINDS[kind] | overrides))


def same_weights(model, config: Config):
    """A network of `config` with the weights of `model`."""
    other = build_model(config, VOCAB)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ===== Leaves


@pytest.mark.parametrize("width", [1, 2, 4, 8, 32, 64, 512])
def test_walsh_hadamard_equals_scipy_and_is_its_own_inverse(width):
    transform = WalshHadamard(width)
    x = torch.randn(2, 3, width)
    matrix = torch.tensor(scipy_hadamard(width) / math.sqrt(width), dtype=torch.float32)
    torch.testing.assert_close(transform(x), x @ matrix.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(transform(transform(x)), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("crawl", [False, True])
@pytest.mark.parametrize(
    "overrides", [{}, {"lifting_linear_only": True}, {"lifting_hidden_mult": 2}, {"C": 12}]
)
@pytest.mark.parametrize("init", ["haar", "zero", "random", "trained"])
def test_reconstruction_inverts_lifting(init, overrides, crawl):
    config = tiny(wavelet_crawl=crawl, levels=4, **overrides)
    wavelet = Lifting(config, "random" if init == "trained" else init)
    if init == "trained":
        randomised(wavelet)
    x = torch.randn(2, 40, config.padded_width)
    coefficients, _ = wavelet.decompose(x, wavelet.start(2, x))
    assert coefficients.shape == (5, 2, 40, config.padded_width)
    torch.testing.assert_close(wavelet.reconstruct(coefficients), x, atol=1e-5, rtol=1e-5)


def test_reconstruction_inverts_haar():
    wavelet = Lifting(tiny(wavelet_mode="haar", levels=4), "haar")
    x = torch.randn(2, 40, 16)
    coefficients, _ = wavelet.decompose(x, wavelet.start(2, x))
    torch.testing.assert_close(wavelet.reconstruct(coefficients), x, atol=1e-5, rtol=1e-5)


def test_haar_coefficients_are_scaled_sums_and_differences_of_the_past():
    wavelet = Haar(tiny(wavelet_mode="haar", levels=3))
    x = torch.randn(1, 20, 16)
    c, _ = wavelet.decompose(x, wavelet.start(1, x))
    past = F.pad(x, (0, 0, 7, 0))
    approximation = sum(past[:, 7 - lag : 27 - lag] for lag in range(8)) / math.sqrt(8)
    torch.testing.assert_close(c[0], approximation, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(c[3], (x - past[:, 6:26]) / math.sqrt(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("lengths", [[40], [1, 2, 3, 34], [17, 1, 22]])
def test_haar_by_hand_equals_lifting_with_its_gradients_and_those_of_its_state(lengths, levels):
    config = tiny(wavelet_mode="haar", levels=levels)
    x, wanted = torch.randn(2, 40, 16).double(), torch.randn(levels + 1, 2, 40, 16).double()
    results = []
    for wavelet in (Haar(config), GatedHaar(config).double()):  # whose gates are open
        h = x.clone().requires_grad_()
        start = {name: (past + 1).requires_grad_() for name, past in wavelet.start(2, x).items()}
        state, pieces = start, []
        for piece in h.split(lengths, dim=1):
            c, state = wavelet.decompose(piece, state)
            pieces.append(c)
        c = torch.cat(pieces, dim=2)
        loss = (c * wanted).sum() + sum(past.square().sum() for past in state.values())
        results.append([c, *state.values(), *torch.autograd.grad(loss, [h, *start.values()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


FOLDING = {  # options of a network whose mixers' outputs go to the stream by one product
    "plain": {},
    "as best-small": {
        "decompose_bypass": False,
        "low_rank": 0,
        "per_scale_mixer_widths": (0.25,) * 4,
    },
    "padded width": {"C": 12},
    "no routing, no gate": {"cross_scale_gating": False, "use_mixer_gate": False},
    "gates of the stream": {"cross_scale_gating": False, "mixer_gate_input": "stream"},
    "no transform": {"mixer_transform": "identity"},
    "coarse modulation": {"coarse_modulation": True},
    "signs and logarithms": {"exp_parametrization": True},
}


@pytest.mark.parametrize("options", FOLDING.values(), ids=FOLDING)
def test_mixers_outputs_by_one_product_equal_the_reconstruction_with_its_gradients(options):
    model = random_model(tiny(**KINDS["narrow haar"] | options))
    block, wavelet = model.double().block(1)
    assert block.folds
    c = torch.randn(4, 2, 20, 16).double().requires_grad_()
    h = torch.randn(2, 20, 16).double()
    parameters = [
        p
        for part in filter(None, (block.mixers, block.coarse_modulation, block.proj_out))
        for p in part.parameters()
    ]
    results = []
    for branch in (block.folded_branch, block.wavelet_branch):
        gained = branch(c, h, wavelet)
        inputs = [c, block.scale_weights, *parameters]
        results.append(
            [gained, *torch.autograd.grad(gained.square().sum(), inputs, allow_unused=True)]
        )
    for got, wanted in zip(*results, strict=True):
        # the factors of √½ are kept in fp32
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


MAPPED = {  # options of a network whose mixers' first matrices come before the wavelet
    "gates of the stream": {"mixer_gate_input": "stream"},
    "no gate": {"use_mixer_gate": False},
    "several widths": {
        "mixer_gate_input": "stream",
        "per_scale_mixer_widths": (0.25, 0.5, 0.25, 0.5),
    },
    "padded width": {"mixer_gate_input": "stream", "C": 12},
    "one level": {
        "mixer_gate_input": "stream",
        "levels": 1,
        "per_scale_mixer_widths": (0.25, 0.5),
    },
}


@pytest.mark.parametrize("lengths", [[20], [1, 2, 5, 12], [3, 17]])
@pytest.mark.parametrize("options", MAPPED.values(), ids=MAPPED)
def test_mixers_before_the_wavelet_equal_those_behind_it_with_their_gradients(options, lengths):
    bare = {"decompose_bypass": False, "low_rank": 0, "cross_scale_gating": False}
    model = random_model(tiny(**KINDS["narrow haar"] | bare | options)).double()
    block, wavelet = model.block(1)
    assert block.maps_first
    x = torch.randn(2, 20, block.ln1.weight.numel()).double().requires_grad_()
    start = {
        name: torch.randn(2, *past.shape[1:]).double().requires_grad_()
        for name, past in wavelet.start(2, x).items()
    }
    results = []
    for maps_first in (True, False):
        block.maps_first = maps_first
        state = start
        pieces = []
        for piece in x.split(lengths, dim=1):
            y, _, state = block.mix_positions(piece, piece, None, wavelet, state)
            pieces.append(y)
        gained = torch.cat(pieces, dim=1)
        loss = gained.square().sum() + sum(past.square().sum() for past in state.values())
        inputs = [x, *start.values(), block.scale_weights, *block.mixers.parameters()]
        results.append([gained, *state.values(), *torch.autograd.grad(loss, inputs)])
    for got, wanted in zip(*results, strict=True):
        # the factors of √½ are kept in fp32
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "key, value",
    [("dropout_mixer", 0.1), ("scale_norm", True), ("mixer_top_k", 3), ("lifting_gate", True)],
)
def test_what_is_not_linear_behind_the_mixers_is_reconstructed(key, value):
    model = build_model(tiny(**KINDS["narrow haar"] | {key: value}), VOCAB)
    assert not any(block.folds for block in model.layers)


@pytest.mark.parametrize("levels", [1, 3, 5])
@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_crawl_begins_near_the_lag_of_its_level_and_mixes_the_k_lags_around_it(k, levels):
    config = tiny(levels=levels, wavelet_crawl_k=k)
    wavelet = Lifting(config, "haar")
    x = torch.randn(1, 40, 16)
    for level in range(levels):
        joined = F.pad(x, (0, 0, wavelet.longest_lag[level], 0))
        first = max(1, 2**level - k // 2)
        assert (wavelet.first_lag[level], wavelet.longest_lag[level]) == (first, first + k - 1)
        logits = torch.zeros(k)
        logits[2**level - first] = 5.0
        assert torch.equal(wavelet.dilation_logits[level], logits)
        mixed = sum(
            w * F.pad(x, (0, 0, first + i, 0))[:, :40] for i, w in enumerate(logits.softmax(0))
        )
        torch.testing.assert_close(wavelet.lagged(joined, level, 40), mixed, atol=1e-6, rtol=1e-5)


def test_two_equal_bases_are_one():
    torch.manual_seed(0)
    one = randomised(Lifting(tiny(), "random"))
    two = parts_of(tiny(multi_basis_lifting=True)).wavelet()
    for wavelet in two.wavelets:
        wavelet.load_state_dict(one.state_dict())
    two.basis_weights.data.normal_()
    x = torch.randn(2, 20, 16)
    expected, _ = one.decompose(x, one.start(2, x))
    blended, _ = two.decompose(x, two.start(2, x))
    torch.testing.assert_close(blended, expected)
    torch.testing.assert_close(two.reconstruct(blended), one.reconstruct(expected))


def test_an_untied_reconstruction_of_bases_is_the_blend_of_each_by_its_own_networks():
    config = tiny(
        multi_basis_lifting=True,
        untied_reconstruction=True,
        multi_basis_inits=("haar", "zero", "random"),
    )
    model = random_model(config)
    bases, inverse, u = (
        model.wavelets[0],
        model.layers[0].inverse_update_nets,
        torch.randn(4, 2, 20, 16),
    )
    blend, expected = inverse.basis_weights[:, 0].softmax(0), 0
    for share, nets in zip(blend, inverse.update_nets, strict=True):
        cur = u[0]
        for level in (2, 1, 0):
            cur = math.sqrt(2) * cur - nets[level](u[3 - level])
        expected = expected + share * cur
    torch.testing.assert_close(bases.reconstruct(u, inverse), expected)
    assert not torch.allclose(bases.reconstruct(u), expected, atol=0.1), (
        "the decomposition has other networks"
    )


@pytest.mark.parametrize(
    "heads, keys, top_k",
    [(1, 16, 1), (1, 64, 8), (2, 64, 5), (4, 25, 25), (2, 16, 40), (1, 100, 32)],
)
def test_product_key_lookup_equals_the_search_of_all_keys(heads, keys, top_k):
    memory = randomised(ProductKeyMemory(tiny(), keys, top_k, heads))
    h = torch.randn(2, 9, 16)
    side, half = math.isqrt(keys), 16 // heads // 2
    query = (h @ memory.query_proj.weight.T).view(2, 9, heads, 2, half)
    expected = torch.zeros(2, 9, 16)
    for head in range(heads):
        every_key = torch.cat(  # slot a·side + b has the key (a, b)
            [
                memory.keys_a[head].repeat_interleave(side, 0),
                memory.keys_b[head].repeat(side, 1),
            ],
            dim=1,
        )
        score, slot = (query[:, :, head].flatten(2) @ every_key.T).topk(min(top_k, keys))
        values = memory.values.weight[head * keys : (head + 1) * keys][slot]
        expected = expected + (score.softmax(-1)[..., None] * values).sum(2)
    torch.testing.assert_close(memory(h), expected, atol=1e-5, rtol=1e-5)


# ===== Averages


@pytest.mark.parametrize("pieces", [[50], [1] * 50, [7, 8, 9, 26], [8, 16, 26]])
@pytest.mark.parametrize("stream", [False, True])
def test_running_mean_equals_the_mean_of_all_the_past_and_in_a_stream_of_the_last_block(
    stream, pieces
):
    average = RunningMean(tiny(block_size=8))
    x = torch.randn(2, 50, 16)
    state, means = average.start(2, x, stream), []
    for piece in x.split(pieces, dim=1):
        mean, state = average(piece, state)
        means.append(mean)
    first = (lambda t: max(0, t - 7)) if stream else (lambda t: 0)
    expected = torch.stack([x[:, first(t) : t + 1].mean(1) for t in range(50)], dim=1)
    torch.testing.assert_close(torch.cat(means, 1), expected, atol=1e-6, rtol=1e-5)


def test_running_mean_of_low_precision_inputs_is_summed_in_fp32():
    average = RunningMean(tiny())
    x = (1 + torch.rand(1, 4000, 16)).bfloat16()
    mean, state = average(x, average.start(1, x, False))
    assert mean.dtype == torch.bfloat16 and state["sum"].dtype == torch.float32
    torch.testing.assert_close(state["sum"][0] / 4000, x[0].float().mean(0), atol=1e-4, rtol=1e-4)


def test_stream_mean_keeps_no_rounding_errors():
    average = RunningMean(tiny(block_size=8))
    x = torch.cat([1e4 * torch.randn(1, 3000, 16), 1e-2 * torch.randn(1, 20, 16)], dim=1)
    mean, _ = average(x, average.start(1, x, True))
    torch.testing.assert_close(mean[:, -1], x[:, -8:].mean(1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("pieces", [[1], [2], [33], [70], [1] * 70, [3, 64, 3]])
def test_moving_average_equals_the_plain_loop(pieces):
    average = randomised(MovingAverage(tiny()))
    average.ema_gate.bias.data += 2.0  # remembers for a while
    x = torch.randn(2, sum(pieces), 16)
    state, means = average.start(2, x, False), []
    for piece in x.split(pieces, dim=1):
        mean, state = average(piece, state)
        means.append(mean)
    forget = torch.sigmoid(average.ema_gate(x))
    m, expected = torch.zeros(2, 16), []
    for t in range(x.size(1)):
        m = forget[:, t] * m + (1 - forget[:, t]) * x[:, t]
        expected.append(m)
    torch.testing.assert_close(torch.cat(means, 1), torch.stack(expected, 1), atol=1e-5, rtol=1e-5)


def test_moving_average_is_computed_in_fp32_under_autocast():
    average = randomised(MovingAverage(tiny()))
    x = torch.randn(2, 40, 16)
    expected, _ = average(x, average.start(2, x, False))
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = average(x, average.start(2, x, False))
    torch.testing.assert_close(mean, expected)


# ===== Causality


@every_kind
def test_no_future_token_changes_the_past(kind):
    model, ids = model_of(kind), random_ids(2, 40)
    with torch.no_grad():
        logits, _ = model(ids)
        for t in AROUND_POWERS_OF_TWO:
            changed = torch.cat(
                [ids[:, :t], (ids[:, t:] + 1 + random_ids(2, 40 - t) % (VOCAB - 1)) % VOCAB], dim=1
            )
            assert (changed[:, t:] != ids[:, t:]).all()
            other, _ = model(changed)
            assert torch.equal(other[:, :t], logits[:, :t]), t
            assert not torch.equal(other[:, t], logits[:, t]), t


@every_kind
def test_no_gradient_flows_from_the_past_to_a_future_embedding(kind):
    model, ids = model_of(kind), random_ids(1, 40)
    leaves = []

    def as_leaf(module, inputs, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    for cell in model.cells:
        cell.token_embedding.register_forward_hook(as_leaf)
    logits, _ = model(ids)
    for t in AROUND_POWERS_OF_TWO:
        for gradient in torch.autograd.grad(
            logits[:, t - 1].square().sum(), leaves, retain_graph=True
        ):
            assert (gradient[:, t:] == 0).all(), t
            assert (gradient[:, t - 1] != 0).any(), t


# ===== State: chunks equal the whole


@st.composite
def network_and_split(draw):
    kind = draw(st.sampled_from(sorted(KINDS)))
    levels = draw(st.integers(1, 5))
    overrides = {
        # Not 2: LayerNorm of two channels is a sign, by which a rounding error may become any
        # number.
        "C": draw(st.sampled_from([4, 6, 10, 16, 18])),
        "levels": levels,
        "layers": draw(st.integers(1, 3)),
        "block_size": draw(st.integers(2 ** (levels - 1) + 1, 40)),
        "wavelet_crawl_k": draw(st.sampled_from([1, 3, 7])),
        "fwpkm_chunk_size": draw(st.sampled_from([2, 5, 8])),
        "per_scale_mixer_widths": (0.5,) * (levels + 1) if kind == "narrow haar" else None,
    }
    whole = draw(st.integers(1, 40))
    lengths, left = [], whole
    longest = draw(st.sampled_from([1, 5, 40]))
    while left:
        lengths.append(draw(st.integers(1, min(left, longest))))
        left -= lengths[-1]
    return {**KINDS[kind], **overrides}, lengths, draw(st.booleans())


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(network_and_split())
def test_chunks_equal_whole(case):
    overrides, lengths, stream = case
    model, ids = random_model(tiny(**overrides)), random_ids(2, sum(lengths))
    with torch.no_grad():
        whole, end = model(ids, model.start(2, stream=stream))
        parts, state = run_in_chunks(model, ids, lengths, model.start(2, stream=stream))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    for one, other in zip(end.blocks, state.blocks, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            # sums over the text, in another order
            torch.testing.assert_close(one[name], other[name], atol=5e-5, rtol=1e-4)


@every_kind
def test_single_tokens_equal_whole(kind):
    model, ids = model_of(kind), random_ids(2, 36)
    with torch.no_grad():
        whole, _ = model(ids)
        steps, _ = run_in_chunks(model, ids, [1] * 36)
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)


@every_kind
@pytest.mark.parametrize("stream", [False, True])
def test_state_size_does_not_grow_with_the_text(kind, stream):
    model = model_of(kind)
    state = model.start(2, stream=stream)
    at_start = state.nbytes
    assert at_start > 0
    with torch.no_grad():
        for length in (1, 1, 6, 32, 200):
            _, state = model(random_ids(2, length), state)
            assert state.nbytes == at_start, length


@every_kind
def test_a_stream_equals_a_plain_text_up_to_block_size(kind):
    model, ids = model_of(kind), random_ids(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, model.start(2, stream=True))[0], model(ids)[0], atol=1e-5, rtol=1e-5
        )


@every_kind
def test_start_is_the_state_of_no_text(kind):
    model, ids = model_of(kind), random_ids()
    with torch.no_grad():
        assert torch.equal(model(ids, model.start(2))[0], model(ids)[0])


@every_kind
@pytest.mark.parametrize("stream", [False, True])
def test_selected_rows_go_on_as_their_own_texts(kind, stream):
    model, ids, more = model_of(kind), random_ids(3, 21), random_ids(4, 9, seed=1)
    rows = [2, 0, 0, 1]
    with torch.no_grad():
        _, state = model(ids, model.start(3, stream=stream))
        forked, _ = model(more, state.select(rows))
        for i, row in enumerate(rows):
            text = torch.cat([ids[row : row + 1], more[i : i + 1]], dim=1)
            own, _ = model(text, model.start(1, stream=stream))
            torch.testing.assert_close(forked[i], own[0, 21:], atol=1e-5, rtol=1e-5)
        by_tensor, _ = model(more, state.select(torch.tensor(rows)))
        assert torch.equal(by_tensor, forked)


@every_kind
@pytest.mark.parametrize("stream", [False, True])
# within the first chunk of fast weights, and past block_size
@pytest.mark.parametrize("length", [5, 37])
def test_reset_rows_are_at_the_start_of_a_text_and_the_others_go_on(kind, stream, length):
    model, more = model_of(kind), random_ids(3, 20, seed=1)
    with torch.no_grad():
        _, state = model(random_ids(3, length), model.start(3, stream=stream))
        fresh, _ = model(more, model.start(3, stream=stream))
        going_on, _ = model(more, state)
        after, _ = model(more, state.reset(torch.tensor([True, False, True])))
    torch.testing.assert_close(after[[0, 2]], fresh[[0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[1], going_on[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(going_on[0], fresh[0], atol=1e-3), "a reset must matter here"


@every_kind
def test_gradient_flows_through_a_state_until_it_is_detached(kind):
    model, ids = model_of(kind).train(), random_ids(1, 6)
    leaves = []
    hook = model.cells[0].token_embedding.register_forward_hook(
        lambda module, inputs, output: leaves.append(output.detach().requires_grad_()) or leaves[-1]
    )
    _, state = model(ids)
    hook.remove()
    carried, _ = model.loss(ids, ids, state)
    (gradient,) = torch.autograd.grad(carried, leaves, retain_graph=True)
    assert (gradient != 0).any()
    cut, _ = model.loss(ids, ids, state.detach())
    assert torch.equal(cut, carried)
    (gradient,) = torch.autograd.grad(cut, leaves, allow_unused=True)
    assert gradient is None


@every_kind
@pytest.mark.parametrize("stream", [False, True])
def test_a_saved_state_goes_on_as_itself(kind, stream, tmp_path):
    model, more = model_of(kind), random_ids(2, 9, seed=1)
    with torch.no_grad():
        _, state = model(random_ids(2, 16), model.start(2, stream=stream))
        save_state(state, tmp_path / "state.safetensors")
        loaded = load_state(tmp_path / "state.safetensors")
        assert loaded.nbytes == state.nbytes
        assert torch.equal(model(more, loaded)[0], model(more, state)[0])


def test_a_file_that_is_no_state_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=str(path)):
        load_state(path)
    save_model(model_of("released"), path)
    with pytest.raises(InputError, match=str(path)):
        load_state(path)


def test_state_counts_a_dict_for_each_application_of_a_block():
    assert len(model_of("released").start(1).blocks) == 2
    assert len(model_of("loops").start(1).blocks) == 3 * 2
    assert len(model_of("cells").start(1).blocks) == 2 * 2


# ===== Loss


@pytest.mark.parametrize("rows", [1, 3, 7, 24, 1000])
def test_loss_in_pieces_equals_cross_entropy_with_its_gradients(rows):
    h, weight, targets = torch.randn(24, 16), torch.randn(VOCAB, 16), torch.randint(VOCAB, (24,))
    h.requires_grad_(), weight.requires_grad_()
    expected = F.cross_entropy(h @ weight.T, targets)
    wanted = torch.autograd.grad(3 * expected, (h, weight))
    loss = LinearCrossEntropy.apply(h, weight, targets, rows, True)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for got, want in zip(torch.autograd.grad(3 * loss, (h, weight)), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@every_kind
def test_loss_equals_cross_entropy_of_the_logits_with_its_gradients(kind):
    model, ids, targets = (
        model_of(kind, loop_iterations=1),
        random_ids(2, 20),
        random_ids(2, 20, seed=1),
    )
    loss, _ = model.loss(ids, targets)
    expected = F.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    got, wanted = gradients(model, loss), gradients(model, expected)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def test_loss_of_a_large_vocabulary_equals_cross_entropy():
    model = randomised(
        build_model(tiny(layers=1, pkm_enabled=False, fwpkm_enabled=False), 2**19)
    ).eval()
    # 32 rows of logits at a time, then 8
    ids, targets = random_ids(1, 40), torch.randint(2**19, (1, 40))
    with torch.no_grad():
        loss, _ = model.loss(ids, targets)
        torch.testing.assert_close(
            loss, F.cross_entropy(model(ids)[0][0], targets[0]), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", ["released", "narrow haar"])
def test_loss_under_bf16_autocast_is_near_that_in_fp32(kind):
    model, ids, targets = model_of(kind), random_ids(2, 30), random_ids(2, 30, seed=1)
    exact, _ = model.loss(ids, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = model.loss(ids, targets)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.02, rtol=0.01)
    wanted, got = gradients(model, exact), gradients(model, rough)
    one, other = (torch.cat([g[name].flatten() for name in wanted]) for g in (wanted, got))
    assert F.cosine_similarity(one, other, dim=0) > 0.98


def test_loss_averages_over_loop_iterations_and_logits_are_the_last():
    model, ids = model_of("released", loop_iterations=3), random_ids(2, 20)
    with torch.no_grad():
        shorter = [same_weights(model, tiny(loop_iterations=n))(ids)[0] for n in (1, 2, 3)]
        each = [F.cross_entropy(logits.flatten(0, 1), ids.flatten()) for logits in shorter]
        torch.testing.assert_close(model.loss(ids, ids)[0], sum(each) / 3, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(ids)[0], shorter[-1])


def test_looped_blocks_equal_as_many_blocks_of_the_same_weights():
    looped = model_of("released", looped_blocks=True, looped_blocks_count=3)
    stacked = build_model(tiny(layers=3), VOCAB).eval()
    assert len(looped.layers) == 1
    one = looped.state_dict()
    stacked.load_state_dict(
        {
            name: one[name.replace(name.split(".")[1], "0", 1)]
            if name.startswith("layers.")
            else one[name]
            for name in stacked.state_dict()
        }
    )
    with torch.no_grad():
        assert torch.equal(looped(random_ids())[0], stacked(random_ids())[0])


def released_at_small_width(**overrides) -> Config:
    path = ROOT / "config.json"
    small = {"C": 64, "pkm_num_keys": 1024, "fwpkm_num_keys": 1024} | overrides
    return load_config(path, **small) if path.is_file() else Config(**small)


@pytest.mark.parametrize("training", [False, True])
def test_the_first_loss_of_the_released_initialisation_is_that_of_a_uniform_guess(training):
    model = build_model(released_at_small_width(), 50257).train(training)
    ids = torch.randint(50257, (2, 65))
    with torch.no_grad():
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    assert abs(loss.item() / math.log(50257) - 1) < 0.05


def test_one_batch_is_overfitted():
    model = build_model(tiny(C=32), VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = random_ids(2, 33)
    for _ in range(120):
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        if loss < 0.1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# ===== Fast weights


def fast_memory(chunk: int = 6, heads: int = 2) -> FastWeightMemory:
    config = tiny(
        fwpkm_inference_updates=True, fwpkm_update_lr=0.5, fwpkm_chunk_size=chunk, fwpkm_heads=heads
    )
    return randomised(FastWeightMemory(config)).eval()


def read_with(memory: FastWeightMemory, h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    slot, weight = memory.lookup(h)
    return (weight[..., None] * (memory.values.weight + delta)[slot]).sum(1)


def test_fast_weights_follow_the_gradient_of_the_next_state_s_error():
    memory = fast_memory(chunk=6)
    h = torch.randn(2, 20, 16)
    with torch.no_grad():
        read, _ = memory(h, memory.start(2, h))
    for row in range(2):  # per sequence
        delta, expected = torch.zeros_like(memory.values.weight), []
        for chunk in h[row].split(6):
            expected.append(read_with(memory, chunk, delta))
            if len(chunk) == 6:
                delta = delta.detach().requires_grad_()
                error = F.mse_loss(read_with(memory, chunk[:-1], delta), chunk[1:])
                delta = delta.detach() - 0.5 * torch.autograd.grad(error, delta)[0]
        torch.testing.assert_close(read[row], torch.cat(expected).detach(), atol=1e-5, rtol=1e-5)
        unchanged = read_with(memory, h[row], torch.zeros_like(delta)).detach()
        assert not torch.allclose(read[row], unchanged, atol=1e-4)


def test_fast_weights_are_each_sequence_s_own():
    model, ids = model_of("fast weights"), random_ids(3, 40)
    with torch.no_grad():
        together, _ = model(ids)
        for row in range(3):
            alone, _ = model(ids[row : row + 1])
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


def test_fast_weights_matter_only_after_a_chunk_and_never_in_training():
    with_updates, ids = model_of("fast weights"), random_ids()
    without = same_weights(with_updates, tiny())
    with torch.no_grad():
        on, off = with_updates(ids)[0], without(ids)[0]
        torch.testing.assert_close(on[:, :8], off[:, :8], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(on[:, 8:], off[:, 8:], atol=1e-3)
        assert torch.equal(with_updates.train()(ids)[0], without.train()(ids)[0])


# ===== Training only


def test_stochastic_depth_drops_block_i_with_probability_rate_i_over_the_number_of_blocks():
    model = model_of("released", layers=3, stochastic_depth_rate=0.9).train()
    x, start = torch.randn(1, 2, 16), model.start(1)
    dropped = [0, 0, 0]
    with torch.no_grad():
        for _ in range(200):
            for i in range(3):
                new_x, _, _ = model.apply_block(i, x, x, x, start.blocks[i])
                dropped[i] += torch.equal(new_x, x)
    assert dropped[0] == 0
    # 60 and 120 expected, four standard deviations
    assert 35 < dropped[1] < 85 and 90 < dropped[2] < 150


def test_stochastic_depth_drops_nothing_outside_training():
    model = model_of("released", layers=3, stochastic_depth_rate=0.9)
    with torch.no_grad():
        assert torch.equal(
            model(random_ids())[0], same_weights(model, tiny(layers=3))(random_ids())[0]
        )


@pytest.mark.parametrize("kind, dropout", [("released", 0.2), ("narrow haar", 0.0)])
def test_gradient_checkpointing_keeps_loss_and_gradients(kind, dropout):
    some_dropout = {
        "dropout_mixer": dropout,
        "dropout_mlp": 0.2,
        "lifting_dropout": dropout,
        "stochastic_depth_rate": 0.5,
    }
    plain = model_of(kind, **some_dropout).train()
    saving = same_weights(plain, tiny(gradient_checkpointing=True, **KINDS[kind] | some_dropout))
    results = []
    for model in (plain, saving):
        torch.manual_seed(1)
        loss, _ = model.loss(random_ids(), random_ids(seed=1))
        results.append((loss.detach(), gradients(model, loss)))
    (loss, wanted), (again, got) = results
    assert torch.equal(again, loss) and got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])


@pytest.mark.parametrize("place", ["embedding", "projection", "mixer", "mlp", "lm_head", "lifting"])
def test_dropout_acts_in_training_only(place):
    key = "lifting_dropout" if place == "lifting" else f"dropout_{place}"
    model, ids = model_of("released", **{key: 0.3}), random_ids()
    plain = same_weights(model, tiny())
    with torch.no_grad():
        assert torch.equal(model(ids)[0], plain(ids)[0])
        assert not torch.allclose(model.train()(ids)[0], plain.train()(ids)[0], atol=1e-3)


def test_cells_start_as_their_seeds_say():
    config = tiny(multinodal_enabled=True, multinodal_seeds=(3, 3, 4), multinodal_num_cells=3)
    one, two, three = build_model(config, VOCAB).cells
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.token_embedding.weight, three.token_embedding.weight)


def test_building_cells_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(tiny(multinodal_enabled=True), VOCAB)
    assert torch.equal(torch.rand(3), expected)


def test_bagged_cells_start_with_their_features_and_the_rest_as_epsilon():
    config = tiny(
        multinodal_enabled=True, multinodal_features_per_cell=5, multinodal_bagged_eps=0.25
    )
    kept = [
        (cell.token_embedding.weight != 0.25).any(0) for cell in build_model(config, VOCAB).cells
    ]
    assert [columns.sum().item() for columns in kept] == [5, 5]
    assert not torch.equal(*kept)


@pytest.mark.parametrize("combination", ["average", "sum"])
def test_cells_without_gates_combine_the_logits_of_whole_networks(combination):
    model, ids = (
        model_of("released", multinodal_enabled=True, multinodal_combination=combination),
        random_ids(),
    )
    with torch.no_grad():
        each = torch.stack([cell(ids)[0] for cell in model.cells])
        expected = each.sum(0) if combination == "sum" else each.mean(0)
        torch.testing.assert_close(model(ids)[0], expected, atol=1e-5, rtol=1e-5)


def test_cells_gate_each_other_s_stream_after_a_block():
    gated = model_of(
        "released", multinodal_enabled=True, multinodal_cross_cell_gating=True, layers=1
    )
    ids, streams = random_ids(), []
    for cell in gated.cells:
        cell.layers[0].register_forward_hook(
            lambda module, inputs, output: streams.append(output[0])
        )
    with torch.no_grad():
        logits, _ = gated(ids)
        (one, two), gate = streams, gated.get_submodule("gates.0.A")
        expected = 0
        for cell, own, other in zip(gated.cells, (one, two), (two, one), strict=True):
            expected = (
                expected + cell.lm_head(cell.final_ln(own * (1 + torch.tanh(gate(other))))) / 2
            )
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cells", [1, 2, 3])
def test_training_weighs_the_loss_of_n_cells_by_one_over_the_root_of_n(cells):
    config = tiny(multinodal_enabled=True, multinodal_num_cells=cells, multinodal_seeds=(1, 2, 3))
    assert build_model(config, VOCAB).loss_weight == pytest.approx(cells**-0.5)
    assert build_model(tiny(), VOCAB).loss_weight == 1


# ===== Associative memory


def test_associative_memory_equals_the_recurrence(monkeypatch):
    monkeypatch.setattr(memory_module, "CHUNK", 8)
    q, k, v = F.normalize(torch.randn(3, 2, 21, 2, 4), dim=-1)
    log_alpha, beta, pairs = -torch.rand(2, 21, 2), torch.rand(2, 21, 2), torch.randn(2, 2, 4, 4)
    reads, last = memory_module.delta_rule(q, k, v, log_alpha, beta, pairs)
    for t in range(21):
        pairs = log_alpha[:, t, :, None, None].exp() * pairs
        u = beta[:, t, :, None] * (v[:, t] - (pairs @ k[:, t, :, :, None]).squeeze(-1))
        pairs = pairs + u[..., :, None] * k[:, t, :, None, :]
        torch.testing.assert_close(
            reads[:, t], (pairs @ q[:, t, :, :, None]).squeeze(-1), atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(last, pairs, atol=1e-5, rtol=1e-5)


def test_a_network_with_an_associative_memory_runs_in_bf16():
    model = random_model(tiny(recall_heads=2, recall_dim=4)).to(torch.bfloat16)
    with torch.no_grad():
        logits, _ = model(random_ids(1, 9))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_associative_memory_finds_what_followed_a_token(monkeypatch):
    """Untrained: where a token comes again, the key that its query fits best, in every head, is
    that of the next position."""
    torch.manual_seed(1)
    config = tiny(recall_heads=2, recall_dim=16)
    memory, asked = AssociativeMemory(config), []
    rule = memory_module.delta_rule

    def watched(q, k, *rest):
        asked.append(q.transpose(1, 2)[:, :, -1:] @ k.transpose(1, 2).mT)
        return rule(q, k, *rest)

    monkeypatch.setattr(memory_module, "delta_rule", watched)
    monkeypatch.setattr(memory_module, "recall_by_library", lambda *tensors: None)
    tokens = torch.randn(12, config.C)
    h = torch.cat([tokens, tokens[4:5]])[None]
    memory(h, memory.start(1, h))
    assert asked[0].shape == (1, 2, 1, 13)
    assert torch.equal(asked[0].argmax(-1), torch.full((1, 2, 1), 5))


# ===== Other ways for coefficients


def test_packets_are_walsh_hadamard_transforms_of_the_last_positions():
    packets, x = (
        HaarPackets(tiny(wavelet_mode="packets", per_scale_mixer_widths=None), hadamard),
        torch.randn(2, 20, 16),
    )
    bands, _ = packets.decompose(x, packets.start(2, x))
    # (B, T, P, 8): from the position itself backwards
    past = F.pad(x, (0, 0, 7, 0)).unfold(1, 8, 1).flip(-1)
    matrix = torch.tensor(scipy_hadamard(8) / math.sqrt(8), dtype=torch.float32)
    expected = (past @ matrix).movedim(-1, 0)
    coarse_to_fine = sorted(range(8), key=lambda band: (matrix[:, band].diff() != 0).sum())
    torch.testing.assert_close(bands, expected[coarse_to_fine], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packets.reconstruct(bands), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("residuals", [False, True])
@pytest.mark.parametrize("stabilizers", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_mixers_in_a_row_equal_their_definition(depth, stabilizers, residuals):
    config = tiny(
        mixer_depth=depth, mixer_depth_stabilizers=stabilizers, mixer_depth_residuals=residuals
    )
    mixers, c = random_model(config).layers[0].mixers, torch.randn(4, 7, 16)
    h = torch.randn(7, 16)
    z = mixers.transform(c)
    for d, bank in enumerate(mixers.banks):
        read = z
        if d < depth - 1:
            read = torch.stack(
                [norm(scale) for norm, scale in zip(mixers.norms[d], z, strict=True)]
            )
            read = read * (mixers.betas[d] if stabilizers else 1)
        mixed = bank(read, mixers.read_by_gates(read, h))
        if d < depth - 1 and stabilizers:
            mixed = mixers.alphas[d] * mixed
        # every one of several adds its input, the last too
        z = z + mixed if residuals and depth > 1 else mixed
    torch.testing.assert_close(mixers(c, h), mixers.transform(z), atol=1e-5, rtol=1e-5)


def test_mixers_take_the_largest_coefficients():
    mixers, z = random_model(tiny(mixer_top_k=5)).layers[0].mixers, torch.randn(4, 7, 16)
    kept = mixers.kept(z)
    h = torch.randn(7, 16)
    assert ((kept != 0).sum(-1) == 5).all() and torch.equal(kept[kept != 0], z[kept != 0])
    assert (kept.abs().sum(-1) >= z.abs().topk(5).values.sum(-1) - 1e-6).all()
    torch.testing.assert_close(
        mixers(mixers.transform(z), h), mixers(mixers.transform(kept), h), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["hadamard", "identity"])
@pytest.mark.parametrize("widths", [None, (0.25, 1.0, 1.0, 0.5)])
@pytest.mark.parametrize("read", ["coefficients", "stream"])
def test_a_transform_in_the_weights_of_the_mixers_is_one_of_the_coefficients(
    kind, widths, read, monkeypatch
):
    config = tiny(
        mixer_transform=kind,
        per_scale_mixer_widths=widths,
        mixer_gate_input=read,
        cross_scale_gating=read == "coefficients",
    )
    mixers = random_model(config).layers[0].mixers
    c, h, results = torch.randn(4, 70, 16, requires_grad=True), torch.randn(70, 16), []
    for folds_from in (0, 1000):
        monkeypatch.setattr(type(mixers), "FOLDS_FROM", folds_from)
        mixers.zero_grad()
        c.grad = None
        y = mixers(c, h)
        y.square().mean().backward()
        results.append([y, c.grad, *(p.grad for p in mixers.parameters())])
    for folded, not_folded in zip(*results, strict=True):
        torch.testing.assert_close(folded, not_folded, atol=1e-5, rtol=1e-4)
