"""The arithmetic of `patch`: cores, halos, messages."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vae_models import tiny_kl
from vaepp_plugins.vae_kl import KLAdapter
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.patch_plan import PatchPlan, plan_patches

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.facts import Direction, VaeFacts
from vaepp_sdk.vae.plan import Work

FACTS: VaeFacts = KLAdapter(tiny_kl()).facts()


def work(shape: tuple[int, ...], ranks: int, **changes: Any) -> Work:
    settings: dict[str, Any] = {"direction": "decode", "itemsize": 4, "world_size": ranks, "output": "rank0"}
    return Work(shape=shape, ranks=ranks, **(settings | changes))


sides = st.integers(1, 70)
directions: st.SearchStrategy[Direction] = st.sampled_from(["decode", "encode"])


@st.composite
def plans(draw: st.DrawFn) -> tuple[PatchPlan, int]:
    direction = draw(directions)
    rounds_up = draw(st.booleans())
    shape = (draw(st.integers(1, 3)), 16, draw(sides), draw(sides))
    if direction == "encode":
        # Rounding down, a picture of fewer than 8 pixels has no latent.
        rows, columns = (8 * side + draw(st.integers(0, 7)) for side in shape[2:])
        shape = (shape[0], 3, rows, columns)
    halo = draw(st.integers(0, 20))
    facts = attrs.evolve(FACTS, encode_rounds_up=rounds_up)
    ranks = draw(st.integers(1, 6))
    return plan_patches(facts, work(shape, ranks, direction=direction), halo, "statistics+kv"), halo


@given(plans())
def test_cores_cover_the_output_once_and_evenly(planned: tuple[PatchPlan, int]) -> None:
    plan, _ = planned
    covered = torch.zeros(plan.out_shape[-2:], dtype=torch.int64)
    for window in plan.windows:
        covered[window.target.slices] += 1
    assert bool((covered == 1).all())
    latent = plan.work.shape if plan.work.direction == "decode" else plan.out_shape
    assert len(plan.windows) == min(plan.work.ranks, max(latent[-2:]))
    assert [window.owner for window in plan.windows] == list(range(len(plan.windows)))
    rows = [window.target.area for window in plan.windows]
    smallest_step = min(latent[-2:]) * (64 if plan.work.direction == "decode" else 1)
    assert max(rows) - min(rows) <= smallest_step


@given(plans())
def test_windows_hold_core_and_halo_and_nothing_beyond_the_picture(planned: tuple[PatchPlan, int]) -> None:
    plan, halo = planned
    decoding = plan.work.direction == "decode"
    unit = 1 if decoding else 8
    length = plan.work.shape[plan.parts.axis]
    for part in plan.parts.parts:
        end, core_end = part.start + part.length, part.core_start + part.core_length
        assert 0 <= part.start <= part.core_start < core_end <= end <= length
        assert part.start % unit == part.core_start % unit == 0
        assert part.core_start - part.start >= min(halo * unit, part.core_start)
        assert end - core_end >= min(halo * unit, length - core_end)
        # One more latent at most, for a last core of less than one.
        assert part.length <= part.core_length + (2 * halo + 1) * unit + unit


def test_a_last_core_of_less_than_a_latent_has_context_without_a_halo_too() -> None:
    facts = attrs.evolve(FACTS, encode_rounds_up=True)
    first, last = plan_patches(facts, work((1, 3, 13, 8), 2, direction="encode"), 0, "none").parts.parts
    assert (first.start, first.length) == (0, 8)
    assert (last.core_start, last.core_length, last.start, last.length) == (8, 5, 0, 13)


def test_the_rank_on_which_it_lands_has_room_for_the_picture_twice() -> None:
    plan = plan_patches(FACTS, work((1, 16, 60, 4), 12), 0, "none")
    assert plan.peak_bytes[0] == 2 * plan.work.landed_bytes(plan.out_shape) > plan.peak_bytes[1]


@given(plans())
def test_the_crop_has_the_targets_size_and_fits_the_windows_output(planned: tuple[PatchPlan, int]) -> None:
    plan, _ = planned
    for rank, window in enumerate(plan.windows):
        rows, columns = plan.crop(window)
        assert (rows.stop - rows.start, columns.stop - columns.start) == plan.piece_shape(window)[-2:]
        held = plan.parts.rows(plan.parts.parts[rank].length, plan.parts.output)
        assert rows.start >= 0
        assert columns.start >= 0
        assert (rows if plan.parts.axis == -2 else columns).stop <= held


@given(plans(), st.sampled_from([1, 2, 4, 8]))
def test_cores_cover_every_resolution_once(planned: tuple[PatchPlan, int], factor: int) -> None:
    plan, _ = planned
    decoding = plan.work.direction == "decode"
    scale = Scale(factor, 1) if decoding else Scale(1, factor)
    length = plan.parts.rows(plan.work.shape[plan.parts.axis], scale)
    ranks = range(len(plan.windows))
    assert sum(plan.parts.core_length(rank, scale) for rank in ranks) == length
    for rank in ranks:
        held = plan.parts.rows(plan.parts.parts[rank].length, scale)
        found = plan.parts.scale(rank, held)
        assert plan.parts.core(rank, found) == plan.parts.core(rank, scale)


def test_the_longer_side_is_cut() -> None:
    assert plan_patches(FACTS, work((1, 16, 9, 8), 2), 0, "none").parts.axis == -2
    assert plan_patches(FACTS, work((1, 16, 8, 9), 2), 0, "none").parts.axis == -1
    assert plan_patches(FACTS, work((1, 16, 8, 8), 2), 0, "none").parts.axis == -2


def test_messages_by_hand() -> None:
    plan = plan_patches(FACTS, work((2, 16, 9, 4), 2, world_size=3, output="all"), 3, "statistics+kv")
    kinds = [call.kind for call in plan.shared]
    # 12 residual blocks and the last norm: 2 norms a block, 1 in the attention, 1 at the end.
    assert kinds.count("statistics") == 2 * (2 + 4 * 2) + 2
    assert kinds.count("kv") == 1
    # The attention's own norm comes just before its keys and values, after those of the first block.
    assert kinds.index("kv") == 3
    assert plan.shared[2].name == "decoder.mid_block.attentions.0.group_norm"
    statistics = 2 * 8 * 4 * 2  # mean and squares, float64, 4 groups, batch 2
    keys_and_values = 2 * 2 * (5 * 4) * 8 * 4  # both, batch 2, 5 rows of 4, 8 features, float32
    output = 2 * 3 * 40 * 32 * 4
    assert plan.bytes_sent(0) == 22 * statistics + keys_and_values + 2 * output
    assert [move.round for move in plan.moves] == sorted(move.round for move in plan.moves)


def test_nothing_is_shared_where_nothing_is_asked_or_one_rank_works() -> None:
    plain = plan_patches(FACTS, work((1, 16, 9, 4), 2), 3, "none")
    assert {move.kind for move in plain.moves} == {"output"}
    alone = plan_patches(FACTS, work((1, 16, 1, 1), 3), 3, "statistics+kv")
    assert not alone.shared
    assert not alone.moves
    assert alone.peak_bytes[1:] == (0, 0)


def test_more_halo_costs_more_and_more_ranks_cost_less() -> None:
    def busiest(halo: int, ranks: int) -> int:
        return max(plan_patches(FACTS, work((1, 16, 64, 64), ranks), halo, "statistics+kv").peak_bytes)

    assert busiest(0, 2) * 2 == busiest(0, 1)
    assert busiest(0, 4) < busiest(4, 4) < busiest(8, 4) < busiest(8, 2)


@pytest.mark.parametrize("shape", [(1, 16, 4, 9, 9), (1, 16, 0, 9), (0, 16, 9, 9)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match="shape"):
        plan_patches(FACTS, work(shape, 2), 3, "statistics+kv")


def test_a_video_autoencoder_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="pictures"):
        plan_patches(attrs.evolve(FACTS, temporal_ratio=4), work((1, 16, 9, 9), 2), 3, "statistics+kv")
