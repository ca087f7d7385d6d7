"""The baseline masks: the kit, exact counts and laws, and BEiT's blocks against a loop over samples."""

import math
import random

import pytest
import torch
from scipy.stats import chisquare

import maskwright
from maskwright import Layout, Mask
from maskwright.errors import BadParameter, UnsupportedLayout
from maskwright.plugins.baselines.masks import TRIES, Block, Random, Tube, complete, largest_block, propose
from maskwright.testing import conformance


def checks(*components):
    return [
        pytest.param(check, id=f"{component.name}-{name}")
        for component in components
        for name, check in conformance(component)
    ]


CAE = Block(hidden=98, exact=True)
BEIT = Block(hidden=75)


@pytest.mark.parametrize("check", checks(Random, Random(truncated="hidden"), Tube, Block, Block(exact=True)))
def test_conforms(check):
    check()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def hidden_by(strategy, batch=64, grid=(14, 14), seed=0):
    """bool [batch, *grid], True = hidden."""
    mask = strategy.draw(Layout(batch, grid), signals={}, progress=0.0, generator=seeded(seed))
    return mask.as_removed()


# -- random --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "ratio", "kept"),
    [
        ((14, 14), 0.75, 49),
        ((100,), 0.9, 9),  # 100 · (1 - 0.9) is 9.999… in double precision, and is truncated
        ((16,), 0.6, 6),
        ((8, 14, 14), 0.9, 156),
        ((4, 4), 0.0, 16),
        ((4, 4), 0.97, 1),  # int(0.48) would be none
    ],
)
def test_random_keeps_the_truncated_number(grid, ratio, kept):
    visible = ~hidden_by(Random(ratio=ratio), grid=grid)
    assert visible.flatten(1).sum(1).tolist() == [kept] * 64


@pytest.mark.parametrize(
    ("positions", "visible", "hidden"), [(196, 19, 20), (64, 6, 7), (16, 1, 2), (4, 1, 1), (1, 1, 1)]
)
def test_random_truncates_the_number_that_it_is_told_to(positions, visible, hidden):
    """Of 196 patches at 0.9 MAE keeps 19, and CroCo hides 176."""
    for truncated, kept in (("visible", visible), ("hidden", hidden)):
        removed = hidden_by(Random(ratio=0.9, truncated=truncated), grid=(positions,))
        assert (~removed).sum(1).tolist() == [kept] * 64


def test_random_gives_every_subset_the_same_chance():
    """Five positions, two of them hidden: ten subsets."""
    hidden = hidden_by(Random(ratio=0.4), batch=20_000, grid=(5,))
    numbers = (hidden.long() << torch.arange(5)).sum(1)
    counts = torch.bincount(numbers, minlength=32)
    assert int((counts > 0).sum()) == 10
    assert chisquare(counts[counts > 0].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("ratio", [-0.1, 1.0, "half", True])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(
        BadParameter, match=r"random: ratio=.* must be a number in \[0, 1\)|must be in \[0, 1\)"
    ):
        Random(ratio=ratio)


# -- tubes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "ratio", "hidden"), [((8, 14, 14), 0.9, 176), ((8, 14, 14), 0.75, 147), ((60, 22), 0.5, 11)]
)
def test_tubes_hide_the_truncated_number_of_places_in_every_frame(grid, ratio, hidden):
    """VideoMAE: int(0.9 · 196) = 176 of 196 places."""
    masks = hidden_by(Tube(ratio=ratio), batch=4, grid=grid).flatten(2)
    assert (masks.sum(2) == hidden).all()
    assert (masks == masks[:, :1]).all()


def test_tubes_of_two_samples_differ_and_every_place_has_the_same_chance():
    places = hidden_by(Tube(ratio=0.5), batch=8_000, grid=(2, 2, 3))[:, 0].flatten(1)
    numbers = (places.long() << torch.arange(6)).sum(1)
    counts = torch.bincount(numbers, minlength=64)
    assert int((counts > 0).sum()) == math.comb(6, 3)
    assert chisquare(counts[counts > 0].numpy()).pvalue > 1e-3


def test_a_tube_needs_time():
    with pytest.raises(
        UnsupportedLayout, match=r"tube needs a grid of frames × places, .* not \(16,\); use 'random'"
    ):
        hidden_by(Tube(), grid=(16,))


# -- blocks --------------------------------------------------------------------------------------------------------


