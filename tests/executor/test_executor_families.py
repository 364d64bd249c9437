"""Families beyond Z-Image against plain diffusers: bit for bit on one rank, and with VAE PP on two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tiny_wan
import torch
from diffusers import DiffusionPipeline, Flux2Pipeline
from families import CFG, FLUX2, KLEIN, LONG, QWEN, SHORT, ULYSSES, WAN, Family
from PIL.Image import Image
from pipeline_jobs import generators, loaded, resolved_for, run

from vaepp_sdk.testing import run_ranks

PICTURES: Mapping[str, Family] = {"qwen": QWEN, "flux2": FLUX2, "klein": KLEIN}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each family whose pictures are compared."""
    folder = tmp_path_factory.mktemp("families")
    for name, family in PICTURES.items():
        family.build(folder / name)
    return folder


def of_diffusers(model: Path, call: Mapping[str, Any], tiled: bool = False) -> Any:
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if tiled:
        pipe.vae.enable_tiling()
    own = {key: value for key, value in call.items() if key != "seed"}
    return pipe(**own, generator=generators(7, len(call["prompt"])), output_type="pil")[0]


def pixels(images: list[Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_those_of_diffusers(folder: Path, name: str) -> None:
    family = PICTURES[name]
    resolved = resolved_for(folder / name, call=dict(family.base))
    executor = loaded(resolved)
    for case in (family.guided, family.plain):
        found = run(executor, resolved, **case)
        assert found.frames == []
        assert pixels(found.images) == pixels(of_diffusers(folder / name, {**family.base, **case}))


def test_clips_are_those_of_diffusers(tmp_path: Path) -> None:
    tiny_wan.build(tmp_path, newer=True)
    resolved = resolved_for(tmp_path, call=dict(WAN.base))
    executor = loaded(resolved)
    for case in (WAN.guided, WAN.plain):
        found = run(executor, resolved, **case)
        wanted = of_diffusers(tmp_path, {**WAN.base, **case})
        assert found.images == []
        assert [len(clip) for clip in found.frames] == [WAN.base["num_frames"]] * len(wanted)
        assert [pixels(clip) for clip in found.frames] == [pixels(clip) for clip in wanted]


def test_a_prompt_may_be_written_anew(folder: Path) -> None:
    """The text encoder writes it before it encodes it, in the same stage: later it is not there any more."""
    resolved = resolved_for(folder / "flux2", call=dict(FLUX2.base))
    executor = loaded(resolved)
    wanted = run(executor, resolved, prompt=[SHORT])
    with patch.object(Flux2Pipeline, "upsample_prompt", return_value=[SHORT]) as asked:
        found = run(executor, resolved, prompt=[LONG], caption_upsample_temperature=0.5)
    assert asked.call_args.args == ([LONG],)
    assert asked.call_args.kwargs["temperature"] == 0.5
    assert pixels(found.images) == pixels(wanted.images)


Spread = tuple[str, Mapping[str, int], str, Mapping[str, Any]]

WIDE = {"width": 288}
"""More than a tile of Qwen-Image's VAE, which no config makes smaller."""

SPREAD: Mapping[int, tuple[Spread, ...]] = {
    2: (
        ("flux2", {ULYSSES: 2}, "tile", {}),
        ("flux2", {ULYSSES: 2}, "patch", {}),
        ("klein", {CFG: 2}, "tile", {}),
        ("klein", {CFG: 2}, "shard", {}),
    ),
    4: (
        ("qwen", {ULYSSES: 2, CFG: 2}, "tile", WIDE),
        ("qwen", {ULYSSES: 2, CFG: 2}, "shard", {}),
    ),
}
"""By ranks, which all share the VAE: models, layouts with the latents of one process, strategies, sizes."""


def spread_rank(rank: int, ranks: int, folder: str) -> list[list[Image]]:
    """Guided pictures of each case."""
    found = []
    for name, layout, strategy, size in SPREAD[ranks]:
        family = PICTURES[name]
        resolved = resolved_for(
            f"{folder}/{name}",
            parallel={**layout, "vae_patch_parallel_size": ranks},
            vae={"strategy": strategy},
            call=dict(family.base),
        )
        found.append(run(loaded(resolved), resolved, **{**family.guided, **size}).images)
    return found


@pytest.mark.parametrize("ranks", SPREAD)
def test_packed_latents_are_decoded_on_all_ranks(folder: Path, ranks: int) -> None:
    first, *others = run_ranks(ranks, spread_rank, ranks, str(folder))
    assert not any(images for rank in others for images in rank)
    for (name, _, strategy, size), images in zip(SPREAD[ranks], first, strict=True):
        family = PICTURES[name]
        call = {**family.base, **family.guided, **size}
        wanted = of_diffusers(folder / name, call, strategy == "tile")
        if strategy == "tile":
            assert pixels(wanted) != pixels(of_diffusers(folder / name, call)), "tiles must be in play"
            assert pixels(images) == pixels(wanted)
        off = np.abs(np.stack(images).astype(float) - np.stack(wanted))
        assert strategy != "shard" or off.max() <= 1  # a value next to a half may round the other way
        assert off.mean() < 0.005 * 255
