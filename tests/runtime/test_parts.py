"""The runtime's parts alone: messages, heartbeats, pictures, records, verdicts, launchers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vaepp_sdk.errors import (
    OutputError,
    PeerError,
    RankError,
    RunError,
    SpecError,
    UnsupportedError,
    UserError,
    VaeppError,
)
from vaepp_sdk.runtime import rank_main
from vaepp_sdk.runtime.beats import Beat, Slot, make_beats
from vaepp_sdk.runtime.channel import MAX_MESSAGE, Message, ParentChannel, encode
from vaepp_sdk.runtime.inplace import Launch, check_size, find_launch
from vaepp_sdk.runtime.job import RunFolder
from vaepp_sdk.runtime.pictures import make_store, read_pictures, write_pictures
from vaepp_sdk.runtime.process import Ending
from vaepp_sdk.runtime.records import ErrorRecord, read_record, write_record
from vaepp_sdk.runtime.stacks import waits_for_peers
from vaepp_sdk.runtime.verdict import Evidence, Trigger, judge, needs_stacks
from vaepp_sdk.text import one_line

MAKER = "from vaepp_sdk.runtime.job import RunFolder as F; f = F.create(); print(f.path, flush=True); input()"


def test_the_folder_of_a_process_that_was_killed_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = RunFolder.create()
    kept.keep()
    with subprocess.Popen(
        [sys.executable, "-c", MAKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        mine = RunFolder.create()
        assert set(tmp_path.iterdir()) == {kept.path, left, mine.path}, "it lives"
        other.kill()
    last = RunFolder.create()
    assert set(tmp_path.iterdir()) == {kept.path, mine.path, last.path}
    for folder in (mine, last):
        folder.remove()
    assert list(tmp_path.iterdir()) == [kept.path]


def test_a_folder_for_temporary_files_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nothing")
    with pytest.raises(OutputError, match=r"logs of ranks cannot be written .*name another one in TMPDIR"):
        RunFolder.create()


def test_a_rank_whose_parent_is_gone_already_ends_at_once() -> None:
    """The kernel tells of a parent's death only those that asked before it."""
    ours, theirs = socket.socketpair()
    not_the_parent = "1"
    command = [sys.executable, "-P", rank_main.__file__, str(theirs.fileno()), not_the_parent]
    done = subprocess.run(command, pass_fds=[theirs.fileno()], timeout=60, check=False)
    assert done.returncode == 1
    ours.close()
    theirs.close()


def channel_pair() -> tuple[ParentChannel, socket.socket]:
    ours, theirs = socket.socketpair()
    return ParentChannel(ours), theirs


def test_messages_arrive_whole_in_any_pieces() -> None:
    parent, rank = channel_pair()
    data = encode({"a": "é\ud800\n"}) + encode({"b": [1, None]})
    found: list[Message] = []
    for index in range(len(data)):
        rank.send(data[index : index + 1])
        messages, more = parent.read()
        found += messages
        assert more
    assert found == [{"a": "é\ud800\n"}, {"b": [1, None]}]
    rank.close()
    assert parent.read() == ([], False)
    parent.close()


