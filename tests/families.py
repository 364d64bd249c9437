"""The families beyond Z-Image: small checkpoints, requests, and the layouts they are tried on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import tiny_flux
import tiny_flux2
import tiny_qwen_image
import tiny_sd3
import tiny_wan
from dims_jobs import Call

LONG, SHORT = "a futuristic city at sunset, high resolution", "two cats"
CFG, TENSOR, PIPELINE, DATA, ULYSSES, RING = (
    "cfg_parallel_size",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "ulysses_degree",
    "ring_degree",
)
ALL = ((CFG,), (TENSOR,), (PIPELINE,), (DATA,), (ULYSSES,), (RING,))
Layout = Mapping[str, int]
Products = tuple[tuple[str, ...], ...]


@attrs.frozen(kw_only=True)
class Family:
    """What is asked of one family.

    Attributes:
        build: writes its checkpoint into a folder.
        base: the `[call]` table, with the first of the prompts of `guided`.
        guided: prompts of unlike length in one batch; negative ones are of other lengths.
        plain: the first of them without guidance.
        several: another size, and more pictures than prompts.
        two: what is tried on 2 ranks.
        four: what is tried on 4.
        exact: the dimensions that leave every sum as it is.
    """

    build: Callable[[Path], None]
    base: Call
    guided: Call
    plain: Call
    several: Call
    two: Products
    four: Products
    exact: frozenset[str] = frozenset({CFG, PIPELINE, ULYSSES})

    @property
    def calls(self) -> tuple[Call, ...]:
        """All requests."""
        return self.guided, self.plain, self.several


_COMMON: dict[str, Any] = {"prompt": [LONG], "height": 128, "width": 128, "num_inference_steps": 3, "seed": 7}
_GUIDED: dict[str, Any] = {"prompt": [LONG, SHORT], "negative_prompt": ["blurred", ""]}
_SEVERAL: dict[str, Any] = {"prompt": [SHORT, LONG], "num_images_per_prompt": 2, "width": 80, "seed": 3}

FLUX = Family(
    build=tiny_flux.build,
    base=_COMMON | {"max_sequence_length": 48, "guidance_scale": 4.0},
    guided=_GUIDED | {"true_cfg_scale": 3.0},
    plain={},
    several=_SEVERAL | {"prompt_2": [LONG, SHORT]},
    two=ALL,
    four=((PIPELINE, TENSOR), (CFG, ULYSSES), (ULYSSES, RING), (DATA, RING)),
)
SD3 = Family(
    build=tiny_sd3.build,
    base=_COMMON | {"max_sequence_length": 48},
    guided=_GUIDED | {"guidance_scale": 4.0},
    plain={"guidance_scale": 1.0},
    several=_SEVERAL | {"guidance_scale": 2.0},
    two=ALL,
    four=((CFG, PIPELINE), (TENSOR, ULYSSES), (PIPELINE, RING), (ULYSSES, RING)),
    exact=frozenset({PIPELINE, ULYSSES}),  # both branches are in one batch
)
_FLUX2: dict[str, Any] = _COMMON | {
    "max_sequence_length": 48,
    "text_encoder_out_layers": tiny_flux2.LAYERS,
}
FLUX2 = Family(
    build=tiny_flux2.build,
    base=_FLUX2,
    guided={"prompt": [LONG, SHORT], "guidance_scale": 4.0},
    plain={"guidance_scale": 1.0},
    several=_SEVERAL,
    two=((TENSOR,), (ULYSSES,)),
    four=((PIPELINE, TENSOR), (DATA, RING)),
)
KLEIN = Family(
    build=tiny_flux2.build_klein,
    base=_FLUX2,
    guided={"prompt": [LONG, SHORT], "guidance_scale": 3.0},
    plain={"guidance_scale": 1.0},
    several=_SEVERAL | {"guidance_scale": 2.0},
    two=ALL,
    four=((CFG, PIPELINE), (TENSOR, ULYSSES)),
)
DISTILLED = Family(
    build=partial(tiny_flux2.build_klein, distilled=True),
    base=_FLUX2,
    guided={"prompt": [LONG, SHORT]},
    plain={"guidance_scale": 1.0},
    several=_SEVERAL,
    two=((CFG,),),
    four=(),
)
QWEN = Family(
    build=tiny_qwen_image.build,
    base=_COMMON | {"max_sequence_length": 256},
    guided=_GUIDED | {"true_cfg_scale": 3.0},
    plain={},
    several=_SEVERAL | {"width": 96},
    two=ALL,
    four=((CFG, PIPELINE), (DATA, TENSOR), (PIPELINE, ULYSSES), (ULYSSES, RING)),
)
WAN = Family(
    build=tiny_wan.build,
    # 64 tokens of video and 32 of text: on two ranks a part of the one is as long as the other.
    base=_COMMON | {"height": 64, "num_frames": 5, "max_sequence_length": 32},
    guided=_GUIDED | {"guidance_scale": 3.0},
    plain={"guidance_scale": 1.0},
    several={"prompt": [SHORT, LONG], "num_videos_per_prompt": 2, "width": 96, "seed": 3},
    two=ALL,
    four=((CFG, ULYSSES), (ULYSSES, RING)),
)
NEWER = attrs.evolve(
    WAN,
    build=partial(tiny_wan.build, newer=True),
    two=((CFG,), (TENSOR,), (PIPELINE,), (ULYSSES,), (RING,)),
    four=((CFG, PIPELINE), (RING, TENSOR)),
)

FAMILIES: Mapping[str, Family] = {
    "flux": FLUX,
    "sd3": SD3,
    "flux2": FLUX2,
    "klein": KLEIN,
    "distilled": DISTILLED,
    "qwen": QWEN,
    "wan": WAN,
    "newer": NEWER,
}
