"""Masked autoencoding of pixels."""

COMPONENTS = ()
