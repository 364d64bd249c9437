"""`[vae]` meets a pipeline's entry: when tiling is on, what takes no effect, which options go together."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from spec_models import StandIn, model_folder, stand_in_registry

from vaepp_sdk.entries import StrategyEntry
from vaepp_sdk.errors import PluginError, SpecError
from vaepp_sdk.markers import hookimpl
from vaepp_sdk.registry import Plugin, Registry, default_registry
from vaepp_sdk.resolve import Resolved, resolve
from vaepp_sdk.spec import PipelineSpec
from vaepp_sdk.vae_rules import serves_one_rank

REGISTRY = stand_in_registry()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


def resolved(model: Path, registry: Registry = REGISTRY, **tables: Any) -> Resolved:
    return resolve(PipelineSpec.load({"model": {"id": str(model)}, **tables}), registry)


def sizes(tensor: int, vae: int) -> dict[str, int]:
    return {"tensor_parallel_size": tensor, "vae_patch_parallel_size": vae}


TILING_IDLE = ("vae.vae_use_tiling takes no effect: strategy 'bands' does not work tile by tile.",)
TILING_ON = ("vae_use_tiling is switched on for VAE patch parallelism over 2 ranks.",)


@pytest.mark.parametrize(
    ("strategy", "tiling", "used", "notices"),
    [
        ("auto", None, True, TILING_ON),
        ("auto", False, True, TILING_ON),
        ("auto", True, True, ()),
        ("tiles", None, True, TILING_ON),
        ("tiles", False, True, TILING_ON),
        ("bands", None, None, ()),
        ("bands", False, False, ()),
        ("bands", True, None, TILING_IDLE),
    ],
)
def test_tiling_is_switched_on_where_the_strategy_needs_it(
    strategy: str, tiling: bool | None, used: bool | None, notices: tuple[str, ...], model: Path
) -> None:
    vae = {"strategy": strategy} | ({} if tiling is None else {"vae_use_tiling": tiling})
    found = resolved(model, parallel=sizes(2, 2), vae=vae)
    assert (found.vae_size, found.use_tiling, found.notices) == (2, used, notices)


def test_settings_without_effect_are_said(model: Path) -> None:
    vae = {"strategy": "bands", "output": "all", "options": {"halo": 3}}
    expected = (
        "vae.strategy, vae.output, vae.options take no effect: one rank does all of the VAE's work for "
        "ZImagePipeline."
    )
    assert resolved(model, vae=vae).notices == (expected,)
    assert resolved(model, vae={"output": "all"}).notices[0].startswith("vae.output takes no effect")
    assert resolved(model, vae={"vae_use_slicing": True, "vae_use_tiling": True}).notices == ()
    assert resolved(model, vae={"vae_use_tiling": True}).use_tiling is True


def test_without_vae_parallelism_every_rank_can_decode_for_itself(model: Path) -> None:
    assert resolved(model, parallel=sizes(2, 1), vae={"output": "all"}).notices == ()
    told = resolved(model, parallel=sizes(2, 1), vae={"output": "all", "strategy": "bands"}).notices
    assert told == ("vae.strategy takes no effect: one rank does all of the VAE's work for ZImagePipeline.",)
    told = resolved(model, parallel=sizes(2, 1), vae={"output": "sharded"}).notices
    assert told[0].startswith("vae.output takes no effect: ")


def test_an_option_can_give_one_rank_work(model: Path) -> None:
    class Alone(StandIn):
        @hookimpl
        def vaepp_register_strategies(self, register: Callable[[Any], None]) -> None:
            def changed(entry: StrategyEntry) -> None:
                options = ("halo",) if entry.name == "bands" else ()
                register(attrs.evolve(entry, single_rank_options=options))

            super().vaepp_register_strategies(changed)

    registry = Registry()
    registry.add(Plugin("stand_in", "stand-in 1.0"), Alone())
    vae = {"strategy": "bands", "output": "all", "options": {"halo": 3}}
    found = resolved(model, vae=vae, registry=registry)
    assert (found.vae_size, found.notices) == (1, ())
    tiled = resolved(model, vae={**vae, "vae_use_tiling": True}, registry=registry)
    assert (tiled.use_tiling, tiled.notices) == (None, TILING_IDLE)
    assert serves_one_rank(found.spec.vae, found.entry, registry)
    idle = resolved(model, vae={"strategy": "bands"}, registry=registry)
    assert idle.notices
    assert not serves_one_rank(idle.spec.vae, idle.entry, registry)
    assert not serves_one_rank(found.spec.vae, None, registry)


@pytest.mark.parametrize(
    ("strategy", "options", "told"),
    [
        (
            "shard",
            {"peak_limit": "abc"},
            "peak_limit is 'abc'; it must be a number with KiB, MiB or GiB, as in",
        ),
        ("shard", {"row_blocks": 2, "peak_limit": "1GiB"}, "row_blocks and peak_limit are both set; set one"),
        (
            "shard",
            {"deterministic": "ranks", "row_blocks": 2, "recompute": "never"},
            "deterministic = 'ranks' does not go together with row_blocks and recompute; leave one out: row",
        ),
        (
            "shard",
            {"deterministic": "reference", "repeat": "always"},
            "deterministic = 'reference' does not go together with repeat = 'always'; leave one out: its",
        ),
        (
            "shard",
            {"recompute": "always"},
            "recompute = 'always' has no effect without row blocks; set row_bl",
        ),
        ("shard", {"row_blocks": 2, "repeat": "always"}, "repeat = 'always' does not go together with row_b"),
        ("tile", {"tile_overlap_factor": 1.0}, "tile_overlap_factor is 1; it must be below 1"),
        ("shard", {"deterministic": "ranks", "repeat": "never", "row_blocks": 1, "recompute": "auto"}, ""),
        ("shard", {"row_blocks": 2, "repeat": "never", "recompute": "always"}, ""),
        ("shard", {"row_blocks": 1, "peak_limit": "1.5GiB"}, ""),
        ("tile", {"tile_overlap_factor": 0.75}, ""),
    ],
)
def test_options_that_exclude_one_another(
    strategy: str, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    model, vae = model_folder(tmp_path / "m"), {"strategy": strategy, "options": options}
    if not told:
        assert resolved(model, registry=default_registry(), vae=vae).spec.vae.options == options
        return
    with pytest.raises(SpecError) as caught:
        resolved(model, registry=default_registry(), vae=vae)
    (fault,) = caught.value.faults
    assert str(fault).startswith(f"$.vae.options: {told}")


KL = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "sample_size": 1024,
    "latent_channels": 16,
    "out_channels": 3,
}
"""The VAE of Z-Image and FLUX.1."""

WAN = {
    "_class_name": "AutoencoderKLWan",
    "out_channels": 3,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "z_dim": 16,
}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tile_size": 7}, "tile_size is 7; it must be a positive multiple of 8, .*; nearest: 8$"),
        ({"tile_size": 500}, "tile_size is 500; it must be .*; nearest: 496$"),
        ({"tile_size": 8, "tile_overlap_factor": 0.5}, "tiles of 1 .* advance"),
        ({"tile_overlap_factor": 0.995}, "tiles of 128 .* advance"),
        ({"tile_overlap_factor": 0.3}, r"do not advance by whole latents; tile_overlap_factor = 0\.30"),
        ({"tile_size": 512}, ""),
        ({"tile_overlap_factor": 0.5}, ""),
    ],
)
def test_options_that_do_not_fit_the_models_vae(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    """Read from its configuration, so `--check` says so too."""
    vae = {"strategy": "tile", "options": options}
    model = model_folder(tmp_path / "m", vae=KL)
    if not told:
        assert resolved(model, registry=default_registry(), vae=vae).spec.vae.options == options
        return
    with pytest.raises(SpecError, match=r"\$\.vae\.options: ") as caught:
        resolved(model, registry=default_registry(), vae=vae)
    assert re.search(told, str(caught.value.faults[0]))


def test_a_class_whose_tiles_have_no_such_options(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "m", "WanPipeline", {"patch_size": [1, 2, 2]}, WAN)
    vae = {"strategy": "tile"}
    with pytest.raises(SpecError, match=r"AutoencoderKLWan has no overlap factor; leave the options out"):
        resolved(model, registry=default_registry(), vae={**vae, "options": {"tile_size": 128}})
    resolved(model, registry=default_registry(), vae=vae)


def test_what_a_configuration_leaves_out_only_the_vae_can_tell(model: Path) -> None:
    vae = {"strategy": "tile", "options": {"tile_size": 7}}
    assert resolved(model, registry=default_registry(), vae=vae).spec.vae.options == {"tile_size": 7}


def test_a_strategys_rule_that_raises_is_the_plugins_fault(model: Path) -> None:
    registry = stand_in_registry()
    broken = attrs.evolve(registry.strategies["bands"], conflict=lambda options: options["no such"])
    registry._strategies.entries["bands"] = broken
    with pytest.raises(PluginError, match=r"plugin for strategy bands: its rule 'conflict' raised KeyError"):
        resolved(model, registry=registry, vae={"strategy": "bands"})
    registry = default_registry()
    broken = attrs.evolve(registry.strategies["tile"], unfit=lambda options, _: options["no such"])
    model = model_folder(model.parent / "kl", vae=KL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._strategies.entries, "tile", broken)
        with pytest.raises(PluginError, match=r"strategy tile: its rule 'unfit' raised KeyError"):
            resolved(model, registry=registry, vae={"strategy": "tile", "options": {"tile_size": 64}})
