"""Tables of measured runs: mean ± deviation over seeds, Markdown, and their place in runs.md."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from common.command import InputError
from common.files import read_utf8, written_whole


def mean_deviation(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± sample standard deviation (n) of `values`, as text; without a deviation for a single
    one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (1)"
    return (
        f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
        f" ({len(values)})"
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, with a line end."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def put_first(path: Path, section: str) -> None:
    """Puts `section` ("## …") before the other sections of the Markdown file `path`; one of the
    same heading is replaced. Raises `InputError` where there is no such file."""
    try:
        text = read_utf8(path)
    except OSError as error:
        raise InputError(
            f"runs: {path} cannot be read ({error.strerror}); give a Markdown file"
        ) from None
    heading = section.partition("\n")[0]
    head, *sections = text.split("\n## ")
    kept = [part.strip("\n") for part in sections if f"## {part}".partition("\n")[0] != heading]
    parts = [head.strip("\n"), section.strip("\n"), *(f"## {part}" for part in kept)]
    with written_whole(path) as beside:
        beside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
