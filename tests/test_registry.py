"""Plugins: what is refused, what is set aside, what the environment chooses, what observers may do."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

import attrs
import pytest

from vaepp_sdk import (
    PluginError,
    StrategyEntry,
    UnsupportedError,
    UserError,
    VaeEntry,
    hookimpl,
)
from vaepp_sdk.entries import PipelineEntry, load_object
from vaepp_sdk.events import StageEnd, StageStart
from vaepp_sdk.registry import Plugin, Registry

START = StageStart(rank=0, world_size=1, stage="decode", request=0)
END = StageEnd(rank=0, world_size=1, stage="decode", request=0, seconds=1.0, peak_bytes=1)


def module(*hooks: Callable[..., Any], api: Any = 1) -> types.ModuleType:
    """A plugin module with these hook implementations; `api` None leaves VAEPP_API out."""
    made = types.ModuleType("a_plugin")
    if api is not None:
        made.VAEPP_API = api  # type: ignore[attr-defined]
    for hook in hooks:
        setattr(made, hook.__name__, hookimpl(hook))
    return made


def strategies(*entries: Any) -> Callable[..., Any]:
    def vaepp_register_strategies(register: Callable[[Any], None]) -> None:
        for entry in entries:
            register(entry)

    return vaepp_register_strategies


def strategy(name: str, **more: Any) -> StrategyEntry:
    return StrategyEntry(name=name, factory="package.module:Class", promise="none", **more)


def vaes(*entries: VaeEntry) -> Callable[..., Any]:
    def vaepp_register_vaes(register: Callable[[Any], None]) -> None:
        for entry in entries:
            register(entry)

    return vaepp_register_vaes


def always_a(facts: Any, work: Any) -> str:
    return "a"


def vae(name: str) -> VaeEntry:
    return VaeEntry(name=name, adapter="package.module:Class", strategies=("a",), pick=always_a)


def pipelines(*entries: PipelineEntry) -> Callable[..., Any]:
    def vaepp_register_pipelines(register: Callable[[Any], None]) -> None:
        for entry in entries:
            register(entry)

    return vaepp_register_pipelines


def pipeline(name: str, *allowed: str) -> PipelineEntry:
    return PipelineEntry(name=name, module="m", vae="V", strategies=allowed, stages="package.module:Class")


def registry_of(*modules: types.ModuleType) -> Registry:
    registry = Registry()
    for index, plugin in enumerate(modules):
        registry.add(Plugin(f"p{index}", f"dist{index} 1.0"), plugin)
    return registry


@attrs.frozen
class Dist:
    name: str
    version: str = "1.0"


@attrs.frozen
class Point:
    """What the registry needs of an importlib EntryPoint."""

    name: str
    found: types.ModuleType | Exception
    dist: Dist | None

    def load(self) -> types.ModuleType:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these the only installed plugins."""
    for variable in ("VAEPP_PLUGINS_ONLY", "VAEPP_PLUGINS_BLOCK", "VAEPP_PLUGINS_TRACE"):
        monkeypatch.delenv(variable, raising=False)

    def replace(*points: Point) -> None:
        def found(group: str) -> Sequence[Point]:
            assert group == "vaepp_sdk"
            return points

        monkeypatch.setattr("vaepp_sdk.registry.entry_points", found)

    return replace


def test_built_ins_come_in_through_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAEPP_PLUGINS_ONLY", "vaes")
    registry = Registry.load()
    assert "AutoencoderKL" in registry.vaes
    assert not registry.strategies
    assert not registry.pipelines
    assert [plugin.name for plugin in registry.plugins] == ["vaes"]
    assert registry.plugins[0].distribution.startswith("vaepp-sdk ")


def test_every_entry_point_of_the_wheel_loads() -> None:
    ours = [
        point for point in entry_points(group="vaepp_sdk") if point.dist and point.dist.name == "vaepp-sdk"
    ]
    assert {"vaes", "z_image", "tile", "patch"} <= {point.name for point in ours}
    registry = Registry.load()
    assert registry.problems == []
    for name, entry in registry.strategies.items():
        assert load_object(entry.factory, name) is not None
    for name, vae_entry in registry.vaes.items():
        assert load_object(vae_entry.adapter, name) is not None
        assert set(vae_entry.strategies) <= set(registry.strategies)
    for name, pipeline_entry in registry.pipelines.items():
        assert load_object(pipeline_entry.stages, name) is not None
        assert pipeline_entry.vae in registry.vaes
        assert set(pipeline_entry.strategies) <= set(registry.strategies)


