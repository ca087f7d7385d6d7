"""The lines that `maskwright info` prints for a mask strategy run as they are."""

import pytest

from maskwright.cli.info import example
from maskwright.registry import Registry

REGISTRY = Registry(third_party=False)


@pytest.mark.parametrize("name", [info.name for info in REGISTRY.find(kind="mask-strategy")])
def test_the_example_of_a_strategy_runs(name, capsys):
    names = {}
    exec(example(REGISTRY, REGISTRY.info(name, "mask-strategy")), names)
    assert names["mask"].shape[0] == 4
    assert "tensor" in capsys.readouterr().out
