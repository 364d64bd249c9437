"""Data parallelism: a request's pictures are dealt over replicas, their latents gathered on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from vaepp_sdk.dit.row import Row, even_parts
from vaepp_sdk.spec.calls import COUNTS, each_prompt

__all__ = ["Replicas"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEADER = 10
"""Integers that tell an idle replica the dtype, the number of dimensions and the shape of latents."""


@attrs.frozen(eq=False)
class Replicas:
    """The replicas, seen from one rank.

    Attributes:
        row: the ranks that hold the same place in each replica.
        device: where this rank computes.
    """

    row: Row
    device: torch.device

    def own(self, images: int) -> range:
        """The numbers of this replica's pictures; none where there are fewer pictures than replicas."""
        return self.row.own(images)

    def call(self, call: Mapping[str, Any], own: range) -> dict[str, Any]:
        """The arguments that make this replica's pictures only.

        Args:
            call: the pipeline's keyword arguments for all pictures.
            own: the pictures' numbers.
        """
        if self.row.size == 1:
            return dict(call)
        prompts = [call["prompt"]] if isinstance(call["prompt"], str) else list(call["prompt"])
        each = each_prompt(call)
        # Whole prompts are encoded once each, as on one replica; of others every picture gets its own prompt.
        whole = own.start % each == 0 and len(own) % each == 0
        chosen = [number // each for number in (own[::each] if whole else own)]
        dealt = {**call, "prompt": [prompts[index] for index in chosen]}
        for key in set(call) - {"prompt"}:
            # Second prompts, as for a second text encoder, and negative ones.
            if key.startswith(("prompt", "negative_prompt")) and isinstance(call[key], list):
                dealt[key] = [call[key][index] for index in chosen]
        if not whole:
            dealt |= {key: 1 for key in COUNTS if key in call}
        return dealt

    def gather(self, latents: torch.Tensor | None, images: int) -> torch.Tensor:
        """The latents of all pictures, in the order of their numbers; every rank must call it.

        Args:
            latents: this replica's, the pictures along the first dimension; None where it has none.
            images: how many pictures all replicas have.

        Raises:
            PeerError: a rank is gone, or did not answer in time.
        """
        counts = even_parts(images, self.row.size)
        if 0 in counts:
            latents = self._shaped(latents)
        assert latents is not None
        return self.row.gather(latents, 0, counts, "latents of all replicas")

    def _shaped(self, latents: torch.Tensor | None) -> torch.Tensor:
        """Empty latents of the others' kind where this replica has none; the first one always has some."""
        header = torch.zeros(_HEADER, dtype=torch.int64, device=self.device)
        if latents is not None:
            told = [_DTYPES.index(latents.dtype), latents.ndim, *latents.shape]
            header[: len(told)] = torch.tensor(told, device=self.device)
        self.row.broadcast(header, 0, "shape of the latents")
        kind, dims, _, *shape = header.tolist()
        if latents is not None:
            return latents
        return torch.zeros((0, *shape[: dims - 1]), dtype=_DTYPES[kind], device=self.device)
