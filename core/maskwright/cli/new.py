"""`maskwright new`."""

from __future__ import annotations

import click

from maskwright.cli.session import Session, pass_session
from maskwright.registry import KINDS


@click.command(epilog="\b\nExample:\n  maskwright new my-mask --kind mask-strategy")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), required=True, help="What it is to offer.")
@click.option(
    "--dir", "directory", default=".", metavar="D", help="Where its folder is made (default: here)."
)
@pass_session
def new(session: Session, name: str, kind: str, directory: str) -> None:
    """Write a complete plugin, ready to be installed, checked, tested and published.

    NAME is kebab-case; the distribution and its component are called so. The folder has a small working method of its kind:
    replace it with yours.
    """
    from maskwright import scaffold

    folder = scaffold.write(name, kind, directory, session.registry)
    click.echo(
        f"{folder} has a complete plugin. Its method is in {name.replace('-', '_')}/{scaffold.MODULES[kind]}.py.\n"
        f"\n"
        f"  maskwright install -e {folder}\n"
        f"  maskwright check {name}          does it behave?\n"
        f"  python -m pytest {folder}     its tests\n"
        f"  maskwright verify {name}         its claim: write it in claim.py first"
    )
