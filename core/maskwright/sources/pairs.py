"""Pairs of images in a user's folder: two files that show one scene."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import torch

from maskwright.errors import BadData
from maskwright.sources.decoding import SUFFIXES
from maskwright.sources.folders import ImageFiles
from maskwright.sources.found import Found

KINDS = ("auto", "crops", "pairs")
"""Where second views come from: pairs of files where all images are in pairs, otherwise crops; or always one of the two."""

LIST = "pairs.txt"
"""A file with a pair of paths a line, in the user's folder."""

ENDINGS = (("_1", "_2"), ("_a", "_b"), ("_left", "_right"))
"""How the names of a pair's first and second file end, before the suffix."""


def with_partners(found: Found, kind: str) -> Found:
    """The same in pairs, with `others`, where a folder's images are in pairs; `kind` is "auto" or "pairs".

    A pair is a line of pairs.txt, or two files of one folder whose names differ in their ending only: scene_1.jpg and
    scene_2.jpg. Raises `BadData` for a list that does not fit, and where "pairs" are asked for, or most images have a partner,
    and some have none.
    """
    if not isinstance(found.items, ImageFiles):
        if kind == "pairs":
            raise BadData(
                f"{found.path} is {found.kind}; pairs of images are found in folders of image files only."
            )
        return found
    names = [found.items.name(index) for index in range(len(found.items))]
    listing = found.items.folder / LIST
    if listing.is_file():
        pairs = _listed(listing, names, found)
        remark = f"as {LIST} has them"
    else:
        pairs, ending = _by_name([*names, *found.damage])
        paired = {name for pair in pairs for name in pair}
        alone = [name for name in (*names, *found.damage) if name not in paired]
        if alone and (kind == "pairs" or 2 * len(alone) <= len(names)):
            raise BadData(_not_all(found, pairs, alone))
        if alone:
            return found
        remark = f"{ending[0]} and {ending[1]}"
    place = {name: index for index, name in enumerate(names)}
    readable = [(place[first], place[second]) for first, second in pairs if {first, second} <= place.keys()]
    if not readable:
        raise BadData(
            f"Of the {len(pairs)} pairs of images in {found.path} there is none of which both can be read."
        )
    first, second = torch.tensor(readable).unbind(1)
    files = found.items
    return attrs.evolve(
        found,
        kind="pairs of images",
        remark="; ".join(filter(None, (found.remark, remark))),
        items=attrs.evolve(files, paths=[files.paths[index] for index in first.tolist()]),
        others=attrs.evolve(files, paths=[files.paths[index] for index in second.tolist()]),
        labels=found.labels[first],
        held_out=None if found.held_out is None else found.held_out[first],
    )


def _by_name(names: Sequence[str]) -> tuple[list[tuple[str, str]], tuple[str, str]]:
    """The pairs under the ending that makes most of them, and that ending."""
    best: list[tuple[str, str]] = []
    chosen = ENDINGS[0]
    stems = {str(Path(name).with_suffix("")): name for name in names}
    for ending in ENDINGS:
        pairs = [
            (name, stems[stem.removesuffix(ending[0]) + ending[1]])
            for stem, name in stems.items()
            if stem.endswith(ending[0]) and stem.removesuffix(ending[0]) + ending[1] in stems
        ]
        if len(pairs) > len(best):
            best, chosen = pairs, ending
    return best, chosen


def _not_all(found: Found, pairs: Sequence[tuple[str, str]], alone: Sequence[str]) -> str:
    shown = ", ".join(alone[:3]) + (", …" if len(alone) > 3 else "")
    endings = ", ".join(" and ".join(ending) for ending in ENDINGS)
    return (
        f"{found.path} has {len(pairs)} pairs of images, and {len(alone)} images without a partner ({shown}). Name both files of "
        f"a scene alike but for an ending ({endings}), list the pairs in {LIST}, or set data.views to 'crops' for two crops of "
        "each image."
    )


def _listed(listing: Path, names: Sequence[str], found: Found) -> list[tuple[str, str]]:
    """The pairs of a list: two paths a line, inside the folder, with a tab or spaces between; # begins a comment."""
    known = {*names, *found.damage}
    pairs = []
    for number, line in enumerate(listing.read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = [part.strip() for part in (line.split("\t") if "\t" in line else line.split())]
        if len(parts) != 2:
            raise BadData(
                f"{listing}, line {number}: {line.strip()!r} must be two paths with a tab or spaces between "
                "(a tab where names have spaces)."
            )
        first, second = (str(Path(part)) for part in parts)
        for name in (first, second):
            # An image of a split that is left alone is there, and no use.
            elsewhere = (listing.parent / name).is_file() and Path(name).suffix.lower() in SUFFIXES
            if name not in known and not elsewhere:
                raise BadData(f"{listing}, line {number}: there is no image {name!r} in {found.path}.")
        pairs.append((first, second))
    if not pairs:
        raise BadData(f"{listing} lists no pairs: two paths a line, with a tab or spaces between.")
    return pairs
