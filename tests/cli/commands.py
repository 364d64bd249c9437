"""Runs `vaepp-run` as a person would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DRIVER = str(Path(__file__).with_name("driver.py"))
REAL = ("-m", "vaepp_sdk.cli")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

SPEC = """
[model]
id = {model!r}
dtype = "float32"
device = "cpu"

[parallel]
tensor_parallel_size = 2
vae_patch_parallel_size = 2

[call]
prompt = "a red cube"
height = 128
width = 96
num_inference_steps = 2
max_sequence_length = 64
seed = 5
"""


def write_spec(folder: Path, model: Path) -> Path:
    spec = folder / "pipeline.toml"
    spec.write_text(SPEC.format(model=str(model)).replace("'", '"'))
    return spec


def environment(tmp_path: Path, **extra: str) -> dict[str, str]:
    """This process's, without a launcher's variables, with run folders where the test can count them."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    path = os.pathsep.join(sys.path)
    return {**kept, "PYTHONPATH": path, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", **extra}


def light(*arguments: str, tmp_path: Path, fault: Mapping[str, Any] | None = None, **extra: str) -> Any:
    """Run to the end with stand-in ranks."""
    return finish([DRIVER, *arguments], tmp_path, VAEPP_TEST_FAULT=json.dumps(fault or {}), **extra)


def real(*arguments: str, tmp_path: Path, **extra: str) -> Any:
    """Run to the end."""
    return finish([*REAL, *arguments], tmp_path, **extra)


def finish(command: Sequence[str], tmp_path: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(tmp_path, **extra),
        check=False,
    )


def run_folders(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("vaepp-run-*"))
