"""Message buffers that are used again, for the length of one decode or encode."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch

from vaepp_sdk.parallel.view import Pending

__all__ = ["Borrowed", "Buffers", "nbytes_of"]

_ROOMY = 4
"""A buffer serves messages down to this fraction of its size: smaller ones would keep it from larger ones."""


def nbytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


@attrs.define(eq=False)
class Buffers:
    """Flat byte buffers of one device.

    There are never more of them, and hardly more bytes, than were in use at one time.
    """

    _free: list[torch.Tensor] = attrs.field(factory=list, init=False)

    def take(self, nbytes: int, like: torch.Tensor) -> torch.Tensor:
        """A flat buffer of at least so many bytes on the device of `like`, its content left over."""
        fitting = [one for one in self._free if nbytes <= one.numel() <= _ROOMY * nbytes]
        if fitting:
            return self._remove(min(fitting, key=torch.Tensor.numel))
        small = [one for one in self._free if one.numel() < nbytes]
        if small:  # the new one takes its place
            self._remove(max(small, key=torch.Tensor.numel))
        return like.new_empty(nbytes, dtype=torch.uint8)

    def give(self, buffers: Sequence[torch.Tensor]) -> None:
        """Take back buffers that nothing reads or writes any more."""
        self._free += buffers

    def _remove(self, buffer: torch.Tensor) -> torch.Tensor:
        self._free = [one for one in self._free if one is not buffer]
        return buffer


@attrs.define(eq=False)
class Borrowed:
    """The buffers of one exchange; what arrived in them can be read for as long as this lives."""

    _buffers: Buffers
    _sent: list[torch.Tensor] = attrs.field(factory=list, init=False)
    _received: list[torch.Tensor] = attrs.field(factory=list, init=False)
    _pending: Pending | None = attrs.field(default=None, init=False)

    def to_send(self, nbytes: int, like: torch.Tensor) -> torch.Tensor:
        """So many flat bytes to fill and to send."""
        self._sent.append(self._buffers.take(nbytes, like))
        return self._sent[-1][:nbytes]

    def to_receive(self, nbytes: int, like: torch.Tensor) -> torch.Tensor:
        """So many flat bytes to receive into."""
        self._received.append(self._buffers.take(nbytes, like))
        return self._received[-1][:nbytes]

    def posted(self, pending: Pending) -> None:
        """Note that the messages are under way."""
        self._pending = pending

    def wait(self) -> None:
        """Wait for the messages; what was sent from can then be filled anew.

        Raises:
            PeerError: a peer is gone, or did not answer in time.
        """
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self._buffers.give(self._sent)
            self._sent = []

    def __del__(self) -> None:
        """Give back what was received into, unless messages may still arrive there."""
        if self._pending is None:
            self._buffers.give(self._received)
