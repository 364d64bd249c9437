"""Ranks' work without models: what the runtime is tested with. Imported by the ranks, by name."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vaepp_sdk.errors import OutputError, RankError, UnsupportedError, VaeppWarning
from vaepp_sdk.events import LatentsKept, Progress, StageEnd, StageStart
from vaepp_sdk.runtime.work import Answer, Seat


class Light:
    """Work without torch: it does what the payload or the request says, stage by stage.

    A fault is `{"kind": ..., "rank": ..., "stage": ...}`.
    """

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.number = 0
        self._fault(seat.payload, "boot")

    def join(self) -> None:
        pass

    def load(self) -> None:
        self._fault(self.seat.payload, "load")

    def run(self, request: Mapping[str, Any]) -> Answer:
        for stage in ("encode_prompt", "denoise", "decode", "save"):
            place: dict[str, Any] = {"rank": self.seat.rank, "world_size": self.seat.world_size}
            self.seat.observer(StageStart(**place, stage=stage, request=self.number))
            for step in range(request.get("steps", 2)):
                self.seat.observer(Progress(stage=stage, done=step + 1, total=request.get("steps", 2)))
            if stage == "denoise" and "kept" in request:
                self.seat.observer(LatentsKept(request["kept"], self.number))
                Path(request["kept"], f"reached-{self.seat.rank}").touch()
            self._fault(request, stage)
            end = StageEnd(**place, stage=stage, request=self.number, seconds=0.0, peak_bytes=1)
            self.seat.observer(end)
        self.number += 1
        size = request.get("size", 4)
        pictures = [Image.new("RGB", (size, size + index), (index, 0, 7)) for index in range(2)]
        return Answer(
            value={"rank": self.seat.rank, "echo": dict(request), "pid": os.getpid()}, pictures=pictures
        )

    def close(self) -> None:
        self._fault(self.seat.payload, "close")

    def exchange(self) -> None:
        pass

    def _fault(self, source: Mapping[str, Any], stage: str) -> None:
        fault = source.get("fault")
        if fault and fault["stage"] == stage and fault["rank"] in (self.seat.rank, "all"):
            _strike(fault["kind"], self.seat.rank)
        if fault and fault["stage"] == stage:
            self.exchange()


class Joined(Light):
    """The same over a real gloo group: ranks without the fault wait for the one with it."""

    def join(self) -> None:
        import torch

        from vaepp_sdk.runtime.rendezvous import join

        join(self.seat, torch.device("cpu"))

    def exchange(self) -> None:
        import torch
        import torch.distributed as dist

        if dist.is_initialized():
            dist.all_reduce(torch.ones(1))

    def run(self, request: Mapping[str, Any]) -> Answer:
        answer = super().run(request)
        self.exchange()
        return answer

    def close(self) -> None:
        import torch.distributed as dist

        super().close()
        if dist.is_initialized():
            dist.destroy_process_group()


class Painter(Joined):
    """What a pipeline's work looks like from outside; faults come through the environment.

    A fault may name the `request` it strikes in, and a folder of latents that are `kept` before it strikes.
    """

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat)
        self.fault = json.loads(os.environ.get("VAEPP_TEST_FAULT", "{}"))

    def load(self) -> None:
        self._fault({"fault": self.fault}, "load")

    def run(self, request: Mapping[str, Any]) -> Answer:
        strikes = self.fault.get("request") in (None, request["number"])
        kept = {"kept": self.fault["kept"]} if "kept" in self.fault else {}
        answer = super().run({**request, **kept, "fault": self.fault if strikes else None})
        stages = [
            {
                "rank": self.seat.rank,
                "world_size": self.seat.world_size,
                "stage": stage,
                "request": request["number"],
                "seconds": 0.5 + self.seat.rank,
                "peak_bytes": (3 + self.seat.rank) * 2**20,
            }
            for stage in ("denoise", "decode")
        ]
        files = [f"/pictures/{request['call']['prompt']}.png"] if self.seat.rank == 0 else []
        value = {"files": files, "seed": request["seed"], "stages": stages, "notices": []}
        return Answer(value=value, pictures=answer.pictures if self.seat.rank == 0 else ())


def _wait() -> None:
    threading.Event().wait()


def _strike(kind: str, rank: int) -> None:
    if kind == "raise":
        raise ValueError(f"struck on rank {rank}\nwith a second line")
    if kind == "check":
        raise RankError(rank, "denoise", "no such size", harmless=True)
    if kind == "check of a file":
        raise RankError(rank, "save", "no such format", harmless=True)
    if kind == "check apart":
        raise RankError(rank, "denoise", f"no such size on rank {rank}", harmless=True)
    if kind == "refuse":
        raise UnsupportedError("this size is not served")
    if kind == "cannot save":
        raise OutputError("out/1.png exists")
    if kind == "exit":
        sys.exit(0)
    if kind == "_exit":
        os._exit(0)
    if kind == "_exit 3":
        os._exit(3)
    if kind == "sleep":
        time.sleep(3600)
    if kind == "hold":
        re.match(r"(a|a)*b", "a" * 60)  # backtracks for years, in C, with the interpreter's lock held
    if kind == "helper":
        subprocess.Popen(["sleep", "3600"])
        subprocess.Popen(["sleep", "3600"], start_new_session=True)
        subprocess.Popen("trap '' TERM; setsid sleep 3600 & sleep 3600", shell=True, start_new_session=True)
    if kind == "linger" and rank == 0:
        threading.Thread(target=_wait, name="uploader").start()
    elif kind == "linger":
        atexit.register(_wait)
    if kind == "warn":
        warnings.warn("a light warning", VaeppWarning, stacklevel=1)
        warnings.warn("not ours", RuntimeWarning, stacklevel=1)
    if kind in ("KILL", "STOP", "SEGV", "TERM"):
        os.kill(os.getpid(), getattr(signal, f"SIG{kind}"))
        time.sleep(3600)
