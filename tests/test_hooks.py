"""Hooks that fail, or that nobody runs: of observers, and of what registers entries."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
from test_registry import END, START, module, registry_of, strategies, strategy

from vaepp_sdk import PluginError, VaeppWarning
from vaepp_sdk.events import StageEnd, StageStart


def test_an_observer_that_fails_is_dropped_with_one_warning() -> None:
    told: list[str] = []

    def broken(event: StageStart) -> None:
        told.append("broken")
        raise ValueError("no disk")

    def sound(event: StageStart) -> None:
        told.append("sound")

    def ends(event: StageEnd) -> None:
        told.append("end")

    broken.__name__ = sound.__name__ = "vaepp_on_stage_start"
    ends.__name__ = "vaepp_on_stage_end"
    registry = registry_of(module(broken), module(sound, ends))
    with pytest.warns(VaeppWarning, match=r"'p0': vaepp_on_stage_start raised ValueError: no disk") as record:
        registry.stage_start(START)
    assert len(record) == 1
    registry.stage_start(START)
    registry.stage_end(END)
    assert told.count("broken") == 1
    assert told.count("sound") == 2
    assert told.count("end") == 1


async def _awaited(register: Any) -> None:
    register(strategy("a"))


def _stepped(register: Any) -> Any:
    register(strategy("a"))
    yield


def _returned(register: Any) -> Any:
    return [strategy("a")]


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (_awaited, "it makes a coroutine, which nobody runs; write a plain function"),
        (_stepped, "it makes a generator, which nobody runs; write a plain function"),
        (_returned, r"it returns a list of 1; call register\(entry\) for each entry instead"),
    ],
)
def test_a_hook_that_would_register_nothing_is_refused(hook: Callable[..., Any], words: str) -> None:
    made = types.FunctionType(hook.__code__, hook.__globals__, "vaepp_register_strategies")
    with pytest.raises(PluginError, match=f"vaepp_register_strategies raised TypeError: {words}"):
        registry_of(module(made))


def test_an_observer_that_nobody_runs_is_dropped_and_one_that_returns_something_is_not() -> None:
    async def awaited(event: StageStart) -> None: ...

    def returns(event: StageStart) -> bool:
        seen.append(event.stage)
        return True

    seen: list[str] = []
    awaited.__name__ = returns.__name__ = "vaepp_on_stage_start"
    registry = registry_of(module(awaited), module(returns))
    with pytest.warns(VaeppWarning, match=r"'p0': .*it makes a coroutine, which nobody runs"):
        registry.stage_start(START)
    registry.stage_start(START)
    assert seen == ["decode", "decode"]


def test_what_a_dropped_observer_registered_stays() -> None:
    def vaepp_on_stage_start(event: StageStart) -> None:
        raise ValueError

    registry = registry_of(module(vaepp_on_stage_start, strategies(strategy("a"))))
    with pytest.warns(VaeppWarning):
        registry.stage_start(START)
    assert set(registry.strategies) == {"a"}
