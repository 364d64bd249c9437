"""The protocol between strategies and one VAE class."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from vaepp_sdk.vae.facts import VaeFacts

__all__ = ["VaeAdapter"]


@runtime_checkable
class VaeAdapter(Protocol):
    """What strategies need of a VAE; one small class per VAE class, named by its `VaeEntry`.

    Attributes:
        vae: the VAE itself.
    """

    vae: Any

    def facts(self) -> VaeFacts:
        """The VAE's facts as they stand now: tile sizes and switches may change between calls."""
        ...

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        """Decode one window exactly as the class decodes one tile or one whole latent.

        Args:
            latent: `(batch, latent channels, [frames,] rows, columns)`.

        Returns:
            `(batch, picture channels, [frames,] rows * ratio, columns * ratio)`.
        """
        ...

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        """Encode one window into moments exactly as the class encodes one tile or one whole picture."""
        ...

    def finish_decode(self, sample: torch.Tensor) -> torch.Tensor:
        """What the class does to a whole picture after joining it, such as clamping."""
        ...

    def wrap_decode(self, sample: Any, return_dict: bool) -> Any:
        """The class's return value of `decode`; `sample` is a picture, or pieces of one where sharded."""
        ...

    def wrap_encode(self, moments: Any, return_dict: bool) -> Any:
        """The class's return value of `encode`."""
        ...
