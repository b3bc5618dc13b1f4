"""The synthetic tasks: what is asked has one right answer, and figures are those of networks that
are known to give it or not."""

import json
import math
import sys
from functools import partial

import pytest
import torch
from helpers import tiny

from common.command import InputError
from config import save_config
from model import build_model
from research import tasks
from research.contestants import Contestant
from research.tasks import HELD_OUT, NONE, People


class Answering(torch.nn.Module):
    """Gives the answers of `batches`, sure of each, where it reads their rows; a network of 1,000
    numbers."""

    def __init__(self, vocabulary: int, batches, sure: float = 1e4):
        super().__init__()
        self.numbers = torch.nn.Parameter(torch.zeros(1000))
        self.vocabulary = vocabulary
        self.sure = sure
        self.answers = {
            tuple(row): answer
            for ids, answers in batches
            for row, answer in zip(ids.tolist(), answers, strict=True)
        }

    def forward(self, ids, state=None):
        wanted = torch.stack([self.answers[tuple(row)] for row in ids.tolist()])
        logits = torch.nn.functional.one_hot(wanted.clamp(min=0), self.vocabulary).float()
        return self.sure * logits, None


@pytest.mark.parametrize("name", ["recall", "hops", "facts"])
def test_a_batch_is_its_numbers_and_stays_within_the_vocabulary(name):
    task = tasks.task_of(name, people=50)
    ids, answers = task.make(5, 3)
    again = task.make(5, 3)
    assert ids.shape == answers.shape == (5, task.length)
    assert torch.equal(ids, again[0])
    assert torch.equal(answers, again[1])
    assert not torch.equal(ids, task.make(5, 4)[0])
    assert 0 <= ids.min() <= ids.max() < task.vocabulary
    asked = answers != NONE
    assert asked.any(1).all()
    assert 0 <= answers[asked].min() <= answers[asked].max() < task.vocabulary


def test_recall_asks_each_key_once_and_its_value_answers():
    ids, answers = tasks.recall_batch(5, 3)
    for line, wanted in zip(ids.tolist(), answers.tolist(), strict=True):
        pairs = dict(zip(line[0:16:2], line[1:16:2], strict=True))
        asked = [(line[t], wanted[t]) for t in range(128) if wanted[t] != NONE]
        assert len(pairs) == len(asked) == 8
        assert dict(asked) == pairs


def test_hops_go_along_the_arrows_of_one_circle():
    ids, answers = tasks.hops_batch(20, 3)
    hops_seen = set()
    for line, wanted in zip(ids.tolist(), answers.tolist(), strict=True):
        after = dict(zip(line[0:24:2], line[1:24:2], strict=True))
        assert len(after) == 12
        node, circle = line[0], set()
        while node not in circle:
            circle.add(node)
            node = after[node]
        assert len(circle) == 12
        for t in range(24, 72, 3):
            hops, node, answer = line[t] + 1, line[t + 1], line[t + 2]
            hops_seen.add(hops)
            for _ in range(hops):
                node = after[node]
            assert answer == node == wanted[t + 1]
        assert sum(answer != NONE for answer in wanted) == 16
    assert hops_seen == {1, 2, 3, 4}


def test_everybody_is_read_equally_often_and_has_the_same_facts():
    people = People(100)
    told: dict[tuple, list[dict]] = {}
    for number in range(7, 12):  # 5 batches of 4 · 20 people are 4 times everybody
        ids, answers = people.batch(4, number)
        for line, wanted in zip(ids.tolist(), answers.tolist(), strict=True):
            for at in range(0, len(line), 11):
                name = tuple(line[at : at + 3])
                facts = dict(
                    zip(line[at + 3 : at + 11 : 2], line[at + 4 : at + 12 : 2], strict=True)
                )
                assert wanted[at + 3 : at + 11 : 2] == line[at + 4 : at + 12 : 2]
                assert sorted(facts) == [0, 1, 2, 3]
                told.setdefault(name, []).append(facts)
    assert len(told) == 100
    assert {len(facts) for facts in told.values()} <= {3, 4, 5}  # the first and last turn are cut
    assert sum(map(len, told.values())) == 400
    assert all(facts == same[0] for same in told.values() for facts in same)


