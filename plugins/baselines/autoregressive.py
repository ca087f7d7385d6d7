"""Greedy and nucleus sampling."""

COMPONENTS = ()
