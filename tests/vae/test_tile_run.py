"""Tiled decode and encode on real ranks, against diffusers' own on one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs
import pytest
import torch
from counted import counted
from vae_models import tiny_flux2, tiny_kl

from vaepp_sdk import parallelize_vae
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae.landing import ShardedSample
from vaepp_sdk.vae.plan import Output
from vaepp_sdk.vae.wrapper import ParallelVAE

BF16 = torch.bfloat16
BUILDERS: Mapping[str, Callable[..., Any]] = {"kl": tiny_kl, "flux2": tiny_flux2}


@attrs.frozen
class Case:
    """One decode or encode; `sides` are the input's rows and columns."""

    sides: tuple[int, int]
    batch: int = 1
    size: int | None = None
    output: Output = "all"
    direction: Literal["decode", "encode"] = "decode"
    vae: str = "kl"
    build: Mapping[str, Any] = attrs.field(factory=dict)
    attributes: Mapping[str, Any] = attrs.field(factory=dict)
    options: Mapping[str, Any] = attrs.field(factory=dict)
    slicing: bool = False


# The VAEs here have tiles of 8 latents (64 pixels) unless a case says otherwise, and advance by 6.
CASES = [
    Case((16, 16)),
    Case((16, 16), build={"dtype": BF16}),
    Case((17, 13), batch=2, build={"quant": True}),
    Case((17, 13), batch=2, build={"dtype": BF16}, output="rank0"),
    Case((17, 13), batch=2, slicing=True, output="rank0"),
    Case((11, 19), vae="flux2", output="rank0"),
    Case((11, 19), vae="flux2", build={"dtype": BF16}, output="sharded"),
    Case((13, 7), output="sharded"),  # slivers of 1 latent, one tile wide
    Case((1, 31), output="rank0"),  # thin
    Case((31, 1), build={"dtype": BF16}),
    Case((9, 9), batch=2, output="sharded", slicing=True),
    Case((9, 8), build={"attention": False}, output="rank0"),  # fewer tiles than ranks
    Case((8, 8)),  # tiling does not fire
    Case((5, 7), build={"dtype": BF16, "quant": True}, output="rank0"),
    Case((19, 14), attributes={"tile_overlap_factor": 0.0}, output="rank0"),
    Case((14, 19), attributes={"tile_overlap_factor": 0.5}, build={"dtype": BF16}),
    Case((13, 14), attributes={"tile_overlap_factor": 0.6}, output="rank0"),
    Case((12, 12), attributes={"tile_overlap_factor": 0.8}, output="rank0"),
    Case((23, 12), build={"sample_size": 80}),  # tiles of 10: nothing divides
    Case((23, 12), build={"sample_size": 80, "dtype": BF16}, attributes={"tile_overlap_factor": 0.33}),
    # Only one of the two sizes changed, as people do: a step and a kept part then differ.
    Case((20, 20), attributes={"tile_sample_min_size": 48}, output="rank0"),
    Case((20, 20), attributes={"tile_latent_min_size": 6}, output="rank0"),
    Case((20, 13), options={"tile_size": 32}, output="rank0"),
    Case((20, 13), options={"tile_overlap_factor": 0.375}),
    Case((16, 13), options={"tile_size": 48, "tile_overlap_factor": 0.5}, vae="flux2", output="sharded"),
    Case((16, 13), options={"tile_size": 256}),  # tiles larger than the picture: plain decode
    Case((128, 108), direction="encode"),
    Case((75, 130), direction="encode", build={"dtype": BF16}, batch=2, output="rank0"),
    Case((64, 64), direction="encode", output="rank0"),
    Case((131, 73), direction="encode", build={"quant": True}, slicing=True, batch=2, output="sharded"),
    Case((120, 137), direction="encode", vae="flux2", attributes={"tile_overlap_factor": 0.5}),
    Case((100, 140), direction="encode", build={"sample_size": 80}, output="rank0"),
    Case((140, 75), direction="encode", options={"tile_size": 40, "tile_overlap_factor": 0.2}),
]
PART = [Case((16, 16), size=2), Case((17, 13), size=3, output="rank0", build={"dtype": BF16})]
PART += [Case((13, 19), size=3, output="sharded"), Case((130, 72), size=2, direction="encode", batch=2)]


def prepared(case: Case) -> tuple[Any, torch.Tensor]:
    vae = BUILDERS[case.vae](**case.build)
    vae.enable_tiling()
    vae.use_slicing = case.slicing
    for name, value in case.attributes.items():
        setattr(vae, name, value)
    channels = vae.config.latent_channels if case.direction == "decode" else 3
    torch.manual_seed(7)
    return vae, torch.randn(case.batch, channels, *case.sides, dtype=vae.dtype)


