"""Sizes that a pipeline cannot make are refused before a rank starts, by the model's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from spec_models import VAE, model_folder

from vaepp_sdk.errors import SpecError, UnsupportedError
from vaepp_sdk.registry import default_registry
from vaepp_sdk.request import make_request
from vaepp_sdk.resolve import resolve
from vaepp_sdk.spec import PipelineSpec

WAN_VAE = {"temperal_downsample": [False, True, True]}
"""Published checkpoints are older than the keys that say how much it compresses."""
NEWER_WAN_VAE = {"scale_factor_spatial": 16, "scale_factor_temporal": 4}


def faults(tmp_path: Path, pipeline: str, configs: Mapping[str, Any], **call: Any) -> list[str]:
    model = model_folder(tmp_path / "model", pipeline, **configs)
    spec = PipelineSpec.load({"model": {"id": str(model)}, "call": {"prompt": "a", **call}})
    try:
        resolve(spec, default_registry())
    except SpecError as error:
        return [str(fault) for fault in error.faults]
    return []


def multiple(name: str, found: int, step: int, below: int) -> str:
    near = f"{below} and {below + step} are nearest"
    return f"$.call.{name}: found {found}; multiples of {step} work; {near}"


@pytest.mark.parametrize(
    ("pipeline", "configs", "step"),
    [
        ("ZImagePipeline", {}, 16),
        ("ZImagePipeline", {"vae": {"block_out_channels": [32, 64]}}, 4),
        ("FluxPipeline", {"vae": VAE}, 16),
        ("Flux2KleinPipeline", {"vae": VAE}, 16),
        ("StableDiffusion3Pipeline", {"transformer": {"patch_size": 2}}, 16),
        ("StableDiffusion3Pipeline", {"transformer": {"patch_size": 4}}, 32),
        ("QwenImagePipeline", {"vae": {"temperal_downsample": [False, True, True]}}, 16),
        ("WanPipeline", {"transformer": {"patch_size": [1, 2, 2]}, "vae": WAN_VAE}, 16),
        ("WanPipeline", {"transformer": {"patch_size": [1, 2, 2]}, "vae": NEWER_WAN_VAE}, 32),
    ],
)
def test_sides_are_multiples_of_what_the_model_compresses(
    pipeline: str, configs: Mapping[str, Any], step: int, tmp_path: Path
) -> None:
    fits = 512 // step * step
    found = faults(tmp_path / "off", pipeline, configs, height=fits + step // 2, width=fits - 1)
    assert found == [
        multiple("height", fits + step // 2, step, fits),
        multiple("width", fits - 1, step, fits - step),
    ]
    assert faults(tmp_path / "fit", pipeline, configs, height=fits, width=fits + step) == []


def test_clips_have_one_frame_and_groups_of_more(tmp_path: Path) -> None:
    wan = {"transformer": {"patch_size": [1, 2, 2]}, "vae": WAN_VAE}
    assert faults(tmp_path / "off", "WanPipeline", wan, num_frames=80) == [
        "$.call.num_frames: found 80; 1, 5, 9 and so on work; 77 and 81 are nearest"
    ]
    assert faults(tmp_path / "none", "WanPipeline", wan, num_frames=0) == [
        "$.call.num_frames: found 0; 1, 5, 9 and so on work; 1 is nearest"
    ]
    assert faults(tmp_path / "fit", "WanPipeline", wan, num_frames=81, height=480, width=832) == []


def test_each_of_many_calls_and_each_request_is_told_where_it_stands(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    calls = [{"prompt": "a", "height": 500}, {"height": 512}, {"width": 8}]
    with pytest.raises(SpecError) as caught:
        resolve(PipelineSpec.load({"model": {"id": str(model)}, "call": calls}), default_registry())
    assert [fault.path for fault in caught.value.faults] == ["$.call[0].height", "$.call[2].width"]
    spec = PipelineSpec.load({"model": {"id": str(model)}, "call": {"prompt": "a"}}, ["call.height=512"])
    resolved = resolve(spec, default_registry())
    with pytest.raises(SpecError, match=r"request 3: 1 fault\n  \$\.call\.height: found 500; multiples"):
        make_request(resolved, {"height": 500}, 3, save=False)
    assert make_request(resolved, {"height": 496}, 3, save=False).call["height"] == 496


def test_a_model_that_does_not_say_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"do not say which height works \(KeyError: 'block_out"):
        faults(tmp_path, "ZImagePipeline", {"vae": {"other": 1}})
