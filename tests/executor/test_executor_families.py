"""Families beyond Z-Image on one rank: plain diffusers, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_qwen_image
import tiny_wan
import torch
from diffusers import DiffusionPipeline
from families import QWEN, WAN
from PIL.Image import Image
from pipeline_jobs import generators, loaded, resolved_for, run


def of_diffusers(model: Path, call: Mapping[str, Any]) -> Any:
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    own = {key: value for key, value in call.items() if key != "seed"}
    return pipe(**own, generator=generators(7, len(call["prompt"])), output_type="pil")[0]


def pixels(images: list[Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_pictures_are_those_of_diffusers(tmp_path: Path) -> None:
    tiny_qwen_image.build(tmp_path)
    resolved = resolved_for(tmp_path, call=dict(QWEN.base))
    executor = loaded(resolved)
    for case in (QWEN.guided, QWEN.plain):
        found = run(executor, resolved, **case)
        assert found.frames == []
        assert pixels(found.images) == pixels(of_diffusers(tmp_path, {**QWEN.base, **case}))


def test_clips_are_those_of_diffusers(tmp_path: Path) -> None:
    tiny_wan.build(tmp_path, newer=True)
    resolved = resolved_for(tmp_path, call=dict(WAN.base))
    executor = loaded(resolved)
    for case in (WAN.guided, WAN.plain):
        found = run(executor, resolved, **case)
        wanted = of_diffusers(tmp_path, {**WAN.base, **case})
        assert found.images == []
        assert [len(clip) for clip in found.frames] == [WAN.base["num_frames"]] * len(case["prompt"])
        assert [pixels(clip) for clip in found.frames] == [pixels(clip) for clip in wanted]
