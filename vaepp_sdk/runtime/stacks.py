"""Tells a rank that is stuck from ranks that wait for it, by the stacks of their main threads."""

from __future__ import annotations

import re
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from vaepp_sdk.runtime.job import RunFolder
from vaepp_sdk.runtime.process import RankProcess

__all__ = ["ask_for_stacks", "frames_of", "thread_waits", "waits_for_peers"]

_ANSWER_TIME = 0.5
_THREAD = re.compile(r"^(?:Current thread|Thread) .*$", re.MULTILINE)
_FRAME = re.compile(r'File "([^"]+)", line \d+ in (\S+)')
_WAITS = tuple(f"vaepp_sdk/{name}.py" for name in ("parallel/view", "parallel/gate", "runtime/board"))
_INNERMOST = 4
"""Frames looked at: an exchange's own code lies between its caller and the wait in C."""

_SHOWN = 8


def ask_for_stacks(ranks: Iterable[RankProcess], folder: RunFolder) -> dict[int, str]:
    """Ask ranks for the stacks of all their threads; a stopped or dead one gives an empty text.

    The rank's C-level handler answers, so a thread that holds the interpreter's lock does not matter.
    """
    asked = list(ranks)
    for rank in asked:
        if not rank.ended():
            rank.process.send_signal(signal.SIGUSR1)
    time.sleep(_ANSWER_TIME)
    return {rank.rank: _read(folder.stacks(rank.rank)) for rank in asked}


def waits_for_peers(stacks: str) -> bool:
    """Whether the main thread of a process stands inside an exchange with other ranks."""
    for thread in _THREAD.split(stacks):
        frames = _FRAME.findall(thread)
        if frames and Path(frames[-1][0]).name == "rank_main.py":
            return any(_is_exchange(file) for file, _ in frames[:_INNERMOST])
    return False


def thread_waits(ident: int) -> bool:
    """Whether a thread of this process stands inside an exchange with other ranks; false once it is gone."""
    frame, files = sys._current_frames().get(ident), list[str]()
    while frame is not None and len(files) < _INNERMOST:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    return any(_is_exchange(file) for file in files)


def frames_of(ident: int) -> list[str]:
    """Where a thread of this process stands, innermost first, one line a frame; nothing once it is gone."""
    frame = sys._current_frames().get(ident)
    stack = traceback.extract_stack(frame, _SHOWN) if frame is not None else []
    return [f"in {one.name}, {one.filename}, line {one.lineno}" for one in reversed(stack)]


def _is_exchange(file: str) -> bool:
    return "torch/distributed/" in file or file.endswith(_WAITS)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
