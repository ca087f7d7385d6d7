"""Baselines that the papers are measured against: what most people would try first."""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.baselines import autoregressive, channels, language, masks, objective, pruner

    return (
        *masks.COMPONENTS,
        *objective.COMPONENTS,
        *language.COMPONENTS,
        *pruner.COMPONENTS,
        *channels.COMPONENTS,
        *autoregressive.COMPONENTS,
    )
