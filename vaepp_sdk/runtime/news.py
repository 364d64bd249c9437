"""What the thread that watches the ranks tells the thread that called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from vaepp_sdk.errors import VaeppError
from vaepp_sdk.events import Event, LatentsKept, Progress, StageEnd, StageStart

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Answers", "Ended", "Event", "Happened", "News", "Ready", "Refused", "Warned", "event_from"]

_EVENTS: Mapping[str, type[Event]] = {
    one.__name__: one for one in (StageStart, StageEnd, Progress, LatentsKept)
}


@attrs.frozen
class Ready:
    """Every rank has loaded."""


@attrs.frozen
class Happened:
    """Rank 0 tells of a stage or a step."""

    event: Event


@attrs.frozen
class Warned:
    """A rank gave a warning of vaepp's."""

    text: str


@attrs.frozen
class Answers:
    """Every rank has answered a request.

    Attributes:
        values: each rank's plain data, by rank.
        pictures: what each rank handed over, by rank; under a launcher, this rank's only.
    """

    values: Sequence[Mapping[str, Any]]
    pictures: Sequence[Sequence[Image]]


@attrs.frozen
class Refused:
    """All ranks alike refused a request, or failed in it; they are ready for the next."""

    error: VaeppError


@attrs.frozen
class Ended:
    """No rank is left; the last news there is.

    Attributes:
        error: why, or None where the end was asked for.
        warning: what went wrong after the end was asked for, or None.
    """

    error: VaeppError | None = None
    warning: str | None = None


News = Ready | Happened | Warned | Answers | Refused | Ended


def event_from(name: str, fields: Mapping[str, Any]) -> Event:
    """An event as a rank sent it.

    Raises:
        KeyError: there is no such event.
        TypeError: its fields do not fit.
    """
    return _EVENTS[name](**fields)
