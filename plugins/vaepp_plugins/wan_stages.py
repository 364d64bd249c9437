"""The Wan pipeline, stage by stage: every stage is the pipeline's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL.Image import Image

from vaepp_plugins.picture_stages import LatentStages, as_image, eight_bit
from vaepp_plugins.statistics import with_statistics
from vaepp_plugins.wan import CALLS

__all__ = ["WanStages"]

_MAX_SEQUENCE_LENGTH = 512
"""The default of the pipeline's `__call__`, for what a call leaves out."""


class WanStages(LatentStages):
    """See `vaepp_sdk.stages.PixelStages`."""

    @torch.no_grad()
    def encode_prompt(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompts, once for each clip; guidance is on for a scale above 1."""
        guided = CALLS.paired(call)
        positive, negative = pipe.encode_prompt(
            prompt=call["prompt"],
            negative_prompt=call.get("negative_prompt"),
            do_classifier_free_guidance=guided,
            num_videos_per_prompt=call.get("num_videos_per_prompt") or 1,
            max_sequence_length=call.get("max_sequence_length", _MAX_SEQUENCE_LENGTH),
            device=pipe._execution_device,
        )
        encoded = {"prompt": None, "prompt_embeds": positive, "num_videos_per_prompt": 1}
        return encoded | ({"negative_prompt": None, "negative_prompt_embeds": negative} if guided else {})

    def vae_input(self, pipe: Any, latents: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """What the pipeline gives to `vae.decode`."""
        del call
        return with_statistics(pipe.vae, latents)

    def pictures(self, pipe: Any, sample: torch.Tensor) -> list[list[Image]]:
        """The frames of each clip."""
        found: list[list[Image]] = pipe.video_processor.postprocess_video(sample, output_type="pil")
        return found

    def to_pixels(self, pipe: Any, sample: torch.Tensor) -> torch.Tensor:
        """The frames' 8-bit values."""
        return eight_bit(pipe.video_processor, sample)

    def from_pixels(self, pipe: Any, pixels: torch.Tensor) -> list[list[Image]]:
        """The frames of each clip."""
        del pipe
        return [[as_image(frame) for frame in clip.transpose(0, 1)] for clip in pixels.cpu()]
