"""Which tokens may be drawn, by top_k and min_p; and where a text ends."""

import copy

import pytest
import torch
from helpers import random_ids, random_model, tiny

from data.tokenizer import ByteTokenizer
from inference.decode import Decoder
from inference.endings import Ending, Endings, ended_text
from inference.sampling import (
    Sample,
    Settings,
    best_of,
    draw,
    generate,
    highest,
    measure,
)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return random_model(tiny(fwpkm_enabled=False))


def drawn(probs: torch.Tensor, **rules) -> set[int]:
    """The tokens that 2,000 numbers from 0 to 1 draw from probs (V,)."""
    numbers = torch.linspace(0, 1 - 1e-9, 2000, dtype=torch.float64)[:, None]
    top_p = torch.full((2000, 1), rules.pop("top_p", 1.0))
    return set(draw(probs.expand(2000, -1), top_p, numbers, **rules).tolist())


PROBS = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.1, 0.1])

# ===== What may be drawn


@pytest.mark.parametrize(
    ("rules", "tokens"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 2, 3}),  # of three equals the first by id
        ({"top_k": 4}, {1, 2, 3, 4}),
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 99}, {0, 1, 2, 3, 4, 5}),
        ({"min_p": 0.5}, {1, 3}),
        ({"min_p": 0.2}, {1, 2, 3, 4, 5}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.6}, {1, 3}),
        ({"top_k": 3, "top_p": 0.5}, {1}),  # 0.375 of the whole, where 0.5 would need two
        ({"top_p": 0.5}, {1, 3}),
        ({"top_p": 0.9, "min_p": 0.5}, {1, 3}),
    ],
)
def test_tokens_are_drawn_from_those_that_the_rules_leave(rules, tokens):
    assert drawn(PROBS, **rules) == tokens


@pytest.mark.parametrize("top_k", [1, 2, 7, 40])
def test_the_highest_are_the_first_of_a_stable_sort(top_k):
    probs = (torch.rand(5, 50) * 8).round().add(1)  # many equals
    probs = probs / probs.sum(1, keepdim=True)
    kept, share = highest(probs, top_k, torch.ones(5, 1))
    order = probs.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    expected = torch.zeros_like(probs).scatter(1, order, probs.gather(1, order))
    assert torch.equal(kept, expected)
    torch.testing.assert_close(share, expected.sum(1, keepdim=True).double())


@pytest.mark.parametrize("lookahead", [1, 3])
@pytest.mark.parametrize("rules", [{"top_k": 4}, {"min_p": 0.3}, {"top_k": 6, "min_p": 0.1}])
def test_a_rows_text_does_not_depend_on_the_rows_beside_it(model, rules, lookahead):
    settings = Settings(seed=5, top_p=1.0, lookahead_k=lookahead, **rules)
    ids = random_ids(1, 9)
    alone = generate(model, ids, 25, settings).ids
    several = generate(model, ids, 25, Settings(**{**vars(settings), "n": 3})).ids
    assert torch.equal(several[:1], alone)


on_each_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",  # where the rules are a part of the step's CUDA graph
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
            ],
        ),
    ],
)


@on_each_device
@pytest.mark.parametrize("rules", [{"top_k": 3}, {"min_p": 0.4}])
def test_every_token_of_a_text_is_among_those_that_are_left(model, rules, device):
    settings = Settings(repetition_penalty=1, top_p=1.0, **rules)
    decoder = Decoder(copy.deepcopy(model).to(device))
    text = generate(decoder, random_ids(1, 9).to(device), 20, settings).ids.cpu()
    with torch.no_grad():
        probs = model(text[:, :-1])[0][0, 8:].softmax(-1)
    own = probs.gather(1, text[0, 9:, None])
    if "top_k" in rules:
        # another order of summation may swap two that are as good as equal
        assert ((probs > own * 1.001).sum(1) < 3).all()
    else:
        assert (own >= 0.399 * probs.amax(1, keepdim=True)).all()


