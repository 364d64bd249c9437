"""Bands of rows or columns without overlap, and the neighbours' rows that layers need."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import torch
from torch.utils.weak import WeakIdKeyDictionary

from vaepp_sdk.parallel.view import Recv, Send
from vaepp_strategies.layers.buffers import Borrowed, Buffers, nbytes_of
from vaepp_strategies.layers.exchange import Exchange
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.reach import Reach

__all__ = ["Bands", "Halo", "RowMap"]

RowMap = Callable[[torch.Tensor], torch.Tensor]
"""A layer that works row by row."""


@attrs.frozen(eq=False)
class Halo:
    """The neighbours' rows around one tensor of a band, possibly still under way.

    A band at an edge of the picture has no rows beyond it: there they are None.

    Attributes:
        joined: the band and the nearest rows around it in one tensor, where a layer wrote them so: as many
            above as below, zeros beyond an edge of the picture. The band itself is then a view of it.
        held: the buffers that the rows arrived in; they are used again once no halo holds them.
    """

    _above: torch.Tensor | None
    _below: torch.Tensor | None
    _pending: Borrowed | None = None
    _maps: tuple[tuple[RowMap, RowMap], ...] = ()
    joined: torch.Tensor | None = None
    held: Borrowed | None = None

    @property
    def arrived(self) -> bool:
        """Whether no message has to be waited for."""
        return self._pending is None

    def mapped(self, above: RowMap, below: RowMap | None = None) -> Halo:
        """The rows around a layer's output, where the layer works position by position.

        Args:
            above: the layer, for the rows above.
            below: what it is for the rows below, where that differs.
        """
        return attrs.evolve(self, maps=(*self._maps, (above, below or above)), joined=None)

    def rows(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The rows above and below, once they have arrived; to be read for as long as this halo lives.

        Raises:
            PeerError: a neighbour is gone, or did not answer in time.
        """
        if self._pending is not None:
            self._pending.wait()
        return self._apply(self._above, 0), self._apply(self._below, 1)

    def _apply(self, rows: torch.Tensor | None, side: int) -> torch.Tensor | None:
        for layers in self._maps:
            rows = None if rows is None else layers[side](rows)
        return rows


