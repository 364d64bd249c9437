"""The ways down, and the record of a plan's messages: pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from vae_models import tiny_kl
from vae_zoo import build

from vaepp_sdk.entries import Option, Rung, StrategyEntry, load_object
from vaepp_sdk.errors import PluginError
from vaepp_sdk.markers import hookimpl
from vaepp_sdk.registry import Plugin, Registry, default_registry
from vaepp_sdk.vae import memory
from vaepp_sdk.vae.chooser import StrategyChooser
from vaepp_sdk.vae.ladder import MAX_ATTEMPTS, Ladder, Step
from vaepp_sdk.vae.ledger import Ledger
from vaepp_sdk.vae.memory import host_room, is_out_of_memory, room
from vaepp_sdk.vae.plan import EVERYONE, Move, Work


def ways_of_mine(*_: Any) -> list[Rung]:
    """One that nobody registers, one that does not fit the VAE, one that is no option, and one that works."""
    return [
        Rung("nobody's"),
        Rung("tile", {"tile_size": 20}),
        Rung("tile", {"tile_sise": 8}),
        Rung("tile"),
    ]


STRANGERS: dict[str, dict[str, Any]] = {
    "mine": {"lighter": ways_of_mine},
    "mute": {},
    "odd": {"options": (Option(name="halo", kind="integer", help="Its factory does not know it."),)},
}


class Strangers:
    """Strategies of somebody else: one names its ways down, one names none, one's factory lacks an option."""

    VAEPP_API = 1

    @hookimpl
    def vaepp_register_strategies(self, register: Any) -> None:
        for name, more in STRANGERS.items():
            register(
                StrategyEntry(
                    name=name,
                    factory="vaepp_strategies.shard_run:ShardStrategy",
                    promise="none",
                    validated_for=("AutoencoderKL",),
                    **more,
                )
            )


def ladder(
    strategy: str,
    options: Mapping[str, Any] | None = None,
    shape: tuple[int, ...] = (1, 16, 40, 32),
    size: int = 2,
) -> Ladder:
    registry = Registry.load()
    registry.add(Plugin("strangers", "test"), Strangers())
    vae = tiny_kl(widths=(8, 16, 32, 32))
    vae.enable_tiling()
    entry = registry.vae(type(vae))
    adapter = load_object(entry.adapter, "test")(vae)
    chooser = StrategyChooser(registry, strategy, entry.strategies, entry.pick, options or {})
    work = Work(direction="decode", shape=shape, itemsize=2, ranks=size, world_size=size, output="sharded")
    return Ladder(chooser, adapter, adapter.facts(), work, shape[0])


def walk(steps: Ladder, ranks: tuple[int, ...]) -> list[Step]:
    """What is tried where nothing ever fits."""
    tried = [steps.top()]
    while (step := steps.next(tried, ranks)) is not None:
        tried.append(step)
    return tried


BELOW_BLOCKS = ("shard 32 always", "tile", "tile 32", "tile 16 0.5")


@pytest.mark.parametrize(
    ("strategy", "options", "wanted"),
    [
        ("tile", {"tile_size": 64}, ["tile 32", "tile 16 0.5"]),
        (
            "shard",
            {"row_blocks": 8},
            ["shard 16", "shard 32", "shard 32 always", "tile", "tile 32", "tile 16 0.5"],
        ),
        ("patch", {"halo": 8}, [*(f"shard {count}" for count in (2, 4, 8, 16, 32)), *BELOW_BLOCKS]),
        ("mine", {}, ["tile"]),
        ("mute", {}, []),
    ],
)
def test_the_order_is_the_one_that_is_documented(
    strategy: str, options: dict[str, Any], wanted: list[str]
) -> None:
    rungs = [step.rung for step in ladder(strategy, options).below()]
    assert [" ".join([rung.strategy, *map(str, rung.options.values())]) for rung in rungs] == wanted


