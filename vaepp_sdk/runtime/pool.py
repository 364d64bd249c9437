"""A pool of ranks: started once, serving requests one after the other, ended whatever happens."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vaepp_sdk.errors import RunError, VaeppWarning
from vaepp_sdk.runtime.channel import encode
from vaepp_sdk.runtime.job import Job
from vaepp_sdk.runtime.news import Answers, Ended, Event, Happened, News, Ready, Refused, Warned
from vaepp_sdk.runtime.supervisor import Supervisor
from vaepp_sdk.runtime.turns import Turns

__all__ = ["WorkerPool"]

NewsT = TypeVar("NewsT", Ready, Answers)


def _unheard(event: Event) -> None:
    """An event that nobody listens to."""


class WorkerPool:
    """The ranks of one job on this machine, in processes of their own.

    `close`, garbage collection and the interpreter's exit end the ranks; if the process dies, the kernel does
    it.

    Args:
        job: what to start.
        on_event: told of stages and steps of rank 0, in the thread that waits for them.
    """

    def __init__(self, job: Job, on_event: Callable[[Event], None] = _unheard) -> None:
        self._supervisor = Supervisor(job)
        self._on_event = on_event
        self._turns = Turns()
        self._warned: set[str] = set()
        self._why_closed = ""
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _stop, self._supervisor, self._owner)

    def start(self) -> None:
        """Start the ranks and wait until they have loaded.

        Raises:
            UserError: what was asked for cannot be done.
            RankError: a rank failed.
        """
        with self._turns.turn():
            self._await(Ready, self._supervisor.start)

    def run(self, request: Mapping[str, Any]) -> Answers:
        """Serve one request on all ranks.

        Raises:
            UserError: all ranks refused it alike; the pool goes on.
            RequestError: all ranks failed alike before they exchanged anything; the pool goes on.
            RankError: a rank failed; the pool has ended.
            RunError: the pool has ended, or belongs to another process; or the request is too long to send,
                or made from inside `on_event`.
        """
        data = encode({"kind": "request", "request": dict(request)})
        with self._turns.turn():
            self._check_open()
            return self._await(Answers, functools.partial(self._supervisor.submit, data))

    def close(self, now: bool = False) -> None:
        """End the ranks and wait until none is left; a second call does nothing.

        Args:
            now: end them in the middle of their work.
        """
        self._why_closed = self._why_closed or "it was closed"
        if os.getpid() == self._owner and self._finalizer.detach():
            self._supervisor.stop(now)
            # An error that ends the ranks tells more than a warning that was made an error.
            with contextlib.suppress(*([VaeppWarning] if now else [])):
                self._drain()

    def pids(self) -> list[int]:
        """The process ids of the ranks, by rank."""
        return self._supervisor.pids()

    def _check_open(self) -> None:
        if os.getpid() != self._owner:
            raise RunError(f"these ranks belong to process {self._owner}, and this is its fork")
        if self._why_closed:
            raise RunError(f"the ranks have ended: {self._why_closed}; a new pipeline starts new ones")

    def _await(self, wanted: type[NewsT], begin: Callable[[], None]) -> NewsT:
        """Begin, and take news until what is wanted comes; what ends the wait but a refusal ends the pool.

        An interrupt does so too, wherever it strikes: the next call would be given this one's answer.
        """
        try:
            begin()
            while not isinstance(news := self._supervisor.news.get(), wanted | Refused):
                self._heed(news)
        except BaseException as error:
            self._why_closed = self._why_closed or str(error) or type(error).__name__
            self.close(now=True)
            raise
        if isinstance(news, Refused):
            raise news.error
        return news

    def _heed(self, news: News) -> None:
        if isinstance(news, Happened):
            self._on_event(news.event)
        elif isinstance(news, Warned):
            self._warn(news.text)
        elif isinstance(news, Ended):
            raise news.error or RunError("the ranks were ended while they worked")

    def _drain(self) -> None:
        """Pass on the warnings that are left."""
        with contextlib.suppress(queue.Empty):
            while True:
                news = self._supervisor.news.get_nowait()
                if isinstance(news, Warned):
                    self._warn(news.text)
                elif isinstance(news, Ended):
                    self._supervisor.news.put(news)  # a call that waits in another thread ends with it
                    if news.warning:
                        self._warn(news.warning)
                    return

    def _warn(self, text: str) -> None:
        """Give each warning once, however many ranks and requests it comes from."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, VaeppWarning, stacklevel=2)


def _stop(supervisor: Supervisor, owner: int) -> None:
    """End a forgotten pool; a forked copy of it owns no ranks."""
    if os.getpid() == owner:
        supervisor.stop()
