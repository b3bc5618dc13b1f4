"""What all pictures have in common: how one begins, how it is written, how text stands in it."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 120  # of PNG files: sharp on a page of a repository, and some tens of kilobytes


def new_figure(width: float = 7, height: float = 4.5) -> "Figure":
    """An empty figure of so many inches, whose parts are moved so that none hides another."""
    from matplotlib.figure import Figure  # imported late: it is slow, and only pictures need it

    # Not through pyplot, which would keep every figure alive, and look for a screen.
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as a PNG, whole or not at all. Raises `InputError` where it cannot."""
    with written_whole(path) as beside:
        # The name that is written to ends in .tmp, so the format cannot follow from it.
        figure.savefig(beside, format="png", dpi=DOTS_PER_INCH)


def plain(text: str) -> str:
    """`text` as matplotlib is to be given it, so that it is shown as it stands: there dollars begin
    and end a formula."""
    return text.replace("$", r"\$")
