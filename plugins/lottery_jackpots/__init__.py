"""Lottery jackpots: which weights of a trained network are kept, found by learning a score for each while the weights stay frozen.

Zhang, Lin, Zhong, Chao, Ji: "Lottery Jackpots Exist in Pre-trained Models", IEEE TPAMI 2023, arXiv:2104.08700.
"""

from __future__ import annotations

from maskwright import hookimpl


@hookimpl
def maskwright_components():
    from maskwright.plugins.lottery_jackpots.pruner import LotteryJackpot

    return (LotteryJackpot,)
