"""The record of a run: its folder with config.json, env.json, log.txt, metrics.jsonl, samples.txt
and curves.png.

Files that grow are written a whole line at a time, and are on the disk before a save that counts on
them is. What a kill leaves half written is cut off when the run goes on, and left out, with a note,
by whoever reads it meanwhile."""

import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock
import torch
from tqdm import tqdm

from common.command import InputError
from common.device import cpu_name
from common.figures import new_figure, plain, save_figure
from common.files import check_regular, read_json, written_whole
from config import Config, save_config
from training.tracker import Tracker, numbers_of


class Record:
    """Writes a run's folder. `Record.create` makes a new one, `Record(folder)` goes on with one
    that is there."""

    # files that grow; all others are written whole
    APPENDED = ("log.txt", "metrics.jsonl", "samples.txt")

    def __init__(self, folder: Path, quiet: bool = False):
        self.folder = folder
        self.quiet = quiet  # of several processes all but the first, which write nothing
        self.tracker: Tracker | None = None  # which gets the metrics too, once it is opened
        for name in self.APPENDED:
            check_regular(folder / name)  # a FIFO would be waited for

    @staticmethod
    def create(config: Config, origin: dict[str, str] | None = None) -> "Record":
        """Makes `<out_dir>/<dataset>_<date>_<time>/`; a name that another run has taken gets a
        number. origin: path and sha256 of the weights that the run begins with, if any."""
        # A file or folder gives its last name, without a suffix; a named data set its name.
        name = (
            Path(config.dataset).stem
            if os.sep in config.dataset or "." in config.dataset
            else config.dataset
        )
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        # Runs that begin in one second are told apart by a number; 1,000 of them are a mistake.
        for attempt in range(1, 1000):
            folder = Path(config.out_dir) / (
                f"{name}_{stamp}" + (f"_{attempt}" if attempt > 1 else "")
            )
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
            except OSError as error:
                raise InputError(
                    f"out_dir: cannot make {folder} ({error.strerror}); give a writable folder"
                ) from None
        else:
            raise InputError(f"out_dir: all names of {folder} are taken; give another folder")
        values = environment() | ({"init_from": origin} if origin else {})
        try:
            with written_whole(folder / "env.json") as beside:
                beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            Record(folder).write_config(config)  # the last: a folder that has it is whole
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # what went wrong is what is to be said
            raise
        return Record(folder)

    @staticmethod
    def is_run(folder: Path) -> bool:
        """Whether a folder has what marks a run: `create`'s config.json and env.json. A repository
        and a quantised checkpoint have a config.json too."""
        try:
            values = read_json(folder / "env.json")
        except InputError:  # there is none, or it is something else
            return False
        return {"date", "command", "torch"} <= values.keys() and (folder / "config.json").is_file()

    def write_config(self, config: Config) -> None:
        """Writes config.json, whole or not at all."""
        with written_whole(self.folder / "config.json") as beside:
            save_config(config, beside)

    def origin(self) -> str | None:
        """The path of the weights that the run began with; None where it began with random ones.
        Raises `InputError` where env.json is broken."""
        path = self.folder / "env.json"
        values = read_json(path)
        if "init_from" not in values:
            return None
        note = values["init_from"]
        if not (isinstance(note, dict) and isinstance(note.get("path"), str)):
            raise InputError(f"{path}: init_from is not as train.py wrote it; restore the file")
        return note["path"]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within it no other process goes on with this run: a lock that ends with the process,
        however that ends. Raises `InputError` where another has it."""
        path = self.folder / ".lock"
        lock = filelock.FileLock(path, timeout=0)  # whoever has it has it for hours
        try:
            lock.acquire()
        except filelock.Timeout:
            raise InputError(
                f"resume: another process trains in {self.folder}; wait for it, or stop it"
            ) from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"{path}: cannot be locked ({reason}); give out_dir a folder on a disk with locks"
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # while it is locked: nobody waits for it
                path.unlink(missing_ok=True)
            lock.release()

    # ===== What a run writes

    def _append(self, name: str, text: str) -> None:
        if not self.quiet:
            try:
                with open(
                    self.folder / name, "a", encoding="utf-8", errors="backslashreplace"
                ) as file:
                    file.write(text)
            except OSError as error:
                raise InputError(
                    f"{self.folder / name}: cannot be written ({error.strerror})"
                ) from None

    def say(self, line: str) -> None:
        """A line for log.txt and the terminal (above a progress bar, if there is one): for the file
        first, since a terminal may be gone."""
        if not self.quiet:
            self._append("log.txt", line + "\n")
            tqdm.write(line)  # which moves a bar out of the way
            sys.stdout.flush()

    def metric(self, **values: Any) -> None:
        """A line of metrics.jsonl; null for what is not finite, which JSON has no number for."""
        known = {
            key: None if isinstance(x, float) and not math.isfinite(x) else x
            for key, x in values.items()
        }
        self._append("metrics.jsonl", json.dumps(known, allow_nan=False) + "\n")
        if self.tracker is not None:
            self.tracker.log(numbers_of(known), known["step"])

    # Texts have line ends of their own, so a mark tells where each begins.
    def sample(self, step: int, text: str) -> None:
        self._append("samples.txt", f"--- step {step}\n{text}\n\n")

    def lengths(self) -> dict[str, int]:
        """The present length in bytes of each file that is appended to, which is on the disk from
        now on."""
        lengths: dict[str, int] = {}
        for name in self.APPENDED:
            if not self.quiet and (self.folder / name).exists():
                with open(self.folder / name, "ab") as file:
                    # A power cut may not take lines that a save on the disk counts on.
                    os.fsync(file.fileno())
                    lengths[name] = file.tell()
        return lengths

    def cut_back(self, lengths: dict[str, int]) -> None:
        """Takes off what was appended after `lengths` were noted, steps that a resumed run does
        again, and what a killed save left half written. A file that has lost its end since is cut
        to its last whole line, and never made longer."""
        if self.quiet:
            return
        # The lock is ours, so nobody is writing them any more.
        for half in self.folder.glob(".*.tmp"):
            half.unlink()
        for name in self.APPENDED:
            path = self.folder / name
            noted = lengths.get(name, 0)  # there was none at a save before its first line
            size = path.stat().st_size if path.exists() else 0
            if size < noted:
                note(
                    f"{path}: has {size:,} bytes of the {noted:,} that it had at the last save; the"
                    " rest is lost"
                )
                # Truncating to the noted length would fill the file up with zero bytes.
                noted = path.read_bytes().rfind(b"\n") + 1 if size else 0
            if size > noted:
                os.truncate(path, noted)

    # ===== What a run has written

    def metrics(self, *kinds: str) -> list[dict[str, Any]]:
        return [
            values
            for values in read_metrics(self.folder / "metrics.jsonl")
            if values["kind"] in kinds
        ]

    def result_of(self, step: int) -> dict[str, Any] | None:
        """The figures of a run that ended with `step`; None where they are not made yet. A run that
        has gone on after its end has those of the first end too."""
        made = self.metrics("result")
        if not made or made[-1].get("step") != step:
            return None
        return {key: value for key, value in made[-1].items() if key not in ("kind", "step")}

    def ends_with_result(self, step: int) -> bool:
        """Whether the run ended with `step`, and nothing was done since."""
        lines = read_metrics(self.folder / "metrics.jsonl")
        return bool(lines) and lines[-1]["kind"] == "result" and lines[-1].get("step") == step

    def has_lost_its_save(self, save_interval: int | None) -> bool:
        """Whether the run is further than its first save, so that one that finds no save must not
        begin anew: it would write over what there is. Where saves go by time, it is as soon as
        there are weights."""
        lines = read_metrics(self.folder / "metrics.jsonl")
        steps = max((line.get("step", 0) for line in lines), default=0)
        # of the weights or of their average
        weights = any(self.folder.glob("*_model.safetensors"))
        by_steps = save_interval is not None
        # By steps a save is due at every interval; by time nobody knows when the first was due.
        further = steps > save_interval if by_steps else weights
        return further or any(line["kind"] == "result" for line in lines) or (weights and not lines)

    def draw_curves(self) -> None:
        """curves.png: bits per byte in training and validation by step."""
        if self.quiet:
            return
        figure = new_figure()
        axes = figure.subplots()
        # Losses of training are of one batch each, and jump: they stand back behind the others.
        for kind, style in (
            ("train", {"alpha": 0.6, "linewidth": 1}),
            ("validation", {"marker": "o", "markersize": 3}),
        ):
            points = [
                (m["step"], m["bits_per_byte"])
                for m in self.metrics(kind)
                if is_finite(m["bits_per_byte"])
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=kind, **style)
        axes.set(xlabel="step", ylabel="bits per byte", title=plain(self.folder.name))
        axes.grid(alpha=0.3)
        if axes.lines:  # matplotlib warns of an empty legend
            axes.legend()
        save_figure(figure, self.folder / "curves.png")


def note(line: str) -> None:
    """Something that a command goes on in spite of."""
    print(f"note: {line}", file=sys.stderr)


def is_finite(value: float | None) -> bool:
    """Whether a figure of a metrics.jsonl is a number; what was not finite is null there."""
    return value is not None and math.isfinite(value)


# ===== Reading metrics, of any run


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no file. A last line without its end, of a
    run that is being written or was killed, is left out with a note. Raises `InputError`, naming
    the line, for one that is no object with a `kind`."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    # Lines end with "\n", so what follows the last one is a line that was not finished.
    *whole, torn = text.split("\n")
    if torn:
        note(f"{path}: the last line is half written, and left out")
    lines = []
    for number, line in enumerate(whole, 1):
        try:
            values = json.loads(line)
        # ValueError is all of JSON's errors, and a number of too many digits
        except (ValueError, RecursionError):
            values = None
        if not (isinstance(values, dict) and isinstance(values.get("kind"), str)):
            raise InputError(
                f"{path}: line {number} is none of train.py's; restore the file, or take the"
                " line out"
            )
        lines.append(values)
    return lines


# ===== Where a run was made


def environment() -> dict[str, Any]:
    """What a figure depends on beside config and data: versions, machine, commit, command, date."""
    here = Path(__file__).parents[1]
    try:
        # "-dirty" marks a tree with changes that no commit has.
        describe = ["git", "-C", here, "describe", "--always", "--dirty"]
        commit = (
            subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
            or None
        )
    except OSError:  # no git here: the commit is good to know, not needed
        commit = None
    cuda = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.platform(),
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }
