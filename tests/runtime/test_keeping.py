"""Latents outlive whatever happens after `denoise`, and are decoded later without denoising again."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import save_file

from vaepp_sdk import Pipeline, RankError, SpecError, UserError, VaeppWarning, keeping, pipeline
from vaepp_sdk.decoding import Decoder
from vaepp_sdk.kept import KeptRun
from vaepp_sdk.latents import LatentStore, write_latents

KILLER = """
import os, signal
from vaepp_sdk import hookimpl

VAEPP_API = 1

@hookimpl
def vaepp_on_stage_start(event):
    kind, stage, rank = os.environ.get("STRIKE", "no at 0").split()
    if event.stage == stage and event.rank == int(rank):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def spec(model: Path, folder: Path, **tables: Any) -> dict[str, Any]:
    return {
        "model": {"id": str(model), "dtype": "float32", "device": "cpu"},
        "parallel": {"tensor_parallel_size": 2, "vae_patch_parallel_size": 2},
        "vae": {"vae_use_tiling": True, "strategy": "tile"},
        "call": {
            "prompt": ["a red cube", "a cup"],
            "height": 96,
            "width": 128,
            "num_inference_steps": 2,
            "max_sequence_length": 64,
            "seed": 3,
        },
        "output": {"dir": str(folder)},
        **tables,
    }


def install(plugin: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a plugin where ranks find it, through the entry points, as an installed one."""
    (folder / "killer_plugin.py").write_text(plugin)
    package = folder / "killer-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: killer\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vaepp_sdk]\nkiller = killer_plugin\n")
    monkeypatch.syspath_prepend(str(folder))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


@pytest.fixture(scope="module")
def kept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run that went well and kept its latents, made by two replicas."""
    folder = tmp_path_factory.mktemp("kept") / "out"
    output = {"dir": str(folder), "keep_latents": True}
    parallel = {"data_parallel_size": 2, "vae_patch_parallel_size": 2}
    with Pipeline.from_spec(spec(tiny_model, folder, parallel=parallel, output=output)) as pipe:
        result = pipe()
    assert result.latents == str(folder / "run-0")
    return result, folder / "run-0"


def test_what_is_kept_says_what_made_it(kept: tuple[Any, Path], tiny_model: Path) -> None:
    folder = kept[1]
    assert sorted(path.name for path in folder.iterdir()) == [
        "latents-0000.safetensors",
        "latents-0001.safetensors",
    ]
    run = KeptRun.read(folder)
    assert [(file.first, file.count) for file in run.files] == [(0, 1), (1, 1)]
    assert (run.seed, run.pipeline) == (3, "ZImagePipeline")
    assert run.call["prompt"] == ["a red cube", "a cup"]
    assert run.spec["model"]["id"] == str(tiny_model)
    assert run.vae["latent_channels"] == 16
    assert "vaepp" in run.software
    with safe_open(run.files[0].path, framework="pt") as file:  # the same file for everybody's reader
        assert file.get_tensor("latents").shape == (1, 16, 12, 16)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the one rank of a launcher's job: nothing is started, and the test sees into it."""
    join_alone(monkeypatch)


def join_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pipeline, "end_with_launcher", lambda: None)  # the tests' own process


def alone(model: Path, folder: Path, **tables: Any) -> dict[str, Any]:
    """The same pictures on one rank."""
    return spec(model, folder, **{"parallel": {}, "vae": {"vae_use_tiling": True}, **tables})


def test_other_ranks_decode_the_same_bits(kept: tuple[Any, Path]) -> None:
    """Three ranks do not divide what tensor parallelism would split; nothing is split here."""
    result, folder = kept
    sizes = ("data_parallel_size=1", "tensor_parallel_size=3", "vae_patch_parallel_size=3")
    again = Pipeline.resume(folder, [f"parallel.{size}" for size in sizes])
    assert [end.stage for end in again.stages[0]] == ["load", "decode", "save"]
    assert all(same(*pair) for pair in zip(again.images, result.images, strict=True))
    assert again.latents == str(folder)
    assert len(list(folder.iterdir())) == 2, "they can be decoded as often as one likes"


