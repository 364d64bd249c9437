"""`repeat` of shard: positions computed for peers instead of received, on real ranks and in arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_cases import Case, check_cases, tiny_autoencoder
from test_shard_cost import flux_vae  # type: ignore[import-not-found]  # beside this file
from vae_models import tiny_kl
from vaepp_plugins.vae_kl import KLAdapter
from vaepp_plugins.vae_tiny import TinyAdapter
from vaepp_strategies.shard_front import Front, window_around
from vaepp_strategies.shard_plan import plan_shards
from vaepp_strategies.shard_run import ShardStrategy

from benchmarks.row_peer import RowPeer
from vaepp_sdk import UnsupportedError
from vaepp_sdk.vae.plan import Work, split_evenly

ALWAYS, AUTO, NEVER = ({"repeat": how} for how in ("always", "auto", "never"))

WIDE: dict[str, Any] = {"widths": (8, 16, 32, 32)}
"""Much work behind the attention, so that `auto` repeats some of what is before it, or all."""

CASES = [
    Case((37, 11), batch=2, options=ALWAYS),
    Case((9, 33), vae="flux2", dtype=torch.bfloat16, options=ALWAYS),
    Case((30, 17), build={"quant": True}, dtype=torch.float64, options=ALWAYS, output="sharded"),
    Case((67, 29), build=WIDE, options=AUTO),
    Case((30, 66), build=WIDE, dtype=torch.float64, batch=2, options=AUTO),
    Case((64, 30), build=WIDE, dtype=torch.bfloat16, options=AUTO, output="rank0"),
    Case((12, 11), options=NEVER),
    Case((30, 17), options=ALWAYS, direction="encode"),
]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_result_is_the_untiled_one_up_to_rounding(world_size: int) -> None:
    check_cases(world_size, CASES)


def work_of(sides: tuple[int, int], ranks: int, itemsize: int = 4) -> Work:
    return Work(
        direction="decode",
        shape=(1, 16, *sides),
        itemsize=itemsize,
        ranks=ranks,
        world_size=ranks,
        output="sharded",
    )


def front_of(sides: tuple[int, int], ranks: int, repeat: Any, **build: Any) -> Front | None:
    return plan_shards(KLAdapter(tiny_kl(**build)).facts(), work_of(sides, ranks), None, repeat).front


def test_the_cases_on_real_ranks_take_windows_of_all_kinds() -> None:
    two, four = (front_of((67, 29), ranks, "auto", **WIDE) for ranks in (2, 4))
    assert two is not None
    assert two.whole
    assert four is not None
    assert not four.whole
    assert four.windows != four.bands
    assert front_of((67, 29), 4, "never", **WIDE) is None


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(8, 70), ranks=st.integers(2, 8), extra=st.integers(0, 60), margin=st.integers(0, 4))
def test_every_rank_computes_or_receives_every_row_once(
    rows: int, ranks: int, extra: int, margin: int
) -> None:
    bands = tuple((start, start + size) for start, size in split_evenly(rows, ranks))
    front = Front(layers=(), attention="", rows=rows, bands=bands, windows=bands, margin=margin)
    windows = tuple(window_around(band, extra, front) for band in bands)
    front = Front(layers=(), attention="", rows=rows, bands=bands, windows=windows, margin=margin)
    for rank, (start, end) in enumerate(windows):
        assert start <= bands[rank][0]
        assert end >= bands[rank][1]
        first, last = front.held(rank)
        assert last - first <= max(bands[rank][1] - bands[rank][0] + max(extra, 2 * margin), 0)
        others = [front.sent(source, rank) for source in range(len(bands)) if source != rank]
        known = [*range(start, end), *(row for part in others for row in range(*part))]
        assert sorted(known) == list(range(rows))


@pytest.mark.parametrize(("ranks", "repeat"), [(2, "auto"), (4, "auto"), (8, "always")])
def test_fewer_bytes_and_messages_than_plain_row_sharding(ranks: int, repeat: Any) -> None:
    """Counted as `python -m benchmarks.shard_bytes` counts it, in the sum of all ranks and of the busiest."""
    vae = flux_vae()
    plan = ShardStrategy(repeat=repeat).plan(KLAdapter(vae).facts(), work_of((128, 128), ranks, itemsize=2))
    peers = [RowPeer(rank, ranks) for rank in range(ranks)]
    latent = torch.empty((1, 16, 128, 128), dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        for peer in peers:
            peer.decode(vae.decoder, latent)
    messages = [sum(move.src == rank for move in plan.moves if move.nbytes) for rank in range(ranks)]
    assert all(mine < peer.messages for mine, peer in zip(messages, peers, strict=True))
    assert len({move.round for move in plan.moves}) < peers[0].rounds
    sent = [plan.bytes_sent(rank) for rank in range(ranks)]
    assert max(sent) < max(peer.nbytes for peer in peers)
    assert sum(sent) < sum(peer.nbytes for peer in peers)


def test_what_cannot_be_repeated_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not go together with row blocks"):
        ShardStrategy(row_blocks=2, repeat="always")
    with pytest.raises(UnsupportedError, match="single-head attention after"):
        front_of((32, 32), 2, "always", attention=False)
    with pytest.raises(UnsupportedError, match="leave repeat out"):
        ShardStrategy(repeat="always").plan(TinyAdapter(tiny_autoencoder()).facts(), work_of((8, 8), 2))
