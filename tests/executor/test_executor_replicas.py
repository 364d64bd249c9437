"""Data parallelism in the executor: one pool of pictures, whichever replica made their latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline_jobs import loaded, resolved_for, run

from vaepp_sdk.testing import run_ranks

PROMPTS = ["a city", "cats", "a dog on a beach"]
LAYOUTS: tuple[Mapping[str, int], ...] = (
    {"data_parallel_size": 2, "ulysses_degree": 2, "vae_patch_parallel_size": 4},
    {"data_parallel_size": 4, "vae_patch_parallel_size": 3},
    {"data_parallel_size": 2, "tensor_parallel_size": 2},
)


def replica_rank(rank: int, model: str, folder: str, layouts: tuple[Mapping[str, int], ...]) -> list[Any]:
    found = []
    for index, sizes in enumerate(layouts):
        resolved = resolved_for(
            model,
            parallel=dict(sizes),
            vae={"strategy": "tile"} if "vae_patch_parallel_size" in sizes else {"vae_use_tiling": True},
            output={"dir": f"{folder}/{index}"},
        )
        executor = loaded(resolved)
        three = run(executor, resolved, save=True, prompt=PROMPTS)
        one = run(executor, resolved, prompt=PROMPTS[0], height=64)  # all replicas but one are idle
        found.append(
            {
                "images": [np.asarray(image).astype(int) for image in (*three.images, *one.images)],
                "files": [Path(file).name for file in three.files],
                "stages": [end.stage for end in one.stages],
            }
        )
    return found


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tmp_path_factory.mktemp("alone"))
    return run_ranks(1, replica_rank, str(tiny_model), folder, ({},))[0][0]


def test_pictures_of_all_replicas_land_together(tiny_model: Path, tmp_path: Path, alone: Any) -> None:
    everyone = run_ranks(4, replica_rank, str(tiny_model), str(tmp_path), LAYOUTS, timeout=600)
    for index in range(len(LAYOUTS)):
        first = everyone[0][index]
        assert [file[:4] for file in first["files"]] == ["0000", "0001", "0002"]
        assert [file.removesuffix(".png")[-5:] for file in first["files"]] == ["seed7", "seed8", "seed9"]
        assert first["files"] == alone["files"], "names hold the prompts, in their order"
        assert len(first["images"]) == 4
        for image, whole in zip(first["images"], alone["images"], strict=True):
            assert image.shape == whole.shape
            # Batches of other sizes round otherwise: at most one level of 255.
            assert np.abs(image - whole).max() <= 1
        for rank in everyone:
            assert rank[index]["stages"] == ["encode_prompt", "denoise", "decode"]
        assert not any(rank[index]["images"] or rank[index]["files"] for rank in everyone[1:])
