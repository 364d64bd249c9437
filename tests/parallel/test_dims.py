"""The arithmetic of dimensions, without torch."""

from __future__ import annotations

import itertools

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaepp_sdk.parallel.dims import AXES, ParallelDims

sizes = st.integers(min_value=1, max_value=3)
dims = st.builds(ParallelDims, **dict.fromkeys(AXES, sizes))


def test_axes_are_outermost_first() -> None:
    assert AXES == ("data", "cfg", "pipeline", "ring", "ulysses", "tensor")
    assert tuple(field.name for field in attrs.fields(ParallelDims)) == AXES


def test_tensor_ranks_are_neighbours() -> None:
    assert ParallelDims(data=2, tensor=2).rows("tensor") == ((0, 1), (2, 3))
    assert ParallelDims(data=2, tensor=2).rows("data") == ((0, 2), (1, 3))


def test_a_worked_example() -> None:
    found = ParallelDims(data=2, ulysses=2, tensor=2)
    assert found.dit_parallel_size == 8
    assert found.active == ("data", "ulysses", "tensor")
    assert dict(found.coordinates(5)) == {
        "data": 1, "cfg": 0, "pipeline": 0, "ring": 0, "ulysses": 0, "tensor": 1
    }  # fmt: skip
    assert [found.replica(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert str(found) == "data 2 x cfg 1 x pipeline 1 x ring 1 x ulysses 2 x tensor 2 = 8"


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_refused_by_name(size: int) -> None:
    with pytest.raises(ValueError, match=f"the ring dimension is {size}; it must be at least 1"):
        ParallelDims(ring=size)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is outside a DiT group of 4"):
        ParallelDims(tensor=4).coordinates(rank)


@given(dims)
def test_every_rank_has_its_own_coordinates(found: ParallelDims) -> None:
    everything = [tuple(found.coordinates(rank).values()) for rank in range(found.dit_parallel_size)]
    assert everything == list(itertools.product(*(range(size) for size in found.sizes.values())))


@given(dims, st.sampled_from(AXES))
def test_rows_partition_the_ranks_along_one_axis(found: ParallelDims, axis: str) -> None:
    rows = found.rows(axis)
    assert sorted(itertools.chain(*rows)) == list(range(found.dit_parallel_size))
    for row in rows:
        assert len(row) == found.sizes[axis]
        assert [found.coordinates(rank)[axis] for rank in row] == list(range(len(row)))
        others = [
            {other: place for other, place in found.coordinates(rank).items() if other != axis}
            for rank in row
        ]
        assert all(other == others[0] for other in others)
