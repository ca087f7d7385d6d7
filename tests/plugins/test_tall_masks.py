import pytest

from maskwright.plugins.tall_masks.pruner import Consensus, TallMasks
from maskwright.testing import conformance

CHECKS = [
    (f"{one.name}: {name}", check) for one in (TallMasks, Consensus) for name, check in conformance(one)
]


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()
