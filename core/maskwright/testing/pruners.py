"""The rules of pruners."""

from __future__ import annotations

import attrs

from maskwright.testing.rules import Rule, check_component_is_frozen


@attrs.frozen
class Pruning:
    """One call."""


RULES: tuple[Rule, ...] = (check_component_is_frozen,)