@attrs.frozen(eq=False)
class Bands(Exchange):
    """One rank's band among all, for the length of one decode or encode.

    "Above" and "below" are meant along the split axis: where columns are split, they are left and right.

    Attributes:
        exchanges: how many exchanges there will be; the group's `progress` is told as they happen.
    """

    exchanges: int
    _count: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), init=False)
    _halos: WeakIdKeyDictionary = attrs.field(factory=WeakIdKeyDictionary, init=False)
    _buffers: Buffers = attrs.field(factory=Buffers, init=False)

    @property
    def axis(self) -> int:
        """The split axis of every tensor: -2 or -1."""
        return self.parts.axis

    def areas(self, tensor: torch.Tensor, scale: Scale) -> list[int]:
        """Every band's positions, rows times columns times frames of a clip, at a layer's resolution."""
        across = tensor.shape[-1 if self.axis == -2 else -2] * math.prod(tensor.shape[2:-2])
        return [self.parts.core_length(rank, scale) * across for rank in range(self.ranks)]

    def carry(self, tensor: torch.Tensor, halo: Halo) -> None:
        """Keep the rows around a tensor for the layer that will read it."""
        self._halos[tensor] = halo

    def carried(self, tensor: torch.Tensor) -> Halo | None:
        """The rows around a tensor, where an earlier layer fetched them."""
        found: Halo | None = self._halos.get(tensor)
        return found

    def mapped(self, tensor: torch.Tensor, layer: RowMap) -> torch.Tensor:
        """What a layer gives that works position by position; rows kept around its input pass it too."""
        result, halo = layer(tensor), self.carried(tensor)
        if halo is not None:
            self.carry(result, halo.mapped(layer))
        return result

    def forget(self, tensor: torch.Tensor) -> None:
        """Drop the rows kept around a tensor: it was written over."""
        self._halos.pop(tensor, None)

    def fetch(self, tensor: torch.Tensor, reach: Reach, what: str) -> Halo:
        """Ask the neighbours for their rows around a tensor, and send them ours; does not wait.

        Args:
            tensor: this rank's band of a layer's input.
            reach: how many rows; the same on every rank.
            what: names the exchange in errors.

        Raises:
            PeerError: a neighbour is gone.
        """
        self._tell()
        borrowed = Borrowed(self._buffers)
        sends, recvs = [], []
        riding: dict[int, torch.Tensor] = {}
        for peer in self._neighbours:
            rows = self._rows_for(tensor, peer, reach)
            message = borrowed.to_send(nbytes_of(rows.shape, rows.dtype), tensor)
            _write(rows, message)
            sends.append(Send(message, peer))
            shape = self._riding(tensor, peer, reach)
            found = borrowed.to_receive(nbytes_of(shape, tensor.dtype), tensor)
            recvs.append(Recv(found, peer))
            riding[peer] = found.view(tensor.dtype).view(shape)
        borrowed.posted(self.group.post(sends, recvs, what))
        return self._halo(riding, borrowed, arrived=False)

    def gather_with_rows(
        self, mine: torch.Tensor, tensor: torch.Tensor, reach: Reach, what: str
    ) -> tuple[list[torch.Tensor], Halo]:
        """Everyone's small tensor of one shape and dtype; the neighbours' rows ride in the same messages.

        Args:
            mine: this rank's small tensor; at least as wide a dtype as `tensor`'s.
            tensor: this rank's band of a layer's input.
            reach: how many rows ride.
            what: names the exchange in errors.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        self._tell()
        head, borrowed = _bytes(mine), Borrowed(self._buffers)
        size = head.numel()
        sends, found = [], {}
        for peer in range(self.ranks):
            if peer == self.group.rank:
                continue
            rows = self._rows_for(tensor, peer, reach)
            message = borrowed.to_send(size + nbytes_of(rows.shape, rows.dtype), tensor)
            message[:size].copy_(head)
            _write(rows, message[size:])
            sends.append(Send(message, peer))
            coming = nbytes_of(self._riding(tensor, peer, reach), tensor.dtype)
            found[peer] = borrowed.to_receive(size + coming, tensor)
        borrowed.posted(self.group.post(sends, [Recv(found[peer], peer) for peer in found], what))
        borrowed.wait()
        everyone = [
            # A copy: they are small, and may be kept for longer than the rows.
            mine if rank == self.group.rank else found[rank][:size].clone().view(mine.dtype).view(mine.shape)
            for rank in range(self.ranks)
        ]
        riding = {
            peer: found[peer][size:].view(tensor.dtype).view(self._riding(tensor, peer, reach))
            for peer in self._neighbours
        }
        return everyone, self._halo(riding, borrowed, arrived=True)

    def gather_with_bands(
        self,
        mine: torch.Tensor,
        given: Sequence[torch.Tensor],
        shapes: Sequence[tuple[int, ...]],
        what: str,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Everyone's small tensor of one shape and dtype, and of everyone's band what this rank is given.

        Args:
            mine: this rank's small tensor; at least as wide a dtype as the bands'.
            given: what each rank gets of this rank's band, contiguous; its own entry is returned as it is.
            shapes: the shape of what each rank gives this one.
            what: names the exchange in errors.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        self._tell()
        head, own = _bytes(mine), given[self.group.rank]
        peers = [peer for peer in range(self.ranks) if peer != self.group.rank]
        messages = {id(given[peer]): torch.cat([head, _bytes(given[peer])]) for peer in peers}
        size = {peer: head.numel() + math.prod(shapes[peer]) * own.element_size() for peer in peers}
        found = {peer: head.new_empty(size[peer]) for peer in peers}
        sends = [Send(messages[id(given[peer])], peer) for peer in peers]
        self.group.exchange(sends, [Recv(found[peer], peer) for peer in peers], what)
        heads, parts = [], []
        for rank, shape in enumerate(shapes):
            if rank == self.group.rank:
                heads.append(mine)
                parts.append(own)
            else:
                heads.append(found[rank][: head.numel()].view(mine.dtype).view(mine.shape))
                parts.append(found[rank][head.numel() :].view(own.dtype).view(shape))
        return heads, parts

    def gather(self, mine: torch.Tensor, lengths: list[int], dim: int, what: str) -> list[torch.Tensor]:
        """See `Exchange.gather`."""
        self._tell()
        return super().gather(mine, lengths, dim, what)

    def sum(self, mine: torch.Tensor, what: str) -> torch.Tensor:
        """The sum of everyone's tensor of one shape and dtype, in rank order: the same bits on every rank.

        Args:
            mine: this rank's small tensor.
            what: names the exchange in errors.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        self._tell()
        total, *others = self.group.all_gather(mine, self.ranks, what)
        for other in others:
            total = total + other
        return total

    def _tell(self) -> None:
        """Report how far this rank is: exchanges are the moments that all ranks pass alike."""
        self.group.progress(next(self._count), self.exchanges + 1)

    @property
    def _neighbours(self) -> list[int]:
        return [peer for peer in (self.group.rank - 1, self.group.rank + 1) if 0 <= peer < self.ranks]

    def _halo(self, rows: Mapping[int, torch.Tensor], borrowed: Borrowed, *, arrived: bool) -> Halo:
        """The neighbours' rows by rank; None at an edge of the picture, and where none are needed."""
        above, below = rows.get(self.group.rank - 1), rows.get(self.group.rank + 1)
        above, below = (None if part is None or not part.numel() else part for part in (above, below))
        return Halo(above, below, None if arrived else borrowed, held=borrowed)

    def _riding(self, tensor: torch.Tensor, peer: int, reach: Reach) -> tuple[int, ...]:
        """The shape of a peer's rows that this rank reads: none, unless it is a neighbour."""
        shape = list(tensor.shape)
        shape[self.axis] = {self.group.rank - 1: reach.above, self.group.rank + 1: reach.below}.get(peer, 0)
        return tuple(shape)

    def _rows_for(self, tensor: torch.Tensor, peer: int, reach: Reach) -> torch.Tensor:
        """The rows that a peer reads of this band: none, unless it is a neighbour."""
        length = tensor.shape[self.axis]
        if peer == self.group.rank - 1:
            return tensor.narrow(self.axis, 0, reach.below)
        if peer == self.group.rank + 1:
            return tensor.narrow(self.axis, length - reach.above, reach.above)
        return tensor.narrow(self.axis, 0, 0)


def _write(rows: torch.Tensor, message: torch.Tensor) -> None:
    """Copy rows into a flat message: the band may be written to in place while they are under way."""
    message.view(rows.dtype).view(rows.shape).copy_(rows)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as flat bytes, in place."""
    return tensor.view(-1).view(torch.uint8)
