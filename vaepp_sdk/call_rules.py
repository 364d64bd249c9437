"""What the arguments of one request must be once its pipeline is known; pure, so that it is told early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from vaepp_sdk.dit_rules import excluded_faults
from vaepp_sdk.entries import PipelineEntry
from vaepp_sdk.errors import Fault
from vaepp_sdk.parallel.dims import ParallelDims
from vaepp_sdk.signature import CallSignature, signature_faults
from vaepp_sdk.size_rules import CallSize, size_faults
from vaepp_sdk.spec.calls import COUNTS, MAX_IMAGES, call_faults, each_prompt
from vaepp_sdk.spec.values import MAX_INTEGER
from vaepp_sdk.text import shown

__all__ = ["CallRules"]


@attrs.frozen(kw_only=True)
class CallRules:
    """What the arguments of a call must fit.

    Attributes:
        pipeline: the pipeline's class.
        entry: its entry, or None where no plugin has one.
        signature: what its call takes, or None where nobody knows.
        sizes: which sizes it can make.
        dims: the layout that denoises.
    """

    pipeline: str
    entry: PipelineEntry | None = None
    signature: CallSignature | None = None
    sizes: Sequence[CallSize] = ()
    dims: ParallelDims = attrs.field(factory=ParallelDims)

    def argument_faults(self, call: Mapping[str, Any], path: str = "$.call") -> list[Fault]:
        """Every fault of arguments as they are written; a spec need not write all of them.

        Args:
            call: the arguments.
            path: where they stand.
        """
        faults = signature_faults(self.signature, call, path) if self.signature is not None else []
        faults += size_faults(call, self.sizes, path)
        return faults + excluded_faults(self.dims, call, self.entry, path)

    def request_faults(self, call: Mapping[str, Any], path: str = "$.call") -> list[Fault]:
        """Every fault of the arguments of one request, `seed` included.

        Args:
            call: the arguments as they would be used.
            path: where they stand.
        """
        faults = call_faults(call, path)
        for fault in self.argument_faults(call, path):
            if fault.path not in {one.path for one in faults}:
                faults.append(fault)
        return faults or _whole_faults(call, self.signature, self.pipeline, path)


def _whole_faults(
    call: Mapping[str, Any], signature: CallSignature | None, pipeline: str, path: str
) -> list[Fault]:
    """What a request needs beyond arguments that are each fine."""
    prompt, negative = call.get("prompt"), call.get("negative_prompt")
    if prompt is None:
        return [Fault(f"{path}.prompt", "it is missing", "write a string, or a list of strings")]
    count = 1 if isinstance(prompt, str) else len(prompt)
    faults = []
    if isinstance(negative, list) and len(negative) != count:
        fix = f"write one string for all, or a list of {count}, one per prompt"
        faults.append(Fault(f"{path}.negative_prompt", f"found {shown(negative)}", fix))
    parameters = signature.parameters if signature is not None else {}
    for name, parameter in parameters.items():
        if parameter.required and call.get(name) is None:
            faults.append(Fault(f"{path}.{name}", "it is missing", f"{pipeline} needs it"))
    return faults or _count_faults(call, count, path)


def _count_faults(call: Mapping[str, Any], prompts: int, path: str) -> list[Fault]:
    faults = []
    images = prompts * each_prompt(call)
    if images > MAX_IMAGES:
        found = f"prompts and pictures of each make {images} pictures"
        key = next((key for key in COUNTS if call.get(key)), COUNTS[0])
        faults.append(Fault(f"{path}.{key}", found, f"at most {MAX_IMAGES} work"))
    seed = call.get("seed") or 0
    if seed + images - 1 > MAX_INTEGER:
        fix = f"it must be at most {MAX_INTEGER - images + 1} for {images} pictures"
        faults.append(Fault(f"{path}.seed", f"found {seed}", fix))
    return faults