@pytest.mark.parametrize("strategy", ["tile", "patch", "shard", "mine", "mute"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("size", [1, 3])
def test_three_attempts_at_most_and_no_plan_twice(strategy: str, batch: int, size: int) -> None:
    steps = ladder(strategy, shape=(batch, 16, 40, 32), size=size)
    for ranks in ((0,), (size - 1,), tuple(range(size))):
        tried = walk(steps, ranks)
        assert len(tried) <= MAX_ATTEMPTS
        assert len({step.key for step in tried}) == len(tried)
        if len(tried) == MAX_ATTEMPTS:
            first, second, third = (step.peak(ranks) for step in tried)
            assert first > 0
            lightest = min(step.peak(ranks) for step in steps.below())
            assert 2 * second <= first or second == lightest
            assert third == lightest or second == lightest


@pytest.mark.parametrize(
    ("make", "shape", "counts"),
    [
        (partial(tiny_kl, widths=(8, 16, 32, 32)), (1, 16, 3, 2), (999, 1999)),  # also of its smallest layers
        (partial(build, "AutoencoderDC"), (1, 4, 11, 3), (3, 8)),  # two rows each, for a 5x5 kernel
        (partial(build, "AutoencoderKLWan"), (1, 4, 2, 5, 3), (4, 8)),
    ],
)
def test_more_row_blocks_than_rows_are_no_other_plan(
    make: Any, shape: tuple[int, ...], counts: tuple[int, int]
) -> None:
    """So that what has failed is not tried again under another name."""
    vae, registry = make(), default_registry()
    entry = registry.vae(type(vae))
    adapter = load_object(entry.adapter, "test")(vae)
    chooser = StrategyChooser(registry, "shard", entry.strategies, entry.pick)
    work = Work(direction="decode", shape=shape, itemsize=4, ranks=2, world_size=2, output="all")

    def digest(count: int) -> str:
        rung = Rung("shard", {"row_blocks": count})
        return chooser.plan_rung(rung, adapter, adapter.facts(), work)[1].digest

    assert digest(counts[0]) == digest(counts[1]) != digest(2)


def test_a_factory_that_lacks_a_declared_option_is_named() -> None:
    with pytest.raises(PluginError, match=r"strategy 'odd'.*does not take its options.*'halo'"):
        ladder("odd", {"halo": 2}).top()


def test_fewer_pictures_come_last() -> None:
    assert [step.images for step in ladder("mute", shape=(7, 16, 16, 16)).below()] == [4, 2, 1]
    *_, last = ladder("tile", shape=(5, 16, 16, 16)).below()
    assert (
        str(last) == "strategy 'tile' (tile_size = 16, tile_overlap_factor = 0.5), 1 of 5 pictures at a time"
    )


def test_of_steps_that_need_as_much_the_lowest_is_the_last_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ladder("tile", shape=(4, 16, 16, 16))
    *others, lowest = steps.below()
    assert lowest.images == 1
    monkeypatch.setattr(Step, "peak", lambda *_: 7)
    found = steps.next([steps.top(), others[0]], (0,))
    assert found is not None
    assert found.key == lowest.key


def test_what_fits_is_found_by_each_ranks_own_room() -> None:
    steps = ladder("shard")
    top = steps.top()
    assert steps.fitting(top.plan.peak_bytes).key == top.key
    assert top.peak((5,)) == top.peak(), "a rank that only helps it land has no estimate of its own"
    assert steps.fitting([None, None]).key == steps.fitting([10**12, 10**12]).key == top.key
    found = steps.fitting([10**12, top.plan.peak_bytes[1] - 1])
    assert found.plan.peak_bytes[1] < top.plan.peak_bytes[1]
    assert found.key == next(
        step.key for step in steps.below() if step.fits([None, top.plan.peak_bytes[1] - 1])
    )
    lightest = steps.fitting([0, 0])
    assert lightest.peak() == min(step.peak() for step in steps.below())


def test_the_ledger_knows_what_is_left() -> None:
    moves = (
        Move(0, "seam", 0, 1, 8),
        Move(0, "seam", 1, 0, 4),
        Move(0, "seam", 0, 1, 16),
        Move(1, "seam", 2, 1, 9),  # not this rank's
        Move(2, "output", 1, EVERYONE, 32),
    )
    ledger = Ledger(moves, 0)
    ledger.passed(0, 1, 8)
    ledger.passed(1, 0, 4)
    assert ledger.exact
    assert [left.nbytes for left in ledger.left()] == [16, 32]
    ledger.passed(0, 1, 16)
    ledger.passed(1, EVERYONE, 32)
    assert ledger.exact
    assert ledger.left() == []


@pytest.mark.parametrize(("source", "reader", "nbytes"), [(0, 1, 16), (1, 0, 8), (0, 2, 8), (0, EVERYONE, 8)])
def test_a_message_that_is_not_next_spoils_the_ledger(source: int, reader: int, nbytes: int) -> None:
    ledger = Ledger((Move(0, "seam", 0, 1, 8), Move(1, "seam", 0, 1, 16)), 0)
    ledger.passed(source, reader, nbytes)
    assert not ledger.exact


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)  # the CPU's own refusal
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_host_has_room() -> None:
    free = host_room()
    assert free is None or free > 2**20


def test_the_host_has_no_more_room_than_the_tightest_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits of groups around this process's own hold too; pages of files count as free."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "own")
    inner = tmp_path / "cgroup" / "job" / "step"
    inner.mkdir(parents=True)
    (tmp_path / "own").write_text("1:name=old:/elsewhere\n0::/job/step\n")
    assert memory._cgroup_room() is None
    for group, limit, used, idle in ((inner, "max", 10, 0), (inner.parent, "5000", 4000, 300)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 7\ninactive_file {idle}\n")
    assert host_room() == 1300
    assert room(torch.device("cpu"), sharers=4) == 325
    (inner / "memory.max").write_text("100\n")
    assert host_room() == 90
