"""The table of hashed n-grams: what a slot depends on, how even the hash is, and what lies before a text."""

import pytest
import torch
from conftest import random_ids, random_model, tiny

from ngrams import ngram_slots

MANY = 2**30  # so many slots that two n-grams do not share one by chance


@pytest.mark.parametrize("n", [2, 3])
def test_a_slot_depends_on_each_of_the_last_n_tokens_and_their_order_and_on_nothing_else(n):
    ids = random_ids(1, 20)
    slots = ngram_slots(ids, n, MANY)
    assert slots.shape == (1, 20 - n + 1)
    for place in range(20):
        changed = ids.clone()
        changed[0, place] += 1
        differs = (ngram_slots(changed, n, MANY) != slots)[0]  # slot i is of the places i to i + n − 1
        assert differs.nonzero().flatten().tolist() == [i for i in range(20 - n + 1) if i <= place < i + n]
    assert ngram_slots(torch.tensor([[3, 5]]), 2, MANY) != ngram_slots(torch.tensor([[5, 3]]), 2, MANY)


def test_slots_are_used_evenly():
    pairs = torch.cartesian_prod(torch.arange(50_000, 50_300), torch.arange(300))  # ids as large as GPT-2's too
    used = torch.bincount(ngram_slots(pairs, 2, 10_007).flatten(), minlength=10_007).double()
    # counts of a hash at random have the variance of a Poisson distribution, which is their mean
    assert used.var() < 1.25 * used.mean()


def test_what_is_before_a_text_is_no_token():
    model = random_model(tiny(ngram_slots=MANY // 2**12, ngram_width=4))
    ids, start = random_ids(1, 5), model.start(1)
    first, _ = model.ngrams.slots(ids, start.blocks[0])
    assert all(model.ngrams.slots(ids, {"ids": torch.tensor([[token + 1]])})[0][0, 0] != first[0, 0] for token in range(256))


def test_the_state_is_the_last_ids_alone():
    model = random_model(tiny(ngram_slots=11, ngram_n=4))
    with torch.no_grad():
        _, state = model(ids := random_ids(2, 9))
    assert [("ids" in block) for block in state.blocks] == [True] + [False] * (len(state.blocks) - 1)
    assert torch.equal(state.blocks[0]["ids"], ids[:, -3:] + 1)
