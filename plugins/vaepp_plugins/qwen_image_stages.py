"""The Qwen-Image pipeline, stage by stage: every stage is the pipeline's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image

from vaepp_plugins.picture_stages import PictureStages, for_each_prompt, prompts_of
from vaepp_plugins.qwen_image import CALLS
from vaepp_plugins.statistics import with_statistics

__all__ = ["QwenImageStages"]

_MAX_SEQUENCE_LENGTH = 512
"""The default of the pipeline's `__call__`, for what a call leaves out."""


class QwenImageStages(PictureStages):
    """See `vaepp_sdk.stages.PipelineStages`."""

    @torch.no_grad()
    def encode_prompt(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompts, once for each picture; guidance needs a scale above 1 and a negative prompt."""
        prompts = prompts_of(call)
        embeds, mask = _encoded(pipe, prompts, call)
        encoded = {
            "prompt": None,
            "prompt_embeds": embeds,
            "prompt_embeds_mask": mask,
            "num_images_per_prompt": 1,
        }
        if not CALLS.paired(call):
            return encoded
        negatives = for_each_prompt(call["negative_prompt"], prompts)
        embeds, mask = _encoded(pipe, negatives, call)
        return encoded | {
            "negative_prompt": None,
            "negative_prompt_embeds": embeds,
            "negative_prompt_embeds_mask": mask,
        }

    def vae_input(self, pipe: Any, latents: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """What the pipeline gives to `vae.decode`."""
        default = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = call.get("height") or default, call.get("width") or default
        unpacked = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        return with_statistics(pipe.vae, unpacked)

    def pictures(self, pipe: Any, sample: torch.Tensor) -> list[Image]:
        """What the pipeline makes of a decoded sample: the VAE's pictures are clips of one frame."""
        return super().pictures(pipe, sample[:, :, 0])

    def from_pixels(self, pipe: Any, pixels: torch.Tensor) -> list[Image]:
        """The pictures of clips of one frame."""
        return super().from_pixels(pipe, pixels[:, :, 0])


def _encoded(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and their mask, for each picture."""
    embeds, mask = pipe.encode_prompt(
        prompt=list(prompts),
        device=pipe._execution_device,
        max_sequence_length=call.get("max_sequence_length", _MAX_SEQUENCE_LENGTH),
    )
    if mask is None:  # left out where it hides nothing; given all the same, the pipeline does not complain
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    # The pipeline repeats masks in another order than embeddings, so that prompts of unlike length would get
    # each other's.
    each = call.get("num_images_per_prompt") or 1
    return embeds.repeat_interleave(each, 0), mask.repeat_interleave(each, 0)
