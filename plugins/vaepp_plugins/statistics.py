"""What pipelines of the Wan VAEs undo before they decode."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["with_statistics"]


def with_statistics(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents `(batch, channels, frames, height, width)` as the VAE makes them, in its dtype."""
    typed = latents.to(vae.dtype)
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    # The pipelines divide by the reciprocal, which rounds otherwise than a product.
    return typed / (1.0 / deviation.to(typed)) + mean.to(typed)