def test_entries_of_every_kind_are_found_by_name() -> None:
    registry = registry_of(
        module(strategies(strategy("a")), vaes(vae("V")), pipelines(pipeline("P", "a"), pipeline("Q")))
    )
    assert registry.strategy("a") == strategy("a")
    assert set(registry.vaes) == {"V"}
    assert set(registry.pipelines) == {"P", "Q"}
    assert registry.allowlist == ("P",), "a pipeline without a validated strategy is not on the allowlist"


def test_the_mappings_are_read_only() -> None:
    registry = registry_of(module(strategies(strategy("a"))))
    for mapping in (registry.strategies, registry.vaes, registry.pipelines):
        with pytest.raises(TypeError):
            mapping["b"] = None  # type: ignore[index]


def test_a_strategy_joins_the_entries_it_was_validated_for() -> None:
    extra = strategy("mine", validated_for=("V", "P", "Elsewhere"))
    registry = registry_of(
        module(strategies(extra)),
        module(strategies(strategy("a")), vaes(vae("V")), pipelines(pipeline("P", "a"))),
    )
    assert registry.vaes["V"].strategies == ("a", "mine")
    assert registry.pipelines["P"].strategies == ("a", "mine")


def test_a_missing_strategy_names_the_nearest() -> None:
    registry = registry_of(module(strategies(strategy("tile"), strategy("patch"))))
    with pytest.raises(UnsupportedError, match=r"strategy 'tille'; did you mean 'tile'\?"):
        registry.strategy("tille")


def test_duplicate_names_name_both_plugins() -> None:
    both = module(strategies(strategy("a"))), module(strategies(strategy("a")))
    with pytest.raises(PluginError) as caught:
        registry_of(*both)
    for part in (
        "'p1' (from dist1 1.0)",
        "strategy 'a'",
        "'p0' (from dist0 1.0)",
        "VAEPP_PLUGINS_BLOCK=p1 or p0",
    ):
        assert part in str(caught.value)


def test_a_plugin_that_registers_twice_is_refused() -> None:
    with pytest.raises(PluginError, match="already registers"):
        registry_of(module(strategies(strategy("a"), strategy("a"))))


def test_the_wrong_kind_of_entry_is_refused() -> None:
    with pytest.raises(PluginError, match="registers VaeEntry where StrategyEntry is wanted"):
        registry_of(module(strategies(vae("V"))))


def test_two_distributions_with_one_name_are_refused_before_import(install: Callable[..., None]) -> None:
    refused = AssertionError("imported")
    install(Point("same", refused, Dist("one")), Point("same", refused, Dist("two")))
    with pytest.raises(PluginError, match=r"'same': one 1.0 and two 1.0 both ship it; uninstall one of them"):
        Registry.load()


def test_one_distribution_seen_twice_is_loaded_once(install: Callable[..., None]) -> None:
    # An editable install beside its source folder shows the same metadata twice.
    plugin = module(strategies(strategy("a")))
    install(Point("same", plugin, Dist("one")), Point("same", plugin, Dist("one")))
    assert set(Registry.load().strategies) == {"a"}


def test_a_hook_with_a_wrong_argument_is_refused() -> None:
    def vaepp_register_strategies(registrar: Any) -> None: ...

    with pytest.raises(PluginError) as caught:
        registry_of(module(vaepp_register_strategies))
    for part in ("'p0' (from dist0 1.0)", "vaepp_register_strategies", "registrar", "vaepp_sdk.hookspecs"):
        assert part in str(caught.value)


def test_a_misspelt_hook_is_refused() -> None:
    def vaepp_register_strategy(register: Any) -> None: ...

    with pytest.raises(PluginError, match=r"(?s)'p0'.*vaepp_register_strategy\b"):
        registry_of(module(vaepp_register_strategy))


def test_a_hook_that_raises_names_plugin_and_hook() -> None:
    def vaepp_register_vaes(register: Any) -> None:
        raise RuntimeError("boom")

    with pytest.raises(PluginError, match=r"'p0'.*vaepp_register_vaes raised RuntimeError: boom"):
        registry_of(module(vaepp_register_vaes))


