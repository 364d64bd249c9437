"""How many bytes a band run in row blocks holds at its peak: pure arithmetic, from shapes alone.

An upper bound of the tensors alive at one time: weights, and what kernels allocate inside themselves, are not
counted. It follows `shard_blocks` step by step, so that a limit which the plan grants is kept.
"""

from __future__ import annotations

import attrs

from vaepp_sdk.vae.plan import Work
from vaepp_strategies.layers.norm import chunk_values
from vaepp_strategies.layers.parts import Parts, Scale
from vaepp_strategies.layers.reach import NO_ROWS, Reach, Window
from vaepp_strategies.shard_stages import Stage
from vaepp_strategies.shard_steps import ShardStep

__all__ = ["BandMemory", "stage_blocks"]

_WIDE = 8
"""Bytes of a float64, in which statistics are taken."""


@attrs.frozen(kw_only=True)
class BandMemory:
    """The bytes of one rank's band.

    Attributes:
        parts: all bands.
        rank: this one.
        work: what is asked.
        steps: what layers exchange, by the layer's name.
        given: rows around a layer's output that a later layer reads, by the layer's name.
    """

    parts: Parts
    rank: int
    work: Work
    steps: dict[str, ShardStep]
    given: dict[str, Reach]

    def peak(self, stages: tuple[Stage, ...], blocks: tuple[int, ...]) -> int:
        """The most bytes alive while the stages run, each in its number of blocks."""
        part, unit = self.parts.parts[self.rank], Scale(1, 1)
        # The band itself, and what a layer before the sequence made of it: their callers hold them.
        held = 2 * part.length * self._row(self.work.shape[1], unit)
        return held + max(self.stage(stage, count) for stage, count in zip(stages, blocks, strict=True))

    def stage(self, stage: Stage, blocks: int) -> int:
        """The most bytes alive while one stage runs, its input included."""
        own = self._rows(stage.scale) * self._row(stage.channels, stage.scale)
        if stage.kind == "attention":
            return own + self._attention(stage, own)
        assert stage.window is not None, "a stage that is no attention has a convolution"
        out = self._rows(stage.out_scale) * self._row(stage.out_channels, stage.out_scale)
        halo = self._halo(stage.names[0]) + self._given(stage)
        if not stage.groups:
            return own + halo + out + self._convolution(stage, stage.channels, blocks)
        norms = [name for name in stage.names if name in self.steps and self.steps[name].groups]
        edges = halo + sum(self._halo(name) for name in norms)
        statistics = max(
            self._statistics(stage, width, blocks) for width in (stage.channels, stage.out_channels)
        )
        first = self._convolution(stage, stage.channels, blocks)
        if stage.recompute != "nothing":
            return edges + self._recomputed(stage, blocks, own, out, statistics)
        if stage.kind != "residual":
            return own + edges + max(statistics, out + first)
        second = self._convolution(stage, stage.out_channels, blocks)
        return own + edges + out + max(statistics, first, second)

    def _recomputed(self, stage: Stage, blocks: int, own: int, out: int, statistics: int) -> int:
        """A residual that computes again what it does not store.

        Args:
            stage: the residual.
            blocks: how many blocks it is run in.
            own: the bytes of its input, were it stored.
            out: those of its output.
            statistics: those of taking a block's statistics.
        """
        source = stage.source
        if source is None:
            stored, wide = own, stage.out_channels
        else:
            stored = self._rows(source.scale) * self._row(source.channels, source.scale)
            stored += self._halo(source.names[0]) + self._given(source)
            stored += 2 * out if stage.recompute == "kept" else out
            wide = max(source.channels, source.out_channels)
        window = stage.window or Window(1, 1, 0, 0)
        rows = -(-self._rows(stage.out_scale) // blocks)
        block = rows * self._row(stage.out_channels, stage.out_scale)
        # Rows around the block, read by the layers on both sides, and those held from the last read.
        strip = (rows + 3 * window.kernel) * self._row(wide, stage.out_scale)
        # The strip as it is read and as it is made, and what it is read from, of half its rows and columns.
        making = 2 * strip + strip // 4 + 2 * block
        first, second = (
            self._convolution(stage, channels, blocks) for channels in (stage.channels, stage.out_channels)
        )
        return stored + max(making, strip + max(statistics, first, second))

    def _rows(self, scale: Scale) -> int:
        return self.parts.core_length(self.rank, scale)

    def _across(self, scale: Scale) -> int:
        return self.parts.rows(self.work.shape[-1 if self.parts.axis == -2 else -2], scale)

    def _row(self, channels: int, scale: Scale) -> int:
        """The bytes of one row of the whole batch."""
        return self.work.shape[0] * channels * self._across(scale) * self.work.itemsize

    def _halo(self, name: str) -> int:
        """A neighbour's rows: what is sent, its message, what arrives, and where it is kept."""
        step = self.steps.get(name)
        if step is None or len(self.parts.parts) == 1:
            return 0
        reach = step.reach.above + step.reach.below
        return 4 * reach * self._row(step.channels, step.scale)

    def _given(self, stage: Stage) -> int:
        """Rows around the input that an earlier layer gave, and those given for a later one."""
        most = max((give.above + give.below for give in self.given.values()), default=0)
        before = most * self._row(stage.channels, stage.scale)
        return before + most * self._row(stage.out_channels, stage.out_scale)

    def _convolution(self, stage: Stage, channels: int, blocks: int) -> int:
        """A block of a convolution: its rows as they are and as they are read, or what comes out of them."""
        window, give = stage.window or Window(1, 1, 0, 0), self.given.get(stage.names[-1], NO_ROWS)
        rows = max(-(-self._rows(stage.out_scale) // blocks), give.above, give.below)
        # The convolution reads at its own resolution, which interpolation gives it.
        scale = stage.out_scale if stage.kind == "upsample" else stage.scale
        spare = 2 if stage.kind == "upsample" else 0
        strip = ((rows - 1) * window.stride + window.kernel + spare) * self._row(channels, scale)
        out = rows * self._row(stage.out_channels, stage.out_scale)
        kept = 2 * window.lead * self._row(channels, scale) if stage.kind == "residual" else 0
        padded = strip + self._row(channels, scale) if stage.kind == "downsample" else 0
        return (
            kept
            + max(2 * strip, padded + strip + out, 2 * out if stage.shortcut else 0)
            + self._small(stage, blocks)
        )

    def _statistics(self, stage: Stage, channels: int, blocks: int) -> int:
        """The float64 copy of a chunk of a block."""
        rows = -(-self._rows(stage.scale) // blocks)
        values = rows * self._row(channels, stage.scale) // self.work.itemsize
        chunk = chunk_values(values, self.work.itemsize, stage.groups)
        return _WIDE * chunk + self._small(stage, blocks)

    def _small(self, stage: Stage, blocks: int) -> int:
        """Statistics of blocks and ranks, and parameters spread over the channels."""
        batch, ranks = self.work.shape[0], len(self.parts.parts)
        moments = 2 * batch * stage.groups * (4 * blocks + 4 * ranks + 8)
        return _WIDE * (moments + 8 * batch * max(stage.channels, stage.out_channels) + 64)

    def _attention(self, stage: Stage, own: int) -> int:
        """Everyone's positions as they arrive, normalised, and joined; then own queries and results."""
        everyone = self.parts.rows(self.work.shape[self.parts.axis], stage.scale)
        whole = everyone * self._row(stage.channels, stage.scale)
        step = self.steps[stage.names[0]]
        copies = 3 if step.groups else 5
        return copies * whole + 10 * own + self._small(stage, len(self.parts.parts))


def stage_blocks(stages: tuple[Stage, ...], row_blocks: int) -> tuple[int, ...]:
    """How many blocks each stage is run in: the largest in `row_blocks`, smaller ones in fewer.

    So no block of any stage is larger than one of the largest, and small layers are not cut into slivers.
    """

    def size(stage: Stage) -> float:
        before = stage.channels * (stage.scale.up / stage.scale.down) ** 2
        after = stage.out_channels * (stage.out_scale.up / stage.out_scale.down) ** 2
        if stage.kind == "upsample":
            before = stage.channels * (stage.out_scale.up / stage.out_scale.down) ** 2
        return before + after

    largest = max(size(stage) for stage in stages)
    return tuple(max(1, -(-row_blocks * int(size(stage) * 64) // int(largest * 64))) for stage in stages)
