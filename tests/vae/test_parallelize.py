"""`parallelize_vae` itself: groups, arguments that cannot be, arguments that take no effect."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from vae.scenes import error_of, latents, said, tiled
from vae_models import tiny_kl

from vaepp_sdk import parallelize_vae
from vaepp_sdk.testing import run_ranks

WRONG: dict[str, dict[str, Any]] = {
    "no plugin registers the strategy 'TILE'": {"strategy": "TILE"},
    "strategy is None; it must be 'auto' or": {"strategy": None},
    "strategy 'auto' takes no options (found halo)": {"halo": 3},
    "strategy 'patch' has no such option": {"strategy": "patch", "hallo": 3},
    "tile_overlap_factor is 1; it must be below 1": {"strategy": "tile", "tile_overlap_factor": 1.0},
    "timeout is 600; it must be a timedelta above 0": {"timeout": 600},
    "timeout is datetime.timedelta(0)": {"timeout": timedelta(0)},
    "output is 'rank1'": {"output": "rank1"},
    "no plugin registers the VAE class 'Linear'": {"vae": nn.Linear(2, 2)},
}
"""Arguments that cannot be, by the words that say so."""


def play(rank: int) -> dict[str, Any]:
    """The group is ranks 1 and 2 of the job; where rank 1 works alone, nobody looks at what 2 has."""
    group = dist.new_group([1, 2])
    vae = tiled()
    if rank == 0:
        return {"outside": error_of(lambda: parallelize_vae(vae, group=group))}
    with torch.no_grad():
        expected = vae.decode(latents()).sample
        vae.disable_tiling()
        whole = vae.decode(latents()).sample
        vae.enable_tiling()
    everywhere = parallelize_vae(vae, group=group, strategy="tile")
    first = parallelize_vae(vae, group=group, strategy="tile", output="rank0").decode(latents()).sample
    idle: dict[str, Any] = {"strategy": "tile", "output": "sharded", "tile_size": 64}
    blocks = parallelize_vae(vae, group=group, size=1, strategy="shard", row_blocks=2)
    lone = blocks.decode(latents() if rank == 1 else torch.zeros_like(latents())).sample
    plain, told = said(lambda: parallelize_vae(vae, group=group, size=1, **idle))
    small = latents()[..., :4, :4].contiguous()
    quiet = said(lambda: everywhere.decode(latents()))[1]
    times = [said(lambda: everywhere.decode(small))[1] for _ in range(2)]
    return {
        "all": torch.equal(everywhere.decode(latents()).sample, expected),
        "alone": torch.allclose(lone, whole, rtol=0, atol=2e-5 * whole.abs().max()),
        "rank0": torch.equal(first, expected) if first.shape[0] else "empty",
        "twice": error_of(lambda: parallelize_vae(everywhere, group=group)),
        "timeouts": error_of(lambda: parallelize_vae(vae, group=group, timeout=timedelta(hours=rank))),
        "plain": plain is vae,
        "one tile": [quiet, *times],
        "idle": told,
        "only first": said(lambda: parallelize_vae(vae, group=group, size=1, output="rank0"))[1],
    }


@pytest.fixture(scope="module")
def played() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_ranks(3, play)
    return found


def test_a_group_that_is_not_the_world(played: list[dict[str, Any]]) -> None:
    kind, words = played[0]["outside"]
    assert kind == "UnsupportedError"
    assert words.startswith("this rank is not in the group that parallelize_vae was given")
    assert all(seen["all"] and seen["alone"] for seen in played[1:])
    assert [seen["rank0"] for seen in played[1:]] == [True, "empty"]


def test_what_takes_no_effect_on_one_rank_is_told_by_one(played: list[dict[str, Any]]) -> None:
    why = "no effect: one rank does all of the VAE's work, and the VAE is returned as it is."
    assert all(seen["plain"] for seen in played[1:])
    assert [seen["idle"] for seen in played[1:]] == [[f"strategy, output, tile_size take {why}"], []]
    assert [seen["only first"] for seen in played[1:]] == [[f"output takes {why}"], []]


def test_a_picture_of_one_tile_is_said_to_leave_a_rank_idle_once_and_by_one(
    played: list[dict[str, Any]],
) -> None:
    told = "decode of 4 x 4 latents: strategy 'tile' makes 1 piece, so rank 1 has nothing to do"
    fix = "smaller pieces, another strategy or fewer ranks for the VAE would suit this size"
    assert [seen["one tile"] for seen in played[1:]] == [[[], [f"{told}; {fix}"], []], [[], [], []]]


def test_where_there_is_one_rank_only_every_output_but_sharded_is_the_same() -> None:
    outputs: dict[Any, int] = {"rank0": 0, "all": 0, "sharded": 1}
    for given, count in outputs.items():
        vae, told = said(partial(parallelize_vae, tiny_kl(), output=given))
        assert type(vae).__name__ == "AutoencoderKL"
        assert len(told) == count


def test_what_is_wrong_is_refused_on_one_rank_too() -> None:
    vae = tiled()
    for words, some in WRONG.items():
        kind, message = error_of(partial(parallelize_vae, **{"vae": vae, **some}))
        assert (kind, words in message) == ("UnsupportedError", True), message


def test_ranks_differ_or_the_vae_is_parallel_already(played: list[dict[str, Any]]) -> None:
    for seen in played[1:]:
        assert seen["twice"][0] == "UnsupportedError"
        assert seen["twice"][1].startswith("this VAE is parallel already")
        assert seen["timeouts"][0] == "AgreementError"
