"""Counts messages and process groups without the help of the code under test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import attrs
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


@attrs.define
class Counted:
    """What this rank sent: `(destination, bytes)` of each message, destination -1 for a broadcast.

    Attributes:
        sent: the messages.
        direct: the tensors of all messages that are no broadcast, sent or received: while they are held, no
            other tensor has their memory.
        groups: process groups that were created.
    """

    sent: list[tuple[int, int]] = attrs.field(factory=list)
    direct: list[torch.Tensor] = attrs.field(factory=list)
    groups: int = 0

    @property
    def buffers(self) -> int:
        """How many pieces of memory the messages were sent from or received in."""
        return len({tensor.untyped_storage().data_ptr() for tensor in self.direct})


@contextmanager
def counted() -> Iterator[Counted]:
    """Count inside the block; refuses new process groups and buffers that are sent and received at once."""
    seen = Counted()
    post, spread = dist.batch_isend_irecv, dist.broadcast

    def batch(operations: list[dist.P2POp]) -> Any:
        seen.direct += [operation.tensor for operation in operations]
        sends = [operation for operation in operations if operation.op is dist.isend]
        recvs = [operation for operation in operations if operation.op is dist.irecv]
        storages = {recv.tensor.untyped_storage().data_ptr() for recv in recvs}
        assert len(storages) == len(recvs), "two messages arrive in one buffer"
        for send in sends:
            assert send.tensor.untyped_storage().data_ptr() not in storages, "a buffer is sent and received"
            seen.sent.append((send.group_peer, send.tensor.numel() * send.tensor.element_size()))
        return post(operations)

    def broadcast(tensor: torch.Tensor, *, group: Any, group_src: int, async_op: bool) -> Any:
        if group_src == dist.get_rank(group):
            seen.sent.append((-1, tensor.numel() * tensor.element_size()))
        return spread(tensor, group=group, group_src=group_src, async_op=async_op)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process group was created")

    before = len(distributed_c10d._world.pg_map)
    with (
        patch.object(dist, "batch_isend_irecv", batch),
        patch.object(dist, "broadcast", broadcast),
        patch.object(dist, "new_group", refuse),
        patch.object(distributed_c10d, "_new_group_with_tag", refuse),
    ):
        yield seen
    seen.groups = len(distributed_c10d._world.pg_map) - before
