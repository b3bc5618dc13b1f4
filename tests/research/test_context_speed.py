"""Decoding beside Llama and Mamba-2: what is compared is comparable, and all of it is in the
table."""

import json
import sys

import pytest
import torch
from helpers import ROOT

from common.command import InputError
from config import load_config
from research import context_speed
from research.context_speed import body_parameters, empty_cache, filled_cache, read

pytest.importorskip(
    "transformers", minversion=context_speed.CACHES_SINCE, reason="its caches are other ones"
)
VOCAB = 100
CONTEXTS = [8, 40]


@pytest.fixture(scope="module")
def contenders():
    config = load_config(ROOT / "config.json", C=64, pkm_enabled=False, fwpkm_enabled=False)
    return context_speed.networks(config, VOCAB, CONTEXTS, text=40)


def test_all_have_the_parameters_of_ours_besides_embedding_and_head(contenders):
    ours = contenders["WaveletLM"].parameters
    assert len(contenders) == 5
    for network in contenders.values():
        assert abs(network.parameters / ours - 1) <= 0.03


def test_embedding_and_head_do_not_count():
    config = load_config(ROOT / "config.json", C=64, pkm_enabled=False, fwpkm_enabled=False)
    with torch.device("meta"):
        small, large = (context_speed.build_model(config, vocab) for vocab in (VOCAB, 3 * VOCAB))
    assert body_parameters(small) == body_parameters(large)
    assert body_parameters(small) + 2 * 64 * VOCAB == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_step_of_a_cached_llama_gives_the_logits_of_the_whole_text(contenders, kind):
    (network,) = {n.network for name, n in contenders.items() if name == "Llama, 2 layers"}
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = empty_cache(network.config, kind, 16)
    read(network, ids[:, :-2], cache)
    read(network, ids[:, -2:-1], cache)
    step = read(network, ids[:, -1:], cache)
    with torch.no_grad():
        whole = network(ids, use_cache=False).logits[:, -1]
    assert torch.allclose(step, whole, atol=1e-5)


def test_a_step_of_mamba_2_gives_the_logits_of_the_whole_text(contenders):
    (network,) = {n.network for name, n in contenders.items() if name.startswith("Mamba-2")}
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = empty_cache(network.config, "dynamic", 16)
    read(network, ids[:, :-1], cache)
    step = read(network, ids[:, -1:], cache)
    with torch.no_grad():
        whole = network(ids, use_cache=False).logits[:, -1]
    assert torch.allclose(step, whole, atol=1e-4)


@pytest.mark.parametrize("context", [8, 700])  # shorter and longer than the repeated pattern
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_filled_cache_has_the_size_that_is_told_and_is_gone_on_from(contenders, kind, context):
    llama = contenders["Llama, 2 layers"]
    cache = filled_cache(llama.network.config, kind, context, 2, 0)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert sum(tensor.nbytes for tensor in tensors) == llama.nbytes(context, 2)
    assert cache.get_seq_length() == context
    # keys and values are no views of one tensor: they would lie in the caches once
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    room = filled_cache(llama.network.config, kind, context, 2, 3)
    for _ in range(3):
        assert read(llama.network, torch.zeros(2, 1, dtype=torch.int64), room).isfinite().all()
    assert room.get_seq_length() == context + 3


def run(monkeypatch, out, batches, *more: str) -> dict:
    sizes = ["--C", "64", "--vocab_size", str(VOCAB), "--contexts", *map(str, CONTEXTS)]
    how = ["--batches", *batches, "--rounds", "2", "--threads", "1", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", ["context_speed.py", *sizes, *how])
    context_speed.main()
    return json.loads((out / "figures.json").read_text(encoding="utf-8"))


def test_the_table_has_every_network_batch_and_context(monkeypatch, tmp_path, capsys):
    gib = 100 * 2**10 / 2**30  # a cache of 100 KiB: enough for the shorter text alone
    rows = run(monkeypatch, tmp_path, ["1", "3"], "--memory", str(gib))["rows"]
    assert len(rows) == 5 * len(CONTEXTS) * 2
    assert len({(row["network"], row["context"], row["batch"]) for row in rows}) == len(rows)
    for row in rows:
        assert (row["tokens_per_s"] is None) == (row["bytes"] > 100 * 2**10)
    assert {row["tokens_per_s"] is None for row in rows} == {True, False}
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text(encoding="utf-8")
    assert printed.count("\n| ") == 2 + 5 * 2
    assert printed.count("does not fit in") == sum(row["tokens_per_s"] is None for row in rows)
    assert (tmp_path / "context.png").stat().st_size > 1000


def test_a_folder_keeps_the_figures_of_other_batches_and_takes_none_made_otherwise(
    monkeypatch, tmp_path, contenders
):
    monkeypatch.setattr(context_speed, "networks", lambda *_: contenders)
    first = run(monkeypatch, tmp_path, ["3"])["rows"]
    both = run(monkeypatch, tmp_path, ["1"])["rows"]
    assert [row["batch"] for row in both] == [1] * len(first) + [3] * len(first)
    assert both[len(first) :] == first
    with pytest.raises(InputError, match="memory_gib: .* has figures of memory_gib 8"):
        run(monkeypatch, tmp_path, ["1"], "--memory", "1")


def test_our_state_does_not_grow_and_llamas_cache_does(contenders):
    for name, network in contenders.items():
        short, long = (network.nbytes(context, 1) for context in CONTEXTS)
        assert long == short * (5 if name.startswith("Llama") else 1)


def test_a_width_at_which_parameters_cannot_be_equal_is_refused(monkeypatch):
    monkeypatch.setattr(context_speed, "TOLERANCE", 0.0)
    config = load_config(ROOT / "config.json", C=64, pkm_enabled=False, fwpkm_enabled=False)
    with pytest.raises(InputError, match="C: Llama, .* take another C"):
        context_speed.networks(config, VOCAB, CONTEXTS, text=8)
