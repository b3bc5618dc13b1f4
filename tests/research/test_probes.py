"""The probes on networks whose answers are known: one that knows nothing, and one that looks its
answers up."""

import math

import numpy as np
import pytest
import torch
from helpers import tiny

from common.command import InputError
from config import save_config
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


def test_recall_asks_each_key_once_and_its_value_answers():
    ids, answers = probes.recall_batch(5, seed=3)
    for line, wanted in zip(ids.tolist(), answers.tolist(), strict=True):
        pairs = dict(zip(line[0:16:2], line[1:16:2], strict=True))
        asked = [(line[t], wanted[t]) for t in range(128) if wanted[t] >= 0]
        assert len(pairs) == len(asked) == 8
        assert dict(asked) == pairs
    assert not torch.equal(ids, probes.recall_batch(5, seed=4)[0])
    assert torch.equal(ids, probes.recall_batch(5, seed=3)[0])


def test_a_recall_config_takes_a_rate_and_a_seed(tmp_path):
    file = tmp_path / "some.json"
    file.write_text('{"lr": 0.01, "min_lr": 0.002, "seed": 5, "dropout_mlp": 0.3}')
    config = probes.recall_config(file)
    assert (config.lr, config.min_lr, config.seed, config.dropout_mlp, config.block_size) == (
        0.01,
        0.002,
        5,
        0.0,
        128,
    )
    config = probes.recall_config(file, lr=0.001, seed=6)
    assert (config.lr, config.min_lr, config.seed) == (0.001, pytest.approx(0.0002), 6)


def test_training_on_recall_repeats_itself():
    config = tiny(block_size=128, seed=7)
    one, two = (
        probes.train_recall(config, 2, batch=4, rows=16, say=lambda line: None) for _ in range(2)
    )
    assert one["mqar_accuracy"] == two["mqar_accuracy"]
    assert 0 <= one["mqar_accuracy"] < 0.2


def test_too_short_a_text_is_a_clear_error():
    with pytest.raises(InputError, match="needs 32"):
        probes.loss_by_position(Ignorant(), np.zeros(10, np.int64), 32, 4)


def test_a_network_with_token_features_has_no_recall_task(tmp_path):
    save_config(tiny(token_features=True), tmp_path / "config.json")
    with pytest.raises(InputError, match="token_features"):
        probes.recall_config(tmp_path / "config.json")
