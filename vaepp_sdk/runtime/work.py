"""What a rank is asked to do: the seam between processes and the work done in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from vaepp_sdk.spec.classes import LimitsSpec

if TYPE_CHECKING:
    from PIL.Image import Image

    from vaepp_sdk.events import Event

__all__ = ["Answer", "Observer", "RankWork", "Seat"]

Observer = Callable[["Event"], None]


@attrs.frozen(kw_only=True, eq=False)
class Seat:
    """A rank's place in a job.

    Attributes:
        rank: this rank.
        world_size: ranks in the job.
        local_rank: this rank among those of its machine.
        local_size: how many those are.
        payload: what the work is about, plain data, the same on every rank.
        timeout: the limit of one wait for another rank.
        boot: how long ranks that a launcher starts may take to come.
        observer: told of stages and steps.
        port: where rank 0's store listens on the loopback interface; None where a launcher has said so.
        listen_fd: the listening socket, on rank 0, handed over by the parent.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    payload: Mapping[str, Any]
    timeout: timedelta
    observer: Observer
    boot: timedelta = timedelta(seconds=LimitsSpec().boot)
    port: int | None = None
    listen_fd: int | None = None


@attrs.frozen(kw_only=True)
class Answer:
    """What one rank makes of one request.

    Attributes:
        value: plain data.
        pictures: those to hand over.
    """

    value: Mapping[str, Any] = attrs.field(factory=dict)
    pictures: Sequence[Image] = ()


class RankWork(Protocol):
    """The work of one rank; made by calling the target with a `Seat`.

    Every method is called on all ranks alike. A `UserError` out of `run`, or a `RankError` that is
    `harmless`, raised before the first exchange with the same words on every rank, fails the request and
    nothing more; anything else ends the job.
    """

    def join(self) -> None:
        """Meet the other ranks."""

    def load(self) -> None:
        """Make ready for requests."""

    def run(self, request: Mapping[str, Any]) -> Answer:
        """Serve one request."""

    def close(self) -> None:
        """Leave the other ranks in good order."""
