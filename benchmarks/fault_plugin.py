"""A plugin that injects one fault into one rank at the start of one stage, for `benchmarks.faults`.

The environment says which: `VAEPP_FAULT` is `{"kind": ..., "stage": ..., "rank": ..., "mark": ...}` as JSON.
`mark` is the path of a file that gets the monotonic clock's nanoseconds just before the fault. Where
`VAEPP_STAGES` names a folder, each rank writes there which stage it is in.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vaepp_sdk import hookimpl
from vaepp_sdk.events import StageStart

VAEPP_API = 1

CRASHES = ("raise", "OutOfMemoryError", "sys.exit(0)", "_exit(0)", "_exit(3)", "KILL", "SEGV", "ABRT", "TERM")
"""Faults that end the rank, or its work, at once."""

HANGS = ("sleep", "hold the GIL in C", "STOP")
"""Faults after which the rank lives and does nothing."""

BETWEEN_STEPS = "sleep after a step"
"""A fault of `denoise`: the rank does nothing after its first step."""

_RAISED = {"raise": ValueError, "OutOfMemoryError": torch.OutOfMemoryError, "sys.exit(0)": SystemExit}


@hookimpl
def vaepp_on_stage_start(event: StageStart) -> None:
    """Note the stage, and strike where the environment says."""
    if "VAEPP_STAGES" in os.environ:
        Path(os.environ["VAEPP_STAGES"], str(event.rank)).write_text(event.stage)
    fault = json.loads(os.environ.get("VAEPP_FAULT", "{}"))
    if fault and (fault["stage"], fault["rank"]) == (event.stage, event.rank):
        Path(fault["mark"]).write_text(str(time.monotonic_ns()))
        strike(fault["kind"])


def strike(kind: str) -> None:
    """Do what a fault does; one that is raised comes out of the stage's own code, after this returns."""
    if kind in _RAISED:
        error = SystemExit(0) if kind == "sys.exit(0)" else _RAISED[kind]("injected")
        sys.setprofile(lambda frame, event, _: _raise_in_stage(frame, event, error))
    elif kind.startswith("_exit"):
        os._exit(int(kind[6]))
    elif kind == "sleep":
        time.sleep(3600)
    elif kind == BETWEEN_STEPS:
        sys.setprofile(_sleep_after_a_step)
    elif kind == "hold the GIL in C":
        ctypes.PyDLL(None).sleep(3600)
    else:
        os.kill(os.getpid(), getattr(signal, f"SIG{kind}"))
        time.sleep(3600)


def _sleep_after_a_step(frame: FrameType, event: str, _: Any) -> None:
    """Sleep when the pipeline has told of a step."""
    if (
        event == "return"
        and frame.f_code.co_name == "callback"
        and frame.f_code.co_filename.endswith("stages.py")
    ):
        time.sleep(3600)


def _raise_in_stage(frame: FrameType, event: str, error: BaseException) -> Any:
    """Raise in the first function that the stage calls: an observer's error would only be a warning."""
    caller = frame.f_back
    if event != "call" or caller is None or frame.f_code.co_name == "_forget_peak":
        return
    if caller.f_code.co_name == "run" and caller.f_code.co_filename.endswith("stages.py"):
        sys.setprofile(None)
        raise error
