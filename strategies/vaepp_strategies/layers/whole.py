"""Bands that become a whole picture or clip, or whole channels, and bands again, laid out in memory alike.

Kernels differ between contiguous and channels-last tensors, and so do their last bits: what is put together
here is laid out in memory as the untiled one would be.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from vaepp_sdk.parallel.view import Recv, Send
from vaepp_strategies.layers.bands import Bands
from vaepp_strategies.layers.parts import Scale

__all__ = ["WholeBands", "axes_in_memory", "empty_as"]


def axes_in_memory(values: torch.Tensor) -> list[int]:
    """The axes of a tensor, the one with the largest steps in memory first."""
    strides = list(values.stride())
    return sorted(range(values.dim()), key=lambda axis: (-strides[axis], axis))


def empty_as(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """An empty tensor without gaps, whose axes stand in memory in the order of another one's.

    Attention leaves a lone picture's channels last with a batch stride that counts as neither format: the
    stride of an axis of length 1 reaches nothing, yet kernels are chosen by it, so it is kept.

    Args:
        like: a tensor of as many axes.
        shape: the shape; axes of `like` of length 1 have length 1 here too, where their stride is unusual.
    """
    strides, step, expected = list(like.stride()), 1, 1
    for axis in reversed(axes_in_memory(like)):
        if like.shape[axis] == shape[axis] == 1 and like.stride(axis) < expected:
            continue
        strides[axis] = step
        step *= shape[axis]
        expected *= like.shape[axis]
    return torch.empty_strided(tuple(shape), strides, dtype=like.dtype, device=like.device)


@attrs.frozen(eq=False)
class WholeBands(Bands):
    """One rank's band, made whole and cut again."""

    def own_rows(self, whole: torch.Tensor, scale: Scale) -> torch.Tensor:
        """A copy of this rank's band of a whole picture or clip."""
        return self.copy_rows(whole, *self.span(self.group.rank, scale))

    def copy_rows(self, values: torch.Tensor, start: int, length: int) -> torch.Tensor:
        """A copy of some rows, laid out in memory as what they are cut from; all of them are no copy."""
        if length == values.shape[self.axis]:
            return values
        rows = values.narrow(self.axis, start, length)
        return empty_as(values, rows.shape).copy_(rows)

    def joined_rows(
        self, band: torch.Tensor, above: torch.Tensor | None, below: torch.Tensor | None
    ) -> torch.Tensor:
        """A band and the rows around it in one tensor, laid out in memory as the band is."""
        parts = [part for part in (above, band, below) if part is not None]
        return band if len(parts) == 1 else _joined(parts, band.dim() + self.axis, band)

    def gather_whole(self, band: torch.Tensor, scale: Scale, what: str) -> torch.Tensor:
        """The whole picture or clip, from everyone's band.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        lengths = [self.parts.core_length(rank, scale) for rank in range(self.ranks)]
        bands = self.gather(band.contiguous(), lengths, band.dim() + self.axis, what)
        return _joined(bands, band.dim() + self.axis, band)

    def to_channels(
        self, band: torch.Tensor, scale: Scale, shares: Sequence[tuple[int, int]], what: str
    ) -> torch.Tensor:
        """This rank's share of the channels, through the whole picture or clip, from everyone's band.

        Args:
            band: this rank's band of all channels.
            scale: its resolution.
            shares: every rank's first channel and number of channels.
            what: names the exchange in errors.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        parts = {peer: band.narrow(1, *shares[peer]) for peer in range(self.ranks)}
        shape = list(band.shape)
        shape[1] = shares[self.group.rank][1]

        def room(peer: int) -> torch.Tensor:
            shape[self.axis] = self.parts.core_length(peer, scale)
            return band.new_empty(shape)

        received = self._all_to_all(parts, {peer: room(peer) for peer in self._peers}, what)
        return _joined(received, band.dim() + self.axis, band)

    def to_bands(
        self,
        channels: torch.Tensor,
        like: torch.Tensor,
        scale: Scale,
        shares: Sequence[tuple[int, int]],
        what: str,
    ) -> torch.Tensor:
        """This rank's band of all channels, from everyone's share of them: undoes `to_channels`.

        Args:
            channels: this rank's share, through the whole picture or clip.
            like: a tensor of the shape of the result.
            scale: its resolution.
            shares: every rank's first channel and number of channels.
            what: names the exchange in errors.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        parts = {peer: channels.narrow(self.axis, *self.span(peer, scale)) for peer in range(self.ranks)}
        rooms = {}
        for peer in self._peers:
            shape = list(like.shape)
            shape[1] = shares[peer][1]
            rooms[peer] = like.new_empty(shape)
        return _joined(self._all_to_all(parts, rooms, what), 1, channels)

    def span(self, rank: int, scale: Scale) -> tuple[int, int]:
        """A rank's first row and number of rows at a layer's resolution."""
        start = self.parts.rows(self.parts.parts[rank].core_start, scale)
        return start, self.parts.core_length(rank, scale)

    @property
    def _peers(self) -> list[int]:
        return [peer for peer in range(self.ranks) if peer != self.group.rank]

    def _all_to_all(
        self, parts: dict[int, torch.Tensor], rooms: dict[int, torch.Tensor], what: str
    ) -> list[torch.Tensor]:
        self._tell()
        sends = [Send(parts[peer].clone(memory_format=torch.contiguous_format), peer) for peer in self._peers]
        self.group.exchange(sends, [Recv(room, peer) for peer, room in rooms.items()], what)
        return [rooms.get(rank, parts[rank]) for rank in range(self.ranks)]


def _joined(parts: Sequence[torch.Tensor], axis: int, like: torch.Tensor) -> torch.Tensor:
    """Pieces side by side along an axis, laid out in memory as another tensor is."""
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    whole = empty_as(like, shape)
    start = 0
    for part in parts:
        whole.narrow(axis, start, part.shape[axis]).copy_(part)
        start += part.shape[axis]
    return whole
