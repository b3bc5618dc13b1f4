"""Ways by measurement: the fastest is taken, once for a key, kept for the next process, and no
result depends on it but for rounding."""

import itertools
import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import random_ids, random_model, tiny

from inference import packed, routes
from inference.decode import Decoder
from inference.sampling import Settings, generate


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Has ways measured, from an empty cache on."""
    monkeypatch.delenv(routes.SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    routes.choices.cache_clear()
    yield tmp_path
    routes.choices.cache_clear()


def waiting(calls: list[str], name: str, seconds: float):
    def call() -> None:
        calls.append(name)
        time.sleep(seconds)

    return call


@pytest.mark.parametrize("cold", [True, False])
def test_the_fastest_is_taken_and_measured_once(measured, cold):
    calls: list[str] = []
    ways = {"slow": waiting(calls, "slow", 0.01), "fast": waiting(calls, "fast", 0.001)}
    assert routes.fastest("a key", ways, cold) == "fast"
    made = len(calls)
    assert routes.fastest("a key", ways) == "fast"
    assert len(calls) == made


def test_the_next_process_takes_what_this_one_chose(measured):
    calls: list[str] = []
    ways = {"slow": waiting(calls, "slow", 0.01), "fast": waiting(calls, "fast", 0.001)}
    routes.fastest("a key", ways)
    routes.choices(torch.get_num_threads()).save()
    routes.choices.cache_clear()  # as in a new process
    calls.clear()
    assert routes.fastest("a key", ways) == "fast"
    assert not calls
    # another number of threads has choices of its own
    assert routes.choices(torch.get_num_threads() + 1).ways == {}


def test_where_a_way_is_missing_another_is_chosen_and_neither_replaces_the_other(measured):
    ways = {"slow": waiting([], "slow", 0.01), "fast": waiting([], "fast", 0.001)}
    more = ways | {"faster": waiting([], "faster", 0)}
    assert routes.fastest("a key", more) == "faster"
    assert routes.fastest("a key", ways) == "fast"
    assert routes.fastest("a key", more) == "faster"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a key, of only other": 3}'])
def test_a_file_that_is_no_list_of_choices_is_made_anew(measured, text):
    chosen = routes.choices(torch.get_num_threads())
    chosen.path.parent.mkdir(parents=True, exist_ok=True)
    chosen.path.write_text(text, encoding="utf-8")
    routes.choices.cache_clear()
    assert routes.fastest("a key", {"only": lambda: None, "other": lambda: None})
    routes.choices(torch.get_num_threads()).save()
    assert json.loads(chosen.path.read_text(encoding="utf-8"))["a key, of only other"]


def test_a_cache_that_cannot_be_written_is_no_error(measured):
    (measured / "waveletlm").write_text("a file where the folder would be", encoding="utf-8")
    assert routes.fastest("a key", {"only": lambda: None, "other": lambda: None})
    routes.choices(torch.get_num_threads()).save()


def test_a_user_without_a_home_keeps_nothing(measured, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert routes.fastest("a key", {"only": lambda: None, "other": lambda: None})
    routes.choices(torch.get_num_threads()).save()


def test_two_processes_keep_what_both_found(measured):
    path = measured / "waveletlm" / "routes.json"
    one, other = routes.Choices(path), routes.Choices(path)
    one.add("this", "a")
    other.add("that", "b")
    one.save()
    other.save()
    assert routes.Choices(path).ways == {"this": "a", "that": "b"}


# widths: of which the widest is not the last scale's, so that a product is given wider rows
@pytest.mark.parametrize("keys", [{}, {"per_scale_mixer_widths": [1.0, 0.5, 0.5, 0.5]}])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_decoder_whose_ways_are_measured_gives_the_models_logits(measured, keys, bits):
    model = random_model(tiny(**keys))
    decoder = Decoder(model, bits)
    for rows in (1, 3, 9):
        ids = random_ids(rows, 6)
        with torch.no_grad():
            expected, _ = model(ids)
        state = decoder.start(rows)
        parts = []
        for piece in ids.split([4, 1, 1], dim=1):
            logits, state = decoder(piece, state, last_only=False)
            parts.append(logits)
        most = 1e-5 if bits is None else 0.2  # what 4 bits are off in so small a network
        assert (torch.cat(parts, dim=1) - expected).norm() < most * expected.norm()


def test_nothing_is_measured_where_ways_are_fixed():
    calls: list[str] = []
    ways = {"first": waiting(calls, "first", 0), "second": waiting(calls, "second", 0)}
    assert routes.fastest("a key", ways) == "first"
    assert not calls


def take_in_turn(monkeypatch, start: int) -> None:
    """Has every product take another of its ways than the one before it."""
    turn = itertools.count(start)
    monkeypatch.setattr(
        packed, "fastest", lambda key, calls, cold: list(calls)[next(turn) % len(calls)]
    )


@pytest.mark.parametrize("bits", [None, 16, 8, 4])
def test_no_way_changes_more_than_rounding(monkeypatch, bits):
    model = random_model(tiny())
    ids = random_ids(3, 9)
    reads = []
    for start in range(4):
        take_in_turn(monkeypatch, start)
        decoder = Decoder(model, bits)
        state = decoder.start(3)
        parts = []
        for piece in ids.split([6, 1, 1, 1], dim=1):
            logits, state = decoder(piece, state, last_only=False)
            parts.append(logits)
        reads.append(torch.cat(parts, dim=1))
    # x is rounded to bf16's 8 bits in some ways of quantised weights, to 16 or not at all in others
    most = 1e-5 if bits is None else 0.02
    for other in reads[1:]:
        assert (other - reads[0]).norm() < most * reads[0].norm()


@pytest.mark.parametrize("start", range(3))
def test_a_rows_text_stays_its_own_whatever_ways_other_numbers_of_rows_take(monkeypatch, start):
    take_in_turn(monkeypatch, start)
    model = random_model(tiny())
    settings = Settings(seed=5, top_k=4)
    ids = random_ids(1, 9)
    alone = generate(model, ids, 25, settings).ids
    several = generate(model, ids, 25, Settings(**{**vars(settings), "n": 3})).ids
    assert torch.equal(several[:1], alone)


@pytest.mark.parametrize("first", ["by_kernel", "by_columns", "by_rows"])
@pytest.mark.parametrize("gate", ["by_kernel", "by_columns", "by_rows"])
def test_a_gate_multiplies_what_any_way_gave(first, gate):
    x = torch.randn(3, 3, 64)
    mixer, gates = ([torch.randn(n, 64) for _ in range(3)] for n in (48, 48))
    one, two = packed.FloatStack(mixer), packed.FloatStack(gates)
    if one.kernel is None and "by_kernel" in (first, gate):
        pytest.skip("no kernels of our own")
    one.chosen[3] = first
    two.chosen[3] = gate
    y = one(x)
    expected = torch.bmm(x, torch.stack(mixer).mT) * F.silu(torch.bmm(x, torch.stack(gates).mT))
    two.gate(x, y, F.silu)
    torch.testing.assert_close(y, expected, atol=1e-3, rtol=1e-4)


def test_a_compiled_step_is_given_the_ways_that_were_chosen(monkeypatch):
    take_in_turn(monkeypatch, 0)
    decoder = Decoder(random_model(tiny(layers=1, levels=2)), 8)
    decoder(random_ids(1, 1), decoder.start(1))
    matrix = decoder.head
    chosen = matrix.chosen[1]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert matrix.way(1) == chosen
    assert matrix.way(2) in matrix.ways(2)  # never measured: still a way
