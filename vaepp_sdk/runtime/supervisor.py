"""The thread that starts the ranks of a job, watches them, and ends them.

It lives as long as the job, because the kernel ties each rank's life to the thread that started it. It sets
no signal handler and touches nothing of the program around it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vaepp_sdk.errors import RunError, UserError, VaeppError
from vaepp_sdk.runtime.beats import Beat, make_beats
from vaepp_sdk.runtime.channel import Message, encode
from vaepp_sdk.runtime.job import Job, RunFolder
from vaepp_sdk.runtime.news import Answers, Ended, Happened, News, Ready, Refused, Warned, event_from
from vaepp_sdk.runtime.pace import stall
from vaepp_sdk.runtime.pictures import read_pictures
from vaepp_sdk.runtime.process import RankProcess, end_all, spawn
from vaepp_sdk.runtime.records import ErrorRecord, alike, read_record
from vaepp_sdk.runtime.rendezvous import listen
from vaepp_sdk.runtime.stacks import ask_for_stacks
from vaepp_sdk.runtime.verdict import Evidence, Trigger, bad_end, judge, lingering, needs_stacks
from vaepp_sdk.text import reason_of

__all__ = ["Supervisor"]

_TURN = 0.25
_EVIDENCE_TIME, _EVIDENCE_TURN = 0.5, 0.05
_CLOSE_LIMIT, _EXIT_LIMIT = 10.0, 30.0
"""How long ranks may take to finish when they are asked to leave, and to exit after that: what they have
imported is slow to go on a loaded machine."""

_REFUSAL_GRACE, _CHECK_GRACE = 5.0, 1.0
"""After the first rank refused a request, or a check failed: how long the others may take to say the same."""

_LIMIT_NAMES = {"boot": "starting", "load": "loading", "request": "a request"}


class Supervisor:
    """Runs one job to its end; everything it has to say comes through `news`, and `Ended` comes last."""

    def __init__(self, job: Job) -> None:
        self.news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._job = job
        self._ranks: list[RankProcess] = []
        self._answers: dict[int, Message] = {}
        self._failures: dict[int, ErrorRecord] = {}
        self._lingered: dict[str, list[int]] = {}
        self._trigger: Trigger | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        with _starting():
            self._ear, self._bell = socket.socketpair()
            self._selector = selectors.DefaultSelector()
        self._bell.setblocking(False)
        self._watch(self._ear, self._obey)
        self._closing_since: float | None = None
        self._now = False
        self._has_folder = self._keeps_logs = False
        self._thread = threading.Thread(target=self._live, name="vaepp-supervisor", daemon=True)

    def start(self) -> None:
        """Start the ranks; `Ready` or `Ended` follows."""
        self._thread.start()

    def submit(self, request: bytes) -> None:
        """Give all ranks a request, encoded; `Answers`, `Refused` or `Ended` follows."""
        self._command(functools.partial(self._submit, request))

    def stop(self, now: bool = False) -> None:
        """End the job and wait until no rank is left.

        Args:
            now: end ranks in the middle of their work; else idle ranks leave in good order.
        """
        self._now |= now
        self._command(self._close)
        if self._thread.ident is None:
            self._release()
        elif threading.current_thread() is not self._thread:  # a finalizer may run in this one
            self._thread.join()

    def pids(self) -> list[int]:
        """The process ids of the ranks."""
        return [rank.process.pid for rank in self._ranks]

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        with contextlib.suppress(OSError):  # a full pipe wakes the thread too; a closed one needs nothing
            self._bell.send(b"!")

    def _live(self) -> None:
        """The thread: start, watch until something ends the job, end it, tell."""
        ended = Ended()
        try:
            self._start_ranks()
            while not self._is_over():
                self._turn(_TURN)
            ended = self._end()
        except Exception as error:  # a fault of the supervisor's own must reach the caller too
            self._end_all()
            failure = (
                error if isinstance(error, VaeppError) else RunError(f"the supervisor failed: {error!r}")
            )
            if self._ranks:
                failure.add_note(self._logs())
            ended = Ended(failure)
        finally:
            self._release()
            self.news.put(ended)

    def _start_ranks(self) -> None:
        with _starting():
            self._folder = RunFolder.create()
            self._has_folder = True
            beats_fd = make_beats(self._job.world_size)
        try:
            with _starting(), listen() as listener:
                for number in range(self._job.world_size):
                    rank = spawn(self._job, number, self._folder, beats_fd, listener)
                    self._ranks.append(rank)
                    hear = functools.partial(self._hear, rank)
                    self._selector.register(rank.channel, selectors.EVENT_READ, hear)
                    self._selector.register(
                        rank.pidfd, selectors.EVENT_READ, functools.partial(self._gone, rank)
                    )
        finally:
            os.close(beats_fd)

    def _watch(self, descriptor: Any, reaction: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, reaction)

    def _is_over(self) -> bool:
        if self._trigger:
            return True
        if self._closing_since is None:
            return False
        left = [rank for rank in self._ranks if not rank.ended()]
        return self._now or not left or time.monotonic() - self._closing_since > _close_limit(left)

    def _turn(self, wait: float) -> None:
        """One turn: send, hear what has come within the wait, compare clocks."""
        for rank in self._ranks:
            rank.channel.flush()
        if any(rank.channel.has_output for rank in self._ranks):
            wait = min(wait, 0.02)
        for key, _ in self._selector.select(wait):
            key.data()
        if self._closing_since is None:
            self._compare_clocks()

    def _obey(self) -> None:
        """Carry out what other threads have asked for."""
        self._ear.recv(4096)
        while not self._commands.empty():
            self._commands.get()()

    def _submit(self, request: bytes) -> None:
        self._answers = {}
        for rank in self._ranks:
            rank.channel.post(request)
            rank.enter("request")

    def _close(self) -> None:
        if self._closing_since is not None:
            return
        # Ranks in the middle of something cannot be asked to leave: they do not listen.
        self._now |= any(rank.phase != "idle" for rank in self._ranks)
        self._closing_since = time.monotonic()
        for rank in self._ranks:
            rank.channel.post(encode({"kind": "close"}))

    def _hear(self, rank: RankProcess) -> None:
        try:
            messages, more = rank.channel.read()
            for message in messages:
                self._take(rank, message)
        except (RunError, KeyError, TypeError) as error:
            self._suspect(rank, f"it sent what is no message of ours: {error}")
            more = False
        if not more:
            self._selector.unregister(rank.channel)
            if self._closing_since is None:
                self._suspect(rank, "it no longer hears its parent")

    def _take(self, rank: RankProcess, message: Message) -> None:
        match message["kind"]:
            case "event":
                self.news.put(Happened(event_from(message["name"], message["event"])))
            case "warning":
                self.news.put(Warned(message["text"]))
            case "joined":
                rank.enter("load")
            case "ready":
                rank.enter("idle")
                if all(one.phase == "idle" for one in self._ranks):
                    self.news.put(Ready())
            case "answer" | "refused":
                rank.enter("idle")
                self._answers[rank.rank] = message
                if len(self._answers) == len(self._ranks):
                    self._settle()
            case "failed":
                self._failures[rank.rank] = ErrorRecord(**message["record"])
            case "lingers":
                self._lingered.setdefault(message["what"], []).append(rank.rank)
            case kind:
                raise RunError(f"unknown kind {kind!r}")

    def _settle(self) -> None:
        """All ranks have answered: the request is served, or refused by all, or the group is in doubt."""
        ordered = [self._answers[rank.rank] for rank in self._ranks]
        pictures = [
            read_pictures(rank.pictures_fd, answer.get("pictures", []))
            for rank, answer in zip(self._ranks, ordered, strict=True)
        ]
        refusals = self._refusals()
        if not refusals:
            self.news.put(Answers([one["value"] for one in ordered], pictures))
        elif len(refusals) == len(ordered) and alike(refusals):
            self.news.put(Refused(self._refused(refusals[0], alone=False)))
        elif _harms_nobody(refusals):
            self.news.put(Refused(self._refused(refusals[0], alone=True)))
        else:
            self._suspect(self._ranks[refusals[0].rank], refusals[0].cause)

    def _refusals(self) -> list[ErrorRecord]:
        """What ranks have said of a request that they do not serve, by rank."""
        answers = (self._answers[rank] for rank in sorted(self._answers))
        return [ErrorRecord(**one["record"]) for one in answers if one["kind"] == "refused"]

    def _refused(self, record: ErrorRecord, *, alone: bool) -> VaeppError:
        error = record.refusal(alone=alone)
        if not isinstance(error, UserError):
            error.add_note(self._logs())
        return error

    def _logs(self) -> str:
        """Where to read more; told of, the folder stays."""
        self._keeps_logs = True
        return f"the logs of all ranks are in {self._folder.path}"

    def _gone(self, rank: RankProcess) -> None:
        self._selector.unregister(rank.pidfd)
        if self._closing_since is None:
            self._suspect(rank, str(rank.ending()))

    def _suspect(self, rank: RankProcess, what: str) -> None:
        """Note the first bad event; it ends the job."""
        self._trigger = self._trigger or Trigger(rank.rank, what)

    def _compare_clocks(self) -> None:
        """Find a rank that is over a limit."""
        now = time.monotonic()
        limits = self._job.limits
        for rank in self._ranks:
            if rank.phase == "idle":
                continue
            limit = getattr(limits, rank.phase)
            if now - rank.since > limit:
                name = _LIMIT_NAMES[rank.phase]
                self._suspect(rank, f"the limit for {name} is {limit:g} s ([limits] {rank.phase})")
            elif now - max(rank.slot.read().alive, rank.since) > limits.exchange:
                self._suspect(rank, f"no heartbeat for {limits.exchange:g} s ([limits] exchange)")
            elif self._refusal_is_lonely(rank, now):
                self._suspect(rank, "it did not answer a request that another rank refused")
        self._watch_steps(now)

    def _watch_steps(self, now: float) -> None:
        """Find that nobody who works on a request comes further."""
        busy = [rank for rank in self._ranks if rank.phase == "request"]
        beats = [(rank.slot.read(), rank.pace) for rank in busy]
        for beat, pace in beats:
            pace.note(beat)
        found = stall(beats, now, self._job.limits)
        if found is not None:
            self._suspect(busy[found.place], found.what)

    def _refusal_is_lonely(self, busy: RankProcess, now: float) -> bool:
        """Whether a rank that still works will not say what another one has said."""
        beat = busy.slot.read()
        for refusal in self._refusals():
            grace = _REFUSAL_GRACE if refusal.kind == "user" else _CHECK_GRACE
            if now - self._ranks[refusal.rank].since > grace:
                return True
            if refusal.kind != "user" and _is_past(beat, refusal):
                return True
        return False

    def _end(self) -> Ended:
        """End every rank and say how the job ended."""
        error = self._judge() if self._trigger else None
        late = [] if error or self._now else [rank for rank in self._ranks if not rank.ended()]
        if late:
            ask_for_stacks(late, self._folder)
        self._end_all()  # those that have left may have left children
        if error or self._now:
            if error and not isinstance(error, UserError):
                error.add_note(self._logs())
            return Ended(error)
        self._turn(0)  # the last words
        return Ended(warning=self._farewell([rank.rank for rank in late]))

    def _end_all(self) -> None:
        if self._ranks:
            end_all(self._ranks, str(self._folder.path))

    def _farewell(self, late: Sequence[int]) -> str | None:
        evidence = [self._evidence(rank) for rank in self._ranks]
        if bad := bad_end(evidence, late):
            return f"{bad}; {self._logs()}"
        return lingering(self._lingered)

    def _judge(self) -> VaeppError:
        """Wait a moment for evidence, then decide whose failure it is."""
        assert self._trigger
        limit = time.monotonic() + _EVIDENCE_TIME
        while (left := limit - time.monotonic()) > 0 and not all(map(self._has_spoken, self._ranks)):
            self._turn(min(left, _EVIDENCE_TURN))
        evidence = [self._evidence(rank) for rank in self._ranks]
        stacks = None
        if needs_stacks(evidence):
            stacks = ask_for_stacks((rank for rank in self._ranks if rank.phase != "idle"), self._folder)
        return judge(evidence, self._trigger, stacks)

    def _has_spoken(self, rank: RankProcess) -> bool:
        """Whether nothing more can come of a rank: it has ended, or left the record of its error."""
        return rank.ending() is not None or self._folder.error(rank.rank).exists()

    def _evidence(self, rank: RankProcess) -> Evidence:
        record = read_record(self._folder.error(rank.rank)) or self._failures.get(rank.rank)
        answer = self._answers.get(rank.rank)
        if record is None and answer and answer["kind"] == "refused":
            record = ErrorRecord(**answer["record"])
        return Evidence(
            rank=rank.rank,
            busy=rank.phase != "idle",
            beat=rank.slot.read(),
            record=record,
            ending=rank.ending(),
            last_line=self._folder.last_line(rank.rank),
        )

    def _release(self) -> None:
        for rank in self._ranks:
            rank.release()
        if self._has_folder:
            self._folder.keep() if self._keeps_logs else self._folder.remove()
        self._selector.close()
        self._ear.close()
        self._bell.close()


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Let a system that has nothing left to start ranks with not look like a fault of ours.

    Raises:
        RunError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        hint = "; allow more open files (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
        raise RunError(f"the ranks cannot be started: {reason_of(error)}{hint}") from error


def _close_limit(ranks: Sequence[RankProcess]) -> float:
    return _EXIT_LIMIT if all(rank.slot.read().done for rank in ranks) else _CLOSE_LIMIT


def _is_past(beat: Beat, failure: ErrorRecord) -> bool:
    """Whether a rank has passed the place where a check failed on another."""
    if beat.stage == failure.stage:
        return beat.exchanges > 0
    return beat.entered * 1e9 > failure.time


def _harms_nobody(refusals: Sequence[ErrorRecord]) -> bool:
    """Saving exchanges nothing, and neither does a pipeline that one rank runs whole: no rank is waiting."""
    return all(one.stage in ("save", "call") for one in refusals)
