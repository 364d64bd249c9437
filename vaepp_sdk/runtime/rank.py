"""The life of a rank's process after its first lines: boot, load, requests, end."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import attrs

from vaepp_sdk.entries import load_object
from vaepp_sdk.errors import RankError, UserError, VaeppWarning
from vaepp_sdk.events import Event, Progress, StageStart
from vaepp_sdk.parallel.exchanges import EXCHANGES
from vaepp_sdk.runtime.beats import Slot, keep_ticking
from vaepp_sdk.runtime.channel import Message, RankChannel
from vaepp_sdk.runtime.leaving import leave_soon
from vaepp_sdk.runtime.pictures import write_pictures
from vaepp_sdk.runtime.records import ErrorRecord, write_record
from vaepp_sdk.runtime.work import RankWork, Seat

__all__ = ["serve"]


def serve(control: socket.socket, boot: Mapping[str, Any]) -> int:
    """Live as one rank of a job until the parent says `close`; returns the exit code.

    Args:
        control: this rank's end of the channel.
        boot: the parent's first message.
    """
    channel = RankChannel(control)
    slot = Slot(boot["beats_fd"], boot["rank"])
    keep_ticking(slot.tick)
    slot.enter("boot")
    inbox = _watch(channel)
    # Kept open for life: the parent asks for the stacks of a rank that does not move.
    stacks = Path(boot["stacks"]).open("w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    faulthandler.enable()
    try:
        _Rank(boot, channel, slot).live(inbox)
    except BaseException as error:  # SystemExit included: work that leaves early has failed
        record = ErrorRecord.of(error, boot["rank"], slot.read().stage)
        _leave_word(record, boot, channel)
        _leave_at_once(1)
    slot.finish()
    leave_soon(0, lambda what: channel.send({"kind": "lingers", "what": what}))
    return 0


def _watch(channel: RankChannel) -> queue.SimpleQueue[Message]:
    """Read the channel from a thread; its end means that the parent is gone, and this rank ends at once."""
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def read() -> None:
        for message in channel.messages():
            inbox.put(message)
        _leave_at_once(1)

    threading.Thread(target=read, name="vaepp-parent-watch", daemon=True).start()
    return inbox


def _leave_word(record: ErrorRecord, boot: Mapping[str, Any], channel: RankChannel) -> None:
    """Leave this rank's failure in its file, or send it where the disk is full, and in its log."""
    try:
        write_record(record, Path(boot["error"]))
    except OSError:
        with contextlib.suppress(OSError):
            channel.send({"kind": "failed", "record": record.to_dict()})
    _print_to_log(record.trace)


def _print_to_log(text: str) -> None:
    """Print where others read, if that can be: the disk may be full, and work may have closed the stream."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, file=sys.stderr, flush=True)


def _leave_at_once(code: int) -> None:
    """End without finalizers: they may wait for ranks that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


class _Rank:
    """One rank's work, and what it tells the parent."""

    def __init__(self, boot: Mapping[str, Any], channel: RankChannel, slot: Slot) -> None:
        self._channel = channel
        self._slot = slot
        self._pictures_fd: int = boot["pictures_fd"]
        self._seat = Seat(
            rank=boot["rank"],
            world_size=boot["world_size"],
            local_rank=boot["rank"],
            local_size=boot["world_size"],
            payload=boot["payload"],
            timeout=timedelta(seconds=boot["exchange"]),
            observer=self._observe,
            port=boot["port"],
            listen_fd=boot["listen_fd"],
        )
        self._target: str = boot["target"]

    def live(self, inbox: queue.SimpleQueue[Message]) -> None:
        """Boot, load and serve until `close`."""
        warnings.showwarning = self._show_warning
        EXCHANGES.listener = self._slot.exchange
        work: RankWork = load_object(self._target, "the runtime")(self._seat)
        work.join()
        self._slot.enter("load")
        self._channel.send({"kind": "joined"})
        work.load()
        self._slot.enter("idle")
        self._channel.send({"kind": "ready"})
        while (message := inbox.get())["kind"] == "request":
            self._slot.enter("request")
            self._answer(work, message["request"])
            self._slot.enter("idle")
        self._slot.enter("close")
        work.close()

    def _answer(self, work: RankWork, request: Mapping[str, Any]) -> None:
        try:
            answer = work.run(request)
        except UserError as error:
            self._refuse(error)
            return
        except RankError as error:
            if not error.harmless:
                raise
            _print_to_log("".join(traceback.format_exception(error)))
            self._refuse(error)
            return
        headers = write_pictures(self._pictures_fd, answer.pictures)
        self._channel.send({"kind": "answer", "value": dict(answer.value), "pictures": headers})

    def _refuse(self, error: Exception) -> None:
        """Say why a request is not served, and wait whether the other ranks say the same."""
        record = ErrorRecord.of(error, self._seat.rank, self._slot.read().stage)
        self._channel.send({"kind": "refused", "record": record.to_dict()})

    def _observe(self, event: Event) -> None:
        """Note an event in the slot; rank 0's go to the parent too."""
        if isinstance(event, StageStart):
            self._slot.enter(event.stage)
        elif isinstance(event, Progress):
            self._slot.step(event.done, event.total)
        if self._seat.rank == 0:
            name = type(event).__name__
            self._channel.send({"kind": "event", "name": name, "event": attrs.asdict(event)})

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Send vaepp's own warnings to the parent; the rest stay in this rank's log."""
        del file
        if issubclass(category, VaeppWarning):
            self._channel.send({"kind": "warning", "text": str(message)})
        else:
            _print_to_log(warnings.formatwarning(message, category, filename, lineno, line))
