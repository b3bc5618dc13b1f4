"""Several processes take the steps that one takes, and go on with each other's saves. Two gloo processes on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import NO_DROPOUT, SMALL, text  # noqa: F401  (text is a fixture)

from config import InputError, load_config, make_config
from data import prepare
from distributed import World, join
from record import Record
from trainer import LATEST, Trainer

HERE = Path(__file__).parent
STEPS = 6


def start_two(*arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.fixture
def config_file(text, tmp_path):  # noqa: F811
    def make(**overrides):
        values = SMALL | NO_DROPOUT | {"dataset": str(text), "cache_dir": str(tmp_path / "cache"), "max_steps": STEPS}
        (tmp_path / "config.json").write_text(json.dumps(values | {"grad_accum": 2, "ema_decay": 0.5} | overrides))
        return tmp_path / "config.json"

    return make


def alone(config, folder, until, resume=False):
    folder.mkdir(exist_ok=True)
    trainer = Trainer(config, Record(folder, quiet=True), prepare(config, lambda line: None), World("cpu"))
    if resume:
        trainer.restore()
    losses = [trainer.take_step()[0].item() for _ in range(until - trainer.step)]
    return trainer, losses


def assert_same(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("kind", "carry"), [("ddp", False), ("ddp", True), ("fsdp", False)])
def test_two_processes_take_one_s_steps_and_go_on_with_its_saves_and_it_with_theirs(config_file, tmp_path, kind, carry):
    path = config_file(parallel=kind, decompose_bypass_cross_window=carry)
    config = load_config(path)
    saver, _ = alone(config, tmp_path / "of one", STEPS // 2)
    saver.save()
    (tmp_path / "of two").mkdir()
    processes = start_two(HERE / "two_processes.py", path, tmp_path)
    trainer, losses = alone(config, tmp_path / "whole", STEPS)
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    wanted = trainer.tensors()["model"]
    assert results["of two"]["losses"] == pytest.approx(losses, rel=1e-5)
    assert results["of one"]["losses"] == pytest.approx(losses[STEPS // 2 :], rel=1e-5)
    for result in results.values():
        assert_same(result["weights"], wanted)
        with trainer.average.in_place():
            assert_same(result["average"], trainer.tensors()["model"])
        assert result["validation"] == pytest.approx(trainer.validation_nats(torch.arange(200) % 90), rel=1e-5)
    resumed, _ = alone(config, tmp_path / "of two", STEPS, resume=True)
    assert_same(resumed.tensors()["model"], wanted)
    assert_same(resumed.tensors()["average"], trainer.tensors()["average"])
    assert_same(resumed.tensors()["optimizer"], trainer.tensors()["optimizer"])
    assert sorted(p.name for p in (tmp_path / "of two").iterdir()) == [LATEST] + ["shards-3"] * (kind == "fsdp")


def test_of_two_processes_only_the_first_writes(config_file, tmp_path):
    processes = start_two(HERE.parent / "train.py", "--config", config_file(max_steps=2), "--out_dir", tmp_path / "logs")
    (first, _), (second, error) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], error
    (folder,) = (tmp_path / "logs").iterdir()
    assert first.startswith(f"run: {folder}\n") and second == ""
    assert "average_test_bits_per_byte: " in first
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert steps == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "named"), [({"micro_batch_size": 3}, "micro_batch_size"), ({"parallel": "none"}, "parallel")]
)
def test_work_that_does_not_divide_among_processes_is_one_line_that_names_the_key(monkeypatch, overrides, named):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = make_config(SMALL | overrides, "test")
    with pytest.raises(InputError, match=named), join(config):
        pass


def test_processes_share_out_the_rows_of_each_part_of_a_batch():
    rows = [World("cpu", rank, 4).rows(8, i) for i in range(2) for rank in range(4)]
    assert [row for part in rows for row in range(16)[part]] == list(range(16))