def naive_blocks(batch, grid, target, *, smallest, seed, exact=False, max_block=None, min_aspect=0.3):
    """BEiT's algorithm 1, sample by sample and patch by patch, with the random numbers that the strategy draws."""
    generator = seeded(seed)
    height, width = grid
    masks = [[[False] * width for _ in range(height)] for _ in range(batch)]
    counts, active = [0] * batch, [target > 0] * batch
    for _ in range(64 if exact else target):
        u = torch.rand(batch, TRIES, 4, generator=generator, dtype=torch.float64).tolist()
        for sample in range(batch):
            if not active[sample]:
                continue
            limit = min(target - counts[sample], max_block or target)
            found = False
            for first, second, third, fourth in u[sample]:
                area = smallest + (limit - smallest) * first
                aspect = math.exp((2 * second - 1) * math.log(1 / min_aspect))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h >= height or w >= width:
                    continue
                top, left = int(third * (height - h + 1)), int(fourth * (width - w + 1))
                block = [(row, column) for row in range(top, top + h) for column in range(left, left + w)]
                new = [(row, column) for row, column in block if not masks[sample][row][column]]
                if 0 < len(new) <= limit:
                    for row, column in new:
                        masks[sample][row][column] = True
                    counts[sample] += len(new)
                    found = True
                    break
            active[sample] = counts[sample] < target and (found or exact)
        if not any(active):
            break
    return torch.tensor(masks)


