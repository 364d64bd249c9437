"""The example scripts run as their docstrings say, at a small size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from vaepp_plugins.tiny_z_image import build

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SIZE = ("--height", "96", "--width", "160", "--num-inference-steps", "2")
LIMIT = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model") / "z-image", sample_size=64)


def run(*command: str | Path) -> str:
    # The child must not take this process for a launcher's rank.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ran = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def test_text_to_image_gives_the_same_picture_on_one_rank_and_two(model: Path, tmp_path: Path) -> None:
    script = EXAMPLES / "offline_inference" / "text_to_image" / "text_to_image.py"
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    run(script, "--model", model, *SIZE, "--vae-use-tiling", "--output", one)
    sizes = ("--tensor-parallel-size", "2", "--vae-patch-parallel-size", "2")
    told = run(script, "--model", model, *SIZE, *sizes, "--vae-use-tiling", "--output", two)
    assert f"saved {two}" in told
    assert "decode" in told
    difference = ImageChops.difference(opened(one), opened(two))
    assert opened(two).size == (160, 96)
    # bfloat16, and tensor parallelism sums in another order: a few steps of 255 in single pixels.
    steps = difference.tobytes()
    assert max(steps) < 32
    assert sum(steps) / len(steps) < 2


def test_an_existing_pipeline_decodes_over_the_ranks_of_torchrun(model: Path, tmp_path: Path) -> None:
    script, picture = EXAMPLES / "torchrun_existing_pipeline.py", tmp_path / "own.png"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    told = run(*launcher, script, "--model", model, *SIZE, "--output", picture)
    assert told.count("saved") == 1
    assert opened(picture).size == (160, 96)


def test_a_mistake_ends_with_one_message(tmp_path: Path) -> None:
    script = EXAMPLES / "offline_inference" / "text_to_image" / "text_to_image.py"
    ran = subprocess.run(
        [sys.executable, script, "--model", tmp_path / "nothing"],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    assert ran.returncode == 1
    assert "$.model.id" in ran.stderr
    assert "Traceback" not in ran.stderr
