"""`maskwright apply`: saved masks on a dense model."""

from __future__ import annotations

from pathlib import Path

import click

from maskwright.cli.tables import shown


@click.command(
    epilog="\b\nExamples:\n  maskwright apply ./llama runs/prune-1/masks.safetensors --out ./llama-sparse"
)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("masks", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Where the model goes."
)
def apply(model: Path, masks: Path, out: Path) -> None:
    """Set the weights of MODEL that lie outside MASKS to zero, and write the model to DIR.

    MODEL is a folder of safetensors, MASKS the masks.safetensors of a pruning. Weights inside the masks stay as they are in MODEL, bit
    for bit; files are rewritten shard by shard.
    """
    from maskwright.jobs.apply import apply_masks

    report = apply_masks(model, masks, out)
    click.echo(f"{report.sparsity:.2%} of {report.total:,} weights removed, in {len(report.layers)} tensors")
    click.echo(f"model  {shown(str(out))}")
