"""Overlays the curves of several runs in one picture.

python -m research.curves logs/RUN_A logs/RUN_B --out curves.png --against tokens
"""

from collections.abc import Sequence
from pathlib import Path

from common.command import InputError, Parser, run_command
from common.figures import plain
from common.files import written_whole
from training.record import Record, is_finite


def points(folder: Path, against: str) -> list[tuple[float, float]]:
    """(step or tokens, bits per byte of validation) of a run."""
    if not (folder / "metrics.jsonl").is_file():
        raise InputError(f"{folder}: is no run directory (it has no metrics.jsonl)")
    lines = Record(folder).metrics("train", "validation")
    train, found = [line for line in lines if line["kind"] == "train"], []
    try:
        # tokens of a step, always the same
        each = train[0]["tokens"] / train[0]["step"] if train else None
        for line in lines:
            if each and line["kind"] == "validation" and is_finite(line["bits_per_byte"]):
                found.append(
                    (line["step"] * (1 if against == "step" else each), line["bits_per_byte"])
                )
    except (KeyError, TypeError, ZeroDivisionError):
        raise InputError(
            f"{folder / 'metrics.jsonl'}: a line in it is not one of train.py's; give another run"
        ) from None
    return found


def draw(folders: Sequence[Path], out: Path, against: str) -> None:
    from matplotlib.figure import Figure  # imported late: it is slow, and only this needs it

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for folder in folders:
        curve = points(folder, against)
        if not curve:
            raise InputError(f"{folder}: has no measurement on validation yet; let it run on")
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=plain(folder.name))
    axes.set(xlabel=against, ylabel="bits per byte (validation)")
    axes.grid(alpha=0.3)
    axes.legend()
    with written_whole(out) as beside:
        figure.savefig(beside, format="png", dpi=120)


def main() -> None:
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run directories")
    parser.add_argument("--out", default="curves.png", help="the picture (default curves.png)")
    parser.add_argument(
        "--against",
        choices=["step", "tokens"],
        default="tokens",
        help="the x axis (default tokens)",
    )
    args = parser.parse_args()
    draw([Path(run) for run in args.runs], Path(args.out), args.against)
    print(args.out)


if __name__ == "__main__":
    run_command(main)
