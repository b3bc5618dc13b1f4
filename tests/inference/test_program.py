"""A block's step as one call: what its parts give, for every option that it takes; others go part
by part."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import random_ids, random_model, tiny

from common.command import InputError
from inference import cpu_kernels, packed
from inference.decode import Decoder
from inference.program import BlockProgram

pytestmark = pytest.mark.skipif(
    not cpu_kernels.usable(torch.device("cpu")), reason=f"no kernels: {cpu_kernels.missing()}"
)

TAKEN = {
    "released": {},
    "one level": {"levels": 1},
    "one lag": {"wavelet_crawl": False},
    "linear lifting": {"lifting_linear_only": True},
    "wide lifting": {"lifting_hidden_mult": 2, "shared_lifting_weights": False},
    "channels filled up": {"C": 12},
    "no bypass": {"decompose_bypass": False},
    "no gate": {"use_mixer_gate": False},
    "gates of their own scale": {"cross_scale_gating": False, "low_rank": 0},
    "gates that read the stream": {"cross_scale_gating": False, "mixer_gate_input": "stream"},
    "no embedding in blocks": {"per_layer_embedding": False},
    "fixed wavelet": {"wavelet_mode": "haar", "mlp_activation": "relu2", "recall_heads": 2},
    "linear MLP": {"mlp_layers": 1},
    "a filter before the MLP": {"mlp_taps": 3, "recall_heads": 1},
    "a filter of its own position": {"mlp_taps": 1},
    "blocks that are shared": {"looped_blocks": True, "looped_blocks_count": 3},
    "cells": {"multinodal_enabled": True},
}
# Their parts are not among a program's.
REFUSED = {
    "gates by another function": {"mixer_gate_activation": "gelu"},
    "no MLP": {"mlp_expansion": 0},
    "a moving average": {"decompose_bypass_ema": True},
    "a gated wavelet": {"lifting_gate": True},
}


def steps(decoder: Decoder, ids: torch.Tensor, stream: bool, way: str = "") -> torch.Tensor:
    """The logits of ids (B, T), token by token, by a way of the blocks' or as they choose."""
    for block in decoder.blocks if way else []:
        block.program.chosen[ids.size(0)] = way
    state = decoder.start(ids.size(0), stream)
    logits = []
    for token in ids.split(1, dim=1):
        each, state = decoder(token, state)
        logits.append(each)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("bits", [None, 16, 8, 4])
@pytest.mark.parametrize("keys", TAKEN.values(), ids=TAKEN)
def test_a_program_gives_what_the_parts_give(keys, bits):
    exact = bits in (None, 16)
    # Quantised products round x, which a difference in the last digit may change; and then a memory
    # may read another slot.
    memories = {} if exact else {"pkm_enabled": False, "fwpkm_enabled": False}
    decoder = Decoder(random_model(tiny(**keys | memories)), bits)
    # 36 tokens are more than a training window, so that a stream's mean forgets some
    for rows, length, stream in ((1, 36, True), (3, 5, False)):
        ids = random_ids(rows, length)
        together = steps(decoder, ids, stream, "by_program")
        parts = steps(decoder, ids, stream, "by_parts")
        most = 1e-5 if exact else 2e-3
        torch.testing.assert_close(together, parts, atol=most, rtol=most)


@pytest.mark.parametrize("keys", REFUSED.values(), ids=REFUSED)
def test_a_block_with_other_parts_has_no_program(keys):
    decoder = Decoder(random_model(tiny(**keys)))
    assert all(block.program is None for block in decoder.blocks)
    assert steps(decoder, random_ids(1, 3), True).isfinite().all()


def test_many_texts_go_part_by_part(monkeypatch):
    decoder = Decoder(random_model(tiny()))
    rows = packed.MOST_ROWS
    taken = []
    monkeypatch.setattr(BlockProgram, "by_program", lambda self, x, *others: taken.append(x))
    steps(decoder, random_ids(rows + 1, 2), False)
    assert not taken


@pytest.mark.parametrize("bits", [None, 16, 8, 4])
def test_a_text_is_the_same_whatever_texts_and_threads_there_are(bits):
    # large enough for several threads
    decoder = Decoder(random_model(tiny(C=64, mlp_expansion=20, pkm_enabled=False)), bits)
    ids = random_ids(3, 3)
    together = steps(decoder, ids, True, "by_program")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(steps(decoder, ids, True), together)
            assert torch.equal(steps(decoder, ids[1:2], True, "by_program"), together[1:2])
    finally:
        torch.set_num_threads(threads)


def test_forks_other_orders_and_chunks_between_steps_change_nothing():
    decoder = Decoder(random_model(tiny(mlp_taps=3, recall_heads=1)))

    def walk(way: str) -> torch.Tensor:
        for block in decoder.blocks:
            block.program.chosen = dict.fromkeys((1, 2, 3), way)
        ids = random_ids(3, 12)
        _, state = decoder(ids[:2, :5], decoder.start(2, True))
        logits, state = decoder(ids[:2, 5:6], state)
        fork, _ = decoder(ids[:2, 6:7], state)  # the same state is gone on from twice
        other, state = decoder(ids[:2, 7:8], state)
        more, state = decoder(ids[:, 8:9], state.select([1, 0, 1]))
        _, state = decoder(ids[:, 9:11], state)
        last, _ = decoder(ids[:, 11:], state)
        return torch.cat([logits, fork, other, more, last])

    torch.testing.assert_close(walk("by_program"), walk("by_parts"), atol=1e-5, rtol=1e-5)


def test_a_state_that_is_not_this_network_s_is_refused():
    decoder = Decoder(random_model(tiny()))
    ids = random_ids(2, 1)
    _, state = decoder(ids, decoder.start(2, True))
    wrong = [
        (state.select([0]), "1 texts, and there are 2"),
        (Decoder(random_model(tiny(C=8))).start(2, True), "another network"),
        (Decoder(random_model(tiny(levels=2))).start(2, True), "another network"),
        (state.map(lambda t: t.bfloat16() if t.is_floating_point() else t), "another type"),
    ]
    for other, message in wrong:
        with pytest.raises(InputError, match=message):
            decoder(ids, other)


def test_the_type_that_a_program_made_its_default_changes_nothing():
    decoder = Decoder(random_model(tiny()))
    ids = random_ids(1, 3)
    expected = steps(decoder, ids, True, "by_program")
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(steps(decoder, ids, True, "by_program"), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_decoder_is_freed_as_soon_as_nobody_has_it():
    decoder = Decoder(random_model(tiny()))
    steps(decoder, random_ids(1, 3), True)
    weight = weakref.ref(decoder.blocks[0].branch)
    gc.disable()  # which would find it later, if it were in a circle
    try:
        del decoder
        assert weight() is None
    finally:
        gc.enable()


def test_a_model_that_gets_another_type_leaves_its_decoder_as_it_was():
    model = random_model(tiny(mlp_taps=3))
    decoder = Decoder(model)
    ids = random_ids(1, 3)
    expected = steps(decoder, ids, True, "by_program")
    model.bfloat16()
    assert torch.equal(steps(decoder, ids, True, "by_program"), expected)


def test_a_copy_has_a_program_of_its_own():
    decoder = Decoder(random_model(tiny()), 8)
    ids = random_ids(1, 4)
    expected = steps(decoder, ids, True)
    other = copy.deepcopy(decoder)
    for stack in (block.branch.mixers.first for block in decoder.blocks):
        for matrix in stack.matrices:
            matrix.weight.zero_()
    assert torch.equal(steps(other, ids, True), expected)
