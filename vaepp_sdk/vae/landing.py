"""How the pieces of a picture reach the ranks that want it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Never

import attrs
import torch

from vaepp_sdk.parallel.view import Recv, Send, VaeGroup
from vaepp_sdk.vae.plan import EVERYONE, Box, Move, Output, Window, WorkPlan

__all__ = ["Landed", "Piece", "ShardedSample", "land", "landing_moves"]


@attrs.frozen(eq=False)
class Piece:
    """A rectangle of the output, held by one rank.

    Attributes:
        box: where it stands in the whole output.
        tensor: `(batch, channels, [frames,] box.height, box.width)`; frames are the box's where it names any.
    """

    box: Box
    tensor: torch.Tensor


@attrs.frozen(eq=False)
class ShardedSample:
    """What a rank holds of an output that was left sharded.

    Attributes:
        shape: the whole output's shape.
        pieces: this rank's rectangles; none on ranks that had no work.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __getattr__(self, name: str) -> Never:
        """What a tensor or a posterior would have is said to be missing in words that help."""
        raise AttributeError(
            f"an output that was left sharded has no {name!r}: each rank holds its own pieces; take "
            ".pieces, each with a .tensor and its .box in the whole, or set output = 'all'"
        )


@attrs.frozen(eq=False)
class Landed:
    """The end of a decode or encode on one rank.

    Attributes:
        shape: the whole output's shape.
        sample: the whole output, on the ranks where it landed; else None.
        pieces: this rank's own rectangles, where the output was left sharded; else empty.
    """

    shape: tuple[int, ...]
    sample: torch.Tensor | None = None
    pieces: tuple[Piece, ...] = ()


def landing_moves(
    windows: Sequence[Window], bytes_of: Mapping[int, int], output: Output, world_size: int, first_round: int
) -> tuple[Move, ...]:
    """The messages of `land`: one per owner, of exactly the bytes that must move.

    Args:
        windows: all windows.
        bytes_of: each window's output bytes, by window index.
        output: where the result lands.
        world_size: ranks in the DiT group.
        first_round: the number of the first round.
    """
    if output == "sharded" or world_size == 1:
        return ()
    owners = sorted({window.owner for window in windows})
    total = {
        owner: sum(bytes_of[window.index] for window in windows if window.owner == owner) for owner in owners
    }
    if output == "rank0":
        return tuple(Move(first_round, "output", owner, 0, total[owner]) for owner in owners if owner != 0)
    return tuple(
        Move(first_round + place, "output", owner, EVERYONE, total[owner])
        for place, owner in enumerate(owners)
    )


def land(
    pieces: Mapping[int, torch.Tensor],
    group: VaeGroup,
    plan: WorkPlan,
    dtype: torch.dtype,
    device: torch.device,
) -> Landed:
    """Bring the pieces where the plan's `output` says. Every rank of the DiT group calls this.

    Args:
        pieces: this rank's finished pieces, by window index, each of `plan.piece_shape`.
        group: the VAE's view of the DiT group.
        plan: the plan every rank computed.
        dtype: the pieces' dtype, also on ranks that have none.
        device: where the output is built.
    """
    if plan.work.landed_itemsize is not None:
        pieces, dtype = _finished(pieces, group, plan)
    output = plan.work.output
    if output == "sharded":
        own = tuple(Piece(window.target, pieces[window.index]) for window in plan.owned(group.rank))
        return Landed(plan.out_shape, pieces=own)
    if output == "rank0" and group.rank != 0:
        if group.is_member and plan.owned(group.rank):
            group.exchange([Send(_pack(pieces, plan, group.rank), 0)], [], "output")
        return Landed(plan.out_shape)
    sample = torch.empty(plan.out_shape, dtype=dtype, device=device)
    _unpack_pieces(sample, pieces, plan, group.rank)
    if output == "rank0":
        _collect(sample, group, plan)
    else:
        _share(sample, pieces, group, plan)
    return Landed(plan.out_shape, sample=sample)


def _finished(
    pieces: Mapping[int, torch.Tensor], group: VaeGroup, plan: WorkPlan
) -> tuple[dict[int, torch.Tensor], torch.dtype]:
    """This rank's pieces as they travel, and their dtype."""
    finish = group.finish
    assert finish is not None, "the plan was made for this group"
    assert finish.dtype.itemsize == plan.work.landed_itemsize
    windows = plan.owned(group.rank)
    done = {
        window.index: finish(pieces[window.index], window.target.top, window.target.left)
        for window in windows
    }
    return done, finish.dtype


def _collect(sample: torch.Tensor, group: VaeGroup, plan: WorkPlan) -> None:
    """Receive every other owner's pieces on rank 0."""
    owners = sorted({window.owner for window in plan.windows} - {0})
    buffers = {owner: _buffer(sample, plan, owner) for owner in owners}
    group.exchange([], [Recv(buffers[owner], owner) for owner in owners], "output")
    for owner in owners:
        _unpack(sample, buffers.pop(owner), plan, owner)


def _share(sample: torch.Tensor, pieces: Mapping[int, torch.Tensor], group: VaeGroup, plan: WorkPlan) -> None:
    """Broadcast each owner's pieces to every rank of the DiT group."""
    for owner in sorted({window.owner for window in plan.windows}):
        mine = owner == group.rank
        buffer = _pack(pieces, plan, owner) if mine else _buffer(sample, plan, owner)
        group.broadcast(buffer, owner, "output")
        if not mine:
            _unpack(sample, buffer, plan, owner)


def _buffer(sample: torch.Tensor, plan: WorkPlan, owner: int) -> torch.Tensor:
    values = sum(math.prod(plan.piece_shape(window)) for window in plan.owned(owner))
    return torch.empty(values, dtype=sample.dtype, device=sample.device)


def _pack(pieces: Mapping[int, torch.Tensor], plan: WorkPlan, owner: int) -> torch.Tensor:
    """One flat message of an owner's pieces, in window order."""
    flat = [pieces[window.index].reshape(-1) for window in plan.owned(owner)]
    return flat[0].contiguous() if len(flat) == 1 else torch.cat(flat)


def _unpack(sample: torch.Tensor, buffer: torch.Tensor, plan: WorkPlan, owner: int) -> None:
    """Write an owner's flat message into the output."""
    windows = plan.owned(owner)
    sizes = [math.prod(plan.piece_shape(window)) for window in windows]
    for window, end, size in zip(windows, itertools.accumulate(sizes), sizes, strict=True):
        sample[(..., *window.target.index)] = buffer[end - size : end].view(plan.piece_shape(window))


def _unpack_pieces(
    sample: torch.Tensor, pieces: Mapping[int, torch.Tensor], plan: WorkPlan, rank: int
) -> None:
    for window in plan.owned(rank):
        sample[(..., *window.target.index)] = pieces[window.index]
