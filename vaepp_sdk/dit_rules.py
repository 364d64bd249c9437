"""Which sizes of the DiT dimensions a pipeline can run with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vaepp_sdk.entries import PipelineEntry, TensorPlan
from vaepp_sdk.errors import Fault, UnsupportedError
from vaepp_sdk.model_folder import ModelFolder
from vaepp_sdk.parallel.dims import ParallelDims
from vaepp_sdk.registry import Registry
from vaepp_sdk.spec.classes import MAX_RANKS

__all__ = ["dit_faults"]

_KEYS: Mapping[str, str] = {
    "data": "data_parallel_size",
    "cfg": "cfg_parallel_size",
    "pipeline": "pipeline_parallel_size",
    "ring": "ring_degree",
    "ulysses": "ulysses_degree",
}
_TENSOR = "$.parallel.tensor_parallel_size"


def dit_faults(
    dims: ParallelDims, folder: ModelFolder, entry: PipelineEntry | None, registry: Registry
) -> list[Fault]:
    """Every fault in the sizes of the DiT dimensions.

    Raises:
        SpecError: the transformer's `config.json` cannot be read.
        UnsupportedError: it does not give the widths the plan asks for.
    """
    faults = [
        Fault(
            f"$.parallel.{key}", f"found {dims.sizes[axis]}", f"{key} above 1 is not available yet; write 1"
        )
        for axis, key in _KEYS.items()
        if dims.sizes[axis] > 1
    ]
    if dims.tensor > 1:
        faults += _tensor_faults(dims.tensor, folder, entry, registry)
    return faults


def _tensor_faults(
    size: int, folder: ModelFolder, entry: PipelineEntry | None, registry: Registry
) -> list[Fault]:
    plan = entry.dit.tensor if entry is not None and entry.dit is not None else None
    if entry is None or entry.dit is None or plan is None:
        able = sorted(name for name, other in registry.pipelines.items() if other.dit and other.dit.tensor)
        known = f"; {', '.join(able)} can be split" if able else ""
        found = f"found {size}, and no plugin says how to split {folder.pipeline_class}"
        return [Fault(_TENSOR, found, f"write 1{known}")]
    widths = _widths(plan, folder.config(entry.dit.component), f"{entry.dit.component}/config.json")
    uneven = {name: width for name, width in widths.items() if width % size}
    if not uneven:
        return []
    names = ", ".join(f"{name} = {width}" for name, width in uneven.items())
    fits = _common_sizes(widths)
    fix = f"sizes that work: {', '.join(map(str, fits))}" if fits else "only 1 works for this model"
    return [Fault(_TENSOR, f"{size} does not divide {names}", fix)]


def _widths(plan: TensorPlan, config: Mapping[str, Any], file: str) -> dict[str, int]:
    widths = {}
    for name, rule in plan.widths.items():
        try:
            widths[name] = rule(config)
        except Exception as error:
            # The rule is a plugin's and the file a model's: whichever is wrong, the pair cannot be split.
            problem = f"{type(error).__name__}: {error}"
            raise UnsupportedError(f"{file} does not give the width {name!r} ({problem})") from error
    return widths


def _common_sizes(widths: Mapping[str, int]) -> list[int]:
    """The sizes above 1 that divide every width."""
    common = math.gcd(*widths.values())
    return [size for size in range(2, min(common, MAX_RANKS) + 1) if common % size == 0]
