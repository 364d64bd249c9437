"""Whether kernels give a part of a picture the bits that they give the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import nn

from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.whole import WholeBands, empty_as

__all__ = ["KernelCheck"]

_LARGEST_ON_CPU = 4 << 30
"""Bytes of a whole input that is checked in host memory, where too large an allocation ends the process."""


@attrs.define(eq=False)
class KernelCheck:
    """Runs layers on a whole picture of which only this rank's part is filled in, and compares that part.

    Kernels are chosen by shape, so one layer of each class and shape speaks for the others, and so do its
    zeros for the rows that this rank does not hold. Costs one whole layer for each, once.

    Attributes:
        active: whether this rank checks.
        failed: layers whose part came out with other bits.
        unchecked: layers that were too large to be checked.
    """

    active: bool = False
    failed: list[str] = attrs.field(factory=list)
    unchecked: list[str] = attrs.field(factory=list)
    _seen: set[tuple[Any, ...]] = attrs.field(factory=set)

    def rows(
        self,
        name: str,
        layer: nn.Module,
        run: Callable[[torch.Tensor], Any],
        wide: torch.Tensor,
        result: Any,
        bands: WholeBands,
        scale: Scale,
    ) -> None:
        """Check a layer that ran on a band and the rows below it.

        Args:
            name: the layer's name.
            layer: the layer.
            run: runs its own forward, and cuts the band's rows out of what it returns.
            wide: the band, the first one, where whole and band begin at the same row; and the rows below it.
            result: what came out for the band: a tensor, or several of which the first one counts.
            bands: this rank's band.
            scale: the resolution of `wide`.
        """
        axis = bands.axis
        whole_rows = sum(bands.parts.core_length(rank, scale) for rank in range(bands.ranks))
        if not self._due(layer, wide, whole_rows):
            return

        def compare() -> bool:
            whole = _zeros(wide, wide.dim() + axis, whole_rows)
            whole.narrow(axis, 0, wide.shape[axis]).copy_(wide)
            return torch.equal(_tensor(run(whole)), _tensor(result))

        nbytes = wide.numel() // wide.shape[axis] * whole_rows * wide.element_size()
        self._note(name, compare, nbytes, wide.device)

    def channels(
        self, name: str, norm: nn.GroupNorm, mine: torch.Tensor, normed: torch.Tensor, first: int
    ) -> None:
        """Check a normalisation of some groups.

        Args:
            name: the layer's name.
            norm: the layer.
            mine: its input, this rank's channels of it.
            normed: what came out.
            first: the first of the channels.
        """
        if not self._due(norm, mine, norm.num_channels):
            return
        size = mine.shape[1]

        def compare() -> bool:
            whole = _zeros(mine, 1, norm.num_channels)
            whole.narrow(1, first, size).copy_(mine)
            return torch.equal(nn.GroupNorm.forward(norm, whole).narrow(1, first, size), normed)

        nbytes = mine.numel() // size * norm.num_channels * mine.element_size()
        self._note(name, compare, nbytes, mine.device)

    def _due(self, layer: nn.Module, part: torch.Tensor, whole: int) -> bool:
        """Whether this class and shape was not checked before."""
        if not self.active:
            return False
        key = (repr(layer), tuple(part.shape), whole, part.dtype, str(part.device), part.stride())
        if key in self._seen:
            return False
        self._seen.add(key)
        return True

    def _note(self, name: str, compare: Callable[[], bool], nbytes: int, device: torch.device) -> None:
        if device.type == "cpu" and nbytes > _LARGEST_ON_CPU:
            self.unchecked.append(name)
            return
        try:
            if not compare():
                self.failed.append(name)
        except torch.OutOfMemoryError:
            self.unchecked.append(name)


def _tensor(result: Any) -> torch.Tensor:
    found: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return found


def _zeros(part: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    """A whole of zeros, in the dtype and layout of a part."""
    shape = list(part.shape)
    shape[axis] = length
    return empty_as(part, shape).zero_()
