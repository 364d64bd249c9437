"""How a process whose work is done ends: soon, whatever threads and exit handlers plugins have left in it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["GRACE", "leave_soon"]

GRACE = 5.0
"""How long a process may stand still after its work, in seconds: a thread may have something to finish."""

_MOST = 30.0
"""How long it may go on in all: on a loaded machine exit handlers are slow."""

_TURN = 0.25
_LIBRARY = str(Path(threading.__file__).parent)


def leave_soon(code: int, say: Callable[[str], None]) -> None:
    """End this process with an exit code if its main thread stands still for `GRACE` instead of ending it.

    To be called last. The interpreter waits without limit for threads that are no daemons, and for functions
    that `atexit` calls; a daemon runs beside both.

    Args:
        code: the exit code.
        say: told what kept the process alive, in a few words.
    """

    def leave() -> None:
        began = moved = time.monotonic()
        place = _place_of_main()
        while time.monotonic() - moved < GRACE and time.monotonic() - began < _MOST:
            time.sleep(_TURN)
            last, place = place, _place_of_main()
            if place != last:
                moved = time.monotonic()
        with contextlib.suppress(Exception):  # whoever would hear it may be gone, and this process must go
            say(_what_runs())
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)

    threading.Thread(target=leave, name="vaepp-leave", daemon=True).start()


def _place_of_main() -> tuple[object, int] | None:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return (frame.f_code, frame.f_lasti) if frame else None


def _what_runs() -> str:
    main = threading.main_thread()
    threads = [one for one in threading.enumerate() if not one.daemon and one is not main]
    if not threads:
        return f"an exit handler{_place(main)}"
    more = f" and {len(threads) - 1} more" if len(threads) > 1 else ""
    return f"the thread {threads[0].name!r}{_place(threads[0])}{more}"


def _place(thread: threading.Thread) -> str:
    """Where a thread stands, in what is not Python's own library if it has come from there."""
    frames = []
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    plugins = [one for one in frames if not _is_library(one.f_code.co_filename)]
    for one in (plugins or frames)[:1]:
        return f" ({one.f_code.co_filename}:{one.f_lineno} in {one.f_code.co_name})"
    return ""


def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARY) and "-packages" not in file
