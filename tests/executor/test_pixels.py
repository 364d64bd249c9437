"""Pixels made piece by piece are those of the pipeline's own pictures, for every pipeline that has stages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor

from vaepp_sdk.entries import load_object
from vaepp_sdk.pixels import PixelFinish
from vaepp_sdk.registry import default_registry
from vaepp_sdk.stages import PixelStages

STAGES = sorted({str(entry.stages) for entry in default_registry().pipelines.values()})
PIPE = SimpleNamespace(image_processor=VaeImageProcessor(), video_processor=VideoProcessor())


def sample_of(name: str, dtype: torch.dtype, channels: int = 3) -> torch.Tensor:
    """Values beyond the range on both sides, and exact halves between two levels."""
    frames = {"QwenImageStages": (1,), "WanStages": (5,)}.get(name.rpartition(":")[2], ())
    values = torch.randn((2, channels, *frames, 16, 12), generator=torch.Generator().manual_seed(1))
    values[0, 0].view(-1)[:64] = torch.arange(64) / 255 - 0.5
    return values.to(dtype)


def arrays(pictures: Any) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(frame) for one in pictures for frame in (one if isinstance(one, list) else [one])]


@pytest.mark.parametrize("name", STAGES)
def test_pieces_become_the_pipelines_own_pixels(name: str) -> None:
    stages = load_object(name, "test")()
    assert isinstance(stages, PixelStages)
    cases = [(dtype, 3) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    for dtype, channels in [*cases, (torch.float32, 1)]:
        sample = sample_of(name, dtype, channels)
        bands = [stages.to_pixels(PIPE, band.contiguous()) for band in sample.split([5, 4, 7], -2)]
        assert all(band.dtype == torch.uint8 for band in bands)
        joined = torch.cat(bands, -2)
        assert joined.shape == sample.shape
        found, wanted = stages.from_pixels(PIPE, joined), stages.pictures(PIPE, sample)
        assert [type(one) for one in found] == [type(one) for one in wanted]
        for one, other in zip(arrays(found), arrays(wanted), strict=True):
            assert np.array_equal(one, other)


def test_what_is_not_finite_is_seen_before_it_is_a_pixel() -> None:
    stages = load_object("vaepp_plugins.z_image_stages:ZImageStages", "test")()
    finish = PixelFinish(lambda values: stages.to_pixels(PIPE, values))
    values = torch.zeros(1, 3, 4, 6)
    values[0, 0, 1, 2], values[0, 1, 3, 4] = float("nan"), float("-inf")
    made = finish(values, 8, 16)
    assert (finish.bad, finish.region) == (2, "rows 9 to 11, columns 18 to 20")
    assert made[0, 0, 1, 2] == made[0, 1, 3, 4] == 0
    assert (made == 128).sum() == values.numel() - 2
    assert values.isnan().any(), "the piece itself is left alone"
    finish.reset()
    assert (finish.bad, finish.region) == (0, "")
