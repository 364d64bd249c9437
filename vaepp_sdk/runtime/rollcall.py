"""How ranks of a launcher meet: each takes its seat in the job's store, once, before any group is made.

A process group says of a rank that does not come, or comes twice, only that a wait is over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vaepp_sdk.errors import PeerError, RunError, UserError
from vaepp_sdk.runtime.work import Seat
from vaepp_sdk.text import clean, one_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["launchers_store", "take_seat"]

_PAUSE = 0.05
_FOUND_FAULT = "fault"

_LINGER = 5.0
"""How long a rank that holds the store keeps it for those that come late to a fault, in seconds."""


def launchers_store(seat: Seat, environment: Mapping[str, str]) -> Store:
    """The store at `MASTER_ADDR` and `MASTER_PORT`: torchrun's agent holds it, or else rank 0.

    Raises:
        UserError: the port is no port.
        RunError: rank 0 cannot listen there, or another rank finds nobody who answers.
    """
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    port = environment["MASTER_PORT"]
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT={clean(port)!r} in the environment; it must be a port, 1 to 65535")
    holds = _holds_store(seat, environment)
    try:
        store = TCPStore(
            environment["MASTER_ADDR"],
            int(port),
            seat.world_size,
            is_master=holds,
            timeout=seat.boot,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        place = clean(f"{environment['MASTER_ADDR']}:{port}")
        problem = "cannot listen at" if holds else "finds no store at"
        hint = "; choose another MASTER_PORT" if holds else ", where rank 0 or the launcher holds it"
        raise RunError(f"rank {seat.rank} {problem} {place}{hint} ({one_line(str(error), 200)})") from error
    store.set_timeout(seat.timeout)
    return PrefixStore(f"vaepp/attempt {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def take_seat(store: Store, seat: Seat) -> None:
    """Wait until every rank of the job is there, exactly once, in a job of the same size.

    Raises:
        RunError: a rank is there twice, or in a job of another size; every rank that waits raises alike.
        PeerError: naming the ranks that have not come in time.
    """
    try:
        _meet(store, seat)
    except PeerError:
        raise
    except RunError:
        if _holds_store(seat, os.environ):
            time.sleep(_LINGER)
        raise


def _meet(store: Store, seat: Seat) -> None:
    size = str(seat.world_size)
    if store.add(f"taken/{seat.rank}", 1) > 1:
        _refuse(store, f"two processes say that they are rank {seat.rank} (RANK); start each rank once")
    store.set(f"size/{seat.rank}", size)
    missing = set(range(seat.world_size))
    limit = time.monotonic() + seat.boot.total_seconds()
    while missing:
        _raise_fault(store)
        for rank in [rank for rank in missing if store.check([f"size/{rank}"])]:
            missing.remove(rank)
            other = store.get(f"size/{rank}").decode()
            if other != size:
                _refuse(
                    store, f"rank {rank} is one of {other} ranks and rank {seat.rank} of {size} (WORLD_SIZE)"
                )
        if missing and time.monotonic() > limit:
            cause = f"not there after {seat.boot.total_seconds():g} s ([limits] boot)"
            raise PeerError(seat.rank, sorted(missing), "start", cause)
        time.sleep(_PAUSE if missing else 0)
    _raise_fault(store)


def _refuse(store: Store, fault: str) -> None:
    """Say what is wrong, here and to all that wait; the first fault stays."""
    store.compare_set(_FOUND_FAULT, "", fault)
    _raise_fault(store)


def _raise_fault(store: Store) -> None:
    if store.check([_FOUND_FAULT]):
        raise RunError(store.get(_FOUND_FAULT).decode())


def _holds_store(seat: Seat, environment: Mapping[str, str]) -> bool:
    return seat.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
