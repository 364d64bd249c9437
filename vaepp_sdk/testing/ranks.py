"""Real ranks in a test: processes on this machine that talk over gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["RankFailedError", "run_ranks"]

_PRELOADED = ("torch", "torch.distributed", "diffusers", "vaepp_sdk.testing.preload")


class RankFailedError(AssertionError):
    """A rank of `run_ranks` raised, died, or did not end in time; the message holds its traceback."""


def run_ranks(
    world_size: int,
    target: Callable[..., Any],
    *arguments: Any,
    timeout: float = 240.0,
    collective: float = 60.0,
) -> list[Any]:
    """Call `target(rank, *arguments)` on every rank of a new gloo job and return the results by rank.

    Processes are forked from a server that has imported torch and diffusers once, so a launch costs little.
    Each rank runs on one thread.

    Args:
        world_size: how many ranks.
        target: a function at the top level of a module.
        arguments: what it is called with after the rank; these and the results cross by pickle.
        timeout: seconds until ranks that have not ended are killed and named.
        collective: seconds until a collective that waits for a rank gives up.

    Raises:
        RankFailedError: a rank raised, died, or did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes, pipes = [], []
        for rank in range(world_size):
            parent, child = context.Pipe(duplex=False)
            job = (child, rank, world_size, store, collective, target, arguments)
            process = context.Process(target=_rank_main, args=job, daemon=True)
            process.start()
            child.close()
            processes.append(process)
            pipes.append(parent)
        try:
            return _results(pipes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(pipes: Sequence[Connection], timeout: float) -> list[Any]:
    """Every rank's result, or the failure of the rank that failed first."""
    limit = time.monotonic() + timeout
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, limit - time.monotonic()))
        if not ready:
            raise RankFailedError(f"ranks {sorted(waiting.values())} did not end within {timeout:g} s")
        failures: list[tuple[float, str]] = []
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                good, value, when = pickle.loads(pipe.recv_bytes())  # noqa: S301  # from our own child
            except EOFError:
                failures.append((0.0, f"rank {rank} died without a word"))
                continue
            if good:
                results[rank] = value
            else:
                failures.append((when, f"rank {rank} raised:\n{value}"))
        if failures:  # ranks that waited for the one to blame fail after it
            raise RankFailedError(min(failures)[1])
    return [results[rank] for rank in sorted(results)]


def _rank_main(
    pipe: Connection,
    rank: int,
    world_size: int,
    store: str,
    collective: float,
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """One rank's whole life."""
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=collective),
        )
        result = target(rank, *arguments)
        dist.barrier()
        # Plain pickle copies tensors; the connection's own would share memory that ends with this rank.
        pipe.send_bytes(pickle.dumps((True, result, time.monotonic())))
        dist.destroy_process_group()
    except BaseException:
        when = time.monotonic()
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc(), when)))
