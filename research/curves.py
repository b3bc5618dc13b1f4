"""Overlays the curves of several runs in one picture.

python -m research.curves logs/RUN_A logs/RUN_B --out curves.png --against seconds --labels A B
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.command import InputError, Parser, run_command
from common.figures import new_figure, plain, save_figure
from training.record import Record, is_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {
    "step": "step",
    "tokens": "training tokens",
    "seconds": "seconds of the run, evaluations included",
}
LINE_INCHES = 0.22  # of a legend's entry, at matplotlib's font size of 10 points


def points(folder: Path, against: str) -> list[tuple[float, float]]:
    """(step, tokens or seconds, bits per byte of validation) of a run, in order."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{folder}: is no run directory (it has no metrics.jsonl)")
    record = Record(folder)
    train = record.metrics("train")
    found = []
    try:
        # Lines of validation have no tokens; those of a step are always as many.
        each = train[0]["tokens"] / train[0]["step"] if train else None
        for line in record.metrics("validation"):
            if each is None or not is_finite(line["bits_per_byte"]):
                continue
            if against == "seconds" and "seconds" not in line:
                raise InputError(
                    f"{path}: is of before runs noted their seconds; take --against tokens"
                )
            place = line["step"] * each if against == "tokens" else line[against]
            found.append((place, line["bits_per_byte"]))
    except (KeyError, TypeError, ZeroDivisionError):
        raise InputError(
            f"{path}: a line in it is not one of train.py's; give another run"
        ) from None
    return found


def picture(folders: Sequence[Path], labels: Sequence[str], against: str) -> "Figure":
    """The curves of runs in one figure, each with its label in a legend below them."""
    # The legend has a place of its own, and the figure grows with it: it hides no curve, and the
    # curves keep their size.
    figure = new_figure(7, 4.5 + LINE_INCHES * len(folders))
    axes = figure.subplots()
    for folder, label in zip(folders, labels, strict=True):
        curve = points(folder, against)
        if not curve:
            raise InputError(f"{folder}: has no measurement on validation yet; let it run on")
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=plain(label))
    axes.set(xlabel=AXES[against], ylabel="bits per byte (validation)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower left", frameon=False)
    return figure


def main() -> None:
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run directories")
    parser.add_argument("--out", default="curves.png", help="the picture (default curves.png)")
    parser.add_argument(
        "--against", choices=list(AXES), default="tokens", help="the x axis (default tokens)"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="what to call the runs, in their order (default: their folders)",
    )
    args = parser.parse_args()
    folders = [Path(run) for run in args.runs]
    labels = args.labels or [folder.resolve().name for folder in folders]
    if len(labels) != len(folders):
        raise InputError(f"labels: {len(labels)} for {len(folders)} runs; give one for each")
    save_figure(picture(folders, labels, args.against), Path(args.out))
    print(args.out)


if __name__ == "__main__":
    run_command(main)
