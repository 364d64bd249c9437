"""The FLUX.2 pipelines, stage by stage: every stage is the pipeline's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vaepp_plugins.flux2 import KLEIN_CALLS
from vaepp_plugins.picture_stages import PictureStages, prompts_of

__all__ = ["Flux2KleinStages", "Flux2Stages"]

_ENCODING = ("max_sequence_length", "text_encoder_out_layers")
"""Arguments of a call that say how its prompts are encoded."""


class Flux2Stages(PictureStages):
    """See `vaepp_sdk.stages.PipelineStages`; of FLUX.2 [dev], whose guidance is an input of the model."""

    @torch.no_grad()
    def encode_prompt(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompts, once for each picture; written anew first where the call asks for it."""
        prompts = prompts_of(call)
        temperature = call.get("caption_upsample_temperature")
        if temperature:
            prompts = pipe.upsample_prompt(prompts, temperature=temperature, device=pipe._execution_device)
        return {
            "prompt": None,
            "caption_upsample_temperature": None,
            "prompt_embeds": _encoded(pipe, prompts, call),
            "num_images_per_prompt": 1,  # the embeddings above are repeated already
        }

    def vae_input(self, pipe: Any, latents: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """What the pipeline gives to `vae.decode`."""
        rows, columns = (_tokens(pipe, call.get(side)) for side in ("height", "width"))
        ids = pipe._prepare_latent_ids(latents.new_empty((len(latents), 1, rows, columns)))
        whole = pipe._unpack_latents_with_ids(latents, ids.to(latents.device))
        norm = pipe.vae.bn
        mean, variance = (value.view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
        deviation = torch.sqrt(variance + pipe.vae.config.batch_norm_eps)
        scaled: torch.Tensor = pipe._unpatchify_latents(whole * deviation.to(whole) + mean.to(whole))
        return scaled


class Flux2KleinStages(PictureStages):
    """See `vaepp_sdk.stages.PipelineStages`; of FLUX.2 [klein]."""

    @torch.no_grad()
    def encode_prompt(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the prompts, once for each picture; where guidance is on, it leads away from no prompt."""
        prompts = prompts_of(call)
        encoded = {
            "prompt": None,
            "prompt_embeds": _encoded(pipe, prompts, call),
            "num_images_per_prompt": 1,  # the embeddings above are repeated already
        }
        if not KLEIN_CALLS.pairs(call, pipe.config):
            return encoded
        return encoded | {"negative_prompt_embeds": _encoded(pipe, [""] * len(prompts), call)}

    def vae_input(self, pipe: Any, latents: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """What the pipeline gives to `vae.decode`: its latents, unpacked and scaled already."""
        del pipe, call
        return latents


def _tokens(pipe: Any, side: int | None) -> int:
    """How many tokens lie along one side of a picture, given in pixels."""
    latents = side // pipe.vae_scale_factor if side else pipe.default_sample_size
    return int(latents // 2)


def _encoded(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> torch.Tensor:
    """Embeddings of all tokens, for each picture."""
    embeds: torch.Tensor
    embeds, _ = pipe.encode_prompt(
        prompt=prompts,
        device=pipe._execution_device,
        num_images_per_prompt=call.get("num_images_per_prompt") or 1,
        **{key: call[key] for key in _ENCODING if key in call},
    )
    return embeds
