"""A plan states what a run then needs."""

import functools

import helpers
import pytest
import torch
from helpers import VOCAB

from common.command import InputError
from common.tensors import own_tensors
from model import build_model
from training.optimizers import make_optimizers, state_tensors
from training.plan import SavedTensors, plan, print_plan

# Few levels and layers: a plan runs the network on fake tensors, each operation of which takes long
# whatever its size.
tiny = functools.partial(helpers.tiny, levels=1)


@pytest.mark.parametrize("optimizer", ["Adagrad", "AdamW", "Muon", "SGD"])
def test_weights_gradients_and_optimizer_are_as_large_as_planned(optimizer):
    config = tiny(optimizer=optimizer, micro_batch_size=2, layers=1)
    figures = plan(config, 1, VOCAB, None)
    model = build_model(config, VOCAB)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers = make_optimizers(model, config)
    for one in optimizers:
        one.step()
    states = [t for key, t in state_tensors(model, optimizers).items() if not key.endswith(":step")]
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert figures["weights"] == figures["gradients"] == sum(p.nbytes for p in model.parameters())
    assert figures["optimizer"] == sum(t.nbytes for t in states)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_those_that_autograd_keeps(checkpointed):
    config = tiny(micro_batch_size=2, gradient_checkpointing=checkpointed, layers=1)
    model = build_model(config, VOCAB).train()
    ids = torch.zeros(2, config.block_size, dtype=torch.int64)
    with SavedTensors(list(own_tensors(model).values()) + list(model.buffers())) as saved:
        model.loss(ids, ids)
    kept = saved.nbytes - model.lm_head.weight.nbytes
    assert plan(config, 1, VOCAB, None)["activations"] == pytest.approx(kept, rel=0.02)
    # the head's is the loss's
    assert plan(config, 1, 100 * VOCAB, None)["activations"] == pytest.approx(kept, rel=0.02)


def test_recomputation_and_shards_take_less_memory():
    values = {"layers": 3, "micro_batch_size": 4, "pkm_enabled": False, "fwpkm_enabled": False}
    plain = plan(tiny(**values), 1, VOCAB, None)
    saving = plan(tiny(**values, gradient_checkpointing=True), 1, VOCAB, None)
    assert saving["activations"] < 0.7 * plain["activations"]
    sharded = plan(tiny(**values, parallel="fsdp", use_amp=False), 4, VOCAB, None)
    assert sharded["optimizer"] * 4 == plain["optimizer"]
    assert sharded["tokens_per_step"] == plain["tokens_per_step"]


def test_a_batch_that_does_not_divide_among_the_gpus_is_an_error():
    with pytest.raises(InputError, match="micro_batch_size"):
        plan(tiny(micro_batch_size=2), 3, VOCAB, None)


@pytest.mark.parametrize(("memory", "fits"), [(64.0, "fits: yes"), (0.0001, "fits: no")])
def test_a_plan_says_whether_a_card_is_large_enough(memory, fits, capsys):
    print_plan(tiny(dataset="pydoc", tokenizer="bytes", layers=1), 1, memory)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(fits) for line in lines)
    total = next(float(line.split()[1]) for line in lines if line.startswith("total_gib"))
    margin = next(float(line.split()[1]) for line in lines if line.startswith("margin_gib"))
    assert margin == pytest.approx(memory - total, abs=0.02)
