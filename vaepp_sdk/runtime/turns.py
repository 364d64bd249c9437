"""One call at a time, whichever threads they come from."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from vaepp_sdk.errors import RunError

__all__ = ["Turns"]


class Turns:
    """Lets calls in one after the other. One from inside another is refused: it would wait for itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for this thread's turn, which lasts as long as the block.

        Raises:
            RunError: this thread has it already.
        """
        if self._holder == threading.get_ident():
            raise RunError("a call from inside another call, as from its on_event, cannot be served")
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = 0
