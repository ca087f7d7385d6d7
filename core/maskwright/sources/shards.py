"""WebDataset: tar shards of samples, read at random by an index of where their members lie.

Which members form a sample, and what a pattern of shards such as `train-{000..041}.tar` means, is the package webdataset's
own rule. Its streams are not used: a sample must be found by its number, for a run to be resumed and to be divided among
processes without a change of its numbers. So only headers are read at first, and pixels when they are needed.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import torch

from maskwright.errors import BadData
from maskwright.sources.decoding import SUFFIXES, in_words
from maskwright.sources.found import Found, chosen_splits, examples, is_split, labelled, says_splits

MISSING = (
    "{path} is WebDataset shards, which need the package webdataset: pip install 'maskwright[webdataset]' "
    "(or unpack the shards into a folder of images)."
)

_META = re.compile(r"__[^/]*__($|/)")
"""Members that describe the shard, not a sample."""

Member = tuple[int, int]
"""Where a member's bytes begin in its shard, and how many they are."""


@attrs.frozen(eq=False)
class Shard:
    """One tar file: its name for people, and the split that its name says, or none."""

    path: Path
    name: str
    split: str

    def bytes(self, member: Member) -> bytes:
        """The file is opened anew each time, so that threads and processes share no position."""
        with self.path.open("rb") as file:
            file.seek(member[0])
            return file.read(member[1])


@attrs.frozen(eq=False)
class TarMembers:
    """Images inside tar files."""

    shards: Sequence[Shard]
    names: list[str] = attrs.field(factory=list)
    places: list[tuple[int, Member]] = attrs.field(factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The shard and the member: `train-000.tar: 17.jpg`."""
        return f"{self.shards[self.places[index][0]].name}: {self.names[index]}"

    def open(self, index: int) -> BinaryIO:
        """The member's bytes."""
        shard, member = self.places[index]
        return io.BytesIO(self.shards[shard].bytes(member))


def expanded(pattern: str) -> list[Path]:
    """The shards that `train-{000..041}.tar` means, or the one file. Raises `BadData` for those that are missing."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise BadData(MISSING.format(path=pattern)) from None
    shards = [Path(one) for one in expand_urls(pattern)]
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise BadData(
            f"{pattern}: {len(missing)} of {len(shards)} shards are not there, such as {missing[0]}."
            if len(shards) > 1
            else f"The tar shard {pattern} does not exist."
        )
    return shards


def tar_shards(path: str, files: Sequence[Path]) -> Found:
    """The samples of some shards: an image each, and its label from the `.cls` or the "label" of the `.json` beside it.

    They are in the order in which the shards are given. Where every shard's name or folder begins with the name of a split
    (`train-000.tar`, `val/000.tar`), these are the splits. Raises `BadData` without the package webdataset, and where no sample
    has an image.
    """
    damage: dict[str, str] = {}
    shards = _shards(files)
    names = {shard.split for shard in shards}
    splits = chosen_splits(names) if "" not in names else None
    if splits is not None:
        shards = [shard for shard in shards if shard.split in splits]
    items, labels, held_out = TarMembers(shards), [], []
    for number, shard in enumerate(shards):
        for sample in _samples(path, shard, damage):
            image = next((ext for ext in sample if f".{ext.rpartition('.')[2]}" in SUFFIXES), None)
            if image is not None:
                items.names.append(f"{sample['__key__']}.{image}")
                items.places.append((number, sample[image]))
                labels.append(_label(shard, sample))
                held_out.append(splits is not None and shard.split == splits[1])
    if not len(items):
        raise BadData(
            f"The tar shards of {path} ({len(shards)}) have no sample with an image "
            f"({', '.join(suffix[1:] for suffix in SUFFIXES)}){examples(damage)}"
        )
    without = labels.count(None)
    remarks = [says_splits(splits, names)] if splits is not None else []
    if 0 < without < len(labels):
        remarks.append(f"no labels, as {without} of {len(labels)} samples have none")
    numbers, classes = labelled(["" if without else str(label) for label in labels], numbers=True)
    return Found(
        path=path,
        kind=f"WebDataset, {len(files)} tar shard{'s' if len(files) > 1 else ''}",
        items=items,
        labels=numbers,
        classes=classes,
        label="each sample's .cls or .json",
        held_out=torch.tensor(held_out) if splits is not None else None,
        damage=damage,
        remark="; ".join(remarks),
    )


def _shards(files: Sequence[Path]) -> list[Shard]:
    """Named by their paths inside the folder that has them all."""
    root = os.path.commonpath([file.parent for file in files])
    shards = []
    for file in files:
        words = re.split(r"[^A-Za-z]", file.name)[0].lower(), file.parent.name.lower()
        shards.append(Shard(file, os.path.relpath(file, root), next(filter(is_split, words), "")))
    return shards


def _samples(path: str, shard: Shard, damage: MutableMapping[str, str]) -> list[dict[str, Any]]:
    """A shard's samples: `__key__`, and a `Member` by each lower-case extension. The last of a broken shard is left out."""
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError:
        raise BadData(MISSING.format(path=path)) from None

    def twice(error: Exception) -> bool:
        damage[f"{shard.name}: {str(error.args[0]).partition(':')[0]}"] = "the shard has this name twice"
        return True

    members = ({"fname": name, "data": place, "__url__": ""} for name, place in _members(shard, damage))
    samples = list(group_by_keys(members, handler=twice))
    if shard.name in damage:
        samples = samples[:-1]
        damage[shard.name] += f"; {len(samples)} samples before that are used"
    return samples


def _members(shard: Shard, damage: MutableMapping[str, str]) -> Iterator[tuple[str, Member]]:
    """A shard's files in order. That it breaks off, or is no tar file, is noted."""
    size, end = shard.path.stat().st_size, 0
    try:
        with tarfile.open(shard.path, "r:") as tar:
            while (member := tar.next()) is not None:
                end = member.offset_data + member.size
                if end > size:
                    break
                if member.isreg() and not _META.match(member.name):
                    yield member.name, (member.offset_data, member.size)
            else:
                end = tar.offset
    except tarfile.ReadError as error:
        if not end:
            said = f"it is no tar file ({in_words(error)}); a compressed one is to be unpacked first"
            damage[shard.name] = said
            return
        end = size
    # A whole archive ends with zeros, which the reader does not ask for.
    following = shard.bytes((end, tarfile.BLOCKSIZE))
    if len(following) < tarfile.BLOCKSIZE:
        damage[shard.name] = "it breaks off"
    elif any(following):
        damage[shard.name] = f"byte {end} is no header of a member"


def _label(shard: Shard, sample: Mapping[str, Any]) -> int | str | None:
    """Of a sample, or None where it has none that can be read."""
    try:
        if "cls" in sample:
            return shard.bytes(sample["cls"]).decode("utf-8").strip() or None
        if "json" in sample:
            label = json.loads(shard.bytes(sample["json"])).get("label")
            return label if isinstance(label, str | int) else None
    except (ValueError, AttributeError):  # no UTF-8, no JSON, no object
        pass
    return None
