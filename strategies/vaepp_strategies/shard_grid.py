"""`deterministic = "ranks"`: one fixed grid of bands, dealt to however many ranks there are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import nn

from vaepp_sdk.errors import VaeppWarning
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import Landed, land, landing_moves
from vaepp_sdk.vae.plan import Move, Work, WorkPlan, split_evenly
from vaepp_strategies.layers.bands import Bands
from vaepp_strategies.layers.lockstep import BandGroup, Lockstep
from vaepp_strategies.layers.swap import swapped
from vaepp_strategies.shard_front import layer_work
from vaepp_strategies.shard_layers import band_forwards
from vaepp_strategies.shard_plan import ShardPlan, landing_bytes, plan_shards
from vaepp_strategies.shard_run import ShardStrategy, band_input, input_halo, window_call
from vaepp_strategies.shard_steps import call_scale
from vaepp_strategies.shard_times import in_windows
from vaepp_strategies.traced_memory import TracedMemory

__all__ = ["GRID", "GridPlan", "GridStrategy", "plan_grid", "run_grid"]

GRID = 4
"""Bands of the grid, where the latent allows as many; with another number, results would round otherwise."""

Forward = Callable[..., Any]


@attrs.frozen(kw_only=True)
class GridPlan(WorkPlan):
    """A work plan whose windows are the bands of a fixed grid; a rank owns neighbouring ones.

    Attributes:
        grid: the plain plan of as many ranks as the grid has bands.
        owners: the rank of each band.
        extra_work: operations that computing rows again adds, as a share of all.
    """

    grid: ShardPlan
    owners: tuple[int, ...]
    extra_work: float = 0.0


def plan_grid(
    facts: VaeFacts, work: Work, bands: int = GRID, chained: bool = False, fewer_rounds: bool = True
) -> GridPlan:
    """Plan for the grid, and deal its bands; only the dealing depends on the number of ranks.

    Args:
        facts: the VAE.
        work: what is asked.
        bands: how many bands the grid has, where the latent allows as many.
        chained: see `plan_shards`.
        fewer_rounds: see `plan_shards`.

    Raises:
        UnsupportedError: as the plain mode.
    """
    wanted = attrs.evolve(work, ranks=bands, output="sharded")
    grid = plan_shards(facts, wanted, chained=chained, fewer_rounds=fewer_rounds)
    count = len(grid.windows)
    # As if no more had been asked for than there are: plans that do the same are equal.
    grid = attrs.evolve(grid, work=attrs.evolve(grid.work, ranks=count), peak_bytes=grid.peak_bytes[:count])
    shares = split_evenly(count, work.ranks)
    owners = tuple(rank for rank, (_, size) in enumerate(shares) for _ in range(size))
    windows = tuple(attrs.evolve(window, owner=owners[window.index]) for window in grid.windows)
    pieces = {window.index: grid.piece_bytes(window) for window in windows}
    between = tuple(
        Move(move.round, move.kind, owners[move.src], owners[move.dst], move.nbytes)
        for move in grid.moves
        if owners[move.src] != owners[move.dst]
    )
    return GridPlan(
        strategy=grid.strategy,
        work=work,
        windows=windows,
        out_shape=grid.out_shape,
        moves=between + landing_moves(windows, pieces, work.output, work.world_size, len(grid.steps)),
        peak_bytes=tuple(_peak(facts, work, grid, owners, rank) for rank in range(work.ranks)),
        grid=grid,
        owners=owners,
        extra_work=_extra_work(facts, work, grid) if chained else 0.0,
    )


def _extra_work(facts: VaeFacts, work: Work, grid: ShardPlan) -> float:
    """What convolutions do for rows beyond their bands, as a share of all work."""
    trace = facts.layers(work.direction)
    assert trace is not None, "a plan was made from the layers"
    given = dict(grid.given)
    extra = 0.0
    for index, call in enumerate(trace.calls):
        if call.kind == "Conv2d" and call.name in given:
            rows = grid.parts.rows(work.shape[grid.parts.axis], call_scale(trace, index))
            beyond = (len(grid.windows) - 1) * (given[call.name].above + given[call.name].below)
            extra += layer_work(trace, work, (call.name,)) * beyond / rows
    return extra / layer_work(trace, work)


def _peak(facts: VaeFacts, work: Work, grid: ShardPlan, owners: tuple[int, ...], rank: int) -> int:
    """A rank's live bytes while its bands run in turn, or while pieces land if that is more."""
    bands = [band for band, owner in enumerate(owners) if owner == rank]
    memory = TracedMemory(
        facts=facts, work=grid.work, parts=grid.parts, times=grid.times, steps=grid.steps, given=grid.given
    )
    return max(memory.peak(*bands) if bands else 0, landing_bytes(facts, work, rank))


