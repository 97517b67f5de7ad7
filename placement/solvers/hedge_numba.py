"""Compiled pricing of plans for several loads. Import this module lazily: it imports numba, and a first call compiles.

Shape letters: R ranks, E experts, C copies, P plans, S loads.
"""
# mypy: disable-error-code=no-untyped-def
# Numba infers the types of compiled functions.

from __future__ import annotations

import numpy as np

from ...jit.decorators import njit
from ..cost import seconds_of
from .score_numba import Layer, score, static_traffic

_price = njit(cache=True)(seconds_of)


@njit(cache=True)
def _with_totals(layer, totals_E):
    """The layer with other numbers of assignments, whose source ranks are distributed as before; nearly as many as asked for."""
    load_ER = np.empty_like(layer.load_ER)
    owned_R = np.zeros_like(layer.owned_R)
    for expert in range(totals_E.size):
        before = layer.totals_E[expert]
        for rank in range(owned_R.size):
            share = layer.load_ER[expert, rank] / before if before else 1 / owned_R.size
            load_ER[expert, rank] = np.int64(totals_E[expert] * share)
        owned_R[layer.owner_E[expert]] += load_ER[expert].sum()
    return Layer(
        load_ER,
        load_ER.sum(axis=1),
        layer.owner_E,
        owned_R,
        layer.cost_R,
        layer.node_cost_N,
        layer.ranks,
        layer.experts,
        layer.first_R,
        layer.ranks_per_node,
        layer.half_rate_rows,
        layer.slots,
    )


@njit(cache=True)
def seconds_of_plans(layer, totals_SE, prices, copies_P2C, sizes_P):
    """Sum each plan's seconds over the loads, each split exactly over the plan's copies: float [P].

    copies_P2C: (expert, rank) columns, of which plan p has the first sizes_P[p].
    """
    seconds_P = np.zeros(sizes_P.size)
    tally_5 = np.zeros(5, np.int64)
    for s in range(len(totals_SE)):
        other = _with_totals(layer, totals_SE[s])
        static = static_traffic(other)
        for p in range(sizes_P.size):
            score(other, static, copies_P2C[p, :, : sizes_P[p]], tally_5)
            stages = _price(prices, tally_5[0], tally_5[1], tally_5[2], tally_5[3], tally_5[4], 0, 0)
            seconds_P[p] += stages[0] + stages[1] + stages[2] + stages[3]
    return seconds_P
