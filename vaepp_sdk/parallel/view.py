"""The VAE's view of the DiT group: its first n ranks, and the messages between them.

No process group is created here, ever. Messages have their exact size; a buffer is never sent and received in
one batch; every wait has a limit and names the peers it waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import attrs
import torch
import torch.distributed as dist

from vaepp_sdk.errors import PeerError
from vaepp_sdk.parallel.exchanges import EXCHANGES

__all__ = ["TO_ALL", "Finish", "Pending", "Recv", "Send", "Traffic", "VaeGroup", "Watch", "backend_of"]

TO_ALL = -1
"""The reader of a message that reaches every rank of the DiT group."""


@attrs.frozen(eq=False)
class Send:
    """Send a contiguous tensor to a rank of the DiT group."""

    tensor: torch.Tensor
    to: int


@attrs.frozen(eq=False)
class Recv:
    """Fill a contiguous tensor from a rank of the DiT group."""

    tensor: torch.Tensor
    source: int


@attrs.define
class Traffic:
    """What one rank has sent since the last `reset`.

    Attributes:
        messages: point-to-point messages sent, plus broadcasts this rank was the source of.
        nbytes: their bytes; a broadcast counts once for each receiver.
    """

    messages: int = 0
    nbytes: int = 0

    def reset(self) -> None:
        """Count from zero again."""
        self.messages = self.nbytes = 0

    def add(self, tensor: torch.Tensor, receivers: int = 1) -> None:
        """Count one message."""
        self.messages += 1
        self.nbytes += tensor.numel() * tensor.element_size() * receivers


@attrs.define(eq=False)
class Pending:
    """Messages under way; `wait` ends when all have arrived."""

    _group: VaeGroup
    _what: str
    _works: list[tuple[dist.Work, int]]
    _copies: list[tuple[torch.Tensor, torch.Tensor]]
    _device: torch.device

    def wait(self) -> None:
        """Wait for every message, at most the group's time limit for each.

        Raises:
            PeerError: a peer is gone, or did not answer in time.
        """
        for work, peer in self._works:
            try:
                self._group.await_work(work, self._device)
            except RuntimeError as error:
                raise PeerError(self._group.rank, [peer], self._what, _first_line(error)) from error
        for target, staged in self._copies:
            target.copy_(staged)
        self._works, self._copies = [], []


class Watch(Protocol):
    """Told of every message of a group as it is posted."""

    def passed(self, source: int, reader: int, nbytes: int) -> None:
        """One message from one rank to another, or to all of the group: then `reader` is `TO_ALL`."""
        ...

    def posted(self, pending: Pending) -> None:
        """Messages are under way."""
        ...


class Finish(Protocol):
    """What becomes of each finished piece of a decode, on the rank that made it, before it travels.

    Each value must depend on the values at its own place alone, so that it does not matter how a picture was
    cut.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Of what comes out."""
        ...

    def __call__(self, values: torch.Tensor, top: int, left: int) -> torch.Tensor:
        """What becomes of a piece whose first row and column stand there; the shape stays."""
        ...


def _unwatched(done: int, total: int) -> None:
    """Progress that nobody watches."""


@attrs.define(eq=False)
class VaeGroup:
    """The first `size` ranks of a DiT group, seen from one of its ranks.

    Attributes:
        process_group: the DiT group's process group; None is the world group.
        rank: this rank in the DiT group.
        world_size: ranks in the DiT group.
        size: the VAE PP size.
        timeout: the limit of one wait.
        traffic: what this rank has sent.
        progress: told `(done, total)` as this rank works through its own pieces.
        watch: told of every message, where anybody wants to know.
        finish: what becomes of decoded pieces before they land; the same on every rank. None leaves them.
    """

    process_group: dist.ProcessGroup | None
    rank: int
    world_size: int
    size: int
    timeout: timedelta
    traffic: Traffic = attrs.field(factory=Traffic)
    progress: Callable[[int, int], None] = _unwatched
    watch: Watch | None = None
    finish: Finish | None = None
    _shared: torch.Tensor | None = attrs.field(default=None, init=False)

    @classmethod
    def over(
        cls, process_group: dist.ProcessGroup | None, size: int, timeout: timedelta = timedelta(minutes=10)
    ) -> VaeGroup:
        """View the first `size` ranks of a process group (None: the world group).

        Without an initialised job, this process is the only rank.

        Raises:
            ValueError: the size is not between 1 and the group's size, or this process is not in the group.
        """
        rank, world_size = 0, 1
        if process_group is not None or dist.is_initialized():
            rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if rank < 0:
            raise ValueError("this process is not a member of the given process group")
        if not 1 <= size <= world_size:
            raise ValueError(f"a VAE PP size of {size} does not fit a DiT group of {world_size}")
        return cls(process_group, rank, world_size, size, timeout)

    @property
    def is_member(self) -> bool:
        """Whether this rank takes part in VAE work."""
        return self.rank < self.size

    def post(self, sends: Sequence[Send], recvs: Sequence[Recv], what: str) -> Pending:
        """Post one batch of messages; the order between the same two ranks must agree on both sides.

        Empty tensors are not sent, so both sides must agree on sizes, as plans do.

        Args:
            sends: what this rank sends; do not write to these tensors before `wait`.
            recvs: what this rank receives.
            what: names the exchange in errors.

        Raises:
            PeerError: a peer is gone.
        """
        operations: list[dist.P2POp] = []
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for send in sends:
            if send.tensor.numel():
                self.traffic.add(send.tensor)
                self._note(self.rank, send.to, send.tensor)
                operations.append(self._operation(dist.isend, self._staged(send.tensor), send.to))
        for recv in recvs:
            if recv.tensor.numel():
                self._note(recv.source, self.rank, recv.tensor)
                staged = self._staged(recv.tensor, copy=False)
                if staged is not recv.tensor:
                    copies.append((recv.tensor, staged))
                operations.append(self._operation(dist.irecv, staged, recv.source))
        if not operations:
            return Pending(self, what, [], [], torch.device("cpu"))
        peers = [operation.group_peer for operation in operations]
        EXCHANGES.begin()
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise PeerError(self.rank, sorted(set(peers)), what, _first_line(error)) from error
        # NCCL returns one work for the whole batch, gloo one for each message.
        named = list(zip(works, peers, strict=False)) if len(works) == len(peers) else [(works[0], peers[0])]
        pending = Pending(self, what, named, copies, operations[0].tensor.device)
        if self.watch is not None:
            self.watch.posted(pending)
        return pending

    def exchange(self, sends: Sequence[Send], recvs: Sequence[Recv], what: str) -> None:
        """Post one batch of messages and wait for it; see `post`."""
        self.post(sends, recvs, what).wait()

    def broadcast(self, tensor: torch.Tensor, source: int, what: str) -> None:
        """Fill `tensor` on every rank of the DiT group with rank `source`'s; all ranks must call it.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        if self.world_size == 1 or not tensor.numel():
            return
        if self.rank == source:
            self.traffic.add(tensor, self.world_size - 1)
        self._note(source, TO_ALL, tensor)
        staged = self._staged(tensor)
        EXCHANGES.begin()
        try:
            work = dist.broadcast(staged, group=self.process_group, group_src=source, async_op=True)
            assert work is not None
            self.await_work(work, staged.device)
        except RuntimeError as error:
            raise PeerError(self.rank, [source], what, _first_line(error)) from error
        if staged is not tensor:
            tensor.copy_(staged)

    def all_gather(self, tensor: torch.Tensor, ranks: int, what: str) -> list[torch.Tensor]:
        """Everyone's `tensor`, from the first `ranks` ranks, in order; all of those ranks must call it.

        For small tensors of one shape, such as statistics. Point to point, so that ranks beyond take no part.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        others = [peer for peer in range(ranks) if peer != self.rank]
        mine = tensor.contiguous()
        found = {peer: torch.empty_like(mine) for peer in others}
        sends = [Send(mine, peer) for peer in others]
        self.exchange(sends, [Recv(found[peer], peer) for peer in others], what)
        return [found.get(peer, mine) for peer in range(ranks)]

    def share(self, value: int, what: str) -> list[int]:
        """Every rank's number, by rank, on every rank of the DiT group; all of them must call it.

        Args:
            value: this rank's, at least -1.
            what: names the exchange in errors.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        if self.world_size == 1:
            return [value]
        cuda = torch.device("cuda")
        device = cuda if backend_of(self.process_group, cuda) == "nccl" else torch.device("cpu")
        if self._shared is None:  # made once: ranks agree where there is no memory left
            self._shared = torch.empty(self.world_size, dtype=torch.int64, device=device)
        held = self._shared.fill_(-1)
        held[self.rank] = value
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        EXCHANGES.begin()
        try:
            work = dist.all_reduce(held, dist.ReduceOp.MAX, group=self.process_group, async_op=True)
            assert work is not None
            self.await_work(work, device)
        except RuntimeError as error:
            raise PeerError(self.rank, others, what, _first_line(error)) from error
        return [int(one) for one in held.tolist()]

    def await_work(self, work: dist.Work, device: torch.device) -> None:
        """Wait for one work of this group on tensors of `device`, at most the group's time limit.

        NCCL work is awaited by the device's stream, so that the host runs ahead and messages hide behind
        kernels; its limit is the process group's own timeout, kept by NCCL's watchdog. A limit given here
        would block the host instead.
        """
        if backend_of(self.process_group, device) == "nccl":
            work.wait()
        else:
            work.wait(self.timeout)

    def _note(self, source: int, reader: int, tensor: torch.Tensor) -> None:
        if self.watch is not None:
            self.watch.passed(source, reader, tensor.numel() * tensor.element_size())

    def _operation(self, kind: Callable[..., Any], tensor: torch.Tensor, peer: int) -> dist.P2POp:
        assert tensor.is_contiguous(), "messages are contiguous tensors"
        return dist.P2POp(kind, tensor, group=self.process_group, group_peer=peer)

    def _staged(self, tensor: torch.Tensor, copy: bool = True) -> torch.Tensor:
        """The tensor itself, or its image in host memory where the backend cannot read the device's."""
        if tensor.device.type == "cpu" or backend_of(self.process_group, tensor.device) != "gloo":
            return tensor
        return tensor.cpu() if copy else torch.empty_like(tensor, device="cpu")


def backend_of(group: dist.ProcessGroup | None, device: torch.device) -> str:
    """The backend a process group uses for tensors of a device, as in `gloo`.

    A group may have several, as `init_process_group("cpu:gloo,cuda:nccl")` makes it.
    """
    for pair in str(dist.get_backend_config(group)).split(","):
        kind, _, backend = pair.partition(":")
        if kind == device.type:
            return backend
    return str(dist.get_backend(group))


def _first_line(error: Exception) -> str:
    """The first line of an error's message: the rest is the backend's stack."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
