"""Pictures by index: in memory, or decoded from files, tar members and tables when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import attrs
import torch
from torch import Tensor

from maskwright.errors import BadData
from maskwright.sources.decoding import decode, in_words
from maskwright.sources.views import Views

if TYPE_CHECKING:
    from PIL import Image

_CACHE_BYTES = 512 * 2**20


class Pictures(Protocol):
    """Pictures by index: `take(indices [B])` gives B images of Pillow in mode RGB or L, and their labels [B].

    `damage` says of each thing that could not be read, as far as it was looked at, why not.
    """

    @property
    def damage(self) -> Mapping[str, str]: ...

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> tuple[Sequence[Image.Image], Tensor]: ...


@attrs.frozen(eq=False)
class Collection:
    """What a source is made of: `parts` "train" and "held_out", how a sample of them is cut out, and what labels mean.

    `mean` and `std` are one number a channel, for pixels in [0, 1]. `label` says in words what a label is and who made it.
    """

    name: str
    parts: Mapping[str, Pictures]
    views: Views
    fixed: Views
    classes: Sequence[str]
    label: str
    mean: Sequence[float]
    std: Sequence[float]


class Stack:
    """Pictures in memory, as `count` samples that take turns among them: sample i shows picture i mod their number."""

    damage: Mapping[str, str] = {}

    def __init__(self, images: Sequence[Image.Image], labels: Tensor, count: int | None = None) -> None:
        self.images = images
        self.labels = labels
        self.count = len(images) if count is None else count

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Tensor) -> tuple[Sequence[Image.Image], Tensor]:
        turns = indices % len(self.images)
        return [self.images[turn] for turn in turns.tolist()], self.labels[turns]


class Items(Protocol):
    """Encoded images by number: a name for people, and the file or its bytes."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def open(self, index: int) -> Path | BinaryIO: ...


class Encoded:
    """Some of a user's images (`chosen` among `items`), decoded by threads when asked for, kept while half a gigabyte lasts.

    One that turns out to be damaged is noted in `damage`, and the next readable one of those chosen stands in for it, always
    the same one. Pictures are shrunk until their shorter side has at most `enough` pixels.
    """

    def __init__(
        self,
        items: Items,
        chosen: Tensor,
        labels: Tensor,
        *,
        channels: int,
        enough: int,
        damage: MutableMapping[str, str],
    ) -> None:
        self.items = items
        self.chosen = chosen
        self.labels = labels[chosen]
        self.channels = channels
        self.enough = enough
        self.damage = damage
        self._damaged: set[int] = set()
        self._kept: dict[int, Image.Image] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: Tensor) -> tuple[Sequence[Image.Image], Tensor]:
        found = self.found(indices)
        return [picture for _, picture in found], self.labels[[index for index, _ in found]]

    def found(self, indices: Tensor) -> list[tuple[int, Image.Image]]:
        """For each index the picture, and the index that it really has."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            found = list(threads.map(self._nearest_readable, indices.tolist()))
        for index, picture in found:
            size = picture.width * picture.height * self.channels
            if index not in self._kept and self._kept_bytes + size <= _CACHE_BYTES:
                self._kept[index] = picture
                self._kept_bytes += size
        return found

    def readable(self) -> bool:
        """Whether there is any picture that can be decoded; as many are tried as it takes."""
        try:
            self.take(torch.tensor([0]))
        except BadData:
            return False
        return True

    def _nearest_readable(self, index: int) -> tuple[int, Image.Image]:
        for candidate in (*range(index, len(self)), *range(index)):
            if candidate in self._kept:
                return candidate, self._kept[candidate]
            if candidate in self._damaged:
                continue
            item = int(self.chosen[candidate])
            try:
                return candidate, decode(self.items.open(item), self.channels, self.enough)
            except Exception as error:  # decoders of damaged files raise what they like
                self._damaged.add(candidate)
                self.damage[self.items.name(item)] = in_words(error)
        raise BadData(f"None of {len(self)} images can be decoded any more, such as {self._example()}.")

    def _example(self) -> str:
        name = self.items.name(int(self.chosen[0]))
        return f"{name} ({self.damage[name]})"


class Paired:
    """Pairs of a user's images: the i-th of `first` and the i-th of `second` show one scene.

    Where either of them turns out to be damaged, the next pair that can be read stands in for both.
    """

    def __init__(self, first: Encoded, second: Encoded) -> None:
        self.first = first
        self.second = second

    @property
    def chosen(self) -> Tensor:
        """The items that the first pictures are, int64 [N]."""
        return self.first.chosen

    @property
    def damage(self) -> Mapping[str, str]:
        """Of both, which share it."""
        return self.first.damage

    def __len__(self) -> int:
        return len(self.first)

    def take(self, indices: Tensor) -> tuple[Sequence[Image.Image], Tensor]:
        """The first pictures and their labels."""
        first, _, labels = self.take_both(indices)
        return first, labels

    def take_both(self, indices: Tensor) -> tuple[Sequence[Image.Image], Sequence[Image.Image], Tensor]:
        """First and second pictures, and labels int64 [B]. Raises `BadData` when no pair is left whole."""
        for _ in range(len(self) + 1):
            sides = [side.found(indices) for side in (self.first, self.second)]
            places = [torch.tensor([place for place, _ in side], dtype=torch.int64) for side in sides]
            if bool((places[0] == indices).all() and (places[1] == indices).all()):
                first, second = ([picture for _, picture in side] for side in sides)
                return first, second, self.first.labels[indices]
            indices = torch.where(places[0] != indices, places[0], places[1])
        raise BadData(f"Of {len(self)} pairs of images there is none of which both can be decoded.")

    def readable(self) -> bool:
        """Whether there is any pair that can be decoded."""
        try:
            self.take(torch.tensor([0]))
        except BadData:
            return False
        return True
