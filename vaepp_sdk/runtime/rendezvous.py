"""How ranks meet: the parent's listening socket, and loopback addresses only."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.parallel.pulse import Pulse
from vaepp_sdk.runtime.rollcall import launchers_store, take_seat
from vaepp_sdk.runtime.work import Seat

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

__all__ = ["join", "leave", "listen", "pick_device"]

_LOOPBACK = "127.0.0.1"

_PULSES = list[Pulse]()
"""This process's, while it has a group of our own making."""


def listen() -> socket.socket:
    """A socket that listens on a free port of the loopback interface; the parent hands it to rank 0.

    The port is taken before any rank starts, so no other job can take it in between.
    """
    listener = socket.create_server((_LOOPBACK, 0), backlog=1024)
    listener.set_inheritable(False)
    return listener


def pick_device(wanted: str, local_rank: int, local_size: int) -> torch.device:
    """The device of one rank; every rank of a machine has one of its own.

    Args:
        wanted: `auto`, `cuda` or `cpu`.
        local_rank: this rank among those of the machine.
        local_size: how many those are.

    Raises:
        UnsupportedError: CUDA was asked for and is not there, or has fewer devices than ranks.
    """
    import torch

    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError('[model] device = "cuda", but torch sees no CUDA device; use "auto" or "cpu"')
    found = torch.cuda.device_count()
    if found < local_size:
        raise UnsupportedError(
            f"{local_size} ranks need {local_size} CUDA devices on this machine and torch sees {found}; use "
            f'sizes whose product is at most {found}, or [model] device = "cpu"'
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def join(seat: Seat, device: torch.device) -> bool:
    """Make the job's process group, on NCCL for CUDA and gloo else; a single rank needs none.

    Every wait inside the group ends after the seat's timeout.

    Returns:
        Whether a group was made, for `leave` to take down; one that was there before stays.

    Raises:
        RunError: under a launcher, not every rank is there exactly once.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.distributed_c10d import _get_default_store

    if seat.world_size == 1 or dist.is_initialized():
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if seat.local_size == seat.world_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if seat.port is None:
        store: Store = launchers_store(seat, os.environ)
        take_seat(store, seat)
    else:
        store = TCPStore(
            _LOOPBACK,
            seat.port,
            seat.world_size,
            is_master=seat.rank == 0,
            timeout=seat.timeout,
            wait_for_workers=False,
            master_listen_fd=seat.listen_fd,
        )
    dist.init_process_group(
        backend,
        store=store,
        rank=seat.rank,
        world_size=seat.world_size,
        timeout=seat.timeout,
        device_id=device_id,
    )
    if seat.port is None:  # a parent sees at once that a rank is gone
        _PULSES.append(Pulse(_get_default_store(), seat.rank))
    return True


def leave() -> None:
    """Take down the process group that `join` made."""
    import torch.distributed as dist

    while _PULSES:
        _PULSES.pop().stop()
    dist.destroy_process_group()
