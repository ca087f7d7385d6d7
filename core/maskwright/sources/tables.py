"""Hugging Face datasets that `save_to_disk` wrote: a Dataset, or a DatasetDict with splits."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import torch
from torch import Tensor

from maskwright.errors import BadData
from maskwright.sources.decoding import in_words
from maskwright.sources.found import Found, chosen_splits, labelled, says_splits

LABELS = ("label", "labels", "fine_label", "class", "category")
"""Columns of numbers or texts that are taken for labels where no column is a ClassLabel."""


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made a folder."""
    whole = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    return whole or (folder / "dataset_dict.json").is_file()


@attrs.frozen(eq=False)
class Rows:
    """The images of one column, of one or several splits, one after the other."""

    splits: Mapping[str, Any]
    column: str

    def __len__(self) -> int:
        return sum(len(table) for table in self.splits.values())

    def _place(self, index: int) -> tuple[str, int]:
        for name, table in self.splits.items():
            if index < len(table):
                return name, index
            index -= len(table)
        raise IndexError(index)

    def name(self, index: int) -> str:
        """The split and the row, and the file that the row was made from where that is known: `train[17] (cat.jpg)`."""
        split, row = self._place(index)
        path = (self.splits[split][row][self.column] or {}).get("path")
        return f"{split}[{row}]" + (f" ({Path(path).name})" if path else "")

    def open(self, index: int) -> Path | BinaryIO:
        """The row's bytes, or the file that it names."""
        split, row = self._place(index)
        cell = self.splits[split][row][self.column]
        if cell is None:
            raise ValueError("the row is empty")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"])


def saved_dataset(folder: Path) -> Found:
    """The images of a saved dataset, of its training split and the one that is to be held out where it has several.

    Raises `BadData` without the package datasets, for a folder that it cannot read, and where no column holds images.
    """
    try:
        import datasets
    except ImportError:
        raise BadData(
            f"{folder} is a saved Hugging Face dataset, which needs the package datasets: pip install 'maskwright[datasets]'."
        ) from None
    try:
        read = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets raise what they like
        raise BadData(f"The saved dataset {folder} cannot be read: {in_words(error)}.") from error
    tables = dict(read) if isinstance(read, datasets.DatasetDict) else {str(read.split or "rows"): read}
    splits = chosen_splits(tables)
    if splits is None and len(tables) > 1:
        raise BadData(
            f"The saved dataset {folder} has the splits {', '.join(map(repr, tables))}; two of them must be named 'train' and "
            "'validation' or 'test', or there must be one alone."
        )
    remark = says_splits(splits, tables) if splits is not None else ""
    tables = {name: tables[name] for name in splits or tables}
    features = next(iter(tables.values())).features
    image, label = (
        _image_column(folder, features, datasets.Image),
        _label_column(features, datasets.ClassLabel),
    )
    numbers, classes, unlabelled = _labels(tables.values(), label, features)
    rows = {
        name: table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        for name, table in tables.items()
    }
    return Found(
        path=str(folder),
        kind=f"a saved Hugging Face dataset, column {image!r}",
        items=Rows(rows, image),
        labels=numbers,
        classes=classes,
        label=f"the column {label!r}",
        held_out=_second(tables) if splits is not None else None,
        remark="; ".join(filter(None, (remark, unlabelled))),
    )


def _image_column(folder: Path, features: Mapping[str, Any], kind: type) -> str:
    """The column of images: the one called "image" or "img" where there are several, else the first."""
    columns = [name for name, feature in features.items() if isinstance(feature, kind)]
    if not columns:
        there = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items()) or "none"
        raise BadData(
            f"The saved dataset {folder} has no column of images; its columns are {there}. "
            "Make it one with cast_column(NAME, datasets.Image()) before save_to_disk."
        )
    return next((name for name in ("image", "img") if name in columns), columns[0])


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", "") or type(feature).__name__)


def _label_column(features: Mapping[str, Any], kind: type) -> str | None:
    """A ClassLabel, or else whole numbers or texts in a column that is called as labels are."""
    named = [name for name, feature in features.items() if isinstance(feature, kind)]
    plain = [
        name for name in LABELS if name in features and _kind(features[name]).startswith(("int", "string"))
    ]
    return next((name for name in LABELS if name in named), next(iter([*named, *plain]), None))


def _labels(
    tables: Iterable[Any], column: str | None, features: Mapping[str, Any]
) -> tuple[Tensor, Sequence[str], str]:
    """Labels int64 [N], their classes, and what is to be said of them."""
    if column is None:
        count = sum(len(table) for table in tables)
        return torch.zeros(count, dtype=torch.int64), ("",), ""
    values = [value for table in tables for value in table.select_columns([column])[:][column]]
    without = sum(value is None or (isinstance(value, int) and value < 0) for value in values)
    if without:
        said = f"no labels, as {without} of {len(values)} rows have none in {column!r}"
        return torch.zeros(len(values), dtype=torch.int64), ("",), said
    names = getattr(features[column], "names", None)
    if names is not None:
        return torch.tensor(values, dtype=torch.int64), list(names), ""
    return *labelled([str(value) for value in values], numbers=True), ""


def _second(tables: Mapping[str, Any]) -> Tensor:
    """bool [N]: the rows of the second of two tables."""
    first, second = map(len, tables.values())
    return torch.arange(first + second) >= first
