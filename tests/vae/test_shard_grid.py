"""`deterministic = "ranks"` on real ranks: the same bits for every number of them."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from counted import counted
from shard_cases import Case, Expected, close_at, expect, prepared, traced_once, whole
from vae_zoo import build

from vaepp_sdk import UnsupportedError, parallelize_vae
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae.landing import ShardedSample

CASES = [
    Case((37, 11), batch=2),
    Case((9, 33), vae="flux2", dtype=torch.bfloat16),
    Case((30, 17), build={"widths": (8, 12, 16, 16), "quant": True}, dtype=torch.bfloat16),
    Case((35, 6), vae="tiny"),
    Case((7, 40), output="sharded"),
    Case((21, 12), batch=2, prepare="enable_slicing"),
    Case((135, 45), direction="encode"),
    Case((61, 299), direction="encode", batch=2),
    Case((135, 45), direction="encode", vae="tiny", dtype=torch.bfloat16),
    Case((5, 3), 2, vae="wan"),
    Case((33, 24), 5, vae="qwen", direction="encode"),
    Case((4, 3), 4, vae="hunyuan"),  # two windows of frames
    Case((3, 2)),  # three bands
    Case((1, 1)),  # one band
]


def run_case(rank: int, case: Case) -> dict[str, Any]:
    vae, value = prepared(case)
    wrapped = parallelize_vae(vae, strategy="shard", deterministic="ranks", output=case.output)
    with counted() as seen, warnings.catch_warnings(), traced_once(case):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "(de|en)code of .* nothing to do")  # small pictures
        result = whole(getattr(wrapped, case.direction)(value))
    plan, slices = wrapped.last_plan, case.batch if case.prepare == "enable_slicing" else 1
    planned = Counter((move.dst, move.nbytes) for move in plan.moves * slices if move.src == rank)
    return {
        "result": pieces(result),
        "wire": Counter(seen.sent) == planned,
        "restored": not any("forward" in vars(module) for module in vae.modules()),
        "no groups": seen.groups == 0,
        "owners": plan.owners,
    }


def pieces(result: Any) -> dict[Any, torch.Tensor]:
    """What a rank holds, by where it stands."""
    if isinstance(result, ShardedSample):
        return {piece.box: piece.tensor for piece in result.pieces}
    return {None: result}


def near(held: dict[Any, torch.Tensor], expected: Expected) -> bool:
    """Whether the pieces of one rank's result are equal to the untiled one up to rounding."""
    everywhere = (slice(None), slice(None))
    return all(close_at(tensor, expected, box.slices if box else everywhere) for box, tensor in held.items())


def run_cases(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    return [run_case(rank, case) for case in cases]


OWNERS = {1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 3: (0, 0, 1, 2), 4: (0, 1, 2, 3), 5: (0, 1, 2, 3)}


def test_the_bits_do_not_depend_on_the_number_of_ranks() -> None:
    alone: list[dict[Any, torch.Tensor]] = []
    for ranks, owners in OWNERS.items():
        places = range(len(CASES)) if ranks in (1, 3, 4) else range(0, len(CASES), 2)  # what time allows
        cases = [CASES[place] for place in places]
        by_rank = run_ranks(ranks, run_cases, cases, timeout=600)
        assert by_rank[0][0]["owners"] == owners
        for place, case, reports in zip(places, cases, zip(*by_rank, strict=True), strict=True):
            results = [report.pop("result") for report in reports]
            if ranks == 1:
                assert near(results[0], expect(case)), case
                alone += results
            for rank, (result, report) in enumerate(zip(results, reports, strict=True)):
                assert all(report.values()), (ranks, rank, case, report)
                for box, tensor in result.items():
                    assert torch.equal(tensor, alone[place][box]), (ranks, rank, case)


def decode_dc(rank: int) -> torch.Tensor:
    """A VAE whose linear attention sums over the picture."""
    vae = build("AutoencoderDC")
    vae.disable_tiling()
    torch.manual_seed(3)
    latent = torch.randn(1, 4, 19, 9)
    wrapped = parallelize_vae(vae, strategy="shard", deterministic="ranks")
    result: torch.Tensor = wrapped.decode(latent).sample
    with torch.no_grad():
        expected = vae.decode(latent).sample
    assert float((result - expected).abs().max() / expected.abs().max()) < 2e-5  # rounding
    return result


def test_linear_attention_keeps_its_bits() -> None:
    alone, *others = (run_ranks(ranks, decode_dc, timeout=300) for ranks in (1, 2, 3))
    for results in others:
        assert all(torch.equal(result, alone[0]) for result in results)


class BoomError(Exception):
    pass


def boom(*_: Any) -> None:
    raise BoomError


def fail(rank: int) -> tuple[bool, bool]:
    """An error half way in one band of each rank, then a decode of the same VAE."""
    vae, value = prepared(Case((37, 5)))
    wrapped = parallelize_vae(vae, strategy="shard", deterministic="ranks")
    before = wrapped.decode(value).sample
    handle = vae.decoder.up_blocks[1].register_forward_pre_hook(boom)
    with pytest.raises(BoomError):
        wrapped.decode(value)
    handle.remove()
    restored = not any("forward" in vars(module) for module in vae.modules())
    return restored, torch.equal(wrapped.decode(value).sample, before)


def inference(rank: int) -> bool:
    """Modes of the calling thread hold in the bands' threads."""
    vae, value = prepared(Case((13, 5)))
    wrapped = parallelize_vae(vae, strategy="shard", deterministic="ranks")
    plain = wrapped.decode(value).sample
    with torch.inference_mode():
        return torch.equal(wrapped.decode(value).sample, plain)


def test_an_error_in_a_band_ends_the_others_and_spoils_nothing() -> None:
    assert run_ranks(2, fail) == [(True, True)] * 2


def test_inference_mode_changes_nothing() -> None:
    assert run_ranks(2, inference) == [True] * 2


def test_row_blocks_are_refused_beside_it() -> None:
    vae, _ = prepared(Case((9, 5)))
    with pytest.raises(UnsupportedError, match="does not go together with row_blocks"):
        parallelize_vae(vae, strategy="shard", deterministic="ranks", row_blocks=2)
