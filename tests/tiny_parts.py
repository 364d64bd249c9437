"""What small random checkpoints share."""

from __future__ import annotations

from typing import Any

import torch


def small_video_vae(kind: Any, channels: int, frames: int) -> Any:
    """A VAE of Wan's shape, of so many latent channels, that makes colours of so many frames of noise."""
    vae = kind(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.3, 0.2, 0.1, -0.5],
        latents_std=[1.4, 0.8, 1.1, 0.9],
    ).eval()
    spread_colours(vae, torch.randn(1, channels, frames, 16, 16))
    return vae


@torch.no_grad()
def spread_colours(vae: Any, latents: torch.Tensor) -> None:
    """Scale the last convolution of a video VAE so that pictures are not of one grey."""
    seen: list[torch.Tensor] = []
    last = vae.decoder.conv_out
    hook = last.register_forward_hook(lambda *called: seen.append(called[-1]))
    vae.decode(latents)
    hook.remove()
    sample = torch.cat(seen, 2)  # before the decode clamps it
    mean, spread = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
    gain = 0.3 / spread
    last.weight.mul_(gain.view(-1, 1, 1, 1, 1))
    last.bias.sub_(mean).mul_(gain)
