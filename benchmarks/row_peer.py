"""Row sharding the plain way, to compare `shard` with: a restatement, made as cheap as that way can be.

The middle block runs whole on every rank, so that attention needs no message. Behind it each rank holds a
band of rows: every 3x3 convolution gets one row from each neighbour, and every normalisation sums values and
squares over the ranks, by an all_reduce each. On the meta device, where shapes flow and numbers do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import nn
from torch.nn import functional as F

from vaepp_sdk.vae.plan import split_evenly

__all__ = ["RowPeer"]

_SUM_BYTES = 4
"""A sum is a float32."""


@attrs.define
class RowPeer:
    """One rank of such a decode, and what it sends.

    Attributes:
        rank: this rank.
        ranks: all of them.
        nbytes: bytes sent.
        messages: messages sent; an all_reduce is those of a ring, the fewest bytes it can take.
        rounds: how often this rank waits for others.
    """

    rank: int
    ranks: int
    nbytes: int = 0
    messages: int = 0
    rounds: int = 0

    def decode(self, decoder: nn.Module, latent: torch.Tensor) -> torch.Tensor:
        """This rank's band of the picture; `decoder` is the one of a diffusers AutoencoderKL."""
        start, size = split_evenly(latent.shape[-2], self.ranks)[self.rank]
        middle: Any = decoder.mid_block
        whole = middle.forward
        replaced = {middle: lambda *given: whole(*given).narrow(-2, start, size).contiguous()}
        for part in (decoder.up_blocks, decoder.conv_norm_out, decoder.conv_out):
            for layer in part.modules():  # type: ignore[union-attr]  # modules, all of them
                if isinstance(layer, nn.GroupNorm):
                    replaced[layer] = self._normalising(layer)
                elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                    replaced[layer] = self._convolving(layer)
        try:
            for layer, forward in replaced.items():
                layer.forward = forward
            result: torch.Tensor = decoder(latent)
        finally:
            for layer in replaced:
                vars(layer).pop("forward", None)
        return result

    def _convolving(self, layer: nn.Conv2d) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(values: torch.Tensor) -> torch.Tensor:
            row = values.narrow(-2, 0, 1)
            neighbours = (self.rank > 0) + (self.rank < self.ranks - 1)
            self._count(neighbours * row.numel() * row.element_size(), neighbours)
            # A neighbour's row, or the picture's edge: either way one more row on each side.
            joined = torch.cat([torch.empty_like(row), values, torch.empty_like(row)], dim=-2)
            return F.conv2d(joined, layer.weight, layer.bias, padding=(0, 1))

        return forward

    def _normalising(self, layer: nn.GroupNorm) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(values: torch.Tensor) -> torch.Tensor:
            sums = values.shape[0] * layer.num_groups * _SUM_BYTES
            for _ in ("values", "squares"):
                steps = 2 * (self.ranks - 1)
                self._count(steps * sums // self.ranks, steps)
            return F.group_norm(values, layer.num_groups, layer.weight, layer.bias, layer.eps)

        return forward

    def _count(self, nbytes: int, messages: int) -> None:
        self.nbytes += nbytes
        self.messages += messages
        self.rounds += 1
