"""What a sharded decode or encode of real VAEs costs each rank, counted on shapes alone.

The VAEs of Flux and Z-Image run at full width on the meta device, where shapes flow and
numbers do not, so that live bytes and floating point operations are those of the real thing and cost nothing.
Messages go nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import attrs
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from vaepp_plugins.vae_kl import KLAdapter
from vaepp_strategies.shard_run import ShardStrategy

from vaepp_sdk.parallel.view import Pending, Recv, Send, VaeGroup
from vaepp_sdk.testing import LiveBytes
from vaepp_sdk.vae.facts import Direction
from vaepp_sdk.vae.plan import Work


class SilentGroup(VaeGroup):
    """One rank whose peers never answer and are never waited for."""

    def post(self, sends: Sequence[Send], recvs: Sequence[Recv], what: str) -> Pending:
        del recvs
        for send in sends:
            if send.tensor.numel():
                self.traffic.add(send.tensor)
        return Pending(self, what, [], [], torch.device("meta"))


@attrs.define
class Cost:
    """Live bytes at their peak, operations, and bytes sent."""

    peak: int
    work: int
    sent: int = 0


def flux_vae() -> Any:
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return torch.nn.Module.to(vae, torch.bfloat16).eval()


class Operations(TorchDispatchMode):
    """Counts floating point operations as torch's own counter does, but keeps no tensor alive meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def cost(run: Callable[[], Any]) -> Cost:
    attention = 0

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        """As fused kernels do it: no matrix of scores in memory."""
        nonlocal attention
        attention += (
            2 * query.numel() * key.shape[-2] + 2 * query.shape[:-1].numel() * value.shape[-2:].numel()
        )
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    operations = Operations()
    with (
        torch.no_grad(),
        patch.object(F, "scaled_dot_product_attention", fused),
        LiveBytes() as live,
        operations,
    ):
        run()
    return Cost(live.peak, operations.total + attention)


def shard_cost(vae: Any, direction: Direction, pixels: int, ranks: int, rank: int) -> Cost:
    return strategy_cost(ShardStrategy(), vae, direction, pixels, ranks, rank)


def strategy_cost(strategy: Any, vae: Any, direction: Direction, pixels: int, ranks: int, rank: int) -> Cost:
    return adapter_cost(strategy, KLAdapter(vae), direction, _shape(direction, pixels), ranks, rank)


def adapter_cost(
    strategy: Any, adapter: Any, direction: Direction, shape: tuple[int, ...], ranks: int, rank: int
) -> Cost:
    value = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    work = work_on(direction, shape, ranks)
    plan = strategy.plan(adapter.facts(), work)
    group = SilentGroup(None, rank, ranks, ranks, timedelta(seconds=1))
    run = strategy.decode if direction == "decode" else strategy.encode

    def run_once() -> None:
        group.traffic.reset()
        run(adapter, value, group, plan)

    found = cost(run_once)
    assert group.traffic.nbytes == plan.bytes_sent(rank)
    return attrs.evolve(found, sent=group.traffic.nbytes)


def work_of(direction: Direction, pixels: int, ranks: int) -> Work:
    return work_on(direction, _shape(direction, pixels), ranks)


def work_on(direction: Direction, shape: tuple[int, ...], ranks: int) -> Work:
    return Work(
        direction=direction,
        shape=shape,
        itemsize=2,
        ranks=ranks,
        world_size=ranks,
        output="sharded",
    )


def untiled_cost(vae: Any, direction: Direction, pixels: int) -> Cost:
    return untiled_adapter_cost(KLAdapter(vae), direction, _shape(direction, pixels))


def untiled_adapter_cost(adapter: Any, direction: Direction, shape: tuple[int, ...]) -> Cost:
    value = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return cost(lambda: getattr(adapter, f"{direction}_window")(value))


def _shape(direction: Direction, pixels: int) -> tuple[int, ...]:
    return (1, 16, pixels // 8, pixels // 8) if direction == "decode" else (1, 3, pixels, pixels)


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_peak_and_work_of_every_rank_are_its_share(direction: Direction) -> None:
    vae = flux_vae()
    whole = untiled_cost(vae, direction, 1024)
    for ranks in (2, 4):
        for rank in range(ranks):
            share = shard_cost(vae, direction, 1024, ranks, rank)
            assert share.peak * ranks <= 1.03 * whole.peak, (ranks, rank, share.peak * ranks / whole.peak)
            assert share.work * ranks <= 1.03 * whole.work, (ranks, rank, share.work * ranks / whole.work)
