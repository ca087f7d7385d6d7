"""The command line, thin: parse, call, print."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
