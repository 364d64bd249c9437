"""What tests of the drop-in autoencoder share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from vae_models import tiny_kl

__all__ = ["error_of", "latents", "said", "tiled"]


def latents(dtype: torch.dtype = torch.float32, batch: int = 1) -> torch.Tensor:
    """Latents for `tiled`."""
    return torch.randn(batch, 16, 13, 11, generator=torch.Generator().manual_seed(5)).to(dtype)


def tiled(**config: Any) -> Any:
    """A small VAE with tiling on."""
    vae = tiny_kl(**config)
    vae.enable_tiling()
    return vae


def error_of(action: Callable[[], Any]) -> tuple[str, str]:
    """The class and message of what an action raises."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def said(action: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What an action returns, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(warning.message) for warning in caught]
