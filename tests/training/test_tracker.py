"""Figures sent elsewhere too: real TensorBoard files, and stand-ins that record the calls of the
services' modules."""

import json
import math
import sys
import types

import pytest
from helpers import run

from common.command import InputError
from config import Config
from training.record import Record, read_metrics
from training.tracker import ID_FILE, numbers_of, open_tracker, run_id
from training.trainer import Trainer


def the_run(tmp_path):
    (folder,) = (tmp_path / "logs").iterdir()
    return folder


def sent(folder):
    """What a tracker is to get of a run: (step, name) -> number, the last of each."""
    lines = read_metrics(folder / "metrics.jsonl")
    return {
        (line["step"], name): value
        for line in lines
        for name, value in numbers_of(line).items()
        if line["kind"] != "schedule"
    }


class Service(types.ModuleType):
    """Stands in for wandb and for trackio: takes what their `init`, `log` and `finish` take."""

    def __init__(self, name):
        super().__init__(name)
        self.begun = []  # the options of each `init`
        self.logged = {}
        self.finished = 0

    def init(self, *, project, config, resume, name=None, id=None, dir=None):
        self.begun.append({"project": project, "resume": resume, "name": name, "id": id})
        self.config = config
        print("initialised")
        return self

    def log(self, values, step):
        self.logged |= {(step, name): value for name, value in values.items()}

    def finish(self):
        self.finished += 1
        print("uploading")


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    module = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_service_gets_all_figures_with_their_steps_and_one_id_over_a_resume(
    service, settings, tmp_path, monkeypatch, capsys
):
    take_step = Trainer.take_step

    def killed(self):
        if self.step == 6:
            raise MemoryError
        return take_step(self)

    name = service.__name__
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", killed)
        with pytest.raises(MemoryError):
            run(monkeypatch, "--config", settings(max_steps=8, tracker=name))
    folder = the_run(tmp_path)
    assert service.finished == 1  # whatever ends the run
    run(monkeypatch, "--resume", folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"run_dir: {folder}" and not {"initialised", "uploading"} & set(lines)
    assert service.logged == sent(folder)
    for part in ("train/loss", "train/lr", "train/tokens_per_second", "validation/bits_per_byte"):
        assert (8, part) in service.logged
    assert (8, "result/val_bits_per_byte") in service.logged
    first, second = service.begun
    assert first == second and first["project"] == "waveletlm" and first["resume"] == "allow"
    identity = json.loads((folder / ID_FILE).read_text())["id"]
    assert first["id" if name == "wandb" else "name"] == identity
    assert service.config["max_steps"] == 8 and service.finished == 2
    run(monkeypatch, "--resume", folder)  # an ended run has nothing to send
    assert len(service.begun) == 2


def test_tensorboard_has_all_figures_with_their_steps(settings, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install '.[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(monkeypatch, "--config", settings(max_steps=4, tracker="tensorboard"))
    folder = the_run(tmp_path)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {
        (event.step, name): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    wanted = sent(folder)
    assert found.keys() == wanted.keys()
    # Event files hold fp32.
    assert all(found[key] == pytest.approx(wanted[key], rel=1e-6) for key in wanted)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_line_that_names_the_extra_and_leaves_no_folder(
    name, settings, tmp_path, monkeypatch
):
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        InputError, match=rf"tracker: {name} .*pip install '\.\[{name}\]'"
    ) as caught:
        run(monkeypatch, "--config", settings(tracker=name))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "logs").exists()


def test_a_service_that_cannot_begin_is_one_line_and_leaves_no_folder(
    service, settings, tmp_path, monkeypatch
):
    def refused(**_):
        raise RuntimeError("no login\nsee the page of logins")

    service.init = refused
    with pytest.raises(InputError, match=r"cannot begin \(no login\)") as caught:
        run(monkeypatch, "--config", settings(tracker=service.__name__))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "logs").iterdir())


def test_nothing_is_imported_for_no_tracker(tmp_path, monkeypatch):
    def imported(name):
        raise AssertionError(f"{name} is imported")

    monkeypatch.setattr("training.tracker.importlib.import_module", imported)
    assert open_tracker(Config(), tmp_path, 0) is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(AssertionError, match="wandb is imported"):
        open_tracker(Config(tracker="wandb"), tmp_path, 0)


def test_an_id_is_made_once_and_has_no_characters_that_services_refuse(tmp_path):
    folder = tmp_path / "a b:c#d?e%_2026"
    folder.mkdir()
    made = run_id(folder)
    assert run_id(folder) == made and not set(made) & set(r"/\#?%: ") and len(made) <= 128
    (folder / ID_FILE).write_text("{}")
    with pytest.raises(InputError, match=r"tracker\.json"):
        run_id(folder)


def test_only_finite_numbers_are_sent(tmp_path):
    record = Record(tmp_path)
    got = []
    record.tracker = types.SimpleNamespace(log=lambda values, step: got.append((step, values)))
    record.metric(kind="train", step=3, loss=1.5, lr=math.inf, note="text", on=True)
    assert got == [(3, {"train/loss": 1.5})]


def test_lines_of_training_have_time_and_memory(settings, tmp_path, monkeypatch):
    run(monkeypatch, "--config", settings(max_steps=4))
    lines = read_metrics(the_run(tmp_path) / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    seconds = [line["seconds"] for line in train]
    assert seconds == sorted(seconds) and 0 < seconds[0] < seconds[-1] <= lines[-1]["seconds"] + 0.1
    assert all(0 < line["memory_gib"] < 64 for line in train)
    assert all("mfu" not in line for line in train)  # a CPU's peak is not measured
    assert all("seconds" in line for line in lines if line["kind"] == "validation")
