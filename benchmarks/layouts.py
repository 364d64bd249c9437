"""Every layout of the DiT group against one process: `python -m benchmarks.layouts [FAMILY ...]`.

On small random checkpoints, in float32 on gloo ranks: every pair of dimensions on 4 ranks, every three of
them on 8, and layouts that divide nothing evenly on 3 to 8. Each layout loads once and serves requests of
several sizes. Differences are those of the pictures, in [0, 1]; where the latents have the very bits of one
process a 0 is printed. Exits with 1 where a difference is above 5e-6, ranks hold different bits, a request
makes a process group, or a layout fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import attrs
import torch

from benchmarks.layout_families import FAMILIES, Family
from benchmarks.report import environment, write
from vaepp_sdk.assembly import quiet_libraries
from vaepp_sdk.dit_rules import KEYS
from vaepp_sdk.registry import default_registry
from vaepp_sdk.testing import RankFailedError, run_ranks

from dims_jobs import TOLERANCE, Made, difference, layout_rank  # isort: skip  # found once the families are

RESULTS = Path(__file__).resolve().parent / "results"
Sizes = Mapping[str, int]
"""The size of each dimension above 1, by the names of `vaepp_sdk.parallel.dims.AXES`."""

UNEVEN: tuple[Sizes, ...] = (
    {"ring": 3},
    {"ulysses": 3},
    {"pipeline": 3},
    {"data": 3},
    {"data": 4},
    {"ulysses": 4},
    {"tensor": 4},
    {"ring": 2, "ulysses": 3},
    {"ring": 3, "ulysses": 2},
    {"pipeline": 3, "cfg": 2},
    {"pipeline": 3, "ulysses": 2},
    {"data": 3, "tensor": 2},
    {"data": 2, "ring": 3},
    {"cfg": 2, "ulysses": 3},
    {"ring": 2, "ulysses": 4},
    {"cfg": 2, "tensor": 4},
    {"data": 4, "pipeline": 2},
    {"data": 2, "ring": 4},
)
"""With 4 heads, 3 layers or 5, and 2, 4 and 3 pictures."""


@attrs.frozen(kw_only=True)
class Row:
    """What one layout gave.

    Attributes:
        family: a key of `FAMILIES`.
        ranks: how many.
        sizes: the layout.
        differences: the largest, of each request.
        equal: whether the latents of each request have the bits of one process.
        alike: whether all ranks hold the same bits.
        groups: process groups made at start that hold a rank, of the rank with the most.
        groups_in_calls: process groups made while requests ran.
        problem: what failed, if anything.
    """

    family: str
    ranks: int
    sizes: Sizes
    differences: tuple[float, ...] = ()
    equal: tuple[bool, ...] = ()
    alike: bool = False
    groups: int = 0
    groups_in_calls: int = 0
    problem: str = ""

    @property
    def is_good(self) -> bool:
        """Whether it keeps what is promised."""
        kept = self.alike and not self.groups_in_calls and not self.problem
        return kept and max(self.differences) <= TOLERANCE


def layouts(family: Family) -> dict[int, list[Sizes]]:
    """What the family's entry can run, by the number of ranks."""
    plan = default_registry().pipelines[family.pipeline].dit
    assert plan is not None
    even = [dict.fromkeys(axes, 2) for count in (2, 3) for axes in combinations(plan.axes, count)]
    found = defaultdict(list)
    for sizes in (*even, *UNEVEN):
        if set(sizes) <= set(plan.axes):
            found[prod(sizes.values())].append(sizes)
    return dict(sorted(found.items()))


def measure(name: str, folder: Path, only: int) -> Iterator[Row]:
    """A family's rows, one launch for each number of ranks."""
    family = FAMILIES[name]
    family.build(folder)
    ((alone,),) = _launched(family, folder, 1, [{}])
    wanted = alone["made"]
    for made in wanted:
        assert float(made.pictures.std()) > 0.1, "a flat picture would agree with anything"
    for ranks, chosen in layouts(family).items():
        if only in (0, ranks):
            for sizes, found in zip(chosen, _run(family, folder, ranks, chosen), strict=True):
                yield _row(name, ranks, sizes, found, wanted)


def _run(family: Family, folder: Path, ranks: int, chosen: Sequence[Sizes]) -> list[Any]:
    """What every rank has of each layout; where the launch fails, of each in a launch of its own."""
    try:
        return list(zip(*_launched(family, folder, ranks, chosen), strict=True))
    except RankFailedError as error:
        if len(chosen) == 1:
            return [str(error)]
        return [found for sizes in chosen for found in _run(family, folder, ranks, [sizes])]


def _launched(family: Family, folder: Path, ranks: int, chosen: Sequence[Sizes]) -> list[Any]:
    """By rank and layout, what it has."""
    tables = [{KEYS[axis]: size for axis, size in sizes.items()} for sizes in chosen]
    asked = str(folder), tables, family.calls, family.base
    return run_ranks(ranks, layout_rank, *asked, timeout=900, collective=300)


def _row(name: str, ranks: int, sizes: Sizes, found: Any, wanted: Sequence[Made]) -> Row:
    row = Row(family=name, ranks=ranks, sizes=sizes)
    if isinstance(found, str):
        return attrs.evolve(row, problem=found.strip().splitlines()[-1])
    first: list[Made] = found[0]["made"]
    return attrs.evolve(
        row,
        differences=tuple(
            difference(made.pictures, one.pictures) for made, one in zip(first, wanted, strict=True)
        ),
        equal=tuple(torch.equal(made.latents, one.latents) for made, one in zip(first, wanted, strict=True)),
        alike=all(
            torch.equal(mine.latents, made.latents) and torch.equal(mine.pictures, made.pictures)
            for rank in found
            for mine, made in zip(rank["made"], first, strict=True)
        ),
        groups=max(rank["groups"] for rank in found),
        groups_in_calls=max(rank["groups_in_calls"] for rank in found),
    )


def _line(row: Row) -> str:
    layout = " x ".join(f"{axis} {size}" for axis, size in row.sizes.items())
    if row.problem:
        return f"{row.family:11} {layout:34} {row.problem}"
    told = "  ".join(
        "      0" if equal else f"{far:7.1e}" for far, equal in zip(row.differences, row.equal, strict=True)
    )
    groups = f"groups {row.groups} + {row.groups_in_calls}"
    return f"{row.family:11} {layout:34} {told}  {groups}{'' if row.is_good else '  NOT AS PROMISED'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all of them"
    )
    parser.add_argument("--ranks", type=int, default=0, help="layouts of so many ranks only")
    parser.add_argument("--out", type=Path, default=RESULTS / "layouts.json")
    arguments = parser.parse_args()
    unknown = set(arguments.families) - set(FAMILIES)
    if unknown:
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    quiet_libraries(0)
    rows: list[Row] = []
    for name in arguments.families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(name, Path(folder) / "model", arguments.ranks):
                rows.append(row)
                print(_line(row), flush=True)
        write(arguments.out, {"environment": environment()}, [attrs.asdict(row) for row in rows])
    bad = [row for row in rows if not row.is_good]
    print(f"{len(rows)} layouts, {len(bad)} not as promised")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
