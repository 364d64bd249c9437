"""Which sizes of the DiT dimensions a pipeline can run with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from vaepp_sdk.entries import DiTPlan, PipelineEntry
from vaepp_sdk.errors import Fault, UnsupportedError
from vaepp_sdk.model_folder import ModelFolder
from vaepp_sdk.parallel.dims import ParallelDims
from vaepp_sdk.registry import Registry
from vaepp_sdk.spec.calls import each_prompt
from vaepp_sdk.spec.classes import MAX_RANKS

__all__ = ["KEYS", "dit_faults", "dit_notices", "excluded_faults"]

KEYS: Mapping[str, str] = {
    "data": "data_parallel_size",
    "cfg": "cfg_parallel_size",
    "pipeline": "pipeline_parallel_size",
    "ring": "ring_degree",
    "ulysses": "ulysses_degree",
    "tensor": "tensor_parallel_size",
}


def dit_faults(
    dims: ParallelDims, folder: ModelFolder, entry: PipelineEntry | None, registry: Registry
) -> list[Fault]:
    """Every fault in the sizes of the DiT dimensions.

    Raises:
        SpecError: the transformer's `config.json` cannot be read.
        UnsupportedError: it does not give the widths the plan asks for.
    """
    plan = entry.dit if entry is not None and entry.dit is not None else DiTPlan()
    faults = []
    for axis in dims.active:
        if axis not in plan.axes:
            faults.append(_lacking(axis, dims.sizes[axis], plan, folder.pipeline_class, registry))
        elif axis in _RULES:
            faults += _RULES[axis](dims, plan, folder)
    return faults


def excluded_faults(
    dims: ParallelDims, call: Mapping[str, Any], entry: PipelineEntry | None, path: str = "$.call"
) -> list[Fault]:
    """Every argument of a call, told where it stands, that does not work on a layout."""
    plan = entry.dit if entry is not None and entry.dit is not None else DiTPlan()
    faults = []
    for name, excluded in plan.excludes.items():
        axes = [axis for axis in dims.active if axis in excluded]
        if axes and call.get(name) is not None:
            keys = " and ".join(f"{KEYS[axis]}={dims.sizes[axis]}" for axis in axes)
            rest = ", ".join(axis for axis in plan.axes if axis not in excluded)
            fix = f"leave it out, or use other dimensions: {rest}"
            faults.append(Fault(f"{path}.{name}", f"it does not work with {keys}", fix))
    return faults


def dit_notices(
    dims: ParallelDims, call: Mapping[str, Any], folder: ModelFolder, entry: PipelineEntry | None
) -> list[str]:
    """What is said of sizes that work and bring nothing.

    Args:
        dims: the sizes.
        call: the spec's `[call]`.
        folder: the model.
        entry: the pipeline's entry, if there is one.
    """
    plan = entry.dit if entry is not None and entry.dit is not None else DiTPlan()
    images = _images(call)
    notices = []
    useless = _useless_guidance(dims, call, images, plan, folder) if dims.cfg > 1 else None
    if useless is not None:
        notices.append(f"parallel.{KEYS['cfg']} takes no effect for [call]: without guidance {useless}.")
    if images is not None and images < dims.data:
        made = f"[call] makes {images} picture{'s' if images > 1 else ''}"
        idle = f"of {dims.data} replicas {dims.data - images} have nothing to do before decode"
        notices.append(f"parallel.{KEYS['data']}: {made}, and {idle}.")
    return notices


def _useless_guidance(
    dims: ParallelDims, call: Mapping[str, Any], images: int | None, plan: DiTPlan, folder: ModelFolder
) -> str | None:
    """Why the ranks of guidance have nothing to share out, or None where they have, or where nobody knows."""
    if plan.calls is not None and not plan.calls.pairs(call, folder.settings):
        return "a step calls the transformer once, and every rank of a row runs that call"
    guided = plan.batch.guided if plan.batch is not None else None
    if guided is None or guided(call) or images is None or images > dims.data:
        return None
    return "there is one picture in a batch, and every rank of a row computes it"


def _images(call: Mapping[str, Any]) -> int | None:
    """How many pictures a call makes; None where it has no prompt yet."""
    prompt = call.get("prompt")
    if prompt is None:
        return None
    return (1 if isinstance(prompt, str) else len(prompt)) * each_prompt(call)


def _lacking(axis: str, size: int, plan: DiTPlan, pipeline: str, registry: Registry) -> Fault:
    """A dimension that the pipeline's plan does not have."""
    others = [KEYS[other] for other in plan.axes]
    able = sorted(name for name, other in registry.pipelines.items() if other.dit and axis in other.dit.axes)
    known = f"; {pipeline} can use {', '.join(others)}" if others else ""
    known += f"; {', '.join(able)} can be split by {axis}" if able else ""
    found = f"found {size}, and no plugin says how to split {pipeline} by {axis}"
    return Fault(f"$.parallel.{KEYS[axis]}", found, f"write 1{known}")


