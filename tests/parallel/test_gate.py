"""The gate: what differs is told with its ranks, who is missing is named, nothing piles up in the store."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

import vaepp_sdk.parallel.gate as gate_module
import vaepp_sdk.parallel.pulse as pulse_module
from vaepp_sdk.errors import VaeppError
from vaepp_sdk.parallel.fingerprint import fingerprint
from vaepp_sdk.parallel.gate import Gate, differences
from vaepp_sdk.runtime.board import Board
from vaepp_sdk.testing import run_ranks

LIMIT = timedelta(seconds=30)


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except VaeppError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


@pytest.mark.parametrize(
    ("facts", "own", "words"),
    [
        ([{"a": "1"}] * 3, [], ""),
        ([{"a": "1"}, {"a": "1"}, {"a": "2"}], [], "a is 1 on ranks 0, 1 and 2 on rank 2"),
        ([{"a": "1"}, {}], [], "a is 1 on rank 0 and not there on rank 1"),
        ([{}, {}, {}], [{"x": "1"}, {}, {"x": "2"}], "x is 1 on rank 0 and 2 on rank 2"),
        ([{}, {}], [{"x": "1"}, {"y": "2"}], ""),
        ([{"a": "\x1b[2J"}, {"a": "b"}], [], r"a is \u001b[2J on rank 0 and b on rank 1"),
        (
            [{str(name): str(rank) for name in range(5)} for rank in range(2)],
            [],
            "; ".join(f"{name} is 0 on rank 0 and 1 on rank 1" for name in range(3)) + "; and 2 more",
        ),
        ([{"a": str(rank % 2)} for rank in range(30)], [], None),
    ],
)
def test_differences_in_words(
    facts: list[dict[str, str]], own: list[dict[str, str]], words: str | None
) -> None:
    found = differences(facts, own)
    if words is None:
        evens, odds = "0, 2, 4, 6, 8, 10, 12, 14", "1, 3, 5, 7, 9, 11, 13, 15"
        words = f"a is 0 on ranks {evens} and 7 more and 1 on ranks {odds} and 7 more"
    assert found == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_a_fingerprint_sees_bits_places_shape_and_dtype(dtype: torch.dtype) -> None:
    values = (torch.arange(3 * 5 * 7) % 11).to(dtype).reshape(3, 5, 7)
    base = fingerprint(values)
    assert base.startswith(f"{str(dtype).removeprefix('torch.')} [3, 5, 7] with bits ")
    assert fingerprint(values.clone()) == base
    assert fingerprint(values.transpose(1, 2).contiguous().transpose(1, 2)) == base, (
        "not how it lies in memory"
    )
    swapped = values.clone()
    swapped[0, 0, 0], swapped[0, 0, 1] = values[0, 0, 1], values[0, 0, 0]
    changed = values.clone()
    changed.view(-1).view(torch.uint8)[-1] ^= 1
    others = {fingerprint(one) for one in (swapped, changed, values.reshape(5, 3, 7), values[:2])}
    assert len(others | {base}) == 5
    assert fingerprint(values[:0]).endswith("with bits 0-0")


def test_a_large_tensor_is_summed_in_parts_as_in_one() -> None:
    values = torch.randint(-(2**15), 2**15, ((1 << 20) + 3,), dtype=torch.int16)
    words = values.to(torch.int64)
    sums = torch.stack((words.sum(), (words * (torch.arange(len(words)) % 65521 + 1)).sum()))
    plain, weighed = (number % 2**64 for number in sums.tolist())
    assert fingerprint(values) == f"int16 [{len(words)}] with bits {plain:x}-{weighed:x}"
    assert fingerprint(torch.tensor(float("nan"))) == fingerprint(torch.tensor(float("nan")))


def _through_the_gate(rank: int) -> dict[str, Any]:
    """Gates in the order of a run's, each with one thing wrong."""
    found: dict[str, Any] = {}
    gate = Gate(LIMIT)
    keys = []
    for _ in range(3):
        for _ in range(2):
            gate.agree("denoise", {"the stage": "denoise"}, {f"latents of replica {rank // 2}": "same"})
        dist.barrier()
        keys.append(gate._store.num_keys())
        dist.barrier()
    found["grows"] = keys[2] > keys[1]
    stage = "denoise" if rank != 2 else "decode"
    found["stage"] = error_of(lambda: gate.agree("denoise", {"the stage": stage}))
    latents = {f"latents of replica {rank // 2}": "2" if rank == 1 else "1"}
    found["latents"] = error_of(lambda: gate.agree("decode", {}, latents))
    found["after"] = error_of(lambda: gate.agree("decode", {}))
    short = Gate(timedelta(seconds=1))
    if rank != 3:
        found["missing"] = error_of(lambda: short.agree("save", {}))
        found["signal"] = _interrupted(lambda: Gate(LIMIT).agree("save", {}))
    dist.barrier()
    return found


