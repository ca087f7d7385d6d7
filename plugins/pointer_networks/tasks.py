"""The tasks, with their answers and with checkers that know nothing of the network.

Sorting, convex hulls and Delaunay triangulations (scipy.spatial), and tours (exact dynamic programming). Targets follow section 4:
hulls counter-clockwise from their lowest index, triples in index order and by their incentres, tours from city 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import numpy as np
import torch
from torch import Tensor


def sorting(points: np.ndarray) -> list[int]:
    """Positions of the keys [n, 1], the smallest first."""
    return np.argsort(points[:, 0], kind="stable").tolist()


def hull(points: np.ndarray) -> list[int]:
    """Corners of the convex hull of [n, 2], counter-clockwise, from the lowest position."""
    from scipy.spatial import ConvexHull

    corners = ConvexHull(points).vertices.tolist()
    start = corners.index(min(corners))
    return corners[start:] + corners[:start]


def incentre(corners: np.ndarray) -> np.ndarray:
    """[..., 3, 2] → [..., 2]: the corners, weighted by the lengths of the sides opposite to them."""
    sides = np.linalg.norm(np.roll(corners, -1, axis=-2) - np.roll(corners, 1, axis=-2), axis=-1)
    return (sides[..., None] * corners).sum(-2) / sides.sum(-1)[..., None]


def triangulation(points: np.ndarray) -> list[int]:
    """Corners of the Delaunay triangles of [n, 2], three after three; within one by position, among them by incentre."""
    from scipy.spatial import Delaunay

    triples = np.sort(Delaunay(points).simplices, axis=1)
    x, y = incentre(points[triples]).T
    return triples[np.lexsort((y, x))].flatten().tolist()


def distances(points: np.ndarray) -> np.ndarray:
    """[n, 2] → [n, n]."""
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def optimal_tour(points: np.ndarray) -> list[int]:
    """The shortest closed tour through [n, 2] from city 0, by dynamic programming over sets (Held and Karp): O(2^n n^2).

    Of its two directions the one whose second city has the lower position.
    """
    n = len(points)
    far = distances(points)
    if n < 3:
        return list(range(n))
    m = n - 1  # cities 1 … n-1 are bits 0 … m-1
    best = np.full((1 << m, m), np.inf)
    came = np.zeros((1 << m, m), dtype=np.int64)
    best[1 << np.arange(m), np.arange(m)] = far[0, 1:]
    bits = (np.arange(1 << m)[:, None] >> np.arange(m)) & 1
    for size in range(2, m + 1):
        (sets,) = np.nonzero(bits.sum(1) == size)
        for last in range(m):
            mine = sets[bits[sets, last] == 1]
            ways = best[mine ^ (1 << last)] + far[1:, 1 + last]
            came[mine, last] = ways.argmin(1)
            best[mine, last] = ways.min(1)
    chosen, last = (1 << m) - 1, int((best[-1] + far[1:, 0]).argmin())
    tour = []
    while chosen:
        tour.append(last + 1)
        chosen, last = chosen ^ (1 << last), int(came[chosen, last])
    return [0, *(tour if tour[0] < tour[-1] else tour[::-1])]


# -- checkers ------------------------------------------------------------------------------------------------


def is_permutation(positions: Sequence[int], n: int) -> bool:
    """Each of n once."""
    return sorted(positions) == list(range(n))


def is_polygon(positions: Sequence[int], n: int) -> bool:
    """Different corners, three at least."""
    return len(positions) >= 3 and len(set(positions)) == len(positions) and set(positions) <= set(range(n))


def is_set_of_triangles(positions: Sequence[int], n: int) -> bool:
    """Whole triples i < j < k < n, none of them twice."""
    triples = [tuple(positions[at : at + 3]) for at in range(0, len(positions), 3)]
    ordered = all(len(one) == 3 and 0 <= one[0] < one[1] < one[2] < n for one in triples)
    return bool(triples) and ordered and len(set(triples)) == len(triples)


def same_cycle(one: Sequence[int], two: Sequence[int]) -> bool:
    """The same positions in the same cyclic order, wherever they begin."""
    if len(one) != len(two) or not one or two[0] not in one:
        return list(one) == list(two)
    start = list(one).index(two[0])
    return [*one[start:], *one[:start]] == list(two)


def area(polygon: np.ndarray) -> float:
    """Of corners [m, 2] in their order."""
    x, y = polygon.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def is_simple(polygon: np.ndarray) -> bool:
    """Whether no two sides of the closed polygon [m, 2] cross or touch, but neighbours at their corner."""
    m = len(polygon)

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
        return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))

    for i in range(m):
        for j in range(i + 2, m):
            if (j + 1) % m == i:
                continue
            a, b, c, d = polygon[i], polygon[(i + 1) % m], polygon[j], polygon[(j + 1) % m]
            if side(a, b, c) * side(a, b, d) <= 0 and side(c, d, a) * side(c, d, b) <= 0:
                return False
    return m >= 3


def coverage(positions: Sequence[int], points: np.ndarray) -> float:
    """Area of a simple polygon over the area of the hull; not a number for one that is not simple."""
    corners = points[list(positions)]
    return area(corners) / area(points[hull(points)]) if is_simple(corners) else float("nan")


def same_triangles(one: Sequence[int], two: Sequence[int]) -> bool:
    """The same triples, in any order."""
    return {tuple(one[at : at + 3]) for at in range(0, len(one), 3)} == {
        tuple(two[at : at + 3]) for at in range(0, len(two), 3)
    }


def tour_length(positions: Sequence[int], points: np.ndarray) -> float:
    """Of the closed tour."""
    tour = points[list(positions)]
    return float(np.linalg.norm(tour - np.roll(tour, -1, axis=0), axis=1).sum())


# -- batches -------------------------------------------------------------------------------------------------


@attrs.frozen
class Task:
    """A task: `features` of a point, the right `answer`, when one is `valid` (positions, n), and the sampler's `rule` for it.

    `longest(n)` bounds the output, without the end.
    """

    features: int
    answer: Callable[[np.ndarray], list[int]]
    valid: Callable[[Sequence[int], int], bool]
    rule: str
    longest: Callable[[int], int]

    def batch(self, rows: int, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`points` uniform in the unit interval or square [rows, n, F] and `targets` [rows, T], -1 after their end."""
        points = torch.rand(rows, n, self.features, generator=generator)
        if self.features == 1:
            return {"points": points, "targets": points[..., 0].argsort(dim=1, stable=True)}
        answers = [torch.tensor(self.answer(one)) for one in points.double().numpy()]
        return {
            "points": points,
            "targets": torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-1),
        }


TASKS: dict[str, Task] = {
    "sorting": Task(1, sorting, is_permutation, "tour", lambda n: n),
    "hull": Task(2, hull, is_polygon, "polygon", lambda n: n),
    "delaunay": Task(2, triangulation, is_set_of_triangles, "triangles", lambda n: 3 * (2 * n - 5)),
    "tour": Task(2, optimal_tour, is_permutation, "tour", lambda n: n),
}


def sequences(values: Tensor, end: int) -> list[list[int]]:
    """[B, L] → the positions of each row before its end."""
    return [row[: row.index(end)] if end in row else row for row in values.tolist()]
