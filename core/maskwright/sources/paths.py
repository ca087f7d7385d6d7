"""What a path that a user gave is: a folder of images, tar shards, or a saved dataset."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from maskwright.errors import BadData, did_you_mean
from maskwright.sources import EMBEDDED_IMAGES
from maskwright.sources.decoding import SUFFIXES
from maskwright.sources.folders import image_folder
from maskwright.sources.found import Found, listed
from maskwright.sources.shards import expanded, tar_shards
from maskwright.sources.tables import is_saved, saved_dataset

LEGAL = (
    "Give a folder of images, WebDataset tar shards (their folder, one .tar, or a pattern such as train-{000..041}.tar), a "
    "Hugging Face dataset that save_to_disk wrote, "
    + ", ".join(map(repr, EMBEDDED_IMAGES[:-1]))
    + f" or {EMBEDDED_IMAGES[-1]!r}."
)


def look(source: str) -> Found:
    """Recognise what is at a path. Raises `BadData`, which says what was found and what is legal."""
    path = Path(source)
    if path.is_dir():
        return saved_dataset(path) if is_saved(path) else _folder(path)
    if path.name.lower().endswith(".tar"):
        return tar_shards(source, expanded(source))
    raise BadData(f"{_no_folder(path)} {LEGAL}")


def _no_folder(path: Path) -> str:
    if not path.exists():
        return f"The image folder {path} does not exist.{did_you_mean(str(path), EMBEDDED_IMAGES)}"
    name = path.name.lower()
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        return f"The shards of {path} are compressed and cannot be read at random: unpack them into plain .tar files first."
    if path.suffix.lower() in SUFFIXES:
        return f"{path} is no folder but one image."
    return f"{path} is no folder, and no kind of file that is known here."


def _folder(folder: Path) -> Found:
    files = list(_files(folder))
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    shards = [path for path in files if path.suffix.lower() == ".tar"]
    if images:
        return image_folder(folder, images)
    if shards:
        return tar_shards(str(folder), shards)
    suffixes = ", ".join(suffix[1:] for suffix in SUFFIXES)
    inside = f"it holds {listed(files)}" if files else "it is empty"
    raise BadData(
        f"The image folder {folder} has no images ({suffixes}) and no .tar shards: {inside}. {LEGAL}"
    )


def _files(folder: Path) -> Iterable[Path]:
    """All files below a folder in the order of their paths, without hidden ones (`.cache/…`, `._photo.jpg`)."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path
