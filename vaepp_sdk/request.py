"""One request: the call arguments of one run of the pipeline, checked and with a seed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from vaepp_sdk.errors import Fault, SpecError
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.signature import signature_faults
from vaepp_sdk.spec.calls import MAX_IMAGES, call_faults
from vaepp_sdk.spec.values import MAX_INTEGER
from vaepp_sdk.text import shown

__all__ = ["Request", "make_request"]

_DRAWN_SEEDS = 2**32


@attrs.frozen
class Request:
    """What one run of the pipeline is asked for.

    Attributes:
        number: counted from 0 in each run.
        call: the pipeline's keyword arguments, checked; without `seed`.
        seed: image i starts from noise of `seed + i`.
        save: whether the pictures are saved.
        latents: files of latents that are decoded, in order; empty to make pictures from the prompts.
    """

    number: int
    call: Mapping[str, Any]
    seed: int
    save: bool
    latents: Sequence[str] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, one or several."""
        prompt = self.call["prompt"]
        return (prompt,) if isinstance(prompt, str) else tuple(prompt)

    @property
    def images(self) -> int:
        """How many pictures it makes."""
        return len(self.prompts) * (self.call.get("num_images_per_prompt") or 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Request:
        """What `to_dict` gave."""
        return cls(**data)


def make_request(resolved: Resolved, overrides: Mapping[str, Any], number: int, save: bool) -> Request:
    """Merge a spec's `[call]` with the arguments of one call, and draw a seed where none is given.

    Args:
        resolved: what runs.
        overrides: arguments that replace those of `[call]`.
        number: the request's number.
        save: whether its pictures are saved.

    Raises:
        SpecError: with every fault of the arguments.
    """
    call = {**resolved.spec.call, **overrides}
    faults = call_faults(call)
    if resolved.signature is not None:
        seen = {fault.path for fault in faults}
        found = signature_faults(resolved.signature, call)
        faults += [fault for fault in found if fault.path not in seen]
    if not faults:
        faults = _request_faults(call, resolved)
    if faults:
        raise SpecError(faults, f"request {number}")
    seed = call.pop("seed", None)
    request = Request(number, _copied(call), secrets.randbelow(_DRAWN_SEEDS) if seed is None else seed, save)
    faults = _size_faults(request)
    if faults:
        raise SpecError(faults, f"request {number}")
    return request


def _request_faults(call: Mapping[str, Any], resolved: Resolved) -> list[Fault]:
    """What a request needs beyond arguments that are each fine."""
    prompt, negative = call.get("prompt"), call.get("negative_prompt")
    if prompt is None:
        return [Fault("$.call.prompt", "it is missing", "write a string, or a list of strings")]
    count = 1 if isinstance(prompt, str) else len(prompt)
    faults = []
    if isinstance(negative, list) and len(negative) != count:
        fix = f"write one string for all, or a list of {count}, one per prompt"
        faults.append(Fault("$.call.negative_prompt", f"found {shown(negative)}", fix))
    parameters = resolved.signature.parameters if resolved.signature is not None else {}
    for name, parameter in parameters.items():
        if parameter.required and call.get(name) is None:
            faults.append(Fault(f"$.call.{name}", "it is missing", f"{resolved.pipeline_class} needs it"))
    return faults


def _size_faults(request: Request) -> list[Fault]:
    faults = []
    if request.images > MAX_IMAGES:
        found = f"prompts and pictures of each make {request.images} pictures"
        faults.append(Fault("$.call.num_images_per_prompt", found, f"at most {MAX_IMAGES} work"))
    if request.seed + request.images - 1 > MAX_INTEGER:
        fix = f"it must be at most {MAX_INTEGER - request.images + 1} for {request.images} pictures"
        faults.append(Fault("$.call.seed", f"found {request.seed}", fix))
    return faults


def _copied(call: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose lists are its own: some pipelines write into the lists they are given."""
    return {key: list(value) if isinstance(value, list) else value for key, value in call.items()}
