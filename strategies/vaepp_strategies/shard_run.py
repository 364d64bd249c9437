"""Runs a shard plan: tensors and messages."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import Direction, VaeFacts
from vaepp_sdk.vae.landing import Landed, land
from vaepp_sdk.vae.plan import Window, Work
from vaepp_strategies.layers.bands import Bands, Halo
from vaepp_strategies.layers.inspect import refuse_unknown
from vaepp_strategies.layers.swap import swapped
from vaepp_strategies.shard_blocks import sequence_forward
from vaepp_strategies.shard_front import Repeat
from vaepp_strategies.shard_layers import band_forwards, refused_layers
from vaepp_strategies.shard_limit import Recomputes, row_blocks_from
from vaepp_strategies.shard_options import refuse_conflict
from vaepp_strategies.shard_plan import ShardPlan, plan_shards
from vaepp_strategies.shard_times import in_windows

__all__ = ["ShardStrategy", "band_input", "input_halo", "window_call"]

WindowCall = Callable[[torch.Tensor], torch.Tensor]


class ShardStrategy:
    """Decodes one band on each rank; layers exchange rows, statistics, and attention's keys and values.

    Args:
        row_blocks: how many blocks of rows the largest layer of a band is run in.
        peak_limit: the most live bytes of a rank, as in `"6GiB"`; finds `row_blocks`.
        recompute: whether activations are computed again instead of stored; see `RowBlocks`.
        repeat: whether ranks run what leads to a decoder's attention on their peers' rows too; see
            `shard_front.plan_front`.

    Raises:
        UnsupportedError: options do not go together, or the limit cannot be read; see `shard_conflict`.
    """

    def __init__(
        self,
        row_blocks: int = 1,
        peak_limit: str | None = None,
        recompute: Recomputes = "auto",
        repeat: Repeat = "auto",
    ) -> None:
        refuse_conflict(row_blocks=row_blocks, peak_limit=peak_limit, recompute=recompute, repeat=repeat)
        self._row_blocks = row_blocks_from(row_blocks, peak_limit, recompute)
        # Row blocks have a runner of their own, which knows bands only.
        self._repeat: Repeat = "never" if self._row_blocks else repeat

    def plan(self, facts: VaeFacts, work: Work) -> ShardPlan:
        """See `Strategy.plan`."""
        return plan_shards(facts, work, self._row_blocks, self._repeat)

    def check(self, adapter: VaeAdapter) -> None:
        """See `Strategy.check`: refuses layers that this strategy does not know how to run on a band."""
        refuse_unknown("shard", adapter, refused_layers)

    def decode(self, adapter: VaeAdapter, latent: torch.Tensor, group: VaeGroup, plan: ShardPlan) -> Landed:
        """See `Strategy.decode`."""
        return self.run(adapter, latent, group, plan)

    def encode(self, adapter: VaeAdapter, picture: torch.Tensor, group: VaeGroup, plan: ShardPlan) -> Landed:
        """See `Strategy.encode`."""
        return self.run(adapter, picture, group, plan)

    def run(self, adapter: VaeAdapter, value: torch.Tensor, group: VaeGroup, plan: ShardPlan) -> Landed:
        """Decode or encode, as the plan says."""
        return _run(adapter, value, group, plan)


def window_call(adapter: VaeAdapter, direction: Direction) -> WindowCall:
    """Decodes or encodes one window of frames, or a whole input."""
    return adapter.decode_window if direction == "decode" else adapter.encode_window


@torch.no_grad()
def _run(adapter: VaeAdapter, value: torch.Tensor, group: VaeGroup, plan: ShardPlan) -> Landed:
    pieces = {}
    for window in plan.owned(group.rank):
        if len(plan.windows) == 1 and plan.blocks is None:
            run = window_call(adapter, plan.work.direction)
        else:
            run = _on_band(adapter, Bands(group, plan.parts, len(plan.steps)), plan, window)
        piece = in_windows(run, value, plan.times)
        pieces[window.index] = adapter.finish_decode(piece) if plan.work.direction == "decode" else piece
        group.progress(len(plan.steps) + 1, len(plan.steps) + 1)
    return land(pieces, group, plan, value.dtype, value.device)


def _on_band(adapter: VaeAdapter, bands: Bands, plan: ShardPlan, window: Window) -> WindowCall:
    """Gives this rank's band of the output for a whole input, or for some frames of one."""
    trace = adapter.facts().layers(plan.work.direction)
    assert trace is not None, "a plan was made from the layers"

    def run(value: torch.Tensor) -> torch.Tensor:
        # Layers that every rank runs on the whole picture start with the whole input.
        band = value.contiguous() if plan.front else band_input(value, window)
        if plan.input_reach:
            bands.carry(band, input_halo(value, plan, bands.group.rank))
        forwards = dict(band_forwards(trace, adapter.vae, bands, plan))
        if plan.blocks is not None:
            sequence = adapter.vae.get_submodule(plan.blocks.sequence.name)
            forwards[sequence] = sequence_forward(adapter.vae, bands, plan, plan.blocks)
        with swapped(forwards):
            return window_call(adapter, plan.work.direction)(band)

    return run


def band_input(value: torch.Tensor, window: Window) -> torch.Tensor:
    """A band of the input. That of a clip is a view: its layers copy what they read in any case."""
    band = value[(..., *window.source.slices)]
    return band if band.dim() == 5 else band.contiguous()


def input_halo(value: torch.Tensor, plan: ShardPlan, rank: int) -> Halo:
    """The rows around a rank's band of the input, which every rank holds."""
    axis, part, reach = plan.parts.axis, plan.parts.parts[rank], plan.input_reach
    start, end = part.start, part.start + part.length
    first, last = max(0, start - reach.above), min(value.shape[axis], end + reach.below)
    above = value.narrow(axis, first, start - first) if first < start else None
    below = value.narrow(axis, end, last - end) if end < last else None
    return Halo(above, below)
