"""Comparisons, ablations, probes and timings: each runs as `python -m research.NAME`."""
