"""Errors: their exit codes, and the nearest names."""

from __future__ import annotations

import inspect

import pytest

from maskwright import errors
from maskwright.errors import Interrupted, MaskwrightError, UsageError, did_you_mean, nearest

EVERY = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, MaskwrightError)]


@pytest.mark.parametrize("error", EVERY, ids=lambda one: one.__name__)
def test_every_error_has_an_exit_code_and_says_what_it_means(error):
    expected = 2 if issubclass(error, UsageError) else 130 if error is Interrupted else 1
    assert error.exit_code == expected
    assert error.__doc__
    assert str(error("one sentence.")) == "one sentence."


@pytest.mark.parametrize(
    ("word", "known", "close"),
    [
        ("randm", ["random", "block"], ["random"]),
        ("mae", ["colormae", "block"], ["colormae"]),
        ("hard-patches-more", ["hard-patches", "block"], ["hard-patches"]),
        ("zzz", ["random", "block"], []),
        ("", ["random"], []),
        ("ba", ["baa", "bab", "bac", "bad"], ["bad", "bac", "bab"]),
    ],
)
def test_nearest_names(word, known, close):
    assert nearest(word, iter(known)) == close


def test_did_you_mean_is_a_sentence_or_nothing():
    assert did_you_mean("randm", ["random"]) == " Did you mean 'random'?"
    assert did_you_mean("abd", ["abc", "abe"]).count(" or ") == 1
    assert did_you_mean("zzz", ["random"]) == ""
