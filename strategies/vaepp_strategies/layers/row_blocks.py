"""Layers over a band in blocks of rows: what they need beside their input and output is a block's worth."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from vaepp_sdk.vae.plan import split_evenly
from vaepp_strategies.layers.norm import apply_statistics, merge_moments, moments
from vaepp_strategies.layers.reach import Reach, Window
from vaepp_strategies.layers.rows import RowMap, Rows

__all__ = ["activated", "block_moments", "convolve_beyond", "convolve_blocks", "convolve_in_place"]

Finish = Callable[[torch.Tensor, int, int], torch.Tensor]
"""Given a block of the output and its first and last row: the block to store."""


def block_moments(values: torch.Tensor, groups: int, axis: int, blocks: int) -> torch.Tensor:
    """As `norm.moments`, with float64 copies of one block only; equal up to float64's rounding."""
    batch = values.shape[0]
    pieces = [values.narrow(axis, first, size) for first, size in split_evenly(values.shape[axis], blocks)]
    counts = [piece.numel() // (batch * groups) for piece in pieces]
    mean, variance = merge_moments(counts, [moments(piece, groups) for piece in pieces])
    return torch.stack([mean, variance * sum(counts)])


def activated(
    norm: nn.GroupNorm, activation: nn.Module, mean: torch.Tensor, variance: torch.Tensor
) -> RowMap:
    """Normalisation with known statistics and the activation behind it, row by row.

    Args:
        norm: the layer.
        activation: works position by position.
        mean: `(batch, groups)`, float64.
        variance: likewise.
    """

    def layer(rows: torch.Tensor) -> torch.Tensor:
        normed = apply_statistics(norm, rows, mean, variance)
        if type(activation) is nn.SiLU:
            return F.silu(normed, inplace=True)  # nobody else holds it
        result: torch.Tensor = activation(normed)
        return result

    return layer


def convolve_blocks(rows: Rows, convolve: RowMap, window: Window, length: int, blocks: int) -> torch.Tensor:
    """Convolve a band.

    Args:
        rows: the convolution's input.
        convolve: convolves rows without padding along their axis.
        window: the convolution along that axis.
        length: rows of the output.
        blocks: how many blocks it is made in.

    Returns:
        The band's output.
    """
    out: torch.Tensor | None = None
    for first, size in split_evenly(length, blocks):
        block = convolve(_read(rows, window, first, first + size))
        if out is None:
            shape = list(block.shape)
            shape[rows.axis] = length
            out = block.new_empty(shape)
        out.narrow(rows.axis, first, size).copy_(block)
        del block
    assert out is not None, "a band has rows"
    return out


def convolve_beyond(
    rows: Rows, convolve: RowMap, window: Window, length: int, give: Reach
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The output's rows of `give` above and below a band; None where the picture ends, or none are asked."""
    above = below = None
    if give.above and rows.above is not None:
        above = convolve(_read(rows, window, -give.above, 0))
    if give.below and rows.below is not None:
        below = convolve(_read(rows, window, length, length + give.below))
    return above, below


def convolve_in_place(rows: Rows, convolve: RowMap, window: Window, blocks: int, finish: Finish) -> None:
    """Convolve a band, with as many channels out as in and stride 1, and write the output over it.

    Args:
        rows: the convolution's input.
        convolve: convolves rows without padding along their axis.
        window: the convolution along that axis.
        blocks: how many blocks it is made in.
        finish: what is done to each block of the output before it is stored.
    """
    for first, size in split_evenly(rows.band.shape[rows.axis], blocks):
        block = convolve(_read(rows, window, first, first + size))
        rows.keep(first + size, window.lead)
        rows.band.narrow(rows.axis, first, size).copy_(finish(block, first, size))
        del block


def _read(rows: Rows, window: Window, first: int, last: int) -> torch.Tensor:
    """The input's rows that the output's rows from `first` to `last` are made of."""
    start = first * window.stride - window.lead
    return rows.read(start, start + (last - 1 - first) * window.stride + window.kernel)
