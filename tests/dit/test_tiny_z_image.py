"""The small checkpoint that demos and tests run on."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
from safetensors.torch import load_file
from vaepp_plugins.tiny_z_image import build

from vaepp_sdk.registry import default_registry

SIZES = {"vae_width": 8, "sample_size": 64}


def test_the_same_sizes_give_the_same_files(tiny_model: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "again", **SIZES)
    names = [str(path.relative_to(tiny_model)) for path in tiny_model.rglob("*") if path.is_file()]
    assert len(names) >= 12
    same, different, missing = filecmp.cmpfiles(tiny_model, again, names, shallow=False)
    # A component's config may note the folder it was saved from.
    assert not missing
    assert not [name for name in different if name.endswith(".safetensors")], different
    assert len(same) >= 10


def test_a_finished_checkpoint_is_left_alone(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", **SIZES)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert build(folder, **SIZES) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left beside it"
    with pytest.raises(FileExistsError, match="other sizes"):
        build(folder, vae_width=16)


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a tiny checkpoint"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        build(tmp_path / "model", heads=0)
    assert list(tmp_path.iterdir()) == []


def test_pad_tokens_and_norms_are_not_what_a_new_model_has(tiny_model: Path) -> None:
    """With zeros and ones there, mistakes in padding and in shared statistics could not be seen."""
    transformer = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    assert transformer["x_pad_token"].std() > 0.5
    assert transformer["cap_pad_token"].std() > 0.5
    vae = load_file(tiny_model / "vae" / "diffusion_pytorch_model.safetensors")
    assert vae["decoder.conv_norm_out.weight"].std() > 0.05


def test_the_pipeline_entry_reads_the_real_models_widths() -> None:
    dit = default_registry().pipelines["ZImagePipeline"].dit
    assert dit is not None
    assert dit.tensor is not None
    real = {"n_heads": 30, "dim": 3840}
    assert {name: rule(real) for name, rule in dit.tensor.widths.items()} == {
        "attention heads": 30,
        "feed-forward width": 10240,
    }
