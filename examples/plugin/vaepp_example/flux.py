"""The stages of FluxPipeline: calls into the pipeline's own code, never a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image

from vaepp_sdk.stages import step_callback


class FluxStages:
    """See `vaepp_sdk.stages.PipelineStages`."""

    @torch.no_grad()
    def encode_prompt(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompts, once for each picture."""
        embeds, pooled, _ = pipe.encode_prompt(
            prompt=call["prompt"],
            prompt_2=call.get("prompt_2"),
            device=pipe._execution_device,
            num_images_per_prompt=call.get("num_images_per_prompt", 1),
            max_sequence_length=call.get("max_sequence_length", 512),
        )
        return {
            "prompt": None,
            "prompt_2": None,
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
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
        """Unpack the latents and undo their scaling."""
        default = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = call.get("height") or default, call.get("width") or default
        unpacked = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        config = pipe.vae.config
        scaled: torch.Tensor = (unpacked / config.scaling_factor) + config.shift_factor
        return scaled.to(pipe.vae.dtype)

    def pictures(self, pipe: Any, sample: torch.Tensor) -> list[Image]:
        """What the pipeline makes of a decoded sample."""
        found: list[Image] = pipe.image_processor.postprocess(sample, output_type="pil")
        return found