@pytest.mark.parametrize("data", [b"[1]\n", b"\xff\n", b"not json\n", b"[" * 100_000 + b"\n"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    parent, rank = channel_pair()
    rank.sendall(data)
    with pytest.raises(RunError, match="message"):
        parent.read()
    rank.close()
    parent.close()


def test_a_message_without_an_end_is_refused() -> None:
    parent, rank = channel_pair()
    for _ in range(MAX_MESSAGE // 60_000):
        rank.sendall(b"x" * 60_000)
        assert parent.read() == ([], True)
    rank.sendall(b"x" * 60_000)
    with pytest.raises(RunError, match="over the limit"):
        parent.read()
    with pytest.raises(RunError, match="over the limit"):
        encode({"a": "x" * MAX_MESSAGE})
    rank.close()
    parent.close()


def test_a_rank_that_does_not_read_does_not_block_the_parent() -> None:
    parent, rank = channel_pair()
    for _ in range(3):
        parent.post(encode({"a": "x" * 2**20}))
        parent.flush()
    assert parent.has_output
    taken = b""
    while parent.has_output or not taken.endswith(b"\n"):
        parent.flush()
        taken += rank.recv(2**20)
    assert taken == encode({"a": "x" * 2**20}) * 3
    rank.close()
    parent.post(encode({}))
    parent.flush()
    assert not parent.has_output, "what nobody will read is dropped"
    parent.close()


def test_slots_do_not_touch_each_other() -> None:
    descriptor = make_beats(3)
    slots = [Slot(descriptor, rank) for rank in range(3)]
    seen = Slot(descriptor, 1)
    os.close(descriptor)
    assert seen.read() == Beat(0, 0, 0, 0, 0, False, "start")
    for rank, slot in enumerate(slots):
        slot.enter(f"stage {rank}" + "x" * 60)
        slot.step(rank, 2**40)
    slots[0].finish()
    beat = seen.read()
    assert (beat.step, beat.total, beat.done, beat.alive) == (1, 2**40, False, 0)
    assert beat.stage == ("stage 1" + "x" * 60)[:48]
    assert beat.moved >= beat.entered > 0
    slots[1].tick()
    slots[1].enter("b")
    assert seen.read().stage == "b"
    assert seen.read().alive > 0
    for slot in (*slots, seen):
        slot.close()


def test_pictures_cross_as_they_are() -> None:
    descriptor = make_store(0)
    noise = Image.frombytes("RGB", (37, 21), os.urandom(37 * 21 * 3))
    pictures = [noise, noise.convert("L"), noise.convert("RGBA"), noise.convert("P")]
    for count in (4, 1, 0):
        found = read_pictures(descriptor, write_pictures(descriptor, pictures[:count]))
        assert [one.tobytes() for one in found[:3]] == [one.tobytes() for one in pictures[:count][:3]]
        assert [one.mode for one in found] == ["RGB", "L", "RGBA", "RGB"][:count]
        assert os.fstat(descriptor).st_size == 0, "the memory goes back"
    write_pictures(descriptor, pictures)
    with pytest.raises(RunError, match="another number"):
        read_pictures(descriptor, [{"mode": "RGB", "width": 10**6, "height": 10**6}])
    os.close(descriptor)


def caught(error: BaseException, cause: BaseException | None = None) -> ErrorRecord:
    try:
        raise error from cause
    except BaseException as found:
        return ErrorRecord.of(found, 2, "denoise")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("boom"), "own"),
        (SystemExit(0), "own"),
        (RuntimeError("shape [2, 3] does not fit"), "own"),
        (OutputError("exists"), "user"),
        (PeerError(0, [1], "seam", "timed out"), "peer"),
        (
            RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"),
            "peer",
        ),
        (RuntimeError("Timed out waiting 4000ms for recv operation to complete"), "peer"),
    ],
)
def test_records_tell_whose_failure_it_is(error: BaseException, kind: str, tmp_path: Path) -> None:
    record = caught(error)
    assert record.kind == kind
    assert caught(RankError(2, "decode", f"{type(error).__name__}: {error}"), error).kind in (kind, "own")
    path = tmp_path / "error.json"
    assert read_record(path) is None
    write_record(record, path)
    assert read_record(path) == record
    assert [one.name for one in tmp_path.iterdir()] == ["error.json"]


def test_a_rank_error_says_its_place_once() -> None:
    record = caught(RankError(2, "decode", "ValueError: boom"), ValueError("boom"))
    assert (record.stage, record.cause, record.kind) == ("decode", "ValueError: boom", "own")
    record = caught(RankError(2, "decode", "RuntimeError: gone"), RuntimeError("Connection reset by peer"))
    assert record.kind == "peer"


def test_a_users_error_keeps_its_class() -> None:
    assert type(caught(OutputError("x")).user_error()) is OutputError
    assert type(caught(UnsupportedError("x")).user_error()) is UnsupportedError
    assert type(caught(SpecError([], "s")).user_error()) is UserError


def test_a_cause_is_one_safe_line() -> None:
    assert one_line("\n\n  first \x1b[2J\nsecond") == "first \\u001b[2J"
    assert len(one_line("x" * 1000)) < 340


class SilentError(Exception):
    def __str__(self) -> str:
        raise ValueError("it cannot be said")


