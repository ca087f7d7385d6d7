"""What was found at a path that a user gave, and how it is parted into training and held-out images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from maskwright.errors import BadData
from maskwright.sources.embedded import HELD_OUT, normalisation
from maskwright.sources.pictures import Collection, Encoded, Items, Paired
from maskwright.sources.views import centre_square, random_resized_crops, shifted_squares

TRAINING = ("train", "training")
HOLDING_OUT = ("validation", "valid", "val", "dev", "held-out", "held_out", "test", "testing", "eval")
"""Names of a user's splits, those preferred first."""


@attrs.frozen(eq=False)
class Found:
    """A user's images, with labels int64 [N] and their `classes` where there are any.

    `others`, where images are in pairs, are as many more, which show the scenes of the first ones.
    `kind` says what was recognised, `held_out` (bool [N]) which ones the user keeps from training: without it one image in
    five of each class is held out. `damage` says what could not be read so far, and why; `remark` what else is worth saying.
    """

    path: str
    kind: str
    items: Items
    labels: Tensor
    classes: Sequence[str]
    label: str
    held_out: Tensor | None = None
    others: Items | None = None
    damage: MutableMapping[str, str] = attrs.field(factory=dict)
    remark: str = ""


def collection(found: Found, size: int, channels: int) -> Collection:
    """Random crops for training, the middle square for evaluation. Crops of pairs are larger: both show the same things."""
    crops = (
        random_resized_crops(least=0.2, most=1.0, mirror=True) if found.others is None else shifted_squares
    )
    return Collection(
        name=f"{found.path} ({'; '.join(filter(None, (found.kind, found.remark)))})",
        parts=_parts(found, channels, 2 * size),
        views=crops,
        fixed=centre_square,
        classes=found.classes,
        label=found.label,
        **normalisation(channels),
    )


def _parts(found: Found, channels: int, enough: int) -> dict[str, Encoded | Paired]:
    """ "train" and "held_out", each with at least one image that can be decoded.

    Where all of a part that was chosen here are damaged, the rest is parted again. Raises `BadData` where nothing is left.
    """
    usable = torch.arange(len(found.items))
    while len(usable):
        held_out = _held_out(found.labels[usable]) if found.held_out is None else found.held_out[usable]
        train = ~held_out if len(usable) > 1 else held_out
        parts = {
            split: _part(found, usable[chosen], channels, enough)
            for split, chosen in (("train", train), ("held_out", held_out))
        }
        broken = [part for part in parts.values() if not part.readable()]
        if not broken:
            return parts
        if found.held_out is not None:
            break
        usable = usable[~torch.isin(usable, torch.cat([part.chosen for part in broken]))]
    raise BadData(
        f"None of the {len(found.items)} images in {found.path} can be read{examples(found.damage)}"
        if not len(usable)
        else f"A split of {found.path} ({found.remark}) has no image that can be read{examples(found.damage)}"
    )


def _part(found: Found, chosen: Tensor, channels: int, enough: int) -> Encoded | Paired:
    first, *second = (
        Encoded(items, chosen, found.labels, channels=channels, enough=enough, damage=found.damage)
        for items in (found.items, found.others)
        if items is not None
    )
    return Paired(first, second[0]) if second else first


def examples(damage: Mapping[str, str], count: int = 3) -> str:
    """`: a.jpg (it is no image), b.jpg (…) and 7 more.`"""
    shown = [f"{name} ({reason})" for name, reason in sorted(damage.items())[:count]]
    more = f" and {len(damage) - count} more" if len(damage) > count else ""
    return f": {', '.join(shown)}{more}." if shown else "."


def _held_out(labels: Tensor) -> Tensor:
    """bool [N]: each label's fifth, tenth, ... image; the last of all where that is none or all."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    first = counts.cumsum(0) - counts
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels)) - first[labels[order]]
    held_out = place % HELD_OUT == HELD_OUT - 1
    if bool(held_out.all()) or not bool(held_out.any()):
        held_out = torch.arange(len(labels)) == len(labels) - 1
    return held_out


def chosen_splits(names: Iterable[str]) -> tuple[str, str] | None:
    """Of the names of splits, the one to train on and the one to hold out; None where these are not both there."""
    there = {name.lower(): name for name in names}
    train = [there[word] for word in TRAINING if word in there]
    held_out = [there[word] for word in HOLDING_OUT if word in there]
    return (train[0], held_out[0]) if train and held_out else None


def says_splits(used: tuple[str, str], names: Iterable[str]) -> str:
    """Which splits are used for what, and which are left alone."""
    rest = sorted(set(names) - set(used))
    alone = f", {', '.join(map(repr, rest))} left alone" if rest else ""
    return f"trained on {used[0]!r}, held out {used[1]!r}{alone}"


def labelled(names: Sequence[str], *, numbers: bool = False) -> tuple[Tensor, list[str]]:
    """Labels int64 [N] by name → numbers, and the classes in order: by letters, or as `numbers` where all are such."""
    numeric = numbers and all(name.removeprefix("-").isdecimal() for name in names)
    classes = sorted(set(names), key=int) if numeric else sorted(set(names))
    place = {name: index for index, name in enumerate(classes)}
    return torch.tensor([place[name] for name in names], dtype=torch.int64), classes


def is_split(name: str) -> bool:
    """Whether this is what a split is called."""
    return name.lower() in TRAINING + HOLDING_OUT


def listed(paths: Iterable[Path]) -> str:
    """What kinds of files there are, the most frequent first: `12 .parquet, 3 .txt`."""
    counts: dict[str, int] = {}
    for path in paths:
        kind = path.suffix.lower() or "without a suffix"
        counts[kind] = counts.get(kind, 0) + 1
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in most[:4]) + (", …" if len(most) > 4 else "")
