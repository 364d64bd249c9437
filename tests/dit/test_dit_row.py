"""A row's exchanges: dealing, and whom a failed one names; they themselves run in the dimensions' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from vaepp_sdk.dit.row import Row, even_parts
from vaepp_sdk.errors import PeerError

ONE = torch.ones(4)
EXCHANGES: dict[str, tuple[str, Callable[[Row], Any]]] = {
    "broadcast": ("broadcast", lambda row: row.broadcast(ONE, 0, "test")),
    "gather": ("all_gather", lambda row: row.gather(ONE, 0, (4, 4), "test")),
    "exchange": ("all_to_all_single", lambda row: row.exchange([ONE, ONE], [(4,), (4,)], "test")),
    "rotate": ("batch_isend_irecv", lambda row: row.rotate(ONE, torch.empty(4), "test")),
    "send": ("isend", lambda row: row.send(ONE, 1, "test")),
    "receive": ("recv", lambda row: row.receive(torch.empty(4), 1, "test")),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_an_exchange_that_fails_names_the_peers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Connection closed by peer\n  a stack")

    function, exchange = EXCHANGES[name]
    monkeypatch.setattr(dist, function, gone)
    monkeypatch.setattr(dist, "P2POp", Mock())
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda _: [2, 3])
    with pytest.raises(PeerError) as caught:
        exchange(Row(None, 0, 2))
    assert str(caught.value) == "rank 2 waited for rank 3 (test): Connection closed by peer"


def test_a_rank_alone_exchanges_nothing() -> None:
    alone = Row.over(None)
    assert alone.gather(ONE, 0, (4,), "test") is ONE
    alone.sum(ONE, "test")
    assert torch.equal(ONE, torch.ones(4))
    assert alone.own(3) == range(3)


def test_parts_are_even_and_larger_ones_come_first() -> None:
    assert even_parts(7, 3) == (3, 2, 2)
    assert even_parts(2, 4) == (1, 1, 0, 0)
    assert [Row(None, index, 3).own(7) for index in range(3)] == [range(3), range(3, 5), range(5, 7)]
