"""The DiT group: every rank of the job, and one process group per dimension that needs one."""

from __future__ import annotations

from datetime import timedelta

import attrs
import torch
import torch.distributed as dist

from vaepp_sdk.parallel.dims import AXES, ParallelDims
from vaepp_sdk.parallel.view import VaeGroup

__all__ = ["DiTGroup"]


@attrs.frozen
class DiTGroup:
    """The ranks of a job and their dimensions.

    A dimension of size 1 has no process group; one as large as the world is the world group itself; every
    other one gets one new group per row, created on all ranks in the same order, once per job.

    Attributes:
        dims: the dimensions.
        rank: this process's rank.
        device: where this rank computes.
    """

    dims: ParallelDims
    rank: int
    device: torch.device
    _axes: dict[str, dist.ProcessGroup | None]

    @classmethod
    def create(cls, dims: ParallelDims, device: torch.device, timeout: timedelta | None = None) -> DiTGroup:
        """Build the group inside an initialised job; every rank calls this at the same point.

        Args:
            dims: the dimensions.
            device: where this rank computes.
            timeout: the limit of one wait in the new groups; None takes torch's default.

        Raises:
            ValueError: the dimensions do not multiply to the world size.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if dims.dit_parallel_size != world_size:
            raise ValueError(f"{dims}, but the job has {world_size} ranks")
        rank = dist.get_rank() if dist.is_initialized() else 0
        return cls(dims, rank, device, {axis: _axis_group(dims, axis, rank, timeout) for axis in AXES})

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return self.dims.dit_parallel_size

    def told_by_rank0(self, number: int, what: str, timeout: timedelta) -> int:
        """Rank 0's number, on every rank; all ranks must call it.

        Args:
            number: rank 0's; the others' does not matter.
            what: names the exchange in errors.
            timeout: the limit of the wait.

        Raises:
            PeerError: rank 0 is gone, or did not answer in time.
        """
        held = torch.tensor([number], dtype=torch.int64, device=self.device)
        VaeGroup.over(None, 1, timeout).broadcast(held, 0, what)
        return int(held)

    def axis(self, name: str) -> dist.ProcessGroup | None:
        """The process group of this rank's row along one axis, or None where the axis has size 1."""
        return self._axes[name]


def _axis_group(
    dims: ParallelDims, axis: str, rank: int, timeout: timedelta | None
) -> dist.ProcessGroup | None:
    """This rank's process group along one axis, creating groups only where no existing one serves."""
    if dims.sizes[axis] == 1:
        return None
    if dims.sizes[axis] == dims.dit_parallel_size:
        return dist.group.WORLD
    mine = None
    for row in dims.rows(axis):
        created = dist.new_group(list(row), timeout=timeout)
        if rank in row:
            mine = created
    return mine
