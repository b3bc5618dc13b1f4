"""The probes on networks whose answers are known: one that knows nothing, and one that looks its
answers up."""

import math

import numpy as np
import pytest
import torch

from common.command import InputError
from research import probes


class Known(torch.nn.Module):
    """Predicts the token that last followed the present one; where there is none, every token
    alike."""

    vocab_size = 40

    def forward(self, ids, state=None):
        logits = torch.zeros(*ids.shape, self.vocab_size)
        for row, line in enumerate(ids.tolist()):
            followers = {}
            for t, token in enumerate(line):
                if t:
                    followers[line[t - 1]] = token
                if token in followers:
                    logits[row, t, followers[token]] = 20.0
        return logits, None


class Ignorant(torch.nn.Module):
    vocab_size = 40

    def forward(self, ids, state=None):
        return torch.zeros(*ids.shape, self.vocab_size), None


@pytest.fixture
def tokens():
    # none twice in a window
    return np.concatenate([np.random.default_rng(i).permutation(40)[:32] for i in range(40)])


def test_a_network_without_memory_has_no_lift(tokens):
    model = Ignorant()
    assert list(probes.loss_by_position(model, tokens, 32, 64).values()) == pytest.approx(
        [math.log(40)] * 5
    )
    assert list(probes.repetition_lift(model, tokens, 32, 64).values()) == pytest.approx([0.0] * 3)
    assert all(
        found["lift"] == pytest.approx(0)
        for found in probes.needle_by_distance(model, tokens, 32, 64).values()
    )


def test_a_network_that_looks_up_lifts_what_is_repeated(tokens):
    lifts = probes.repetition_lift(Known(), tokens, 32, 64)
    assert list(lifts) == ["4", "8", "16"]
    assert min(lifts.values()) > 3
    found = probes.needle_by_distance(Known(), tokens, 32, 64)
    assert list(found) == ["4", "8", "16"]
    assert all(values["lift"] > 5 and values["first"] > 0.6 for values in found.values())


def test_too_short_a_text_is_a_clear_error():
    with pytest.raises(InputError, match="needs 32"):
        probes.loss_by_position(Ignorant(), np.zeros(10, np.int64), 32, 4)
