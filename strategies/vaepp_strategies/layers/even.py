"""Activations whose kernels compute the last few values of a tensor in another way than all before them.

Vector registers take whole multiples of their width; what is left at the end goes one by one, through another
exponential. A band has such an end of its own, and must have the whole tensor's instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.whole import WholeBands, axes_in_memory

__all__ = ["VECTOR_VALUES", "even_activation"]

VECTOR_VALUES = 64
"""Values of two of the widest vector registers, or of four of the narrower ones that sums are made in."""


def even_activation(layer: Any, bands: WholeBands, scale: Scale) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for an activation of single values that ends where the whole tensor ends.

    Args:
        layer: the activation.
        bands: this rank's band.
        scale: the resolution of its input.
    """
    own: Callable[..., torch.Tensor] = type(layer).forward

    def forward(values: torch.Tensor) -> torch.Tensor:
        flat, size = _in_memory_order(values), values.numel()
        padded = flat.new_zeros(-(-size // VECTOR_VALUES) * VECTOR_VALUES)
        padded[:size] = flat
        result = torch.empty_like(values)
        _in_memory_order(result).copy_(own(layer, padded)[:size])
        _write_end(layer, values, result, bands, scale)
        return values.copy_(result) if getattr(layer, "inplace", False) else result

    return forward


def _write_end(
    layer: Any, values: torch.Tensor, result: torch.Tensor, bands: WholeBands, scale: Scale
) -> None:
    """Write the band's part of the whole tensor's last values: as many as end in the same way."""
    axis = values.dim() + bands.axis
    start, length = bands.span(bands.group.rank, scale)
    shape = list(values.shape)
    shape[axis] = sum(bands.parts.core_length(rank, scale) for rank in range(bands.ranks))
    size = math.prod(shape)
    ending = min(size, VECTOR_VALUES + size % VECTOR_VALUES)
    places, place = [torch.empty(0)] * len(shape), torch.arange(size - ending, size, device=values.device)
    for at in reversed(axes_in_memory(values)):
        places[at], place = place % shape[at], place // shape[at]
    mine = (places[axis] >= start) & (places[axis] < start + length)
    places[axis] = places[axis] - start
    here = tuple(index[mine] for index in places)
    end = values.new_zeros(ending)
    end[mine] = values[here]
    result[here] = type(layer).forward(layer, end)[mine]


def _in_memory_order(values: torch.Tensor) -> torch.Tensor:
    """The values of a tensor without gaps, as one row."""
    return values.permute(axes_in_memory(values)).flatten()
