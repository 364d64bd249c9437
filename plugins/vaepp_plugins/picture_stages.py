"""What the stages of most pipelines have in common: calls into the pipeline's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image

from vaepp_sdk.stages import step_callback

__all__ = ["LatentStages", "PictureStages", "for_each_prompt"]


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
    """Two of `vaepp_sdk.stages.PipelineStages`; encoding prompts and scaling latents is each pipeline's."""

    def pictures(self, pipe: Any, sample: torch.Tensor) -> list[Image]:
        """What the pipeline makes of a decoded sample."""
        found: list[Image] = pipe.image_processor.postprocess(sample, output_type="pil")
        return found


def for_each_prompt(text: str | Sequence[str], prompts: Sequence[str]) -> list[str]:
    """One text for each prompt: a single one counts for all."""
    return [text] * len(prompts) if isinstance(text, str) else list(text)
