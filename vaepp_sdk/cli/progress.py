"""Bars for a person who watches; nothing where nobody does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vaepp_sdk.events import Event, LatentsKept, Progress, StageStart

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Bars"]


class Bars:
    """One bar on stderr at a time: that of the stage rank 0 is in.

    Args:
        quiet: draw nothing; nothing is drawn either where stderr is no terminal.
    """

    def __init__(self, quiet: bool) -> None:
        self._drawn = not quiet and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None

    @property
    def on_event(self) -> Callable[[Event], None]:
        """What to tell of a run's events."""
        return self._draw if self._drawn else _ignore

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _draw(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._advance(event)
            return
        if isinstance(event, LatentsKept):
            return
        self._end()
        if isinstance(event, StageStart):
            from tqdm import tqdm

            # Only the name, until the stage says how many steps it has.
            self._bar = tqdm(
                desc=event.stage, bar_format="{desc}", leave=False, file=sys.stderr, dynamic_ncols=True
            )

    def _advance(self, event: Progress) -> None:
        if self._bar is None:
            return
        self._bar.bar_format = None
        self._bar.total = event.total
        self._bar.update(event.done - self._bar.n)
        if event.done == event.total:
            self._bar.refresh()  # the last step is drawn however soon it comes

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _ignore(event: Event) -> None:
    """Draw nothing."""
