"""The vectorised blend against diffusers' own loops."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from vaepp_strategies.blend import blend_into, blend_weights

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EXTENTS = [1, 2, 3, 7, 13, 64, 97, 255]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [-2, -1])
def test_same_bits_as_the_loop(dtype: torch.dtype, dim: int) -> None:
    generator = torch.Generator().manual_seed(1)
    loop = AutoencoderKL.blend_v if dim == -2 else AutoencoderKL.blend_h
    for extent in EXTENTS:
        shape = (2, 3, extent + 5, 11) if dim == -2 else (2, 3, 11, extent + 5)
        # Values over many powers of two, so that a missing rounding cannot hide.
        earlier, later = (
            (torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp2() * 9)
            for _ in range(2)
        )
        earlier, later = earlier.to(dtype), later.to(dtype)
        expected = loop(None, earlier.clone(), later.clone(), extent)
        found = later.clone()
        blend_into(earlier.narrow(dim, earlier.shape[dim] - extent, extent), found, dim)
        assert torch.equal(found, expected), (dtype, extent)
        assert not torch.equal(found, later)


def test_same_bits_in_channels_last() -> None:
    earlier, later = torch.randn(2, 1, 3, 9, 8)
    later = later.contiguous(memory_format=torch.channels_last)
    expected = AutoencoderKL.blend_v(None, earlier.clone(), later.clone(), 7)
    blend_into(earlier[:, :, -7:], later, -2)
    assert torch.equal(later, expected)


def test_the_later_tile_outside_the_blend_is_untouched() -> None:
    earlier, later = torch.randn(1, 2, 4, 6), torch.randn(1, 2, 10, 6)
    before = later.clone()
    blend_into(earlier, later, -2)
    assert torch.equal(later[:, :, 4:], before[:, :, 4:])


def test_special_values_spread_as_in_the_loop() -> None:
    earlier = torch.tensor([float("inf"), float("nan"), 1.0, -0.0]).view(1, 1, 1, 4).expand(1, 1, 3, 4)
    later = torch.zeros(1, 1, 3, 4)
    expected = AutoencoderKL.blend_v(None, earlier.clone(), later.clone(), 3)
    blend_into(earlier, later, -2)
    assert torch.equal(later.isnan(), expected.isnan())
    assert torch.equal(later.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_rounded_once_to_the_type_of_the_multiplication(dtype: torch.dtype) -> None:
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    before, after = blend_weights(7, torch.empty(0, dtype=dtype))
    assert before.dtype == after.dtype == computed
    assert before.tolist() == torch.tensor([1 - y / 7 for y in range(7)], dtype=computed).tolist()
    assert after.tolist() == torch.tensor([y / 7 for y in range(7)], dtype=computed).tolist()
