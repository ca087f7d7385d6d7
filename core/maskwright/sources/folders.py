"""A folder of images, with sub-folders as labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import torch

from maskwright.errors import BadData
from maskwright.sources.decoding import why_not
from maskwright.sources.found import Found, chosen_splits, is_split, labelled, says_splits


@attrs.frozen(eq=False)
class ImageFiles:
    """Image files below a folder."""

    folder: Path
    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path inside the folder."""
        return str(self.paths[index].relative_to(self.folder))

    def open(self, index: int) -> Path:
        """Pillow opens it."""
        return self.paths[index]


def image_folder(folder: Path, files: Sequence[Path]) -> Found:
    """Every image of a folder and its sub-folders, whose names are labels when all images lie in them.

    Where the first sub-folders are named as splits are (`train/` and `val/`, say), the next ones are the labels.
    Raises `BadData` when not one file begins as an image does.
    """
    damage = {str(path.relative_to(folder)): said for path in files if (said := why_not(path)) is not None}
    readable = [path for path in files if str(path.relative_to(folder)) not in damage]
    if not readable:
        name, said = next(iter(damage.items()))
        raise BadData(
            f"None of the {len(files)} files in {folder} is a readable image, such as {name} ({said})."
        )
    parts = [path.relative_to(folder).parts for path in readable]
    tops = {part[0] for part in parts if len(part) > 1}
    named = all(len(part) > 1 and is_split(part[0]) for part in parts)
    splits = chosen_splits(tops) if named else None
    held_out, remark = None, ""
    depth = 1 if named and (splits or len(tops) == 1) else 0
    if splits is not None:
        used = [index for index, part in enumerate(parts) if part[0] in splits]
        readable, parts = [readable[index] for index in used], [parts[index] for index in used]
        held_out = torch.tensor([part[0] == splits[1] for part in parts])
        remark = says_splits(splits, tops)
    in_folders = all(len(part) > depth + 1 for part in parts)
    labels, classes = labelled([part[depth] if in_folders else folder.name for part in parts])
    return Found(
        path=str(folder),
        kind="a folder of images",
        items=ImageFiles(folder, readable),
        labels=labels,
        classes=classes,
        label="the sub-folder",
        held_out=held_out,
        damage=damage,
        remark=remark,
    )
