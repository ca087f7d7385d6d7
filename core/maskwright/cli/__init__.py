"""The command line, thin: parse, call, print.

`COMMANDS` says which module holds each command. A module is imported when its command is called, so that `--help`, shell
completion and the listing are fast, and nothing here imports torch.
"""

from __future__ import annotations

import sys

import click

from maskwright import __version__
from maskwright.cli.session import LazyGroup, Session, global_options

COMMANDS = {
    "list": ("maskwright.cli.listing:list_components", "What there is, by kind; imports no plugin."),
    "info": ("maskwright.cli.info:info", "All about one component: parameters, partners, paper, claim."),
    "show": ("maskwright.cli.show:show", "Draw a strategy's mask here, or into a PNG."),
    "pretrain": ("maskwright.cli.jobs:pretrain", "Train a model with a mask strategy and an objective."),
    "prune": ("maskwright.cli.jobs:prune", "Prune a model to a budget."),
    "compare-pruners": (
        "maskwright.cli.compare_pruners:compare_pruners",
        "Prune a model with several pruners, on one page.",
    ),
    "apply": ("maskwright.cli.apply:apply", "Set the weights outside saved masks to zero in a model."),
    "sample": ("maskwright.cli.jobs:sample", "Sample text from a masked denoiser."),
    "compare": ("maskwright.cli.compare:compare", "Put runs side by side on one page."),
    "install": ("maskwright.cli.install:install", "Install plugins, and say what they bring."),
    "uninstall": ("maskwright.cli.install:uninstall", "Remove plugins, and say what goes."),
    "new": ("maskwright.cli.new:new", "Write a new plugin: a whole distribution that works."),
    "check": ("maskwright.cli.check:check", "Run the conformance kit on a component or a plugin."),
    "describe": (
        "maskwright.cli.describe:describe",
        "Print a plugin's registry.toml from what it registers.",
    ),
    "doctor": ("maskwright.cli.doctor:doctor", "Import every plugin on its own and say what is wrong."),
    "verify": ("maskwright.cli.verify:verify", "Measure the claims of the papers again."),
    "completion": ("maskwright.cli.completion:completion", "Print the completion script of a shell."),
}
"""Name → where it is, and one line for `maskwright --help`."""


@click.group(
    cls=LazyGroup,
    commands_table=COMMANDS,
    params=global_options(),
    epilog="\b\nExamples:\n  maskwright list '*mae*'\n  maskwright show random\n  maskwright pretrain --strategy random --objective mae",
)
@click.version_option(__version__, message="maskwright %(version)s")
def cli() -> None:
    """One registry for masking in deep learning: mask strategies, objectives, pruners and samplers as plugins.

    Listing, info and completion never run a plugin's code; using a component imports its plugin.
    """


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 asked wrongly, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without a character shows "?" in its place
            stream.reconfigure(errors="replace")
    cli.main(prog_name="maskwright")


__all__ = ["COMMANDS", "Session", "cli", "main"]
