"""Out of memory on real ranks: all step down together, and what comes out is what the last plan gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import attrs
import pytest
import torch
import torch.distributed as dist
from shard_cases import BUILDERS, whole
from torch import nn
from vae_models import tiny_kl

from vaepp_sdk import PeerError, RankError, UnsupportedError, VaeppWarning, parallelize_vae
from vaepp_sdk.entries import load_object
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.registry import default_registry
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae import descent
from vaepp_sdk.vae.ladder import Ladder, Step
from vaepp_sdk.vae.landing import Piece, ShardedSample
from vaepp_sdk.vae.plan import Work
from vaepp_sdk.vae.wrapper import ParallelVAE

MESSAGES = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
)


@attrs.frozen(kw_only=True)
class Case:
    """One decode or encode that fails on some ranks.

    Attributes:
        strategy: what is asked for.
        options: its options.
        vae: what runs it; see `shard_cases.BUILDERS`.
        output: where results land.
        size: how many ranks share the work; None is all.
        batch: pictures.
        encode: whether to encode.
        bad: the ranks that fail.
        at: they fail once, at this call of a layer; None fails every window above `limit`.
        limit: the most input positions that fit on a bad rank.
        error: which of `MESSAGES` is raised.
    """

    strategy: str
    options: Mapping[str, Any] = attrs.field(factory=dict)
    vae: str = "kl"
    output: str = "all"
    size: int | None = None
    batch: int = 1
    encode: bool = False
    bad: tuple[int, ...] = (0,)
    at: int | None = None
    limit: int = 0
    error: int = 0


SHAPES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "kl": ((16, 13, 9), (104, 72)),
    "wan": ((4, 2, 13, 9), (5, 104, 72)),
    "hunyuan 1.5": ((4, 2, 7, 5), (5, 112, 80)),
    "ltx 2": ((4, 3, 8, 5), (17, 256, 160)),
}
"""Of each VAE a latent, and the frames of a clip, the rows and the columns of what it encodes."""

# The VAE's own tiles have 8 x 8 latents: by what fits on the bad rank, one step down is enough, or two.
TILES = [
    Case(strategy="tile", options=options, bad=(bad,), limit=limit, output=output)
    for bad in (0, 1)
    for limit, output, options in (
        (16, "all", {}),
        (4, "rank0", {}),
        (9, "sharded", {"tile_size": 48, "tile_overlap_factor": 0.5}),
    )
]
HALF_WAY = [
    Case(strategy="patch", bad=(0,), at=0),
    Case(strategy="patch", options={"share": "none"}, bad=(1,), at=9, output="rank0", error=1),
    Case(strategy="shard", bad=(0, 1), at=7, batch=2, error=2),
    Case(strategy="shard", bad=(1,), at=30, output="sharded"),
    Case(strategy="shard", options={"row_blocks": 2}, bad=(0,), at=4, output="rank0", error=1),
    Case(strategy="shard", options={"deterministic": "ranks"}, bad=(1,), at=40),
    Case(strategy="shard", options={"deterministic": "reference"}, bad=(0,), at=60, output="sharded"),
]
OTHERS = [
    Case(strategy="tile", encode=True, bad=(1,), limit=40 * 40),
    Case(strategy="shard", encode=True, bad=(0,), at=7, output="rank0"),
    Case(strategy="tile", options={"tile_size": 32}, batch=4, bad=(1,), limit=15),
]
CLIPS = [
    Case(strategy="shard", vae="wan", bad=(1,), at=30),
    Case(strategy="shard", vae="hunyuan 1.5", encode=True, bad=(0,), at=20, output="sharded"),
    Case(strategy="shard", vae="ltx 2", bad=(0, 1), limit=16, output="rank0"),
]
# Of four ranks two or three share the work; the others only help it land.
PART = [
    Case(strategy="shard", size=3, bad=(2,), at=6),
    Case(strategy="tile", size=3, bad=(1, 2), limit=16, output="rank0"),
    Case(strategy="patch", size=2, bad=(0,), at=3, output="sharded"),
    *(Case(strategy="tile", bad=(bad,), limit=16) for bad in range(4)),
]


def made(case: Case) -> Any:
    vae = BUILDERS[case.vae](dtype=torch.float32)
    vae.enable_tiling() if case.strategy == "tile" else vae.disable_tiling()
    return vae


def value(case: Case) -> torch.Tensor:
    """A latent, or what is encoded to one; alike on every rank."""
    latent, picture = SHAPES[case.vae]
    shape = (case.batch, 3, *picture) if case.encode else (case.batch, *latent)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


class Short:
    """Memory that is short, on one rank: layers fail as the allocator would."""

    def __init__(self, case: Case, vae: Any) -> None:
        self.case = case
        self.calls = 0
        self.struck = 0
        inner = vae.encoder if case.encode else vae.decoder
        for module in inner.modules() if case.at is not None else [inner]:
            module.register_forward_pre_hook(self)

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not arguments or arguments[0].is_meta:  # the layers are being looked at
            return
        self.calls += 1
        if self.case.at is not None:
            strikes = not self.struck and self.calls > self.case.at
        else:
            strikes = arguments[0].shape[-2] * arguments[0].shape[-1] > self.case.limit
        if strikes:
            self.struck += 1
            raise MESSAGES[self.case.error]


def run(vae: ParallelVAE, case: Case, given: torch.Tensor) -> Any:
    return whole(vae.encode(given) if case.encode else vae.decode(given))


def settled(vae: ParallelVAE) -> Step:
    (found,) = vae.descent._settled.values()
    return found[0]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, ShardedSample):
        pairs = zip(one.pieces, other.pieces, strict=True)
        return one.shape == other.shape and all(torch.equal(a.tensor, b.tensor) for a, b in pairs)
    return torch.equal(one, other)


def at_once(case: Case, step: Step, given: torch.Tensor) -> Any:
    """What the plan that served gives where nothing fails, on the same ranks."""
    fresh = made(case)
    if step.rung.strategy == "tile":
        fresh.enable_tiling()
    settings: dict[str, Any] = {"size": case.size, "output": case.output, **step.rung.options}
    again = parallelize_vae(fresh, strategy=step.rung.strategy, **settings)
    parts = [run(again, case, part) for part in given.split(step.images)]
    if isinstance(parts[0], ShardedSample):
        held = zip(*(part.pieces for part in parts), strict=True)
        pieces = tuple(Piece(same[0].box, torch.cat([one.tensor for one in same])) for same in held)
        return ShardedSample((given.shape[0], *parts[0].shape[1:]), pieces)
    return torch.cat(parts)


def alone(case: Case, step: Step, given: torch.Tensor) -> torch.Tensor:
    """What one process gives with the plan that served."""
    vae = made(case)
    registry = default_registry()
    entry = registry.vae(type(vae))
    adapter = load_object(entry.adapter, "test")(vae)
    strategy = load_object(registry.strategy(step.rung.strategy).factory, "test")(**step.rung.options)
    parts = []
    for part in given.split(step.images):
        facts = attrs.evolve(adapter.facts(), use_tiling=True)
        direction: Any = "encode" if case.encode else "decode"
        work = Work(
            direction=direction, shape=tuple(part.shape), itemsize=4, ranks=1, world_size=1, output="rank0"
        )
        plan = strategy.plan(facts, work)
        act: Callable[..., Any] = strategy.encode if case.encode else strategy.decode
        parts.append(act(adapter, part, VaeGroup(None, 0, 1, 1, timedelta(1)), plan).sample)
    return torch.cat(parts)


def one_case(rank: int, case: Case) -> dict[str, Any]:
    vae, given = made(case), value(case)
    settings: dict[str, Any] = {"size": case.size, "output": case.output, **case.options}
    wrapped = parallelize_vae(vae, strategy=case.strategy, **settings)
    short = Short(case, vae) if rank in case.bad else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(wrapped, case, given)
        step = settled(wrapped)
        before = short.struck if short else 0
        again = run(wrapped, case, given)  # goes straight to the plan that served
        direct = at_once(case, step, given)
    facts, direction = wrapped._adapter.facts(), "encode" if case.encode else "decode"
    landed = isinstance(found, torch.Tensor) and found.shape[0] > 0
    return {
        "struck": before,
        "struck again": (short.struck if short else 0) - before,
        "steps": [str(one) for one in wrapped.steps_down],
        "ranks": [one.ranks for one in wrapped.steps_down],
        "said": sum("ran out of memory" in str(one.message) for one in caught),
        "size": not landed or found.shape == facts.out_shape(direction, given.shape),
        "direct": same(found, direct) and same(again, direct),
        "alone": step.rung.strategy != "tile" or not landed or torch.equal(found, alone(case, step, given)),
    }


def job(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    return [one_case(rank, case) for case in cases]


def job_of_four(rank: int) -> tuple[list[dict[str, Any]], list[tuple[str, bool]]]:
    """Cases of which some leave a rank without work, and a group without rank 0 where planning fails."""
    cases, group = job(rank, PART), dist.new_group([1, 2, 3])
    given = value(Case(strategy="shard"))
    within: Any = {"group": group, "size": 2}
    said = (
        [planned_badly(rank == 2, given, method, **within) for method in ("top", "planned")] if rank else []
    )
    return cases, said


@pytest.fixture(scope="module")
def four_ranks() -> list[Any]:
    return run_ranks(4, job_of_four, timeout=600)


def test_two_ranks_step_down_together() -> None:
    cases = [*TILES, *HALF_WAY, *OTHERS, *CLIPS]
    check(run_ranks(2, job, cases, timeout=600), cases)


def test_ranks_with_and_without_work_step_down_together(four_ranks: list[Any]) -> None:
    check([cases for cases, _ in four_ranks], PART)


def test_in_a_group_smaller_than_the_job_a_rank_that_cannot_plan_says_so_too(four_ranks: list[Any]) -> None:
    """The group's second rank fails, the third has no work: all are told, by the group's numbers."""
    _, first, bad, idle = (said for _, said in four_ranks)
    assert bad == [("ValueError: an odd number\nof rows", True)] * 2
    for rank, said in ((0, first), (2, idle)):
        told = f"PeerError: rank {rank} waited for rank 1 (before decoding): ValueError in planning: "
        assert said == [(f"{told}an odd number", True)] * 2


def check(everyone: list[list[dict[str, Any]]], cases: list[Case]) -> None:
    world_size = len(everyone)
    for index, case in enumerate(cases):
        ranks = [rank[index] for rank in everyone]
        assert all(ranks[bad]["struck"] for bad in case.bad), case
        assert not any(rank["struck again"] for rank in ranks), case
        assert all(rank["steps"] == ranks[0]["steps"] for rank in ranks), case
        # At most three attempts, so two steps; each names the ranks that failed.
        assert 1 <= len(ranks[0]["steps"]) <= 2, (case, ranks[0]["steps"])
        assert all(found == case.bad for found in ranks[0]["ranks"]), case
        assert [rank["said"] for rank in ranks] == [len(ranks[0]["steps"])] + [0] * (world_size - 1), case
        assert all(rank["size"] and rank["direct"] and rank["alone"] for rank in ranks), case


def hopeless(rank: int) -> dict[str, Any]:
    """Nothing fits on rank 1: an end on all ranks alike, after which the group is as good as before."""
    found: dict[str, Any] = {}
    for on_oom in ("step_down", "fail"):
        case = Case(strategy="tile", limit=0)
        vae = made(case)
        wrapped = parallelize_vae(vae, strategy="tile", on_oom=on_oom)
        short = Short(case, vae) if rank == 1 else None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrapped.decode(value(case))
        except RankError as error:
            found[on_oom] = (error.rank, error.stage, error.cause, short.struck if short else 0)
    fresh = tiny_kl()
    fresh.enable_tiling()
    given = value(Case(strategy="tile"))
    expected = fresh.decode(given).sample
    found["after"] = torch.equal(parallelize_vae(fresh, strategy="tile").decode(given).sample, expected)
    try:
        parallelize_vae(fresh, on_oom="STEP_DOWN")  # type: ignore[arg-type]
    except UnsupportedError as error:
        found["refused"] = str(error)
    return found


def test_where_nothing_helps_all_ranks_end_alike_and_the_group_is_good() -> None:
    first, second = run_ranks(2, hopeless)
    for found in (first, second):
        assert found["after"]
        assert found["refused"] == "on_oom is 'STEP_DOWN'; it must be 'step_down' or 'fail'"
        rank, stage, cause, _ = found["step_down"]
        assert (rank, stage) == (1, "decode")
        assert cause.startswith(
            "out of memory on rank 1 with each of: strategy 'tile'; strategy 'tile' (tile_size = 16, "
            "tile_overlap_factor = 0.5); strategy 'tile' (tile_size = 32); there is nothing lighter ("
        )
        assert found["fail"][:2] == (1, "decode")
        assert "out of memory with strategy 'tile', and [vae] on_oom is 'fail'" in found["fail"][2]
    assert "CUDA out of memory. Tried" in second["step_down"][2], "the rank that failed has the words"
    # One failing tile ends an attempt.
    assert (second["step_down"][3], second["fail"][3]) == (3, 1)


def foreseen(rank: int) -> dict[str, Any]:
    """Rank 1 has room for a little less than it would need."""
    given = value(Case(strategy="tile"))
    wrapped = parallelize_vae(made(Case(strategy="tile")), strategy="tile")
    wrapped.decode(given)
    assert wrapped.last_plan is not None
    need = wrapped.last_plan.peak_bytes[rank]
    freed: list[int] = []
    found: dict[str, Any] = {}
    for name, free in (("short", need - rank), ("none", 0), ("unknown", None)):
        vae = parallelize_vae(made(Case(strategy="tile")), strategy="tile")
        vae.descent.free_more = lambda: freed.append(1)
        with (
            patch.object(descent, "room", lambda *_, free=free: free),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always", VaeppWarning)
            vae.decode(given)
        steps = vae.steps_down
        sentences, predicted = [str(step) for step in steps], [step.predicted for step in steps]
        found[name] = (sentences, predicted, len(caught), len(freed))
        freed.clear()
    return found | {name: planned_badly(rank == 1, given, name) for name in ("top", "planned")}


def planned_badly(bad: bool, given: torch.Tensor, method: str, **settings: Any) -> tuple[str, bool]:
    """What each rank says where the bad one cannot plan, and whether the next decode is right."""
    settings |= {"strategy": "shard", "timeout": timedelta(seconds=20)}
    vae = parallelize_vae(made(Case(strategy="shard")), **settings)

    def fail(*_: Any) -> None:
        raise ValueError("an odd number\nof rows")

    said = "nothing"
    with patch.object(Ladder, method, fail) if bad else nullcontext():
        try:
            vae.decode(given)
        except (PeerError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
    expected = made(Case(strategy="shard")).decode(given).sample
    return said, torch.allclose(vae.decode(given).sample, expected, rtol=0, atol=2e-5 * expected.abs().max())


def test_a_rank_that_cannot_plan_says_so_before_the_others_wait_for_it(shortages: list[Any]) -> None:
    for method in ("top", "planned"):
        assert shortages[1][method] == ("ValueError: an odd number\nof rows", True)
        said, right = shortages[0][method]
        assert said == (
            "PeerError: rank 0 waited for rank 1 (before decoding): ValueError in planning: an odd number"
        )
        assert right


@pytest.fixture(scope="module")
def shortages() -> list[Any]:
    return run_ranks(2, foreseen)


def test_a_shortage_that_is_foreseen_is_not_run_into(shortages: list[Any]) -> None:
    for rank, found in enumerate(shortages):
        sentence = "rank 1 would not have enough memory with strategy 'tile'; going on with strategy 'tile' ("
        assert found["short"][0][0].startswith(sentence)
        assert found["short"][1:] == ([True], 1 - rank, 1)
        # Even the lightest would not fit, as far as estimates go: it is tried all the same.
        assert found["none"][0][0].startswith("ranks 0, 1 would not have enough memory")
        assert found["unknown"] == ([], [], 0, 0)
