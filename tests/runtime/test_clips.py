"""Clips from a plain script: real ranks, one request, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_wan
from families import WAN
from PIL import Image

from vaepp_sdk import Pipeline, VaeppWarning


def test_clips_arrive_frame_by_frame_and_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clips over two ranks, the VAE's work too; as where no package can encode a video."""
    monkeypatch.setattr("vaepp_sdk.resolve.find_spec", {}.get)
    tiny_wan.build(tmp_path / "model")
    spec = {
        "model": {"id": str(tmp_path / "model"), "dtype": "float32", "device": "cpu"},
        "parallel": {"cfg_parallel_size": 2, "vae_patch_parallel_size": 2},
        "vae": {"vae_use_tiling": True},
        "call": dict(WAN.base) | {"num_inference_steps": 2, "num_videos_per_prompt": 2},
        "output": {"dir": str(tmp_path / "out")},
    }
    with pytest.warns(VaeppWarning, match=r"Clips are saved as folders of PNG files; .*vaepp-sdk\[video\]"):
        pipe = Pipeline.from_spec(spec)
    with pipe:
        result = pipe()
    assert result.images == ()
    assert [len(frames) for frames in result.frames] == [5, 5]
    assert {frame.size for frames in result.frames for frame in frames} == {(128, 64)}
    assert result.frames[0][0].tobytes() != result.frames[0][4].tobytes()
    assert result.frames[0][0].tobytes() != result.frames[1][0].tobytes()
    for frames, file in zip(result.frames, result.files, strict=True):
        saved = sorted(Path(file).glob("frame-*.png"))
        for frame, path in zip(frames, saved, strict=True):
            with Image.open(path) as image:
                assert image.tobytes() == frame.tobytes()
