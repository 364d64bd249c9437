"""What ranks under a launcher tell each other: plain data by name, through the job's own store.

No collective and no pickle: a rank that is not there is missed after a stated time, and named.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Mapping
from typing import Any

from vaepp_sdk.errors import PeerError
from vaepp_sdk.parallel.pulse import SILENCE, Ear

__all__ = ["Board"]

_BOARDS = itertools.count()
"""Ranks make their boards in the same order, so that the same number means the same board."""

_PAUSE = 0.02


class Board:
    """A board for one pipeline; every rank posts under the same names in the same order.

    Args:
        rank: this rank.
        world_size: ranks in the job.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._ranks = range(world_size)
        self._prefix = f"vaepp/{next(_BOARDS)}"
        self._store: Any = None
        self._mine: list[str] = []
        if world_size > 1:
            # The launcher's store, or that of a group older than us: torch has no public name for it.
            from torch.distributed.distributed_c10d import _get_default_store

            self._store = _get_default_store()
        self._ear = Ear(self._store, self._ranks)
        self._silent: list[int] = []
        self._alone: dict[str, str] = {}

    def aside(self) -> Board:
        """The same board for another thread's `ended`: on one connection a look waits for other waits."""
        found = copy.copy(self)
        if self._store is not None:
            found._store = self._store.clone()
        return found

    def post(self, name: str, value: Mapping[str, Any]) -> None:
        """Put this rank's value under a name; what nobody can still be reading is taken down."""
        key = self._key(name, self._rank)
        self._mine.append(key)
        if self._store is None:
            self._alone = {key: json.dumps(value)}
            return
        self._store.set(key, json.dumps(value))
        # A rank posts under a new name only after it has read the one before the last.
        while len(self._mine) > 4:
            self._store.delete_key(self._mine.pop(0))

    def end(self, name: str) -> None:
        """Note that the job is over for this rank, which has failed in what comes under a name."""
        if self._store is not None:
            self._store.set(f"{self._prefix}/over", json.dumps([name, self._rank]))

    def ended(self, name: str) -> int | None:
        """The rank for which the job is over, as far as one has said so under this name."""
        text = self._get(f"{self._prefix}/over")
        over, rank = json.loads(text) if text is not None else ("", 0)
        return rank if over == name else None

    def read(self, name: str, wait: float) -> dict[int, Any]:
        """What ranks have posted under a name, as soon as all have, one is silent, or the wait is over."""
        limit = time.monotonic() + wait
        found: dict[int, Any] = {}
        while True:
            for rank in self._ranks:
                if rank not in found and (text := self._get(self._key(name, rank))) is not None:
                    found[rank] = json.loads(text)
            missing = [rank for rank in self._ranks if rank not in found]
            self._silent = self._ear.silent(missing)
            if not missing or self._silent or time.monotonic() > limit:
                return found
            time.sleep(_PAUSE)

    def gather(self, name: str, value: Mapping[str, Any], wait: float) -> list[Any]:
        """Post a value and read everyone's, by rank.

        Raises:
            PeerError: naming the ranks that have not posted in time, or that are silent.
        """
        self.post(name, value)
        return self.all_of(self.read(name, wait), name)

    def all_of(self, found: Mapping[int, Any], name: str) -> list[Any]:
        """Everyone's value, by rank.

        Raises:
            PeerError: naming the ranks that have not posted, or of these the silent ones.
        """
        missing = [rank for rank in self._ranks if rank not in found]
        if missing:
            cause = SILENCE if self._silent else "they have not come this far in time"
            raise PeerError(self._rank, self._silent or missing, name, cause)
        return [found[rank] for rank in self._ranks]

    def _key(self, name: str, rank: int) -> str:
        return f"{self._prefix}/{name}/{rank}"

    def _get(self, key: str) -> str | bytes | None:
        if self._store is None:
            return self._alone.get(key)
        found: bytes | None = self._store.get(key) if self._store.check([key]) else None
        return found
