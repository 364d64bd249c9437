"""What small random checkpoints share."""

from __future__ import annotations

from typing import Any

import torch


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
