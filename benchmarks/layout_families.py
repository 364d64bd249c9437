"""What `benchmarks.layouts` asks of each family: a small random checkpoint, and requests that no test makes.

Sizes are odd numbers of patches, so that no sequence divides; each request has another size, some have more
pictures than prompts, and prompts of one batch differ in length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
from vaepp_plugins import tiny_z_image

# The small checkpoints are shared with the tests, which are no package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import tiny_flux
import tiny_flux2
import tiny_qwen_image
import tiny_sd3
import tiny_wan

__all__ = ["FAMILIES", "Family"]

Call = Mapping[str, Any]

LONG = "an old lighthouse on a cliff above a stormy sea, gulls, oil on canvas"
MIDDLE = "three red boats"
SHORT = "fog"


@attrs.frozen(kw_only=True)
class Family:
    """One family.

    Attributes:
        pipeline: its class.
        build: writes a small checkpoint into a folder.
        base: the `[call]` table.
        calls: what the requests replace of it, in their order.
    """

    pipeline: str
    build: Callable[[Path], Any]
    base: Call
    calls: tuple[Call, ...]


def _base(**more: Any) -> Call:
    return {"prompt": [LONG], "num_inference_steps": 3, "seed": 11, **more}


_SIZES: tuple[Call, ...] = (
    {"height": 112, "width": 144},  # 7 x 9 patches
    {"height": 80, "width": 176},
    {"height": 144, "width": 48},
)


def _calls(guided: Call, plain: Call, several: Call, *, negative: bool = True) -> tuple[Call, ...]:
    """Two prompts with guidance, four without, and three pictures of one prompt with guidance."""
    avoided: tuple[Call, ...] = {"negative_prompt": [MIDDLE, ""]}, {}, {"negative_prompt": [LONG]}
    asked: tuple[Call, ...] = (
        {"prompt": [SHORT, LONG], **guided},
        {"prompt": [MIDDLE, LONG, SHORT, "two " + MIDDLE], "seed": 5, **plain},
        {"prompt": [MIDDLE], "seed": 23, **several},
    )
    if negative:
        asked = tuple({**call, **more} for call, more in zip(asked, avoided, strict=True))
    return tuple({**size, **call} for size, call in zip(_SIZES, asked, strict=True))


_PICTURES = {"num_images_per_prompt": 3}
_SCALE, _TRUE_SCALE = {"guidance_scale": 3.5}, {"true_cfg_scale": 3.5}
_FLUX2 = _base(max_sequence_length=37, guidance_scale=1.0, text_encoder_out_layers=tiny_flux2.LAYERS)

FAMILIES: Mapping[str, Family] = {
    "z_image": Family(
        pipeline="ZImagePipeline",
        build=lambda folder: tiny_z_image.build(folder, vae_width=8, sample_size=64, layers=5),
        base=_base(max_sequence_length=128, guidance_scale=0.0),
        calls=_calls(_SCALE | {"cfg_truncation": 0.5}, {}, _SCALE | _PICTURES),
    ),
    "flux": Family(
        pipeline="FluxPipeline",
        build=tiny_flux.build,
        base=_base(max_sequence_length=37, guidance_scale=4.0),
        calls=_calls(_TRUE_SCALE, {}, _TRUE_SCALE | _PICTURES),
    ),
    "sd3": Family(
        pipeline="StableDiffusion3Pipeline",
        build=tiny_sd3.build,
        base=_base(max_sequence_length=37, guidance_scale=1.0),
        calls=_calls(_SCALE, {}, _SCALE | _PICTURES),
    ),
    "flux2": Family(
        pipeline="Flux2Pipeline",
        build=tiny_flux2.build,
        base=_FLUX2,
        calls=_calls(_SCALE, {}, _PICTURES, negative=False),
    ),
    "flux2_klein": Family(
        pipeline="Flux2KleinPipeline",
        build=tiny_flux2.build_klein,
        base=_FLUX2,
        calls=_calls(_SCALE, {}, _SCALE | _PICTURES, negative=False),
    ),
    "qwen_image": Family(
        pipeline="QwenImagePipeline",
        build=tiny_qwen_image.build,
        base=_base(max_sequence_length=256),
        calls=_calls(_TRUE_SCALE, {}, _TRUE_SCALE | _PICTURES),
    ),
    "wan": Family(
        pipeline="WanPipeline",
        build=tiny_wan.build,
        base=_base(num_frames=5, max_sequence_length=37, guidance_scale=1.0),
        calls=_calls(_SCALE, {}, _SCALE | {"num_videos_per_prompt": 3}),
    ),
    "wan_2_2": Family(
        pipeline="WanPipeline",
        build=lambda folder: tiny_wan.build(folder, newer=True),
        base=_base(num_frames=5, max_sequence_length=37, guidance_scale=1.0),
        calls=_calls(_SCALE, {}, _SCALE | {"num_videos_per_prompt": 3}),
    ),
}
