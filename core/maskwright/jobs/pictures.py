"""Pictures of masks, images, curves and reveal orders, for the terminal, for files and for report pages.

Everything is drawn in tones that read on white paper and on a dark page alike; backgrounds are transparent.
Pillow and matplotlib are imported when the first picture is made.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from maskwright.errors import MaskShapeError
from maskwright.mask import AttentionMask, Mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

HIDDEN = (0.60, 0.62, 0.65)
"""What lies over a hidden patch: red, green, blue in [0, 1]."""

KEPT_CELL = (59, 130, 196)
HIDDEN_CELL = (214, 219, 225)
OPPOSITE_CELL = (217, 119, 43)
FRAME = "#14171a"
INK = "#767c85"
"""Text and axes: contrast 4:1 or better on white and on near-black."""

COLOURS = ("#3b82c4", "#d9772b", "#3a9d6a", "#cf4d52", "#8a6fc9", "#9a7b4f", "#c65fa0", "#4aa3b5")


# -- images and masks ----------------------------------------------------------------------------------------


def picture(pixels: Tensor) -> Image.Image:
    """[C, H, W] in [0, 1] with 1 or 3 channels (or [H, W]) → an RGB image. Values outside are clipped."""
    from PIL import Image as Pillow

    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise MaskShapeError(f"A picture is [C, H, W] with 1 or 3 channels; got {list(pixels.shape)}.")
    values = pixels.detach().cpu().float().nan_to_num().clamp(0, 1).expand(3, -1, -1)
    return Pillow.fromarray((values * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def overlay(
    pixels: Tensor,
    mask: Tensor | Mask,
    hidden_colour: tuple[float, float, float] = HIDDEN,
    veil: float = 1.0,
) -> Image.Image:
    """The image with its hidden patches covered: pixels [C, H, W] in [0, 1], mask bool [h, w], True = visible.

    `veil` in [0, 1] is how opaque the cover is. The sides of the image must be whole multiples of the mask's.
    """
    keep = _plane(mask)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    seen = Mask(keep[None]).upsample((int(pixels.shape[-2]), int(pixels.shape[-1]))).keep[0]
    shown = pixels.detach().cpu().float().expand(3, -1, -1)
    cover = torch.tensor(hidden_colour).view(3, 1, 1)
    return picture(torch.where(seen.cpu(), shown, shown.lerp(cover, veil)))


def mask_image(mask: Tensor | Mask, cell: int = 12) -> Image.Image:
    """The mask itself, `cell` pixels a position: kept is blue, hidden is pale. [L], [h, w] or [T, h, w] (frames in a row)."""
    from PIL import Image as Pillow

    frames = _frames(mask)
    colours = torch.tensor([HIDDEN_CELL, KEPT_CELL], dtype=torch.uint8)
    line = max(cell // 8, 1) if cell >= 4 else 0
    images = []
    for frame in frames:
        painted = colours[frame.long()].repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        alpha = torch.full((*painted.shape[:2], 1), 255, dtype=torch.uint8)
        for offset in range(line):
            alpha[offset::cell] = 0
            alpha[:, offset::cell] = 0
        images.append(Pillow.fromarray(torch.cat([painted, alpha], 2).numpy()))
    return images[0] if len(images) == 1 else grid_of(images, columns=len(images), gap=cell)


def similarity_image(values: Tensor, chosen: tuple[int, int] | None = None, side: int = 160) -> Image.Image:
    """Cosines [h, w] in [-1, 1]: blue is alike, pale is unrelated, orange is opposite. The place `chosen` (row, column) is framed."""
    from PIL import ImageDraw

    low, middle, high = (torch.tensor(colour).float() for colour in (OPPOSITE_CELL, HIDDEN_CELL, KEPT_CELL))
    share = values.detach().cpu().float().nan_to_num().clamp(-1, 1)[..., None]
    painted = torch.where(share < 0, middle.lerp(low, -share), middle.lerp(high, share))
    image = enlarged(picture(painted.permute(2, 0, 1) / 255), side)
    if chosen is not None:
        cell = image.width // values.shape[1]
        top, left = chosen[0] * cell, chosen[1] * cell
        pen = ImageDraw.Draw(image)
        pen.rectangle(
            (left, top, left + cell - 1, top + cell - 1), outline=FRAME, width=max(1, round(cell / 10))
        )
    return image


def attention_image(mask: AttentionMask, side: int = 256, *, batch: int = 0, head: int = 0) -> Image.Image:
    """A rule as a heat map, queries downwards and keys to the right: the darker, the larger the attended share.

    At most `side` cells a side. A cell that stands for many positions is evaluated at 8 × 8 of them, evenly spread, so that
    a rule of any length is drawn in the same time.
    """
    from PIL import Image as Pillow

    rows, columns = min(side, mask.q_len), min(side, mask.kv_len)
    q, k = _spread(mask.q_len, rows), _spread(mask.kv_len, columns)
    b, h, q, k = (
        index.to(mask.device)
        for index in (torch.tensor(min(batch, mask.batch - 1)), torch.tensor(min(head, mask.heads - 1)), q, k)
    )
    attended = torch.as_tensor(mask.rule(b, h, q[:, None], k[None])).expand(len(q), len(k))
    share = attended.cpu().float().reshape(rows, len(q) // rows, columns, len(k) // columns).mean((1, 3))
    low, high = torch.tensor(HIDDEN_CELL).float(), torch.tensor(KEPT_CELL).float()
    painted = low.lerp(high, share[..., None]).round().byte()
    image = Pillow.fromarray(painted.numpy())
    return enlarged(image, side)


def _spread(length: int, cells: int) -> Tensor:
    """Positions at which `cells` cells are evaluated: as many a cell for all, at most 8, in order."""
    each = min(-(-length // cells), 8)
    count = cells * each
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * length / count).long()


def terminal_mask(mask: Tensor | Mask) -> str:
    """The mask as text, two rows a line in half blocks: filled is kept. Frames of [T, h, w] stand one below the other."""
    pairs = np.array([[" ", "▄"], ["▀", "█"]])
    pictures = []
    for frame in _frames(mask):
        rows = torch.nn.functional.pad(frame, (0, 0, 0, frame.shape[0] % 2)).long().numpy()
        pictures.append("\n".join("".join(line) for line in pairs[rows[::2], rows[1::2]]))
    return "\n\n".join(pictures)


def _plane(mask: Tensor | Mask) -> Tensor:
    frames = _frames(mask)
    if len(frames) != 1:
        raise MaskShapeError(f"This picture needs one mask [h, w]; got {len(frames)} of them.")
    return frames[0]


def _frames(mask: Tensor | Mask) -> list[Tensor]:
    """bool [h, w] planes. A `Mask` of one sample is taken without its batch axis."""
    if isinstance(mask, Mask):
        if mask.shape[0] != 1:
            raise MaskShapeError(f"Draw one sample at a time: this mask has {mask.shape[0]} (mask.rows).")
        mask = mask.keep[0]
    keep = mask.detach().cpu().bool()
    if keep.ndim not in (1, 2, 3):
        raise MaskShapeError(
            f"A mask is drawn as [L], [h, w] or [T, h, w]; this one has {keep.ndim} dimensions."
        )
    if keep.ndim == 1:
        keep = keep[None]
    return list(keep) if keep.ndim == 3 else [keep]


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """The image blown up by the largest whole factor that keeps its longer side within `side`, pixels left square."""
    from PIL import Image as Pillow

    factor = side // max(image.size)
    if factor < 2:
        return image
    return image.resize((image.width * factor, image.height * factor), Pillow.Resampling.NEAREST)


def grid_of(
    images: Sequence[Image.Image],
    columns: int,
    gap: int = 4,
    labels: Sequence[str] | None = None,
    *,
    text_size: int = 14,
    ink: str = INK,
    background: tuple[int, int, int] | None = None,
) -> Image.Image:
    """Images in rows of `columns`, `gap` pixels apart, each with its label below; transparent where there is no image.

    `background` fills the page (red, green, blue) instead. Cells are as large as the largest image.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    if not images:
        raise MaskShapeError("A grid needs at least one image.")
    width, height = max(image.width for image in images), max(image.height for image in images)
    font = ImageFont.load_default(text_size)
    caption = round(text_size * 1.9) if labels else 0
    rows = math.ceil(len(images) / columns)
    columns = min(columns, len(images))
    page = Pillow.new(
        "RGBA",
        (columns * (width + gap) - gap, rows * (height + caption + gap) - gap),
        (*background, 255) if background else (0, 0, 0, 0),
    )
    pen = ImageDraw.Draw(page)
    for index, image in enumerate(images):
        x, y = index % columns * (width + gap), index // columns * (height + caption + gap)
        page.alpha_composite(image.convert("RGBA"), (x, y))
        if labels:
            pen.text(
                (x + width / 2, y + image.height + text_size * 0.5),
                labels[index],
                font=font,
                fill=ink,
                anchor="ma",
            )
    return page


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


