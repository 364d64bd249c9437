"""Counts this process's exchanges with other ranks: a failure before the first one leaves no rank waiting."""

from __future__ import annotations

from collections.abc import Callable

import attrs

__all__ = ["EXCHANGES", "Exchanges"]


def _unheard() -> None:
    """An exchange that nobody counts."""


@attrs.define(eq=False)
class Exchanges:
    """The exchanges of one process.

    Attributes:
        begun: how many there have been.
        listener: called before each.
    """

    begun: int = 0
    listener: Callable[[], None] = _unheard

    def begin(self) -> None:
        """Note that this rank is about to take part in one."""
        self.begun += 1
        self.listener()


EXCHANGES = Exchanges()
"""This process's."""
