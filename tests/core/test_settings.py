"""`setting`: what a hyper-parameter takes, and what is said about the rest."""

from __future__ import annotations

import math

import attrs
import pytest

from maskwright import setting
from maskwright.errors import BadParameter
from maskwright.settings import describe_range


@attrs.frozen
class Example:
    name = "example"

    ratio: float = setting(0.5, "a share", ge=0, lt=1)
    rate: float = setting(1.0, "a rate", gt=0, le=10)
    count: int = setting(3, "a number", ge=1)
    limit: int | None = setting(None, "a limit", ge=1, optional=True)
    on: bool = setting(True, "a switch")
    colour: str = setting("red", "a colour", choices=("red", "green"))
    word: str = setting("a", "a text")
    sides: tuple[int, ...] = setting((1, 2), "a list")
    anything: object = setting(None, "no rule", optional=True)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"ratio": 0}, 0.0),
        ({"ratio": 0.999}, 0.999),
        ({"rate": 10}, 10.0),
        ({"count": 1}, 1),
        ({"limit": None}, None),
        ({"limit": 7}, 7),
        ({"on": False}, False),
        ({"colour": "green"}, "green"),
        ({"sides": [3, 4]}, (3, 4)),
        ({"anything": [1]}, [1]),
    ],
)
def test_legal_values_are_kept_and_ints_become_floats(given, kept):
    (name,) = given
    value = getattr(Example(**given), name)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ratio": 1.0}, "example: ratio=1.0 must be in [0, 1)."),
        ({"ratio": -0.1}, "example: ratio=-0.1 must be in [0, 1)."),
        ({"ratio": math.nan}, "example: ratio=nan must be in [0, 1)."),
        ({"ratio": "0.5"}, "example: ratio='0.5' must be a number in [0, 1)."),
        ({"ratio": True}, "example: ratio=True must be a number in [0, 1)."),
        ({"ratio": None}, "example: ratio=None must be a number in [0, 1)."),
        ({"rate": 0.0}, "example: rate=0.0 must be in (0, 10]."),
        ({"rate": 10.5}, "example: rate=10.5 must be in (0, 10]."),
        ({"count": 0}, "example: count=0 must be >= 1."),
        ({"count": 1.5}, "example: count=1.5 must be a whole number >= 1."),
        ({"count": True}, "example: count=True must be a whole number >= 1."),
        ({"limit": 0}, "example: limit=0 must be >= 1."),
        ({"limit": 2.5}, "example: limit=2.5 must be a whole number >= 1."),
        ({"on": 1}, "example: on=1 must be true or false."),
        ({"colour": "blue"}, "example: colour='blue' must be one of red, green."),
        ({"word": 3}, "example: word=3 must be a text."),
    ],
)
def test_an_illegal_value_is_told_the_legal_ones(given, said):
    with pytest.raises(BadParameter) as caught:
        Example(**given)
    assert str(caught.value) == said
    assert isinstance(caught.value, ValueError)


def test_a_class_without_a_name_is_called_by_its_own():
    @attrs.frozen
    class Nameless:
        size: int = setting(1, "a size", ge=1)

    with pytest.raises(BadParameter, match="Nameless: size=0"):
        Nameless(size=0)


def test_what_a_setting_means_can_be_read_from_its_field():
    field = attrs.fields(Example).ratio
    assert field.metadata == {"help": "a share", "range": "in [0, 1)"}


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((0, None, 1, None, None), "in [0, 1]"),
        ((None, 0, None, 1, None), "in (0, 1)"),
        ((0, None, None, None, None), ">= 0"),
        ((None, 0, None, None, None), "> 0"),
        ((None, None, 1, None, None), "<= 1"),
        ((None, None, None, 1, None), "< 1"),
        ((None, None, None, None, (1, 2)), "one of 1, 2"),
        ((None, None, None, None, None), ""),
    ],
)
def test_a_range_in_words(bounds, words):
    assert describe_range(*bounds) == words
