"""`deterministic = "reference"` on real ranks: the untiled decode and encode, bit by bit."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from counted import counted
from shard_cases import Case, arguments, landed, prepared, whole
from torch import nn
from vaepp_strategies.layers.kernels import KernelCheck
from vaepp_strategies.layers.reference import channel_shares

from vaepp_sdk import UnsupportedError, VaeppWarning, parallelize_vae
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae.landing import ShardedSample

BF16, F64 = torch.bfloat16, torch.float64
WIDE: dict[str, Any] = {"widths": (32, 64, 64, 64)}

SHORTCUTS: dict[str, Any] = {"widths": (8, 16, 16, 24), "timestep_conditioning": False}
E: Literal["encode"] = "encode"

CASES = [
    Case((37, 11), batch=2),
    Case((37, 24), build=WIDE),
    Case((21, 45), build=WIDE, dtype=BF16, output="rank0"),
    Case((30, 31), build={"attention": False}, output="sharded"),
    Case((33, 17), vae="flux2", batch=2, dtype=BF16),
    Case((40, 30), vae="tiny", output="rank0"),
    Case((20, 20), build={"quant": True}, prepare="enable_tiling"),
    Case((24, 18), batch=2, prepare="enable_slicing"),
    Case((303, 140), direction=E, build=WIDE, dtype=BF16),
    Case((237, 301), direction=E, batch=2, output="rank0"),
    Case((137, 140), direction=E, vae="flux2", output="sharded"),
    Case((303, 135), direction=E, vae="tiny", batch=2),
    Case((13, 12), vae="hunyuan image"),
    Case((24, 18), vae="hunyuan image", batch=2, dtype=BF16, output="rank0"),
    Case((72, 48), vae="hunyuan image", direction=E),
    Case((40, 31), vae="dc", batch=2),
    Case((40, 32), vae="dc", dtype=BF16, output="sharded"),
    Case((64, 96), vae="dc", direction=E, batch=2),
]
# Float32 clips that are alone and small run whole on every rank; two of them, and bfloat16, run on bands.
CLIPS = [
    Case((7, 4), 3, vae="wan"),
    Case((5, 6), 3, vae="wan", batch=2, output="rank0"),
    Case((9, 4), 3, vae="wan", dtype=BF16, build={"width": 24}),  # its time convolutions run whole
    Case((33, 61), 9, vae="wan", direction=E, batch=2, output="sharded"),  # no whole number of latents
    Case((4, 7), 3, vae="wan 2.2", batch=2),
    Case((80, 32), 9, vae="wan 2.2", direction=E, dtype=BF16),
    Case((5, 3), 4, vae="qwen", batch=2),
    Case((24, 41), 9, vae="qwen", direction=E, dtype=BF16, output="rank0"),
    Case((5, 7), 6, vae="hunyuan", batch=2, output="sharded"),  # windows of frames
    Case((7, 4), 4, vae="hunyuan", dtype=BF16),
    Case((33, 61), 5, vae="hunyuan", direction=E),
    Case((7, 5), 2, vae="hunyuan 1.5", dtype=BF16),
    Case((48, 80), 5, vae="hunyuan 1.5", direction=E, dtype=BF16),
    Case((5, 3), 2, vae="ltx", batch=2, build=SHORTCUTS),
    Case((4, 7), 3, vae="ltx", dtype=BF16, output="rank0"),
    Case((160, 96), 17, vae="ltx", direction=E, batch=2),
    Case((5, 3), 2, vae="ltx 2", batch=2, build={"decoder_spatial_padding_mode": "reflect"}),
    Case((96, 160), 33, vae="ltx 2", direction=E, dtype=BF16),  # windows of frames
    Case((4, 6), 5, vae="cogvideox", batch=2),
    Case((5, 7), 3, vae="cogvideox", dtype=BF16, output="sharded"),
    Case((45, 61), 17, vae="cogvideox", direction=E, batch=2),
    Case((5, 3), 2, vae="mochi"),
    Case((4, 6), 3, vae="mochi", batch=2, output="rank0"),
    Case((37, 43), 7, vae="mochi", direction=E, batch=2),
]
ALONE = [
    Case((3, 2), active=1),  # all layers too small for bands
    Case((90, 1), active=1),  # one latent wide
    Case((17, 18), direction=E, dtype=BF16, active=1),
    Case((5, 4), 1, vae="hunyuan", active=1),
]


def untiled(case: Case) -> torch.Tensor:
    vae, value = prepared(case)
    vae.disable_tiling()
    with torch.no_grad():
        result: torch.Tensor = whole(getattr(vae, case.direction)(value, **arguments(case)))
    return result


def run_case(rank: int, case: Case) -> dict[str, Any]:
    # Here, not in the test's own process: threads decide where kernels cut their sums.
    expected = untiled(case)
    vae, value = prepared(case)
    wrapped = parallelize_vae(
        vae, size=case.size, output=case.output, strategy="shard", deterministic="reference"
    )
    told: list[tuple[int, int]] = []
    wrapped._group.progress = lambda done, total: told.append((done, total))
    with counted() as seen, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "(de|en)code of .* nothing to do")  # small pictures
        result = whole(getattr(wrapped, case.direction)(value, **arguments(case)))
    plan, slices = wrapped.last_plan, case.batch if case.prepare == "enable_slicing" else 1
    planned = Counter((move.dst, move.nbytes) for move in plan.moves * slices if move.src == rank)
    progress = [(done + 1, plan.exchanges + 1) for done in range(plan.exchanges + 1)] * slices
    return {
        "landed": landed(rank, case, result, expected.shape),
        "equal": equal(result, expected),
        "wire": Counter(seen.sent) == planned,
        "told": told == (progress if plan.owned(rank) else []),
        "restored": not any("forward" in vars(module) for module in vae.modules()),
        "no groups": seen.groups == 0,
        "active": len(plan.windows) == case.active if case.active else len(plan.windows) > 1,
    }


def equal(result: Any, expected: torch.Tensor) -> bool:
    if isinstance(result, ShardedSample):
        return all(torch.equal(piece.tensor, expected[(..., *piece.box.slices)]) for piece in result.pieces)
    return result.shape[0] == 0 or torch.equal(result, expected)


def run_cases(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    return [run_case(rank, case) for case in cases]


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (2, CASES[::2] + CLIPS[::2] + ALONE),
        (3, [*CASES[1::2], *CLIPS[1::2], Case((37, 24), build=WIDE, size=2, output="rank0")]),
    ],
)
def test_the_bits_are_those_of_the_untiled_result(world_size: int, cases: list[Case]) -> None:
    by_rank = run_ranks(world_size, run_cases, cases, timeout=900)
    for case, reports in zip(cases, zip(*by_rank, strict=True), strict=True):
        for rank, report in enumerate(reports):
            assert all(report.values()), (rank, case, report)


def lie_once(rank: int) -> tuple[list[str], list[str], bool]:
    """The warnings of two decodes whose convolutions of bands round otherwise, and who should warn."""
    vae, value = prepared(Case((37, 24)))
    wrapped = parallelize_vae(vae, strategy="shard", deterministic="reference")
    real = nn.Conv2d._conv_forward

    def shaped(layer: nn.Conv2d, rows: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Other bits for every picture that is no whole one."""
        found: torch.Tensor = real(layer, rows, *rest)
        return found + 1e-3 if rows.shape[-2] % 37 else found

    found = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("always")
            patch.setattr(nn.Conv2d, "_conv_forward", shaped)
            wrapped.decode(value)
        found.append([str(one.message) for one in caught if one.category is VaeppWarning])
    return found[0], found[1], rank == 0


