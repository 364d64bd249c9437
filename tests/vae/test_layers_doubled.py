"""A convolution behind nearest doubling in 4/9 of the work, cut anywhere, against the two layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vaepp_strategies.layers.bands import Halo
from vaepp_strategies.layers.doubled import convolve_doubled
from vaepp_strategies.layers.reach import Reach

RELATIVE = {torch.float32: 2e-6, torch.float64: 1e-14}
"""Rounding of one layer."""


def made(dtype: torch.dtype) -> tuple[nn.Conv2d, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, padding=1, groups=2).to(dtype).requires_grad_(False)
    values = torch.randn(2, 6, 11, 7, dtype=dtype)
    return layer, values, layer(F.interpolate(values, scale_factor=2.0, mode="nearest"))


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("give", [Reach(0, 0), Reach(1, 1), Reach(1, 0), Reach(0, 1)])
def test_every_band_gets_its_rows_and_those_around_them(axis: int, dtype: torch.dtype, give: Reach) -> None:
    layer, values, whole = made(dtype)
    size, limit = values.shape[axis], RELATIVE[dtype] * float(whole.abs().max())

    def rows(first: int, last: int) -> torch.Tensor:
        return whole.narrow(axis, first, last - first)

    for start, end in ((0, size), (0, 1), (0, 4), (4, 5), (3, 6), (6, size)):
        band = values.narrow(axis, start, end - start).contiguous()
        above = values.narrow(axis, start - 1, 1) if start else None
        below = values.narrow(axis, end, 1) if end < size else None
        out, beyond = convolve_doubled(layer, band, Halo(above, below), axis, give)
        assert out.is_contiguous()
        assert (out - rows(2 * start, 2 * end)).abs().max() <= limit
        wanted = (
            rows(2 * start - 1, 2 * start) if start and give.above else None,
            rows(2 * end, 2 * end + 1) if end < size and give.below else None,
        )
        for found, expected in zip(beyond.rows(), wanted, strict=True):
            assert (found is None) is (expected is None)
            if found is not None and expected is not None:
                assert (found - expected).abs().max() <= limit


def test_the_work_is_less_than_half() -> None:
    layer, values, _ = made(torch.float32)
    counts = []
    for run in (
        lambda: layer(F.interpolate(values, scale_factor=2.0, mode="nearest")),
        lambda: convolve_doubled(layer, values, Halo(None, None), -2, Reach()),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert 9 * counts[1] == 4 * counts[0]


def test_low_precision_is_nearly_as_close_to_the_exact_result() -> None:
    layer, values, _ = made(torch.bfloat16)
    exact = layer.double()(F.interpolate(values.double(), scale_factor=2.0, mode="nearest"))
    layer.to(torch.bfloat16)
    plain = layer(F.interpolate(values, scale_factor=2.0, mode="nearest")).double() - exact
    mine = convolve_doubled(layer, values, Halo(None, None), -2, Reach())[0].double() - exact
    # Sums of weights are rounded: one rounding more, of about the size of the result's own.
    assert mine.abs().mean() <= 2 * plain.abs().mean()
