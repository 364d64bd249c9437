"""The protocol between strategies and one VAE class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

import torch

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.facts import Direction, VaeFacts

__all__ = ["VaeAdapter"]


@runtime_checkable
class VaeAdapter(Protocol):
    """What strategies need of a VAE; one small class per VAE class, named by its `VaeEntry`.

    Adapters subclass this protocol, for the methods that have a body here are right for most classes.

    Attributes:
        vae: the VAE itself.
    """

    vae: Any

    def facts(self) -> VaeFacts:
        """The VAE's facts as they stand now: tile sizes and switches may change between calls."""
        ...

    def with_arguments(self, direction: Direction, arguments: Mapping[str, Any]) -> Self:
        """This adapter for one call with further arguments, such as a timestep; called for every call.

        Args:
            direction: the method that is called.
            arguments: what the caller gave besides the tensor, `return_dict` and `generator`, by the names of
                the class's own signature; the same on every rank.

        Raises:
            UnsupportedError: an argument is not served, or a needed one is missing.
        """
        if arguments:
            names = ", ".join(sorted(arguments))
            raise UnsupportedError(
                f"{direction}() of a parallel {type(self.vae).__name__} does not take {names}"
            )
        return self

    def on_tiles(self) -> Self:
        """This adapter as the class treats the tiles of its own tiling, where that differs from a whole."""
        return self

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
        """What the class does to a picture after joining it, such as clamping; may be given parts of it."""
        return sample

    def wrap_decode(self, sample: Any, return_dict: bool) -> Any:
        """The class's return value of `decode`; `sample` is a picture, or pieces of one where sharded."""
        ...

    def wrap_encode(self, moments: Any, return_dict: bool) -> Any:
        """The class's return value of `encode`."""
        ...
