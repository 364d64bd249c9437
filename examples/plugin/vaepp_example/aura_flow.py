"""The stages of AuraFlowPipeline: calls into the pipeline's own code, never a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image

from vaepp_sdk.stages import step_callback


class AuraFlowStages:
    """See `vaepp_sdk.stages.PipelineStages`."""

    @torch.no_grad()
    def encode_prompt(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompts, once for each picture; guidance is on for a scale above 1."""
        embeds, mask, negative_embeds, negative_mask = pipe.encode_prompt(
            prompt=call["prompt"],
            negative_prompt=call.get("negative_prompt"),
            do_classifier_free_guidance=call.get("guidance_scale", 3.5) > 1,
            device=pipe._execution_device,
            num_images_per_prompt=call.get("num_images_per_prompt", 1),
            max_sequence_length=call.get("max_sequence_length", 256),
        )
        return {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": embeds,
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": negative_embeds,
            "negative_prompt_attention_mask": negative_mask,
            "num_images_per_prompt": 1,  # the embeddings above are repeated already
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
        """Undo the latents' scaling."""
        del call
        return latents.to(pipe.vae.dtype) / float(pipe.vae.config.scaling_factor)

    def pictures(self, pipe: Any, sample: torch.Tensor) -> list[Image]:
        """What the pipeline makes of a decoded sample."""
        found: list[Image] = pipe.image_processor.postprocess(sample, output_type="pil")
        return found
