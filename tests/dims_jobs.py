"""Runs requests on many layouts in one launch and keeps what a picture is made of, before any rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import torch
from pipeline_jobs import CALL, loaded, resolved_for, run
from torch.distributed import distributed_c10d

from vaepp_sdk.decoding import Decoder
from vaepp_sdk.executor import Executor
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.testing import run_ranks

LONG, MIDDLE, SHORT = "a futuristic city at sunset, high resolution, 8k", "two dogs on a beach", "cats"
Call = Mapping[str, Any]

PLAIN: Call = {"prompt": [LONG]}
GUIDED: Call = {"prompt": [LONG, SHORT], "guidance_scale": 4.0, "negative_prompt": [SHORT, ""]}
"""Prompts of unlike length in one batch force the attention mask, in either half."""
TRUNCATED: Call = {
    "prompt": [LONG, SHORT, MIDDLE],
    "guidance_scale": 4.0,
    "cfg_normalization": True,
    "cfg_truncation": 0.3,
    "height": 96,
}
"""Its first steps run a batch of 6, its last ones a batch of 3."""
SEVERAL: Call = {"prompt": [SHORT, LONG], "num_images_per_prompt": 2, "width": 80, "seed": 3}
CASES = (PLAIN, GUIDED, TRUNCATED, SEVERAL)

TOLERANCE = 5e-6
"""Of pictures in [0, 1] in float32, where ranks round in another order than one process does."""


@attrs.define
class Made:
    """What one rank has of one request: latents as the VAE is given them, and pictures in [0, 1]."""

    latents: torch.Tensor
    pictures: torch.Tensor


def made(executor: Executor, resolved: Resolved, call: Call) -> Made:
    """Run one request and look at what goes through the decoder."""
    seen: list[torch.Tensor] = []
    decode = Decoder.decode

    def spy(self: Decoder, latents: torch.Tensor) -> Any:
        pieces = decode(self, latents)
        seen.extend((latents, pieces[0].tensor))
        return pieces

    with patch.object(Decoder, "decode", spy):
        run(executor, resolved, **call)
    latents, sample = seen
    return Made(latents, (sample / 2 + 0.5).clamp(0, 1))


def layout_rank(
    rank: int, model: str, layouts: Sequence[Mapping[str, int]], calls: Sequence[Call], base: Call = CALL
) -> list[dict[str, Any]]:
    """Run the calls on each layout; every rank decodes everything.

    Args:
        rank: this rank.
        model: the checkpoint.
        layouts: the `[parallel]` tables.
        calls: what replaces arguments of `base`.
        base: the `[call]` table.
    """
    found = []
    for sizes in layouts:
        before = len(distributed_c10d._world.pg_map)
        resolved = resolved_for(model, parallel=dict(sizes), vae={"output": "all"}, call=dict(base))
        executor = loaded(resolved)
        made_groups = len(distributed_c10d._world.pg_map) - before
        results = [made(executor, resolved, call) for call in calls]
        found.append(
            {
                "made": results,
                "groups": made_groups,
                "groups_in_calls": len(distributed_c10d._world.pg_map) - before - made_groups,
                "weights": {
                    name: value.numel() for name, value in executor._pipe.transformer.named_parameters()
                },
            }
        )
    return found


def alone(model: Path, calls: Sequence[Call] = CASES) -> list[Made]:
    """The calls in one process."""
    found: list[Made] = run_ranks(1, layout_rank, str(model), [{}], calls)[0][0]["made"]
    return found


def on(ranks: int, model: Path, *layouts: Mapping[str, int], calls: Sequence[Call] = CASES) -> list[Any]:
    """What each layout made: by layout, what every rank has."""
    found = run_ranks(ranks, layout_rank, str(model), layouts, calls, timeout=900, collective=300)
    return [list(of_layout) for of_layout in zip(*found, strict=True)]


def check(everyone: Sequence[Mapping[str, Any]], wanted: Sequence[Made], *, exact: bool = False) -> None:
    """All ranks hold the same pictures, and they are those of one process; calls made no process group."""
    assert not any(rank["groups_in_calls"] for rank in everyone), "a call created a process group"
    for index, whole in enumerate(wanted):
        first = everyone[0]["made"][index]
        for rank in everyone:
            assert torch.equal(rank["made"][index].latents, first.latents), "ranks hold different latents"
            assert torch.equal(rank["made"][index].pictures, first.pictures), "ranks hold different pictures"
        if exact:
            assert torch.equal(first.latents, whole.latents), (
                index,
                difference(first.latents, whole.latents),
            )
            assert torch.equal(first.pictures, whole.pictures)
        assert difference(first.pictures, whole.pictures) <= TOLERANCE, index
        assert float(whole.pictures.std()) > 0.1, "a flat picture would agree with anything"


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())
