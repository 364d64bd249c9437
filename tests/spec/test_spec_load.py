"""What a good spec becomes: defaults, paths, overrides, the round trip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from vaepp_sdk.errors import SpecError
from vaepp_sdk.spec import LimitsSpec, ModelSpec, OutputSpec, ParallelSpec, PipelineSpec, VaeSpec

TABLES: dict[str, Any] = {"model": {"id": "org/name"}}


def test_defaults() -> None:
    spec = PipelineSpec.load(TABLES)
    assert spec.model == ModelSpec("org/name", dtype="bfloat16", device="auto")
    assert spec.parallel == ParallelSpec(1, 1, 1, 1, 1, 1, 1)
    assert spec.vae == VaeSpec(None, False, "auto", "rank0", {})
    assert spec.limits == LimitsSpec(600.0, 3600.0, 60.0, 120.0, 86400.0, 600.0)
    assert (spec.call, spec.output) == ({}, None)


def test_an_integer_is_taken_where_a_number_is_asked_for() -> None:
    limits = PipelineSpec.load({**TABLES, "limits": {"boot": 5}}).limits
    assert limits.boot == 5.0
    assert isinstance(limits.boot, float)


def test_dims() -> None:
    sizes = {"tensor_parallel_size": 2, "ulysses_degree": 3, "vae_patch_parallel_size": 4}
    parallel = PipelineSpec.load({**TABLES, "parallel": sizes}).parallel
    assert parallel.dims.dit_parallel_size == 6
    assert (parallel.dims.tensor, parallel.dims.ulysses) == (2, 3)


def test_the_caller_keeps_its_own_tables() -> None:
    prompts = ["a"]
    tables = {**TABLES, "call": {"prompt": prompts}}
    spec = PipelineSpec.load(tables, ["call.seed=7", "vae.vae_use_tiling=true"])
    prompts.append("b")
    assert spec.call == {"prompt": ["a"], "seed": 7}
    assert tables == {**TABLES, "call": {"prompt": ["a", "b"]}}


def test_round_trip(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file = tmp_path / "spec.toml"
    file.write_text(
        '[model]\nid = "./model"\n[parallel]\ntensor_parallel_size = 2\n[vae]\nstrategy = "x"\n'
        '[vae.options]\nhalo = 8\n[call]\nprompt = ["a", "\u202e"]\nsigmas = [1, 0.5]\n'
        "[output]\n[limits]\nload = 9\n"
    )
    spec = PipelineSpec.load(file)
    assert spec.model.folder == tmp_path / "model"
    assert spec.output == OutputSpec(str(tmp_path / "out"))
    assert (spec.source, spec.base) == (str(file), tmp_path)
    again = PipelineSpec.load(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    reloaded = PipelineSpec.load(spec, ["call.seed=3"])
    assert (reloaded.call["seed"], reloaded.source, reloaded.base) == (3, spec.source, spec.base)


def test_a_spec_built_by_hand_is_checked_too() -> None:
    spec = PipelineSpec(model=ModelSpec("org/name"), parallel=ParallelSpec(tensor_parallel_size="2"))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"\$.parallel.tensor_parallel_size"):
        PipelineSpec.load(spec)


def test_relative_paths_start_at_the_spec_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs").mkdir()
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "specs" / "a.toml").write_text('[model]\nid = "../models/m"\n[output]\ndir = "../o/p"')
    monkeypatch.chdir(tmp_path)
    spec = PipelineSpec.load("specs/a.toml")
    assert spec.model.folder == tmp_path / "models" / "m"
    assert spec.output == OutputSpec(str(tmp_path / "o" / "p"))
    assert PipelineSpec.load({"model": {"id": "models/m"}}).model.folder == tmp_path / "models" / "m"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PipelineSpec.load({"model": {"id": "~/models/m"}}).model.folder == tmp_path / "models" / "m"


def test_a_link_to_a_folder_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "loop").symlink_to("loop")
    spec = PipelineSpec.load(
        {"model": {"id": str(tmp_path / "link")}, "output": {"dir": str(tmp_path / "link")}}
    )
    assert spec.output == OutputSpec(str(tmp_path / "link"))
    with pytest.raises(SpecError, match="is no folder"):
        PipelineSpec.load({**TABLES, "output": {"dir": str(tmp_path / "loop" / "x")}})


def test_a_checkpoint_of_one_file_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd3.safetensors").touch()
    (tmp_path / "name").touch()
    with pytest.raises(SpecError, match=r'found "sd3\.safetensors", which is one file; write .*diffusers'):
        PipelineSpec.load({"model": {"id": "sd3.safetensors"}})
    assert PipelineSpec.load({"model": {"id": "name"}}).model.id == "name"
    assert PipelineSpec.load({"model": {"id": "other.safetensors"}}).model.id == "other.safetensors"


@pytest.mark.parametrize("text", ["name", "org/name", "Tongyi-MAI/Z-Image-Turbo", "a.b_c-d/e.f", "x"])
def test_hub_ids(text: str) -> None:
    model = PipelineSpec.load({"model": {"id": text}}).model
    assert (model.id, model.folder) == (text, None)


@pytest.mark.parametrize(
    ("override", "table", "key", "value"),
    [
        ("parallel.tensor_parallel_size=2", "parallel", "tensor_parallel_size", 2),
        ("vae.vae_use_tiling=true", "vae", "vae_use_tiling", True),
        (" vae.strategy = patch ", "vae", "strategy", "patch"),
        ('vae.strategy="patch"', "vae", "strategy", "patch"),
        ("vae.options.halo=8", "vae", "options", {"halo": 8}),
        ("model.id=b/c", "model", "id", "b/c"),
        ("limits.boot=1e2", "limits", "boot", 100.0),
    ],
)
def test_overrides(override: str, table: str, key: str, value: object) -> None:
    spec = PipelineSpec.load({**TABLES, "vae": {"strategy": "tile"}}, [override])
    assert getattr(getattr(spec, table), key) == value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("call.prompt=a red house", "a red house"),
        ("call.prompt=a = b", "a = b"),
        ("call.prompt=", ""),
        ('call.prompt="1984"', "1984"),
        ('call.prompt=["a", "b"]', ["a", "b"]),
        ("call.prompt='x'\nextra = 1", "'x'\nextra = 1"),
        ("call.prompt=a # b", "a # b"),
    ],
)
def test_prompts_in_overrides(override: str, value: object) -> None:
    spec = PipelineSpec.load(TABLES, ["call.prompt=first", override])
    assert spec.call == {"prompt": value}


@pytest.mark.parametrize(
    ("override", "path", "fix"),
    [
        ("parallel.tensor_parallel_size=two", "$.parallel.tensor_parallel_size", "it must be an integer"),
        ("parallel.tensor_parallel_size=2.0", "$.parallel.tensor_parallel_size", "it must be an integer"),
        ("call.prompt=1984", "$.call.prompt", "it must be a string"),
        ("parallel.tp=2", "$.parallel.tp", "known here"),
        ("seed=7", 'override "seed=7"', "write it as in"),
        ("=7", 'override "=7"', "write it as in"),
        ("a.b", 'override "a.b"', "write it as in"),
        ("model.id.x=1", "override model.id.x", "only a table has keys"),
        ("call.a=" + "[" * 5000, "$.call.a", ""),
    ],
)
def test_faulty_overrides(override: str, path: str, fix: str) -> None:
    if path == "$.call.a":
        # Not TOML, so a string: its type is checked against the pipeline's call later.
        assert PipelineSpec.load(TABLES, [override]).call["a"] == "[" * 5000
        return
    with pytest.raises(SpecError) as caught:
        PipelineSpec.load(TABLES, [override])
    assert any(fault.path == path and fix in fault.fix for fault in caught.value.faults), caught.value


def test_one_string_is_no_list_of_overrides() -> None:
    with pytest.raises(SpecError) as caught:
        PipelineSpec.load(TABLES, "model.device=cpu")
    (fault,) = caught.value.faults
    assert str(fault) == 'overrides: found "model.device=cpu"; give a list of such strings'


def test_classes_are_frozen() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        PipelineSpec.load(TABLES).model.dtype = "float32"  # type: ignore[misc]


def test_specs_are_checked_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "import vaepp_sdk.spec, vaepp_sdk.resolve, vaepp_sdk.request\n"
        "from vaepp_sdk.registry import default_registry\n"
        "registry = default_registry()\n"
        "assert not registry.strategies or registry.plugins\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)
