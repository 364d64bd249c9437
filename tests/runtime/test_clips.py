"""Clips from a plain script: real ranks, one request, files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_wan
from families import WAN
from PIL import Image

from vaepp_sdk import Pipeline, VaeppWarning
from vaepp_sdk.pipeline import Result


def test_clips_arrive_frame_by_frame_and_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clips over two ranks, the VAE's work too; as where no package can encode a video."""
    monkeypatch.setattr("vaepp_sdk.resolve.find_spec", {}.get)
    tiny_wan.build(tmp_path / "model")
    spec = {
        "model": {"id": str(tmp_path / "model"), "dtype": "float32", "device": "cpu"},
        "parallel": {"cfg_parallel_size": 2, "vae_patch_parallel_size": 2},
        "vae": {"vae_use_tiling": True, "strategy": "tile"},
        "call": dict(WAN.base) | {"num_inference_steps": 2, "num_videos_per_prompt": 2, "width": 320},
        "output": {"dir": str(tmp_path / "out"), "keep_latents": True},
    }
    with pytest.warns(VaeppWarning, match=r"Clips are saved as folders of PNG files; .*vaepp-sdk\[video\]"):
        pipe = Pipeline.from_spec(spec)
    with pipe:
        result = pipe()
    assert result.images == ()
    assert [len(frames) for frames in result.frames] == [5, 5]
    assert {frame.size for frames in result.frames for frame in frames} == {(320, 64)}
    assert result.frames[0][0].tobytes() != result.frames[0][4].tobytes()
    assert result.frames[0][0].tobytes() != result.frames[1][0].tobytes()
    for frames, file in zip(result.frames, result.files, strict=True):
        saved = sorted(Path(file).glob("frame-*.png"))
        for frame, path in zip(frames, saved, strict=True):
            with Image.open(path) as image:
                assert image.tobytes() == frame.tobytes()
    assert result.latents is not None
    check_resumed(result, monkeypatch)


def check_resumed(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept latents on other ranks: by bands on three, left there, and on one by tiles or whole."""

    def resumed(*settings: str) -> Result:
        assert result.latents is not None
        with pytest.warns(VaeppWarning, match="Clips are saved as folders"):
            return Pipeline.resume(result.latents, ["parallel.cfg_parallel_size=1", *settings])

    bands = resumed(
        "parallel.ring_degree=3",
        "parallel.vae_patch_parallel_size=3",
        "vae.strategy=shard",
        "vae.vae_use_tiling=false",
        "vae.output=sharded",
    )
    # As the one rank of a launcher's job, where nothing is started.
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("vaepp_sdk.pipeline.end_with_launcher", lambda: None)  # the tests' own process
    one_rank = ("parallel.vae_patch_parallel_size=1", "vae.strategy=auto")
    tiles, whole = (resumed(*one_rank, f"vae.vae_use_tiling={tiled}") for tiled in ("true", "false"))
    assert [len(frames) for frames in bands.frames] == [5] * 6, "each rank's piece of each clip"
    places = [re.search(r"-y0-x(\d+)-frames$", file) for file in bands.files]
    assert [place and int(place[1]) for place in places] == [0, 0, 112, 112, 216, 216]
    joined = np.concatenate([np.stack(pixels(bands)[start : start + 10]) for start in (0, 10, 20)], axis=2)
    assert equal(tiles, result)
    assert not equal(whole, result), "tiles are not the whole"
    for one, other in zip(joined, pixels(whole), strict=True):
        # Bands round in another way: equal up to one step of 255.
        assert np.abs(one.astype(int) - other).max() <= 1


def pixels(result: Result) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(frame) for frames in result.frames for frame in frames]


def equal(one: Result, other: Result) -> bool:
    return all(np.array_equal(*pair) for pair in zip(pixels(one), pixels(other), strict=True))