@pytest.mark.parametrize(
    ("api", "message"),
    [
        (None, "does not state its plugin API; write VAEPP_API = 1"),
        (2, r"written for plugin API 2 and this vaepp has 1; .*VAEPP_PLUGINS_BLOCK=p0"),
        ("1", "written for plugin API '1'"),
    ],
)
def test_the_plugin_api_is_checked(api: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        registry_of(module(strategies(strategy("a")), api=api))


def test_a_plugin_that_raises_on_import_is_set_aside_and_named(install: Callable[..., None]) -> None:
    install(
        Point("bad", ImportError("no module named x"), Dist("bad-dist")),
        Point("good", module(strategies(strategy("a"))), Dist("good-dist")),
    )
    registry = Registry.load()
    assert set(registry.strategies) == {"a"}
    (problem,) = registry.problems
    assert "plugin 'bad' (from bad-dist 1.0) is set aside" in problem
    assert "ImportError: no module named x" in problem
    # Whoever asks for what that plugin may have brought is told of it.
    with pytest.raises(UnsupportedError, match=r"(?s)strategy 'b'.*bad-dist 1\.0.*no module named x"):
        registry.strategy("b")


def test_the_environment_limits_and_blocks(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(*(Point(name, module(strategies(strategy(name))), Dist(name)) for name in ("a", "b", "c")))
    assert set(Registry.load().strategies) == {"a", "b", "c"}
    monkeypatch.setenv("VAEPP_PLUGINS_ONLY", "a, b")
    assert set(Registry.load().strategies) == {"a", "b"}
    monkeypatch.setenv("VAEPP_PLUGINS_BLOCK", "c")
    assert set(Registry.load().strategies) == {"a", "b"}
    monkeypatch.setenv("VAEPP_PLUGINS_BLOCK", "c,b")
    with pytest.raises(PluginError, match="'b': VAEPP_PLUGINS_ONLY and VAEPP_PLUGINS_BLOCK both name it"):
        Registry.load()
    monkeypatch.delenv("VAEPP_PLUGINS_ONLY")
    assert set(Registry.load().strategies) == {"a"}


@pytest.mark.parametrize("variable", ["VAEPP_PLUGINS_ONLY", "VAEPP_PLUGINS_BLOCK"])
def test_a_switch_that_names_no_plugin_is_refused(
    variable: str, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Point("tile", module(), Dist("d")))
    monkeypatch.setenv(variable, "tiel")
    with pytest.raises(PluginError, match=rf"'tiel': {variable} names it .* did you mean 'tile'\?"):
        Registry.load()


def test_hook_calls_can_be_traced(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(Point("a", module(strategies(strategy("a"))), Dist("d")))
    Registry.load()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("VAEPP_PLUGINS_TRACE", "1")
    Registry.load()
    assert "vaepp_register_strategies" in capsys.readouterr().err
    monkeypatch.setenv("VAEPP_PLUGINS_TRACE", "true")
    with pytest.raises(UserError, match='VAEPP_PLUGINS_TRACE is "true"; it must be 1'):
        Registry.load()


class V:
    """A VAE class with an entry."""

    def decode(self) -> None: ...


class Kept(V):
    """Keeps decode, so V's entry serves it."""


class Changed(V):
    """Decodes in its own way, so V's entry would be wrong for it."""

    def decode(self) -> None: ...


def test_a_subclass_is_served_only_while_it_keeps_the_methods() -> None:
    registry = registry_of(module(vaes(vae("V"))))
    assert registry.vae(V).name == registry.vae(Kept).name == "V"
    with pytest.raises(UnsupportedError, match="no plugin registers the VAE class 'Changed'"):
        registry.vae(Changed)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("no_colon", 'not of the form "module:attribute"'),
        (":attribute", 'not of the form "module:attribute"'),
        ("no_such_module_xyz:a", "cannot import no_such_module_xyz:a"),
        ("math:no_such_name", "cannot import math:no_such_name"),
        ("math:pi", "math:pi is float, not something that can be called"),
    ],
)
def test_a_reference_that_cannot_be_used_names_its_owner(reference: str, problem: str) -> None:
    with pytest.raises(PluginError, match=rf"plugin my owner: .*{problem}"):
        load_object(reference, "my owner")


def test_references_are_imported_or_taken_as_they_are() -> None:
    assert load_object("attrs:frozen", "o") is attrs.frozen
    assert load_object(dict, "o") is dict
