"""Who runs which tile, and what must move: no tensors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vaepp_strategies.tile_deal import deal
from vaepp_strategies.tile_geometry import replaced_facts
from vaepp_strategies.tile_plan import TilePlan, plan_tiles

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.options import option_faults
from vaepp_sdk.registry import Registry
from vaepp_sdk.vae.facts import TileGrid, VaeFacts
from vaepp_sdk.vae.frames import TimeTiles
from vaepp_sdk.vae.plan import EVERYONE, Output, Work


def facts(sample: int = 64, latent: int = 8, overlap: float = 0.25, **changes: Any) -> VaeFacts:
    plain = VaeFacts(
        vae_class="AutoencoderKL",
        spatial_ratio=8,
        latent_channels=4,
        picture_channels=3,
        moment_channels=8,
        use_tiling=True,
        decode_tiles=TileGrid.overlapping((latent, latent), (sample, sample), overlap),
        encode_tiles=TileGrid.overlapping((sample, sample), (latent, latent), overlap),
        peak_values_per_pixel=10.0,
    )
    return attrs.evolve(plain, **changes)


def work(rows: int, columns: int, **changes: Any) -> Work:
    plain = Work(
        direction="decode", shape=(1, 4, rows, columns), itemsize=2, ranks=2, world_size=2, output="rank0"
    )
    return attrs.evolve(plain, **changes)


@st.composite
def plans(draw: st.DrawFn, outputs: tuple[Output, ...] = ("rank0", "all", "sharded")) -> TilePlan:
    latent = draw(st.integers(2, 12))
    # At the limit itself, rounding may leave no row to advance by.
    overlap = draw(st.floats(0, 1 - 1 / latent).filter(lambda part: int(latent * (1 - part)) >= 1))
    world_size = draw(st.integers(1, 5))
    sides = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    asked = work(
        *sides,
        ranks=draw(st.integers(1, world_size)),
        world_size=world_size,
        output=draw(st.sampled_from(outputs)),
    )
    return plan_tiles(facts(latent * 8 + draw(st.integers(0, 3)), latent, overlap), asked)


@given(plans())
def test_targets_cover_the_output_once_and_sources_the_input(plan: TilePlan) -> None:
    for axis, spans in ((-2, plan.rows), (-1, plan.columns)):
        ends = [span.place + span.kept for span in spans]
        assert [span.place for span in spans] == [0, *ends[:-1]]
        assert ends[-1] == plan.out_shape[axis]
        assert spans[-1].start + spans[-1].length == plan.work.shape[axis]
        assert all(0 <= span.blend <= span.out and 0 < span.kept <= span.out for span in spans)
        assert spans[0].blend == 0


@given(plans())
def test_every_message_is_needed_and_none_is_sent_to_oneself(plan: TilePlan) -> None:
    assert all(move.src != move.dst and move.nbytes > 0 for move in plan.moves)
    assert all(move.src < plan.work.ranks and move.dst < plan.work.ranks for move in plan.moves)
    assert [move.round for move in plan.moves] == sorted(move.round for move in plan.moves)
    crossing = sum(len(level) for level in plan.crossings)
    assert [move.kind for move in plan.moves].count("seam") == crossing


@given(plans(outputs=("rank0",)))
def test_only_pixels_that_are_elsewhere_travel_to_rank_0(plan: TilePlan) -> None:
    elsewhere = sum(plan.piece_bytes(window) for window in plan.windows if window.owner != 0)
    assert sum(move.nbytes for move in plan.moves if move.kind == "output") == elsewhere


@given(plans())
def test_a_tile_is_blended_after_the_tiles_it_reads(plan: TilePlan) -> None:
    for window in plan.windows:
        for seam in plan.seams_into(window.index):
            assert plan.level(seam.first) == plan.level(seam.second) - 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 4))
def test_dealing_is_never_worse_than_the_best_contiguous_cut(costs: list[int], ranks: int) -> None:
    owners = deal(costs, ranks)
    assert len(owners) == len(costs)
    assert all(0 <= owner < ranks for owner in owners)
    cuts = itertools.combinations_with_replacement(range(len(costs) + 1), ranks - 1)
    best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cut, len(costs)))) for cut in cuts)
    busiest = max(
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)
    )
    assert math.ceil(sum(costs) / ranks) <= busiest <= best


def test_largest_first_where_a_contiguous_cut_balances_worse() -> None:
    assert deal([3, 1, 4, 4], 2) == (0, 1, 0, 1)  # contiguous: 8 and 4; largest first: 7 and 5
    assert deal([2, 2, 2, 2], 2) == (0, 0, 1, 1)  # equal loads: contiguous, not (0, 1, 0, 1)


def test_the_guides_example_is_dealt_by_area() -> None:
    """1152 px with tiles of 1024: sizes 128 and 48 latents; counting tiles would give one rank 77 %."""
    guide = facts(sample=1024, latent=128)
    plan = plan_tiles(guide, work(144, 144))
    assert [span.length for span in plan.rows] == [128, 48]
    assert plan.out_shape == (1, 3, 1152, 1152)
    loads = [plan.cost(rank) for rank in range(2)]
    assert max(loads) / sum(loads) == pytest.approx(128 * 128 / (128 + 48) ** 2)


def test_tiling_that_does_not_fire_is_one_window_on_rank_0() -> None:
    for plan in (
        plan_tiles(facts(), work(8, 8)),
        plan_tiles(facts(use_tiling=False), work(80, 80)),
        plan_tiles(facts(), work(64, 64, direction="encode")),
    ):
        assert [window.owner for window in plan.windows] == [0]
        assert plan.moves == ()
    whole = plan_tiles(facts(), work(8, 5, output="all"))
    assert [(move.dst, move.nbytes) for move in whole.moves] == [(EVERYONE, 3 * 64 * 40 * 2)]


def test_fewer_tiles_than_ranks_leave_ranks_idle() -> None:
    plan = plan_tiles(facts(), work(9, 5, ranks=4, world_size=4))
    assert [len(plan.owned(rank)) for rank in range(4)] == [1, 1, 0, 0]
    assert plan.peak_bytes[2:] == (0, 0)


def test_equal_arguments_give_equal_plans() -> None:
    assert plan_tiles(facts(), work(20, 30)).digest == plan_tiles(facts(), work(20, 30)).digest
    assert plan_tiles(facts(), work(20, 30)).digest != plan_tiles(facts(), work(30, 20)).digest


def test_replaced_geometry_is_the_vaes_with_those_attributes() -> None:
    replaced = replaced_facts(facts(), 48, 0.5)
    assert replaced.decode_tiles == TileGrid.overlapping((6, 6), (48, 48), 0.5)
    assert replaced.encode_tiles == TileGrid.overlapping((48, 48), (6, 6), 0.5)
    assert replaced_facts(facts(), None, 0.5).decode_tiles == TileGrid.overlapping((8, 8), (64, 64), 0.5)
    assert replaced_facts(facts(), 32, None).decode_tiles == TileGrid.overlapping((4, 4), (32, 32), 0.25)
    assert replaced_facts(facts(use_tiling=False), 32, None).use_tiling
    assert replaced_facts(facts(), None, None) == facts()


def test_replaced_geometry_keeps_how_the_class_cuts_time_and_blends_patches() -> None:
    time = TimeTiles(tile=2, step=1, blend=4, keep=4)
    stated = TileGrid(
        tile=(8, 8), step=(6, 6), blend=(16, 16), keep=(48, 48), grain=2, crops=True, least=2, time=time
    )
    found = replaced_facts(facts(decode_tiles=stated), 32, 0.25).decode_tiles
    assert found is not None
    assert (found.tile, found.step, found.keep) == ((4, 4), (3, 3), (24, 24))
    assert (found.grain, found.crops, found.least, found.time) == (2, True, 2, time)


@pytest.mark.parametrize(
    ("tile_size", "overlap", "works"),
    [
        (16, None, "tile_overlap_factor = 0.5 does"),
        (40, None, "tile_overlap_factor = 0.4 does"),
        (48, 0.9, "choose larger ones"),
    ],
)
def test_tiles_that_would_join_to_another_size_are_refused(
    tile_size: int, overlap: float | None, works: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"do not advance by whole latents; {works}"):
        replaced_facts(facts(), tile_size, overlap)


@pytest.mark.parametrize("tile_size", [0, -8, 4, 20])
def test_a_tile_size_that_is_no_multiple_is_refused(tile_size: int) -> None:
    with pytest.raises(UnsupportedError, match=f"tile_size is {tile_size}; .* multiple of 8"):
        replaced_facts(facts(), tile_size, None)


@pytest.mark.parametrize("overlap", [0.9, 1.0])
def test_tiles_that_do_not_advance_are_refused(overlap: float) -> None:
    with pytest.raises(UnsupportedError, match=r"advance by 0; .* at most 0\.875"):
        plan_tiles(facts(overlap=overlap), work(20, 20))
    plan_tiles(facts(overlap=0.875), work(20, 20))


def test_a_last_tile_smaller_than_a_latent_is_refused_for_encode() -> None:
    with pytest.raises(UnsupportedError, match=r"last tile of a side of 100 has 4, .* change the size by 4"):
        plan_tiles(facts(), work(100, 64, direction="encode"))


def test_an_unknown_tiling_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="tiling of AutoencoderKL is not known"):
        plan_tiles(facts(decode_tiles=None), work(20, 20))
    stated = TileGrid(tile=(8, 8), step=(6, 6), blend=(16, 16), keep=(48, 48))
    with pytest.raises(UnsupportedError, match="no overlap factor"):
        replaced_facts(facts(decode_tiles=stated), 48, None)


def test_the_entry_declares_its_options() -> None:
    entry = Registry.load().strategy("tile")
    assert entry.uses_tiling
    assert "bit-identical" in entry.promise
    assert not option_faults(entry, {"tile_size": 512, "tile_overlap_factor": 0}, "$")
    wrong = {"tile_size": 51.2, "tile_overlap_factor": 1.5, "tiles": 3}
    assert len(option_faults(entry, wrong, "$")) == 3
