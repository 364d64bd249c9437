"""A third party's package, built and installed by pip, chosen by name from a spec."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vaepp_plugins.tiny_z_image import build

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example plugin is installed; nothing outside the test's folder changes."""
    folder = tmp_path_factory.mktemp("plugin")
    source, target = folder / "source", folder / "site"
    # pip builds in the source folder, so it gets a copy.
    shutil.copytree(
        ROOT / "examples" / "plugin", source, ignore=shutil.ignore_patterns("build", "*.egg-info")
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, timeout=LIMIT)
    assert list(target.glob("vaepp_example-*.dist-info"))
    return {**os.environ, "PYTHONPATH": str(target), "VAEPP_EXAMPLE_LOG": str(folder / "stages.jsonl")}


def run(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-c", "from vaepp_sdk.cli.main import entry_point; entry_point()", *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def spec(folder: Path, model: Path, strategy: str, **more: str) -> Path:
    path = folder / f"{strategy}.toml"
    options = "\n".join(f"options.{key} = {value}" for key, value in more.items())
    path.write_text(
        f"""
        [model]
        id = "{model}"
        dtype = "float32"
        [parallel]
        tensor_parallel_size = 2
        vae_patch_parallel_size = 2
        [vae]
        strategy = "{strategy}"
        {options}
        [call]
        prompt = ["a cat", "a dog"]
        height = 96
        width = 160
        num_inference_steps = 2
        guidance_scale = 0.0
        max_sequence_length = 64
        seed = 3
        [output]
        dir = "{strategy}-{len(more)}"
        """
    )
    return path


def pixels(files: list[str]) -> list[bytes]:
    return [Image.open(file).convert("RGB").tobytes() for file in files]


def test_the_plugin_is_listed_with_its_package(environment: dict[str, str]) -> None:
    found = run(environment, "--plugins")
    assert {"name": "example", "distribution": "vaepp-example 0.1.0", "problem": None} in found["plugins"]
    assert "whole" in found["strategies"]
    assert "whole" in found["allowlist"]["ZImagePipeline"]
    assert found["allowlist"]["AuraFlowPipeline"] == ["tile", "whole"]


def test_its_strategy_decodes_a_built_in_pipeline(environment: dict[str, str], tmp_path: Path) -> None:
    model = build(tmp_path / "model", sample_size=512)
    here = run(environment, "--json", str(spec(tmp_path, model, "whole")))
    there = run(environment, "--json", str(spec(tmp_path, model, "whole", owner="1")))
    # The VAE's tile is larger than the picture, so its own tiled decode is the untiled one too.
    tile = run(environment, "--json", str(spec(tmp_path, model, "tile")))
    assert len(here["files"]) == 2
    assert pixels(here["files"]) == pixels(there["files"]) == pixels(tile["files"])


def test_its_pipeline_runs_on_two_ranks_and_is_observed(environment: dict[str, str], tmp_path: Path) -> None:
    from diffusers import AuraFlowPipeline
    from tiny_aura_flow import build as build_aura_flow

    model = tmp_path / "aura_flow"
    build_aura_flow(model)
    log = Path(environment["VAEPP_EXAMPLE_LOG"])
    log.unlink(missing_ok=True)
    found = run(environment, "--json", str(spec(tmp_path, model, "tile")))
    stages = [json.loads(line) for line in log.read_text().splitlines()]
    wanted = ["load", "encode_prompt", "denoise", "decode", "save"]
    for rank in (0, 1):
        assert [stage["stage"] for stage in stages if stage["rank"] == rank] == wanted

    pipe = AuraFlowPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_tiling()
    alone = pipe(
        ["a cat", "a dog"],
        height=96,
        width=160,
        num_inference_steps=2,
        guidance_scale=0.0,
        max_sequence_length=64,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images
    for file, image in zip(found["files"], alone, strict=True):
        # One step of 255: tensor parallelism sums in another order than one process does.
        worst = max(abs(a - b) for a, b in zip(pixels([file])[0], image.tobytes(), strict=True))
        assert worst <= 1
