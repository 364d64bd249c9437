"""`model.compile`: the same pictures from compiled blocks, on every kind of layout, from few graphs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import tiny_qwen_image
import tiny_wan
import torch
from diffusers import ModelMixin
from dims_jobs import TOLERANCE, difference, made
from families import QWEN, WAN
from pipeline_jobs import CALL, loaded, resolved_for
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from vaepp_sdk.dit.chain import Chain
from vaepp_sdk.dit.compiling import compile_blocks
from vaepp_sdk.dit.row import Row
from vaepp_sdk.dit.sequence import SequenceSplit, SplitAttention
from vaepp_sdk.entries import ChainPlan
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.testing import run_ranks

GUIDED: dict[str, Any] = {"prompt": ["a city", "cats"], "guidance_scale": 4.0}


@attrs.frozen
class Job:
    """A model on a layout.

    Attributes:
        model: its name.
        sizes: the `[parallel]` table.
        call: the `[call]` table.
        graphs: the most graphs that a rank compiles for it: one for each kind of block and of arguments.
        backend: one that generates no code, so that bits must be equal; a compiler's work is torch's to test.
    """

    model: str
    sizes: Mapping[str, int]
    call: Mapping[str, Any]
    graphs: int
    backend: str = "eager"


JOBS = (
    Job("z_image", {"tensor_parallel_size": 2, "cfg_parallel_size": 2}, {**CALL, **GUIDED}, 3),
    # Each stage runs one prompt of two at a time, and the layers that make scales the rows of both.
    Job("z_image", {"data_parallel_size": 2, "pipeline_parallel_size": 2}, {**CALL, **GUIDED}, 3),
    Job(
        "qwen",
        {"pipeline_parallel_size": 2, "ulysses_degree": 2},
        {**QWEN.base, **QWEN.guided},
        3,
        "aot_eager",
    ),
    # Two kinds of attention, one of them not to the sequence; with an adapter fused before.
    Job("wan", {"ulysses_degree": 2, "ring_degree": 2}, {**WAN.base, **WAN.guided}, 1),
)


def model_table(folder: str, backend: str) -> dict[str, Any]:
    adapter = Path(folder) / "style.safetensors"
    lora = [str(adapter)] if adapter.exists() else []
    return {"id": folder, "dtype": "float32", "device": "cpu", "compile": backend, "lora": lora}


def compile_rank(rank: int, folders: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every job uncompiled, compiled, and compiled again."""
    found = []
    for job in JOBS:
        wanted, graphs = None, []
        counters = torch._dynamo.utils.counters
        for backend in ("off", job.backend):
            torch._dynamo.reset()
            counters.clear()
            table = model_table(folders[job.model], backend)
            resolved = resolved_for(
                table["id"], parallel=dict(job.sizes), model=table, call=dict(job.call), vae={"output": "all"}
            )
            executor = loaded(resolved)
            wanted, before = made(executor, resolved, {"num_inference_steps": 2}), wanted
        graphs.append(counters["stats"]["unique_graphs"])
        made(executor, resolved, {"seed": 8, "num_inference_steps": 2})
        graphs.append(counters["stats"]["unique_graphs"])
        assert before is not None
        assert wanted is not None
        found.append(
            {
                "same": torch.equal(wanted.pictures, before.pictures),
                "graphs": graphs,
                "broken": sum(counters["graph_break"].values()),
            }
        )
    return found


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("compiled")
    tiny_qwen_image.build(folder / "qwen")
    tiny_wan.build(folder / "wan")
    width = 48
    change = {
        f"transformer.blocks.1.attn1.to_q.lora_{kind}.weight": torch.randn(*shape)
        for kind, shape in (("A", (2, width)), ("B", (width, 2)))
    }
    save_file(change, folder / "wan" / "style.safetensors")
    return {"z_image": str(tiny_model), **{name: str(folder / name) for name in ("qwen", "wan")}}


def test_compiled_blocks_make_the_same_pictures(folders: dict[str, str]) -> None:
    for rank in run_ranks(4, compile_rank, folders, timeout=900, collective=300):
        for job, found in zip(JOBS, rank, strict=True):
            assert found["same"], job
            assert found["broken"] == 0, job
            first, second = found["graphs"]
            assert 0 < first <= job.graphs, job
            assert second == first, "the next request compiles nothing"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        found: torch.Tensor = F.scaled_dot_product_attention(query, key, value)
        return found.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.beside = Attention(), Attention(), Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = x + self.first(x) + self.second(x) * self.beside(x)
        return made


class Model(nn.Module):
    _repeated_blocks = ("Block",)
    compile_repeated_blocks = ModelMixin.compile_repeated_blocks

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own use of it
def test_a_compilers_code_gives_the_same_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What inductor makes around the operators, on one rank: to trade is not its work."""
    calls, attend = [], SplitAttention._attend

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return attend(*args, **kwargs)

    monkeypatch.setattr(SplitAttention, "_attend", counted)
    model, alone = Model(), Row(None, 0, 1)
    plan = ChainPlan(blocks="blocks", carried=("x",), batched=("x",), sequence={"x": 1}, local=("beside",))
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        whole = model(x)
        model.blocks = Chain(model.blocks, plan, SequenceSplit(alone, alone), None)
        compile_blocks(model, "inductor")
        assert difference(model(x), whole) <= TOLERANCE
    assert len(calls) == 4, "two of each block's attentions are to the sequence"


def test_a_model_that_repeats_no_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear does not say which blocks it repeats"):
        compile_blocks(torch.nn.Linear(1, 1), "eager")
