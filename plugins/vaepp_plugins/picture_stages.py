"""What the stages of most pipelines have in common: calls into the pipeline's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image, fromarray

from vaepp_sdk.stages import step_callback

__all__ = ["LatentStages", "PictureStages", "as_image", "eight_bit", "for_each_prompt", "prompts_of"]


class LatentStages:
    """The stage of `vaepp_sdk.stages.PipelineStages` that is alike for pictures and clips."""

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


class PictureStages(LatentStages):
    """Most of `vaepp_sdk.stages.PixelStages`; encoding prompts and scaling latents is each pipeline's."""

    def pictures(self, pipe: Any, sample: torch.Tensor) -> list[Image]:
        """What the pipeline makes of a decoded sample."""
        found: list[Image] = pipe.image_processor.postprocess(sample, output_type="pil")
        return found

    def to_pixels(self, pipe: Any, sample: torch.Tensor) -> torch.Tensor:
        """The pictures' 8-bit values."""
        return eight_bit(pipe.image_processor, sample)

    def from_pixels(self, pipe: Any, pixels: torch.Tensor) -> list[Image]:
        """The pictures."""
        del pipe
        return [as_image(picture) for picture in pixels.cpu()]


def eight_bit(processor: Any, sample: torch.Tensor) -> torch.Tensor:
    """The values that a processor of diffusers puts into its pictures: its own scaling, then its rounding.

    Args:
        processor: the pipeline's `VaeImageProcessor` or `VideoProcessor`.
        sample: of any shape, floating point.
    """
    scaled: torch.Tensor = processor.postprocess(sample, output_type="pt")
    return (scaled.float() * 255).round().to(torch.uint8)


def as_image(picture: torch.Tensor) -> Image:
    """A picture from its pixels, `(channels, rows, columns)`, uint8, in host memory."""
    pixels = picture.permute(1, 2, 0).numpy()
    return fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def prompts_of(call: Mapping[str, Any]) -> list[str]:
    """A call's prompts, as a list of its own: some pipelines write into the list they are given."""
    return [call["prompt"]] if isinstance(call["prompt"], str) else list(call["prompt"])


def for_each_prompt(text: str | Sequence[str], prompts: Sequence[str]) -> list[str]:
    """One text for each prompt: a single one counts for all."""
    return [text] * len(prompts) if isinstance(text, str) else list(text)
