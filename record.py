"""The record of a run: its folder with config.json, env.json, log.txt, metrics.jsonl, samples.txt and curves.png."""

import json
import math
import os
import platform
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import written_whole
from config import Config, InputError, save_config
from errors import check_regular
from tables import plain


class Record:
    """Writes a run's folder. `Record.create` makes a new one, `Record(folder)` goes on with one that is there."""

    APPENDED = ("log.txt", "metrics.jsonl", "samples.txt")

    def __init__(self, folder: Path, quiet: bool = False):
        self.folder, self.quiet = folder, quiet
        for name in self.APPENDED:
            check_regular(folder / name)  # a FIFO would be waited for

    @staticmethod
    def create(config: Config) -> "Record":
        """Makes `<out_dir>/<dataset>_<date>_<time>/`; a name that another run has taken gets a number."""
        name = Path(config.dataset).stem if os.sep in config.dataset or "." in config.dataset else config.dataset
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        for attempt in range(1, 1000):
            folder = Path(config.out_dir) / (f"{name}_{stamp}" + (f"_{attempt}" if attempt > 1 else ""))
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
            except OSError as error:
                raise InputError(f"out_dir: cannot make {folder} ({error.strerror}); give a writable folder") from None
        record = Record(folder)
        with written_whole(folder / "config.json") as beside:
            save_config(config, beside)
        with written_whole(folder / "env.json") as beside:
            beside.write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
        return record

    def _append(self, name: str, text: str) -> None:
        if not self.quiet:
            try:
                with open(self.folder / name, "a", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:
                raise InputError(f"{self.folder / name}: cannot be written ({error.strerror})") from None

    def say(self, line: str) -> None:
        """A line for the terminal (above a progress bar, if there is one) and log.txt."""
        if not self.quiet:
            tqdm.write(line)
            sys.stdout.flush()
            self._append("log.txt", line + "\n")

    def metric(self, **values: Any) -> None:
        """A line of metrics.jsonl."""
        self._append("metrics.jsonl", json.dumps(values) + "\n")

    def sample(self, step: int, text: str) -> None:
        self._append("samples.txt", f"--- step {step}\n{text}\n\n")

    def lengths(self) -> dict[str, int]:
        """The present length in bytes of each file that is appended to."""
        return {name: (self.folder / name).stat().st_size for name in self.APPENDED if (self.folder / name).exists()}

    def cut_back(self, lengths: dict[str, int]) -> None:
        """Takes off what was appended after `lengths` were noted, steps that a resumed run does again, and what a killed
        save left half written."""
        if self.quiet:
            return
        for half in self.folder.glob(".*.tmp"):
            half.unlink()
        for name in self.APPENDED:
            if (self.folder / name).exists():
                os.truncate(self.folder / name, lengths.get(name, 0))

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [values for values in map(json.loads, lines) if values["kind"] == kind]

    def draw_curves(self) -> None:
        """curves.png: bits per byte in training and validation by step."""
        if self.quiet:
            return
        from matplotlib.figure import Figure  # imported late: it is slow, and only this needs it

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for kind, style in (("train", {"alpha": 0.6, "linewidth": 1}), ("validation", {"marker": "o", "markersize": 3})):
            points = [(m["step"], m["bits_per_byte"]) for m in self.metrics(kind) if math.isfinite(m["bits_per_byte"])]
            if points:
                axes.plot(*zip(*points, strict=True), label=kind, **style)
        axes.set(xlabel="step", ylabel="bits per byte", title=plain(self.folder.name))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        with written_whole(self.folder / "curves.png") as beside:
            figure.savefig(beside, format="png", dpi=120)


def environment() -> dict[str, Any]:
    """What a figure depends on beside config and data: versions, machine, commit, command, date."""
    here = Path(__file__).parent
    try:
        describe = ["git", "-C", here, "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or None
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
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }
