"""The engine of a rank that was started by a launcher: the same work, in this very process."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from vaepp_sdk.entries import load_object
from vaepp_sdk.errors import AgreementError, PeerError, RankError, RunError, UserError
from vaepp_sdk.events import LatentsKept, Progress, StageStart
from vaepp_sdk.kept import resume_notes
from vaepp_sdk.runtime.board import Board
from vaepp_sdk.runtime.inplace import Launch
from vaepp_sdk.runtime.job import Job
from vaepp_sdk.runtime.news import Answers, Event
from vaepp_sdk.runtime.records import ErrorRecord, alike
from vaepp_sdk.runtime.stacks import frames_of
from vaepp_sdk.runtime.voice import hush, tell
from vaepp_sdk.runtime.watchdog import Watchdog
from vaepp_sdk.runtime.work import Answer, RankWork, Seat

__all__ = ["JoinedRank"]

_GRACE = {"user": 5.0, "peer": 2.0, "own": 0.0}
"""How long a rank that failed listens to the others before it raises, in seconds: refusals come from all
alike, and what a peer caused is best told in the peer's words."""


_ALIKE_GRACE = 1.0
"""How long a rank whose check failed waits for the others to fail alike."""

_BOOT_SLACK = 2.0
"""How much later than a rank that names who has not come one that cannot do so ends itself."""


