"""Residual blocks of a clip that move axes, and scale channels by a timestep, between their layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vaepp_strategies.layers.bands import Bands, RowMap

__all__ = ["band_modulated_residual"]


def band_modulated_residual(block: Any, bands: Bands) -> Callable[..., torch.Tensor]:
    """A forward for LTX-Video's residual block that takes the rows around a band along.

    The class's own code moves channels to the last axis and back around each normalisation, and scales and
    shifts them where it is given a timestep. Its layers would find no rows around what comes out of that.

    Args:
        block: the block; one that draws noise is refused before.
        bands: this rank's band.
    """

    def forward(
        inputs: torch.Tensor, temb: torch.Tensor | None = None, generator: Any = None
    ) -> torch.Tensor:
        del generator
        first, second = _modulations(block, temb)
        hidden = bands.mapped(inputs, _channels_last(block.norm1))
        hidden = bands.mapped(hidden, first) if first else hidden
        hidden = block.nonlinearity(hidden)
        hidden = block.conv1(hidden)
        hidden = bands.mapped(hidden, _channels_last(block.norm2))
        hidden = bands.mapped(hidden, second) if second else hidden
        hidden = block.nonlinearity(hidden)
        hidden = block.dropout(hidden)
        hidden = block.conv2(hidden)
        shortcut = inputs if block.norm3 is None else _channels_last(block.norm3)(inputs)
        shortcut = shortcut if block.conv_shortcut is None else block.conv_shortcut(shortcut)
        result: torch.Tensor = hidden + shortcut
        return result

    return forward


def _channels_last(norm: nn.Module) -> RowMap:
    """A normalisation over the last axis, for channels that stand behind the batch."""

    def normalise(values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = norm(values.movedim(1, -1)).movedim(-1, 1)
        return result

    return normalise


def _modulations(block: Any, temb: torch.Tensor | None) -> tuple[RowMap | None, RowMap | None]:
    """How channels are scaled and shifted after both normalisations; not at all without a timestep."""
    if block.scale_shift_table is None:
        return None, None
    assert temb is not None, "the class asks for a timestep before its first layer"
    table = temb.unflatten(1, (4, -1)) + block.scale_shift_table[None, ..., None, None, None]
    shift_1, scale_1, shift_2, scale_2 = table.unbind(dim=1)

    def by(scale: torch.Tensor, shift: torch.Tensor) -> RowMap:
        return lambda values: values * (1 + scale) + shift

    return by(scale_1, shift_1), by(scale_2, shift_2)
