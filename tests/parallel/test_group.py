"""Process groups counted, and the messages of the VAE's view, on real gloo ranks."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from vaepp_sdk import PeerError
from vaepp_sdk.parallel.dims import AXES, ParallelDims
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.parallel.view import Recv, Send, VaeGroup
from vaepp_sdk.testing import run_ranks

CPU = torch.device("cpu")

# Dimensions of 4 ranks, and how many process groups they need: none where an axis has size 1 or is the world,
# else one for each row.
GROUPS_OF_4 = [
    (ParallelDims(tensor=4), 0),
    (ParallelDims(data=4), 0),
    (ParallelDims(data=2, tensor=2), 4),
    (ParallelDims(cfg=2, ulysses=2), 4),
    (ParallelDims(pipeline=2, ring=2), 4),
]


def process_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def _groups(rank: int) -> list[tuple[int, list[list[int] | None]]]:
    found = []
    for dims, _ in GROUPS_OF_4:
        before = process_groups()
        group = DiTGroup.create(dims, CPU)
        assert (group.rank, group.world_size) == (rank, 4)
        members = [
            None if (axis := group.axis(name)) is None else dist.get_process_group_ranks(axis)
            for name in AXES
        ]
        # What this rank can see of new groups is its own; rows it is not in are counted by their ranks.
        made = process_groups() - before
        for size in (1, 2, 3, 4):
            VaeGroup.over(None, size)
        assert process_groups() - before == made, "the VAE's view made a process group"
        found.append((made, members))
    with pytest.raises(ValueError, match=r"tensor 2 = 2, but the job has 4 ranks"):
        DiTGroup.create(ParallelDims(tensor=2), CPU)
    return found


def test_axes_get_groups_only_where_no_other_serves() -> None:
    results = run_ranks(4, _groups)
    for case, (dims, wanted) in enumerate(GROUPS_OF_4):
        made = [results[rank][case][0] for rank in range(4)]
        # Each row's group has two members here, so the members' counts add up to twice the groups.
        assert sum(made) == 2 * wanted, dims
        for rank in range(4):
            members = dict(zip(AXES, results[rank][case][1], strict=True))
            for axis in AXES:
                row = next(list(row) for row in dims.rows(axis) if rank in row)
                assert members[axis] == (row if len(row) > 1 else None), (dims, axis)


def test_one_process_needs_no_job() -> None:
    group = DiTGroup.create(ParallelDims(), CPU)
    assert (group.rank, group.world_size) == (0, 1)
    assert all(group.axis(axis) is None for axis in AXES)


def _messages(rank: int, world_size: int) -> dict[str, Any]:
    group = VaeGroup.over(None, world_size - 1, timedelta(seconds=30))
    assert group.is_member == (rank < world_size - 1)
    found: dict[str, Any] = {}
    if group.is_member:
        found["ring"], found["ring traffic"] = _ring(group)
        found["empty"] = _empty(group)
        found["gathered"] = [
            part.tolist() for part in group.all_gather(torch.tensor([rank, rank * 10]), group.size, "g")
        ]
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        found[f"broadcast {dtype}"] = _broadcast(group, dtype)
    before = group.traffic.messages
    group.broadcast(torch.empty(0), 0, "nothing")
    found["empty broadcast"] = group.traffic.messages - before
    return found


def _ring(group: VaeGroup) -> tuple[list[float], tuple[int, int]]:
    """Everyone sends its rank to the next, with a size that only the plan could tell."""
    nxt, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    if group.size == 1:
        return [], (0, 0)
    buffer = torch.zeros(previous + 1)
    group.traffic.reset()
    group.exchange(
        [Send(torch.full((group.rank + 1,), float(group.rank)), nxt)], [Recv(buffer, previous)], "ring"
    )
    return buffer.tolist(), (group.traffic.messages, group.traffic.nbytes)


def _empty(group: VaeGroup) -> int:
    """Empty messages are sent by nobody, so nobody waits for them."""
    group.traffic.reset()
    peer = (group.rank + 1) % group.size
    group.exchange([Send(torch.empty(0, 7), peer)], [], "empty")
    group.exchange([], [], "nothing at all")
    return group.traffic.messages


def _broadcast(group: VaeGroup, dtype: torch.dtype) -> tuple[list[float], int, int]:
    """From the last rank, which is no VAE rank, to all."""
    group.traffic.reset()
    source = group.world_size - 1
    tensor = torch.tensor([1, 0, 1] if group.rank == source else [0, 0, 0]).to(dtype)
    group.broadcast(tensor, source, "picture")
    return tensor.float().tolist(), group.traffic.messages, group.traffic.nbytes


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_messages_have_their_exact_size_and_are_counted(world_size: int) -> None:
    results = run_ranks(world_size, _messages, world_size)
    size = world_size - 1
    for rank, found in enumerate(results):
        last = rank == size
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            values, messages, nbytes = found[f"broadcast {dtype}"]
            assert values == [1, 0, 1]
            assert messages == last
            # A broadcast counts once for each receiver.
            assert nbytes == (3 * dtype.itemsize * size if last else 0)
        assert found["empty broadcast"] == 0
        if last:
            continue
        assert found["empty"] == 0
        assert found["gathered"] == [[peer, peer * 10] for peer in range(size)]
        if size > 1:
            previous = (rank - 1) % size
            assert found["ring"] == [previous] * (previous + 1)
            assert found["ring traffic"] == (1, 4 * (rank + 1))


def _subgroup(rank: int) -> Any:
    """A group that is not the world: ranks are counted inside it."""
    sub = dist.new_group([1, 2])
    if rank not in (1, 2):
        with pytest.raises(ValueError, match="not a member of the given process group"):
            VaeGroup.over(sub, 1)
        return None
    with pytest.raises(ValueError, match="a VAE PP size of 3 does not fit a DiT group of 2"):
        VaeGroup.over(sub, 3)
    group = VaeGroup.over(sub, 2, timedelta(seconds=30))
    parts = group.all_gather(torch.tensor([float(rank)]), 2, "ranks")
    return group.rank, [part.item() for part in parts]


def test_ranks_are_those_of_the_given_group() -> None:
    assert run_ranks(3, _subgroup) == [None, (0, [1.0, 2.0]), (1, [1.0, 2.0])]


def _wait_for_rank_1(group: VaeGroup, collective: bool) -> None:
    if collective:
        group.broadcast(torch.zeros(4), 1, "the picture")
    else:
        group.exchange([], [Recv(torch.zeros(4), 1)], "tile seam, round 2")


def _missing(rank: int) -> str | None:
    """Rank 1 never comes; a wait on its own group leaves the world's connections whole."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    if rank == 1:
        time.sleep(4)
        return None
    started, told = time.monotonic(), []
    for process_group, collective in zip(groups, (False, True), strict=True):
        group = VaeGroup.over(process_group, 2, timedelta(seconds=1))
        with pytest.raises(PeerError) as caught:
            _wait_for_rank_1(group, collective)
        assert caught.value.peers == (1,)
        assert caught.value.rank == 0
        told.append(str(caught.value))
    assert time.monotonic() - started < 30
    return "\n".join(told)


def test_a_missing_rank_is_named_with_the_exchange() -> None:
    told = run_ranks(2, _missing)[0].splitlines()
    assert told[0].startswith("rank 0 waited for rank 1 (tile seam, round 2): ")
    assert told[1].startswith("rank 0 waited for rank 1 (the picture): ")
