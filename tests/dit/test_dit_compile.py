"""`model.compile`: the same pictures from compiled blocks, on the layouts that allow it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_jobs import loaded, resolved_for, run

from vaepp_sdk.dit.compiling import compile_blocks
from vaepp_sdk.errors import SpecError, UnsupportedError
from vaepp_sdk.testing import run_ranks

REQUEST: dict[str, Any] = {"prompt": ["a city", "cats"], "guidance_scale": 4.0}
LAYOUTS: tuple[dict[str, int], ...] = (
    {"tensor_parallel_size": 2, "cfg_parallel_size": 2},
    {"data_parallel_size": 2, "tensor_parallel_size": 2},
)


def model_table(folder: str, backend: str) -> dict[str, Any]:
    # Dynamo's own work without code generation: what a backend makes of a graph is torch's to test.
    return {"id": folder, "dtype": "float32", "device": "cpu", "compile": backend}


def compile_rank(rank: int, folder: str) -> list[dict[str, Any]]:
    found = []
    for sizes in LAYOUTS:
        pictures, graphs = [], 0
        for backend in ("off", "eager"):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            resolved = resolved_for(folder, parallel=dict(sizes), model=model_table(folder, backend))
            pictures.append(
                [np.asarray(image) for image in run(loaded(resolved), resolved, **REQUEST).images]
            )
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        same = all(np.array_equal(plain, made) for plain, made in zip(*pictures, strict=True))
        broken = sum(torch._dynamo.utils.counters["graph_break"].values())
        found.append({"same": same, "count": len(pictures[1]), "graphs": graphs, "broken": broken})
    return found


def test_compiled_blocks_make_the_same_pictures(tiny_model: Path) -> None:
    everyone = run_ranks(4, compile_rank, str(tiny_model), timeout=600)
    for rank, layouts in enumerate(everyone):
        for layout in layouts:
            assert layout["same"]
            assert layout["count"] == (2 if rank == 0 else 0)
            assert layout["graphs"] > 0
            assert layout["broken"] == 0


@pytest.mark.parametrize("key", ["ulysses_degree", "ring_degree", "pipeline_parallel_size"])
def test_what_reaches_into_blocks_is_refused_beside_it(tiny_model: Path, key: str) -> None:
    folder = str(tiny_model)
    message = "$.model.compile: found 'inductor', and the transformer is split by "
    with pytest.raises(SpecError, match=re.escape(message)):
        resolved_for(folder, parallel={key: 2}, model=model_table(folder, "inductor"))


def test_a_model_that_repeats_no_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear does not say which blocks it repeats"):
        compile_blocks(torch.nn.Linear(1, 1), "eager")