def _cfg_faults(dims: ParallelDims, plan: DiTPlan, folder: ModelFolder) -> list[Fault]:
    del plan, folder
    if dims.cfg == 2:
        return []
    fix = "write 2, one rank for each branch, or 1"
    return [Fault(f"$.parallel.{KEYS['cfg']}", f"found {dims.cfg}, and guidance has two branches", fix)]


def _pipeline_faults(dims: ParallelDims, plan: DiTPlan, folder: ModelFolder) -> list[Fault]:
    assert plan.pipeline is not None
    layers = min(_widths("layers", plan.pipeline.layers, plan, folder).values())
    if dims.pipeline <= layers:
        return []
    found = f"found {dims.pipeline}, and the model has layers = {layers}"
    return [Fault(f"$.parallel.{KEYS['pipeline']}", found, f"at most {layers} work")]


def _ulysses_faults(dims: ParallelDims, plan: DiTPlan, folder: ModelFolder) -> list[Fault]:
    """Heads need not divide evenly, but every rank must have one."""
    assert plan.sequence is not None
    heads = min(_widths("attention heads", plan.sequence.heads, plan, folder).values())
    held = heads // dims.tensor
    if dims.ulysses <= held:
        return []
    cut = f" / tensor_parallel_size = {dims.tensor}" if dims.tensor > 1 else ""
    found = f"found {dims.ulysses}, and there are attention heads = {heads}{cut} to share out"
    return [Fault(f"$.parallel.{KEYS['ulysses']}", found, f"at most {max(held, 1)} work")]


def _tensor_faults(dims: ParallelDims, plan: DiTPlan, folder: ModelFolder) -> list[Fault]:
    assert plan.tensor is not None
    size, path = dims.tensor, f"$.parallel.{KEYS['tensor']}"
    widths: dict[str, int] = {}
    for name, rule in plan.tensor.widths.items():
        widths |= _widths(name, rule, plan, folder)
    uneven = {name: width for name, width in widths.items() if width % size}
    if not uneven:
        return []
    names = ", ".join(f"{name} = {width}" for name, width in uneven.items())
    fits = _common_sizes(widths)
    fix = f"sizes that work: {', '.join(map(str, fits))}" if fits else "only 1 works for this model"
    return [Fault(path, f"{size} does not divide {names}", fix)]


def _widths(
    name: str, rule: Callable[[Mapping[str, Any]], int], plan: DiTPlan, folder: ModelFolder
) -> dict[str, int]:
    """A width by name, of every transformer that the model has."""
    others = [other for other in plan.others if other in folder.components]
    return {name: _width(name, rule, plan.component, folder)} | {
        f"{name} of {other}": _width(name, rule, other, folder) for other in others
    }


def _width(name: str, rule: Callable[[Mapping[str, Any]], int], component: str, folder: ModelFolder) -> int:
    config = folder.config(component)
    try:
        return rule(config)
    except Exception as error:
        # The rule is a plugin's and the file a model's: whichever is wrong, the pair cannot be split.
        problem = f"{type(error).__name__}: {error}"
        raise UnsupportedError(
            f"{component}/config.json does not give the width {name!r} ({problem})"
        ) from error


def _common_sizes(widths: Mapping[str, int]) -> list[int]:
    """The sizes above 1 that divide every width."""
    common = math.gcd(*widths.values())
    return [size for size in range(2, min(common, MAX_RANKS) + 1) if common % size == 0]


_RULES: Mapping[str, Callable[[ParallelDims, DiTPlan, ModelFolder], list[Fault]]] = {
    "cfg": _cfg_faults,
    "pipeline": _pipeline_faults,
    "ulysses": _ulysses_faults,
    "tensor": _tensor_faults,
}
"""What a size must fit; data and ring take any."""
