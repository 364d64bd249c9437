"""A rank's work on a pipeline: the executor, behind the runtime's protocol."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from vaepp_sdk.events import Event, StageEnd
from vaepp_sdk.registry import default_registry
from vaepp_sdk.request import Request
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.runtime.rendezvous import join, leave, pick_device
from vaepp_sdk.runtime.work import Answer, Seat

if TYPE_CHECKING:
    import torch

    from vaepp_sdk.executor import Executor
    from vaepp_sdk.latents import LatentStore

__all__ = ["PipelineWork"]


class PipelineWork:
    """Runs one pipeline on this rank; the payload is what `Resolved.to_dict` gave."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._resolved = Resolved.from_dict(seat.payload, default_registry())
        self._loading: list[StageEnd] = []
        self._has_group = False
        self._device: torch.device
        self._executor: Executor

    def join(self) -> None:
        """See `RankWork.join`."""
        wanted = self._resolved.spec.model.device
        self._device = pick_device(wanted, self._seat.local_rank, self._seat.local_size)
        self._has_group = join(self._seat, self._device)

    def load(self) -> None:
        """See `RankWork.load`."""
        from vaepp_sdk.executor import Executor
        from vaepp_sdk.parallel.group import DiTGroup

        self._agree_on_the_job()
        group = DiTGroup.create(self._resolved.dims, self._device, self._seat.timeout)
        self._executor = Executor(
            self._resolved,
            default_registry(),
            group,
            timeout=self._seat.timeout,
            observer=self._observe,
            store=self._store(),
            sharers=self._seat.local_size,
        )
        self._executor.load()

    def run(self, request: Mapping[str, Any]) -> Answer:
        """See `RankWork.run`; the first answer's stages begin with those of loading."""
        result = self._executor.run(Request.from_dict(request))
        stages = [attrs.asdict(end) for end in (*self._loading, *result.stages)]
        self._loading = []
        # Pictures travel one by one; all clips of a request are of one length, and 0 says there are none.
        length = max(map(len, result.frames), default=0)
        value = {
            "files": list(result.files),
            "seed": result.seed,
            "stages": stages,
            "notices": list(result.notices),
            "frames": length,
        }
        pictures = [*result.images, *chain.from_iterable(result.frames)]
        return Answer(value=value, pictures=pictures if self._hands_over else ())

    def close(self) -> None:
        """See `RankWork.close`."""
        if self._has_group:
            leave()

    def _agree_on_the_job(self) -> None:
        """Before the first collective: ranks with another spec, version or plugin are named, not hung on."""
        from vaepp_sdk.agreement import start_facts
        from vaepp_sdk.parallel.gate import Gate

        gate = Gate(self._seat.timeout)
        if not gate.is_open:
            gate.agree("loading", start_facts(self._resolved, default_registry()))

    def _store(self) -> LatentStore:
        """Beside the pictures, or out of sight where none are to be saved."""
        from vaepp_sdk.latents import LatentStore

        output = self._resolved.spec.output
        return LatentStore(Path(output.dir)) if output else LatentStore.temporary()

    @property
    def _hands_over(self) -> bool:
        """Pictures that landed on every rank are the same: a parent is given rank 0's, and pieces of all."""
        in_place = self._seat.port is None
        return in_place or self._seat.rank == 0 or self._resolved.spec.vae.output == "sharded"

    def _observe(self, event: Event) -> None:
        if isinstance(event, StageEnd) and event.request < 0:
            self._loading.append(event)
        self._seat.observer(event)
