"""The command line on a small real model: own ranks, torchrun's ranks, and a fault in the middle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from cli.commands import finish, real, run_folders, write_spec
from PIL import Image

FAULT_PLUGIN = """
import os, signal
from vaepp_sdk import hookimpl

VAEPP_API = 1

@hookimpl
def vaepp_on_stage_start(event):
    if event.stage == "decode" and event.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def pixels(file: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture
def spec(tmp_path: Path, tiny_model: Path) -> str:
    return str(write_spec(tmp_path, tiny_model))


def test_own_ranks_and_torchruns_make_the_same_picture(spec: str, tmp_path: Path) -> None:
    alone = real(spec, "--json", "--set", 'call.prompt=["a red cube", "a cup"]', tmp_path=tmp_path)
    assert alone.returncode == 0, alone.stderr
    found = json.loads(alone.stdout)
    assert [row["stage"] for row in found["stages"]] == ["load", "encode_prompt", "denoise", "decode", "save"]
    assert all(row["seconds"] > 0 and len(row["peak_bytes"]) == 2 for row in found["stages"])
    assert [Path(file).parent for file in found["files"]] == [tmp_path / "out"] * 2, "beside the spec"
    assert len(alone.stderr.splitlines()) == 1, "the notice, and no library's chatter"

    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "vaepp_sdk.cli"]
    joined = finish([*launcher, spec, "--json"], tmp_path, PYTHONWARNINGS="ignore")
    assert joined.returncode == 0, joined.stderr
    (file,) = json.loads(joined.stdout)["files"]
    assert file not in found["files"], "nothing is overwritten"
    # A batch of two takes other kernels than one picture alone: equal up to rounding, so to one step of 255.
    difference = np.abs(pixels(file).astype(int) - pixels(found["files"][0]).astype(int))
    assert difference.max() <= 1
    assert pixels(file).shape == (128, 96, 3)
    assert pixels(file).std() > 1
    assert run_folders(tmp_path) == []


def test_a_rank_killed_in_decode_is_one_block_and_nothing_is_lost(spec: str, tmp_path: Path) -> None:
    (tmp_path / "striking_plugin.py").write_text(FAULT_PLUGIN)
    package = tmp_path / "striking-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: striking\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vaepp_sdk]\nstriking = striking_plugin\n")
    path = ":".join([str(tmp_path), *sys.path])
    done = finish(["-m", "vaepp_sdk.cli", spec], tmp_path, PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stdout == ""
    _, first, second, third = done.stderr.splitlines()
    assert first.startswith("vaepp-run: rank 1 failed in stage decode: its process was killed by SIGKILL")
    assert second.startswith("  the logs of all ranks are in ")
    run = tmp_path / "out" / "run-0"
    assert third == f"  the latents are kept; go on from them with: vaepp-run --resume {run}"
    assert not list((tmp_path / "out").glob("*.png"))
    resumed = real("--resume", str(run), "--quiet", tmp_path=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert Path(resumed.stdout.strip()).parent == run.parent
    assert pixels(resumed.stdout.strip()).shape == (128, 96, 3)
    both = real(spec, "--resume", str(run), tmp_path=tmp_path)
    assert (both.returncode, both.stdout) == (2, "")
    assert "--resume does not go together with a spec" in both.stderr
