"""The table of hashed n-grams: what a slot depends on, how even the hash is, and what lies before a
text."""

import pytest
import torch
from helpers import random_ids, random_model, tiny

from inference.decode import Decoder
from inference.weights import Bits, PackedWeights
from layers.memory import hashed, read_slots
from layers.state import State

MANY = 2**30  # so many slots that two n-grams do not share one by chance


@pytest.mark.parametrize("n", [2, 3])
def test_a_slot_depends_on_each_of_the_last_n_tokens_and_their_order_and_on_nothing_else(n):
    ids = random_ids(1, 20)
    slots = hashed(ids, n, MANY)
    assert slots.shape == (1, 20 - n + 1)
    for place in range(20):
        changed = ids.clone()
        changed[0, place] += 1
        differs = (hashed(changed, n, MANY) != slots)[0]  # slot i is of the places i to i + n − 1
        assert differs.nonzero().flatten().tolist() == [
            i for i in range(20 - n + 1) if i <= place < i + n
        ]
    assert hashed(torch.tensor([[3, 5]]), 2, MANY) != hashed(torch.tensor([[5, 3]]), 2, MANY)


def test_slots_are_used_evenly():
    # ids as large as GPT-2's too
    pairs = torch.cartesian_prod(torch.arange(50_000, 50_300), torch.arange(300))
    used = torch.bincount(hashed(pairs, 2, 10_007).flatten(), minlength=10_007).double()
    # counts of a hash at random have the variance of a Poisson distribution, which is their mean
    assert used.var() < 1.25 * used.mean()


def test_what_is_before_a_text_is_no_token():
    start, ids = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[7]])
    first, _ = read_slots(ids, start, 2, MANY)
    for token in range(256):
        _, past = read_slots(torch.tensor([[token]]), start, 2, MANY)
        assert read_slots(ids, past, 2, MANY)[0] != first


def test_the_state_is_the_last_ids_alone():
    model = random_model(tiny(ngram_slots=11, ngram_n=4))
    with torch.no_grad():
        _, state = model(ids := random_ids(2, 9))
    assert not any("ids" in block for block in state.blocks)
    assert torch.equal(state.embedding["ids"], ids[:, -3:] + 1)


@pytest.mark.parametrize("cells", [False, True])
def test_a_saved_state_that_has_the_ids_with_its_blocks_is_read_as_one_that_has_them_apart(cells):
    model = random_model(tiny(ngram_slots=11, multinodal_enabled=cells))
    with torch.no_grad():
        _, state = model(random_ids(2, 9))
    within = [dict(block) for block in state.blocks]
    each = len(within) // len(state.embedding)
    for cell, ids in enumerate(state.embedding.values()):
        within[cell * each]["ids"] = ids
    for parts in (within, state.saved()):
        found = State.of_saved(parts)
        assert found.embedding.keys() == state.embedding.keys()
        assert [block.keys() for block in found.blocks] == [b.keys() for b in state.blocks]
        for name, ids in state.embedding.items():
            assert torch.equal(found.embedding[name], ids)


@pytest.mark.parametrize(("bits", "bytes_each"), [(8, 34), (4, 20)])
def test_a_narrow_table_is_not_filled_up_when_quantised(bits, bytes_each):
    weights = PackedWeights(Bits.of(bits), saving=True)
    Decoder(random_model(tiny(ngram_slots=1000, ngram_width=32)), weights=weights)
    assert (
        sum(t.nbytes for name, t in weights.saved.items() if name.startswith("ngrams.values/"))
        == 1000 * bytes_each
    )
