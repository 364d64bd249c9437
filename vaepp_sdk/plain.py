"""The VAE as it is, on one rank, and lighter where that rank's memory is not enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch

from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.descent import StepDown
from vaepp_sdk.vae.memory import is_out_of_memory, release
from vaepp_sdk.vae.wrapper import ParallelVAE

__all__ = ["PlainVAE"]


@attrs.define(eq=False)
class PlainVAE:
    """Decodes with a VAE that nothing is spread over.

    Attributes:
        vae: the VAE.
        group: the ranks that decode, each all of it; where one does, that one alone.
        spare: makes the VAE that steps down, on first use; None where memory that is not enough is an error.
    """

    vae: Any
    group: VaeGroup
    spare: Callable[[], ParallelVAE] | None = None
    _lighter: ParallelVAE | None = attrs.field(default=None, init=False)
    _too_large: dict[tuple[int, ...], tuple[int, ...]] = attrs.field(factory=dict, init=False)
    _stepped: bool = attrs.field(default=False, init=False)

    @property
    def lighter(self) -> ParallelVAE | None:
        """What the last call stepped down to, if it did."""
        return self._lighter if self._stepped else None

    @property
    def steps_down(self) -> tuple[StepDown, ...]:
        """What the last call did because memory was not enough."""
        return self.lighter.steps_down if self.lighter else ()

    def decode(self, latents: torch.Tensor) -> Any:
        """Decode, as the VAE's own `decode(latents, return_dict=False)[0]` does.

        Raises:
            RankError: memory is not enough, whatever is tried.
        """
        self._stepped = False
        if self.spare is None:
            return self.vae.decode(latents, return_dict=False)[0]
        shape = tuple(latents.shape)
        if shape not in self._too_large:
            sample = self._try(latents)
            flags = self.group.share(int(sample is None), "whether memory was enough")
            failed = tuple(rank for rank, flag in enumerate(flags) if flag > 0)
            if not failed:
                return sample
            del sample
            self._too_large[shape] = failed
        self._stepped = True
        if self._lighter is None:
            self._lighter = self.spare()
        self._lighter.descent.failed_before = self._too_large[shape]
        return self._lighter.decode(latents, return_dict=False)[0]

    def _try(self, latents: torch.Tensor) -> Any:
        """The sample, or None where memory was not enough for it."""
        try:
            return self.vae.decode(latents, return_dict=False)[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release(latents.device)  # outside the `except` block, whose traceback holds what is to be freed
        return None
