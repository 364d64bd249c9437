"""Dealing tiles to ranks by cost: pure arithmetic."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

__all__ = ["deal"]


def deal(costs: Sequence[int], ranks: int) -> tuple[int, ...]:
    """The owner of each tile, so that the busiest rank has as little to do as the two ways below allow.

    Neighbouring tiles on one rank exchange nothing, so the tiles are cut into contiguous runs unless largest
    first balances better.

    Args:
        costs: the cost of each tile, in row-major order.
        ranks: how many ranks share them.
    """
    runs, greedy = _contiguous(costs, ranks), _largest_first(costs, ranks)
    return runs if _busiest(costs, runs) <= _busiest(costs, greedy) else greedy


def _busiest(costs: Sequence[int], owners: Sequence[int]) -> int:
    loads: dict[int, int] = {}
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] = loads.get(owner, 0) + cost
    return max(loads.values())


def _contiguous(costs: Sequence[int], ranks: int) -> tuple[int, ...]:
    """The contiguous runs whose largest load is smallest, found by halving the range of that load."""
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if _fill(costs, middle)[-1] < ranks:
            high = middle
        else:
            low = middle + 1
    return _fill(costs, low)


def _fill(costs: Sequence[int], limit: int) -> tuple[int, ...]:
    """Give each rank tiles in order, up to a load; rank 0 first: what it owns need not travel to it."""
    owners: list[int] = []
    owner = load = 0
    for cost in costs:
        if load + cost > limit:
            owner, load = owner + 1, 0
        load += cost
        owners.append(owner)
    return tuple(owners)


def _largest_first(costs: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Each tile, largest first, to the rank with the least load; the lower rank where loads are equal."""
    owners = [0] * len(costs)
    loads = [(0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, rank = heapq.heappop(loads)
        owners[index] = rank
        heapq.heappush(loads, (load + costs[index], rank))
    return tuple(owners)
