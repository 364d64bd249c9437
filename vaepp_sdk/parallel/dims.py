"""The six DiT dimensions: pure arithmetic, no process group."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs

__all__ = ["AXES", "ParallelDims"]

AXES = ("data", "cfg", "pipeline", "ring", "ulysses", "tensor")
"""The dimensions, outermost first: ranks that differ only in the last axis are neighbours."""


@attrs.frozen(kw_only=True)
class ParallelDims:
    """The size of every DiT dimension; each is at least 1."""

    data: int = 1
    cfg: int = 1
    pipeline: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1

    def __attrs_post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"the {axis} dimension is {size}; it must be at least 1")

    @property
    def sizes(self) -> Mapping[str, int]:
        """The size of each axis, in the order of `AXES`."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def dit_parallel_size(self) -> int:
        """Ranks in the DiT group: the product of all dimensions."""
        return math.prod(self.sizes.values())

    @property
    def active(self) -> tuple[str, ...]:
        """The axes larger than 1."""
        return tuple(axis for axis, size in self.sizes.items() if size > 1)

    def coordinates(self, rank: int) -> Mapping[str, int]:
        """Where a rank stands on every axis.

        Raises:
            ValueError: the rank is outside the DiT group.
        """
        if not 0 <= rank < self.dit_parallel_size:
            raise ValueError(f"rank {rank} is outside a DiT group of {self.dit_parallel_size}")
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, self.sizes[axis])
        return {axis: found[axis] for axis in AXES}

    def rows(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """The rank groups along one axis: each holds the ranks that differ on that axis only."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.dit_parallel_size):
            where = self.coordinates(rank)
            rows.setdefault(tuple(where[other] for other in AXES if other != axis), []).append(rank)
        return tuple(tuple(row) for row in rows.values())

    def replica(self, rank: int) -> int:
        """The data-parallel index of a rank: ranks of one replica work on the same images."""
        return self.coordinates(rank)["data"]

    def __str__(self) -> str:
        product = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        return f"{product} = {self.dit_parallel_size}"