def test_lookahead_takes_no_candidate_that_could_not_be_drawn(model):
    ids = random_ids(1, 9)
    greedy = generate(model, ids, 20, Settings(temperature=0)).ids
    for rules in ({"top_k": 1}, {"min_p": 1.0}):
        settings = Settings(lookahead_k=4, top_p=1.0, **rules)
        assert torch.equal(generate(model, ids, 20, settings).ids, greedy)


# ===== Where a text ends


class WithEnd(ByteTokenizer):
    end_of_text = 0


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("plain", [], "plain"),
        ("one. two. three", [". "], "one"),
        ("a\n\nb", ["\n\n"], "a"),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("abcabd", ["abd", "cab"], "ab"),
        ("x abc", ["bc", "ab"], "x "),
        ("ends with a begun sto", ["stop"], "ends with a begun sto"),
        ("naïve 中文", ["文"], "naïve 中"),
        ("before\0after", [], "before"),
        ("before st\0op", ["stop"], "before st"),
    ],
)
def test_a_text_ends_at_the_first_stop_or_end_of_text(text, stops, left):
    ids = list(text.encode())
    assert ended_text(ids, WithEnd(), stops) == left
    ending = Ending(WithEnd(), stops)
    pieces = [ending.push(token) for token in ids]
    assert "".join(pieces) + ending.flush() == left
    assert ending.ended == (left != text) and (ending.count == len(ids) or ending.ended)


def test_what_is_certain_is_not_held_back():
    ending = Ending(ByteTokenizer(), ["stop"])
    assert [ending.push(token) for token in b"a stx"] == ["a", " ", "", "", "stx"]


class Scripted:
    """A decoder whose row r says the r-th of `texts`, by its most probable tokens."""

    class config:
        block_size = 10**6
        levels = 2

    def __init__(self, texts: list[bytes]):
        self.texts = texts
        self.calls = 0

    def start(self, rows, stream=False):
        return Place(0)

    def __call__(self, ids, state):
        self.calls += 1
        place = state.place if isinstance(state, Place) else 0
        logits = torch.zeros(len(ids), 1, 256)
        for row in range(len(ids)):
            text = self.texts[row % len(self.texts)]
            logits[row, 0, text[min(place, len(text) - 1)]] = 50.0
        return logits, Place(place + 1)


class Place:
    def __init__(self, place):
        self.place = place

    def select(self, rows):
        return self


GREEDY = {"temperature": 0, "repetition_penalty": 1}


def test_generation_goes_on_until_the_last_text_has_ended():
    decoder = Scripted([b"hello\0more", b"hi. and more"])
    endings = Endings(WithEnd(), 2, ["."])
    ids = torch.tensor([[1], [2]])
    sample = generate(decoder, ids, 50, Settings(**GREEDY), endings=endings)
    assert sample.lengths.tolist() == [6, 3]
    assert sample.ids.shape == (2, 1 + 6) and decoder.calls == 6


def test_a_text_without_an_end_has_all_its_tokens():
    sample = generate(
        Scripted([b"hello"]),
        torch.tensor([[1]]),
        9,
        Settings(**GREEDY),
        endings=Endings(WithEnd(), 1, ["none"]),
    )
    assert sample.lengths.tolist() == [9] and sample.ids.shape == (1, 10)


def test_figures_are_of_the_tokens_before_the_end():
    ids = torch.tensor([[9, 1, 2, 3, 3, 3], [9, 4, 4, 4, 4, 5]])
    log_probs = torch.tensor([[-1.0, -2, -3, -9, -9], [-1, -1, -1, -1, -1]])
    sample = Sample(ids, log_probs, -log_probs, torch.tensor([3, 5]))
    values = measure(sample, 1)
    assert values["mean_log_probability"] == pytest.approx(-11 / 8)
    assert values["entropy"] == pytest.approx(11 / 8)
    assert values["distinct_1"] == pytest.approx((1 + 2 / 5) / 2)
    # -2 a token against -1: the second, whose sum is lower than that of what the first had made
    best = best_of(sample, 2)
    assert torch.equal(best.ids, ids[1:]) and best.lengths.tolist() == [5]
    all_counted = sample._replace(log_probs=torch.tensor([[-1.0, -1, -1, -9, -9], [-2] * 5]))
    assert torch.equal(best_of(all_counted, 2).ids, ids[:1])
