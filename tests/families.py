"""What tests ask of families that call the transformer once for each guidance branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from dims_jobs import Call, Made, layout_rank

from vaepp_sdk.testing import run_ranks

LONG, SHORT = "a futuristic city at sunset, high resolution", "two cats"
Layout = Mapping[str, int]


@attrs.frozen
class Family:
    """What tests ask of one family.

    Attributes:
        base: the `[call]` table.
        guided: prompts of unlike length in one batch, each with a negative prompt of another length.
        plain: another size, one call a step.
        several: more pictures than prompts.
    """

    base: Call
    guided: Call
    plain: Call
    several: Call

    @property
    def calls(self) -> tuple[Call, ...]:
        """All of them."""
        return self.guided, self.plain, self.several


_COMMON: dict[str, Any] = {"prompt": [LONG], "height": 128, "width": 128, "num_inference_steps": 3, "seed": 7}
_GUIDED: dict[str, Any] = {"prompt": [LONG, SHORT], "negative_prompt": ["blurred", ""]}

QWEN = Family(
    base=_COMMON | {"max_sequence_length": 256},
    guided=_GUIDED | {"true_cfg_scale": 3.0},
    plain={"prompt": [SHORT], "height": 96},
    several={"prompt": [SHORT, LONG], "num_images_per_prompt": 2, "width": 96, "seed": 3},
)
WAN = Family(
    # 64 tokens of video and 32 of text: on two ranks a part of the one is as long as the other.
    base=_COMMON | {"height": 64, "num_frames": 5, "max_sequence_length": 32},
    guided=_GUIDED | {"guidance_scale": 3.0},
    plain={"prompt": [SHORT], "guidance_scale": 1.0, "height": 96},
    several={"prompt": [SHORT, LONG], "num_videos_per_prompt": 2, "width": 96, "seed": 3},
)


def families_rank(
    rank: int, jobs: Sequence[tuple[str, Call, Sequence[Layout], Sequence[Call]]]
) -> list[list[dict[str, Any]]]:
    """Each job's calls on each of its layouts."""
    return [layout_rank(rank, model, layouts, calls, base) for model, base, layouts, calls in jobs]


def run_jobs(
    ranks: int, jobs: Sequence[tuple[str, Call, Sequence[Layout], Sequence[Call]]]
) -> list[list[list[dict[str, Any]]]]:
    """By job and layout, what every rank has."""
    found = run_ranks(ranks, families_rank, jobs, timeout=900, collective=300)
    return [[list(ranks) for ranks in zip(*of_job, strict=True)] for of_job in zip(*found, strict=True)]


def alone(jobs: Sequence[tuple[str, Family]]) -> list[list[Made]]:
    """Each family's calls in one process."""
    found = run_jobs(1, [(model, family.base, [{}], family.calls) for model, family in jobs])
    return [layouts[0][0]["made"] for layouts in found]