def test_figures_are_those_of_networks_that_know_all_or_nothing(monkeypatch):
    rows = 64
    recall = tasks.task_of("recall", rows=rows)
    knowing = Answering(recall.vocabulary, [tasks.recall_batch(rows, HELD_OUT)])
    assert recall.measure(knowing) == {"accuracy": 1.0}
    hops = tasks.task_of("hops", rows=rows)
    knowing = Answering(hops.vocabulary, [tasks.hops_batch(rows, HELD_OUT)])
    assert hops.measure(knowing) == {f"accuracy_{k}": 1.0 for k in (1, 2, 3, 4)}
    people = People(50)
    vocabulary = tasks.KINDS + tasks.FACTS + tasks.PARTS
    assert people.known(Silent(vocabulary)) == {"kilobits_known": 0.0, "bits_a_parameter": 0.0}
    told = []
    monkeypatch.setattr(people, "told", partial(remembering, people.told, told))
    people.known(Silent(vocabulary))  # asks what the next call asks again
    known = people.known(Answering(vocabulary, told))
    assert known["kilobits_known"] == pytest.approx(50 * 4 * 7 / 1000)
    assert known["bits_a_parameter"] == pytest.approx(50 * 4 * 7 / 1000)


def remembering(call, kept: list, *given):
    kept.append(call(*given))
    return kept[-1]


class Silent(torch.nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.numbers = torch.nn.Parameter(torch.zeros(10))
        self.vocabulary = vocabulary

    def forward(self, ids, state=None):
        return torch.zeros(*ids.shape, self.vocabulary), None


def test_an_entrant_has_no_dropout_and_takes_a_rate(tmp_path):
    file = tmp_path / "some.json"
    file.write_text('{"lr": 0.01, "min_lr": 0.002, "dropout_mlp": 0.3}')
    config = tasks.entrant_of(f"some={file}", 128).config
    assert (config.lr, config.min_lr, config.dropout_mlp, config.block_size) == (
        0.01, 0.002, 0.0, 128,
    )  # fmt: skip
    config = tasks.entrant_of(f"some={file}", 128, lr=0.001).config
    assert (config.lr, config.min_lr) == (0.001, pytest.approx(0.0002))


def test_training_repeats_itself_and_learns():
    entrant = Contestant("tiny", tiny(block_size=72, lr=0.02, optimizer_eps=1e-8), build_model)
    task = tasks.task_of("hops", rows=16)
    said: list[str] = []
    one, two = (tasks.train(entrant, task, 7, 20, batch=4, say=said.append) for _ in range(2))
    del one["cpu_seconds"], two["cpu_seconds"]
    assert one == two
    first, last = (float(said[i].rpartition(" ")[2]) for i in (0, 9))
    assert last < first < 2 * math.log(task.vocabulary)


def test_the_command_prints_a_table_and_keeps_each_run(tmp_path, monkeypatch, capsys):
    save_config(tiny(token_features=False), tmp_path / "small.json")
    given = ["facts", "--models", f"small={tmp_path / 'small.json'}", "--people", "40"]
    more = ["--steps", "2", "--seeds", "2", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["tasks", *given, *more])
    tasks.main()
    assert "| small | " in capsys.readouterr().out
    runs = json.loads((tmp_path / "found.json").read_text())["runs"]["small"]
    assert len(runs) == 2
    assert set(runs[0]) == {"kilobits_known", "bits_a_parameter", "cpu_seconds"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["facts", "--people", "5"], "people: 5"),
        (["hops", "--steps", "0"], "steps and seeds"),
        (["hops", "--models", "unheard"], "unknown model"),
    ],
)
def test_bad_options_are_one_line(given, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tasks", *given])
    with pytest.raises(InputError, match=message):
        tasks.main()


def test_a_network_with_token_features_has_no_task(tmp_path):
    save_config(tiny(token_features=True), tmp_path / "config.json")
    with pytest.raises(InputError, match="token_features"):
        tasks.entrant_of(f"it={tmp_path / 'config.json'}", 128)
