"""The Z-Image pipeline, stage by stage: every stage is the pipeline's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image

from vaepp_sdk.stages import step_callback

__all__ = ["ZImageStages"]

_GUIDANCE_SCALE = 5.0
_MAX_SEQUENCE_LENGTH = 512
"""The defaults of the pipeline's `__call__`, for what a call leaves out."""


class ZImageStages:
    """See `vaepp_sdk.stages.PipelineStages`."""

    @torch.no_grad()
    def encode_prompt(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompts; guidance is on for a scale above 0."""
        # The pipeline writes its chat template into the list it is given, so it gets a copy.
        prompts = [call["prompt"]] if isinstance(call["prompt"], str) else list(call["prompt"])
        negative = call.get("negative_prompt")
        if negative is not None:
            negative = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        positive_embeds, negative_embeds = pipe.encode_prompt(
            prompt=prompts,
            negative_prompt=negative,
            do_classifier_free_guidance=call.get("guidance_scale", _GUIDANCE_SCALE) > 0,
            device=pipe._execution_device,
            max_sequence_length=call.get("max_sequence_length", _MAX_SEQUENCE_LENGTH),
        )
        return {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": positive_embeds,
            "negative_prompt_embeds": negative_embeds,
        }

    def denoise(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        generators: Sequence[torch.Generator],
        on_step: Callable[[int, int], None],
    ) -> torch.Tensor:
        """Run the pipeline up to its latents."""
        latents: torch.Tensor = pipe(
            **call,
            generator=list(generators),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=step_callback(on_step),
        )[0]
        return latents

    def vae_input(self, pipe: Any, latents: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """What the pipeline gives to `vae.decode`."""
        del call
        config = pipe.vae.config
        typed = latents.to(pipe.vae.dtype)
        return (typed / float(config.scaling_factor)) + float(config.shift_factor)

    def pictures(self, pipe: Any, sample: torch.Tensor) -> list[Image]:
        """What the pipeline makes of a decoded sample."""
        found: list[Image] = pipe.image_processor.postprocess(sample, output_type="pil")
        return found
