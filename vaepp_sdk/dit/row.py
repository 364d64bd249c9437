"""One row of a dimension: the ranks that differ on it only, and the messages between them.

Every collective is called by all ranks of the row, alike. No process group is created here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import attrs
import torch
import torch.distributed as dist

from vaepp_sdk.errors import PeerError
from vaepp_sdk.parallel.exchanges import EXCHANGES

__all__ = ["Passing", "Row", "even_parts"]


def even_parts(count: int, parts: int) -> tuple[int, ...]:
    """The sizes of contiguous parts of `count` items, as even as can be, larger ones first."""
    size, left = divmod(count, parts)
    return tuple(size + (index < left) for index in range(parts))


@attrs.frozen(eq=False)
class Row:
    """The ranks of one row, seen from one of them.

    Attributes:
        process_group: their process group; None where this rank is alone.
        index: this rank's place among them.
        size: how many they are.
    """

    process_group: dist.ProcessGroup | None
    index: int
    size: int

    @classmethod
    def over(cls, process_group: dist.ProcessGroup | None) -> Row:
        """View a row as `DiTGroup.axis` gives it."""
        if process_group is None:
            return cls(None, 0, 1)
        return cls(process_group, dist.get_rank(process_group), dist.get_world_size(process_group))

    def own(self, count: int) -> range:
        """This rank's items of `count` that are dealt in even, contiguous parts."""
        stops = tuple(accumulate(even_parts(count, self.size)))
        return range(stops[self.index - 1] if self.index else 0, stops[self.index])

    def sum(self, tensor: torch.Tensor, what: str) -> None:
        """Add up `tensor` over the ranks, in place.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        if self.size == 1:
            return
        with self._named(f"sum of {what}"):
            dist.all_reduce(tensor, group=self.process_group)

    def broadcast(self, tensor: torch.Tensor, source: int, what: str) -> None:
        """Fill a contiguous `tensor` with that of the rank at place `source`.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        with self._named(what):
            dist.broadcast(tensor, group=self.process_group, group_src=source)

    def gather(self, tensor: torch.Tensor, dim: int, lengths: Sequence[int], what: str) -> torch.Tensor:
        """Every rank's `tensor`, joined along `dim` in the order of the ranks.

        Args:
            tensor: this rank's part; the parts differ in length along `dim` only.
            dim: where they are joined.
            lengths: the length of every rank's part.
            what: names the exchange in errors.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        if self.size == 1:
            return tensor
        longest = max(lengths)
        shape = list(tensor.shape)
        shape[dim] = longest
        # Backends gather equal shapes only; the lengths differ by one at most, so little is sent for nothing.
        padded = tensor.new_zeros(shape)
        padded.narrow(dim, 0, lengths[self.index]).copy_(tensor)
        parts = [torch.empty_like(padded) for _ in lengths]
        with self._named(what):
            dist.all_gather(parts, padded, group=self.process_group)
        trimmed = [part.narrow(dim, 0, length) for part, length in zip(parts, lengths, strict=True)]
        return torch.cat(trimmed, dim)

    def exchange(
        self, pieces: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]], what: str
    ) -> list[torch.Tensor]:
        """Send one piece to every rank and receive one from each; sizes may differ.

        Args:
            pieces: by destination, this rank's own included.
            shapes: of what arrives, by source.
            what: names the exchange in errors.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        counts = [int(torch.Size(shape).numel()) for shape in shapes]
        arrived = flat.new_empty(sum(counts))
        with self._named(what):
            sent = [piece.numel() for piece in pieces]
            dist.all_to_all_single(arrived, flat, counts, sent, group=self.process_group)
        return [part.view(shape) for part, shape in zip(arrived.split(counts), shapes, strict=True)]

    def rotate(self, sent: torch.Tensor, arriving: torch.Tensor, what: str) -> Passing:
        """Start to send a contiguous tensor to the next rank of the ring and to receive the previous one's.

        Raises:
            PeerError: a neighbour is gone.
        """
        later, earlier = (self.index + 1) % self.size, (self.index - 1) % self.size
        staged = arriving if self._direct(arriving) else torch.empty_like(arriving, device="cpu")
        operations = [
            dist.P2POp(dist.isend, self._readable(sent), group=self.process_group, group_peer=later),
            dist.P2POp(dist.irecv, staged, group=self.process_group, group_peer=earlier),
        ]
        with self._named(what):
            return Passing(self, what, dist.batch_isend_irecv(operations), arriving, staged)

    def send(self, tensor: torch.Tensor, to: int, what: str) -> Passing:
        """Start to send a contiguous tensor to one place; keep what is returned until `wait`.

        Raises:
            PeerError: the rank is gone.
        """
        staged = self._readable(tensor)
        with self._named(what):
            work = dist.isend(staged, group=self.process_group, group_dst=to)
        assert work is not None
        return Passing(self, what, [work], tensor, tensor)

    def receive(self, tensor: torch.Tensor, source: int, what: str) -> None:
        """Fill a contiguous tensor from one place.

        Raises:
            PeerError: the rank is gone, or did not answer in time.
        """
        staged = tensor if self._direct(tensor) else torch.empty_like(tensor, device="cpu")
        with self._named(what):
            dist.recv(staged, group=self.process_group, group_src=source)
        if staged is not tensor:
            tensor.copy_(staged)

    def _direct(self, tensor: torch.Tensor) -> bool:
        """Whether the backend's point-to-point messages can read the tensor's device."""
        return tensor.device.type == "cpu" or dist.get_backend(self.process_group) != "gloo"

    def _readable(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._direct(tensor) else tensor.cpu()

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Count an exchange, and say which ranks it waited for where it fails."""
        if not torch.compiler.is_compiling():  # a graph would be compiled anew for each count
            EXCHANGES.begin()
        try:
            yield
        except RuntimeError as error:
            rank = dist.get_rank()
            peers = [peer for peer in dist.get_process_group_ranks(self.process_group) if peer != rank]
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PeerError(rank, peers, what, cause) from error


@attrs.frozen(eq=False)
class Passing:
    """Messages under way."""

    _row: Row
    _what: str
    _works: list[dist.Work]
    _target: torch.Tensor
    _staged: torch.Tensor

    def wait(self) -> None:
        """Wait until they have left and arrived.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        with self._row._named(self._what):
            for work in self._works:
                work.wait()
        if self._staged is not self._target:
            self._target.copy_(self._staged)
