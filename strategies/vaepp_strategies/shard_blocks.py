"""Runs the layers of a band in row blocks: at most two whole activations live at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from vaepp_strategies.layers.bands import Bands, Halo
from vaepp_strategies.layers.conv import convolution_window, convolve_rows
from vaepp_strategies.layers.norm import merge_moments
from vaepp_strategies.layers.reach import NO_ROWS, Window
from vaepp_strategies.layers.row_blocks import (
    Filled,
    Recomputed,
    activated,
    block_moments,
    convolve_beyond,
    convolve_blocks,
    convolve_in_place,
    convolve_onto,
)
from vaepp_strategies.layers.rows import RowMap, Rows, read_rows, row_count, unchanged
from vaepp_strategies.shard_limit import BlockPlan
from vaepp_strategies.shard_plan import ShardPlan
from vaepp_strategies.shard_stages import Stage
from vaepp_strategies.shard_steps import ShardStep

__all__ = ["sequence_forward"]

Held = list[torch.Tensor]
"""One tensor, handed on: who takes it out is the only one that holds it, and may write to it or drop it."""


def sequence_forward(
    vae: nn.Module, bands: Bands, plan: ShardPlan, blocks: BlockPlan
) -> Callable[..., torch.Tensor]:
    """What the module that calls a straight sequence of layers runs on this rank's band.

    Args:
        vae: the VAE; the layers that are not run block by block must be replaced, as without row blocks.
        bands: this rank's band.
        plan: what layers exchange and give.
        blocks: the sequence, and how many blocks each stage is run in.
    """
    steps = {step.name: step for step in plan.steps}
    runners = [
        _Runner(vae, bands, plan, steps, stage, count)
        for stage, count in zip(blocks.sequence.stages, blocks.blocks, strict=True)
    ]

    def forward(sample: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        held = [sample]
        for runner in runners:
            held.append(runner.run(held))
        return held.pop()

    return forward


@attrs.frozen(eq=False)
class _Runner:
    """One stage, on this rank's band."""

    vae: nn.Module
    bands: Bands
    plan: ShardPlan
    steps: dict[str, ShardStep]
    stage: Stage
    blocks: int

    def run(self, held: Held) -> torch.Tensor:
        """Take the stage's input out of `held`, and return its output."""
        if self.stage.kind == "attention":
            result: torch.Tensor = self._layer(0)(held.pop())
            return result
        if self.stage.recompute == "hidden":
            return self._residual_over(held.pop())
        if self.stage.kind == "residual":
            return self._residual(held.pop())
        if self.stage.kind == "activated convolution":
            return self._activated(held.pop(), *(self._layer(place) for place in range(3)))
        return self._resampled(held.pop())

    def _layer(self, place: int) -> Any:
        return self.vae.get_submodule(self.stage.names[place])

    def _resampled(self, values: torch.Tensor) -> torch.Tensor:
        """A convolution of the input as it is, or as it is interpolated or padded first."""
        rows, convolve, window, _ = self.resampling(values)
        return self._convolved(rows, convolve, window, self.stage.names[-1])

    def resampling(self, values: torch.Tensor) -> tuple[Rows, RowMap, Window, int]:
        """What such a convolution reads, itself, its window, and how many rows it gives."""
        name = self.stage.names[0]
        doubles, pads = self.stage.kind == "upsample", self.stage.kind == "downsample"
        convolution = self._layer(1 if doubles or pads else 0)
        window = self.stage.window
        assert window is not None, "a stage that is no attention has a convolution"
        step = self.steps.get(name)
        halo = self.bands.carried(values)
        if halo is None:
            halo = self.bands.fetch(values, step.reach, name) if step else Halo(None, None)
        axis = self.bands.axis
        across = (0, 0, 0, 1) if axis == -1 else (0, 1, 0, 0)

        def convolve(strip: torch.Tensor) -> torch.Tensor:
            return convolve_rows(convolution, F.pad(strip, across) if pads else strip, axis)

        layer, factor = (_double, 2) if doubles else (unchanged, 1)
        rows = Rows(band=values, axis=axis, halo=halo, layer=layer, factor=factor)
        return rows, convolve, window, self._length()

    def _length(self) -> int:
        return self.bands.parts.core_length(self.bands.group.rank, self.stage.out_scale)

    def _activated(
        self, values: torch.Tensor, norm: nn.GroupNorm, activation: nn.Module, convolution: nn.Conv2d
    ) -> torch.Tensor:
        """Normalisation, activation and a convolution that writes elsewhere."""
        rows = self._normalised(values, norm, activation, self.stage.names[0])
        window = convolution_window(convolution, self.bands.axis)
        return self._convolved(rows, self._rows_of(convolution), window, self.stage.names[-1])

    def _convolved(self, rows: Rows, convolve: RowMap, window: Window, name: str) -> torch.Tensor:
        """All of a convolution's output, and the rows around it that a later layer reads."""
        length = self._length()
        out = convolve_blocks(rows, convolve, window, length, self.blocks)
        give = dict(self.plan.given).get(name, NO_ROWS)
        if give:
            self.bands.carry(out, Halo(*convolve_beyond(rows, convolve, window, length, give)))
        return out

    def _residual(self, values: torch.Tensor) -> torch.Tensor:
        """A residual block; its second convolution writes over what the first one gave."""
        block, axis, name = self._layer(0), self.bands.axis, self.stage.names[0]
        source = values if self.stage.source is None else self._upsampled(values, self.stage.source)
        norm1 = self._normalised(source, block.norm1, block.nonlinearity, f"{name}.norm1")
        length = row_count(source, axis)
        kept = Filled(axis, length)

        def shortcut(start: int, size: int) -> torch.Tensor:
            own = read_rows(source, axis, start, start + size)
            return own if block.conv_shortcut is None else convolve_rows(block.conv_shortcut, own, axis)

        def keep(start: int, size: int) -> None:
            kept.put(shortcut(start, size), start)

        def add(changed: torch.Tensor, start: int, size: int) -> torch.Tensor:
            own = kept.whole.narrow(axis, start, size) if keeps else shortcut(start, size)
            return _scaled(changed.add_(own), block)

        keeps = self.stage.recompute == "kept"
        window, beside = convolution_window(block.conv1, axis), keep if keeps else None
        hidden = convolve_blocks(norm1, self._rows_of(block.conv1), window, length, self.blocks, beside)
        norm2 = self._normalised(hidden, block.norm2, block.nonlinearity, f"{name}.norm2")
        window = convolution_window(block.conv2, axis)
        convolve_in_place(norm2, self._rows_of(block.conv2), window, self.blocks, add)
        return hidden

    def _residual_over(self, values: torch.Tensor) -> torch.Tensor:
        """A residual block that writes its output over its input, and runs its first convolution twice."""
        block, axis, name = self._layer(0), self.bands.axis, self.stage.names[0]
        window = convolution_window(block.conv1, axis)
        norm1 = self._normalised(values, block.norm1, block.nonlinearity, f"{name}.norm1")
        hidden = Recomputed(
            rows=norm1, convolve=self._rows_of(block.conv1), window=window, length=values.shape[axis]
        )
        norm2 = self._normalised(hidden, block.norm2, block.nonlinearity, f"{name}.norm2")

        def add(changed: torch.Tensor, start: int, size: int) -> torch.Tensor:
            return _scaled(changed.add_(values.narrow(axis, start, size)), block)

        # The next block's rows of `hidden` are made of rows that are not written over yet: those before
        # them are held since they were read.
        convolve_onto(values, norm2, self._rows_of(block.conv2), window, self.blocks, add)
        self.bands.forget(values)
        return values

    def _upsampled(self, values: torch.Tensor, source: Stage) -> Recomputed:
        """What an upsampling gives, not stored."""
        upsampling = attrs.evolve(self, stage=source)
        rows, convolve, window, length = upsampling.resampling(values)
        return Recomputed(rows=rows, convolve=convolve, window=window, length=length)

    def _rows_of(self, convolution: nn.Conv2d) -> RowMap:
        """Convolves rows without padding along their axis."""
        return partial(convolve_rows, convolution, axis=self.bands.axis)

    def _normalised(
        self, values: torch.Tensor | Recomputed, norm: nn.GroupNorm, activation: nn.Module, name: str
    ) -> Rows:
        """The rows of the activated input, with the whole picture's statistics; nothing is computed yet."""
        bands, step = self.bands, self.steps[name]
        mine = block_moments(values, norm.num_groups, bands.axis, self.blocks)
        # What is not stored needs only its edges to exchange them.
        stored = values if isinstance(values, torch.Tensor) else values.edges(step.reach)
        everyone, riding = bands.gather_with_rows(mine, stored, step.reach, "normalisation statistics")
        per_position = norm.num_channels // norm.num_groups
        counts = [area * per_position for area in bands.areas(stored, step.scale)]
        halo = self._beyond(values, riding)
        layer = activated(norm, activation, *merge_moments(counts, everyone))
        return Rows(band=values, axis=bands.axis, halo=halo, layer=layer)

    def _beyond(self, values: torch.Tensor | Recomputed, riding: Halo) -> Halo:
        """The neighbours' rows around a normalisation's input: given by an earlier layer, or just arrived."""
        if isinstance(values, torch.Tensor):
            return self.bands.carried(values) or riding
        source = self.stage.source
        give = dict(self.plan.given).get(source.names[-1], NO_ROWS) if source else NO_ROWS
        return Halo(*values.beyond(give)) if give else riding


def _scaled(values: torch.Tensor, block: Any) -> torch.Tensor:
    """A residual's sum, as the block scales it; in place."""
    return values if block.output_scale_factor == 1 else values.div_(block.output_scale_factor)


def _double(rows: torch.Tensor) -> torch.Tensor:
    return F.interpolate(rows, scale_factor=2.0, mode="nearest")
