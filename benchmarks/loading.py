"""Memory of loading a rank's part of a transformer: `python -m benchmarks.loading`.

On a random Z-Image whose transformer has 1.27 GiB in several safetensors files, in one run and on two real
ranks at a time: what `vaepp` loads, against a whole load by diffusers after which each weight in turn makes
way for the rank's part of it, or the layers of other ranks go. Both then read every weight once.

`rss` is the kernel's peak of resident memory, ru_maxrss but reset before loading. It counts the pages of
mapped files: diffusers maps the files, and where the dtype is that of the files the weights are those pages.
The kernel can take pages back, so `anonymous` leaves them out: its peak, looked at every millisecond. With
another dtype, as in most runs, whole weights are anonymous memory too. `before` is torch and diffusers, and
part of every figure. Exits with 1 where the `rss` of tensor parallelism on 2 ranks is above 0.75 of that of
load-then-cut.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import nn
from vaepp_plugins.tiny_z_image import build

from benchmarks.report import MIB, environment, write
from vaepp_sdk.assembly import build_pipeline, quiet_libraries
from vaepp_sdk.dit.row import Row
from vaepp_sdk.dit.spread import stages_of
from vaepp_sdk.dit.tensor import shard_modules
from vaepp_sdk.parallel.group import DiTGroup
from vaepp_sdk.registry import default_registry
from vaepp_sdk.resolve import Resolved, resolve
from vaepp_sdk.spec import PipelineSpec
from vaepp_sdk.testing import run_ranks

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT = 0.75
"""Of the peak of 2 ranks of tensor parallelism, against load-then-cut."""

SIZES = {"dim": 1152, "layers": 16, "heads": 12, "vae_width": 8, "max_shard_size": "500MB"}
LAYOUTS: tuple[Mapping[str, int], ...] = ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2})


def measured(rank: int, model: str, layout: Mapping[str, int], dtype: str, whole: bool) -> dict[str, float]:
    """One rank's peaks in MiB; with `whole`, those of a whole load that is cut afterwards."""
    quiet_libraries(rank)
    table = {"id": model, "dtype": dtype, "device": "cpu"}
    spec = PipelineSpec.load({"model": table, "parallel": layout, "call": {"prompt": "a cup"}})
    resolved = resolve(spec, default_registry())
    group = DiTGroup.create(resolved.dims, torch.device("cpu"))
    began = time.perf_counter()
    with peaks() as found:
        pipe = whole_then_cut(resolved, group) if whole else build_pipeline(resolved, group)
        found["seconds"] = time.perf_counter() - began
        weights = list(pipe.transformer.state_dict().values())
        assert all(bool(weight.isfinite().all()) for weight in weights)  # pages are there once they are read
    return found | {"weights": sum(weight.numel() * weight.element_size() for weight in weights) / MIB}


def whole_then_cut(resolved: Resolved, group: DiTGroup) -> Any:
    """The usual way: diffusers loads the transformer, and each weight in turn makes way for its part."""
    pipe = ZImagePipeline.from_pretrained(
        resolved.model_path, torch_dtype=getattr(torch, resolved.spec.model.dtype)
    )
    plan = resolved.entry.dit if resolved.entry else None
    assert plan is not None
    assert plan.tensor is not None
    for stage in stages_of(plan, group):
        stage.keep_own(pipe.transformer)
    tensor = Row.over(group.axis("tensor"))
    if tensor.size > 1:
        with torch.device("meta"):
            shards = shard_modules(
                ZImageTransformer2DModel.from_config(pipe.transformer.config), plan.tensor, tensor
            )
        for name, shard in shards.items():
            layer = pipe.transformer.get_submodule(name.rpartition(".")[0])
            # A copy, as a part of a tensor keeps all of it.
            layer.weight = nn.Parameter(shard.read(layer.weight.detach()).clone())
    return pipe


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Memory of this process before the block, and its peaks inside, in MiB."""
    found: dict[str, float] = {"before": _status("VmRSS"), "anonymous": 0.0}
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.001):
            found["anonymous"] = max(found["anonymous"], _status("RssAnon"))

    watcher = threading.Thread(target=look)
    watcher.start()
    yield found
    stop.set()
    watcher.join()
    found["rss"] = _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def rows(model: str, dtypes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every layout and dtype, the two ways one after the other."""
    for dtype in dtypes:
        for layout in LAYOUTS:
            ways = {
                name: run_ranks(2, measured, model, layout, dtype, whole, timeout=600)
                for name, whole in (("cut", True), ("vaepp", False))
            }
            ratios = {
                kind: max(rank[kind] for rank in ways["vaepp"]) / max(rank[kind] for rank in ways["cut"])
                for kind in ("rss", "anonymous")
            }
            yield {"dtype": dtype, "layout": dict(layout), "ratios": ratios, "ranks": ways}


def _print(row: Mapping[str, Any]) -> None:
    layout = " x ".join(f"{key} {size}" for key, size in row["layout"].items())
    print(f"{layout}, {row['dtype']}")
    for name, ranks in row["ranks"].items():
        for rank, found in enumerate(ranks):
            cells = "  ".join(f"{key} {value:7.1f}" for key, value in found.items())
            print(f"  {name:5} rank {rank}  {cells}")
    print(f"  ratio of peaks: rss {row['ratios']['rss']:.2f}, anonymous {row['ratios']['anonymous']:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, default=RESULTS / "loading.json")
    arguments = parser.parse_args()
    found = []
    quiet_libraries(0)
    with tempfile.TemporaryDirectory() as folder:
        model = build(Path(folder) / "model", **SIZES)
        files = sum(path.stat().st_size for path in (model / "transformer").glob("*.safetensors"))
        print(f"the transformer's files have {files / MIB:.0f} MiB, in float32")
        for row in rows(str(model), arguments.dtypes):
            _print(row)
            found.append(row)
    write(arguments.out, {"environment": environment(), "files_mib": files / MIB, "rows": found})
    high = [row for row in found if "tensor_parallel_size" in row["layout"] and row["ratios"]["rss"] > LIMIT]
    return 1 if high else 0


if __name__ == "__main__":
    sys.exit(main())
