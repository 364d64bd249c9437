"""The gate before each stage: ranks show that they are about to do the same, through the job's own store.

No collective and no pickle: ranks that would not fit together in a collective can still say so, and one that
does not come is named. Rank 0 compares, so a gate costs each other rank two messages, however many there are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from vaepp_sdk.errors import AgreementError, PeerError
from vaepp_sdk.parallel.pulse import SILENCE, Ear
from vaepp_sdk.text import clean

__all__ = ["Gate", "differences"]

_GATES: dict[str, Iterator[int]] = {}
"""By group: its ranks make their gates in the same order, so that the same number means the same gate."""

_GRACE = timedelta(seconds=5)
"""How much longer than rank 0 the others wait: it is rank 0 that names who is missing."""

_FIRST_PAUSE, _LONGEST_PAUSE, _CHECKS_A_SECOND = 0.0002, 0.02, 5000
"""Between two looks into the store, in seconds, and how many looks all ranks of a large group may take."""

_MAX_TOLD = 3


class Gate:
    """Where the ranks of a job, or of a group of it, meet before they go on; one rank alone meets nobody.

    Every rank makes the gates of a group, and comes to each of them, in the same order.

    Args:
        timeout: how long ranks wait for each other.
        group: whose ranks meet; this process is one of them. None is the whole job. Verdicts and errors
            count ranks within it.
    """

    def __init__(self, timeout: timedelta, group: dist.ProcessGroup | None = None) -> None:
        self._timeout = timeout
        self._prefix = ""
        self._round = 0
        self._store: Any = None
        self._ear: Ear
        self._rank, self._ranks = 0, 1
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            # Of all stores this is the one that every rank has: torch has no public name for it.
            from torch.distributed.distributed_c10d import _get_default_store

            self._store = _get_default_store()
            self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
            in_job = dist.get_process_group_ranks(group)
            self._prefix, self._ear = _new_name(in_job), Ear(self._store, in_job)

    @property
    def is_open(self) -> bool:
        """Whether there is nobody to wait for, so that facts need not be gathered."""
        return self._store is None

    def agree(self, what: str, facts: Mapping[str, str], own: Mapping[str, str] | None = None) -> None:
        """Wait for all ranks, and go on only if they state the same.

        Args:
            what: what comes after the gate, for messages.
            facts: what all ranks must state alike.
            own: what the ranks that state it at all must state alike.

        Raises:
            AgreementError: on every rank, saying which ranks state what.
            PeerError: naming the ranks that have not come in time, or those that gave up.
        """
        verdict = self._meet(what, [dict(facts), dict(own or {}), ""])
        if verdict.get("missing"):
            raise PeerError(self._rank, verdict["missing"], f"before {what}", verdict["cause"])
        if verdict.get("failed"):
            raise PeerError(self._rank, verdict["failed"], f"before {what}", clean(verdict["problem"]))
        if verdict.get("differ"):
            raise AgreementError(f"ranks do not agree before {what}: {verdict['differ']}")

    def give_up(self, what: str, problem: str) -> None:
        """Come to the gate in place of `agree` only to say that this rank cannot go on.

        All ranks that agree get a `PeerError` with the problem; nobody waits for this rank in vain.

        Args:
            what: what comes after the gate, for messages.
            problem: why, in one line.

        Raises:
            PeerError: the job's store is gone.
        """
        self._meet(what, [{}, {}, problem])

    def _meet(self, what: str, posted: list[Any]) -> dict[str, Any]:
        """Post this rank's part and return the verdict; an empty one where there is nobody to wait for."""
        if self._store is None:
            return {}
        self._round += 1
        try:
            self._store.set(self._key(self._rank), json.dumps(posted))
            verdict = self._judge() if self._rank == 0 else self._hear()
            self._tidy()
        except RuntimeError as error:
            # torch raises nothing narrower for a store whose host has gone.
            raise PeerError(self._rank, [0], f"before {what}", "the job's store is gone") from error
        return verdict

    def _judge(self) -> dict[str, Any]:
        """Rank 0 waits for all, compares, and tells the others."""
        keys = [self._key(rank) for rank in range(self._ranks)]
        verdict = self._absent(keys, self._timeout)
        if not verdict:
            facts, own, problems = zip(*(json.loads(text) for text in self._read(keys)), strict=True)
            failed = [rank for rank, problem in enumerate(problems) if problem]
            if failed:
                verdict = {"failed": failed, "problem": problems[failed[0]]}
            else:
                verdict["differ"] = differences(facts, own)
        self._store.set(self._key("verdict"), json.dumps(verdict))
        return verdict

    def _hear(self) -> dict[str, Any]:
        """What rank 0 says; where it says nothing, it is missing itself, and perhaps not alone."""
        absent = self._absent([self._key("verdict")], self._timeout + _GRACE)
        return absent or dict(json.loads(self._store.get(self._key("verdict"))))

    def _absent(self, keys: Sequence[str], limit: timedelta) -> dict[str, Any]:
        """Wait for keys; if they do not come, who is missing and why nobody waits longer.

        The store's own wait is deaf to signals, with which launchers end ranks.
        """
        begun, pause = time.monotonic(), _FIRST_PAUSE
        longest = max(_LONGEST_PAUSE, self._ranks / _CHECKS_A_SECOND)
        while not self._store.check(list(keys)):
            if time.monotonic() - begun > limit.total_seconds():
                cause = f"not there after {self._timeout.total_seconds():g} s ([limits] exchange)"
                return {"missing": list(self._missing()) or [0], "cause": cause}
            # Rank 0 listens to all and tells the others, which listen to it alone.
            silent = self._ear.silent(self._missing() if self._rank == 0 else [0])
            if silent:
                return {"missing": silent, "cause": SILENCE}
            time.sleep(pause)
            pause = min(pause * 1.2, longest)
        return {}

    def _missing(self) -> Iterator[int]:
        return (rank for rank in range(self._ranks) if not self._store.check([self._key(rank)]))

    def _read(self, keys: Sequence[str]) -> list[bytes]:
        if self._store.has_extended_api():
            found: list[bytes] = self._store.multi_get(list(keys))
            return found
        return [self._store.get(key) for key in keys]

    def _tidy(self) -> None:
        """Take down this rank's part of the gate before: that all have come to this one means it was read."""
        if self._round > 1:
            self._store.delete_key(self._key(self._rank, self._round - 1))
            if self._rank == 0:
                self._store.delete_key(self._key("verdict", self._round - 1))

    def _key(self, who: int | str, number: int | None = None) -> str:
        return f"{self._prefix}/{self._round if number is None else number}/{who}"


