"""Decode and encode in row blocks: the untiled result, within the limit, on one rank and on several."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from counted import counted
from pipeline_jobs import loaded, resolved_for, run
from shard_cases import Case, Expected, close, expect, landed, prepared, whole
from vae_zoo import build
from vaepp_strategies.shard_options import parse_bytes

from vaepp_sdk import UnsupportedError, VaeppWarning, parallelize_vae
from vaepp_sdk.testing import LiveBytes, run_ranks

BF16, F64 = torch.bfloat16, torch.float64
WIDE = {"widths": (8, 12, 16, 16), "quant": True}


@attrs.frozen
class Job:
    """A case and the options it is run with."""

    case: Case
    options: dict[str, Any]


def blocks(count: int, *sides: int, **case: Any) -> Job:
    return Job(Case((sides[0], sides[1]), **case), {"row_blocks": count})


def again(count: int, *sides: int, **case: Any) -> Job:
    """With all that can be computed again, computed again."""
    return Job(Case((sides[0], sides[1]), **case), {"row_blocks": count, "recompute": "always"})


JOBS = [
    blocks(2, 16, 12),
    blocks(5, 37, 5, dtype=F64),
    blocks(7, 5, 41, batch=2, build=WIDE, output="rank0"),
    blocks(3, 39, 6, dtype=BF16, output="sharded"),
    blocks(4, 9, 33, dtype=F64, vae="flux2"),
    blocks(1000, 17, 11, build={"attention": False}),
    blocks(6, 12, 9, prepare="fuse_qkv_projections"),
    blocks(2, 11, 6, batch=2, prepare="enable_slicing"),
    blocks(3, 3, 2, dtype=F64),
    blocks(4, 1, 1),
    blocks(5, 136, 48, direction="encode", dtype=F64),
    blocks(9, 61, 99, direction="encode", batch=2),  # no whole number of latents
    blocks(4, 203, 40, direction="encode", vae="flux2"),
    blocks(3, 64, 40, direction="encode", dtype=BF16),
    again(3, 21, 5, dtype=F64),
    again(40, 7, 13, batch=2, build=WIDE, dtype=F64, output="rank0"),
    again(3, 16, 8, build=WIDE, dtype=BF16),
    again(5, 61, 99, direction="encode", batch=2),
    again(3, 5, 12, vae="flux2"),
]


def run_job(rank: int, job: Job, expected: Expected) -> dict[str, Any]:
    """What one rank saw of a job."""
    vae, value = prepared(job.case)
    wrapped = parallelize_vae(vae, strategy="shard", output=job.case.output, **job.options)
    call = getattr(wrapped, job.case.direction)
    small = 1 if job.case.direction == "decode" else 8
    call(value[..., :small, :small])  # traces the layers, with tensors that have no memory
    told: list[tuple[int, int]] = []
    wrapped._group.progress = lambda done, total: told.append((done, total))
    before = value.clone()
    with counted() as seen, LiveBytes() as live:
        result = whole(call(value))
    plan = wrapped.last_plan
    slices = job.case.batch if job.case.prepare == "enable_slicing" else 1
    planned = Counter((move.dst, move.nbytes) for move in plan.moves * slices if move.src == rank)
    return {
        "landed": landed(rank, job.case, result, expected.untiled.shape),
        "close": close(result, expected),
        "input": torch.equal(value, before),
        "wire": Counter(seen.sent) == planned,
        "told": not told or told[-1] == (len(plan.steps) + 1, len(plan.steps) + 1),
        # Slices are joined after the last one's plan has ended.
        "peak": slices > 1 or live.peak <= plan.peak_bytes[rank],
        "restored": not any("forward" in vars(module) for module in vae.modules()),
        "no groups": seen.groups == 0,
        "digest": plan.digest,
    }


def run_jobs(rank: int, jobs: list[Job], expected: list[Expected]) -> list[dict[str, Any]]:
    return [run_job(rank, job, one) for job, one in zip(jobs, expected, strict=True)]


def check(by_rank: list[list[dict[str, Any]]], jobs: list[Job]) -> None:
    for job, reports in zip(jobs, zip(*by_rank, strict=True), strict=True):
        assert len({report.pop("digest") for report in reports}) == 1, job
        for rank, report in enumerate(reports):
            assert all(report.values()), (rank, job, report)


def test_one_process_without_a_group_gives_the_untiled_result() -> None:
    assert not torch.distributed.is_initialized()
    check([run_jobs(0, JOBS, [expect(job.case) for job in JOBS])], JOBS)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_the_untiled_result(world_size: int) -> None:
    check(run_ranks(world_size, run_jobs, JOBS, [expect(job.case) for job in JOBS], timeout=600), JOBS)


LARGE = Case((48, 24), output="sharded")
LARGE_ENCODE = Case((256, 192), output="sharded", direction="encode")


@torch.no_grad()
def untiled_peak(case: Case) -> int:
    vae, value = prepared(case)
    with LiveBytes() as live:
        getattr(vae, case.direction)(value)
    return int(live.peak)


def run_limit(rank: int, case: Case, limit: str, expected: Expected) -> tuple[bool, int, int]:
    """Whether the result is right, what this rank held at its peak, and what was predicted."""
    vae, value = prepared(case)
    call = getattr(
        parallelize_vae(vae, strategy="shard", output=case.output, peak_limit=limit), case.direction
    )
    call(value)
    with LiveBytes() as live:
        result = whole(call(value))
    return close(result, expected), live.peak, call.__self__.last_plan.peak_bytes[rank]


# The share of the untiled peak over the number of ranks. These VAEs have 8 channels throughout, so a residual
# block's two activations are a larger part of the untiled peak than in a VAE that is wide where it is large.
@pytest.mark.parametrize(("case", "share"), [(LARGE, 0.55), (LARGE_ENCODE, 0.8)], ids=["decode", "encode"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_limit_is_kept(world_size: int, case: Case, share: float) -> None:
    limit = f"{int(untiled_peak(case) * share / world_size) // 1024}KiB"
    expected = expect(case)
    if world_size == 1:
        found = [run_limit(0, case, limit, expected)]
    else:
        found = run_ranks(world_size, run_limit, case, limit, expected)
    for right, peak, predicted in found:
        assert right
        assert peak <= predicted <= parse_bytes(limit)


def refused(rank: int) -> tuple[str, int, bool]:
    """The message of an impossible limit, the messages sent before it, and whether the named one works."""
    vae, value = prepared(LARGE)
    with counted() as seen, pytest.raises(UnsupportedError) as caught:
        parallelize_vae(vae, strategy="shard", output="sharded", peak_limit="1KiB").decode(value)
    message = str(caught.value)
    smallest = message.rsplit(" ", 1)[1]
    wrapped = parallelize_vae(vae, strategy="shard", output="sharded", peak_limit=smallest)
    wrapped.decode(value)
    return message, len(seen.sent), max(wrapped.last_plan.peak_bytes) <= parse_bytes(smallest)


def test_a_limit_that_cannot_be_kept_is_refused_alike_and_the_smallest_named() -> None:
    for reports in ([refused(0)], run_ranks(2, refused)):
        messages = {message for message, _, _ in reports}
        assert len(messages) == 1
        pattern = r"cannot decode shape .* within peak_limit 1KiB: the smallest that can be kept is \d+KiB"
        assert re.search(pattern, messages.pop())
        assert [sent for _, sent, _ in reports] == [0] * len(reports)
        assert all(works for _, _, works in reports)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"row_blocks": 2, "peak_limit": "1GiB"}, "both set"),
        ({"row_blocks": 0}, "at least 1"),
        ({"peak_limit": ""}, "a number with KiB, MiB or GiB"),
        ({"peak_limit": "6"}, "a number with KiB, MiB or GiB"),
        ({"peak_limit": "6GB"}, "a number with KiB, MiB or GiB"),
        ({"peak_limit": "6 GiB"}, "a number with KiB, MiB or GiB"),
        ({"peak_limit": "-6GiB"}, "a number with KiB, MiB or GiB"),
        ({"peak_limit": "0GiB"}, "a number with KiB, MiB or GiB"),
        ({"peak_limit": 6}, "a string"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], pattern: str) -> None:
    vae, _ = prepared(Case((8, 8)))
    with pytest.raises(UnsupportedError, match=pattern):
        parallelize_vae(vae, strategy="shard", **options)


@pytest.mark.parametrize(("text", "size"), [("6GiB", 6 * 2**30), ("900MiB", 900 * 2**20), ("1.5KiB", 1536)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_one_rank_keeps_the_plain_vae_unless_an_option_gives_it_work() -> None:
    vae, _ = prepared(Case((8, 8)))
    with pytest.warns(VaeppWarning, match="^strategy takes no effect: one rank does all"):
        assert parallelize_vae(vae, strategy="shard") is vae
    with pytest.warns(VaeppWarning, match="^strategy, row_blocks take no effect"):
        assert parallelize_vae(vae, strategy="shard", row_blocks=1) is vae
    assert parallelize_vae(vae, strategy="shard", row_blocks=2) is not vae


@pytest.mark.parametrize("name", ["dc", "hunyuan image", "tiny"])
def test_a_vae_that_is_no_straight_sequence_runs_bands_in_turn(name: str) -> None:
    for case in (Case((9, 6), vae=name, dtype=BF16), Case((64, 40), vae=name, direction="encode")):
        vae, value = prepared(case)
        wrapped = parallelize_vae(vae, strategy="shard", row_blocks=3)
        assert close(whole(getattr(wrapped, case.direction)(value)), expect(case))
        assert len(wrapped.last_plan.windows) == 3
    again = parallelize_vae(vae, strategy="shard", row_blocks=2, recompute="always")
    if name == "hunyuan image":
        with pytest.raises(
            UnsupportedError, match="recompute = 'always' has no effect on encode of AutoencoderKL"
        ):
            again.encode(value)
    else:
        assert close(whole(again.encode(value)), expect(case))
        assert 0 < again.last_plan.extra_work < 0.2


def test_switches_that_change_which_layers_run_may_change_between_calls() -> None:
    vae = build("AutoencoderKLCogVideoX")
    vae.disable_tiling()
    wrapped = parallelize_vae(vae, strategy="shard", row_blocks=2)
    latents = torch.randn(1, vae.config.latent_channels, 7, 6, 4, generator=torch.Generator().manual_seed(3))
    for frames in (2, 3):
        vae.num_latent_frames_batch_size = frames
        with torch.no_grad():
            wanted = vae.decode(latents).sample
        found = wrapped.decode(latents).sample
        assert torch.allclose(found, wanted, rtol=0, atol=2e-5 * wanted.abs().max())


def test_a_pipeline_on_one_rank_takes_the_options(tiny_model: Path) -> None:
    plain = resolved_for(tiny_model)
    blocked = resolved_for(tiny_model, vae={"strategy": "shard", "options": {"row_blocks": 3}})
    assert (blocked.vae_size, blocked.notices) == (1, ())
    wanted = run(loaded(plain), plain).images[0]
    executor = loaded(blocked)
    found = run(executor, blocked).images[0]
    assert executor._decoder is not None
    vae: Any = executor._decoder.vae
    assert vae.last_plan.blocks.count == 3
    apart = np.asarray(wanted, dtype=int) - np.asarray(found, dtype=int)
    assert abs(apart).max() <= 1  # a value between two steps of 8 bits may be rounded either way
