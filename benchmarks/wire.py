"""What a rank hands to `torch.distributed`, counted without the help of whoever hands it over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import attrs
import torch
import torch.distributed as dist

__all__ = ["Wire", "counting"]

_OTHERS = (
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)
"""Ways to send that nobody took so far; one who does must be counted first."""


@attrs.define
class Wire:
    """What this rank sent. Collectives count as the messages of a ring, the fewest bytes they can take.

    Attributes:
        ranks: ranks of the job.
        layers: bytes of messages between two ranks, and of sums over all.
        picture: bytes of what is gathered by all or sent to all: in a decode, pieces of the picture.
        messages: those that `layers` counts.
        rounds: how often this rank waited for them, in calls of `torch.distributed`.
    """

    ranks: int
    layers: float = 0
    picture: float = 0
    messages: int = 0
    rounds: int = 0

    def batch(self, operations: list[dist.P2POp]) -> None:
        """Messages between two ranks, of exact size."""
        sent = [one.tensor for one in operations if one.op is dist.isend]
        self._add(sum(tensor.numel() * tensor.element_size() for tensor in sent), len(sent))

    def sum(self, tensor: torch.Tensor) -> None:
        """An all_reduce: shares of the sums pass round the ring twice."""
        steps = 2 * (self.ranks - 1)
        self._add(tensor.numel() * tensor.element_size() * steps / self.ranks, steps)

    def spread(self, tensor: torch.Tensor) -> None:
        """An all_gather, or a broadcast from here: everyone else gets what this rank holds."""
        self.picture += tensor.numel() * tensor.element_size() * (self.ranks - 1)

    def _add(self, nbytes: float, messages: int) -> None:
        self.layers += nbytes
        self.messages += messages
        self.rounds += 1


@contextmanager
def counting() -> Iterator[Wire]:
    """Count what passes through `torch.distributed` inside the block; all ranks take part in collectives.

    Raises:
        NotImplementedError: a collective is called that is not counted.
    """
    wire = Wire(dist.get_world_size() if dist.is_initialized() else 1)

    def batch(operations: list[dist.P2POp]) -> Any:
        wire.batch(operations)
        return post(operations)

    def all_reduce(tensor: torch.Tensor, *given: Any, **named: Any) -> Any:
        wire.sum(tensor)
        return add(tensor, *given, **named)

    def all_gather(found: list[torch.Tensor], tensor: torch.Tensor, *given: Any, **named: Any) -> Any:
        wire.spread(tensor)
        return gather(found, tensor, *given, **named)

    def broadcast(tensor: torch.Tensor, *given: Any, **named: Any) -> Any:
        if dist.get_rank() == (given[0] if given else named.get("src", named.get("group_src"))):
            wire.spread(tensor)
        return share(tensor, *given, **named)

    post, add, gather, share = dist.batch_isend_irecv, dist.all_reduce, dist.all_gather, dist.broadcast
    with ExitStack() as stack:
        for counted in (all_reduce, all_gather, broadcast):
            stack.enter_context(patch.object(dist, counted.__name__, counted))
        stack.enter_context(patch.object(dist, "batch_isend_irecv", batch))
        for name in _OTHERS:
            stack.enter_context(patch.object(dist, name, _refusing(name)))
        yield wire


def _refusing(name: str) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"torch.distributed.{name} is not counted")

    return refuse
