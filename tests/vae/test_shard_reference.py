"""`deterministic = "reference"` on real ranks: the untiled decode and encode, bit by bit."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from counted import counted
from shard_cases import Case, landed, prepared, whole
from torch import nn
from vaepp_strategies.layers.kernels import KernelCheck
from vaepp_strategies.layers.reference import channel_shares

from vaepp_sdk import UnsupportedError, VaeppWarning, parallelize_vae
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae.landing import ShardedSample

BF16, F64 = torch.bfloat16, torch.float64
WIDE: dict[str, Any] = {"widths": (32, 64, 64, 64)}

CASES = [
    Case((16, 12)),
    Case((37, 11), batch=2),
    Case((37, 24), build=WIDE),
    Case((21, 45), build=WIDE, dtype=BF16, output="rank0"),
    Case((30, 31), build={"attention": False}, output="sharded"),
    Case((33, 17), vae="flux2", batch=2, dtype=BF16),
    Case((40, 30), vae="tiny", output="rank0"),
    Case((18, 37), vae="tiny", dtype=BF16),
    Case((20, 20), build={"quant": True}, prepare="enable_tiling"),
    Case((24, 18), batch=2, prepare="enable_slicing"),
    Case((303, 140), direction="encode", build=WIDE, dtype=BF16),
    Case((237, 301), direction="encode", batch=2, output="rank0"),
    Case((137, 140), direction="encode", vae="flux2", output="sharded"),
    Case((303, 135), direction="encode", vae="tiny", batch=2),
]
ALONE = [
    Case((3, 2), active=1),  # all layers too small for bands
    Case((90, 1), active=1),  # one latent wide
    Case((17, 18), direction="encode", dtype=BF16, active=1),
]


def untiled(case: Case) -> torch.Tensor:
    vae, value = prepared(case)
    vae.disable_tiling()
    with torch.no_grad():
        result: torch.Tensor = whole(getattr(vae, case.direction)(value))
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
        result = whole(getattr(wrapped, case.direction)(value))
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
        (2, CASES + ALONE),
        (3, CASES[::2]),
        (4, [*CASES[1::2], attrs.evolve(CASES[2], size=3, output="rank0")]),
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
    real = F.conv2d

    def shaped(rows: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        result: torch.Tensor = real(rows, weight, *rest)
        return result + 1e-3

    found = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("always")
            # The band's own call goes through this name; the whole layer's goes through the class.
            patch.setattr("vaepp_strategies.layers.conv.F.conv2d", shaped)
            patch.setattr(nn.Conv2d, "_conv_forward", plain(real))
            wrapped.decode(value)
        found.append([str(one.message) for one in caught if one.category is VaeppWarning])
    return found[0], found[1], rank == 0


def plain(real: Any) -> Any:
    def forward(self: nn.Conv2d, rows: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        result: torch.Tensor = real(rows, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return result

    return forward


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
            parallelize_vae(vae, strategy="shard", deterministic="reference", row_blocks=2).decode(value)
    return str(layer.value), str(options.value), len(seen.sent)


def test_what_cannot_be_kept_is_refused_before_any_message() -> None:
    for layer, options, sent in run_ranks(2, refuse):
        assert "conv_act.0 (Conv2d): its padding mode is 'reflect'" in layer
        assert "does not go together with row_blocks" in options
        assert sent == 0
