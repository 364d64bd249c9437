"""Layers on parts of a picture: what needs no other rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vaepp_strategies.layers.norm import apply_statistics, chunk_values, merge_moments, moments
from vaepp_strategies.layers.parts import Part, Parts, Scale
from vaepp_strategies.layers.strided import convolve
from vaepp_strategies.layers.swap import swapped

from vaepp_sdk.errors import RunError
from vaepp_sdk.testing import LiveBytes


def exact(values: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    wide = values.double().unflatten(1, (groups, -1)).flatten(2)
    return wide.mean(-1), wide.var(-1, correction=0)


@settings(deadline=None)  # the first example warms kernels up
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99))
def test_merged_moments_are_those_of_the_whole(rows: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(2, 6, sum(rows), 5) * 3 + 1
    parts = values.split(rows, dim=2)
    mean, variance = merge_moments(
        [part.numel() // (2 * 3) for part in parts], [moments(part, 3) for part in parts]
    )
    expected_mean, expected_variance = exact(values, 3)
    # float64 throughout: only its own rounding remains.
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(variance, expected_variance, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_cancels_where_the_mean_is_far_greater_than_the_deviation(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Neighbouring values of the dtype around 1000: a deviation far below the mean.
    step = torch.finfo(dtype).eps * 512
    values = (1000 + step * torch.randint(-3, 4, (1, 8, 40, 30))).to(dtype)
    halves = values.split(20, dim=2)
    mean, variance = merge_moments([1200, 1200], [moments(part, 4) for part in halves])
    expected_mean, expected_variance = exact(values, 4)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(variance, expected_variance, rtol=1e-9, atol=0)
    if dtype is torch.float32:
        # The shortcut that is not taken: a mean of squares less the squared mean loses every digit.
        naive = values.square().mean(-1) - values.mean(-1).square()
        assert float(((naive - step**2 * 4).abs() / (step**2 * 4)).max()) > 1


def test_moments_of_a_large_part_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2, 12, 9, 7)
    whole = moments(values, 6)
    monkeypatch.setattr("vaepp_strategies.layers.norm.CHUNK_VALUES", 300)
    assert torch.equal(moments(values, 6), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_part_is_widened_in_no_more_bytes_than_it_has(dtype: torch.dtype) -> None:
    values = torch.randn(2, 32, 128, 64).to(dtype)
    with LiveBytes() as live:
        moments(values, 8)
    assert chunk_values(values.numel(), dtype.itemsize, 8) * 8 <= values.nbytes
    assert live.peak <= 1.01 * values.nbytes  # and the moments themselves


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_applied_statistics_are_a_group_norm(affine: bool, batch: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 12, eps=1e-6, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    values = (torch.randn(batch, 12, 9, 7) + 2).contiguous(memory_format=layout)
    with torch.no_grad():
        found = apply_statistics(norm, values, *exact(values, 4))
        # float32 rounding of two kernels.
        torch.testing.assert_close(found, norm(values), rtol=1e-5, atol=2e-6)


PARTS = Parts(-2, (Part(0, 12, 0, 8), Part(4, 9, 8, 5)))


def test_cores_follow_the_resolution() -> None:
    assert PARTS.core(1, Scale(1, 1)) == slice(4, 9)
    assert PARTS.core(1, Scale(8, 1)) == slice(32, 72)
    assert PARTS.core(1, Scale(1, 4)) == slice(1, 2)
    assert PARTS.scale(1, 72) == Scale(8, 1)
    assert PARTS.scale(0, 3) == Scale(1, 4)


def test_an_odd_end_is_dropped_or_kept_as_the_layers_do() -> None:
    dropping, keeping = Parts(-2, (Part(0, 21, 0, 21),)), Parts(-2, (Part(0, 21, 0, 21),), rounds_up=True)
    assert dropping.core_length(0, dropping.scale(0, 2)) == 2
    assert keeping.core_length(0, keeping.scale(0, 3)) == 3


@pytest.mark.parametrize("length", [13, 7])
def test_a_layer_whose_rows_are_no_whole_multiple_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"a layer has {length} rows where the input has 12"):
        PARTS.scale(0, length)


def test_a_core_between_a_layers_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="does not align"):
        Parts(-2, (Part(0, 8, 0, 8), Part(5, 8, 8, 5))).core(1, Scale(1, 2))


def doubled(value: torch.Tensor) -> torch.Tensor:
    return value * 2


def test_swapped_forwards_run_inside_and_leave_nothing_behind() -> None:
    layer, value = nn.ReLU(), torch.tensor([-1.0, 2.0])
    before = set(vars(layer))
    with swapped({layer: doubled}):
        assert layer(value).tolist() == [-2.0, 4.0]
    assert layer(value).tolist() == [0.0, 2.0]
    assert set(vars(layer)) == before


def test_swapped_forwards_are_restored_after_an_error() -> None:
    layers = [nn.ReLU(), nn.SiLU()]

    def failing() -> None:
        with swapped(dict.fromkeys(layers, doubled)):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        failing()
    assert not any("forward" in vars(layer) for layer in layers)


def test_one_module_is_not_swapped_twice() -> None:
    first, second = nn.ReLU(), nn.SiLU()
    with swapped({second: doubled}):
        inside = vars(second)["forward"]
        with (
            pytest.raises(RunError, match="SiLU already runs a replaced forward"),
            swapped(_both(first, second)),
        ):
            pass
        assert "forward" not in vars(first)
        assert vars(second)["forward"] is inside


def _both(first: nn.Module, second: nn.Module) -> dict[nn.Module, Any]:
    return {first: doubled, second: doubled}


@pytest.mark.parametrize("columns", [3, 4, 5])
@pytest.mark.parametrize("made", [nn.Conv2d, nn.Conv3d])
def test_strided_convolutions_are_right_where_one_column_comes_out(made: Any, columns: int) -> None:
    torch.manual_seed(0)
    layer = made(8, 8, 3, stride=2, padding=1).to(torch.bfloat16).requires_grad_(False)
    flat = made is nn.Conv2d
    shape, padding = ((1, 8, 33, columns), (1, 0)) if flat else ((1, 8, 3, 33, columns), (0, 1, 0))
    values = torch.randn(shape, dtype=torch.bfloat16)
    found = convolve(layer, values, padding)
    wide = layer.float()
    plain = torch.nn.functional.conv2d if flat else torch.nn.functional.conv3d
    expected = plain(values.float(), wide.weight, wide.bias, 2, padding)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=2**-8)  # one rounding to bfloat16
