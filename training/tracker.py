"""A run's figures in a service to watch them: TensorBoard, Weights & Biases or Trackio.

Every line of metrics.jsonl goes there too, under its step: numbers as `kind/name`, such as
train/loss, validation/bits_per_byte and result/val_bits_per_byte. Nothing is imported for
`tracker: none`. A run that is gone on with keeps its place there: its id is in its folder."""

import contextlib
import importlib
import json
import math
import re
import secrets
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from common.command import InputError, first_line
from common.files import read_json, write_whole
from config import Config

PROJECT = "waveletlm"  # under which a service lists the runs
ID_FILE = "tracker.json"  # in a run's folder: the name by which a service knows the run
MODULES = {
    "tensorboard": "torch.utils.tensorboard",  # which imports the package tensorboard
    "wandb": "wandb",
    "trackio": "trackio",
}


class Tracker(Protocol):
    """Where figures go."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder, which `tensorboard --logdir logs` shows beside those of
    other runs."""

    def __init__(self, module: ModuleType, folder: Path, step: int):
        # Events of steps that a kill has undone are hidden: the run takes those steps again.
        purge = step + 1 if step else None
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    # Event files are written by a thread, at least every two minutes.
    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class Service:
    """A run of Weights & Biases or of Trackio, whose calls are alike. Steps that a kill has undone
    are logged again; the figures are the same, but for times."""

    def __init__(self, module: ModuleType, config: Config, folder: Path):
        name = config.tracker
        options = {
            "project": PROJECT,
            "config": config.model_dump(mode="json"),
            "resume": "allow",  # goes on where the id is known, else begins
        }
        if name == "wandb":
            # `dir` is where it keeps its own files until they are sent.
            options |= {"id": run_id(folder), "name": folder.name, "dir": str(folder)}
        else:
            options["name"] = run_id(folder)  # Trackio has no ids beside names
        self.module = module
        try:
            with aside():
                self.run = module.init(**options)
        except Exception as error:  # each service has errors of its own: no network, no login, …
            raise InputError(
                f"tracker: {name} cannot begin ({first_line(error)}); mend that, or take none"
            ) from None

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def finish(self) -> None:
        # The module's `finish`, after which no run is the present one: at the end of the process
        # Trackio finishes the present run, even where it was finished by its own `finish`.
        with aside():
            self.module.finish()


def aside() -> contextlib.AbstractContextManager:
    """Within it, what a service prints goes to stderr: the output of a run ends with its block of
    figures, which programs read."""
    return contextlib.redirect_stdout(sys.stderr)


def tracker_module(config: Config) -> ModuleType | None:
    """What the tracker of `config` is made with; None for none. Raises `InputError` where its
    package is missing."""
    name = config.tracker
    if name == "none":
        return None
    # Imported late: each takes seconds, and is no part of what the project needs.
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:  # of the package, or of one that it needs
        raise InputError(
            f"tracker: {name} is not installed ({error}); pip install '.[{name}]', or take none"
        ) from None


def open_tracker(config: Config, folder: Path, step: int) -> Tracker | None:
    """The tracker of the run in `folder`, which has taken `step` steps; None where it wants none.
    Raises `InputError` where it cannot begin."""
    module = tracker_module(config)
    if module is None:
        return None
    if config.tracker == "tensorboard":
        return TensorBoard(module, folder, step)
    return Service(module, config, folder)


def run_id(folder: Path) -> str:
    """The id of the run in `folder`, made at the first call and kept there: the folder may be
    moved, and another of its name be made."""
    path = folder / ID_FILE
    if path.exists():
        kept = read_json(path).get("id")
        if not (isinstance(kept, str) and kept):
            raise InputError(f"{path}: has no id of a run; restore it, or remove it")
        return kept
    # Services take no / \ # ? % : in an id, and not more than 128 characters.
    name = re.sub(r"[^\w.-]+", "-", folder.name)[:64]
    # Random, since two machines may make folders of one name in one project.
    made = f"{name}-{secrets.token_hex(4)}"
    write_whole(path, (json.dumps({"id": made}) + "\n").encode())
    return made


def numbers_of(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, by `kind/name`, without its step."""
    return {
        f"{line['kind']}/{name}": value
        for name, value in line.items()
        if name != "step"
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }
