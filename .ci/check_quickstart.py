"""Checks the quick start's printed figures: bits per byte as the README states them, and well under
the bigram model's."""

import re
import sys
from pathlib import Path

figures = dict(
    re.findall(r"^(\w+): (\S+)$", Path(sys.argv[1]).read_text(encoding="utf-8"), re.MULTILINE)
)
stated = re.search(
    r"([\d.]+) ± ([\d.]+) bits per byte", Path(sys.argv[2]).read_text(encoding="utf-8")
)
if stated is None:
    sys.exit("the README does not state the quick start's bits per byte as 'X ± Y bits per byte'")
got, expected, tolerance = float(figures["val_bits_per_byte"]), float(stated[1]), float(stated[2])
bigram = float(figures["bigram_val_bits_per_byte"])
if abs(got - expected) > tolerance:
    sys.exit(f"quick start: {got:.4f} bits per byte, the README states {expected} ± {tolerance}")
if got > bigram - 0.1:
    sys.exit(
        f"quick start: {got:.4f} bits per byte is not well under the bigram model's {bigram:.4f}"
    )
print(
    f"quick start: {got:.4f} bits per byte (README: {expected} ± {tolerance}; bigram model:"
    f" {bigram:.4f})"
)
