"""LT-SFT: exactly K entries, rewinding, sparse training, and differences that add and subtract."""

import pytest

from maskwright.plugins.composable_sft.pruner import LtSft
from maskwright.testing import conformance

CHECKS = conformance(LtSft)


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()
