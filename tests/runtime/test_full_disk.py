"""A disk that is really full: `vaepp-run` into a small file system of its own, and on from what it kept."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli.commands import environment, write_spec
from PIL import Image

MOUNTED = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
"""A shell in a mount namespace of its own: what it mounts is gone with it, and needs no root."""

SCRIPT = """
mount -t tmpfs -o size=16k tmpfs "$1" || exit 77
head -c 8192 /dev/urandom > "$1/0000-old-seed1.png"
sha256sum < "$1/0000-old-seed1.png"
shift
"$@" >&2
echo $?
sha256sum < "$OUT/0000-old-seed1.png"
ls -A "$OUT"
"""


@pytest.fixture
def _can_mount(tmp_path: Path) -> None:
    """Skip where nobody may mount, as in containers without user namespaces."""
    try:
        command = [*MOUNTED, 'mount -t tmpfs tmpfs "$0"', str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here to mount a small disk with")
    if done.returncode:
        pytest.skip(f"this process may not mount a small disk: {done.stderr.strip()}")


@pytest.mark.usefixtures("_can_mount")
def test_a_full_disk_costs_no_denoising_and_no_old_picture(tiny_model: Path, tmp_path: Path) -> None:
    """8 KiB are left, for latents of 12 KiB and for a picture."""
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    out.mkdir()
    temporary.mkdir()
    run = [sys.executable, "-m", "vaepp_sdk.cli", str(write_spec(tmp_path, tiny_model)), "--quiet"]
    variables = environment(temporary, OUT=str(out))
    command = [*MOUNTED, SCRIPT, "sh", str(out), *run, "--set", f'output.dir="{out}"']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, check=False)
    before, code, after, *left = done.stdout.splitlines()
    assert (code, after, left) == ("2", before, ["0000-old-seed1.png"]), done.stderr
    warning, *block = [line for line in done.stderr.splitlines() if "vae_use_tiling" not in line]
    kept = temporary / f"vaepp-latents-{os.getuid()}" / "run-0"
    assert re.search(rf"cannot be kept in {out} \(No space left .*; they are in {kept} while", warning)
    assert re.match(r"vaepp-run: cannot write \S+0001-a-red-cube-seed5\.png: No space left", block[0])
    (how,) = (line.partition("with: ")[2] for line in block if "--resume" in line)
    name, *arguments = shlex.split(how)
    assert name == "vaepp-run"
    elsewhere = tmp_path / "elsewhere"
    resumed = subprocess.run(
        [sys.executable, "-m", "vaepp_sdk.cli", *arguments, "--quiet", "--set", f'output.dir="{elsewhere}"'],
        capture_output=True,
        text=True,
        timeout=300,
        env=variables,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    (picture,) = elsewhere.iterdir()
    with Image.open(picture) as image:
        assert image.size == (96, 128)
