"""A spec meets its model and the plugins: the guide's rules, and what is refused before a rank starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from spec_models import NO_WEIGHTS, PIPELINE, model_folder, stand_in_registry

from vaepp_sdk.errors import PluginError, SpecError, UnsupportedError
from vaepp_sdk.registry import Plugin, Registry, default_registry
from vaepp_sdk.resolve import Resolved, resolve
from vaepp_sdk.spec import ModelSpec, ParallelSpec, PipelineSpec

REGISTRY = stand_in_registry()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


def resolved(
    model: Path, overrides: Sequence[str] = (), registry: Registry = REGISTRY, **tables: Any
) -> Resolved:
    return resolve(PipelineSpec.load({"model": {"id": str(model)}, **tables}, overrides), registry)


def sizes(tensor: int, vae: int, **more: int) -> dict[str, int]:
    return {"tensor_parallel_size": tensor, "vae_patch_parallel_size": vae, **more}


def refused(model: Path, overrides: Sequence[str] = (), **tables: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        resolved(model, overrides, **tables)
    return [str(fault) for fault in caught.value.faults]


def test_the_plain_case(model: Path) -> None:
    found = resolved(model)
    assert (found.pipeline_class, found.model_path) == (PIPELINE, model)
    assert found.entry is REGISTRY.pipelines[PIPELINE]
    assert (found.vae_size, found.use_tiling, found.notices) == (1, None, ())
    assert found.dims.dit_parallel_size == 1


def test_not_allowlisted_is_said_in_the_guides_words_and_goes_on(tmp_path: Path) -> None:
    other = model_folder(tmp_path / "sdxl", "StableDiffusionXLPipeline")
    found = resolved(other, parallel=sizes(1, 2))
    expected = (
        "vae_patch_parallel_size=2 is set but VAE patch parallelism is only enabled for "
        f"{', '.join(sorted(REGISTRY.pipelines))}; ignoring."
    )
    assert found.notices == (expected,)
    assert (found.entry, found.vae_size, found.use_tiling) == (None, 1, None)


def test_not_allowlisted_with_no_allowlist_at_all(tmp_path: Path) -> None:
    other = model_folder(tmp_path / "sdxl", "StableDiffusionXLPipeline")
    notices = resolved(other, registry=Registry(), parallel=sizes(1, 2)).notices
    assert "only enabled for no pipeline; ignoring." in notices[0]


def test_larger_than_the_group_is_reduced_and_said(model: Path) -> None:
    found = resolved(model, parallel=sizes(2, 4), vae={"vae_use_tiling": True})
    assert found.vae_size == 2
    assert found.notices == ("vae_patch_parallel_size=4 is larger than the DiT group of 2; reduced to 2.",)


def test_larger_than_one_rank_is_the_plain_vae(model: Path) -> None:
    found = resolved(model, parallel=sizes(1, 4))
    assert (found.vae_size, found.use_tiling) == (1, None)
    assert found.notices == ("vae_patch_parallel_size=4 is larger than the DiT group of 1; reduced to 1.",)


def test_strategies(model: Path) -> None:
    assert refused(model, vae={"strategy": "TILES"}) == [
        "$.vae.strategy: no plugin registers \"TILES\"; did you mean 'tiles'?"
    ]
    assert refused(model, vae={"strategy": ""}) == [
        '$.vae.strategy: no plugin registers ""; known here: auto, bands, tiles'
    ]
    assert refused(model, parallel=sizes(2, 2), vae={"strategy": "other"}) == [
        '$.vae.strategy: "other" is not validated for ZImagePipeline; it must be one of auto, tiles, bands'
    ]
    assert refused(model, vae={"options": {"halo": 3}}) == [
        "$.vae.options: strategy 'auto' takes no options; name a strategy, or leave the options out"
    ]
    assert refused(model, vae={"strategy": "bands", "options": {"hallo": 3, "halo": "3"}}) == [
        "$.vae.options.hallo: strategy 'bands' has no such option; did you mean 'halo'?",
        '$.vae.options.halo: found "3"; it must be an integer',
    ]
    assert refused(model, vae={"strategy": "bands", "options": {"halo": 10**400}}) == [
        "$.vae.options.halo: found an integer of about 401 digits; it must be at most 64"
    ]
    assert refused(model, vae={"strategy": "tiles", "options": {"\u202e": 3}})[0].startswith(
        '$.vae.options."\\u202e"'
    )


def test_a_plugin_that_was_set_aside_is_named(model: Path) -> None:
    registry = stand_in_registry()
    registry.plugins.append(Plugin("lost", "lost 1.0", "it cannot be imported: ImportError: x"))
    problem = "plugin 'lost' (from lost 1.0) is set aside: it cannot be imported: ImportError: x"
    assert resolved(model, registry=registry).notices == (problem,)
    with pytest.raises(SpecError, match="ImportError: x"):
        resolved(model, registry=registry, vae={"strategy": "lost"})


def test_what_an_entry_names_must_be_registered(model: Path) -> None:
    registry = stand_in_registry()
    registry._vaes.entries.clear()
    del registry._strategies.entries["bands"]
    assert resolved(model, registry=registry).vae_size == 1
    with pytest.raises(SpecError) as caught:
        resolved(model, registry=registry, parallel=sizes(2, 2))
    assert [fault.path for fault in caught.value.faults] == [
        "$.parallel.vae_patch_parallel_size",
        "$.vae.strategy",
    ]


AXES = {
    "data": "data_parallel_size",
    "cfg": "cfg_parallel_size",
    "pipeline": "pipeline_parallel_size",
    "ring": "ring_degree",
    "ulysses": "ulysses_degree",
}


@pytest.mark.parametrize("axis", AXES)
def test_dimensions_that_the_entry_lacks(axis: str, model: Path) -> None:
    (fault,) = refused(model, parallel={AXES[axis]: 2})
    assert fault == (
        f"$.parallel.{AXES[axis]}: found 2, and no plugin says how to split {PIPELINE} by {axis}; "
        f"write 1; {PIPELINE} can use tensor_parallel_size"
    )


def real_model(folder: Path) -> Path:
    return model_folder(folder, transformer={"n_heads": 30, "dim": 3840, "n_layers": 30})


@pytest.mark.parametrize(
    "parallel",
    [
        {"data_parallel_size": 3, "ring_degree": 4},
        {"cfg_parallel_size": 2, "ulysses_degree": 4},
        {"pipeline_parallel_size": 30},
        {"tensor_parallel_size": 2, "ulysses_degree": 15},
    ],
)
def test_sizes_of_z_image_that_work(parallel: dict[str, int], tmp_path: Path) -> None:
    found = resolved(real_model(tmp_path / "m"), registry=default_registry(), parallel=parallel)
    assert found.dims.dit_parallel_size == math.prod(parallel.values())


@pytest.mark.parametrize(
    ("parallel", "found", "fix"),
    [
        (
            {"cfg_parallel_size": 3},
            "3, and guidance has two branches",
            "write 2, one rank for each branch, or 1",
        ),
        ({"pipeline_parallel_size": 31}, "31, and the model has layers = 30", "at most 30 work"),
        ({"ulysses_degree": 31}, "31, and there are attention heads = 30 to share out", "at most 30 work"),
        (
            {"ulysses_degree": 16, "tensor_parallel_size": 2},
            "16, and there are attention heads = 30 / tensor_parallel_size = 2 to share out",
            "at most 15 work",
        ),
    ],
)
def test_sizes_of_z_image_that_do_not_fit(
    parallel: dict[str, int], found: str, fix: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError) as caught:
        resolved(real_model(tmp_path / "m"), registry=default_registry(), parallel=parallel)
    key = next(iter(parallel))
    assert [str(fault) for fault in caught.value.faults] == [f"$.parallel.{key}: found {found}; {fix}"]


@pytest.mark.parametrize("size", [2, 5, 10])
def test_tensor_sizes_that_divide_the_real_model(size: int, model: Path) -> None:
    assert resolved(model, parallel=sizes(size, 1)).dims.tensor == size


def test_tensor_sizes_that_do_not_divide(model: Path, tmp_path: Path) -> None:
    assert refused(model, parallel=sizes(4, 1)) == [
        "$.parallel.tensor_parallel_size: 4 does not divide attention heads = 30; sizes that work: 2, 5, 10"
    ]
    (fault,) = refused(model, parallel=sizes(3, 1))
    assert "3 does not divide feed-forward width = 10240; sizes that work: 2, 5, 10" in fault
    odd = model_folder(tmp_path / "odd", transformer={"n_heads": 7, "dim": 3})
    assert refused(odd, parallel=sizes(2, 1)) == [
        "$.parallel.tensor_parallel_size: 2 does not divide attention heads = 7; only 1 works for this model"
    ]


def test_tensor_without_a_plan_is_refused_by_name(tmp_path: Path) -> None:
    other = model_folder(tmp_path / "sdxl", "StableDiffusionXLPipeline")
    (fault,) = refused(other, parallel=sizes(2, 1))
    assert fault.endswith(
        "no plugin says how to split StableDiffusionXLPipeline by tensor; write 1; "
        f"{', '.join(sorted(REGISTRY.pipelines))} can be split by tensor"
    )


def test_widths_that_the_config_does_not_give(tmp_path: Path) -> None:
    other = model_folder(tmp_path / "m", transformer={"dim": 3})
    with pytest.raises(
        UnsupportedError, match=r"transformer/config.json does not give the width 'attention heads'"
    ):
        resolved(other, parallel=sizes(2, 1))


def test_call_is_checked_before_anything_is_loaded(model: Path, tmp_path: Path) -> None:
    call = {"prompt": "a", "heigth": 64, "latents": 1, "sigmas": "x", "seed": 1}
    assert refused(model, call=call) == [
        "$.call.heigth: ZImagePipeline takes no such argument; did you mean 'height'?",
        "$.call.latents: it takes an object that no spec can write; leave it out",
        '$.call.sigmas: found "x"; it must be a list, each item a number',
    ]
    other = model_folder(tmp_path / "sdxl", "StableDiffusionXLPipeline")
    assert refused(other, call={"cfg_truncation": 1.0})[0].startswith(
        "$.call.cfg_truncation: StableDiffusionXLPipeline takes"
    )


def test_every_fault_is_told_at_once(model: Path) -> None:
    parallel = sizes(4, 2, ring_degree=2)
    faults = refused(model, parallel=parallel, vae={"strategy": "x"}, call={"y": 1})
    assert [fault.split(":")[0] for fault in faults] == [
        "$.parallel.ring_degree",
        "$.parallel.tensor_parallel_size",
        "$.vae.strategy",
        "$.call.y",
    ]


def test_a_spec_built_by_hand_is_checked(model: Path) -> None:
    parallel = ParallelSpec(tensor_parallel_size=-1)
    with pytest.raises(SpecError, match="at least 1"):
        resolve(PipelineSpec(model=ModelSpec(str(model)), parallel=parallel), REGISTRY)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "holds no model_index.json"),
        ({"model_index.json": "{"}, "is not JSON"),
        ({"model_index.json": "[" * 100_000}, "is not JSON"),
        ({"model_index.json": "\udcff"}, "is not JSON"),
        ({"model_index.json": "[]"}, "holds no JSON object"),
        ({"model_index.json": "{}"}, "names None as its pipeline class"),
        ({"model_index.json": '{"_class_name": ["a", "B"]}'}, "names a list of 2"),
        ({"model_index.json": '{"_class_name": "a.b\\u202e"}'}, "names"),
        ({"model_index.json": '{"_class_name": "NoSuchPipeline"}'}, "neither in diffusers"),
        ({"model_index.json": '{"_class_name": "ZImagePipeline"}'}, "cannot be read (No such file"),
    ],
)
def test_folders_that_are_no_model(files: dict[str, str], found: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    faults = refused(tmp_path, parallel=sizes(2, 1))
    assert len(faults) == 1
    assert faults[0].startswith("$.model.id: ")
    assert found in faults[0]
    assert faults[0].isprintable()


def test_a_pipe_is_not_waited_for(model: Path) -> None:
    config = model / "transformer" / "config.json"
    config.unlink()
    os.mkfifo(config)
    told = f"$.model.id: {config} is no regular file; give a complete model folder"
    assert told in refused(model, parallel=sizes(2, 1))


def test_an_entry_whose_module_is_missing_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaepp_sdk.signature._module_path", lambda _: None)
    with pytest.raises(PluginError, match=r"ZImagePipeline.*is not installed"):
        resolved(model)


def test_a_call_that_cannot_be_checked_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaepp_sdk.resolve.read_signature", lambda *_: None)
    assert "[call] is not checked" in resolved(model, call={"anything": 1}).notices[0]


def test_a_revision_of_a_local_folder_is_said(model: Path) -> None:
    assert resolved(model, ["model.revision=main"]).notices == (
        "model.revision takes no effect: the model is a local folder.",
    )


def test_offloading_from_the_cpu_is_said(model: Path) -> None:
    told = "model.offload takes no effect: ranks compute on the CPU, where modules live already."
    here = ["model.offload=stages", "model.device=cpu"]
    assert resolved(model, here).notices == (told,)
    assert resolved(model, here[:1]).notices == (), "what `auto` is, ranks find out"


def test_a_variant_that_a_folder_lacks(model: Path) -> None:
    lacking = '$.model.variant: the model has no safetensors files of "fp16"; '
    assert refused(model, ["model.variant=fp16"]) == [f"{lacking}leave it out"]
    names = ("model.safetensors", "model.bf16.safetensors", "model.ema-00001-of-00002.safetensors")
    for name in (*names, "model-00001-of-00002.safetensors", "model.fp16.bin"):
        (model / "vae" / name).write_bytes(NO_WEIGHTS)
    assert refused(model, ["model.variant=fp16"]) == [f"{lacking}it has those of bf16, ema; or leave it out"]
    for variant in ("bf16", "ema"):
        assert resolved(model, [f"model.variant={variant}"]).notices == ()


def test_round_trip_to_a_rank(model: Path) -> None:
    found = resolved(model, ["output.dir=o"], parallel=sizes(2, 4), call={"prompt": ["a"], "seed": 3})
    data = json.loads(json.dumps(found.to_dict()))
    # The rank decides nothing again: the model folder may even have changed since.
    (model / "model_index.json").unlink()
    assert Resolved.from_dict(data, REGISTRY) == found