def whole(result: Any, direction: str) -> Any:
    if direction == "decode":
        return result.sample
    posterior = result.latent_dist
    return posterior if isinstance(posterior, ShardedSample) else posterior.parameters


def reference(case: Case) -> torch.Tensor:
    vae, value = prepared(case)
    if "tile_size" in case.options:
        vae.tile_sample_min_size = case.options["tile_size"]
        vae.tile_latent_min_size = case.options["tile_size"] // 8
    vae.tile_overlap_factor = case.options.get("tile_overlap_factor", vae.tile_overlap_factor)
    with torch.no_grad():
        found: torch.Tensor = whole(getattr(vae, case.direction)(value), case.direction)
    return found


def run_case(rank: int, case: Case, expected: torch.Tensor) -> dict[str, Any]:
    vae, value = prepared(case)
    before = {key: tensor.clone() for key, tensor in vae.state_dict().items()}
    wrapped = parallelize_vae(vae, size=case.size, strategy="tile", output=case.output, **case.options)
    told: list[tuple[int, int]] = []
    wrapped._group.progress = lambda done, total: told.append((done, total))
    with counted() as seen:
        result = whole(getattr(wrapped, case.direction)(value), case.direction)
    report = {"groups": seen.groups, "told": told, **traffic(rank, wrapped, case, seen.sent)}
    report["weights"] = all(torch.equal(before[key], tensor) for key, tensor in vae.state_dict().items())
    plan = wrapped.last_plan
    assert plan is not None
    if isinstance(result, ShardedSample):
        report["shape"] = result.shape
        report["boxes"] = [piece.box for piece in result.pieces]
        report["same"] = all(
            torch.equal(piece.tensor, expected[(..., *piece.box.slices)]) for piece in result.pieces
        )
    elif case.output == "rank0" and rank != 0:
        report["same"] = result.shape == (0, *expected.shape[1:]) and result.dtype == expected.dtype
    else:
        report["same"] = torch.equal(result, expected) and result.dtype == expected.dtype
    return report


def traffic(rank: int, wrapped: ParallelVAE, case: Case, sent: list[tuple[int, int]]) -> dict[str, Any]:
    """What was sent, as the wire, the group and the plan count it; slices repeat one plan."""
    plan, counter = wrapped.last_plan, wrapped._group.traffic
    assert plan is not None
    repeats = case.batch if case.slicing else 1
    planned = Counter((move.dst, move.nbytes) for move in plan.moves if move.src == rank)
    return {
        "wire": Counter(sent) == Counter({key: count * repeats for key, count in planned.items()}),
        "bytes": (counter.nbytes, plan.bytes_sent(rank) * repeats),
        "messages": (counter.messages, sum(planned.values()) * repeats),
        "digest": plan.digest,
        "owned": len(plan.owned(rank)) * repeats,
    }


def run_cases(rank: int, cases: list[Case], expected: list[torch.Tensor]) -> list[dict[str, Any]]:
    return [run_case(rank, case, tensor) for case, tensor in zip(cases, expected, strict=True)]


# Each case on two numbers of ranks; `test_tile_any` draws both.
@pytest.mark.parametrize(("world_size", "cases"), [(2, CASES), (3, CASES[::2]), (4, CASES[1::2] + PART)])
def test_bit_identical_to_one_rank(world_size: int, cases: list[Case]) -> None:
    expected = [reference(case) for case in cases]
    by_rank = run_ranks(world_size, run_cases, cases, expected)
    for case, tensor, reports in zip(cases, expected, zip(*by_rank, strict=True), strict=True):
        check(case, tensor, reports)


def check(case: Case, expected: torch.Tensor, reports: tuple[dict[str, Any], ...]) -> None:
    assert len({report["digest"] for report in reports}) == 1, case
    for rank, report in enumerate(reports):
        where = (case, rank, report)
        assert report["same"], where
        assert report["wire"], where
        assert report["bytes"][0] == report["bytes"][1], where
        assert report["messages"][0] == report["messages"][1], where
        assert report["groups"] == 0, where
        assert report["weights"], where
        assert len(report["told"]) == report["owned"], where
    if case.output == "sharded":
        covered = torch.zeros(expected.shape[-2:], dtype=torch.int64)
        for report in reports:
            assert report["shape"] == tuple(expected.shape)
            for box in report["boxes"]:
                covered[box.slices] += 1
        assert bool((covered == 1).all())
