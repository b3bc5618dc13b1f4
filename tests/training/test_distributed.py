"""Several processes take the steps that one takes, and go on with each other's saves. Two gloo
processes on the CPU."""

import functools
import json
import os
import socket
import sys

import pytest
import torch
from helpers import (
    NO_DROPOUT,
    SMALL,
    run_in_child,
    skip_without_forked_training,
    start_child,
)

from common.command import InputError
from common.tensors import load_tensors, save_tensors
from config import load_config, make_config
from data.prepare import prepare
from training.distributed import Shards, World, join, own_part
from training.record import Record
from training.trainer import LATEST, Trainer

STEPS = 4


def as_ranks(start):
    """Starts a child by `start(rank, make_rank)` for each rank of two; `make_rank()` gives it the
    variables that torchrun would. Waits for both to end well."""
    skip_without_forked_training()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def make_rank(rank):
        numbers = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ.update(numbers, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)

    children = [start(rank, functools.partial(make_rank, rank)) for rank in range(2)]
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [0, 0]


@pytest.fixture
def config_file(text, tmp_path):
    def make(**overrides):
        values = (
            SMALL
            | NO_DROPOUT
            | {
                "dataset": str(text),
                "cache_dir": str(tmp_path / "cache"),
                "max_steps": STEPS,
            }
        )
        (tmp_path / "config.json").write_text(
            json.dumps(values | {"grad_accum": 2, "ema_decay": 0.5} | overrides)
        )
        return tmp_path / "config.json"

    return make


def alone(config, folder, until, resume=False):
    folder.mkdir(exist_ok=True)
    trainer = Trainer(
        config, Record(folder, quiet=True), prepare(config, lambda line: None), World("cpu")
    )
    if resume:
        trainer.restore()
    losses = [trainer.take_step()[0].item() for _ in range(until - trainer.step)]
    return trainer, losses


def assert_same(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def weights(trainer):
    whole = trainer.world.whole(trainer.tensors()["model"])
    return {name: tensor.clone() for name, tensor in whole.items()}


def train_as_one_of_two(config, folder):
    """What each process does: trains from the start, with a save half way, and on from the save
    that one process made. The first leaves in results.pt what came out."""
    results = {}
    with join(config) as world:
        corpus = prepare(config, lambda line: None)
        for name in ("of two", "of one"):
            trainer = Trainer(config, Record(folder / name, quiet=True), corpus, world)
            if name == "of one":
                trainer.restore()
            losses = []
            while trainer.step < STEPS:
                losses.append(world.mean(trainer.take_step()[0]).item())
                if name == "of two" and trainer.step == STEPS // 2:
                    trainer.save()
            nats = trainer.validation_nats(torch.arange(200) % 90)
            results[name] = {"losses": losses, "weights": weights(trainer), "validation": nats}
            with trainer.average.in_place():
                results[name]["average"] = weights(trainer)
        if world.rank == 0:
            torch.save(results, folder / "results.pt")


@pytest.mark.parametrize(("kind", "carry"), [("ddp", False), ("ddp", True), ("fsdp", False)])
def test_two_processes_take_one_s_steps_and_go_on_with_its_saves_and_it_with_theirs(
    config_file, tmp_path, kind, carry
):
    config = load_config(config_file(parallel=kind, decompose_bypass_cross_window=carry))
    saver, _ = alone(config, tmp_path / "of one", STEPS // 2)
    saver.save()
    (tmp_path / "of two").mkdir()

    def start(rank, make_rank):
        def work():
            make_rank()
            train_as_one_of_two(config, tmp_path)

        return start_child(work)

    as_ranks(start)
    trainer, losses = alone(config, tmp_path / "whole", STEPS)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    wanted = trainer.tensors()["model"]
    assert results["of two"]["losses"] == pytest.approx(losses, rel=1e-5)
    assert results["of one"]["losses"] == pytest.approx(losses[STEPS // 2 :], rel=1e-5)
    for result in results.values():
        assert_same(result["weights"], wanted)
        with trainer.average.in_place():
            assert_same(result["average"], trainer.tensors()["model"])
        assert result["validation"] == pytest.approx(
            trainer.validation_nats(torch.arange(200) % 90), rel=1e-5
        )
    resumed, _ = alone(config, tmp_path / "of two", STEPS, resume=True)
    assert_same(resumed.tensors()["model"], wanted)
    assert_same(resumed.tensors()["average"], trainer.tensors()["average"])
    assert_same(resumed.tensors()["optimizer"], trainer.tensors()["optimizer"])
    assert sorted(p.name for p in (tmp_path / "of two").iterdir()) == [LATEST] + [
        f"shards-{STEPS // 2}"
    ] * (kind == "fsdp")


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (2, 3), (4, 2), (3, 5)])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8])
def test_shards_of_any_number_of_processes_are_read_by_any_other(tmp_path, rows, writers, readers):
    whole = torch.arange(3.0 * rows).view(rows, 3)
    for rank in range(writers):
        number = {"model.scalar": torch.tensor(7.0)} if rank == 0 else {}
        held = {"model.matrix": whole[own_part(rows, World("cpu", rank, writers))]}
        save_tensors(held | number, tmp_path / f"{rank}-of-{writers}.safetensors")
    shards = Shards(tmp_path, writers)
    assert shards.shapes == {"model.matrix": whole.shape, "model.scalar": torch.Size([])}
    parts = [own_part(rows, World("cpu", rank, readers)) for rank in range(readers)]
    assert torch.equal(
        torch.cat([shards._rows("model.matrix", part.start, part.stop) for part in parts]), whole
    )
    tensors = {"model": {"matrix": torch.zeros(rows, 3), "scalar": torch.zeros(())}}
    shards.read(tensors, World("cpu"))
    assert torch.equal(tensors["model"]["matrix"], whole) and tensors["model"]["scalar"] == 7


