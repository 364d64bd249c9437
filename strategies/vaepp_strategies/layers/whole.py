"""Bands that become a whole picture, or whole channels, and bands again; their layout in memory is kept.

Kernels differ between contiguous and channels-last tensors, and so do their last bits: what is put together
here is laid out in memory as the untiled picture would be.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch.utils.weak import WeakIdKeyDictionary

from vaepp_sdk.parallel.view import Recv, Send
from vaepp_strategies.layers.bands import Bands
from vaepp_strategies.layers.parts import Scale

__all__ = ["WholeBands", "empty_as"]


def empty_as(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """An empty `(batch, channels, rows, columns)` laid out in memory as another one is.

    Attention leaves a lone picture's channels last with a batch stride that counts as neither format: for
    one picture that stride reaches nothing, yet kernels are chosen by it.
    """
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    empty = torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=layout)
    if last and like.shape[0] == 1 and like.stride(0) < like.numel():
        return empty.as_strided(empty.shape, (empty.shape[1], *empty.stride()[1:]))
    return empty


@attrs.frozen(eq=False)
class WholeBands(Bands):
    """One rank's band, and the whole pictures that this rank holds besides."""

    _wholes: WeakIdKeyDictionary = attrs.field(factory=WeakIdKeyDictionary, init=False)

    def keep(self, band: torch.Tensor, whole: torch.Tensor) -> None:
        """Remember the whole picture that a band is part of, as long as the band lives."""
        self._wholes[band] = whole

    def kept(self, band: torch.Tensor) -> torch.Tensor:
        """The whole picture that was kept for a band."""
        found: torch.Tensor = self._wholes[band]
        return found

    def own_rows(self, whole: torch.Tensor, scale: Scale) -> torch.Tensor:
        """A copy of this rank's band of a whole picture."""
        start, length = self._span(self.group.rank, scale)
        rows = whole.narrow(self.axis, start, length)
        return empty_as(whole, rows.shape).copy_(rows)

    def rows_around(
        self, band: torch.Tensor, scale: Scale, above: int, below: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The rows above and below a band, from the whole kept for it; None at the picture's edges."""
        whole, (start, length) = self.kept(band), self._span(self.group.rank, scale)
        first, last = max(0, start - above), min(whole.shape[self.axis], start + length + below)
        return (
            whole.narrow(self.axis, first, start - first) if first < start else None,
            whole.narrow(self.axis, start + length, last - start - length) if last > start + length else None,
        )

    def gather_whole(self, band: torch.Tensor, scale: Scale, what: str) -> torch.Tensor:
        """The whole picture, from everyone's band.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        lengths = [self.parts.core_length(rank, scale) for rank in range(self.ranks)]
        bands = self.gather(band.contiguous(), lengths, band.dim() + self.axis, what)
        return _joined(bands, self.axis, band)

    def to_channels(
        self, band: torch.Tensor, scale: Scale, shares: Sequence[tuple[int, int]], what: str
    ) -> torch.Tensor:
        """This rank's share of the channels, through the whole picture, from everyone's band.

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
        return _joined(received, self.axis, band)

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
            channels: this rank's share, through the whole picture.
            like: a tensor of the shape of the result.
            scale: its resolution.
            shares: every rank's first channel and number of channels.
            what: names the exchange in errors.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        parts = {peer: channels.narrow(self.axis, *self._span(peer, scale)) for peer in range(self.ranks)}
        rooms = {}
        for peer in self._peers:
            shape = list(like.shape)
            shape[1] = shares[peer][1]
            rooms[peer] = like.new_empty(shape)
        return _joined(self._all_to_all(parts, rooms, what), 1, channels)

    @property
    def _peers(self) -> list[int]:
        return [peer for peer in range(self.ranks) if peer != self.group.rank]

    def _span(self, rank: int, scale: Scale) -> tuple[int, int]:
        """A rank's first row and number of rows at a layer's resolution."""
        start = self.parts.rows(self.parts.parts[rank].core_start, scale)
        return start, self.parts.core_length(rank, scale)

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