@pytest.mark.parametrize(
    ("strategy", "grid", "target"),
    [
        (BEIT, (14, 14), 75),
        (Block(ratio=0.4), (14, 14), 79),
        (Block(hidden=75, max_block=20), (14, 14), 75),
        (Block(hidden=30, min_block=4, min_aspect=0.5), (8, 10), 30),
        (Block(hidden=5), (4, 6), 5),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_are_those_of_a_loop_over_samples(strategy, grid, target, seed):
    expected = naive_blocks(
        40,
        grid,
        target,
        smallest=min(strategy.min_block, target),
        seed=seed,
        max_block=strategy.max_block,
        min_aspect=strategy.min_aspect,
    )
    assert torch.equal(hidden_by(strategy, 40, grid, seed), expected)


def test_exact_blocks_are_those_of_the_loop_until_the_number_is_met():
    """Samples that the loop does not finish in its rounds are completed; the others are the same."""
    expected = naive_blocks(40, (14, 14), 98, smallest=16, seed=3, exact=True)
    finished = expected.flatten(1).sum(1) == 98
    found = hidden_by(CAE, 40, seed=3)
    assert finished.float().mean() > 0.9
    assert torch.equal(found[finished], expected[finished])
    assert (found & expected).flatten(1).sum(1).tolist() == expected.flatten(1).sum(1).tolist()


def paper_blocks(count, target=75, side=14, smallest=16, min_aspect=0.3, seed=0):
    """The same algorithm with Python's own random numbers: a law to compare with, not draws."""
    draw = random.Random(seed)
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for mask in masks:
        left_over = target
        while left_over > 0:
            for _ in range(10):
                area = draw.uniform(smallest, left_over)
                aspect = math.exp(draw.uniform(math.log(min_aspect), -math.log(min_aspect)))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h < side and w < side:
                    top, left = draw.randint(0, side - h), draw.randint(0, side - w)
                    block = mask[top : top + h, left : left + w]
                    new = h * w - int(block.sum())
                    if 0 < new <= left_over:
                        block.fill_(True)
                        left_over -= new
                        break
            else:
                break
    return masks


def neighbours(hidden):
    """Pairs of hidden patches side by side, in each sample."""
    beside = (hidden[:, :, 1:] & hidden[:, :, :-1]).flatten(1).sum(1)
    below = (hidden[:, 1:] & hidden[:, :-1]).flatten(1).sum(1)
    return (beside + below).double()


def largest_difference(one, two):
    """How far the means of two samples [S, ...] lie apart, in standard errors: the largest of all."""
    one, two = one.double(), two.double()
    spread = (one.var(0) / len(one) + two.var(0) / len(two)).sqrt()
    return float(((one.mean(0) - two.mean(0)).abs() / spread).max())


def test_blocks_have_the_papers_law():
    """How many are hidden, where, and how much they hang together; random masks of as many show that it can fail."""
    expected, found = paper_blocks(2000), hidden_by(BEIT, 4000, seed=5)
    scattered = hidden_by(Random(ratio=1 - 128 / 196), 2000)
    assert largest_difference(expected.flatten(1).sum(1), found.flatten(1).sum(1)) < 4
    assert largest_difference(expected, found) < 5
    assert largest_difference(neighbours(expected), neighbours(found)) < 4
    assert largest_difference(neighbours(expected), neighbours(scattered)) > 40


def test_beit_hides_at_most_its_number_and_most_of_it():
    counts = hidden_by(BEIT, 500).flatten(1).sum(1)
    assert counts.max() <= 75
    assert counts.float().mean() > 60
    assert len(counts.unique()) > 5


@pytest.mark.parametrize(("strategy", "grid"), [(CAE, (14, 14)), (Block(hidden=12, exact=True), (4, 6))])
def test_exact_blocks_hide_exactly_their_number(strategy, grid):
    assert hidden_by(strategy, 200, grid).flatten(1).sum(1).tolist() == [strategy.hidden] * 200


def test_a_block_is_a_rectangle_shorter_than_both_sides():
    free = torch.zeros(200, 14, 14, dtype=torch.bool)
    blocks, found = propose(free, torch.full((200,), 75), 16, 0.3, seeded())
    assert found.all()
    for block in blocks:
        rows, columns = block.any(1), block.any(0)
        assert torch.equal(block, rows[:, None] & columns)
        assert 0 < int(rows.sum()) < 14
        assert 0 < int(columns.sum()) < 14


def test_a_block_hides_at_most_what_is_missing():
    hidden = hidden_by(Block(hidden=70), 200)
    limit = torch.full((200,), 6)
    blocks, found = propose(hidden, limit, 1, 0.3, seeded(1))
    added = (blocks & ~hidden).flatten(1).sum(1)
    assert (added <= 6).all()
    assert (added[found] > 0).all()
    assert not blocks[~found].any()


def test_what_is_missing_is_taken_beside_what_is_hidden():
    hidden = torch.zeros(1, 6, 6, dtype=torch.bool)
    hidden[0, 2:4, 2:4] = True
    done = complete(hidden, 10, seeded())
    around = torch.nn.functional.max_pool2d(hidden[:, None].float(), 3, stride=1, padding=1)[:, 0].bool()
    assert int(done.sum()) == 10
    assert (hidden <= done).all()
    assert (done <= around).all()


@pytest.mark.parametrize(
    ("grid", "min_aspect", "area"),
    [((14, 14), 0.3, 182), ((4, 6), 0.3, 19), ((3, 20), 1.0, 6), ((2, 2), 0.3, 2)],
)
def test_the_largest_block_can_be_proposed_and_no_larger(grid, min_aspect, area):
    """Over all aspects: a rectangle of that area is shorter than the sides after rounding, of one more it is not."""
    assert largest_block(grid, min_aspect) == area

    def fits(size):
        aspects = [math.exp(math.log(min_aspect) * (1 - 2 * i / 2000)) for i in range(2001)]
        sides = [(round(math.sqrt(size * a)), round(math.sqrt(size / a))) for a in aspects]
        return any(h < grid[0] and w < grid[1] for h, w in sides)

    assert fits(area)
    assert not fits(area + 1)


@pytest.mark.parametrize(
    ("strategy", "grid", "said"),
    [
        (Block(), (16,), r"rows × columns, each at least 2, not \(16,\); use 'random'"),
        (Block(), (1, 8), r"each at least 2, not \(1, 8\)"),
        (
            Block(hidden=16),
            (4, 4),
            r"hidden=16 leaves nothing visible of 16 patches; `hidden` must be below 16",
        ),
        (
            Block(min_block=60, hidden=60),
            (8, 8),
            r"no block of 60 patches fits in \(8, 8\); set min_block to at most 56",
        ),
    ],
)
def test_grids_that_blocks_do_not_fit_are_refused(strategy, grid, said):
    with pytest.raises(UnsupportedLayout, match=said):
        hidden_by(strategy, grid=grid)


def test_nothing_to_hide_is_nothing_hidden():
    assert not hidden_by(Block(ratio=0.0)).any()
    assert not hidden_by(Block(hidden=0, exact=True)).any()


# -- in company ----------------------------------------------------------------------------------------------------


def test_random_tubes_are_random_masks_of_the_places():
    """A tube of one frame is a random mask, drawn from the same numbers, with the rounding of the other paper."""
    frame = hidden_by(Tube(ratio=0.75), grid=(1, 14, 14), seed=4)[:, 0]
    assert torch.equal(frame, hidden_by(Random(ratio=0.75), seed=4))


def test_masks_are_algebra():
    """Blocks and random patches together, for an objective that takes any mask."""
    layout = Layout(4, (14, 14))
    blocks, scattered = (
        maskwright.create("mask-strategy", name, ratio=0.3).draw(
            layout, signals={}, progress=0.0, generator=seeded()
        )
        for name in ("block", "random")
    )
    both = blocks & scattered
    assert isinstance(both, Mask)
    assert torch.equal(both.as_removed(), blocks.as_removed() | scattered.as_removed())
