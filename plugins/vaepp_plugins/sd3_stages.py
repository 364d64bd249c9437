"""The Stable Diffusion 3 pipeline, stage by stage: every stage is the pipeline's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vaepp_plugins.picture_stages import PictureStages
from vaepp_plugins.plan_rules import guided
from vaepp_plugins.sd3 import GUIDANCE_SCALE

__all__ = ["StableDiffusion3Stages"]

_MAX_SEQUENCE_LENGTH = 256
"""The default of the pipeline's `__call__`, for what a call leaves out."""

_PROMPTS = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")


class StableDiffusion3Stages(PictureStages):
    """See `vaepp_sdk.stages.PipelineStages`."""

    @torch.no_grad()
    def encode_prompt(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompts, once for each picture; guidance is on for a scale above 1."""
        embeds, negative_embeds, pooled, negative_pooled = pipe.encode_prompt(
            **{name: call.get(name) for name in _PROMPTS},
            do_classifier_free_guidance=guided(call, GUIDANCE_SCALE),
            device=pipe._execution_device,
            clip_skip=call.get("clip_skip"),
            num_images_per_prompt=call.get("num_images_per_prompt") or 1,
            max_sequence_length=call.get("max_sequence_length", _MAX_SEQUENCE_LENGTH),
        )
        return {
            **dict.fromkeys(_PROMPTS),
            "prompt_embeds": embeds,
            "negative_prompt_embeds": negative_embeds,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
            "num_images_per_prompt": 1,  # the embeddings above are repeated already
        }

    def vae_input(self, pipe: Any, latents: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """What the pipeline gives to `vae.decode`."""
        del call
        config = pipe.vae.config
        scaled: torch.Tensor = (latents / config.scaling_factor) + config.shift_factor
        return scaled.to(pipe.vae.dtype)
