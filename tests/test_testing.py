"""The tools for plugin authors' tests."""

from __future__ import annotations

import pickle
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from vaepp_sdk.testing import RankFailedError
from vaepp_sdk.testing.ranks import _results


def heard(*messages: Any) -> list[Connection]:
    """One pipe a rank, with what it said before it ended; None for nothing."""
    pipes = []
    for message in messages:
        parent, child = Pipe(duplex=False)
        if message is not None:
            child.send_bytes(pickle.dumps(message))
        child.close()
        pipes.append(parent)
    return pipes


def test_results_are_in_the_order_of_ranks() -> None:
    assert _results(heard((True, "a", 9.0), (True, "b", 1.0)), timeout=5) == ["a", "b"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (((False, "connection closed", 2.0), (False, "the cause", 1.0)), "rank 1 raised:\nthe cause"),
        (((False, "connection closed", 2.0), None), "rank 1 died without a word"),
    ],
)
def test_of_several_failures_the_first_is_told(messages: Any, words: str) -> None:
    with pytest.raises(RankFailedError, match=f"^{words}$"):
        _results(heard(*messages), timeout=5)
