"""Bytes of a denoising step: what ranks send, counted, against arithmetic: `python -m benchmarks.traffic`.

On small random checkpoints of each family, in float32, on 2, 3 and 4 gloo ranks and one dimension at a time:
two steps with two prompts of unlike length, at sizes that divide nothing evenly. Then, by the same
arithmetic, the table of published models that the documentation has. Exits with 1 where a count differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from benchmarks.layout_families import FAMILIES, LONG, SHORT
from benchmarks.report import MIB, environment, write
from benchmarks.step_bytes import Step, sent
from benchmarks.step_models import MODELS, STEPS
from vaepp_sdk.assembly import quiet_libraries
from vaepp_sdk.dit_rules import KEYS
from vaepp_sdk.parallel.dims import AXES
from vaepp_sdk.registry import default_registry
from vaepp_sdk.testing import run_ranks

from dit_traffic import denoised_rank  # isort: skip  # found once the families are imported

RESULTS = Path(__file__).resolve().parent / "results"

TOKENS: Mapping[str, tuple[int, int]] = {
    "z_image": (96, 64),
    "flux": (37, 63),
    "flux2": (37, 63),
    "flux2_klein": (37, 63),
    "sd3": (77 + 37, 63),
    "qwen_image": (197, 63),
    "wan": (37, 2 * 63),
}
"""Of the longer text, and of 7 x 9 patches; for Z-Image, which pads to multiples of 32, of 8 x 8."""

_STEPS = 2
"""Some schedulers cannot make one step alone."""

Case = tuple[str, str, int]
"""A family, a dimension, and its size."""


def cases(axes: Iterable[str], size: int) -> list[Case]:
    """What each family's entry can run, and its small checkpoint too: that has 3 layers, some have 5."""
    found = []
    for name in TOKENS:
        plan = default_registry().pipelines[FAMILIES[name].pipeline].dit
        assert plan is not None
        able = [axis for axis in axes if axis in plan.axes and (axis, size) not in _IMPOSSIBLE]
        found += [(name, axis, size) for axis in able]
    return found


_IMPOSSIBLE = {("cfg", 3), ("cfg", 4), ("tensor", 3), ("pipeline", 4)}
"""Guidance has two branches, 3 does not divide 4 heads, and 4 stages want 4 layers."""


def counted(models: Path, chosen: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Run cases of one size in one launch; what each rank sent, and what the arithmetic says.

    Args:
        models: a folder with the families' small checkpoints, by name.
        chosen: the cases.
    """
    (ranks,) = {size for _, _, size in chosen}
    jobs = [
        (str(models / name), {KEYS[axis]: size}, _call(name, guided=axis == "cfg"))
        for name, axis, size in chosen
    ]
    found = run_ranks(ranks, denoised_rank, jobs, timeout=900, collective=300)
    for (name, axis, size), counts in zip(chosen, zip(*found, strict=True), strict=True):
        step = _step(name, models / name, guided=axis == "cfg")
        wanted = [_STEPS * sent(step, axis, size, rank) for rank in range(size)]
        yield {"family": name, "axis": axis, "ranks": size, "counted": list(counts), "wanted": wanted}


def _call(name: str, *, guided: bool) -> dict[str, Any]:
    family = FAMILIES[name]
    chosen = {**family.base, "prompt": [SHORT, LONG], "height": 112, "width": 144}
    if guided:
        chosen |= family.calls[0]
        chosen.pop("cfg_truncation", None)  # a step without guidance would send something else
    if name == "z_image":
        chosen |= {"height": 128, "width": 128}
    return chosen | {"num_inference_steps": _STEPS}


def _step(name: str, model: Path, *, guided: bool) -> Step:
    config = json.loads((model / "transformer" / "config.json").read_text())
    step = STEPS[FAMILIES[name].pipeline](config, *TOKENS[name])
    return attrs.evolve(step, itemsize=4, batch=4 if guided and not step.two_calls else 2)


def table() -> list[str]:
    """MiB that a rank sends in one step of published models on 2 ranks, in bfloat16, as lines of a table.

    One picture; with guidance for cfg, and for the others one transformer call without.
    """
    axes = [axis for axis in AXES if axis != "data"]
    lines = [f"| model | {' | '.join(axes)} |", f"| --- |{' --- |' * len(axes)}"]
    for name, (pipeline, config, text, picture) in MODELS.items():
        step = STEPS[pipeline](config, text, picture)
        cells = []
        plan = default_registry().pipelines[pipeline].dit
        for axis in axes:
            if axis == "cfg" and (plan is None or axis not in plan.axes):
                cells.append("-")
                continue
            call = attrs.evolve(step, batch=2) if axis == "cfg" and not step.two_calls else step
            nbytes = max(sent(call, axis, 2, rank) for rank in range(2))
            cells.append(f"{nbytes / MIB:.1f}" if nbytes < 10 * MIB else f"{nbytes / MIB:.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--out", type=Path, default=RESULTS / "traffic.json")
    arguments = parser.parse_args()
    quiet_libraries(0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in TOKENS:
            FAMILIES[name].build(Path(folder) / name)
        for ranks in arguments.ranks:
            for row in counted(Path(folder), cases(AXES, ranks)):
                same = row["counted"] == row["wanted"]
                told = "as computed" if same else f"COMPUTED {row['wanted']}"
                print(f"{row['family']:11} {row['axis']:8} {ranks}  {row['counted']} {told}", flush=True)
                found.append(row)
    print("\n".join(table()))
    write(arguments.out, {"environment": environment()}, found)
    return int(any(row["counted"] != row["wanted"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