def _new_name(ranks: Sequence[int]) -> str:
    """The same on all ranks of a group, and on no other: groups of other ranks know nothing of this one."""
    group = hashlib.sha256(repr(list(ranks)).encode()).hexdigest()[:16]
    return f"vaepp/gate/{group}/{next(_GATES.setdefault(group, itertools.count()))}"


def differences(facts: Sequence[Mapping[str, str]], own: Sequence[Mapping[str, str]] = ()) -> str:
    """In what ranks differ, in words; empty where they agree.

    Args:
        facts: what each rank states, by rank; what one leaves out it states as not there.
        own: what each rank states, by rank, where leaving out is no difference.
    """
    found = [
        *(_difference(name, [one.get(name, "not there") for one in facts]) for name in _names(facts)),
        *(_difference(name, [one.get(name) for one in own]) for name in _names(own)),
    ]
    told = [text for text in found if text]
    more = f"; and {len(told) - _MAX_TOLD} more" if len(told) > _MAX_TOLD else ""
    return "; ".join(told[:_MAX_TOLD]) + more


def _names(facts: Iterable[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for one in facts for name in one))


def _difference(name: str, values: Sequence[str | None]) -> str:
    """Who states what of one fact, or nothing where all who state it agree."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        if value is not None:
            ranks.setdefault(value, []).append(rank)
    if len(ranks) < 2:
        return ""
    sides = [f"{clean(value)} on {_listed(some)}" for value, some in ranks.items()]
    return f"{clean(name)} is {' and '.join(sides)}"


def _listed(ranks: Sequence[int]) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    shown = ", ".join(map(str, ranks[:8]))
    return f"{noun} {shown}{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''}"
