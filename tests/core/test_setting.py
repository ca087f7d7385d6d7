"""`setting`: a hyper-parameter that checks its value, names the legal ones, and describes its range."""

import attrs
import pytest

from maskwright import setting
from maskwright.errors import BadParameter
from maskwright.settings import describe_range


@attrs.frozen
class Example:
    name = "example"

    share: float = setting(0.5, "a share", ge=0, lt=1)
    count: int = setting(3, "a count", ge=1)
    flag: bool = setting(False, "a flag")
    word: str = setting("red", "a colour", choices=("red", "blue"))
    free: str = setting("any", "a text")
    sizes: tuple = setting((1, 2), "sizes")
    limit: int | None = setting(None, "a limit", gt=0, le=9, optional=True)


def test_defaults_and_legal_values_pass():
    assert Example() == Example(0.5, 3, False, "red", "any", (1, 2), None)
    assert Example(share=0, count=1, flag=True, word="blue", free="", limit=9).limit == 9


def test_numbers_and_lists_take_the_type_that_is_meant():
    assert isinstance(Example(share=0).share, float)
    assert Example(sizes=[3, 4]).sizes == (3, 4)
    assert attrs.fields_dict(Example)["share"].metadata == {"help": "a share", "range": "in [0, 1)"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("share", 1, r"example: share=1.0 must be in \[0, 1\)"),
        ("share", -0.1, r"share=-0.1 must be in \[0, 1\)"),
        ("share", "0.5", r"share='0.5' must be a number in \[0, 1\)"),
        ("share", True, r"share=True must be a number"),
        ("share", float("nan"), r"share=nan must be in \[0, 1\)"),
        ("count", 0, "count=0 must be >= 1"),
        ("count", 2.5, "count=2.5 must be a whole number >= 1"),
        ("count", True, "count=True must be a whole number"),
        ("flag", 1, "flag=1 must be true or false"),
        ("word", "green", "word='green' must be one of red, blue"),
        ("word", 3, "word=3 must be a text"),
        ("free", 3, "free=3 must be a text"),
        ("limit", 0, r"limit=0 must be in \(0, 9\]"),
        ("limit", 10, r"limit=10 must be in \(0, 9\]"),
        ("limit", "9", r"limit='9' must be a number in \(0, 9\]"),
    ],
)
def test_a_wrong_value_names_itself_and_the_legal_ones(name, value, message):
    with pytest.raises(BadParameter, match=message):
        Example(**{name: value})


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ({"ge": 0, "lt": 1}, "in [0, 1)"),
        ({"gt": 0, "le": 0.5}, "in (0, 0.5]"),
        ({"ge": 2}, ">= 2"),
        ({"gt": 0}, "> 0"),
        ({"le": 3}, "<= 3"),
        ({"lt": 3}, "< 3"),
        ({"choices": ("a", 2)}, "one of a, 2"),
        ({}, ""),
    ],
)
def test_ranges_in_words(bounds, text):
    every = dict.fromkeys(("ge", "gt", "le", "lt", "choices"))
    assert describe_range(**{**every, **bounds}) == text
