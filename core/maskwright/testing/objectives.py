"""The rules of objectives."""

from __future__ import annotations

from maskwright.testing.rules import Rule, check_component_is_frozen

RULES: tuple[Rule, ...] = (check_component_is_frozen,)
