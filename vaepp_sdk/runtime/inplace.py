"""Ranks that somebody else started: torchrun, accelerate launch, a scheduler, or the program around us."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping

import attrs

from vaepp_sdk.errors import Fault, SpecError, UserError
from vaepp_sdk.runtime.voice import complain

__all__ = ["Launch", "check_size", "end_with_launcher", "find_launch"]

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_PR_SET_PDEATHSIG = 1
_TURN = 0.5


@functools.cache
def end_with_launcher() -> None:
    """End this process when its launcher is gone: a launcher that is killed leaves its ranks alive.

    Linux only. No signal handler is touched. Where SIGHUP is ignored, as under nohup, this process is meant
    to outlive who started it, and nothing happens. To be called before what takes long to import.
    """
    if sys.platform != "linux" or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return
    launcher = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        threading.Thread(target=_end_after, args=[launcher], name="vaepp-launcher-watch", daemon=True).start()
        return
    # The kernel goes by the thread that started this process: torchrun's lasts as long as its ranks, and of
    # other launchers nobody knows.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher or _agent_is_gone(os.environ):
        os._exit(1)


def _end_after(launcher: int) -> None:
    """End this process once another has become its parent."""
    while os.getppid() == launcher:
        time.sleep(_TURN)
    with contextlib.suppress(OSError, ValueError):  # stderr may have gone with the launcher
        complain("ended with its launcher; a rank that is to go on alone is started with nohup")
        sys.stderr.flush()
    os._exit(1)


def _agent_is_gone(environment: Mapping[str, str]) -> bool:
    """Whether torchrun ended before this process could tell who its parent was.

    Its agent's store listens from before the ranks start until the job is over.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        socket.create_connection(address, timeout=_TURN).close()
    except ConnectionRefusedError:
        return True
    except (OSError, KeyError, ValueError):
        return False  # joining will tell what is wrong
    return False


@attrs.frozen(kw_only=True)
class Launch:
    """This process's place in a job that was started around us.

    Attributes:
        rank: its rank.
        world_size: ranks in the job.
        local_rank: its rank among those of this machine.
        local_size: how many those are, as far as the launcher says.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """What a launcher's variables, or a process group that already exists, say of this process.

    Returns:
        None where vaepp is to start its own ranks.

    Raises:
        UserError: the variables are incomplete or do not fit each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _from_variables(environment)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank, size = distributed.get_rank(), distributed.get_world_size()
        return Launch(rank=rank, world_size=size, local_rank=rank, local_size=size)
    return None


def check_size(launch: Launch, dit_parallel_size: int, source: str) -> None:
    """Refuse a job that has not as many ranks as the spec.

    Raises:
        SpecError: naming both numbers.
    """
    if launch.world_size == dit_parallel_size:
        return
    fault = Fault(
        "$.parallel",
        f"its sizes make {dit_parallel_size} ranks and the launcher started {launch.world_size} (WORLD_SIZE)",
        f"start {dit_parallel_size} ranks, or use sizes whose product is {launch.world_size}",
    )
    raise SpecError([fault], source)


def _from_variables(environment: Mapping[str, str]) -> Launch:
    missing = [name for name in _NEEDED if name not in environment]
    if missing:
        found = " and ".join(name for name in _NEEDED if name in environment)
        raise UserError(
            f"the environment sets {found}, as a launcher does, but not {', '.join(missing)}; set the rest, "
            "or unset them to let vaepp start its own ranks"
        )
    rank, size = _number(environment, "RANK", 0), _number(environment, "WORLD_SIZE", 1)
    if rank >= size:
        raise UserError(f"RANK={rank} does not fit WORLD_SIZE={size}; ranks count from 0")
    local_rank = _number(environment, "LOCAL_RANK", 0) if "LOCAL_RANK" in environment else rank
    local_size = local_rank + 1
    if "LOCAL_WORLD_SIZE" in environment:
        local_size = _number(environment, "LOCAL_WORLD_SIZE", 1)
    return Launch(rank=rank, world_size=size, local_rank=local_rank, local_size=local_size)


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment[name]
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UserError(f"{name}={text!r} in the environment; it must be an integer of at least {least}")
    return int(text)
