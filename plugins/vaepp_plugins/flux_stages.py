"""The FLUX.1 pipeline, stage by stage: every stage is the pipeline's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vaepp_plugins.flux import CALLS
from vaepp_plugins.picture_stages import PictureStages, for_each_prompt

__all__ = ["FluxStages"]

_MAX_SEQUENCE_LENGTH = 512
"""The default of the pipeline's `__call__`, for what a call leaves out."""


class FluxStages(PictureStages):
    """See `vaepp_sdk.stages.PipelineStages`."""

    @torch.no_grad()
    def encode_prompt(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompts, once for each picture; negative ones where true guidance is on."""
        prompts = for_each_prompt(call["prompt"], [""])
        embeds, pooled = _encoded(pipe, prompts, call.get("prompt_2"), call)
        encoded = {
            "prompt": None,
            "prompt_2": None,
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "num_images_per_prompt": 1,  # the embeddings above are repeated already
        }
        if not CALLS.paired(call):
            return encoded
        negatives = for_each_prompt(call["negative_prompt"], prompts)
        second = call.get("negative_prompt_2")
        embeds, pooled = _encoded(
            pipe, negatives, None if second is None else for_each_prompt(second, prompts), call
        )
        return encoded | {
            "negative_prompt": None,
            "negative_prompt_2": None,
            "negative_prompt_embeds": embeds,
            "negative_pooled_prompt_embeds": pooled,
        }

    def vae_input(self, pipe: Any, latents: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """What the pipeline gives to `vae.decode`."""
        default = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = call.get("height") or default, call.get("width") or default
        unpacked = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        config = pipe.vae.config
        scaled: torch.Tensor = (unpacked / config.scaling_factor) + config.shift_factor
        return scaled.to(pipe.vae.dtype)


def _encoded(pipe: Any, prompts: Any, second: Any, call: Mapping[str, Any]) -> tuple[Any, Any]:
    """Embeddings of all tokens and pooled ones, for each picture."""
    embeds, pooled, _ = pipe.encode_prompt(
        prompt=prompts,
        prompt_2=second,
        device=pipe._execution_device,
        num_images_per_prompt=call.get("num_images_per_prompt") or 1,
        max_sequence_length=call.get("max_sequence_length", _MAX_SEQUENCE_LENGTH),
    )
    return embeds, pooled