class JoinedRank:
    """This process as one rank of a job; every rank makes the same calls in the same order.

    Args:
        job: what runs.
        launch: this process's place.
        on_event: told of stages and steps, on rank 0.
    """

    def __init__(self, job: Job, launch: Launch, on_event: Callable[[Event], None]) -> None:
        self._job = job
        self._launch = launch
        self._on_event = on_event
        self._stage = "boot"
        self._runs = 0
        self._part = "load"
        self._worker = 0
        self._kept: Path | None = None
        self._watchdog = Watchdog(job.limits, self._stuck)
        self._work: RankWork | None = None
        self._board: Board

    def start(self) -> None:
        """Join the other ranks and load.

        Raises:
            UserError: a rank cannot do what was asked for; all raise alike.
            RankError: a rank failed.
        """
        work: RankWork = load_object(self._job.target, "the runtime")(self._seat())
        with self._limit("boot", _BOOT_SLACK):
            self._join(work)
        self._work = work
        self._board = Board(self._launch.rank, self._launch.world_size)
        self._stage = "load"
        self._watchdog.enter("load")
        with self._limit("load"), self._watched():
            self._together(functools.partial(_load, work))

    def run(self, request: Mapping[str, Any]) -> Answers:
        """Serve one request; the pictures are those that landed on this rank.

        Raises:
            AgreementError: the ranks were not asked for the same.
            UserError: a rank refused the request; all raise alike.
            RequestError: all ranks failed alike before they exchanged anything; they stay together.
            RankError: a rank failed.
        """
        work = self._work
        if work is None:
            raise RunError("this rank has left its job")
        self._runs += 1
        self._part = f"answer {self._runs}"
        self._kept = None
        self._stage = "request"
        self._watchdog.enter("request")
        with self._limit("request"), self._watched():
            agreed = self._agree(request)
            values, answer = self._together(lambda: work.run(agreed))
        return Answers(values, [answer.pictures])

    def close(self, now: bool = False) -> None:
        """Leave the job; `now` leaves it as it is, because other ranks may be gone."""
        work, self._work = self._work, None
        if work is not None and not now:
            work.close()

    def _join(self, work: RankWork) -> None:
        try:
            work.join()
        except RuntimeError as error:  # the backend's: it has no class of its own
            raise ErrorRecord.of(error, self._launch.rank, self._stage).error() from error

    def _seat(self) -> Seat:
        return Seat(
            rank=self._launch.rank,
            world_size=self._launch.world_size,
            local_rank=self._launch.local_rank,
            local_size=self._launch.local_size,
            payload=self._job.payload,
            timeout=timedelta(seconds=self._job.limits.exchange),
            boot=timedelta(seconds=self._job.limits.boot),
            observer=self._observe,
        )

    def _observe(self, event: Event) -> None:
        if isinstance(event, LatentsKept):
            self._kept = Path(event.folder)
        elif isinstance(event, StageStart):
            self._stage = event.stage
            self._watchdog.enter(event.stage)
        elif isinstance(event, Progress):
            self._watchdog.step(event.done, event.total)
        if self._launch.rank == 0 or isinstance(event, LatentsKept):
            self._on_event(event)

    def _agree(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rank 0's request, which has the seed for all where none was asked for."""
        every = self._board.gather(f"request {self._runs}", request, self._job.limits.exchange)
        first: dict[str, Any] = every[0]
        differing = [rank for rank, other in enumerate(every) if {**other, "seed": 0} != {**first, "seed": 0}]
        if differing:
            raise AgreementError(f"rank 0 and ranks {differing} were asked for different pictures")
        return first

    def _together(self, work: Callable[[], Answer]) -> tuple[list[Any], Answer]:
        """Do this rank's part, then see how the others fared: where one fails, all raise its failure."""
        try:
            answer = self._done(work)
        except BaseException as error:
            # A signal: launchers send it once another rank has failed.
            if not isinstance(error, Exception) and self._neighbours_said():
                hush()
            raise
        self._board.post(self._part, {"value": dict(answer.value)})
        found = self._board.read(self._part, self._job.limits.exchange)
        records = _records(found)
        if records:
            raise records[0].error()
        return [one["value"] for one in self._board.all_of(found, self._part)], answer

    def _done(self, work: Callable[[], Answer]) -> Answer:
        try:
            return work()
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> Exception:
        """What to raise for an error on this rank: its own, or the one of another rank that caused it."""
        mine = ErrorRecord.of(error, self._launch.rank, self._stage)
        harmless = isinstance(error, RankError) and error.harmless
        found: dict[int, Any] = {self._launch.rank: {}}
        # The store may be gone with the rank or the node that held it.
        with contextlib.suppress(RuntimeError):
            self._post(mine)
            found = self._board.read(self._part, _ALIKE_GRACE if harmless else _GRACE[mine.kind])
            records = _records(found)
            if harmless and len(records) == self._launch.world_size and alike(records):
                return mine.refusal(alone=False)
            first = records[0]
            if mine.kind == "peer" and first.kind != "peer":
                if first.rank in self._neighbours:
                    hush()
                return first.error()
        if mine.kind == "peer":
            return self._lost(error, mine, found)
        return error if isinstance(error, UserError) else mine.error()

    def _post(self, record: ErrorRecord) -> None:
        """Tell the other ranks that this one has failed."""
        self._board.post(self._part, {"record": record.to_dict()})
        if record.kind != "user":  # what one rank refuses, the others may come to refuse as well, and stay
            self._board.end(self._part)

    def _lost(self, error: Exception, mine: ErrorRecord, found: Mapping[int, Any]) -> PeerError:
        """Other ranks broke a wait and none says why: those that say nothing at all are gone."""
        silent = [rank for rank in range(self._launch.world_size) if rank not in found]
        stage, hint = f"stage {mine.stage}", "which its launcher may explain"
        if isinstance(error, PeerError):
            cause = f"{error.cause}; it is gone or stuck, {hint}"
            return PeerError(mine.rank, silent or error.peers, f"{stage}, {error.what}", cause)
        peers = silent or [rank for rank in range(self._launch.world_size) if rank != mine.rank]
        return PeerError(
            mine.rank, peers, stage, f"a rank or a node is gone or stuck, {hint} ({_plain(mine)})"
        )

    def _watched(self) -> contextlib.AbstractContextManager[None]:
        """Watch this rank while it does its part."""
        return self._watchdog.watching(functools.partial(self._over, self._board.aside()))

    def _over(self, board: Board) -> str:
        """Why the job has ended for other ranks while this one does its part, or nothing."""
        try:
            rank = board.ended(self._part)
        except RuntimeError:  # torch has nothing narrower
            return "the job's store is gone"
        return "" if rank is None else f"rank {rank} has failed"

    @property
    def _neighbours(self) -> set[int]:
        """The other ranks of this machine; each tells of its own failure."""
        first = self._launch.rank - self._launch.local_rank
        return set(range(first, first + self._launch.local_size)) - {self._launch.rank}

    def _neighbours_said(self, since: float = 0.0) -> bool:
        """Whether another rank of this machine has told of a failure, at least so many seconds ago."""
        records = list[ErrorRecord]()
        with contextlib.suppress(RuntimeError):  # the store may be gone
            records = _records(self._board.read(self._part, 0.0))
        latest = time.monotonic_ns() - since * 1e9
        return any(one.rank in self._neighbours and one.time < latest for one in records)

    @contextlib.contextmanager
    def _limit(self, phase: str, slack: float = 0.0) -> Iterator[None]:
        """End this process when a phase takes longer than its limit: there is no parent that would."""
        timer = threading.Timer(getattr(self._job.limits, phase) + slack, self._give_up, [phase])
        timer.daemon = True
        self._worker = threading.get_ident()
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _stuck(self, what: str) -> None:
        """End this process, whose work stands still: its peers may wait for it for hours."""
        error = RankError(self._launch.rank, self._stage, what)
        record = ErrorRecord.of(error, self._launch.rank, self._stage)
        # A peer that has waited for less than its grace will find these words, and leave them to this rank.
        said = self._neighbours_said(_GRACE["peer"])
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._post(record)
        if not said:
            tell(str(error), *frames_of(self._worker), *resume_notes(self._kept))
        sys.stderr.flush()
        os._exit(1)

    def _give_up(self, phase: str) -> None:
        limit = getattr(self._job.limits, phase)
        tell(f"[limits] {phase} = {limit:g} s is over in stage {self._stage}", *frames_of(self._worker))
        sys.stderr.flush()
        os._exit(1)


def _load(work: RankWork) -> Answer:
    work.load()
    return Answer()


def _plain(record: ErrorRecord) -> str:
    """A backend's words without the place in its sources and its advice."""
    return re.sub(r"^\w+: (\[[^]]*\] *)?", "", record.cause).partition(". ")[0]


def _records(found: Mapping[int, Any]) -> list[ErrorRecord]:
    """The failures among what ranks have posted: those that no peer caused first, then the earliest."""
    records = [ErrorRecord(**one["record"]) for one in found.values() if "record" in one]
    return sorted(records, key=lambda record: (record.kind == "peer", record.time, record.rank))