class _InterruptedError(Exception):
    pass


def _interrupted(wait: Callable[[], Any]) -> bool:
    """Whether a signal's handler runs while this rank waits, and not after the limit."""

    def interrupt(*_: object) -> None:
        raise _InterruptedError

    before, since = signal.signal(signal.SIGALRM, interrupt), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        wait()
    except _InterruptedError:
        return time.monotonic() - since < LIMIT.total_seconds() / 2
    finally:
        signal.signal(signal.SIGALRM, before)
    return False


def test_ranks_at_the_gate() -> None:
    for rank, found in enumerate(run_ranks(4, _through_the_gate)):
        missing = f"PeerError: rank {rank} waited for rank 3 (before save): not there after 1 s"
        assert found == {
            "grows": False,
            "stage": "AgreementError: ranks do not agree before denoise: "
            "the stage is denoise on ranks 0, 1, 3 and decode on rank 2",
            "latents": "AgreementError: ranks do not agree before decode: "
            "latents of replica 0 is 1 on rank 0 and 2 on rank 1",
            "after": "none",
            **({"missing": f"{missing} ([limits] exchange)", "signal": True} if rank != 3 else {}),
        }


def _without_rank0(rank: int) -> str:
    gate_module._GRACE = timedelta(0)  # no reason to wait for a verdict that nobody gives
    gate = Gate(timedelta(seconds=0.5))
    found = "" if rank == 0 else error_of(lambda: gate.agree("decode", {}))
    dist.barrier()
    return found


def test_where_rank_0_is_missing_the_others_name_it() -> None:
    found = run_ranks(2, _without_rank0)
    assert found[1].startswith("PeerError: rank 1 waited for rank 0 (before decode): not there after 0.5 s")


def test_one_rank_waits_for_nobody() -> None:
    gate = Gate(LIMIT)
    assert gate.is_open
    gate.agree("decode", {"a": "b"})


def _one_falls_silent(rank: int) -> dict[str, str]:
    pulse_module._EVERY = 0.05
    store = _get_default_store()
    pulse = pulse_module.Pulse(store, rank)
    gate, board, quiet, left = Gate(LIMIT), Board(rank, 4), Gate(LIMIT), Board(rank, 4)
    found = {}
    if rank == 2:
        time.sleep(3.0)  # longer than a silence, but its pulse goes on
    found["late"] = error_of(lambda: gate.agree("save", {}))
    found["late too"] = error_of(lambda: board.gather("one", {}, 30.0))
    if rank == 3:
        pulse.stop()
    else:
        found["gate"] = error_of(lambda: quiet.agree("save", {}))
        found["board"] = error_of(lambda: left.gather("two", {}, 30.0))
    dist.barrier()
    return found


def test_a_rank_without_a_sign_of_life_is_not_waited_for() -> None:
    since = time.monotonic()
    for rank, found in enumerate(run_ranks(4, _one_falls_silent)):
        words = f"PeerError: rank {rank} waited for rank 3 ({{}}): {pulse_module.SILENCE}"
        silent = {"gate": words.format("before save"), "board": words.format("two")}
        assert found == {"late": "none", "late too": "none", **(silent if rank != 3 else {})}
    assert time.monotonic() - since < LIMIT.total_seconds()
