"""Layers on parts of a picture held by real ranks, against the plain layer on the whole."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from vaepp_strategies.layers.attention import shared_attention
from vaepp_strategies.layers.exchange import Exchange
from vaepp_strategies.layers.norm import shared_group_norm
from vaepp_strategies.layers.parts import Part, Parts
from vaepp_strategies.layers.swap import swapped

from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.testing import run_ranks

SIDE = 11
# Uneven cores, halos of several sizes; the last part has none.
PARTS = {
    2: (Part(0, 8, 0, 6), Part(4, 7, 6, 5)),
    3: (Part(0, 5, 0, 4), Part(2, 7, 4, 4), Part(8, 3, 8, 3)),
}
# What one rounding of each dtype can move: values are of the order of 10.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.bfloat16: 0.07, torch.float16: 0.01}


@attrs.frozen
class Case:
    dtype: torch.dtype = torch.float32
    axis: int = -2
    batch: int = 1
    heads: int = 1
    residual: bool = True


CASES = [
    Case(torch.float64),
    Case(torch.float64, axis=-1, batch=2, heads=2, residual=False),
    Case(),
    Case(axis=-1, batch=2, heads=2),
    Case(torch.bfloat16),
    Case(torch.float16, axis=-1),
]


def build(case: Case) -> tuple[nn.GroupNorm, Any, torch.Tensor]:
    torch.manual_seed(3)
    norm = nn.GroupNorm(4, 32)
    attention = Attention(
        32,
        heads=case.heads,
        dim_head=32 // case.heads,
        bias=True,
        norm_num_groups=4,
        rescale_output_factor=1.5,
        residual_connection=case.residual,
    )
    for layer in (norm, attention.group_norm):
        nn.init.normal_(layer.weight, 1, 0.3)
        nn.init.normal_(layer.bias)
    # Each row has statistics of its own, so that a row counted twice or missed shows.
    value = torch.randn(case.batch, 32, SIDE, SIDE) * 2 + torch.linspace(-4, 9, SIDE).view(SIDE, 1)
    if case.axis == -1:
        value = value.transpose(-1, -2).contiguous()
    return norm.to(case.dtype), attention.to(case.dtype).eval(), value.to(case.dtype)


@torch.no_grad()
def run_layers(rank: int, world_size: int) -> list[tuple[float, float, bool]]:
    group = VaeGroup.over(None, world_size)
    return [run_case(group, case) for case in CASES]


def run_case(group: VaeGroup, case: Case) -> tuple[float, float, bool]:
    """How far the norm and the attention are off on this rank, and whether the strides are plain."""
    norm, attention, value = build(case)
    exchange = Exchange(group, Parts(case.axis, PARTS[group.world_size]))
    part = exchange.parts.parts[group.rank]

    def own(whole: torch.Tensor) -> torch.Tensor:
        return whole.narrow(case.axis, part.start, part.length)

    expected = own(norm(value)), own(attention(value))
    with swapped(
        {
            norm: shared_group_norm(norm, exchange),
            attention: shared_attention(attention, exchange),
            attention.group_norm: shared_group_norm(attention.group_norm, exchange),
        }
    ):
        found = norm(own(value)), attention(own(value))
    off = [float((mine - whole).abs().max()) for mine, whole in zip(found, expected, strict=True)]
    return off[0], off[1], all(result.is_contiguous() and result.dtype == case.dtype for result in found)


@pytest.mark.parametrize("world_size", [2, 3])
def test_norm_and_attention_are_those_of_the_whole_picture(world_size: int) -> None:
    for rank, results in enumerate(run_ranks(world_size, run_layers, world_size)):
        for case, (norm, attention, plain) in zip(CASES, results, strict=True):
            assert plain, (rank, case)
            assert norm <= TOLERANCE[case.dtype], (rank, case, norm)
            assert attention <= TOLERANCE[case.dtype], (rank, case, attention)
