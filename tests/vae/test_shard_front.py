"""`repeat` of shard: positions that every rank computes instead of receiving them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shard_cases import Case, check_cases, tiny_autoencoder
from test_shard_cost import flux_vae  # type: ignore[import-not-found]  # beside this file
from torch.nn.attention import SDPBackend, sdpa_kernel
from vae_models import tiny_kl
from vaepp_plugins.vae_kl import KLAdapter
from vaepp_plugins.vae_tiny import TinyAdapter
from vaepp_strategies.layers.band_attention import mix_positions, tokens_of
from vaepp_strategies.shard_front import Front
from vaepp_strategies.shard_plan import plan_shards
from vaepp_strategies.shard_run import ShardStrategy

from benchmarks.row_peer import RowPeer
from vaepp_sdk import UnsupportedError
from vaepp_sdk.vae.plan import Work

ALWAYS, AUTO, NEVER = ({"repeat": how} for how in ("always", "auto", "never"))

WIDE: dict[str, Any] = {"widths": (8, 16, 32, 32)}
"""Much work behind the attention, so that `auto` repeats what is before it."""

CASES = [
    Case((37, 11), batch=2, options=ALWAYS),
    Case((9, 33), vae="flux2", dtype=torch.bfloat16, options=ALWAYS),
    Case((30, 17), build={"quant": True}, dtype=torch.float64, options=ALWAYS, output="sharded"),
    Case((67, 29), build=WIDE, options=AUTO),
    Case((64, 30), build=WIDE, dtype=torch.bfloat16, options=AUTO, output="rank0"),
    Case((30, 66), build=WIDE, dtype=torch.float64, batch=2, options=NEVER),
    Case((12, 11), dtype=torch.bfloat16, options=NEVER),
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


def test_auto_repeats_where_it_costs_little() -> None:
    narrow_behind: dict[str, Any] = {"widths": (8, 8, 8, 32)}
    assert front_of((67, 29), 2, "auto", **narrow_behind) is not None
    assert front_of((67, 29), 4, "auto", **narrow_behind) is None
    assert front_of((67, 29), 4, "auto", **WIDE) is not None
    assert front_of((67, 29), 4, "never", **WIDE) is None


def test_the_upsampling_with_most_work_pays_for_it() -> None:
    front = plan_shards(KLAdapter(flux_vae()).facts(), work_of((128, 128), 4), None, "auto").front
    assert front is not None
    assert front.doubled == "decoder.up_blocks.1.upsamplers.0"


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_fewer_bytes_and_messages_than_plain_row_sharding(ranks: int) -> None:
    """Counted as `python -m benchmarks.shard_bytes` counts it, in the sum of all ranks and of the busiest."""
    vae = flux_vae()
    plan = ShardStrategy().plan(KLAdapter(vae).facts(), work_of((128, 128), ranks, itemsize=2))
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


def test_attention_over_the_whole_picture_runs_in_a_fused_kernel() -> None:
    tokens, weight = tokens_of(torch.randn(1, 32, 8, 9)), torch.eye(32)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        mixed = mix_positions(tokens[:, :16], tokens, weight)
    scores = torch.softmax(tokens[:, :16] @ tokens.mT / 32**0.5, -1)
    assert torch.allclose(mixed, scores @ tokens, atol=1e-5)


def test_what_cannot_be_repeated_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'always' does not go together with row_blocks"):
        ShardStrategy(row_blocks=2, repeat="always")
    with pytest.raises(UnsupportedError, match="single-head attention after"):
        front_of((32, 32), 2, "always", attention=False)
    with pytest.raises(UnsupportedError, match="leave repeat out"):
        ShardStrategy(repeat="always").plan(TinyAdapter(tiny_autoencoder()).facts(), work_of((8, 8), 2))