def looped() -> BaseException:
    """An exception that is the cause of its own cause."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    return first


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (SilentError(), "SilentError: (its message cannot be shown)"),
        (ValueError("\ud800 \x1b[2J"), "ValueError: \\ud800 \\u001b[2J"),
        (ValueError("\n\n" + "x" * 10**7), "ValueError: " + "x" * 288),
    ],
    ids=["no message", "no text", "10 MB"],
)
def test_records_of_errors_that_nobody_should_raise(error: BaseException, cause: str, tmp_path: Path) -> None:
    record = caught(error)
    assert record.cause.startswith(cause)
    assert len(record.cause) < 340
    assert len(record.trace) < 101_000
    write_record(record, tmp_path / "error.json")
    assert read_record(tmp_path / "error.json") == record


def test_a_chain_of_causes_that_leads_back_to_itself_ends() -> None:
    assert ErrorRecord.of(looped(), 0, "decode").kind == "own"


def seen(rank: int, **changes: Any) -> Evidence:
    fields: dict[str, Any] = {
        "busy": True,
        "beat": Beat(5, 5, 5, 1, 9, False, "denoise"),
        "record": None,
        "ending": None,
    }
    return Evidence(rank, **{**fields, **changes})


def record(rank: int, kind: str, time: int) -> ErrorRecord:
    return ErrorRecord(rank=rank, stage="decode", kind=kind, name="E", message=kind, trace="", time=time)


def where(error: VaeppError) -> tuple[int, str]:
    assert isinstance(error, RankError)
    return error.rank, error.cause


DIED = Ending(signal=9)
LEFT = Ending(code=1)


def test_the_earliest_error_that_no_peer_caused_comes_first() -> None:
    ranks = [
        seen(0, record=record(0, "peer", 1), ending=LEFT),
        seen(1, record=record(1, "own", 3), ending=LEFT),
        seen(2, record=record(2, "own", 2), ending=LEFT),
        seen(3, ending=DIED),
    ]
    assert not needs_stacks(ranks)
    assert where(judge(ranks, Trigger(0, "x"))) == (2, "E: own")


def test_a_death_without_a_word_comes_before_what_it_caused() -> None:
    ranks = [seen(0, record=record(0, "peer", 1), ending=LEFT), seen(1, ending=DIED, last_line="help")]
    rank, cause = where(judge(ranks, Trigger(0, "x")))
    assert rank == 1
    assert cause.endswith("; its last words: help")


def test_of_two_deaths_the_one_seen_first_is_named() -> None:
    ranks = [seen(0, ending=Ending(signal=6)), seen(1, ending=DIED)]
    assert where(judge(ranks, Trigger(1, "x")))[0] == 1


def test_an_exit_code_of_0_counts_only_with_the_done_mark() -> None:
    good = Beat(5, 5, 5, 0, 0, True, "close")
    ranks = [seen(0, ending=Ending(code=0), beat=good), seen(1, ending=Ending(code=0))]
    assert where(judge(ranks, Trigger(0, "x"))) == (1, "its process ended early with exit code 0")


EXCHANGE = """Thread 0x1 (most recent call first):
  File "/x/threading.py", line 5 in run

Current thread 0x2 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 5 in all_reduce
  File "/x/mine.py", line 7 in forward
  File "/x/vaepp_sdk/runtime/rank_main.py", line 9 in <module>
"""
ALONE = EXCHANGE.replace("torch/distributed/distributed_c10d.py", "mine.py")


def test_a_rank_stuck_outside_an_exchange_is_named_not_those_that_wait() -> None:
    assert waits_for_peers(EXCHANGE)
    assert not waits_for_peers(ALONE)
    assert not waits_for_peers("")
    ranks = [seen(0), seen(1), seen(2, busy=False), seen(3, record=record(3, "peer", 1), ending=LEFT)]
    assert needs_stacks(ranks)
    rank, cause = where(judge(ranks, Trigger(0, "the limit"), {0: EXCHANGE, 1: ALONE}))
    assert (rank, cause) == (1, "it runs and does not come further at step 1 of 9; the limit")
    rank, cause = where(judge(ranks, Trigger(0, "the limit"), {0: ALONE, 1: ""}))
    assert rank == 1
    assert "its process does not run" in cause


def test_where_all_wait_what_was_seen_first_is_said() -> None:
    ranks = [seen(0), seen(1)]
    assert where(judge(ranks, Trigger(1, "the limit"), {0: EXCHANGE, 1: EXCHANGE})) == (1, "the limit")


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"}


def test_a_launcher_is_found_by_its_variables() -> None:
    assert find_launch({}) is None
    whole = {**TORCHRUN, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert find_launch(whole) == Launch(rank=1, world_size=4, local_rank=1, local_size=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": None}, "sets RANK and MASTER_ADDR and MASTER_PORT.* but not WORLD_SIZE"),
        ({"RANK": None}, "but not RANK"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "4"}, "RANK=4 does not fit WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
    ],
)
def test_a_launcher_that_does_not_fit_is_refused(changes: dict[str, str | None], words: str) -> None:
    changed = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=words):
        find_launch(changed)


def test_another_number_of_ranks_is_refused() -> None:
    launch = Launch(rank=0, world_size=4, local_rank=0, local_size=4)
    check_size(launch, 4, "the spec")
    with pytest.raises(SpecError, match="2 ranks and the launcher started 4"):
        check_size(launch, 2, "the spec")
