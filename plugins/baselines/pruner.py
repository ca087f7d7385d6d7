"""Magnitude, random, Wanda and SparseGPT."""

COMPONENTS = ()
