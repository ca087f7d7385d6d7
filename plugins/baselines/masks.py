"""Mask strategies: random, BEiT blocks, tubes."""

COMPONENTS = ()
