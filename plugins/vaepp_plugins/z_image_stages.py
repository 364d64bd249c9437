"""The Z-Image pipeline, stage by stage: every stage is the pipeline's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vaepp_plugins.picture_stages import PictureStages, for_each_prompt, prompts_of
from vaepp_plugins.z_image import is_guided

__all__ = ["ZImageStages"]

_MAX_SEQUENCE_LENGTH = 512
"""The default of the pipeline's `__call__`, for what a call leaves out."""


class ZImageStages(PictureStages):
    """See `vaepp_sdk.stages.PipelineStages`."""

    @torch.no_grad()
    def encode_prompt(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompts; guidance is on for a scale above 0."""
        prompts = prompts_of(call)
        negative = call.get("negative_prompt")
        if negative is not None:
            negative = for_each_prompt(negative, prompts)
        positive_embeds, negative_embeds = pipe.encode_prompt(
            prompt=prompts,
            negative_prompt=negative,
            do_classifier_free_guidance=is_guided(call),
            device=pipe._execution_device,
            max_sequence_length=call.get("max_sequence_length", _MAX_SEQUENCE_LENGTH),
        )
        return {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": positive_embeds,
            "negative_prompt_embeds": negative_embeds,
        }

    def vae_input(self, pipe: Any, latents: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """What the pipeline gives to `vae.decode`."""
        del call
        config = pipe.vae.config
        typed = latents.to(pipe.vae.dtype)
        return (typed / float(config.scaling_factor)) + float(config.shift_factor)
