"""Ranks of a launcher take their seats: who is missing, there twice, or in another job is named to all."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore

from vaepp_sdk.errors import RunError, UserError, VaeppError
from vaepp_sdk.runtime.news import Event
from vaepp_sdk.runtime.rollcall import launchers_store, take_seat
from vaepp_sdk.runtime.work import Seat


def seat(rank: int, size: int, boot: float = 20.0) -> Seat:
    return Seat(
        rank=rank,
        world_size=size,
        local_rank=rank,
        local_size=size,
        payload={},
        timeout=timedelta(seconds=20),
        boot=timedelta(seconds=boot),
        observer=list[Event]().append,
    )


def meet(seats: Sequence[Seat]) -> list[str]:
    """What comes of so many ranks that come at once."""
    store = HashStore()

    def come(one: Seat) -> str:
        try:
            take_seat(store, one)
        except VaeppError as error:
            return str(error)
        return "there"

    with ThreadPoolExecutor(len(seats)) as threads:
        return list(threads.map(come, seats))


def test_all_are_there() -> None:
    assert meet([seat(rank, 3) for rank in (2, 0, 1)]) == ["there"] * 3


def test_who_does_not_come_is_named() -> None:
    found = meet([seat(rank, 4, boot=0.3) for rank in (0, 2)])
    assert found == [
        f"rank {rank} waited for ranks 1, 3 (start): not there after 0.3 s ([limits] boot)" for rank in (0, 2)
    ]


def test_a_rank_that_is_there_twice_is_named_to_all() -> None:
    """Also to those that wait for another one, which does not come."""
    found = meet([seat(rank, 3) for rank in (0, 1, 1)])
    assert found == ["two processes say that they are rank 1 (RANK); start each rank once"] * 3


def test_who_comes_late_learns_of_a_fault_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store goes with rank 0, which keeps it for them; nobody waits where a launcher holds it."""

    def seconds(rank: int) -> float:
        store = HashStore()
        store.set(f"taken/{rank}", "1")
        begun = time.monotonic()
        with pytest.raises(RunError, match=f"two processes say that they are rank {rank}"):
            take_seat(store, seat(rank, 2))
        return time.monotonic() - begun

    assert seconds(0) > 4
    assert seconds(1) < 4
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert seconds(0) < 4


def test_jobs_of_two_sizes_are_named_to_all() -> None:
    found = meet([seat(0, 2), seat(1, 3)])
    assert len(set(found)) == 1
    assert "of 3" in found[0]
    assert "of 2" in found[0]
    assert "WORLD_SIZE" in found[0]


def test_a_port_that_is_taken_or_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stranger.getsockname()[1])}
        with pytest.raises(RunError, match=r"rank 0 cannot listen at 127.*choose another MASTER_PORT"):
            launchers_store(seat(0, 2), place)
    for port in ("http", "0", "65536", "-1"):
        with pytest.raises(UserError, match="it must be a port, 1 to 65535"):
            launchers_store(seat(0, 2), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
