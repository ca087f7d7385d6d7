"""`maskwright show`: a strategy's mask in the terminal, or in a PNG."""

from __future__ import annotations

from pathlib import Path

import click

from maskwright.cli.completion import component_names
from maskwright.cli.session import Session, pass_session
from maskwright.cli.tables import width
from maskwright.cli.values import Grid, set_option, settings_of
from maskwright.errors import OutputError, UsageError


@click.command(
    epilog="\b\nExamples:\n  maskwright show random --set ratio=0.9\n  maskwright show block --grid 24x24 --image cat.jpg --out mask.png"
)
@click.argument("strategy", shell_complete=component_names("mask-strategy"))
@set_option("A parameter of the strategy, such as ratio=0.5. May be repeated.")
@click.option("--grid", type=Grid(), metavar="HxW", help="What is masked: 14x14, 8x14x14, 128, …")
@click.option("--image", type=click.Path(path_type=Path), metavar="FILE", help="Draw on this photograph.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.png", help="Write a picture as well.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Another mask.")
@click.option(
    "--progress",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Share of the training done, for strategies that change.",
)
@pass_session
def show(
    session: Session,
    strategy: str,
    pairs: tuple[str, ...],
    grid: tuple[int, ...] | None,
    image: Path | None,
    out: Path | None,
    seed: int,
    progress: float,
) -> None:
    """Draw one mask of STRATEGY: filled is visible, empty is hidden.

    A strategy that needs signals gets made-up ones, and the output says which.
    """
    if out is not None and out.suffix.lower() != ".png":
        raise UsageError(f"--out {out} must be a .png file.")
    component = session.registry.create("mask-strategy", strategy, **settings_of(pairs))

    from maskwright.jobs import pictures
    from maskwright.jobs.demonstration import demonstrate
    from maskwright.mask import write_whole

    drawn = demonstrate(component, grid=grid, image=image, progress=progress, seed=seed)
    click.echo(drawn.text(min(width() or 100, 128)))
    removed = float(drawn.mask.removed_ratio[0])
    shape = " × ".join(map(str, drawn.mask.shape[1:]))
    click.echo(f"{component!r} on {shape}: {removed:.1%} hidden (seed {seed}, progress {progress:g})")
    for remark in drawn.remarks:
        click.echo(f"  {remark}")
    if out is not None:
        try:
            write_whole(out, pictures.png(drawn.image()))
        except OSError as error:
            raise OutputError(f"The picture {out} cannot be written: {error.strerror or error}.") from error
        click.echo(f"wrote {out}")
