"""Specs and executors for tests on real ranks."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from vaepp_sdk.events import Event
from vaepp_sdk.executor import Executor, RankResult
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.registry import Registry, default_registry
from vaepp_sdk.request import make_request
from vaepp_sdk.resolve import Resolved, resolve
from vaepp_sdk.spec import PipelineSpec
from vaepp_sdk.stages import Observer

CALL: Mapping[str, Any] = {
    "prompt": "a futuristic city at sunset",
    "height": 128,
    "width": 128,
    "num_inference_steps": 3,
    "guidance_scale": 0.0,
    "max_sequence_length": 128,
    "seed": 7,
}


def unwatched(event: Event) -> None:
    """An observer that looks away."""


def resolved_for(model: Path | str, /, registry: Registry | None = None, **tables: Any) -> Resolved:
    """What a spec of a tiny checkpoint resolves to: float32, on the CPU, with some tables replaced."""
    base = {"model": {"id": str(model), "dtype": "float32", "device": "cpu"}, "call": dict(CALL)}
    return resolve(PipelineSpec.load(base | tables), registry or default_registry())


def loaded(resolved: Resolved, observer: Observer = unwatched, registry: Registry | None = None) -> Executor:
    """This rank's executor."""
    group = DiTGroup.create(resolved.dims, torch.device("cpu"))
    executor = Executor(
        resolved, registry or default_registry(), group, timeout=timedelta(seconds=60), observer=observer
    )
    executor.load()
    return executor


def run(executor: Executor, resolved: Resolved, *, save: bool = False, **call: Any) -> RankResult:
    """One request with some call arguments replaced."""
    return executor.run(make_request(resolved, call, 0, save))


def generators(seed: int, count: int) -> list[torch.Generator]:
    """What diffusers is given to make the same pictures."""
    return [torch.Generator("cpu").manual_seed(seed + index) for index in range(count)]