def test_a_kernel_with_other_bits_on_a_band_is_told_once_by_rank_0() -> None:
    for first, second, speaks in run_ranks(2, lie_once, timeout=300):
        assert [("could not be kept" in line and "up_blocks" in line) for line in first] == [True] * speaks
        assert second == []


def test_layers_too_large_to_check_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaepp_strategies.layers.kernels._LARGEST_ON_CPU", 64)
    check = KernelCheck(active=True)
    norm, values = nn.GroupNorm(4, 8), torch.randn(1, 4, 5, 6)
    check.channels("norm", norm, values, F.group_norm(values, 2, eps=norm.eps), 0)
    assert (check.failed, check.unchecked) == ([], ["norm"])


def test_groups_are_dealt_whole() -> None:
    assert channel_shares(24, 4, 3) == [(0, 12), (12, 6), (18, 6)]
    assert channel_shares(8, 2, 3) == [(0, 4), (4, 4), (8, 0)]


def refuse(rank: int) -> tuple[str, str, int]:
    vae, value = prepared(Case((18, 9)))
    vae.decoder.conv_act = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"))
    with counted() as seen:
        with pytest.raises(UnsupportedError) as layer:
            parallelize_vae(vae, strategy="shard", deterministic="reference").decode(value)
        with pytest.raises(UnsupportedError) as options:
            parallelize_vae(vae, strategy="shard", deterministic="reference", row_blocks=2)
    return str(layer.value), str(options.value), len(seen.sent)


def test_what_cannot_be_kept_is_refused_before_any_message() -> None:
    for layer, options, sent in run_ranks(2, refuse):
        assert "conv_act.0 (Conv2d): its padding mode is 'reflect'" in layer
        assert "does not go together with row_blocks" in options
        assert sent == 0
