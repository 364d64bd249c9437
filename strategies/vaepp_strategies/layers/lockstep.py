"""Several bands on one rank, one at a time, so that each runs as if it had a rank of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context

import attrs
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from vaepp_sdk.parallel.view import Pending, Recv, Send, VaeGroup

__all__ = ["BandGroup", "Lockstep"]


class _AbandonedError(Exception):
    """Another band of this rank failed."""


@attrs.define(eq=False)
class Lockstep:
    """Runs a rank's bands in turn, from one exchange to the next.

    Every band has a thread, and only one of them runs at any time: the order of all work and of all messages
    is fixed. Where all have said what they send and receive, the last one moves it: by copies inside the
    rank, by messages between ranks.

    Attributes:
        group: the VAE's view of the DiT group.
        owners: the rank of each band of the grid.
        current: the band that runs.
    """

    group: VaeGroup
    owners: tuple[int, ...]
    current: int = attrs.field(init=False)
    _own: tuple[int, ...] = attrs.field(init=False)
    _turns: dict[int, threading.Semaphore] = attrs.field(init=False)
    _posted: dict[int, tuple[Sequence[Send], Sequence[Recv]]] = attrs.field(factory=dict, init=False)
    _pending: Pending | None = attrs.field(default=None, init=False)
    _errors: list[BaseException] = attrs.field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self._own = tuple(band for band, owner in enumerate(self.owners) if owner == self.group.rank)
        self._turns = {band: threading.Semaphore(0) for band in self._own}
        self.current = self._own[0]

    def run(self, work: Callable[[int], torch.Tensor], device: torch.device) -> dict[int, torch.Tensor]:
        """Run `work` for each band of this rank; its results by band.

        Args:
            work: called with a band's number, in a thread of that band.
            device: where it computes.

        Raises:
            BaseException: what the first band to fail raised; the others are ended too.
        """
        results: dict[int, torch.Tensor] = {}
        state = _torch_state(device)

        def body(band: int) -> None:
            try:
                self._wait(band)
                with state():
                    results[band] = work(band)
            except _AbandonedError:
                pass
            except BaseException as error:
                self._errors.append(error)
            finally:
                self._hand_on(band)

        threads = [
            threading.Thread(target=copy_context().run, args=(body, band), daemon=True) for band in self._own
        ]
        for thread in threads:
            thread.start()
        self._turns[self._own[0]].release()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return results

    def post(self, band: int, sends: Sequence[Send], recvs: Sequence[Recv], what: str) -> Pending:
        """Take part in an exchange of all bands, from the thread of one; see `VaeGroup.post`."""
        self._posted[band] = (sends, recvs)
        if band == self._own[-1]:
            self._pending = self._move(what)
            self._posted.clear()
        self._hand_on(band)
        self._wait(band)
        assert self._pending is not None, "the last band posts before the first one goes on"
        return self._pending

    def _move(self, what: str) -> Pending:
        """Copy what stays on this rank, and post the rest, in the order of the grid on both sides."""
        sends, recvs, inside = [], [], {}
        for band in self._own:
            for send in self._posted[band][0]:
                if self.owners[send.to] == self.group.rank:
                    inside[band, send.to] = send.tensor
                else:
                    sends.append((band, send.to, send.tensor))
            recvs += [(recv.source, band, recv.tensor) for recv in self._posted[band][1]]
        outside = []
        for source, band, tensor in sorted(recvs, key=lambda item: item[:2]):
            if (source, band) in inside:
                tensor.copy_(inside[source, band])
            else:
                outside.append(Recv(tensor, self.owners[source]))
        ordered = sorted(sends, key=lambda item: item[:2])
        return self.group.post([Send(tensor, self.owners[to]) for _, to, tensor in ordered], outside, what)

    def _wait(self, band: int) -> None:
        self._turns[band].acquire()
        if self._errors:
            raise _AbandonedError
        self.current = band

    def _hand_on(self, band: int) -> None:
        place = self._own.index(band) + 1
        self._turns[self._own[place % len(self._own)]].release()


@attrs.define(eq=False)
class BandGroup(VaeGroup):
    """A band's view of all bands of the grid, as if each had a rank of its own."""

    lockstep: Lockstep = attrs.field(kw_only=True)

    @classmethod
    def of(cls, lockstep: Lockstep, band: int) -> BandGroup:
        """The view of one band of this rank."""
        real, count = lockstep.group, len(lockstep.owners)
        first = band == lockstep.owners.index(real.rank)
        group = cls(real.process_group, band, count, count, real.timeout, lockstep=lockstep)
        if first:  # one band speaks for its rank
            group.progress = real.progress
        return group

    def post(self, sends: Sequence[Send], recvs: Sequence[Recv], what: str) -> Pending:
        """See `VaeGroup.post`; ranks are bands here."""
        return self.lockstep.post(self.rank, sends, recvs, what)


def _torch_state(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """The caller's modes, which torch keeps for each thread, for another thread."""
    inference, kind = torch.is_inference_mode_enabled(), device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else None
    watchers = _get_current_dispatch_mode_stack()
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    @contextmanager
    def state() -> Iterator[None]:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(inference))
            modes.enter_context(torch.no_grad())
            if autocast:
                modes.enter_context(torch.autocast(kind, dtype))
            for watcher in watchers:  # such as those that count operations or bytes
                _push_mode(watcher)
                modes.callback(_pop_mode)
            if stream is not None:
                modes.enter_context(torch.cuda.device(device))
                modes.enter_context(torch.cuda.stream(stream))
            yield

    return state
