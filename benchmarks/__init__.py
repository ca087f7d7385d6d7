"""Ratios against a named peer or a naive reference, measured in one run. `python -m benchmarks` runs them all.

Each module here with a `NAME` and a `run()` is a benchmark. `run()` returns rows:

    {"what": …, "ratio": seconds / peer_seconds, "bound": …, "seconds": …, "peer_seconds": …}

A bound is met when the ratio is not above it; a bound of None is for rows that only report. A row may have a "note", and one
that could not be measured has ratio None and says why there.
"""
