from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import third_party
from environments import Environment
from wheels import Wheel


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """Writes wheels, each once."""
    folder = tmp_path_factory.mktemp("wheels")

    def write(*wheels: Wheel) -> list[Path]:
        return [
            path if (path := folder / wheel.file_name).exists() else wheel.write(folder) for wheel in wheels
        ]

    return write


@pytest.fixture(scope="session")
def new_environment(
    tmp_path_factory: pytest.TempPathFactory, wheelhouse: Callable[..., list[Path]]
) -> Callable[..., Environment]:
    """Makes a virtual environment with these wheels installed."""
    numbers = itertools.count()

    def make(*wheels: Wheel) -> Environment:
        environment = Environment(tmp_path_factory.mktemp("environments") / str(next(numbers)))
        return environment.install(wheelhouse(*wheels)) if wheels else environment

    return make


@pytest.fixture(scope="session")
def troubled(new_environment: Callable[..., Environment]) -> Environment:
    """One environment with a plugin of every sort."""
    return new_environment(*third_party.TROUBLED)
