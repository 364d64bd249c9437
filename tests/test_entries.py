"""Entries that plugins make: what cannot be is refused there, by entry and field."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from vaepp_sdk import PluginError, Rung, hookimpl
from vaepp_sdk.entries import ChainPlan, DiTPlan, Option, PipelineEntry, StrategyEntry, VaeEntry
from vaepp_sdk.registry import Plugin, Registry

GOOD: Mapping[type, dict[str, Any]] = {
    Option: {"name": "halo", "kind": "integer", "help": "Rows."},
    StrategyEntry: {"name": "s", "factory": "m:S", "promise": "p"},
    VaeEntry: {"name": "V", "adapter": "m:A", "strategies": ("s",), "pick": lambda *_: "s"},
    PipelineEntry: {"name": "P", "module": "m", "vae": "V", "strategies": (), "stages": "m:S"},
    DiTPlan: {},
    ChainPlan: {"blocks": "b", "carried": ("x",), "batched": (), "sequence": {"x": 1}},
    Rung: {"strategy": "tile"},
}
HALO = Option(name="halo", kind="integer", help="Rows.")

# Class, fields, message: each field alone is wrong.
WRONG: list[tuple[type, dict[str, Any], str]] = [
    (
        Option,
        {"kind": "int"},
        "Option 'halo': kind is 'int'; it must be one of 'integer', 'number', ",
    ),
    (Option, {"default": True}, "default is True; it must be an integer"),
    (Option, {"default": 3, "minimum": 4}, "default is 3; it must be at least 4"),
    (Option, {"minimum": "4"}, "minimum is '4'; it must be a number or None"),
    (Option, {"choices": "ab"}, "choices is 'ab'; it must be a tuple of strings, as in ('ab',)"),
    (
        StrategyEntry,
        {"name": "auto"},
        "StrategyEntry 'auto': name is 'auto'; that name leaves the",
    ),
    (StrategyEntry, {"name": ""}, "name is ''; it must be a string that is not empty"),
    (StrategyEntry, {"name": 3}, "StrategyEntry: name is 3; "),
    (StrategyEntry, {"factory": "m.S"}, "factory is 'm.S'; it must be of the form \"module:attribute\""),
    (StrategyEntry, {"lighter": ":rule"}, "lighter is ':rule'; it must be of the form \"module:attribute\""),
    (StrategyEntry, {"conflict": "m:rule"}, "conflict is 'm:rule'; it must be a function or None"),
    (StrategyEntry, {"options": ("halo",)}, "options is ('halo',); it must be a tuple of Option entries"),
    (
        StrategyEntry,
        {"options": (HALO, HALO)},
        "options is ('halo', 'halo'); each option has a name",
    ),
    (StrategyEntry, {"single_rank_options": ("halo",)}, "it must name options of the strategy: it has none"),
    (
        StrategyEntry,
        {"options": (HALO,), "single_rank_options": ("hallo",)},
        "single_rank_options is ('hallo',); it must name options of the strategy: halo",
    ),
    (
        StrategyEntry,
        {"validated_for": "X"},
        "validated_for is 'X'; it must be a tuple of strings, as in ('X'",
    ),
    (StrategyEntry, {"uses_tiling": 1}, "uses_tiling is 1; it must be True or False"),
    (
        VaeEntry,
        {"strategies": "tile"},
        "VaeEntry 'V': strategies is 'tile'; it must be a tuple of str",
    ),
    (VaeEntry, {"adapter": "m"}, "adapter is 'm'; it must be of the form"),
    (VaeEntry, {"pick": "tile"}, "pick is 'tile'; it must be a function"),
    (PipelineEntry, {"strategies": ["tile"]}, "strategies is ['tile']; it must be a tuple of strings"),
    (PipelineEntry, {"stages": "m"}, "stages is 'm'; it must be of the form"),
    (PipelineEntry, {"fps": True}, "fps is True; it must be an integer or None"),
    (PipelineEntry, {"dit": HALO}, "it must be a DiTPlan or None"),
    (DiTPlan, {"excludes": {"x": "ring"}}, "it must be a mapping of strings to tuples of strings"),
    (ChainPlan, {"sequence": {"x": (1, 2, 3)}}, "to integers or tuples of integers"),
    (Rung, {"options": [1]}, "Rung: options is [1]; it must be a mapping of strings to anything"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), WRONG)
def test_what_cannot_be_is_refused(kind: type, fields: dict[str, Any], message: str) -> None:
    kind(**GOOD[kind])
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its whole message is compared
        kind(**{**GOOD[kind], **fields})
    assert message in str(caught.value)


def test_the_plugin_is_named() -> None:
    def vaepp_register_strategies(register: Callable[[Any], None]) -> None:
        register(StrategyEntry(**{**GOOD[StrategyEntry], "validated_for": "X"}))

    module = types.ModuleType("mine")
    vars(module).update(VAEPP_API=1, vaepp_register_strategies=hookimpl(vaepp_register_strategies))
    told = r"plugin 'mine' \(from mine 1\.0\): .* StrategyEntry 's': validated_for is 'X'; it must be a tuple"
    with pytest.raises(PluginError, match=told):
        Registry().add(Plugin("mine", "mine 1.0"), module)