def test_a_killed_rank_leaves_them_and_another_strategy_goes_on(
    kept: tuple[Any, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(KILLER, tmp_path, monkeypatch)
    monkeypatch.setenv("STRIKE", "kill decode 0")
    folder = tmp_path / "out"
    pipe = Pipeline.from_spec(spec(tiny_model, folder))
    with pytest.raises(RankError, match="rank 0 failed in stage decode") as caught:
        pipe()
    run = folder / "run-0"
    assert f"the latents are kept; go on from them with: vaepp-run --resume {run}" in caught.value.__notes__
    assert [path.name for path in run.iterdir()] == ["latents-0000.safetensors"]
    assert not list(folder.glob("*.png"))
    monkeypatch.setenv("STRIKE", "no at 0")
    overrides = ["tensor_parallel_size=1", "vae_patch_parallel_size=1"]
    vae = ["vae.strategy=shard", "vae.options.row_blocks=2", "vae.vae_use_tiling=false"]
    join_alone(monkeypatch)
    again = Pipeline.resume(run, [*(f"parallel.{size}" for size in overrides), *vae])
    assert len(again.images) == 2
    for one, other in zip(again.images, kept[0].images, strict=True):
        assert one.size == other.size
        assert not same(one, other), "bands are not tiles"
    with Image.open(again.files[0]) as saved:
        held = json.loads(saved.text["vaepp"])  # type: ignore[attr-defined]
    assert held["spec"]["vae"]["strategy"] == "shard"


@pytest.mark.usefixtures("inside")
def test_nothing_is_left_after_a_run_that_went_well(tiny_model: Path, tmp_path: Path) -> None:
    with Pipeline.from_spec(alone(tiny_model, tmp_path / "out")) as pipe:
        assert pipe().latents is None
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".png", ".png"]


@pytest.mark.usefixtures("inside")
def test_a_request_that_is_refused_late_keeps_them_and_the_ranks_live(
    kept: tuple[Any, Path], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    output = {"dir": str(folder), "overwrite": True}
    with Pipeline.from_spec(alone(tiny_model, folder, output=output)) as pipe:
        taken = folder / "0000-a-red-cube-seed3.png"
        taken.mkdir(parents=True)
        with pytest.raises(UserError, match="cannot write") as caught:
            pipe()
        assert f"--resume {folder / 'run-0'}" in "".join(caught.value.__notes__)
        assert len(pipe(seed=9, prompt="a cat").images) == 1
    assert [path.name for path in folder.glob("run-*")] == ["run-0"]
    taken.rmdir()
    again = Pipeline.resume(folder / "run-0")
    for one, other in zip(again.images, kept[0].images, strict=True):
        # Two replicas made one picture each, one rank both at once: equal up to one step of 255.
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.usefixtures("inside")
def test_where_nothing_is_saved_they_are_out_of_sight(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tables = {key: table for key, table in alone(tiny_model, tmp_path).items() if key != "output"}
    pipe = Pipeline.from_spec(tables)
    monkeypatch.setattr(Decoder, "decode", boom)
    with pytest.raises(RankError) as caught:
        pipe()
    store = tmp_path / f"vaepp-latents-{os.getuid()}"
    assert any(str(store / "run-0") in note for note in caught.value.__notes__)
    assert store.stat().st_mode & 0o077 == 0


def boom(*_: Any) -> None:
    raise RuntimeError("boom")


@pytest.mark.usefixtures("inside")
def test_latents_that_do_not_fit_on_a_full_disk_are_kept_elsewhere_or_the_loss_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run goes on: its pictures may still come out."""
    folder, spare = tmp_path / "out", tmp_path / f"vaepp-latents-{os.getuid()}"
    full = [folder]

    def write(run: Path, *rest: Any) -> None:
        if run.parent in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_latents(run, *rest)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(keeping, "write_latents", write)
    output = {"dir": str(folder), "overwrite": True}
    with Pipeline.from_spec(alone(tiny_model, folder, output=output)) as pipe:
        taken = folder / "0000-a-red-cube-seed3.png"
        taken.mkdir()
        words = r"the latents cannot be kept in .*No space left.*; they are in .*run-0 while"
        with (
            pytest.warns(VaeppWarning, match=words),
            pytest.raises(UserError, match="cannot write") as caught,
        ):
            pipe()
        assert f"--resume {spare / 'run-0'}" in "".join(caught.value.__notes__)
        assert KeptRun.read(spare / "run-0").seed == 3
        full.append(spare)
        with pytest.warns(VaeppWarning, match=r"No space left.*, nor in .*No space left.*loses them"):
            assert len(pipe(seed=9, prompt="a cat").images) == 1
    assert not list(folder.glob("run-*"))
    assert [path.name for path in spare.iterdir()] == ["run-0"]


def spoiled(folder: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> Path:
    copy = tmp_path / "run-9"
    shutil.copytree(folder, copy)
    spoil(copy / "latents-0000.safetensors")
    return copy


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def foreign(path: Path) -> None:
    save_file({"latents": torch.zeros(1, 16, 4, 4)}, path)


def headless(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def endless(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def newer(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'\\"format\\": 1', b'\\"format\\": 2', 1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "is broken: its bytes are not those that were written"),
        (flip, "is broken"),
        (foreign, "its header does not say what made it"),
        (headless, "does not begin as a safetensors file"),
        (endless, "does not begin as a safetensors file"),
        (piped, "it is no regular file"),
        (newer, "not written in format 1"),
        (Path.unlink, r"lacks the latents of pictures \[0\] of 2"),
        (lambda path: path.write_bytes(b""), "does not begin"),
    ],
    ids=[
        "truncated",
        "a bit flipped",
        "foreign",
        "no header",
        "endless header",
        "a pipe",
        "newer",
        "missing",
        "empty",
    ],
)
def test_a_broken_file_is_refused_before_anything_starts(
    kept: tuple[Any, Path], tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Pipeline.resume(spoiled(kept[1], tmp_path, spoil))


def test_what_does_not_fit_is_refused(kept: tuple[Any, Path], tmp_path: Path) -> None:
    from vaepp_plugins.tiny_z_image import build

    other = build(tmp_path / "other", vae_width=16, sample_size=64)
    with pytest.raises(UserError, match=r"a VAE whose block_out_channels.* differ from this model's"):
        Pipeline.resume(kept[1], [f"model.id={other}"])
    for late in ("call.seed=4", "model.compile=eager", 'model.lora=["x.safetensors"]', "limits.denoise=9"):
        with pytest.raises(SpecError, match=f"{re.escape(late)}: the latents are there already"):
            Pipeline.resume(kept[1], [late])
    with pytest.raises(UserError, match=r"holds no latents; give the folder of a run"):
        Pipeline.resume(tmp_path / "nowhere")
    mixed = spoiled(kept[1], tmp_path, Path.touch)
    details = {"spec": {}, "call": {}, "seed": 1, "images": 2, "pipeline": "P", "vae": {}, "software": "s"}
    write_latents(mixed, torch.zeros(1, 16, 4, 4), 1, details)
    with pytest.raises(UserError, match="belongs to another request"):
        Pipeline.resume(mixed)


@pytest.mark.usefixtures("inside")
def test_adapters_that_are_gone_are_not_missed(tiny_model: Path, tmp_path: Path) -> None:
    """What made the latents is still said in the picture."""
    style = tmp_path / "style.safetensors"
    factors = {"lora_A": torch.ones(1, 48), "lora_B": torch.ones(48, 1)}
    save_file({f"transformer.layers.0.attention.to_q.{k}.weight": v for k, v in factors.items()}, style)
    model = {"id": str(tiny_model), "dtype": "float32", "device": "cpu", "lora": [str(style)]}
    output = {"dir": str(tmp_path / "out"), "keep_latents": True}
    tables = {**alone(tiny_model, tmp_path, output=output), "model": model}
    with Pipeline.from_spec(tables) as pipe:
        result = pipe()
    style.unlink()
    with pytest.raises(SpecError, match=r"style\.safetensors: there is no such file"):
        Pipeline.from_spec(tables)
    again = Pipeline.resume(tmp_path / "out" / "run-0")
    assert all(same(*pair) for pair in zip(again.images, result.images, strict=True))
    with Image.open(again.files[0]) as saved:
        held = json.loads(saved.text["vaepp"])  # type: ignore[attr-defined]
    assert held["spec"]["model"]["lora"] == [{"path": "style.safetensors", "weight": 1.0}]


def test_runs_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    one, other = LatentStore(tmp_path), LatentStore(tmp_path)
    (tmp_path / "run-6").mkdir()
    assert [one.new_run(), other.new_run(), one.new_run()] == [7, 8, 9]


def test_a_stranger_cannot_set_the_temporary_folder_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = LatentStore.temporary()
    store.path.mkdir(mode=0o777)
    store.path.chmod(0o777)
    with pytest.raises(PermissionError, match="only this user"):
        store.new_run()