def test_damaged_shards_are_one_line_that_names_them(config_file, tmp_path):
    config, folder = load_config(config_file(parallel="fsdp")), tmp_path / "run"
    saver, _ = alone(config, folder, 1)
    saver.save()
    file = folder / "shards-1" / "0-of-1.safetensors"
    whole = load_tensors(file)
    name = next(key for key in whole if key.startswith("optimizer.") and whole[key].dim() == 2)
    changes = {
        "missing": {k: t for k, t in whole.items() if k != "model.final_ln.weight"},
        "unknown": whole | {"model.surprise": torch.zeros(1)},
        "a state of no parameter": whole | {"optimizer.surprise:sum": torch.zeros(1)},
        "another shape": whole | {"model.final_ln.weight": torch.zeros(1)},
        "another type": whole | {"model.final_ln.weight": whole["model.final_ln.weight"].half()},
        "a state of another shape": whole | {name: whole[name][:1].clone()},
        "not finite": whole | {"model.final_ln.weight": whole["model.final_ln.weight"] / 0},
    }
    for change, tensors in changes.items():
        save_tensors(tensors, file)
        with pytest.raises(InputError, match="shards-1") as caught:
            alone(config, folder, 1, resume=True)
        assert "\n" not in str(caught.value), change
    file.unlink()
    with pytest.raises(InputError, match="0-of-1.safetensors"):
        alone(config, folder, 1, resume=True)


def test_of_two_processes_only_the_first_writes(config_file, tmp_path):
    path = config_file(max_steps=2, out_dir=str(tmp_path / "logs"))

    def start(rank, make_rank):
        def before():
            make_rank()
            sys.stdout = open(tmp_path / f"printed by {rank}", "w")  # noqa: SIM115

        return run_in_child("--config", path, prepare=before)

    as_ranks(start)
    first, second = ((tmp_path / f"printed by {rank}").read_text() for rank in range(2))
    (folder,) = (tmp_path / "logs").iterdir()
    assert first.startswith(f"run: {folder}\n") and second == ""
    assert "average_test_bits_per_byte: " in first
    steps = [
        json.loads(line)["step"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if '"train"' in line
    ]
    assert steps == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"micro_batch_size": 3}, "micro_batch_size"), ({"parallel": "none"}, "parallel")],
)
def test_work_that_does_not_divide_among_processes_is_one_line_that_names_the_key(
    monkeypatch, overrides, named
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = make_config(SMALL | overrides, "test")
    with pytest.raises(InputError, match=named), join(config):
        pass


def test_processes_share_out_the_rows_of_each_part_of_a_batch():
    rows = [World("cpu", rank, 4).rows(8, i) for i in range(2) for rank in range(4)]
    assert [row for part in rows for row in range(16)[part]] == list(range(16))