# -- charts --------------------------------------------------------------------------------------------------


def curve(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str = "step",
    y_label: str = "",
    size: tuple[float, float] = (8.5, 3.0),
    log_y: bool = False,
    percent: bool = False,
) -> bytes:
    """Lines by name, each (x, y), as a PNG with a transparent background.

    Long noisy lines are drawn pale, with their running mean on top. Numbers that are not finite leave gaps. With
    `percent`, 1 is 100 % and the axis shows all of [0, 1].
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(size)
    for colour, (name, (x, y)) in zip(_colours(len(series)), series.items()):
        xs, ys = np.asarray(x, float), np.asarray(y, float)
        ys = np.where(np.isfinite(ys), ys, np.nan)
        if _is_noisy(ys):
            axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.3)
            xs, ys = _running_mean(xs, ys, len(ys) // 40)
        single = {"marker": "o", "markersize": 3.5} if len(ys) < 12 else {}
        axes.plot(xs, ys, color=colour, linewidth=1.8, label=name, solid_capstyle="round", **single)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if log_y:
        axes.set_yscale("log")
    if percent:
        axes.yaxis.set_major_formatter(_percent())
        axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    if len(series) > 1:
        axes.legend(
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=min(len(series), max(int(size[0] / 2), 1)),
            handlelength=1.2,
            borderaxespad=0.2,
            labelcolor=INK,
        )
    return _rendered(figure)


Line = tuple[Sequence[float], Sequence[float]]
"""(x, y)"""


def style(place: int) -> tuple[str, str]:
    """(colour, line style) of the group at a place: after the colours have been through, lines are dashed, then dotted."""
    return COLOURS[place % len(COLOURS)], ("-", "--", ":")[place // len(COLOURS) % 3]


def compared_curves(
    groups: Mapping[str, Sequence[Line]],
    *,
    places: Sequence[int] | None = None,
    x_label: str = "step",
    size: tuple[float, float] = (4.15, 2.7),
) -> bytes:
    """A line for each group of runs by name, as a PNG with a transparent background.

    Of several runs the mean, where all of them have a value, on a band from the least to the most. Noisy lines are running
    means. `places` are the groups' numbers, which decide their colours.
    """
    figure, axes = _axes(size)
    for place, (name, runs) in zip(places or range(len(groups)), groups.items()):
        colour, dashes = style(place)
        lines = [_readable(*run) for run in runs]
        x = np.unique(np.concatenate([line[0] for line in lines]))
        x = x[(x >= max(line[0].min() for line in lines)) & (x <= min(line[0].max() for line in lines))]
        if len(lines) == 1 or len(x) < 2:
            for xs, ys in lines:
                axes.plot(xs, ys, color=colour, linestyle=dashes, linewidth=1.6, label=name)
            continue
        ys = np.stack([np.interp(x, *line) for line in lines])
        axes.fill_between(x, ys.min(0), ys.max(0), color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, ys.mean(0), color=colour, linestyle=dashes, linewidth=1.6, label=name)
    axes.set_xlabel(x_label)
    # Names of runs are long: one column, above the lines.
    axes.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=1,
        handlelength=1.6,
        borderaxespad=0.2,
        labelcolor=INK,
        fontsize=8,
    )
    return _rendered(figure)


def _readable(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A line without what is not finite, as its running mean where it is noisy."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    good = np.isfinite(ys) & np.isfinite(xs)
    xs, ys = xs[good], ys[good]
    return _running_mean(xs, ys, max(len(ys) // 40, 1)) if _is_noisy(ys) else (xs, ys)


def dots(
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    references: Mapping[str, float] | None = None,
    percent: bool = True,
    width: float = 4.15,
) -> bytes:
    """A row for each name: a dot a run, a bar at their mean. Dashed lines are levels to be held against."""
    from matplotlib.ticker import MaxNLocator

    levels = dict(references or {})
    figure, axes = _axes((width, 0.27 * len(names) + 0.75 + 0.17 * len(levels)))
    for row, numbers in enumerate(values):
        if not numbers:
            continue
        colour, _ = style(row)
        mean = float(np.mean(numbers))
        axes.plot(numbers, [row] * len(numbers), "o", color=colour, markersize=4, alpha=0.55, linewidth=0)
        axes.plot([mean, mean], [row - 0.32, row + 0.32], color=colour, linewidth=2, solid_capstyle="butt")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=INK, alpha=0.25, linewidth=0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if percent:
        axes.xaxis.set_major_formatter(_percent())
    axes.xaxis.set_major_locator(MaxNLocator(6))
    for at, (name, value) in enumerate(levels.items()):
        dashes = ((0, (4, 3)), (0, (1, 2)), (0, (6, 2, 1, 2)))[at % 3]
        axes.axvline(value, color=INK, linewidth=1.1, linestyle=dashes, label=name)
    if levels:
        axes.legend(
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=1,
            handlelength=2,
            borderaxespad=0.2,
            labelcolor=INK,
            fontsize=8,
        )
    axes.margins(x=0.06)
    return _rendered(figure)


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    x_label: str = "",
    reference: float | None = None,
    percent: bool = True,
    width: float = 8.5,
) -> bytes:
    """Horizontal bars with their values, first name on top, as a PNG with a transparent background.

    `reference` draws a line, such as the budget that was asked. With `percent`, 1 is 100 %.
    """
    each = 0.24 if len(names) <= 40 else 0.16
    figure, axes = _axes((width, max(each * len(names), 0.5) + 0.7))
    rows = np.arange(len(names))
    numbers = np.asarray(values, float)
    axes.barh(rows, np.nan_to_num(numbers), height=0.66, color=COLOURS[0])
    small = 8 if len(names) <= 40 else 6
    axes.set_yticks(rows, names, fontsize=small)
    axes.invert_yaxis()
    axes.margins(y=0.6 / max(len(names), 1))
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=INK, alpha=0.25, linewidth=0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    top = max(float(np.nanmax(numbers, initial=0.0)), reference or 0.0)
    if percent:
        axes.xaxis.set_major_formatter(_percent())
    axes.set_xlim(0, max(top * 1.12, 0.01))
    for row, value in zip(rows, numbers):
        said = f"{value * 100:.1f}\N{NO-BREAK SPACE}%" if percent else f"{value:.4g}"
        if math.isfinite(value):
            at = {"xytext": (4, 0), "textcoords": "offset points"}
            axes.annotate(said, (value, row), va="center", fontsize=small, color=INK, **at)
    if reference is not None:
        axes.axvline(reference, color=COLOURS[1], linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlabel(x_label)
    return _rendered(figure)


def _axes(size: tuple[float, float]) -> tuple[Figure, Any]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "axes.edgecolor": INK,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": INK,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "font.size": 9,
        "legend.fontsize": 9,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0,
        "font.family": "DejaVu Sans",
    }
    with matplotlib.rc_context(style):
        figure = Figure(size, dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.add_subplot()


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=None, symbol="\N{NO-BREAK SPACE}%")


def _is_noisy(y: np.ndarray) -> bool:
    """Whether neighbours differ by more than a hundredth of the range: then a long line is read through its mean."""
    good = y[np.isfinite(y)]
    return len(good) > 150 and bool(np.abs(np.diff(good)).mean() > 0.01 * max(np.ptp(good), 1e-12))


def _running_mean(x: np.ndarray, y: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Centred means over at most 2·width + 1 points, fewer at the ends; gaps do not count."""
    good = np.isfinite(y)
    total = np.concatenate([[0.0], np.where(good, y, 0.0).cumsum()])
    count = np.concatenate([[0], good.cumsum()])
    low = np.maximum(np.arange(len(y)) - width, 0)
    high = np.minimum(np.arange(len(y)) + width + 1, len(y))
    seen = count[high] - count[low]
    return x, np.where(seen > 0, (total[high] - total[low]) / np.maximum(seen, 1), np.nan)


def _rendered(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", transparent=True)
    return stream.getvalue()


# -- text ----------------------------------------------------------------------------------------------------


def reveal(order: Sequence[int] | Tensor, tokens: Sequence[str]) -> str:
    """An HTML fragment: each token on the colour of the event at which it was revealed, violet first, amber last.

    `order` [L] are the events, -1 for the prompt, which is underlined instead. Tokens are escaped; the page needs
    `white-space: pre-wrap` where spaces matter.
    """
    events = [int(event) for event in order]
    if len(events) != len(tokens):
        raise MaskShapeError(f"reveal needs one event a token; got {len(events)} for {len(tokens)} tokens.")
    last = max(max(events, default=0), 1)
    parts = []
    for event, token in zip(events, tokens):
        text = html.escape(token)
        if event < 0:
            parts.append(f'<span class="prompt" title="prompt">{text}</span>')
        else:
            share = event / last
            red, green, blue = (round(a + (b - a) * share) for a, b in zip((112, 72, 232), (255, 176, 0)))
            parts.append(
                f'<span style="background:rgba({red},{green},{blue},.38)" title="event {event}">{text}</span>'
            )
    return "".join(parts)
