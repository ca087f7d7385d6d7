"""Small text pictures of masks, for falsifying examples and the terminal."""

from __future__ import annotations

from torch import Tensor

from maskwright.mask import AttentionMask, Mask

VISIBLE, HIDDEN = "■", "·"


def picture(mask: Mask, *, rows: int = 3, height: int = 16, width: int = 76) -> str:
    """The first rows of a mask side by side, ■ = visible, · = hidden; what does not fit is cut off with an ellipsis.

    A mask of one axis is a line; of three, its first frames lie side by side; an attention rule is drawn as its
    first head, queries downwards.
    """
    keep = mask.keep.cpu()
    if isinstance(mask, AttentionMask):
        blocks = [("row 0, head 0" if len(keep) > 1 else "queries ↓ keys →", keep[0, 0])]
    elif keep.ndim <= 2:
        lines = [
            f"row {index} {_line(row, width - 8)}"
            for index, row in enumerate(keep.reshape(len(keep), -1)[:rows])
        ]
        return "\n".join(lines + ["…"] * (len(keep) > rows))
    elif keep.ndim == 3:
        blocks = [(f"row {index}", row) for index, row in enumerate(keep[:rows])]
    else:
        frames = keep[0].reshape(-1, *keep.shape[-2:])
        blocks = [(f"row 0, frame {index}", frame) for index, frame in enumerate(frames[: rows + 1])]
    return _beside(blocks, height, width)


def _line(row: Tensor, width: int) -> str:
    cells = "".join(VISIBLE if seen else HIDDEN for seen in row.tolist())
    return cells if len(cells) <= width else cells[: width - 1] + "…"


def _beside(blocks: list[tuple[str, Tensor]], height: int, width: int) -> str:
    columns: list[list[str]] = []
    free = width
    for title, grid in blocks:
        need = max(len(title), min(grid.shape[1], width))
        if columns and need > free:
            break
        lines = [title, *(_line(row, width) for row in grid[:height]), *(["…"] * (len(grid) > height))]
        columns.append([line.ljust(need) for line in lines])
        free -= need + 3
    return "\n".join("   ".join(lines).rstrip() for lines in zip(*columns))
