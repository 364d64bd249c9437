"""Sharded decode and encode of clips on real ranks, against the untiled ones on one rank."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import pytest
import torch
from counted import counted
from shard_cases import Case, check_cases, expect, prepared, run_case
from torch import nn

from vaepp_sdk import UnsupportedError, parallelize_vae
from vaepp_sdk.testing import run_ranks

BF16, F64 = torch.bfloat16, torch.float64
E: Literal["encode"] = "encode"

MIRRORED = {"decoder_spatial_padding_mode": "reflect"}

# Pictures of one frame, clips of several chunks, fewer rows than ranks, columns longer than rows, odd sides.
CASES = [
    Case((6, 5), 1, vae="wan", dtype=F64),
    Case((5, 9), 5, vae="wan", batch=2, output="rank0"),
    Case((7, 4), 3, vae="wan", dtype=F64, output="sharded"),
    Case((9, 8), 3, vae="wan", dtype=BF16),
    Case((1, 2), 2, vae="wan", dtype=F64),
    Case((48, 40), 1, vae="wan", direction=E, dtype=F64),
    Case((33, 61), 9, vae="wan", direction=E, batch=2, output="rank0"),  # no whole number of latents
    Case((40, 16), 17, vae="wan", direction=E, dtype=F64),
    Case((64, 48), 6, vae="wan", direction=E, dtype=BF16),
    Case((40, 72), 5, vae="qwen", direction=E, dtype=BF16),  # seams of one column
    Case((5, 3), 5, vae="wan 2.2", dtype=F64),
    Case((4, 7), 2, vae="wan 2.2", batch=2, output="sharded"),
    Case((80, 32), 13, vae="wan 2.2", direction=E, dtype=F64),
    Case((5, 3), 4, vae="qwen", dtype=F64, prepare="enable_slicing", batch=2),
    Case((3, 6), 1, vae="qwen", output="sharded"),
    Case((24, 41), 9, vae="qwen", direction=E, dtype=F64),
    Case((6, 5), 1, vae="hunyuan", dtype=F64),
    Case((5, 7), 6, vae="hunyuan", batch=2, output="sharded"),  # windows of frames
    Case((7, 4), 4, vae="hunyuan", dtype=BF16),
    Case((33, 61), 5, vae="hunyuan", direction=E, dtype=F64),
    Case((40, 24), 13, vae="hunyuan", direction=E, output="rank0"),
    Case((3, 4), 3, vae="hunyuan 1.5", dtype=F64),
    Case((4, 3), 2, vae="hunyuan 1.5", dtype=BF16),
    Case((48, 80), 5, vae="hunyuan 1.5", direction=E, batch=2, prepare="enable_slicing"),
    Case((5, 3), 2, vae="ltx", batch=2),  # normalises in float32: float64 gains nothing
    Case((4, 7), 3, vae="ltx", dtype=BF16, output="rank0"),
    Case((160, 96), 17, vae="ltx", direction=E),
    Case((4, 6), 4, vae="ltx 2", dtype=F64, arguments={"causal": True}),
    Case((96, 160), 33, vae="ltx 2", direction=E, dtype=F64, output="sharded"),  # windows of frames
    Case((5, 2), 2, vae="ltx 2", dtype=F64, build=MIRRORED),
    Case((3, 4), 3, vae="ltx 2", batch=2, build=MIRRORED),
    Case((64, 96), 9, vae="ltx 2", direction=E, dtype=BF16, arguments={"causal": False}),
    Case((5, 3), 3, vae="cogvideox", dtype=F64),
    Case((4, 6), 7, vae="cogvideox", batch=2),  # three batches of frames
    Case((7, 2), 2, vae="cogvideox", dtype=BF16, output="sharded"),
    Case((40, 24), 9, vae="cogvideox", direction=E, dtype=F64),
    Case((45, 61), 33, vae="cogvideox", direction=E, output="rank0"),
    Case((5, 3), 2, vae="mochi", dtype=F64),
    Case((4, 6), 3, vae="mochi", batch=2),
    Case((5, 5), 2, vae="mochi", dtype=BF16),
    Case((37, 43), 13, vae="mochi", direction=E, batch=2),  # Fourier features are float32 in any dtype
]
BLOCKS = [  # several bands on a rank
    Case((6, 4), 3, vae="wan", dtype=F64, options={"row_blocks": 2}, active=4),
    Case((40, 24), 5, vae="qwen", direction=E, output="rank0", options={"row_blocks": 4}, active=5),
    Case((7, 3), 6, vae="hunyuan", batch=2, options={"row_blocks": 2}, active=6),
    Case((5, 6), 4, vae="cogvideox", dtype=BF16, output="sharded", options={"peak_limit": "1GiB"}, active=3),
]
LONG = [  # bands whose rows travel while they are convolved
    Case((66, 2), 3, vae="wan", dtype=F64),  # and convolutions that compute a row for the next one
    Case((480, 24), 5, vae="wan", direction=E, dtype=F64),
    Case((40, 2), 2, vae="hunyuan 1.5", dtype=F64),
    Case((33, 2), 1, vae="hunyuan", dtype=F64),
    Case((33, 2), 2, vae="ltx 2", dtype=F64, build=MIRRORED),
    Case((35, 2), 4, vae="cogvideox", dtype=F64),
    Case((33, 2), 2, vae="ltx", batch=2),
    Case((33, 2), 2, vae="ltx", build={"timestep_conditioning": False}),
    Case((640, 32), 9, vae="ltx", direction=E),
]
PART = [
    Case((7, 3), 2, vae="wan", size=2, active=2),
    Case((2, 1), 3, vae="wan", active=2, dtype=F64),
]


@pytest.mark.parametrize(
    ("world_size", "cases"), [(2, CASES[::2] + LONG + BLOCKS[:2]), (3, CASES[1::2] + BLOCKS[2:] + PART)]
)
def test_the_result_is_the_untiled_one_up_to_rounding(world_size: int, cases: list[Case]) -> None:
    check_cases(world_size, cases)


def test_one_process_without_a_group_runs_a_clip_in_bands() -> None:
    for case in BLOCKS[:3]:
        case = attrs.evolve(case, active=None)
        report = run_case(0, case, expect(case))
        assert all(value for name, value in report.items() if name != "digest"), (case, report)


class BoomError(Exception):
    pass


def boom(*_: Any) -> None:
    raise BoomError


def fail_and_go_on(rank: int) -> dict[str, bool]:
    """An error half way through a clip on every rank, then a decode of the same VAE; and what is refused."""
    vae, value = prepared(Case((5, 4), 3, vae="wan"))
    wrapped = parallelize_vae(vae, strategy="shard")
    handle = vae.decoder.up_blocks[2].register_forward_pre_hook(boom)
    with pytest.raises(BoomError):
        wrapped.decode(value)
    handle.remove()
    found = {
        "restored": not any("forward" in vars(module) for module in vae.modules()),
        "caches are empty": all(frames is None for frames in vae._feat_map),
    }
    vae.disable_tiling()
    expected = vae.decode(value).sample
    found["right"] = float((wrapped.decode(value).sample - expected).abs().max()) < 2e-5  # rounding
    again = {"row_blocks": 4, "recompute": "always"}
    for options in (again, {"peak_limit": "1KiB"}):
        with counted() as seen, pytest.raises(UnsupportedError):
            parallelize_vae(vae, strategy="shard", **options).decode(value)
        found[f"{options} sent nothing"] = not seen.sent
    vae.decoder.nonlinearity = nn.InstanceNorm3d(8)
    with counted() as seen, pytest.raises(UnsupportedError, match=r"decoder.nonlinearity \(InstanceNorm3d\)"):
        parallelize_vae(vae, strategy="shard").decode(value)
    found["an unknown layer sent nothing"] = not seen.sent
    return found


def test_errors_and_refusals_leave_no_replaced_layer_and_no_cached_frame() -> None:
    for report in run_ranks(2, fail_and_go_on):
        assert all(report.values()), report
