"""Standard streams that are closed, full, or read by nobody."""

from __future__ import annotations

import os
import sys
from typing import TextIO

__all__ = ["let_go", "open_missing"]


def open_missing() -> None:
    """Put the null device where a standard stream is closed, as after `>&-`.

    Python gives `None` for it, and the next file that is opened would take its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            lowest = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(lowest, mode))


def let_go(stream: TextIO, more: str = "") -> OSError | None:
    """Write out what a stream holds, or let go of it: it must not fail once more at exit.

    Args:
        stream: standard output or error.
        more: to be written too.

    Returns:
        Why nothing more can be written to it, or None.
    """
    try:
        stream.write(more)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
