"""What a sharded clip costs each rank, counted on shapes alone, and what its plan says of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import diffusers
import pytest
import torch
from test_shard_cost import (  # type: ignore[import-not-found]  # beside this file, not on mypy's path
    SilentGroup,
    adapter_cost,
    untiled_adapter_cost,
)
from vae_zoo import build
from vaepp_plugins.vae_cogvideox import CogVideoXAdapter
from vaepp_plugins.vae_hunyuan import HunyuanVideo15Adapter, HunyuanVideoAdapter
from vaepp_plugins.vae_ltx import LTX2VideoAdapter, LTXVideoAdapter
from vaepp_plugins.vae_mochi import MochiAdapter
from vaepp_plugins.vae_wan import QwenImageAdapter, WanAdapter
from vaepp_strategies.shard_modes import shard_strategy
from vaepp_strategies.shard_plan import plan_shards
from vaepp_strategies.shard_run import ShardStrategy
from vaepp_strategies.tile_run import TileStrategy

from vaepp_sdk.testing import LiveBytes
from vaepp_sdk.vae.facts import Direction
from vaepp_sdk.vae.plan import Work

WAN_22: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}


@functools.cache
def full(adapter: Callable[[Any], Any], vae: Callable[..., Any], **config: Any) -> Any:
    """An adapter of a VAE at full width, in bfloat16, without numbers; it traces each clip once."""
    with torch.device("meta"):
        built = vae(**config)
    return adapter(torch.nn.Module.to(built, torch.bfloat16).eval())


def tiny(adapter: Callable[[Any], Any], name: str, dtype: torch.dtype) -> Any:
    return adapter(torch.nn.Module.to(build(name, dtype), device="meta"))


WAN = (WanAdapter, diffusers.AutoencoderKLWan)
HUNYUAN = (HunyuanVideoAdapter, diffusers.AutoencoderKLHunyuanVideo)
LTX = (LTXVideoAdapter, diffusers.AutoencoderKLLTXVideo)
LTX_2 = (LTX2VideoAdapter, diffusers.AutoencoderKLLTX2Video)
COGVIDEOX = (CogVideoXAdapter, diffusers.AutoencoderKLCogVideoX)
MOCHI = (MochiAdapter, diffusers.AutoencoderKLMochi)
HUNYUAN_15 = (HunyuanVideo15Adapter, diffusers.AutoencoderKLHunyuanVideo15)
LTX_2_CONFIG = {
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
    "decoder_spatial_padding_mode": "reflect",
}
# And the rounds of messages on so many ranks, where no convolution computed rows for the next one, and now.
SHARES: list[tuple[Any, ...]] = [
    (*WAN, {}, "decode", (1, 16, 3, 60, 104), {2: (102, 57), 4: (102, 57)}),
    (*WAN, {}, "encode", (1, 3, 9, 480, 832), {4: (78, 45)}),
    (*WAN, WAN_22, "decode", (1, 48, 3, 30, 52), {4: (102, 69)}),
    (*HUNYUAN_15, {}, "decode", (1, 32, 2, 30, 52), {4: (40, 25)}),
    (*LTX, {}, "decode", (1, 128, 2, 16, 24), {2: (42, 22), 4: (42, 33)}),
    (*LTX, {}, "encode", (1, 3, 9, 512, 768), {4: (43, 34)}),
    (*LTX_2, LTX_2_CONFIG, "decode", (1, 128, 2, 16, 24), {2: (44, 23), 4: (44, 38)}),
    # Rows ride with the statistics of the normalisation before, of which there are 29, 37, 29, 38 and 55.
    (*HUNYUAN, {}, "decode", (1, 16, 2, 30, 52), {4: (33, 33)}),
    (*COGVIDEOX, {}, "decode", (1, 16, 3, 30, 44), {4: (41, 41)}),
    (*COGVIDEOX, {}, "encode", (1, 3, 5, 240, 352), {4: (33, 33)}),
    (*MOCHI, {}, "decode", (1, 12, 2, 30, 52), {4: (38, 38)}),
    (*MOCHI, {}, "encode", (1, 3, 7, 240, 416), {4: (55, 55)}),
]
FULL = [
    (*WAN, {}, ((16, 1, 60, 104), (16, 4, 30, 52)), ((3, 13, 240, 416),)),
    (*WAN, WAN_22, ((48, 2, 30, 52),), ((3, 13, 480, 832),)),
    (*HUNYUAN, {}, ((16, 6, 15, 26),), ((3, 21, 120, 208),)),
    (*HUNYUAN_15, {}, ((32, 3, 15, 26),), ((3, 9, 240, 416),)),
    (*LTX, {}, ((128, 1, 15, 26), (128, 5, 15, 26)), ((3, 17, 480, 832),)),
    (*LTX_2, LTX_2_CONFIG, ((128, 5, 15, 26),), ()),
]
BLOCKS = [  # the most that is left of the untiled peak in so many bands
    (*WAN, (16, 3, 30, 52), 2, 0.88),
    (*LTX, (128, 3, 16, 26), 8, 0.5),
]
TINY = [
    (WanAdapter, "AutoencoderKLWan", torch.float32, (1, 4)),
    (WanAdapter, "AutoencoderKLWan_22", torch.bfloat16, (4,)),
    (QwenImageAdapter, "AutoencoderKLQwenImage", torch.float32, (1,)),
    (HunyuanVideoAdapter, "AutoencoderKLHunyuanVideo", torch.float32, (3,)),  # two windows of frames
    (HunyuanVideo15Adapter, "AutoencoderKLHunyuanVideo15", torch.bfloat16, (2,)),
    (LTX2VideoAdapter, "AutoencoderKLLTX2Video", torch.float32, (1, 3)),
    (LTX2VideoAdapter, "AutoencoderKLLTX2Video", torch.bfloat16, (3,)),  # blended in float32
    (CogVideoXAdapter, "AutoencoderKLCogVideoX", torch.bfloat16, (4,)),
    (MochiAdapter, "AutoencoderKLMochi", torch.float32, (2,)),
]


def work_for(direction: str, shape: tuple[int, ...], ranks: int, itemsize: int = 2) -> Work:
    return Work(
        direction="decode" if direction == "decode" else "encode",
        shape=shape,
        itemsize=itemsize,
        ranks=ranks,
        world_size=ranks,
        output="sharded",
    )


@pytest.mark.parametrize(("adapter", "vae", "config", "direction", "shape", "rounds"), SHARES)
def test_peak_and_work_of_every_rank_are_its_share(
    adapter: Any,
    vae: Any,
    config: dict[str, Any],
    direction: Direction,
    shape: tuple[int, ...],
    rounds: dict[int, tuple[int, int]],
) -> None:
    """In the third latent frame of Wan all caches of frames are as full as they get.

    A rank with neighbours on both sides has most rows to hold and to compute twice.
    """
    one = full(adapter, vae, **config)
    whole = untiled_adapter_cost(one, direction, shape)
    for ranks, (plain, fewer) in rounds.items():
        share = adapter_cost(ShardStrategy(), one, direction, shape, ranks, ranks // 2 - 1)
        assert share.peak * ranks <= 1.03 * whole.peak, (ranks, share.peak * ranks / whole.peak)
        assert share.work * ranks <= 1.02 * whole.work, (ranks, share.work * ranks / whole.work)
        facts, work = one.facts(), work_for(direction, shape, ranks)
        counted = tuple(len(plan_shards(facts, work, fewer_rounds=on).steps) for on in (False, True))
        assert counted == (plain, fewer), ranks


@torch.no_grad()
def told_and_counted(
    adapter: Any, direction: str, shape: tuple[int, ...], ranks: int, strategy: Any = None
) -> tuple[float, int]:
    """What the plan of a rank in the middle says of its peak, as a share of what is counted, and that."""
    rank, strategy, dtype = ranks // 2, strategy or ShardStrategy(), adapter.vae.dtype
    plan = strategy.plan(adapter.facts(), work_for(direction, shape, ranks, dtype.itemsize))
    value = torch.empty(shape, dtype=dtype, device="meta")
    group = SilentGroup(None, rank, ranks, ranks, timedelta(seconds=1))
    with LiveBytes([value]) as live:
        getattr(strategy, direction)(adapter, value, group, plan)
    return plan.peak_bytes[rank] / live.peak, live.peak


def test_a_plan_knows_the_peak_of_a_clip() -> None:
    """Unlike the runs that it plans, it has seen the layers on small sides and in few frames only."""
    for adapter, vae, config, decodes, encodes in FULL:
        one = full(adapter, vae, **config)
        for direction, shapes in (("decode", decodes), ("encode", encodes)):
            for shape in shapes:
                # On one rank the trace itself is told, but for the masks of HunyuanVideo's attention.
                for ranks in (1, 4) if vae is diffusers.AutoencoderKLHunyuanVideo else (4,):
                    found, _ = told_and_counted(one, direction, (1, *shape), ranks)
                    assert 0.95 <= found <= 1.12, (vae.__name__, direction, shape, ranks, found)


@pytest.mark.parametrize(("adapter", "vae", "shape", "bands", "share"), BLOCKS)
def test_bands_in_turn_lower_the_peak_of_one_rank(
    adapter: Any, vae: Any, shape: tuple[int, ...], bands: int, share: float
) -> None:
    one = full(adapter, vae)
    _, whole = told_and_counted(one, "decode", (1, *shape), 1)
    told, counted = told_and_counted(one, "decode", (1, *shape), 1, shard_strategy(row_blocks=bands))
    assert counted <= share * whole, counted / whole
    assert 1 <= told <= 1.1, told


def test_plans_know_the_peak_of_small_clips() -> None:
    """Sharded on two ranks, and in tiles that one rank blends."""
    for adapter, name, dtype, clips in TINY:
        one = tiny(adapter, name, dtype)
        facts = one.facts()
        for frames in clips:
            # Untiled, HunyuanVideo 1.5 takes one clip; Mochi copies its input where it has two.
            batch = 2 if "Wan" in name or "Mochi" in name else 1
            latent = (batch, facts.latent_channels, frames, 9, 7)
            pictures = 1 + (frames - 1) * facts.temporal_ratio
            picture = (1, 3, pictures, 9 * facts.spatial_ratio, 7 * facts.spatial_ratio)
            for direction, shape in (("decode", latent), ("encode", picture)):
                found, _ = told_and_counted(one, direction, shape, 2)
                assert 0.97 <= found <= 1.12, (name, direction, shape, found)
            if frames > 1 and "LTX" not in name:  # its last tile would have one latent, too few
                found, _ = told_and_counted(one, "decode", latent, 1, TileStrategy())
                assert 0.95 <= found <= 1.12, (name, found)
