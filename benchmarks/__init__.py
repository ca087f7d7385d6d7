"""Ratios against a named peer or a naive reference, measured in one run. `python -m benchmarks` runs them all."""
