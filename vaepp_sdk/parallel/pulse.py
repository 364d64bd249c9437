"""Signs of life of ranks that a launcher started, through the job's own store.

A process that is killed on another machine says nothing: in a collective its connections break, but a rank
that waits for it anywhere else would wait until a limit of minutes is over. No collective, and no group.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["SILENCE", "Ear", "Pulse"]

_EVERY = 1.0
_LOOKS = 30
SILENCE = f"no sign of life for {_EVERY * _LOOKS:g} s: its process is gone, stopped or held up in C"
"""What is said of a rank that an `Ear` finds silent."""


class Pulse:
    """Beats for this rank from a thread of its own, until it is stopped or the process ends.

    Args:
        store: the one that every rank of the job has.
        rank: this rank.
    """

    def __init__(self, store: Any, rank: int) -> None:
        # A connection of its own: on a shared one a beat waits until another thread's wait is over.
        self._store = store.clone()
        self._key = _key(rank)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="vaepp-pulse", daemon=True)
        self._store.set(self._key, "0")
        self._thread.start()
        atexit.register(self.stop)  # a thread inside torch must not meet the end of the interpreter

    def stop(self) -> None:
        """Beat no more: the group is about to be taken down."""
        self._over.set()
        self._thread.join()
        atexit.unregister(self.stop)

    def _beat(self) -> None:
        for number in itertools.count(1):
            if self._over.wait(_EVERY):
                return
            try:
                self._store.set(self._key, str(number))
            except RuntimeError:  # torch has nothing narrower; who waits for the store will tell
                return


class Ear:
    """Listens whether ranks that are waited for still live; ranks without a pulse are taken to.

    It counts its own looks and not time: after a whole job was stopped and went on, nobody has been silent.

    Args:
        store: the one that every rank of the job has; of none, nobody is silent.
        ranks: the job's ranks that are listened to; `silent` counts within them.
    """

    def __init__(self, store: Any, ranks: Sequence[int]) -> None:
        self._store = store
        self._ranks = ranks
        self._next = 0.0
        self._heard: dict[int, tuple[bytes, int]] = {}

    def silent(self, ranks: Iterable[int]) -> list[int]:
        """Those of some ranks that have not beaten for too long; cheap enough for every turn of a wait."""
        if self._store is None or (now := time.monotonic()) < self._next:
            return []
        self._next = now + _EVERY
        return [rank for rank in ranks if self._looks(rank) > _LOOKS]

    def _looks(self, rank: int) -> int:
        """How many looks found the same beat."""
        key = _key(self._ranks[rank])
        if not self._store.check([key]):
            return 0
        beat: bytes = self._store.get(key)
        last, looks = self._heard.get(rank, (b"", 0))
        self._heard[rank] = (beat, looks + 1 if beat == last else 1)
        return self._heard[rank][1]


def _key(rank: int) -> str:
    return f"vaepp/pulse/{rank}"
