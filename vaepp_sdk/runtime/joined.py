"""The engine of a rank that was started by a launcher: the same work, in this very process."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from vaepp_sdk.entries import load_object
from vaepp_sdk.errors import AgreementError, UserError
from vaepp_sdk.runtime.inplace import Launch
from vaepp_sdk.runtime.job import Job
from vaepp_sdk.runtime.news import Answers, Event
from vaepp_sdk.runtime.records import ErrorRecord
from vaepp_sdk.runtime.work import Answer, RankWork, Seat

__all__ = ["JoinedRank"]


class JoinedRank:
    """This process as one rank of a job; every rank makes the same calls in the same order.

    Args:
        job: what runs.
        launch: this process's place.
        on_event: told of stages and steps, on rank 0.
    """

    def __init__(self, job: Job, launch: Launch, on_event: Callable[[Event], None]) -> None:
        self._job = job
        self._launch = launch
        self._on_event = on_event
        self._work: RankWork | None = None

    def start(self) -> None:
        """Join the other ranks and load."""
        seat = Seat(
            rank=self._launch.rank,
            world_size=self._launch.world_size,
            local_rank=self._launch.local_rank,
            local_size=self._launch.local_size,
            payload=self._job.payload,
            timeout=timedelta(seconds=self._job.limits.exchange),
            observer=self._observe,
        )
        work: RankWork = load_object(self._job.target, "the runtime")(seat)
        with self._limit("boot"):
            work.join()
        self._work = work
        with self._limit("load"):
            work.load()

    def run(self, request: Mapping[str, Any]) -> Answers:
        """Serve one request; the pictures are those that landed on this rank.

        Raises:
            AgreementError: the ranks were not asked for the same.
            UserError: a rank refused the request; all raise alike.
        """
        assert self._work is not None
        with self._limit("request"):
            agreed = self._agree(request)
            try:
                answer, refusal = self._work.run(agreed), None
            except UserError as error:
                answer, refusal = Answer(), error
            return self._settle(answer, refusal)

    def close(self, now: bool = False) -> None:
        """Leave the job; `now` leaves it as it is, because other ranks may be gone."""
        work, self._work = self._work, None
        if work is not None and not now:
            work.close()

    def _observe(self, event: Event) -> None:
        if self._launch.rank == 0:
            self._on_event(event)

    def _settle(self, answer: Answer, refusal: UserError | None) -> Answers:
        """Let all ranks raise if one refused, so that they stay together for the next request."""
        rank = self._launch.rank
        record = ErrorRecord.of(refusal, rank, "request").to_dict() if refusal else None
        every = self._gather({"value": dict(answer.value), "refused": record})
        refusals = [ErrorRecord(**one["refused"]) for one in every if one["refused"]]
        if refusal:
            raise refusal
        if refusals:
            raise refusals[0].user_error()
        return Answers([one["value"] for one in every], [answer.pictures])

    def _agree(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rank 0's request, which has the seed for all where none was asked for."""
        every = self._gather(dict(request))
        first: dict[str, Any] = every[0]
        differing = [rank for rank, other in enumerate(every) if {**other, "seed": 0} != {**first, "seed": 0}]
        if differing:
            raise AgreementError(f"rank 0 and ranks {differing} were asked for different pictures")
        return first

    def _gather(self, value: Mapping[str, Any]) -> list[Any]:
        """Plain data of every rank, by rank; two small collectives, no pickle."""
        if self._launch.world_size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self._launch.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)], device=device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: len(data)] = data
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        pairs = zip(found, sizes, strict=True)
        return [json.loads(bytes(one[: int(size)].cpu().tolist())) for one, size in pairs]

    @contextlib.contextmanager
    def _limit(self, phase: str) -> Iterator[None]:
        """End this process when a phase takes longer than its limit: there is no parent that would."""
        timer = threading.Timer(getattr(self._job.limits, phase), self._give_up, [phase])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, phase: str) -> None:
        limit = getattr(self._job.limits, phase)
        print(f"vaepp: rank {self._launch.rank}: [limits] {phase} = {limit:g} s is over", file=sys.stderr)
        faulthandler.dump_traceback(sys.stderr)
        sys.stderr.flush()
        os._exit(1)