class GridStrategy(ShardStrategy):
    """Runs every band of the grid as if it had a rank of its own, whoever owns it."""

    def __init__(self) -> None:
        super().__init__()
        self._warned = False

    def plan(self, facts: VaeFacts, work: Work) -> GridPlan:  # type: ignore[override]
        """See `Strategy.plan`."""
        return plan_grid(facts, work)

    def run(  # type: ignore[override]
        self, adapter: VaeAdapter, value: torch.Tensor, group: VaeGroup, plan: GridPlan
    ) -> Landed:
        """See `ShardStrategy.run`."""
        landed = run_grid(adapter, value, group, plan)
        if group.rank == 0 and value.device.type == "cuda" and not self._warned:
            self._warned = _warn_of_choice()
        return landed


@torch.no_grad()
def run_grid(adapter: VaeAdapter, value: torch.Tensor, group: VaeGroup, plan: GridPlan) -> Landed:
    """Decode or encode, each rank all its bands.

    Args:
        adapter: the VAE.
        value: the whole latent or picture.
        group: the VAE's view of the DiT group.
        plan: the plan of `plan_grid`.
    """
    pieces: dict[int, torch.Tensor] = {}
    if plan.owned(group.rank):
        if len(plan.windows) == 1:
            whole = in_windows(window_call(adapter, plan.work.direction), value, plan.grid.times)
            pieces = {0: whole}
        else:
            pieces = _bands(adapter, value, group, plan)
        if plan.work.direction == "decode":
            pieces = {index: adapter.finish_decode(piece) for index, piece in pieces.items()}
        group.progress(len(plan.grid.steps) + 1, len(plan.grid.steps) + 1)
    return land(pieces, group, plan, value.dtype, value.device)


def _bands(
    adapter: VaeAdapter, value: torch.Tensor, group: VaeGroup, plan: GridPlan
) -> dict[int, torch.Tensor]:
    """The output of every band of this rank."""
    trace = adapter.facts().layers(plan.work.direction)
    assert trace is not None, "a plan was made from the layers"
    lockstep, grid = Lockstep(group, plan.owners), plan.grid
    bands = {
        window.index: Bands(BandGroup.of(lockstep, window.index), grid.parts, len(grid.steps))
        for window in plan.owned(group.rank)
    }
    forwards = {band: band_forwards(trace, adapter.vae, one, grid) for band, one in bands.items()}

    def work(band: int) -> torch.Tensor:
        call = window_call(_with_own_attributes(adapter), plan.work.direction)

        def run(frames: torch.Tensor) -> torch.Tensor:
            rows = band_input(frames, grid.windows[band])
            if grid.input_reach:
                bands[band].carry(rows, input_halo(frames, grid, band))
            # Anew, for layers keep frames of one window only.
            forwards[band] = band_forwards(trace, adapter.vae, bands[band], grid)
            return call(rows)

        return in_windows(run, value, grid.times)

    with swapped(_of_current(lockstep, forwards)):
        return lockstep.run(work, value.device)


def _with_own_attributes(adapter: VaeAdapter) -> VaeAdapter:
    """The adapter of the same layers for one band: video VAEs keep frames in attributes of the VAE itself."""
    one = copy.copy(adapter)
    one.vae = copy.copy(adapter.vae)
    return one


def _of_current(
    lockstep: Lockstep, forwards: Mapping[int, Mapping[nn.Module, Forward]]
) -> dict[nn.Module, Forward]:
    """Each layer's forward of the band that runs."""

    def dispatched(layer: nn.Module) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return forwards[lockstep.current][layer](*args, **kwargs)

        return forward

    return {layer: dispatched(layer) for layer in forwards[lockstep.current]}


def _warn_of_choice() -> bool:
    """Warn where kernels are chosen by timing, which no fixed grid can make repeatable."""
    if not torch.backends.cudnn.benchmark:
        return False
    warnings.warn(
        "deterministic = 'ranks' cannot be kept while torch.backends.cudnn.benchmark is on: kernels are then "
        "chosen by timing",
        VaeppWarning,
        stacklevel=2,
    )
    return True
