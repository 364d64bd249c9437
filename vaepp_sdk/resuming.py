"""From kept latents to a request: whether they fit what they are to be decoded with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from vaepp_sdk.errors import Fault, SpecError, UserError
from vaepp_sdk.kept import KeptRun, differing_keys, settings_of
from vaepp_sdk.model_folder import ModelFolder
from vaepp_sdk.request import Request, make_request
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.text import clean

__all__ = ["resumed_request", "resumed_tables"]


_DENOISING = ("call.", "model.lora", "model.compile", "limits.denoise")
"""How overrides begin that only matter while latents are made."""


def resumed_tables(kept: KeptRun, overrides: Sequence[str]) -> Mapping[str, Any]:
    """The tables of the spec that made the latents, with the request's own arguments as `[call]`.

    Raises:
        SpecError: an override would change `[call]`, which has been carried out, or how that was done.
    """
    late = [text for text in map(str, overrides) if text.lstrip().startswith(_DENOISING)]
    if late:
        fix = "leave it out, or denoise again with the spec itself"
        found = "the latents are there already, and nothing is denoised"
        raise SpecError([Fault(f"override {clean(text)}", found, fix) for text in late], str(kept.folder))
    return {**kept.spec, "call": {**kept.call, "seed": kept.seed}}


def resumed_request(kept: KeptRun, resolved: Resolved) -> Request:
    """The request that decodes kept latents.

    Raises:
        UserError: they are of another pipeline or for another VAE, or not as many as `[call]` says.
    """
    name = clean(str(kept.folder), 300)
    if kept.pipeline != resolved.pipeline_class:
        raise UserError(
            f"{name} holds latents of {kept.pipeline}, and the model is a {resolved.pipeline_class}; "
            "give the model that made them as model.id"
        )
    model = ModelFolder(resolved.model_path, resolved.pipeline_class, ())
    differing = differing_keys(kept.vae, settings_of(model.config("vae")))
    if differing:
        raise UserError(
            f"{name} holds latents for a VAE whose {', '.join(differing[:5])} differ from this model's; "
            "give the model that made them as model.id"
        )
    request = make_request(resolved, {}, 0, save=resolved.spec.output is not None)
    count = sum(file.count for file in kept.files)
    if count != request.images:
        raise UserError(f"{name} holds latents of {count} pictures, and its [call] asks for {request.images}")
    return attrs.evolve(request, latents=[str(file.path) for file in kept.files])
