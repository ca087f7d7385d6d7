import pytest

from maskwright.plugins.evopress.pruner import EvoPress
from maskwright.testing import conformance

CHECKS = conformance(EvoPress)


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS])
def test_conformance(check):
    check()
