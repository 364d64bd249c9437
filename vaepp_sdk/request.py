"""One request: the call arguments of one run of the pipeline, checked and with a seed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from vaepp_sdk.errors import SpecError
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.spec.calls import copied, each_prompt

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
        return len(self.prompts) * each_prompt(self.call)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Request:
        """What `to_dict` gave; JSON knows no tuples."""
        return cls(**{**data, "latents": tuple(data["latents"])})


def make_request(resolved: Resolved, overrides: Mapping[str, Any], number: int, save: bool) -> Request:
    """Merge a spec's `[call]` with the arguments of one call, and draw a seed where none is given.

    Args:
        resolved: what runs.
        overrides: arguments that replace those of `[call]`; None leaves one to the pipeline.
        number: the request's number.
        save: whether its pictures are saved.

    Raises:
        SpecError: with every fault of the arguments.
    """
    call = {**resolved.spec.call, **overrides}
    faults = resolved.call_rules.request_faults(call)
    if faults:
        raise SpecError(faults, f"request {number}")
    # None stands for the pipeline's default, which is often another value and cannot be None.
    call = {key: value for key, value in call.items() if value is not None}
    seed = call.pop("seed", None)
    return Request(number, copied(call), secrets.randbelow(_DRAWN_SEEDS) if seed is None else seed, save)
